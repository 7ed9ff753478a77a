"""What fine-tuning leaves alone and what it changes, adapters saved and merged, tokenizers of another resolution."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.fine_tuning import merged_tokenizer, resize_tokenizer, set_tuning


SIDES = {"encoder": ("encoder.", "quant_conv.", "quantize."), "decoder": ("decoder.", "post_quant_conv.")}
METHODS = [("frozen", "full"), ("full", "frozen"), ("lora", "frozen"), ("frozen", "lora"), ("lora", "full")]
METHODS += [("full", "lora"), ("lora", "lora")]
MAETOK = {
    "quantizer": "none",
    "position_embedding_type": "rope_mixed",
    "encoder_mask_token": True,
    "decoder_type": "movq",
    "decoder_cls_token": False,
}


@pytest.fixture
def build(tokenizer_config):
    """A tokenizer of two blocks on either side, by default for 32 pixels, that answers to all of its weights."""

    def tokenizer(**changes) -> AutoencoderSoftVQ:
        config = {"sample_size": 32, "encoder_num_layers": 2, "decoder_num_layers": 2, "initializer_range": 0.2}
        model = AutoencoderSoftVQ(**{**tokenizer_config, **config, "token_initializer_range": 0.5, **changes})
        for name, module in model.named_modules():
            if name.endswith("modulation"):  # starts from zero
                torch.nn.init.normal_(module.weight)
        return model

    return tokenizer


def images(batch_size: int = 2, size: int = 32) -> torch.Tensor:
    coarse = torch.rand(batch_size, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def training_loss(tokenizer: AutoencoderSoftVQ, pixel_values: torch.Tensor) -> torch.Tensor:
    output = tokenizer(pixel_values)
    losses = [output[key] for key in output if key.endswith("_loss")]
    return F.mse_loss(output.sample, pixel_values) + sum(losses)


def train(tokenizer: AutoencoderSoftVQ, steps: int = 3, lr: float = 1e-2) -> None:
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = training_loss(tokenizer, images())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def predict(tokenizer: AutoencoderSoftVQ, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
    return copy.deepcopy(tokenizer).eval()(images() if pixel_values is None else pixel_values).sample


# What is trained


@pytest.mark.parametrize("quantizer", ["softvq", "vq", "kl", "none"])
@pytest.mark.parametrize(("encoder_tuning", "decoder_tuning"), METHODS)
def test_training_changes_what_it_is_told_to(build, encoder_tuning, decoder_tuning, quantizer):
    tokenizer = build(quantizer=quantizer)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    prediction = predict(tokenizer)
    set_tuning(tokenizer, encoder_tuning, decoder_tuning, lora_rank=2)
    assert torch.equal(predict(tokenizer), prediction), "adapters start without effect"

    methods = {"encoder": encoder_tuning, "decoder": decoder_tuning}
    expected = {name for side, method in methods.items() if method == "full" for name in before if _is_in(name, side)}
    for side in (side for side, method in methods.items() if method == "lora"):
        for block, linear in ((block, linear) for block in (0, 1) for linear in (1, 2)):
            module = f"{side}.blocks.{block}.ff.linear_{linear}"
            expected |= {f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"}
    trained = {_plain(name) for name, value in tokenizer.named_parameters() if value.requires_grad}
    assert trained == expected

    train(tokenizer)
    after = {_plain(name): value for name, value in tokenizer.state_dict().items()}
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == expected & before.keys()
    adapters = {name for name in after if ".lora_B." in name}
    assert all(after[name].abs().sum() > 0 for name in adapters) and adapters == {n for n in expected if "lora_B" in n}


@pytest.mark.parametrize("decoder_tuning", ["full", "lora"])
@pytest.mark.parametrize("quantizer", ["softvq", "vq", "kl", "none"])
def test_latents_of_a_frozen_encoder_stay_bit_equal(build, quantizer, decoder_tuning):
    tokenizer = build(quantizer=quantizer)
    with torch.no_grad():
        latent, prediction = tokenizer(images()).latent, predict(tokenizer)
    set_tuning(tokenizer, "frozen", decoder_tuning)
    train(tokenizer)
    with torch.no_grad():
        output = tokenizer(images())
    assert torch.equal(output.latent, latent) and not torch.equal(output.sample, prediction)


def test_adapters_have_the_official_rank_on_every_kind_of_block(build):
    for changes in (MAETOK, {"encoder_activation_fn": "swiglu", "decoder_activation_fn": "swiglu"}):
        tokenizer = build(**changes)
        set_tuning(tokenizer, "lora", "lora")
        ranks = [value.shape[0] for name, value in tokenizer.named_parameters() if ".lora_A." in name]
        assert ranks == [8] * 8
        train(tokenizer)
        assert all(value.abs().sum() > 0 for name, value in tokenizer.named_parameters() if ".lora_B." in name)


def test_what_was_frozen_before_stays_frozen(build):
    """As the mask token of a tokenizer that is trained without masks."""
    for encoder_tuning in ("full", "lora"):
        tokenizer = build(**MAETOK)
        tokenizer.encoder.positions.mask_token.requires_grad_(False)
        tokenizer.decoder.positions.mask_token.requires_grad_(False)
        set_tuning(tokenizer, encoder_tuning, "full")
        assert not tokenizer.encoder.positions.mask_token.requires_grad
        assert not tokenizer.decoder.positions.mask_token.requires_grad
        assert tokenizer.decoder.pixel_head.proj.weight.requires_grad


def test_bad_tuning(build):
    tokenizer = build()
    with pytest.raises(ValueError, match="`encoder_tuning` is 'half', allowed: full, frozen, lora"):
        set_tuning(tokenizer, "half", "full")
    with pytest.raises(ValueError, match="`decoder_tuning` is None, allowed: full, frozen, lora"):
        set_tuning(tokenizer, "full", None)
    with pytest.raises(ValueError, match="are 'frozen', allowed: at most one of them"):
        set_tuning(tokenizer, "frozen", "frozen")
    with pytest.raises(ValueError, match="`lora_rank` is 0, allowed: 1 or more"):
        set_tuning(tokenizer, "frozen", "lora", lora_rank=0)
    assert all(parameter.requires_grad for parameter in tokenizer.parameters()), "no error has changed anything"
    set_tuning(tokenizer, "lora", "full")
    with pytest.raises(ValueError, match="has the adapters default, allowed: a tokenizer without"):
        set_tuning(tokenizer, "lora", "full")


# Adapters on disk


@pytest.mark.parametrize("methods", [("lora", "lora"), ("lora", "frozen"), ("frozen", "lora")])
@pytest.mark.parametrize("changes", [{}, MAETOK], ids=["softvq", "maetok"])
def test_base_with_adapters_is_the_merged_tokenizer(build, changes, methods, tmp_path):
    tokenizer = build(**changes)
    tokenizer.save_pretrained(tmp_path / "base")
    base = predict(tokenizer)
    set_tuning(tokenizer, *methods, lora_rank=3)
    train(tokenizer)
    trained = predict(tokenizer)
    assert (trained - base).abs().max() > 1e-2

    tokenizer.save_lora_adapter(tmp_path / "lora")
    merged = merged_tokenizer(tokenizer)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(predict(tokenizer), trained), "the trained tokenizer keeps its adapters"
    assert any("lora" in name for name in tokenizer.state_dict())

    # no trace of adapters in the result
    with safe_open(tmp_path / "merged" / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
    with safe_open(tmp_path / "base" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert names == set(file.keys())
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("base", "merged")]
    assert configs[0] == configs[1]
    tolerance = {"atol": 1e-5 * trained.abs().max().item(), "rtol": 0}
    torch.testing.assert_close(predict(AutoencoderSoftVQ.from_pretrained(tmp_path / "merged")), trained, **tolerance)

    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all("lora" in name for name in file.keys())
        assert {name.split(".")[0] for name in file.keys()} == {
            side for side, method in zip(("encoder", "decoder"), methods, strict=True) if method == "lora"
        }
    adapted = AutoencoderSoftVQ.from_pretrained(tmp_path / "base")
    adapted.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True)
    torch.testing.assert_close(predict(adapted), trained, **tolerance)
    torch.testing.assert_close(predict(adapted), predict(merged), **tolerance)
    adapted.disable_lora()
    assert torch.equal(predict(adapted), base)


def test_adapters_of_one_side_carry_its_part_of_the_result(build, tmp_path):
    """With the decoder tuned in full, the base and the adapters give the latents of the result."""
    tokenizer = build()
    base = copy.deepcopy(tokenizer)
    set_tuning(tokenizer, "lora", "full")
    train(tokenizer)
    tokenizer.save_lora_adapter(tmp_path)
    base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    with torch.no_grad():
        latents = [model.eval().encode(images()).latent for model in (base, merged_tokenizer(tokenizer))]
    torch.testing.assert_close(*latents, atol=1e-5 * latents[0].abs().max().item(), rtol=0)
    assert not torch.allclose(predict(base), predict(tokenizer), atol=1e-3)


def test_weights_with_adapters_resume(build, tmp_path):
    """A checkpoint of the adapted tokenizer loads into one with the same tuning."""
    tokenizer = build()
    base = copy.deepcopy(tokenizer)
    set_tuning(tokenizer, "lora", "frozen")
    train(tokenizer)
    set_tuning(base, "lora", "frozen")
    base.load_state_dict(tokenizer.state_dict())
    assert torch.equal(predict(base), predict(tokenizer))
    train(base, steps=1)
    train(tokenizer, steps=1)
    assert torch.equal(predict(base), predict(tokenizer))


def test_merging_without_adapters_copies(build):
    tokenizer = build()
    merged = merged_tokenizer(tokenizer)
    assert merged is not tokenizer and torch.equal(predict(merged), predict(tokenizer))
    train(merged)
    assert not torch.equal(predict(merged), predict(tokenizer))


# Together with what saves memory and time


@pytest.mark.parametrize("changes", [{}, MAETOK], ids=["softvq", "maetok"])
@pytest.mark.parametrize(("encoder_tuning", "decoder_tuning"), METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(build, encoder_tuning, decoder_tuning, changes):
    tokenizer = build(**changes)
    set_tuning(tokenizer, encoder_tuning, decoder_tuning)
    for name, parameter in tokenizer.named_parameters():
        if ".lora_B." in name:  # from zero on, the gradients of lora_A are zero
            torch.nn.init.normal_(parameter, std=0.1)
    if changes:
        tokenizer.encoder.positions.mask_token.requires_grad_(False)

    def gradients() -> dict[str, torch.Tensor]:
        tokenizer.zero_grad()
        training_loss(tokenizer, images()).backward()
        return {name: p.grad for name, p in tokenizer.named_parameters() if p.requires_grad}

    expected = gradients()
    assert expected and [name for name, gradient in expected.items() if gradient is None] == []
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if ".lora_" in name)
    tokenizer.enable_gradient_checkpointing()
    calls = _count_calls(tokenizer)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert 2 in calls.values(), "a block is computed again in the backward pass"


@pytest.mark.parametrize(("encoder_tuning", "decoder_tuning"), [("frozen", "full"), ("lora", "lora")])
def test_compiled_blocks(build, encoder_tuning, decoder_tuning):
    torch.compiler.reset()
    tokenizer = build()
    set_tuning(tokenizer, encoder_tuning, decoder_tuning)
    twin = copy.deepcopy(tokenizer)
    tokenizer.compile_repeated_blocks(backend="eager", fullgraph=True)
    train(twin)
    train(tokenizer)
    expected = predict(twin)
    torch.testing.assert_close(predict(merged_tokenizer(tokenizer)), expected, atol=1e-4, rtol=0)


# Another resolution


@pytest.mark.parametrize("changes", [{}, {"num_register_tokens": 2}, MAETOK], ids=["absolute", "registers", "rope"])
def test_tables_of_another_size_are_resampled(build, changes):
    tokenizer = build(encoder_patch_size=4, scaling_factor=3.0, **changes)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    resized = resize_tokenizer(tokenizer, 64)
    assert dict(resized.config) == {**tokenizer.config, "sample_size": 64} and resized.config.scaling_factor == 3.0
    assert type(resized) is AutoencoderSoftVQ and resized.training
    assert all(parameter.requires_grad for parameter in resized.parameters())

    first = 0 if "num_register_tokens" in changes else 1
    tables = {"encoder.positions.position_embedding": (8, 16)}
    if changes is not MAETOK:
        tables["decoder.positions.position_embedding"] = (4, 8)
    after = resized.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(tokenizer.state_dict()[name], value), "the tokenizer itself is left alone"
        if name not in tables:
            assert torch.equal(after[name], value), name
            continue
        old, new = tables[name]
        assert torch.equal(after[name][:, :first], value[:, :first])
        grid = value[0, first:].reshape(old, old, -1).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(after[name][0, first:], grid[0].flatten(1).T, atol=1e-6, rtol=0)

    with torch.no_grad():
        output = resized(images(size=64))
    assert output.sample.shape == (2, 3, 64, 64) and output.sample.isfinite().all()
    assert output.latent.shape == (2, *tokenizer(images()).latent.shape[1:])
    if changes is MAETOK:  # which takes other sizes as it is
        torch.testing.assert_close(output.sample, tokenizer(images(size=64)).sample, atol=1e-5, rtol=0)


def test_the_same_size_changes_nothing(build):
    tokenizer = build().eval().requires_grad_(False)
    resized = resize_tokenizer(tokenizer, 32)
    assert not resized.training and resized is not tokenizer
    assert all(torch.equal(value, resized.state_dict()[name]) for name, value in tokenizer.state_dict().items())
    with torch.no_grad():
        resized.quant_conv.weight.add_(1)
    assert not torch.equal(resized.quant_conv.weight, tokenizer.quant_conv.weight), "no weight is shared"


def test_a_trained_tokenizer_keeps_the_picture_at_another_size(build):
    tokenizer = build(encoder_hidden_size=32, decoder_hidden_size=32, token_initializer_range=0.2, quantizer="none")
    pixel_values = images(4)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    for _ in range(150):
        loss = F.mse_loss(tokenizer(pixel_values).sample, pixel_values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    larger = predict(resize_tokenizer(tokenizer, 64), images(4, size=64))
    coarse = torch.stack([F.avg_pool2d(larger, 16).flatten(), F.avg_pool2d(pixel_values, 8).flatten()])
    assert torch.corrcoef(coarse)[0, 1] > 0.6


def test_sizes_need_not_be_square_and_precision_is_kept(build, tmp_path):
    tokenizer = build().to(torch.bfloat16)
    resized = resize_tokenizer(tokenizer, (32, 64))
    assert resized.dtype == torch.bfloat16 and resized.config.sample_size == (32, 64)
    assert resized.encoder.positions.position_embedding.shape == (1, 1 + 4 * 8, 16)
    resized.save_pretrained(tmp_path)
    loaded = AutoencoderSoftVQ.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    pixel_values = images(1, size=64)[:, :, :32].bfloat16()
    assert torch.equal(predict(loaded, pixel_values), predict(resized, pixel_values))
    # and back, to the saved sizes
    assert resize_tokenizer(loaded, 32).decoder.positions.position_embedding.shape == (1, 1 + 4 * 4, 16)


def test_bad_sizes(build):
    with pytest.raises(ValueError, match="`sample_size` is 60, allowed: multiples of `encoder_patch_size` 8"):
        resize_tokenizer(build(), 60)
    with pytest.raises(ValueError, match="`sample_size` is 40, allowed: multiples of `decoder_patch_size` 16"):
        resize_tokenizer(build(decoder_patch_size=16), 40)
    siren = build(sample_size=16, decoder_patch_size=4, pixel_head="siren")
    with pytest.raises(ValueError, match="`sample_size` is 32, allowed for `pixel_head` 'siren': .* 16"):
        resize_tokenizer(siren, 32)
    tokenizer = build()
    set_tuning(tokenizer, "lora", "full")
    with pytest.raises(ValueError, match="has the adapters default, allowed: a tokenizer without"):
        resize_tokenizer(tokenizer, 64)


def _is_in(name: str, side: str) -> bool:
    return name.startswith(SIDES[side])


def _plain(name: str) -> str:
    """The name of a parameter before peft wraps its layer."""
    return name.replace(".base_layer.", ".")


def _count_calls(tokenizer: AutoencoderSoftVQ) -> dict[str, int]:
    calls = {}
    for side in ("encoder", "decoder"):
        for i, block in enumerate(getattr(tokenizer, side).blocks):
            name = f"{side}.{i}"
            block.ff.register_forward_pre_hook(
                lambda module, args, name=name: calls.update({name: calls.get(name, 0) + 1})
            )
    return calls
