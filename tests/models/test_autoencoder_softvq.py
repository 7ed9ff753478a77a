"""`AutoencoderSoftVQ` as a model: outputs, positions, exactness of memory switches, precision, saving, bad input."""

import copy
from datetime import timedelta

import pytest
import torch
from safetensors.torch import load_file, save_file

from softvq_hf.models.autoencoder_softvq import (
    AutoencoderSoftVQ,
    SoftVQRotaryEmbedding,
    TokenGaussianDistribution,
    apply_rotary_embedding,
    resample_position_embedding,
)


TINY = {
    "sample_size": 32,
    "encoder_patch_size": 8,
    "decoder_patch_size": 16,
    "num_latent_tokens": 8,
    "latent_channels": 4,
    "codebook_size": 16,
    "num_codebooks": 2,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 24,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 3,
    "layer_scale_init_value": 0.5,
}
QUANTIZERS = ["softvq", "vq", "kl", "none"]
# what MAETok adds, and the parts that no released model has
VARIANTS = {
    "maetok": {
        "quantizer": "none",
        "position_embedding_type": "rope_mixed",
        "encoder_mask_token": True,
        "decoder_type": "movq",
        "decoder_cls_token": False,
    },
    "axial": {"position_embedding_type": "rope_axial", "pixel_head": "conv", "num_register_tokens": 2},
    "swiglu": {"encoder_activation_fn": "swiglu", "decoder_activation_fn": "swiglu", "decoder_cls_token": False},
    "siren": {"sample_size": 16, "decoder_patch_size": 4, "pixel_head": "siren", "quantizer": "kl"},
}


def tiny_model(**changes) -> AutoencoderSoftVQ:
    model = AutoencoderSoftVQ(**TINY | changes)
    for name, module in model.named_modules():
        if name.endswith("modulation"):  # starts from zero
            torch.nn.init.normal_(module.weight)
    return model


def images_for(model: AutoencoderSoftVQ, batch_size: int = 2) -> torch.Tensor:
    return images(batch_size, 2 * (model.config.sample_size,))


def images(batch_size: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(batch_size, 3, *size) * 2 - 1


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_outputs(quantizer):
    model = tiny_model(quantizer=quantizer)
    output = model(images())
    assert output.sample.shape == (3, 3, 32, 32) and output.latent.shape == (3, 8, 4)
    expected_losses = {"softvq": {"entropy_loss"}, "kl": {"kl_loss"}, "none": set()}
    expected_losses["vq"] = {"entropy_loss", "vq_loss", "commit_loss"}
    assert {key for key in output if key.endswith("_loss")} == expected_losses[quantizer]
    assert all(output[key].shape == () for key in output if key.endswith("_loss"))
    expected_indices = {"softvq": (3, 2, 4), "vq": (3, 1, 8)}.get(quantizer)
    assert (None if output.indices is None else tuple(output.indices.shape)) == expected_indices

    model.eval()
    output = model(images())
    assert not any(key.endswith("_loss") for key in output)
    encoded = model.encode(pixels := images())
    assert isinstance(encoded.latent_dist, TokenGaussianDistribution) == (quantizer == "kl")
    assert torch.equal(model.encode(pixels, return_dict=False)[0], encoded.latent)
    assert torch.equal(model.decode(encoded.latent, return_dict=False)[0], model(pixels).sample)
    assert torch.equal(model(pixels, return_dict=False)[0], model(pixels).sample)


def test_every_parameter_gets_a_gradient():
    for quantizer in QUANTIZERS:
        model = tiny_model(quantizer=quantizer, num_register_tokens=2)
        output = model(images())
        (output.sample.square().mean() + sum(output[key] for key in output if key.endswith("_loss"))).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == []


def test_indices_belong_to_their_tokens():
    """Each token is quantized on its own: the indices of an image do not depend on its neighbours in the batch."""
    model = tiny_model().eval()
    pixels = images(4)
    together = model.encode(pixels).indices
    alone = torch.cat([model.encode(image).indices for image in pixels.split(1)])
    assert torch.equal(together, alone)
    # one-hot posteriors: the mix at a low temperature is the codeword of the index
    model.quantize.tau = 1e-4
    encoded = model.encode(pixels)
    entries = model.quantize.get_codebook_entry(encoded.indices)
    torch.testing.assert_close(encoded.latent, entries, atol=1e-2, rtol=0)
    assert len(encoded.indices.unique()) > 1


def test_max_probability_is_that_of_the_indices():
    model = tiny_model().eval()
    pixel_values = images_for(model)
    encoded = model.encode(pixel_values)
    probabilities = model.quantize(model.quant_conv(model.encoder(pixel_values)))[1]
    chosen = probabilities.gather(-1, encoded.indices.unsqueeze(-1))
    torch.testing.assert_close(encoded.max_probability, chosen.mean())
    assert not model(pixel_values).max_probability.requires_grad
    assert tiny_model(quantizer="vq")(pixel_values).max_probability is None


def entropy_of_half_the_batch(rank, folder, quantizer):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    torch.manual_seed(0)
    model = tiny_model(quantizer=quantizer).train()
    model.enable_synchronized_entropy()
    loss = model.encode(images_for(model, batch_size=4)[2 * rank : 2 * rank + 2]).entropy_loss
    loss.backward()
    gradient = model.quant_conv.weight.grad
    save_file({"loss": loss.detach(), "gradient": gradient}, f"{folder}/rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["softvq", "vq"])
def test_synchronized_entropy_is_that_of_the_global_batch(quantizer, tmp_path):
    torch.multiprocessing.spawn(entropy_of_half_the_batch, args=(str(tmp_path), quantizer), nprocs=2)
    halves = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]

    torch.manual_seed(0)
    model = tiny_model(quantizer=quantizer).train()
    pixel_values = images_for(model, batch_size=4)
    loss = model.encode(pixel_values).entropy_loss
    loss.backward()
    gradient = model.quant_conv.weight.grad
    mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in ("loss", "gradient")}
    torch.testing.assert_close(mean["loss"], loss.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mean["gradient"], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-4)
    alone = [model.encode(half).entropy_loss for half in pixel_values.split(2)]
    assert abs((alone[0] + alone[1]) / 2 - loss) > 1e-3  # the mean of the halves' own losses is another one


def test_posterior_draws_follow_the_generator():
    model = tiny_model(quantizer="kl").eval()
    pixels = images(2)
    first = model(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(1)).latent
    again = model(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(1)).latent
    other = model(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(2)).latent
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(model(pixels).latent, model.encode(pixels).latent_dist.mode())


@pytest.mark.parametrize("registers", [(0, None), (4, None), (4, 0), (0, 4)])
def test_register_tokens(registers):
    model = tiny_model(num_register_tokens=registers[0], decoder_num_register_tokens=registers[1])
    decoder_registers = registers[0] if registers[1] is None else registers[1]
    for side, count, patches in ((model.encoder, registers[0], 16), (model.decoder, decoder_registers, 4)):
        assert side.positions.num_prefix_tokens == 1 + count
        assert side.positions.position_embedding.shape[1] == (patches if count else patches + 1)
    assert model(images()).sample.shape == (3, 3, 32, 32)


def test_images_need_not_be_square():
    model = tiny_model(sample_size=[32, 48])
    pixels = images(2, (32, 48))
    assert model(pixels).sample.shape == pixels.shape
    with pytest.raises(ValueError, match="with 32 x 48 pixels"):
        model(images(2, (48, 32)))
    # patches come out where they went in: with the decoder replaced by its pixel head, rows stay rows
    head = model.decoder.pixel_head
    with torch.no_grad():
        head.proj.weight.zero_()
        head.proj.bias.copy_(torch.arange(16 * 16 * 3, dtype=torch.float32))
        sample = head(torch.zeros(1, 6, 24), (2, 3))
    pixel = torch.arange(16 * 16 * 3, dtype=torch.float32).reshape(16, 16, 3).permute(2, 0, 1)
    assert torch.equal(sample[0, :, 16:32, 32:48], pixel)


def test_decoder_without_class_token_has_no_position_for_it():
    for registers, positions in ((0, 4), (4, 4)):
        model = tiny_model(decoder_cls_token=False, decoder_num_register_tokens=registers)
        assert model.decoder.positions.cls_token is None
        assert model.decoder.positions.num_prefix_tokens == registers
        assert model.decoder.positions.position_embedding.shape == (1, positions, 24)
        assert model(images()).sample.shape == (3, 3, 32, 32)


# Rotary positions


def test_rotary_embedding_turns_pairs_by_column_and_row():
    rope = SoftVQRotaryEmbedding(num_layers=3, num_attention_heads=2, head_dim=8, theta=10.0, mixed=False)
    cos, sin = rope((2, 3), num_prefix_tokens=2, num_latent_tokens=1, device=torch.device("cpu"))
    assert cos.shape == sin.shape == (3, 9, 1, 4)
    hidden_states = torch.randn(2, 9, 2, 8)
    rotated = apply_rotary_embedding(hidden_states, (cos[1], sin[1]))
    assert torch.equal(rotated[:, :2], hidden_states[:, :2]) and torch.equal(rotated[:, -1:], hidden_states[:, -1:])

    # the same with complex numbers, one patch after the other
    for row in range(2):
        for column in range(3):
            angles = [column * 1.0, column * 10.0**-0.5, row * 1.0, row * 10.0**-0.5]
            turn = torch.polar(torch.ones(4), torch.tensor(angles))
            token = 2 + row * 3 + column
            pairs = torch.view_as_complex(hidden_states[:, token].reshape(2, 2, 4, 2))
            expected = torch.view_as_real(pairs * turn).flatten(-2)
            torch.testing.assert_close(rotated[:, token], expected, atol=1e-6, rtol=0)


def test_mixed_frequencies_start_on_perpendicular_axes():
    rope = SoftVQRotaryEmbedding(num_layers=2, num_attention_heads=3, head_dim=8, theta=10.0, mixed=True)
    assert rope.frequencies.shape == (2, 2, 12) and rope.frequencies.requires_grad
    x, y = rope.frequencies.detach().unflatten(2, (3, 4))
    magnitudes = torch.tensor([1.0, 10.0**-0.5, 1.0, 10.0**-0.5]).expand(2, 3, 4)
    torch.testing.assert_close(torch.hypot(x, y), magnitudes, atol=1e-6, rtol=0)
    first, second = (x[..., :2], y[..., :2]), (x[..., 2:], y[..., 2:])
    torch.testing.assert_close(first[0] * second[0] + first[1] * second[1], torch.zeros(2, 3, 2), atol=1e-6, rtol=0)
    assert len(torch.atan2(y, x)[..., 0].unique()) == 6, "every layer and head has its own axis"


@pytest.mark.parametrize("changes", [VARIANTS["maetok"], VARIANTS["axial"]], ids=["maetok", "axial"])
def test_rotary_models_take_other_sizes(changes):
    model = tiny_model(**changes).eval()
    pixels = images(2, (48, 16))
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(pixels)
        assert output.sample.shape == pixels.shape
        sample = model.decode(output.latent, sample_size=(48, 16)).sample
        torch.testing.assert_close(sample, output.sample, atol=1e-6, rtol=0)
        assert model.decode(output.latent, sample_size=64).sample.shape == (2, 3, 64, 64)
        assert model.decode(output.latent).sample.shape == (2, 3, 32, 32)

        # it is the model of that size whose encoder has the resampled table
        other = tiny_model(**changes | {"sample_size": [48, 16]}).eval()
        weights = model.state_dict()
        key = "encoder.positions.position_embedding"
        first = 0 if "num_register_tokens" in changes else 1
        resampled = resample_position_embedding(weights[key][:, first:], (4, 4), (6, 2))
        weights[key] = torch.cat([weights[key][:, :first], resampled], dim=1)
        other.load_state_dict(weights)
        torch.testing.assert_close(other(pixels).sample, output.sample, atol=1e-6, rtol=0)

    for method in (model, model.encode):
        with pytest.raises(ValueError, match=r"shape \(2, 3, 40, 32\), allowed: .* multiples of 16 pixels"):
            method(images(2, (40, 32)))
    with pytest.raises(ValueError, match=r"`sample_size` is \(40, 32\), allowed: multiples of 16 pixels"):
        model.decode(output.latent, sample_size=(40, 32))


def test_absolute_positions_and_siren_heads_fix_the_size():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"`sample_size` is \(64, 64\), allowed: 32 x 32 pixels, .* absolute"):
        model.decode(torch.zeros(1, 8, 4), sample_size=64)
    model = tiny_model(**VARIANTS["siren"], position_embedding_type="rope_axial")
    with pytest.raises(ValueError, match="16 x 16 pixels, which the 'siren' pixel head"):
        model(images(1, (32, 32)))


# Masked patches


def test_mask_token_stands_in_for_masked_patches():
    model = tiny_model(**VARIANTS["maetok"])
    mask = torch.zeros(2, 16, dtype=torch.bool)
    pixels = images(2)
    torch.testing.assert_close(model(pixels, mask=mask).sample, model(pixels).sample, atol=0, rtol=0)

    mask[0, 5] = True  # second row, second column of 8 x 8 patches
    changed = pixels.clone()
    changed[0, :, 8:16, 8:16] += 1.0
    output = model(pixels, mask=mask)
    assert torch.equal(model(changed, mask=mask).latent, output.latent)
    assert not torch.equal(output.latent[0], model(pixels).latent[0])
    torch.testing.assert_close(output.latent[1], model(pixels).latent[1], atol=1e-6, rtol=0)
    model.enable_slicing()
    torch.testing.assert_close(model(pixels, mask=mask).latent, output.latent, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "mask", "message"),
    [
        (VARIANTS["maetok"], torch.zeros(2, 16), "dtype torch.float32 .* allowed: torch.bool"),
        (VARIANTS["maetok"], torch.zeros(2, 4, dtype=torch.bool), r"shape \(2, 4\), allowed: .*\(2, 16\)"),
        ({}, torch.zeros(2, 16, dtype=torch.bool), "`mask` is given, allowed: None .* `encoder_mask_token`"),
    ],
)
def test_bad_masks(changes, mask, message):
    model = tiny_model(**changes)
    for method in (model, model.encode):
        with pytest.raises(ValueError, match=message):
            method(images(2), mask=mask)


# All variants


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_save_slice_compile_and_export(changes, tmp_path):
    model = tiny_model(**changes).eval()
    pixels = images_for(model)
    with torch.no_grad():
        expected = model(pixels).sample
    assert torch.isfinite(expected).all() and model.decoder.last_layer.requires_grad

    model.save_pretrained(tmp_path)
    loaded = AutoencoderSoftVQ.from_pretrained(tmp_path)
    assert all(loaded.config[name] == value for name, value in changes.items())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).sample, expected, atol=1e-6, rtol=0)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(pixels).sample, expected)
        exported = torch.export.export(model, args=(pixels,)).module()
        torch.testing.assert_close(exported(pixels).sample, expected, check_stride=False)
        torch.testing.assert_close(
            model.to(torch.bfloat16)(pixels.bfloat16()).sample.float(), expected, atol=1, rtol=0
        )
        model.float().enable_slicing()
        sliced = model(pixels).sample
    torch.testing.assert_close(sliced, model(pixels).sample, atol=1e-6, rtol=0)


def test_modulation_of_a_new_movq_decoder_is_zero():
    decoder = AutoencoderSoftVQ(**TINY | VARIANTS["maetok"]).decoder
    modulations = [module for name, module in decoder.named_modules() if name.endswith("modulation")]
    assert len(modulations) == 3
    assert not any(parameter.any() for module in modulations for parameter in module.parameters())


def test_siren_head_reads_features_as_rows_of_the_image():
    model = tiny_model(**VARIANTS["siren"])
    head = model.decoder.pixel_head
    tokens = torch.randn(2, 16, 24)
    hidden_states = torch.sin(30 * torch.nn.functional.linear(tokens, head.linear_1.weight, head.linear_1.bias))
    features = torch.sin(30 * torch.nn.functional.linear(hidden_states, head.linear_2.weight, head.linear_2.bias))
    assert features.shape == (2, 16, 48)
    torch.testing.assert_close(head(tokens, (4, 4)), features.reshape(2, 3, 16, 16), atol=1e-6, rtol=0)
    assert head.linear_1.weight.abs().max() <= 1 / 24
    assert head.linear_2.weight.abs().max() <= (6 / 48) ** 0.5 / 30 + 1e-8


def test_gradient_checkpointing_keeps_the_gradients():
    model = tiny_model()
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    for block in checkpointed.encoder.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    pixels = images()
    for each in (model, checkpointed):
        output = each(pixels)
        (output.sample.square().mean() + output.entropy_loss).backward()
    assert len(calls) == 2 * len(checkpointed.encoder.blocks), "blocks are not run a second time in the backward pass"
    for (name, expected), actual in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("train", [False, True])
def test_slicing_is_exact(quantizer, train):
    model = tiny_model(quantizer=quantizer).train(train)
    pixels = images(3)
    with torch.no_grad():
        whole = model(pixels)
        model.enable_slicing()
        sliced = model(pixels)
        model.disable_slicing()
    for key in ("sample", "latent", "indices", "entropy_loss", "kl_loss"):
        torch.testing.assert_close(sliced[key] if key in sliced else None, whole[key] if key in whole else None)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_compiles_into_one_graph(quantizer):
    torch._dynamo.reset()
    model = tiny_model(quantizer=quantizer).eval()
    pixels = images(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels).sample, model(pixels).sample)
        decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
        latent = model.encode(pixels).latent
        torch.testing.assert_close(decode(latent).sample, model.decode(latent).sample)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_exports(quantizer):
    model = tiny_model(quantizer=quantizer).eval()
    pixels = images(2)
    exported = torch.export.export(model, args=(pixels,)).module()
    torch.testing.assert_close(exported(pixels).sample, model(pixels).sample, check_stride=False)


def test_compiles_in_training():
    torch._dynamo.reset()
    model = tiny_model()
    twin = copy.deepcopy(model)
    pixels = images(2)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for each in (model, compiled):
        output = each(pixels)
        (output.sample.square().mean() + output.entropy_loss).backward()
    for expected, actual in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_half_precision_stays_finite_and_near(dtype, quantizer):
    model = tiny_model(quantizer=quantizer)
    pixels = images()
    with torch.no_grad():
        expected = model(pixels).sample
        output = model.to(dtype)(pixels.to(dtype))
    assert output.sample.dtype == dtype and output.latent.dtype == dtype
    for key in output:
        if isinstance(output[key], torch.Tensor):
            assert torch.isfinite(output[key].float()).all(), key
    if quantizer != "vq":  # a nearest codeword may change
        torch.testing.assert_close(output.sample.float(), expected, atol=0.1, rtol=0.1)


def test_similarities_stay_in_full_precision_under_autocast():
    model = tiny_model()
    latent = torch.randn(2, 8, 4)
    expected = model.quantize(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model.quantize(latent)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_save_and_load_is_exact(quantizer, tmp_path):
    model = tiny_model(quantizer=quantizer, scaling_factor=13.77, shift_factor=-0.0031).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoencoderSoftVQ.from_pretrained(tmp_path)
    assert not loaded.training
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    pixels = images()
    assert torch.equal(loaded(pixels).sample, model(pixels).sample)
    half = AutoencoderSoftVQ.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.config.scaling_factor == 13.77


def test_latents_are_normalised_and_back():
    model = tiny_model(scaling_factor=12.5, shift_factor=0.25)
    latent = torch.randn(2, 8, 4)
    assert torch.equal(model.scale_latent(latent), (latent - 0.25) * 12.5)
    torch.testing.assert_close(model.unscale_latent(model.scale_latent(latent)), latent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer": "fsq"}, "`quantizer` is 'fsq', allowed: 'softvq', 'vq', 'kl', 'none'"),
        ({"num_codebooks": 3}, "`num_latent_tokens` is 8, allowed: multiples of `num_codebooks` 3"),
        ({"sample_size": 33}, "`sample_size` is 33, allowed: multiples of `encoder_patch_size` 8"),
        ({"sample_size": 24}, "multiples of `decoder_patch_size` 16"),
        ({"sample_size": [32, 32, 32]}, "`sample_size`"),
        ({"encoder_hidden_size": 33}, "`encoder_hidden_size` is 33, allowed: multiples"),
        ({"decoder_hidden_size": 25}, "`decoder_hidden_size` is 25, allowed: multiples"),
        ({"num_latent_tokens": 0}, "`num_latent_tokens` is 0"),
        ({"latent_channels": 2.5}, "`latent_channels` is 2.5"),
        ({"tau": 0.0}, "`tau` is 0.0, allowed: finite numbers above 0"),
        ({"tau": "0.1"}, "`tau` is '0.1', allowed: finite numbers above 0"),
        ({"shift_factor": float("nan")}, "`shift_factor` is nan, allowed: finite numbers"),
        ({"codebook_size": True}, "`codebook_size` is True"),
        ({"scaling_factor": 0.0}, "`scaling_factor` is 0.0"),
        ({"num_register_tokens": -1}, "`num_register_tokens` is -1"),
        ({"pixel_head": "quadratic"}, "`pixel_head` is 'quadratic', allowed: 'linear', 'conv', 'siren'"),
        ({"pixel_head": "conv", "decoder_patch_size": 8}, "`decoder_patch_size` is 8, allowed for .* 'conv': 16"),
        ({"pixel_head": "siren"}, "`sample_size` is 32, allowed for `pixel_head` 'siren': .* 256"),
        ({"position_embedding_type": "rope"}, "'rope', allowed: 'absolute', 'rope_axial', 'rope_mixed'"),
        (
            {"position_embedding_type": "rope_mixed", "encoder_hidden_size": 36, "encoder_num_attention_heads": 6},
            "`encoder_hidden_size` is 36 with 6 heads of 6 channels, .* multiple of 4",
        ),
        ({"rope_theta": 0}, "`rope_theta` is 0"),
        ({"decoder_type": "cnn"}, "`decoder_type` is 'cnn', allowed: 'vit', 'movq'"),
        ({"decoder_cls_token": "yes"}, "`decoder_cls_token` is 'yes', allowed: False, True"),
        ({"encoder_activation_fn": "relu"}, "`encoder_activation_fn` is 'relu', allowed: 'gelu', 'swiglu'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        tiny_model(**change)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(1, 3, 32, 48), r"shape \(1, 3, 32, 48\), allowed: \(batch, 3, height, width\) with 32 x 32"),
        (torch.zeros(1, 1, 32, 32), r"\(1, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "dtype torch.uint8, allowed: floating-point"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "dtype torch.float64, allowed: torch.float32"),
        (torch.full((1, 3, 32, 32), float("nan")), "`pixel_values` holds NaN or infinite"),
        (torch.full((1, 3, 32, 32), float("inf")), "`pixel_values` holds NaN or infinite"),
    ],
)
def test_bad_images(pixel_values, message):
    model = tiny_model()
    for method in (model.encode, model):
        with pytest.raises(ValueError, match=message):
            method(pixel_values)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (torch.zeros(1, 7, 4), r"`latent` has shape \(1, 7, 4\), allowed: \(batch, 8, 4\)"),
        (torch.zeros(1, 8, 5), r"\(1, 8, 5\)"),
        (torch.zeros(8, 4), r"\(8, 4\)"),
        (torch.zeros(1, 8, 4, dtype=torch.long), "torch.int64"),
        (torch.zeros(1, 8, 4, dtype=torch.float16), "dtype torch.float16, allowed: torch.float32"),
        (torch.full((1, 8, 4), float("nan")), "`latent` holds NaN"),
    ],
)
def test_bad_latents(latent, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().decode(latent)
