"""`MARTransformer1DModel` against the official MAR, and as a diffusers model: sizes, dtypes, saving, input."""

import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.schedulers.scheduling_ddpm_temperature import TemperatureDDPMScheduler


TOKENS_CONFIG = {
    "num_tokens": 10,
    "in_channels": 6,
    "buffer_size": 3,
    "encoder_hidden_size": 24,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 3,
    "decoder_hidden_size": 32,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 2,
    "denoiser_hidden_size": 16,
    "denoiser_num_layers": 2,
    "num_classes": 4,
}
PATCHES_CONFIG = {**TOKENS_CONFIG, "in_channels": 3, "patch_size": 2, "sample_size": 8}
CONFIGS = pytest.mark.parametrize("config", [TOKENS_CONFIG, PATCHES_CONFIG], ids=["1d", "2d"])
NO_COMPILER = shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file()


def build(config=TOKENS_CONFIG, **changes):
    torch.manual_seed(0)
    return MARTransformer1DModel(**config | changes).eval()


def make_inputs(model, batch_size=3, num_visible=4):
    generator = torch.Generator().manual_seed(1)
    orders = torch.rand(batch_size, model.num_tokens, generator=generator).argsort(dim=1)
    return {
        "hidden_states": torch.randn(batch_size, model.num_tokens, model.token_channels, generator=generator),
        "class_labels": torch.arange(batch_size) % 5,
        "visible_positions": orders[:, :num_visible].sort(dim=1).values,
    }


def conditions(model, **inputs):
    with torch.no_grad():
        return model(**inputs).conditions


def public_config(model):
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


@pytest.fixture
def official(golden):
    description, tensors = golden("mar")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    model = convert_checkpoint("mar", weights, description["config"])
    visible = (tensors["input.train.mask"] == 0).nonzero()[:, 1].view(3, -1)
    return model, tensors, visible


# The official numbers


def test_reference_model(official):
    model, tensors, visible = official
    seen = {}
    model.encoder_blocks[0].register_forward_hook(
        lambda _, args, output: seen.update(encoder_block0_in=args[0], encoder_block0_out=output)
    )
    model.encoder_norm.register_forward_hook(lambda _, args, output: seen.update(encoder_out=output))
    model.decoder_blocks[0].register_forward_hook(
        lambda _, args, output: seen.update(decoder_block0_in=args[0], decoder_block0_out=output)
    )
    seen["tokens"] = model.patchify(tensors["input.train.latents"])
    seen["z"] = conditions(
        model,
        hidden_states=seen["tokens"],
        class_labels=tensors["input.train.labels"],
        visible_positions=visible,
        force_drop_ids=tensors["input.train.label_drop"],
    )
    assert len(seen) == 7
    for name, value in seen.items():
        torch.testing.assert_close(value, tensors[f"output.train.{name}"], atol=1e-5, rtol=0)


def test_reference_denoiser(official_denoiser):
    model, tensors, _ = official_denoiser
    seen = {}
    model.denoiser.time_proj.register_forward_hook(lambda _, args, output: seen.update(t_freq=output))
    model.denoiser.proj_in.register_forward_hook(lambda _, args, output: seen.update(h_in=output))
    for i, block in enumerate(model.denoiser.blocks):
        block.register_forward_hook(lambda _, args, output, i=i: seen.update({f"h_block{i}": output}))
    with torch.no_grad():
        seen["t_emb"] = model.embed_timesteps(tensors["input.t"])
        seen["c_emb"] = model.embed_conditions(tensors["input.c"])
        seen["y"] = seen["t_emb"] + seen["c_emb"]
        seen["model_output"] = model.denoise(tensors["input.x"], tensors["input.t"], tensors["input.c"])
        assert torch.equal(model.denoise(tensors["input.x"], conditioning=seen["y"]), seen["model_output"])
    assert len(seen) == 9
    for name, value in seen.items():
        torch.testing.assert_close(value, tensors[f"output.forward.{name}"], atol=1e-5, rtol=0)


B = {
    "encoder_hidden_size": 768,
    "encoder_num_layers": 12,
    "encoder_num_attention_heads": 12,
    "denoiser_hidden_size": 1024,
    "denoiser_num_layers": 6,
}
L = {
    "encoder_hidden_size": 1024,
    "encoder_num_layers": 16,
    "encoder_num_attention_heads": 16,
    "denoiser_hidden_size": 1280,
    "denoiser_num_layers": 8,
}
H = {
    "encoder_hidden_size": 1280,
    "encoder_num_layers": 20,
    "encoder_num_attention_heads": 16,
    "denoiser_hidden_size": 1536,
    "denoiser_num_layers": 12,
}
GRID = {"sample_size": 16, "in_channels": 16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(B, 207_543_872, id="MAR-B 64x32"),
        pytest.param(L, 477_814_336, id="MAR-L 64x32"),
        pytest.param(H, 941_760_064, id="MAR-H 64x32"),
        pytest.param({**B, "num_tokens": 32, "in_channels": 64}, 207_593_088, id="MAR-B 32x64"),
        pytest.param({**L, "num_tokens": 32, "in_channels": 64}, 477_871_744, id="MAR-L 32x64"),
        pytest.param({**H, "num_tokens": 32, "in_channels": 64}, 941_825_664, id="MAR-H 32x64"),
        pytest.param({**B, **GRID}, 207_924_768, id="MAR-B KL-16"),
        pytest.param({**L, **GRID}, 478_326_304, id="MAR-L KL-16"),
        pytest.param({**H, **GRID}, 942_403_104, id="MAR-H KL-16"),
        pytest.param(
            {**L, **GRID, "denoiser_hidden_size": 1024, "denoiser_num_layers": 3}, 426_357_792, id="MAR-L ablation"
        ),
    ],
)
def test_parameter_counts(config, expected):
    decoder = {key.replace("encoder", "decoder"): value for key, value in config.items() if key.startswith("encoder")}
    with torch.device("meta"):
        assert MARTransformer1DModel(**config, **decoder).num_parameters() == expected


def test_default_is_mar_b():
    with torch.device("meta"):
        assert MARTransformer1DModel().num_parameters() == 207_543_872


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "num_steps", "expected", "expected_denoiser"),
    [
        pytest.param(B, 64, 1.200, 0.215, id="MAR-B, 64 steps"),
        pytest.param(B, 32, 0.577, 0.215, id="MAR-B, 32 steps"),
        pytest.param(B, 16, 0.286, 0.215, id="MAR-B, 16 steps"),
        pytest.param(L, 64, 2.853, 0.441, id="MAR-L, 64 steps"),
        pytest.param(H, 64, 5.584, 0.937, id="MAR-H, 64 steps"),
        pytest.param(H, 16, 1.333, 0.937, id="MAR-H, 16 steps"),
        pytest.param({**H, "num_tokens": 32, "in_channels": 64}, 32, 2.188, 0.469, id="MAR-H 32x64, 32 steps"),
    ],
)
def test_multiplications_for_an_image(config, num_steps, expected, expected_denoiser):
    """Those of docs/generators.md, in 10^12: of the transformer by steps, and of the denoiser."""
    decoder = {key.replace("encoder", "decoder"): value for key, value in config.items() if key.startswith("encoder")}
    with torch.device("meta"):
        model = MARTransformer1DModel(**config, **decoder).eval()
        pipeline = MARPipeline(AutoencoderKL(), model, TemperatureDDPMScheduler())
        labels, num_tokens, channels = torch.zeros(1, dtype=torch.long), model.num_tokens, model.token_channels
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            num_unknown = num_tokens
            for remaining, _ in pipeline.plan_steps(num_steps, 1.0, "constant"):
                visible, predicted = (
                    torch.zeros(1, count, dtype=torch.long)
                    for count in (num_tokens - num_unknown, num_unknown - remaining)
                )
                model(torch.zeros(1, num_tokens, channels), labels, visible, predicted)
                num_unknown = remaining
        multiplications = counter.get_total_flops() / 2e12
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.denoise(torch.zeros(1, channels), conditioning=torch.zeros(1, model.config.denoiser_hidden_size))
        per_step = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.embed_conditions(torch.zeros(1, model.config.decoder_hidden_size))
        denoiser = num_tokens * (100 * per_step + counter.get_total_flops()) / 2e12
    assert (multiplications, denoiser) == pytest.approx((expected, expected_denoiser), abs=1e-3)


# Initialisation


def test_initialize_weights():
    model = build(encoder_hidden_size=96, decoder_hidden_size=96)
    model.initialize_weights()
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "bias" or "modulation" in layer or layer == "denoiser.proj_out":
            assert not parameter.any(), name
        elif "norm" in layer:
            assert (parameter == 1).all(), name
        elif kind.endswith("embed") or kind == "mask_token" or "class_embedder" in layer or "timestep" in layer:
            # 96 to 8192 draws
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        else:
            fan_out, fan_in = parameter.shape
            if layer.endswith(("to_q", "to_k", "to_v")):  # one projection of the original
                fan_out *= 3
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * bound < parameter.abs().max().item() <= bound, name
    with torch.no_grad():
        assert not model.denoise(torch.randn(2, 6), conditioning=torch.randn(2, 16)).any()


# Tokens


def test_patchify():
    model = build(PATCHES_CONFIG)
    latents = torch.randn(2, 3, 8, 8)
    tokens = model.patchify(latents)
    assert tokens.shape == (2, 16, 12)
    torch.testing.assert_close(tokens[:, 6].view(2, 3, 2, 2), latents[:, :, 2:4, 4:6])  # second row, third column
    assert torch.equal(model.unpatchify(tokens), latents)


def test_1d_latents_are_tokens():
    latents = torch.randn(2, 10, 6)
    model = build()
    assert model.patchify(latents) is latents and model.unpatchify(latents) is latents


# Masks


@CONFIGS
@pytest.mark.parametrize("num_visible", [0, 1, 4, 9])
def test_hidden_tokens_do_not_matter(config, num_visible):
    model = build(config)
    inputs = make_inputs(model, num_visible=num_visible)
    hidden = torch.ones(inputs["hidden_states"].shape[:2]).scatter(1, inputs["visible_positions"], 0)[:, :, None]
    other = inputs["hidden_states"] + 5 * hidden
    expected = conditions(model, **inputs)
    assert torch.equal(conditions(model, **inputs | {"hidden_states": other}), expected)
    if num_visible > 0:
        other = inputs["hidden_states"] + 5 * (1 - hidden)
        assert not torch.allclose(conditions(model, **inputs | {"hidden_states": other}), expected, atol=1e-3)


@CONFIGS
def test_predicted_positions_are_rows_of_all(config):
    model = build(config)
    inputs = make_inputs(model)
    everywhere = conditions(model, **inputs)
    assert everywhere.shape == (3, model.num_tokens, 32)
    positions = torch.tensor([[5, 2, 7], [0, 1, 2], [9, 8, 3]])
    predicted = conditions(model, **inputs, predicted_positions=positions)
    expected = everywhere.gather(1, positions[:, :, None].expand(-1, -1, 32))
    torch.testing.assert_close(predicted, expected, atol=1e-6, rtol=0)


def test_last_block_computes_the_predicted_positions_alone():
    model = build()
    widths = []
    for block in model.decoder_blocks:
        block.ff.register_forward_hook(lambda _, args, output: widths.append(output.shape[1]))
    conditions(model, **make_inputs(model), predicted_positions=torch.tensor([[1, 2]] * 3))
    assert widths == [13, 2]


def test_order_of_visible_positions_does_not_matter():
    model = build()
    inputs = make_inputs(model)
    flipped = inputs | {"visible_positions": inputs["visible_positions"].flip(1)}
    torch.testing.assert_close(conditions(model, **flipped), conditions(model, **inputs), atol=1e-6, rtol=0)


# Classes


def test_labels_are_dropped_in_train_mode_only():
    model = build(class_dropout_prob=1.0, attention_dropout=0.0, dropout=0.0)
    inputs = make_inputs(model)
    null = conditions(model, **inputs | {"class_labels": torch.full((3,), 4)})
    assert not torch.allclose(conditions(model, **inputs), null, atol=1e-3)
    dropped = conditions(model, **inputs, force_drop_ids=torch.tensor([True, True, True]))
    torch.testing.assert_close(dropped, null)
    model.train()
    torch.testing.assert_close(conditions(model, **inputs), null)
    kept = conditions(model, **inputs, force_drop_ids=torch.zeros(3))
    torch.testing.assert_close(kept, conditions(model.eval(), **inputs))


def test_dropout_in_train_mode_only():
    model = build()
    inputs = make_inputs(model) | {"force_drop_ids": torch.zeros(3)}
    assert torch.equal(conditions(model, **inputs), conditions(model, **inputs))
    model.train()
    assert not torch.equal(conditions(model, **inputs), conditions(model, **inputs))
    for changes in ({"attention_dropout": 0.0}, {"dropout": 0.0}):  # each of the two kinds alone
        model = build(**changes).train()
        assert not torch.equal(conditions(model, **inputs), conditions(model, **inputs))


def test_dropout_follows_the_attention_and_each_layer_of_the_mlp():
    """Where all is dropped, nothing is added to the tokens: neither by a bias nor by the layer before it."""
    block = build(dropout=1.0).encoder_blocks[0].train()
    tokens = torch.randn(2, 5, 24)
    assert torch.equal(block(tokens), tokens)
    assert not torch.equal(block.eval()(tokens), tokens)
    seen = []
    block.train().ff.net[2].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    block(tokens)
    assert not seen[0].any()


# As a model of diffusers


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_exact(tmp_path, config, dtype):
    model = build(config).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = MARTransformer1DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert public_config(loaded) == public_config(model)
    inputs = make_inputs(model)
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    assert torch.equal(conditions(loaded, **inputs), conditions(model, **inputs))


def test_gradient_checkpointing():
    model = build().train()
    inputs = make_inputs(model)
    gradients = {}
    for is_on in (False, True):
        if is_on:
            model.enable_gradient_checkpointing()
        calls = []
        hooks = [
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            for block in (model.encoder_blocks[0], model.decoder_blocks[-1], model.denoiser.blocks[0])
        ]
        torch.manual_seed(1)
        rows = model(**inputs).conditions.flatten(0, 1)
        model.denoise(torch.ones(len(rows), 6), torch.arange(len(rows)), rows).square().sum().backward()
        assert len(calls) == (6 if is_on else 3)
        gradients[is_on] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        for hook in hooks:
            hook.remove()
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs g++ and Python's headers")
def test_compile_fullgraph():
    torch._dynamo.reset()
    model = build()
    inputs = make_inputs(model) | {"predicted_positions": torch.tensor([[5, 2], [0, 1], [9, 8]])}
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(conditions(compiled, **inputs), conditions(model, **inputs), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs g++ and Python's headers")
def test_compile_repeated_blocks():
    torch._dynamo.reset()
    model, compiled = build(), build()
    compiled.compile_repeated_blocks(fullgraph=True)
    inputs = make_inputs(model)
    torch.testing.assert_close(conditions(compiled, **inputs), conditions(model, **inputs), atol=1e-5, rtol=0)
    denoiser_inputs = torch.randn(4, 6), torch.arange(4), torch.randn(4, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled.denoise(*denoiser_inputs), model.denoise(*denoiser_inputs), atol=1e-5, rtol=0
        )
    for block in (compiled.encoder_blocks[0], compiled.decoder_blocks[1], compiled.denoiser.blocks[0]):
        assert block._compiled_call_impl is not None


def test_fused_projections():
    model = build()
    inputs = make_inputs(model) | {"predicted_positions": torch.tensor([[5, 2], [0, 1], [9, 8]])}
    expected = conditions(model, **inputs)
    model.fuse_qkv_projections()
    torch.testing.assert_close(conditions(model, **inputs), expected, atol=1e-6, rtol=0)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(conditions(model, **inputs), expected, atol=1e-6, rtol=0)


def test_lora(tmp_path):
    model = build()
    inputs = make_inputs(model)
    base = conditions(model, **inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "linear_1"], init_lora_weights=False))
    adapted = conditions(model, **inputs)
    assert not torch.allclose(adapted, base, atol=1e-3)
    model.save_lora_adapter(tmp_path)
    other = build()
    other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(conditions(other, **inputs), adapted)
    torch.testing.assert_close(conditions(other, **inputs, attention_kwargs={"scale": 0.0}), base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = build().to(dtype)
    inputs = make_inputs(model)
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    result = conditions(model, **inputs)
    assert result.dtype == dtype and torch.isfinite(result).all()


def test_bfloat16_autocast_gives_finite_gradients():
    model = build().train()
    inputs = make_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        rows = model(**inputs).conditions.flatten(0, 1)
        model.denoise(torch.ones(len(rows), 6), torch.arange(len(rows)), rows).float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.zeros(3, 9, 6)}, ValueError, r"`hidden_states` must have the shape \(batch_size, 10"),
        ({"hidden_states": torch.zeros(3, 10, 6).half()}, TypeError, "`hidden_states` must be of the model's dtype"),
        ({"class_labels": torch.zeros(3)}, TypeError, "`class_labels` must be a tensor of dtype int64 or int32"),
        ({"class_labels": torch.zeros(2).long()}, ValueError, r"`class_labels` must have the shape \(batch_size,\)"),
        ({"class_labels": torch.tensor([0, 5, 1])}, ValueError, r"`class_labels` must lie in 0..4, but reach from 0"),
        ({"force_drop_ids": torch.zeros(2)}, ValueError, "`force_drop_ids` must have the shape"),
        ({"visible_positions": torch.zeros(3, 2)}, TypeError, "`visible_positions` must be a tensor of dtype int64"),
        (
            {"visible_positions": None},
            TypeError,
            "`visible_positions` must be a tensor of dtype int64, but is NoneType",
        ),
        ({"predicted_positions": [[0]] * 3}, TypeError, "`predicted_positions` must be a tensor .*, but is list"),
        ({"force_drop_ids": [0, 0, 0]}, TypeError, "`force_drop_ids` must be a tensor, but is list"),
        ({"visible_positions": torch.zeros(2, 2).long()}, ValueError, "`visible_positions` must have the shape"),
        ({"visible_positions": torch.full((3, 1), 10)}, ValueError, "`visible_positions` must lie in 0..9"),
        ({"predicted_positions": torch.full((3, 1), -1)}, ValueError, "`predicted_positions` must lie in 0..9"),
        (
            {"visible_positions": torch.tensor([[0, 1], [2, 1], [5, 5]])},
            ValueError,
            "`visible_positions` must not hold a position twice",
        ),
    ],
)
def test_bad_inputs(change, error, message):
    model = build()
    with pytest.raises(error, match=message):
        model(**make_inputs(model) | change)


def test_denoiser_needs_its_conditioning():
    with pytest.raises(ValueError, match="`conditioning` is None, allowed: a tensor, or `timestep` and `conditions`"):
        build().denoise(torch.zeros(1, 6), timestep=torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noisy_tokens": torch.zeros(2, 5)}, r"`noisy_tokens` must have the shape \(2, 6\), but has \(2, 5\)"),
        ({"timestep": torch.tensor(3)}, r"`timestep` must have the shape \(2,\), but has \(\)"),
        ({"conditions": torch.zeros(1, 32)}, r"`conditions` must have the shape \(2, 32\), but has \(1, 32\)"),
        ({"conditioning": torch.zeros(2, 15)}, r"`conditioning` must have the shape \(2, 16\), but has \(2, 15\)"),
    ],
)
def test_denoiser_inputs_that_do_not_fit(change, message):
    inputs = {"noisy_tokens": torch.zeros(2, 6), "timestep": torch.zeros(2), "conditions": torch.zeros(2, 32)}
    with pytest.raises(ValueError, match=message):
        build().denoise(**inputs | change)


@pytest.mark.parametrize(
    ("config", "shape"), [(TOKENS_CONFIG, "10, 6"), (PATCHES_CONFIG, "3, 8, 8")], ids=["1d", "2d"]
)
def test_latents_that_are_no_tokens(config, shape):
    with pytest.raises(
        ValueError, match=rf"`latents` must have the shape \(batch_size, {shape}\), but has \(1, 4, 8\)"
    ):
        build(config).patchify(torch.zeros(1, 4, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "`num_tokens` must be positive, but is 0"),
        ({"sample_size": 0}, "`sample_size` must be positive, but is 0"),
        ({"mlp_ratio": float("nan")}, "`mlp_ratio` must give MLPs a width of 1 or more, but is nan"),
        ({"mlp_ratio": float("inf")}, "`mlp_ratio` must give MLPs a width of 1 or more, but is inf"),
        ({"mlp_ratio": 1e-4}, "`mlp_ratio` must give MLPs a width of 1 or more, but is 0.0001"),
        ({"buffer_size": 0}, "`buffer_size` must be positive, but is 0"),
        ({"denoiser_num_layers": -1}, "`denoiser_num_layers` must be positive, but is -1"),
        ({"dropout": 1.5}, r"`dropout` must lie in \[0, 1\], but is 1.5"),
        ({"decoder_hidden_size": 33}, "`decoder_hidden_size` must be a multiple of `decoder_num_attention_heads` = 2"),
        ({"patch_size": 2}, "`patch_size` must be 1 without `sample_size`, but is 2"),
        ({"sample_size": 7, "patch_size": 2}, "`sample_size` must be a multiple of `patch_size` = 2, but is 7"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize("change", [{"buffer_size": 2.5}, {"num_tokens": None}, {"sample_size": [16, 16]}])
def test_sizes_are_integers(change):
    with pytest.raises(TypeError, match=f"`{next(iter(change))}` must be an integer, but is"):
        build(**change)


@pytest.mark.parametrize("change", [{"mlp_ratio": None}, {"dropout": None}, {"attention_dropout": "0.1"}])
def test_ratios_are_numbers(change):
    with pytest.raises(TypeError, match=f"`{next(iter(change))}` must be a number, but is"):
        build(**change)
