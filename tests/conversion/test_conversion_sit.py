"""Official SiT and DiT checkpoints: their numbers, the wrappers around their keys, and what must not convert."""

import pytest
import torch
from diffusers.utils import logging

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.conversion.sit import convert_dit, convert_sit


@pytest.fixture
def sit(golden):
    description, tensors = golden("sit")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    inputs = {
        "hidden_states": tensors["input.x"],
        "timestep": tensors["input.t"] * 1000,
        "class_labels": tensors["input.y"],
    }
    return weights, description["config"], inputs, tensors["output.model"]


def predict(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.parametrize("suffix", ["", "_2d"])
@pytest.mark.parametrize(("system", "units", "timestep_scale"), [("sit", 1000, 1e-3), ("dit", 1, 1.0)])
def test_prediction(golden, system, units, timestep_scale, suffix):
    description, tensors = golden(system)
    prefix = f"weights{suffix}."
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    config = description[f"config{suffix}"]
    model = convert_checkpoint(system, weights, config)

    assert not model.training and model.dtype == torch.float32
    assert model.config.timestep_scale == timestep_scale
    assert model.config.num_classes == config["num_classes"]
    assert model.config.num_tokens == (16 if suffix else 10)
    assert model.num_parameters() == sum(weight.numel() for weight in weights.values())
    inputs = {
        "hidden_states": tensors[f"input{suffix}.x"],
        "timestep": tensors[f"input{suffix}.t"] * units,
        "class_labels": tensors[f"input{suffix}.y"],
    }
    torch.testing.assert_close(predict(model, inputs), tensors[f"output{suffix}.model"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["", "_2d"])
def test_prediction_in_training_loss(golden, suffix):
    description, tensors = golden("sit_loss")
    prefix = f"weights{suffix}."
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    model = convert_sit(weights, description[f"config{suffix}"])
    for case in ("linear_uniform", "cosine_lognormal"):
        path, weighting = case.split("_")
        output = f"output{suffix}.{path}_{weighting}"
        inputs = {
            "hidden_states": tensors[f"{output}.model_input"],
            "timestep": tensors[f"{output}.time"] * 1000,
            "class_labels": tensors[f"input{suffix}.y"],
        }
        torch.testing.assert_close(predict(model, inputs), tensors[f"{output}.model_output"], atol=1e-5, rtol=0)


def test_saved_conversion_is_exact(sit, tmp_path):
    weights, config, inputs, _ = sit
    model = convert_sit(weights, config)
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(type(model).from_pretrained(tmp_path), inputs), predict(model, inputs))


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("blocks.1.", "blocks.1._orig_mod."),
    ],
)
def test_wrapper_prefixes(sit, rename):
    weights, config, inputs, expected = sit
    model = convert_sit({rename(key): value for key, value in weights.items()}, config)
    torch.testing.assert_close(predict(model, inputs), expected, atol=1e-5, rtol=0)


def test_caller_keeps_its_state_dict(sit):
    weights, config, _, _ = sit
    before = {key: value.clone() for key, value in weights.items()}
    model = convert_sit(weights, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[key], before[key]) for key in weights)


def test_repa_projectors_are_dropped(sit):
    weights, config, inputs, expected = sit
    projectors = {f"projectors.0.{i}.{name}": torch.zeros(2) for i in (0, 2, 4) for name in ("weight", "bias")}
    model = convert_sit({**weights, **projectors}, config)
    torch.testing.assert_close(predict(model, inputs), expected, atol=1e-5, rtol=0)


def test_old_repa_block_names(sit):
    weights, config, inputs, _ = sit
    config = {**config, "depth": 10}
    for i in range(3, 10):
        weights |= {
            key.replace("blocks.0.", f"blocks.{i}."): value * (1 - 0.1 * i)
            for key, value in weights.items()
            if key.startswith("blocks.0.")
        }
    expected = predict(convert_sit(weights, config), inputs)
    old = {
        key.replace("blocks.8.", "decoder_blocks.0.").replace("blocks.9.", "decoder_blocks.1."): value
        for key, value in weights.items()
    }
    assert "decoder_blocks.1.attn.qkv.weight" in old and "blocks.9.attn.qkv.weight" not in old
    assert torch.equal(predict(convert_sit(old, config), inputs), expected)

    with pytest.raises(ValueError, match="'blocks.8.attn.qkv.weight' twice"):
        convert_sit({**weights, "decoder_blocks.0.attn.qkv.weight": weights["blocks.0.attn.qkv.weight"]}, config)


def test_all_wrong_keys_are_listed_at_once(sit):
    weights, config, _, _ = sit
    del weights["blocks.1.attn.qkv.weight"], weights["final_layer.linear.bias"]
    weights["head.weight"] = torch.zeros(3)
    weights["blocks.0.attn.q_norm.weight"] = torch.zeros(16)
    weights["x_embedder.weight"] = torch.zeros(48, 7)
    weights["blocks.2.attn.qkv.bias"] = torch.zeros(143)
    with pytest.raises(ValueError) as error:
        convert_sit(weights, config)
    for part in (
        "missing: blocks.1.attn.qkv.weight, final_layer.linear.bias",
        "unexpected: blocks.0.attn.q_norm.weight, head.weight",
        "blocks.2.attn.qkv.bias (is (143,), should be (144,))",
        "x_embedder.weight (is (48, 7), should be (48, 6))",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"depth": 2}, "blocks.2.attn.qkv.weight"),
        ({"depth": 4}, "blocks.3.attn.qkv.weight"),
        ({"num_classes": 10}, "y_embedder.embedding_table.weight"),
        ({"class_dropout_prob": 0.0}, "y_embedder.embedding_table.weight"),
        ({"in_channels": 8}, "final_layer.linear.weight"),
        ({"input_size": 12}, "pos_embed"),
        ({"qk_norm": True}, "blocks.0.attn.k_norm.bias"),
        ({"vae_1d": False, "input_size": 4}, "x_embedder.proj.weight"),
        ({"mlp_ratio": 2.0}, "blocks.0.mlp.fc1.weight"),
    ],
)
def test_config_of_another_model(sit, change, key):
    weights, config, _, _ = sit
    with pytest.raises(ValueError) as error:
        convert_sit(weights, {**config, **change})
    assert key in str(error.value)


@pytest.mark.parametrize(
    "broken", [lambda table: table + 0.02, lambda table: table.flip(1), lambda table: table * float("nan")]
)
def test_other_position_tables_are_refused(sit, broken):
    weights, config, _, _ = sit
    with pytest.raises(ValueError, match="`pos_embed` differs by|not finite numbers: pos_embed"):
        convert_sit({**weights, "pos_embed": broken(weights["pos_embed"])}, config)


def test_rounding_of_the_position_table_is_allowed(sit):
    weights, config, inputs, expected = sit
    model = convert_sit({**weights, "pos_embed": weights["pos_embed"] + 5e-6}, config)
    torch.testing.assert_close(predict(model, inputs), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "key",
    [
        "input_size",
        "in_channels",
        "hidden_size",
        "depth",
        "num_heads",
        "mlp_ratio",
        "num_classes",
        "class_dropout_prob",
        "patch_size",
        "vae_1d",
    ],
)
@pytest.mark.parametrize("convert", [convert_sit, convert_dit])
def test_missing_config_key(sit, convert, key):
    weights, config, _, _ = sit
    config = {**config, "learn_sigma": False}
    del config[key]
    with pytest.raises(ValueError, match=f"`config` lacks {key}:"):
        convert(weights, config)


def test_dit_config_must_say_whether_the_variance_is_learned(sit):
    weights, config, _, _ = sit
    with pytest.raises(ValueError, match="`config` lacks learn_sigma"):
        convert_dit(weights, config)
    model = convert_dit(weights, {**config, "learn_sigma": False})
    assert (model.out_channels, model.config.timestep_scale) == (6, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learn_sigma": True}, r"`config\['learn_sigma'\]` is True, allowed: False"),
        ({"num_heads": 5}, r"`config\['hidden_size'\]` is 48, allowed: multiples of `num_heads` = 5"),
        ({"patch_size": 2}, r"`config\['patch_size'\]` is 2, allowed: 1 for 1-D latents"),
    ],
)
def test_bad_config_value(sit, change, message):
    weights, config, _, _ = sit
    with pytest.raises(ValueError, match=message):
        convert_sit(weights, {**config, **change})


def test_published_config_converts_in_silence_and_unknown_keys_are_named(sit, caplog):
    weights, config, _, _ = sit
    published = {
        **config,
        "path_type": "edm",
        "fused_attn": True,
        "flash_attn": False,
        "z_dims": [768],
        "tags": ["image-generation"],
        "repo_url": "https://github.com/Hhhhhhao/continuous_tokenizer",
        "license": "mit",
    }
    logging.enable_propagation()
    try:
        convert_sit(weights, published)
        assert not caplog.records
        convert_sit(weights, {**published, "use_rope": False, "act": "relu"})
        assert [record.getMessage() for record in caplog.records if "act, use_rope" in record.getMessage()]
    finally:
        logging.disable_propagation()


def test_averaged_position_table_is_taken_as_it_is(sit):
    """The official averaged weights include the table; rounding over thousands of steps moves it by 1.7e-4."""
    weights, config, _, _ = sit
    table, average = weights["pos_embed"], weights["pos_embed"].clone()
    for _ in range(12_000):
        average.mul_(0.9999).add_(table, alpha=1 - 0.9999)
    assert (average - table).abs().max() > 1e-4
    for stored in (average, table.bfloat16(), average.half()):
        model = convert_sit({**weights, "pos_embed": stored}, config)
        assert torch.equal(model.pos_embed, stored.float())


def test_tensors_without_values_are_refused(sit):
    weights, config, _, _ = sit
    on_meta = {f"module.{key}": tensor.to("meta") for key, tensor in weights.items()} | {
        key: tensor.to("meta") for key, tensor in weights.items()
    }
    with pytest.raises(ValueError, match="tensors without values"):
        convert_sit(on_meta, config)
    with torch.device("meta"):
        assert convert_sit(on_meta, config).pos_embed.is_meta
