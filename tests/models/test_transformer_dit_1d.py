"""`DiTTransformer1DModel` against the official SiT and DiT, and as a diffusers model: sizes, dtypes, saving, input."""

import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import nn

from softvq_hf.conversion.sit import convert_dit, convert_sit
from softvq_hf.models.transformer_dit_1d import DiTAttnProcessor, DiTTransformer1DModel, Transformer1DModelOutput


TOKENS_CONFIG = {
    "num_tokens": 10,
    "in_channels": 6,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 11,
}
PATCHES_CONFIG = {**TOKENS_CONFIG, "in_channels": 4, "patch_size": 2, "sample_size": 8, "qk_norm": True}
NO_COMPILER = shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file()
CONFIGS = pytest.mark.parametrize("config", [TOKENS_CONFIG, PATCHES_CONFIG], ids=["1d", "2d"])


def make_inputs(config, batch_size=3):
    shape = (10, 6) if config.get("patch_size") is None else (4, 8, 8)
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, *shape, generator=generator),
        "timestep": torch.linspace(20.0, 1000.0, batch_size),
        "class_labels": torch.arange(batch_size) * 5 % 12,
    }


def predict(model, **inputs):
    with torch.no_grad():
        return model(**inputs).sample


def converted_golden(golden, system, suffix):
    description, tensors = golden(system)
    weights = {
        key.removeprefix(f"weights{suffix}."): value
        for key, value in tensors.items()
        if key.startswith(f"weights{suffix}.")
    }
    convert, steps_per_unit = {"sit": (convert_sit, 1000), "dit": (convert_dit, 1)}[system]
    inputs = {
        "hidden_states": tensors[f"input{suffix}.x"],
        "timestep": tensors[f"input{suffix}.t"] * steps_per_unit,
        "class_labels": tensors[f"input{suffix}.y"],
    }
    expected = {
        key.removeprefix(f"output{suffix}."): value
        for key, value in tensors.items()
        if key.startswith(f"output{suffix}.")
    }
    return convert(weights, description[f"config{suffix}"]), inputs, expected, tensors


# The official numbers


@pytest.mark.parametrize("backend", ["_native_math", "native"])
@pytest.mark.parametrize("suffix", ["", "_2d"])
@pytest.mark.parametrize("system", ["sit", "dit"])
def test_reference_model(golden, system, suffix, backend):
    model, inputs, expected, _ = converted_golden(golden, system, suffix)

    seen = {}

    def record(name, part=None):
        def hook(module, args, output):
            seen[name] = args[0] if part == "input" else output

        return hook

    model.time_proj.register_forward_hook(record("t_freq"))
    model.timestep_embedder.register_forward_hook(record("t_emb"))
    model.class_embedder.register_forward_hook(record("y_emb"))
    model.transformer_blocks[0].register_forward_hook(record("embedded", "input"))
    model.transformer_blocks[0].attn.register_forward_hook(record("block0_attn"))
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(record(f"block{i}"))
    with attention_backend(backend):
        seen["model"] = predict(model, **inputs)

    compared = expected.keys() & seen.keys()
    assert compared >= {"embedded", "block0", "block1", "model"}
    for name in compared:
        # Rounding depends on processor and attention kernel. The residual stream, whose values reach 33, shows it:
        # there the tolerance is relative to the largest value.
        atol = 1e-5 * max(1.0, expected[name].abs().max().item()) if name.startswith("block") else 1e-5
        difference = (seen[name] - expected[name]).abs().max().item()
        assert difference <= atol, f"{name} differs by {difference}"


def test_reference_features_are_all_compared(golden):
    _, tensors = golden("sit")
    assert {f"output.{name}" for name in ("t_freq", "t_emb", "y_emb", "block0_attn", "block2")} <= tensors.keys()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_force_drop_ids_reference(golden, training, dtype):
    model, inputs, expected, tensors = converted_golden(golden, "sit", "")
    model.train(training)
    embeddings = []
    model.class_embedder.register_forward_hook(lambda module, args, output: embeddings.append(output))
    predict(model, **inputs, force_drop_ids=tensors["input.force_drop"].to(dtype))
    torch.testing.assert_close(embeddings[0], expected["y_emb_dropped"], atol=1e-5, rtol=0)


# Sizes: the official counts, where the "total" includes the position table. Ours is a frozen parameter, so that
# `num_parameters()` is the official total and `num_parameters(only_trainable=True)` the official trainable count.

XL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
L = {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64}
SL = {"num_layers": 16, "num_attention_heads": 16, "attention_head_dim": 64}
B = {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}
PATCHES = {"in_channels": 4, "sample_size": 32, "patch_size": 2}


@pytest.mark.parametrize(
    ("config", "total", "num_tokens"),
    [
        pytest.param(XL, 674_926_880, 64, id="SiT-XL/1 64x32"),
        pytest.param({**XL, "out_channels": 64}, 674_963_776, 64, id="DiT-XL/1 64x32"),
        pytest.param(L, 457_922_592, 64, id="SiT-L/1 64x32"),
        pytest.param({**L, "out_channels": 64}, 457_955_392, 64, id="DiT-L/1 64x32"),
        pytest.param(B, 130_377_248, 64, id="SiT-B/1 64x32"),
        pytest.param({**SL, "out_channels": 64}, 306_837_568, 64, id="DiT-SL/1 64x32"),
        pytest.param({**XL, "num_tokens": 32, "in_channels": 64}, 674_963_776, 32, id="SiT-XL/1 32x64"),
        pytest.param({**XL, "num_tokens": 128}, 675_000_608, 128, id="SiT-XL/1 128x32"),
        pytest.param(
            {**XL, "num_tokens": 32, "in_channels": 64, "out_channels": 128}, 675_037_568, 32, id="DiT-XL/1 32x64"
        ),
        pytest.param({**XL, **PATCHES}, 675_111_184, 256, id="SiT-XL/2"),
        pytest.param({**XL, **PATCHES, "out_channels": 8}, 675_129_632, 256, id="DiT-XL/2"),
    ],
)
def test_parameter_counts(config, total, num_tokens):
    with torch.device("meta"):
        model = DiTTransformer1DModel(**config)
    hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
    assert model.num_parameters() == total
    assert model.num_parameters(only_trainable=True) == total - num_tokens * hidden_size
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["pos_embed"]


def test_published_trainable_counts():
    with torch.device("meta"):
        sit, dit = DiTTransformer1DModel(), DiTTransformer1DModel(out_channels=64)
    assert sit.num_parameters(only_trainable=True) == 674_853_152
    assert dit.num_parameters(only_trainable=True) == 674_890_048


# Positions


def test_position_table_1d():
    model = DiTTransformer1DModel(**TOKENS_CONFIG)
    for n in (0, 3, 9):
        for k in (0, 1, 15):
            angle = n * math.exp(-2 * k * math.log(10000) / 32)
            assert model.pos_embed[0, n, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert model.pos_embed[0, n, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_position_table_2d_has_the_column_first():
    model = DiTTransformer1DModel(**PATCHES_CONFIG)
    table = model.pos_embed[0].unflatten(0, (4, 4))
    for row, column in ((0, 3), (2, 1), (3, 0)):
        for k in (0, 3, 7):
            frequency = 10000 ** (-k / 8)
            expected = [math.sin(column * frequency), math.cos(column * frequency)]
            expected += [math.sin(row * frequency), math.cos(row * frequency)]
            assert table[row, column, [k, 8 + k, 16 + k, 24 + k]].tolist() == pytest.approx(expected, abs=1e-6)


@CONFIGS
@pytest.mark.parametrize(
    "kwargs",
    [
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "low_cpu_mem_usage": False},
    ],
    ids=str,
)
def test_position_table_survives_loading(tmp_path, config, kwargs):
    model = DiTTransformer1DModel(**config)
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer1DModel.from_pretrained(tmp_path, **kwargs)
    dtype = kwargs.get("dtype", torch.float32)
    assert loaded.pos_embed.dtype == dtype
    assert torch.equal(loaded.pos_embed, model.pos_embed.to(dtype))
    assert not loaded.pos_embed.requires_grad


def test_position_table_survives_the_meta_device():
    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    with torch.device("meta"):
        empty = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    inputs = make_inputs(TOKENS_CONFIG)
    assert torch.equal(predict(empty, **inputs), predict(model, **inputs))


# Initialisation


@CONFIGS
def test_initialize_weights(config):
    model = DiTTransformer1DModel(**config)
    pos_embed = model.pos_embed.clone()
    assert predict(model, **make_inputs(config)).abs().max() > 0.01

    model.initialize_weights()
    assert predict(model, **make_inputs(config)).abs().max() == 0
    assert torch.equal(model.pos_embed, pos_embed)

    for block in model.transformer_blocks:
        assert block.norm1.linear.weight.abs().max() == 0
    for weight in (model.class_embedder.weight, model.timestep_embedder.linear_1.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    # Xavier-uniform: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)), the convolution seen as a matrix.
    for weight in (model.proj_in.weight.flatten(1), model.transformer_blocks[1].ff.net[0].proj.weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max() <= bound
    attention = model.transformer_blocks[1].attn
    for layer in (attention.to_q, attention.to_k, attention.to_v):  # one projection of the original, D to 3 D
        bound = math.sqrt(6 / (4 * layer.in_features))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert all(module.bias.abs().max() == 0 for module in model.modules() if isinstance(module, nn.Linear))


def test_training_from_scratch_moves_every_weight():
    model = DiTTransformer1DModel(**PATCHES_CONFIG)
    model.initialize_weights()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    inputs, target = make_inputs(PATCHES_CONFIG), torch.randn(3, 4, 8, 8)
    losses = []
    for _ in range(8):
        loss = nn.functional.mse_loss(model(**inputs).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == ["pos_embed"]


# Inputs and outputs


@CONFIGS
def test_output_forms(config):
    model = DiTTransformer1DModel(**config).eval()
    inputs = make_inputs(config)
    output = model(**inputs)
    assert isinstance(output, Transformer1DModelOutput)
    assert output.sample.shape == inputs["hidden_states"].shape
    (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, output.sample)


@CONFIGS
def test_learned_variance_doubles_the_channel_axis(config):
    model = DiTTransformer1DModel(**config, out_channels=2 * config["in_channels"]).eval()
    sample = predict(model, **make_inputs(config))
    assert sample.shape == ((3, 10, 12) if config is TOKENS_CONFIG else (3, 8, 8, 8))


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor(500.0, dtype=torch.float64)])
def test_scalar_timestep(timestep):
    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    inputs = make_inputs(TOKENS_CONFIG)
    expected = predict(model, **{**inputs, "timestep": torch.full((3,), 500.0)})
    assert torch.equal(predict(model, **{**inputs, "timestep": timestep}), expected)
    other = predict(model, **{**inputs, "timestep": torch.full((3,), 501.0)})
    assert not torch.equal(other, expected)


def test_timestep_scale():
    flow = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    ddpm = DiTTransformer1DModel(**TOKENS_CONFIG, timestep_scale=1.0).eval()
    ddpm.load_state_dict(flow.state_dict())
    inputs = make_inputs(TOKENS_CONFIG)
    expected = predict(flow, **{**inputs, "timestep": 250})
    torch.testing.assert_close(predict(ddpm, **{**inputs, "timestep": 0.25}), expected, atol=1e-6, rtol=0)
    assert (predict(ddpm, **{**inputs, "timestep": 250}) - expected).abs().max() > 1e-3


def test_time_features_are_computed_in_float32():
    # 998 and 1000 are the same number in bfloat16.
    model = DiTTransformer1DModel(**TOKENS_CONFIG, timestep_scale=1.0).to(torch.bfloat16).eval()
    features = []
    model.time_proj.register_forward_hook(lambda module, args, output: features.append(output))
    inputs = make_inputs(TOKENS_CONFIG)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    predict(model, **{**inputs, "timestep": torch.tensor([998.0, 999.0, 1000.0])})
    assert features[0].dtype == torch.float32
    assert features[0][0, 0].item() == pytest.approx(math.cos(998), abs=1e-4)
    assert features[0][2, 128].item() == pytest.approx(math.sin(1000), abs=1e-4)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(config, dtype):
    model = DiTTransformer1DModel(**config).eval()
    inputs = make_inputs(config)
    expected = predict(model, **inputs)
    sample = predict(model.to(dtype), **{**inputs, "hidden_states": inputs["hidden_states"].to(dtype)})
    assert sample.dtype == dtype
    assert (sample.float() - expected).abs().max() < 0.05


def test_bfloat16_autocast_gives_finite_gradients():
    model = DiTTransformer1DModel(**TOKENS_CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**make_inputs(TOKENS_CONFIG)).sample.float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert name == "pos_embed" or parameter.grad.isfinite().all(), name


# Label dropout


def test_labels_are_dropped_in_train_mode_only():
    model = DiTTransformer1DModel(**TOKENS_CONFIG, class_dropout_prob=1.0)
    inputs = make_inputs(TOKENS_CONFIG)
    null = predict(model.eval(), **{**inputs, "class_labels": torch.full((3,), 11)})
    conditional = predict(model, **inputs)
    assert not torch.equal(conditional, null)
    assert torch.equal(predict(model.train(), **inputs), null)
    assert torch.equal(predict(model, **inputs, force_drop_ids=torch.zeros(3)), conditional)
    assert torch.equal(predict(model.eval(), **inputs, force_drop_ids=torch.ones(3)), null)


def test_label_dropout_rate():
    model = DiTTransformer1DModel(**{**TOKENS_CONFIG, "num_layers": 1}, class_dropout_prob=0.25).train()
    labels = []
    model.class_embedder.register_forward_hook(lambda module, args, output: labels.append(args[0]))
    for _ in range(4):
        predict(
            model, hidden_states=torch.zeros(500, 10, 6), timestep=0, class_labels=torch.zeros(500, dtype=torch.int64)
        )
    dropped = torch.cat(labels) == 11
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert set(torch.cat(labels).tolist()) == {0, 11}


def test_without_label_dropout_there_is_no_null_class():
    model = DiTTransformer1DModel(**TOKENS_CONFIG, class_dropout_prob=0.0).train()
    assert model.class_embedder.num_embeddings == model.num_class_embeddings == 11
    inputs = make_inputs(TOKENS_CONFIG)
    assert torch.equal(predict(model, **inputs), predict(model, **inputs))
    with pytest.raises(ValueError, match="there is no null class, because `class_dropout_prob` is 0"):
        model(**{**inputs, "class_labels": torch.tensor([0, 5, 11])})
    with pytest.raises(ValueError, match="`force_drop_ids` needs a null class"):
        model(**inputs, force_drop_ids=torch.zeros(3))


# As a diffusers model


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load_are_exact(tmp_path, config, dtype):
    model = DiTTransformer1DModel(**config).to(dtype).eval()
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer1DModel.from_pretrained(tmp_path, dtype=dtype)
    for name, value in model.config.items():
        assert name.startswith("_") or loaded.config[name] == value, name
    assert loaded.dtype == dtype and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    inputs = make_inputs(config)
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    assert torch.equal(predict(loaded, **inputs), predict(model, **inputs))


def test_sharded_save_and_load(tmp_path):
    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DiTTransformer1DModel.from_pretrained(tmp_path)
    inputs = make_inputs(TOKENS_CONFIG)
    assert torch.equal(predict(loaded, **inputs), predict(model, **inputs))


def test_disk_offload_by_device_map(tmp_path):
    model = DiTTransformer1DModel(**{**TOKENS_CONFIG, "num_layers": 4}).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = DiTTransformer1DModel.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": model.get_memory_footprint() // 2},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    inputs = make_inputs(TOKENS_CONFIG)
    assert torch.equal(predict(loaded, **inputs), predict(model, **inputs))


@CONFIGS
def test_gradient_checkpointing(config):
    calls = []

    def gradients(checkpointing):
        torch.manual_seed(0)
        model = DiTTransformer1DModel(**config).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls.clear()
        model.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        sample = model(**make_inputs(config)).sample
        sample.square().mean().backward()
        return sample, {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)

    sample, expected, num_calls = gradients(checkpointing=False)
    sample_checkpointed, checkpointed, num_calls_checkpointed = gradients(checkpointing=True)
    assert (num_calls, num_calls_checkpointed) == (1, 2)  # the backward pass computes the block again
    assert torch.equal(sample, sample_checkpointed)
    assert expected.keys() == checkpointed.keys()
    for name, gradient in expected.items():
        if name == "pos_embed":
            assert gradient is None and checkpointed[name] is None
        else:
            assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C++ compiler and the headers of Python")
def test_compile_fullgraph():
    model = DiTTransformer1DModel(**{**TOKENS_CONFIG, "num_layers": 1}).eval()
    inputs = make_inputs(TOKENS_CONFIG)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(predict(compiled, **inputs), predict(model, **inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("config", "training"), [(TOKENS_CONFIG, True), (PATCHES_CONFIG, False)], ids=["1d", "2d"])
def test_graph_has_no_breaks_and_does_not_recompile(config, training):
    torch.compiler.reset()
    model = DiTTransformer1DModel(**{**config, "num_layers": 1}).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    drop = {"force_drop_ids": torch.tensor([0, 1, 0])}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch_seed in range(2):
            inputs = make_inputs(config)
            inputs["hidden_states"] = inputs["hidden_states"] + batch_seed
            torch.testing.assert_close(
                compiled(**inputs, **drop).sample, model(**inputs, **drop).sample, atol=1e-5, rtol=0
            )
    if training:
        compiled(**inputs).sample.mean().backward()  # draws the label dropout in the graph
        assert model.proj_in.weight.grad.isfinite().all()


def test_compile_repeated_blocks():
    torch.compiler.reset()
    model = DiTTransformer1DModel(**{**TOKENS_CONFIG, "num_layers": 4}).eval()
    inputs = make_inputs(TOKENS_CONFIG)
    expected = predict(model, **inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        torch.testing.assert_close(predict(model, **inputs), expected, atol=1e-5, rtol=0)


def test_export():
    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    inputs = make_inputs(TOKENS_CONFIG)
    exported = torch.export.export(model, args=(), kwargs=inputs)
    torch.testing.assert_close(
        exported.module()(**inputs).sample, predict(model, **inputs), atol=1e-5, rtol=0, check_stride=False
    )


@CONFIGS
def test_fused_projections(config):
    model = DiTTransformer1DModel(**config).eval()
    inputs = make_inputs(config)
    expected = predict(model, **inputs)
    calls = []
    model.fuse_qkv_projections()
    for block in model.transformer_blocks:
        block.attn.to_qkv.register_forward_hook(lambda *_: calls.append("fused"))
        block.attn.to_q.register_forward_hook(lambda *_: calls.append("separate"))
    torch.testing.assert_close(predict(model, **inputs), expected, atol=1e-5, rtol=0)
    assert calls == ["fused", "fused"]
    model.unfuse_qkv_projections()
    assert not hasattr(model.transformer_blocks[0].attn, "to_qkv")
    assert torch.equal(predict(model, **inputs), expected)


def test_attention_processors():
    class ValueProcessor:
        def __call__(self, attn, hidden_states, scale=1.0):
            return scale * attn.to_v(hidden_states)

    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    names = [f"transformer_blocks.{i}.attn.processor" for i in range(2)]
    assert list(model.attn_processors) == names
    assert all(isinstance(processor, DiTAttnProcessor) for processor in model.attn_processors.values())

    inputs = make_inputs(TOKENS_CONFIG)
    expected = predict(model, **inputs)
    processor = ValueProcessor()
    model.set_attn_processor(processor)
    assert list(model.attn_processors.values()) == [processor, processor]
    assert not torch.equal(predict(model, **inputs), expected)
    model.set_attn_processor({name: DiTAttnProcessor() for name in names})
    assert torch.equal(predict(model, **inputs), expected)


def test_attention_kwargs_reach_the_processor():
    class GainProcessor:
        def __call__(self, attn, hidden_states, gain):
            return gain * attn.to_v(hidden_states)

    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    model.set_attn_processor(GainProcessor())
    inputs = make_inputs(TOKENS_CONFIG)
    first = predict(model, **inputs, attention_kwargs={"gain": 1.0})
    assert not torch.equal(predict(model, **inputs, attention_kwargs={"gain": 2.0}), first)


def test_lora(tmp_path):
    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    inputs = make_inputs(TOKENS_CONFIG)
    base = predict(model, **inputs)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    adapted = predict(model, **inputs)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(predict(model, **inputs, attention_kwargs={"scale": 0.0}), base, atol=1e-6, rtol=0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora" in name for name in trainable)

    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(predict(model, **inputs), base)
    model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(predict(model, **inputs), adapted, atol=1e-6, rtol=0)


def test_layerwise_casting():
    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    inputs = make_inputs(TOKENS_CONFIG)
    expected = predict(model, **inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: module.weight.dtype for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert stored["transformer_blocks.0.attn.to_q"] == stored["transformer_blocks.1.ff.net.2"] == torch.float8_e4m3fn
    for name in ("proj_in", "timestep_embedder.linear_1", "transformer_blocks.0.norm1.linear", "norm_out.linear"):
        assert stored[name] == torch.float32, name
    assert model.class_embedder.weight.dtype == torch.float32
    assert (predict(model, **inputs) - expected).abs().max() < 0.1


def test_ema_keeps_the_position_table():
    model = DiTTransformer1DModel(**TOKENS_CONFIG)
    pos_embed = model.pos_embed.clone()
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    with torch.no_grad():
        model.proj_out.bias.add_(1.0)
    ema.step(model.parameters())
    ema.copy_to(model.parameters())
    assert torch.equal(model.pos_embed, pos_embed)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.zeros(3, 9, 6)}, ValueError, r"\(batch_size, 10, 6\), but has \(3, 9, 6\)"),
        ({"hidden_states": torch.zeros(3, 10, 5)}, ValueError, r"\(batch_size, 10, 6\), but has \(3, 10, 5\)"),
        ({"hidden_states": torch.zeros(10, 6)}, ValueError, r"\(batch_size, 10, 6\), but has \(10, 6\)"),
        ({"hidden_states": torch.zeros(3, 10, 6).long()}, TypeError, "`hidden_states`.*torch.int64"),
        ({"timestep": torch.zeros(2)}, ValueError, r"`timestep`.*\(3,\), but has \(2,\)"),
        ({"timestep": torch.zeros(3, 1)}, ValueError, r"`timestep`.*\(3,\), but has \(3, 1\)"),
        ({"class_labels": torch.zeros(2).long()}, ValueError, r"`class_labels`.*\(3,\), but has \(2,\)"),
        ({"class_labels": torch.zeros(3)}, TypeError, "`class_labels`.*int64 or int32, but is torch.float32"),
        ({"class_labels": [0, 1, 2]}, TypeError, "`class_labels`.*int64 or int32, but is list"),
        ({"class_labels": torch.tensor([0, 1, 12])}, ValueError, r"0\.\.11 \(11 is the null class\).*from 0 to 12"),
        ({"class_labels": torch.tensor([-1, 1, 2])}, ValueError, r"0\.\.11 .*from -1 to 2"),
        ({"force_drop_ids": torch.zeros(2)}, ValueError, r"`force_drop_ids`.*\(3,\), but has \(2,\)"),
    ],
)
def test_bad_inputs(change, error, message):
    model = DiTTransformer1DModel(**TOKENS_CONFIG).eval()
    with pytest.raises(error, match=message):
        model(**{**make_inputs(TOKENS_CONFIG), **change})


@pytest.mark.parametrize("shape", [(3, 4, 8, 6), (3, 3, 8, 8), (3, 16, 16)])
def test_bad_2d_latents(shape):
    model = DiTTransformer1DModel(**PATCHES_CONFIG).eval()
    with pytest.raises(ValueError, match=r"\(batch_size, 4, 8, 8\), but has"):
        model(**{**make_inputs(PATCHES_CONFIG), "hidden_states": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 9}, r"`out_channels` must be `in_channels` = 6, or 12 .* but is 9"),
        ({"num_attention_heads": 3, "attention_head_dim": 5}, r"divisible by 2 for the 1-D .* 3 \* 5 = 15"),
        ({"patch_size": 2, "sample_size": 8, "num_attention_heads": 1, "attention_head_dim": 6}, "divisible by 4"),
        ({"patch_size": 2}, "must be given together"),
        ({"sample_size": 8}, "must be given together"),
        ({"patch_size": 3, "sample_size": 8}, "positive multiple of a positive `patch_size`, but they are 8 and 3"),
        ({"patch_size": 0, "sample_size": 8}, "positive multiple of a positive `patch_size`, but they are 8 and 0"),
        ({"num_tokens": 0}, "`num_tokens` must be positive, but is 0"),
        ({"num_layers": -1}, "`num_layers` must be positive, but is -1"),
        ({"timestep_scale": 0.0}, "`timestep_scale` must be positive, but is 0.0"),
        ({"class_dropout_prob": 1.5}, r"`class_dropout_prob` must lie in \[0, 1\], but is 1.5"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        DiTTransformer1DModel(**{**TOKENS_CONFIG, **change})


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_hidden_states_of_a_layer(gradient_checkpointing):
    model = DiTTransformer1DModel(
        num_tokens=4, in_channels=3, num_layers=3, num_attention_heads=2, attention_head_dim=8, num_classes=5
    )
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    outputs = []
    model.transformer_blocks[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    inputs = {"hidden_states": torch.randn(2, 4, 3), "timestep": 7.0, "class_labels": torch.tensor([1, 2])}
    output = model.eval()(**inputs, hidden_states_layer=2)
    assert output.hidden_states.shape == (2, 4, 16) and torch.equal(output.hidden_states, outputs[0])
    assert torch.equal(output.sample, model(**inputs).sample) and model(**inputs).hidden_states is None
    assert len(model(**inputs, hidden_states_layer=2, return_dict=False)) == 2
    with pytest.raises(ValueError, match="`hidden_states_layer` is 4, allowed: 1 to 3"):
        model(**inputs, hidden_states_layer=4)


# Modulation computed apart


@pytest.mark.parametrize("config", [{"num_tokens": 10, "in_channels": 6}, {"patch_size": 2, "sample_size": 4}])
def test_modulation_takes_the_place_of_times_and_classes(config):
    model = DiTTransformer1DModel(
        **{"in_channels": 4, **config}, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=4
    ).eval()
    shape = (4, 4, 4) if model.is_2d else (10, 6)
    hidden_states, times, classes = torch.randn(3, *shape), torch.tensor([0.0, 400.0, 1000.0]), torch.tensor([4, 0, 3])
    with torch.no_grad():
        modulation = model.compute_modulation(times, classes)
        expected = model(hidden_states, times, classes).sample
        result = model(hidden_states, times, classes, modulation=modulation).sample
        swapped = model(hidden_states, times, classes, modulation=modulation.flip(0)).sample
    assert modulation.shape == (3, 6 * 2 + 2, 16)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(swapped, expected, atol=1e-3)


def test_no_label_is_dropped_from_a_modulation():
    config = {"num_tokens": 4, "in_channels": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    model = DiTTransformer1DModel(**config, num_classes=4, class_dropout_prob=1.0).train()
    times, classes = torch.tensor([500.0, 500.0]), torch.tensor([0, 3])
    expected = model.eval().compute_modulation(times, classes)
    assert torch.equal(model.train().compute_modulation(times, classes), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"modulation": torch.zeros(2, 7, 16)},
            r"`modulation` must have the shape \(2, 8, 16\), but has \(2, 7, 16\)",
        ),
        (
            {"modulation": torch.zeros(2, 8, 16), "force_drop_ids": torch.tensor([0, 1])},
            "`force_drop_ids` must be None",
        ),
    ],
)
def test_modulations_that_do_not_fit(arguments, message):
    config = {"num_tokens": 4, "in_channels": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    model = DiTTransformer1DModel(**config)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 4, 2), 500, torch.tensor([0, 1]), **arguments)


def test_modulation_of_labels_out_of_range():
    model = DiTTransformer1DModel(
        num_tokens=4, in_channels=2, num_layers=1, num_attention_heads=2, attention_head_dim=8
    )
    with pytest.raises(ValueError, match="`class_labels` must lie in 0..1000"):
        model.compute_modulation(torch.tensor([500.0]), torch.tensor([1001]))
    with pytest.raises(ValueError, match=r"`timestep` must be a scalar or have the shape \(batch_size,\) = \(1,\)"):
        model.compute_modulation(torch.tensor([500.0, 400.0]), torch.tensor([1]))
