"""Official checkpoints become folders that diffusers loads; what cannot be converted leaves nothing behind."""

import argparse
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    VQModel,
)
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from softvq_hf import (
    AutoencoderSoftVQ,
    DiTTransformer1DModel,
    MARPipeline,
    MARTransformer1DModel,
    SoftVQPipeline,
    StochasticInterpolantScheduler,
    TemperatureDDPMScheduler,
)
from softvq_hf.conversion import convert_checkpoint
from softvq_hf.training import convert as convert_module
from softvq_hf.training.convert import convert_pretrained
from softvq_hf.training.official_checkpoints import detect_system, load_official_checkpoint


BLOCK_SOFTVQ_HF = (Path(__file__).parents[1] / "fixtures/block_softvq_hf.py").read_text()
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def official(golden):
    """
    `official(name, **config_changes) -> (weights, config)` of a reference model; "sit" and "dit" have 8 tokens, as the
    tokenizer "softvq_tokenizer" has.
    """

    def load(name: str, **changes) -> tuple[dict[str, torch.Tensor], dict]:
        description, tensors = golden(name)
        weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
        config = description["config"] | changes
        for side in ("encoder_override", "decoder_override"):
            if side in description:
                config[side] = description[side]
        if name in ("sit", "dit"):
            config["input_size"] = 8
            weights["pos_embed"] = weights["pos_embed"][:, :8].clone()
        return weights, config

    return load


@pytest.fixture
def official_folder(official, tmp_path):
    """`official_folder(name, **config_changes) -> Path` of a folder as on the Hub."""

    def write(name: str, **changes) -> Path:
        weights, config = official(name, **changes)
        return write_folder(tmp_path / f"official-{name}", weights, config)

    return write


def write_folder(folder: Path, weights: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# What is written


@pytest.mark.parametrize("name", ["softvq_tokenizer", "softvq_tokenizer_kl", "softvq_tokenizer_vq", "maetok"])
def test_tokenizer(official_folder, golden, tmp_path, name):
    source = official_folder(name, vq_mean=0.01, vq_std=0.05, license="mit")
    converted = convert_pretrained(source, tmp_path / "out")
    loaded = AutoencoderSoftVQ.from_pretrained(tmp_path / "out")
    assert type(converted) is AutoencoderSoftVQ and same_weights(loaded, converted)
    assert loaded.config.shift_factor == 0.01 and loaded.config.scaling_factor == pytest.approx(20)

    _, tensors = golden(name)
    expected = "reconstruction_mode" if name.endswith("kl") else "reconstruction"
    with torch.no_grad():
        sample = loaded.eval()(tensors["input.image"]).sample
    torch.testing.assert_close(sample, tensors[f"output.{expected}"], **TOLERANCE)

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert f"| source | {Path(source).name} |" in card.text and "| system | softvq |" in card.text
    assert f'"{tmp_path / "out"}"' in card.text  # its code example loads the folder by its last name


def test_convolutional_tokenizer(official_folder, tmp_path):
    converted = convert_pretrained(official_folder("softvq_tokenizer_cnn"), tmp_path / "out")
    assert type(converted) is VQModel and same_weights(VQModel.from_pretrained(tmp_path / "out"), converted)
    assert "VQModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("named_args", [True, False])
def test_mar(official, tmp_path, named_args):
    """A training file with its arguments or a config beside it, alone and with the tokenizer of its 2-D latents."""
    weights, config = official("mar")
    others = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    content = {"model": others, "model_ema": weights, "epoch": 3}
    source = tmp_path / "checkpoint-last.pth"
    if named_args:
        content["args"] = argparse.Namespace(**config, output_dir="somewhere")
    else:
        (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(content, source)
    converted = convert_pretrained(source, tmp_path / "out")
    assert same_weights(MARTransformer1DModel.from_pretrained(tmp_path / "out", subfolder="transformer"), converted)
    scheduler = TemperatureDDPMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert (scheduler.config.variance_type, scheduler.config.clip_sample) == ("learned_range", False)

    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)  # what its card shows
    assert names["conditions"].shape == (1, 16, 48)

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=6,
        sample_size=16,
    )
    vae.save_pretrained(tmp_path / "vae")
    pipeline = convert_pretrained(source, tmp_path / "pipeline", tokenizer=tmp_path / "vae")
    assert type(pipeline) is MARPipeline and same_weights(pipeline.transformer, converted)
    loaded = MARPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    images = loaded([1], num_inference_steps=2, num_diffusion_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    assert "| system | mar |" in (tmp_path / "pipeline/README.md").read_text()
    with pytest.raises(ValueError, match="`path_type` is given, but the system of `source` is 'mar'"):
        convert_pretrained(source, tmp_path / "again", path_type="linear")


def test_mar_with_the_name_of_a_model_in_its_arguments(official, tmp_path):
    """`None` is no name; a name does not hide sizes that are not those of the model."""
    weights, config = official("mar")
    source = tmp_path / "checkpoint-last.pth"
    torch.save({"model": weights, "args": argparse.Namespace(**config | {"model": None})}, source)
    expected = convert_checkpoint("mar", weights, config)
    assert same_weights(convert_pretrained(source, tmp_path / "out"), expected)
    torch.save({"model": weights, "args": argparse.Namespace(**config | {"model": "mar_base"})}, source)
    with pytest.raises(ValueError, match=r"`config\['model'\]` is 'mar_base', allowed with `encoder_embed_dim`"):
        convert_pretrained(source, tmp_path / "again")


@pytest.mark.parametrize(("system", "suffix"), [("sit", ""), ("sit", "_2d"), ("dit", ""), ("dit", "_2d")])
def test_generator(golden, tmp_path, system, suffix):
    description, tensors = golden(system)
    prefix = f"weights{suffix}."
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    source = write_folder(tmp_path / "official", weights, description[f"config{suffix}"])
    converted = convert_pretrained(source, tmp_path / "out")
    loaded = DiTTransformer1DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert type(converted) is DiTTransformer1DModel and same_weights(loaded, converted)
    with torch.no_grad():
        prediction = loaded(
            tensors[f"input{suffix}.x"],
            timestep=tensors[f"input{suffix}.t"] * (1000 if system == "sit" else 1),
            class_labels=tensors[f"input{suffix}.y"],
        ).sample
    torch.testing.assert_close(prediction, tensors[f"output{suffix}.model"], **TOLERANCE)

    if system == "sit":
        FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    else:
        config = DDPMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler").config
        assert config.beta_schedule == ("linear" if suffix else "squaredcos_cap_v2")
        assert (config.variance_type, config.clip_sample) == ("learned_range", False)
        assert (config.timestep_spacing, config.num_train_timesteps) == ("linspace", 1000)
    assert f"| system | {system} |" in (tmp_path / "out" / "README.md").read_text()
    assert everything_below(tmp_path / "out") == {
        "README.md",
        "scheduler",
        "scheduler/scheduler_config.json",
        "transformer",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/transformer_dit_1d.py",
    }


def test_dit_without_learned_variance(official, tmp_path):
    weights, config = official("sit")
    config = {key: value for key, value in config.items() if key not in ("use_cfg", "decoder_hidden_size")}
    source = write_folder(tmp_path / "official", weights, config | {"learn_sigma": False})
    convert_pretrained(source, tmp_path / "out", beta_schedule="linear")
    config = DDPMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler").config
    assert (config.variance_type, config.beta_schedule) == ("fixed_large", "linear")


@pytest.mark.parametrize(
    ("system", "options", "scheduler"),
    [
        ("sit", {}, FlowMatchEulerDiscreteScheduler),
        ("sit", {"path_type": "cosine"}, StochasticInterpolantScheduler),
        ("dit", {}, DDPMScheduler),
    ],
)
def test_pipeline(official_folder, tmp_path, system, options, scheduler):
    tokenizer = official_folder("softvq_tokenizer", vq_mean=0.01, vq_std=0.3)
    pipeline = convert_pretrained(official_folder(system), tmp_path / "out", tokenizer=tokenizer, **options)
    loaded = SoftVQPipeline.from_pretrained(tmp_path / "out")
    assert type(loaded.scheduler) is type(pipeline.scheduler) is scheduler
    assert loaded.scheduler.config.get("path_type") == options.get("path_type")
    assert same_weights(loaded.transformer, pipeline.transformer) and same_weights(loaded.vae, pipeline.vae)
    assert loaded.vae.config.scaling_factor == pytest.approx(1 / 0.3)

    loaded.set_progress_bar_config(disable=True)
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": [3, 7], "guidance_scale": 1.5, "num_inference_steps": 4, "output_type": "np"}
    images = loaded(**call, generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0
    assert (images == pipeline(**call, generator=torch.Generator().manual_seed(0)).images).all()

    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| tokenizer | {Path(tokenizer).name} |" in text
    if system == "dit":
        assert "| path |" not in text
    else:
        assert ("| path | cosine, as given |" if options else "| path | unknown") in text


@pytest.mark.slow
def test_plain_diffusers_loads_the_pipeline(official_folder, tmp_path):
    tokenizer = official_folder("softvq_tokenizer", vq_std=0.3)
    convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=tokenizer, path_type="linear")
    code = (
        BLOCK_SOFTVQ_HF
        + """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("out", trust_remote_code=True)
assert pipeline([0, 1], num_inference_steps=2, output_type="np").images.shape == (2, 64, 64, 3)
"""
    )
    run([sys.executable, "-c", code], tmp_path, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("kind", ["converted", "pt"])
def test_kinds_of_tokenizers(official, official_folder, tmp_path, kind):
    source = official_folder("softvq_tokenizer", vq_std=0.3)
    expected = convert_pretrained(source, tmp_path / "converted")
    tokenizer = tmp_path / "converted"
    if kind == "pt":
        weights, config = official("softvq_tokenizer", vq_std=0.3)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        tokenizer = tmp_path / "run" / "0250000.pt"
        torch.save({"ema": weights}, tokenizer)
    pipeline = convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=str(tokenizer))
    assert same_weights(pipeline.vae, expected)
    assert pipeline.vae.config.scaling_factor == expected.config.scaling_factor
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_generator_of_feature_maps(golden, tmp_path):
    description, tensors = golden("sit")
    weights = {key[11:]: value for key, value in tensors.items() if key.startswith("weights_2d.")}
    source = write_folder(tmp_path / "official", weights, description["config_2d"])
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=8,  # of its training: it serves every size
    )
    vae.save_pretrained(tmp_path / "vae")
    pipeline = convert_pretrained(source, tmp_path / "out", tokenizer=tmp_path / "vae", path_type="linear")
    assert type(pipeline.vae) is AutoencoderKL
    pipeline = SoftVQPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_names_of_classes(official_folder, tmp_path):
    source = official_folder("sit")
    options = {"tokenizer": official_folder("softvq_tokenizer", vq_std=0.3)}
    names = {str(i): f"class {i}" for i in range(11)}
    (tmp_path / "names.json").write_text(json.dumps(names))
    convert_pretrained(source, tmp_path / "out", id2label=tmp_path / "names.json", **options)
    pipeline = SoftVQPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.config.id2label == {i: f"class {i}" for i in range(11)}

    before = everything_below(tmp_path)
    for wrong in ("imagenet", dict.fromkeys(range(10), "x"), dict.fromkeys(range(1, 12), "x"), {"a": "b"}):
        with pytest.raises(ValueError, match="`id2label` (names|has)"):
            convert_pretrained(source, tmp_path / "wrong", id2label=wrong, **options)
    assert everything_below(tmp_path) == before


def test_empty_folder_is_filled_and_has_ordinary_permissions(official_folder, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "out").mkdir()
    convert_pretrained(official_folder("softvq_tokenizer_ae"), tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    convert_pretrained(official_folder("softvq_tokenizer_ae"), tmp_path / "a" / "b" / "out")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"out"}


# Training files


def test_averaged_weights_are_preferred_and_prefixes_stripped(official, tmp_path):
    weights, config = official("sit")
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = {
        "model": {f"module._orig_mod.{key}": torch.zeros_like(value) for key, value in weights.items()},
        "ema": {f"module.{key}": value for key, value in weights.items()},
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(lr=1e-4, model="SiT-XL/1", data_path=None),
        "steps": 400000,
    }
    torch.save(content, tmp_path / "0400000.pt")
    state_dict, read_config = load_official_checkpoint(tmp_path / "0400000.pt")
    assert read_config == config and state_dict.keys() == weights.keys()
    assert all(torch.equal(state_dict[key], weights[key]) for key in weights)
    convert_pretrained(tmp_path / "0400000.pt", tmp_path / "out")
    transformer = DiTTransformer1DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert torch.equal(transformer.proj_in.weight, weights["x_embedder.weight"])

    del content["ema"]
    torch.save(content, tmp_path / "0400000.pt")
    state_dict, _ = load_official_checkpoint(tmp_path / "0400000.pt")
    assert state_dict.keys() == weights.keys() and not any(value.any() for value in state_dict.values())


@pytest.mark.parametrize("zipped", [True, False])
def test_bare_weights_and_given_config(official, tmp_path, zipped):
    weights, config = official("softvq_tokenizer")
    torch.save(weights, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "given.json").write_text(json.dumps(config))
    converted = convert_pretrained(tmp_path / "weights.pth", tmp_path / "out", config=tmp_path / "given.json")
    assert torch.equal(converted.quant_conv.weight, weights["quant_conv.weight"])
    assert same_weights(convert_pretrained(tmp_path / "weights.pth", tmp_path / "again", config=config), converted)


def test_config_from_the_arguments_of_the_run(official, tmp_path):
    weights, config = official("dit")
    args = argparse.Namespace(**config, lr=1e-4, results_dir="results")
    torch.save({"ema": weights, "args": args}, tmp_path / "complete.pt")
    assert load_official_checkpoint(tmp_path / "complete.pt")[1] == config

    del args.depth, args.hidden_size
    torch.save({"ema": weights, "args": args}, tmp_path / "incomplete.pt")
    with pytest.raises(
        ValueError, match=r"`args` lack hidden_size, depth\. Give the official flat config as `config`"
    ):
        convert_pretrained(tmp_path / "incomplete.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Malicious:
    """Unpickled by plain pickle, it makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


class Executed(Malicious):
    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w')",)


@pytest.mark.parametrize("kind", [Malicious, Executed])
@pytest.mark.parametrize("place", ["args", "ema", "top"])
def test_code_in_a_training_file_does_not_run(official, tmp_path, monkeypatch, kind, place):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    weights, config = official("sit")
    (tmp_path / "config.json").write_text(json.dumps(config))
    attack = kind(tmp_path / "attacked")
    content = {"args": {"ema": weights, "args": attack}, "ema": {"ema": weights | {"x": attack}}, "top": attack}[place]
    torch.save(content, tmp_path / "attack.pt")
    torch.load(tmp_path / "attack.pt", weights_only=False)
    assert (tmp_path / "attacked").exists()  # the attack is a real one
    (tmp_path / "attacked").unlink()

    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match=r"attack\.pt is refused: it names \S+, .* would run code"):
        convert_pretrained(tmp_path / "attack.pt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"attack\.pt is refused"):
        convert_pretrained(tmp_path / "attack.pt", tmp_path / "out", tokenizer=tmp_path / "attack.pt")
    assert everything_below(tmp_path) == before

    (tmp_path / "attack.pt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"attack\.pt (is refused|cannot be read)"):
        convert_pretrained(tmp_path / "attack.pt", tmp_path / "out")
    assert everything_below(tmp_path) == before


def test_objects_other_than_plain_data_are_refused(official, tmp_path):
    weights, _ = official("sit")
    torch.save({"ema": weights, "args": pathlib.PurePosixPath("/data")}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="run.pt is refused: it names pathlib.PurePosixPath"):
        load_official_checkpoint(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "its entries are none"),
        ({"step": 3, "loss": 0.1}, "its entries are step, loss, and not tensors are step, loss"),
        ({"ema": {"shadow": [torch.zeros(1)]}}, "its entries are ema, and not tensors are shadow"),
    ],
)
def test_training_files_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint(tmp_path / "run.pt", {})


# Bad input: a clear error, and nothing written


def test_damaged_files(official_folder, official, tmp_path):
    source = official_folder("softvq_tokenizer")
    content = (source / "model.safetensors").read_bytes()
    torch.save(official("softvq_tokenizer")[0], tmp_path / "weights.pt")
    zipped = (tmp_path / "weights.pt").read_bytes()
    before = everything_below(tmp_path)
    for length in (0, 5, 1000, len(content) // 2, len(content) - 1):
        (source / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(
            ValueError, match=r"model\.safetensors cannot be read: .*\. The file is truncated or damaged"
        ):
            convert_pretrained(source, tmp_path / "out")
    for damaged in (
        b"",
        b"version https://git-lfs",
        zipped[: len(zipped) // 2],
        zipped[:-10],
        b"\x80\x02" + bytes(50),
    ):
        (tmp_path / "weights.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.pt (cannot be read|is refused)"):
            convert_pretrained(tmp_path / "weights.pt", tmp_path / "out")
    for config in ("", "{", "[]", "\x00"):
        (source / "config.json").write_text(config)
        with pytest.raises(ValueError, match=r"config\.json', which (is not JSON|holds a list)"):
            convert_pretrained(source, tmp_path / "out")
    assert everything_below(tmp_path) == before


def test_damaged_tokenizer(official_folder, tmp_path):
    convert_pretrained(official_folder("softvq_tokenizer"), tmp_path / "tokenizer")
    weights = tmp_path / "tokenizer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="The tokenizer .* cannot be loaded"):
        convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()


def test_tokenizer_with_missing_keys(official_folder, tmp_path):
    converted = convert_pretrained(official_folder("softvq_tokenizer"), tmp_path / "tokenizer")
    weights = converted.state_dict()
    del weights["quant_conv.bias"]
    save_file(weights, tmp_path / "tokenizer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="quant_conv.bias"):
        convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("softvq_tokenizer", {"codebook_size": 32}, "quantize.embedding"),
        ("softvq_tokenizer", {"num_latent_tokens": 16}, "encoder.latent_tokens"),
        ("sit", {"depth": 2}, "blocks.2.attn.qkv.weight"),
        ("sit", {"learn_sigma": True}, "`system` cannot be told: `config` holds decoder_hidden_size, use_cfg"),
        ("dit", {"learn_sigma": False}, "final_layer.linear.weight"),
        ("dit", {"use_cfg": True}, "Allowed: 'sit' or 'dit' as `system`"),
    ],
)
def test_config_that_contradicts_the_weights(official_folder, tmp_path, name, change, message):
    source = official_folder(name, **change)
    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        convert_pretrained(source, tmp_path / "out")
    assert everything_below(tmp_path) == before


def test_systems(official):
    for name in ("softvq_tokenizer", "softvq_tokenizer_ae", "softvq_tokenizer_cnn", "maetok"):
        assert detect_system(*official(name)) == "softvq"
    assert detect_system(*official("sit")) == "sit"
    assert detect_system(*official("dit")) == "dit"
    for weights in ({"head.weight": torch.zeros(1)}, official("sit")[0] | official("softvq_tokenizer")[0]):
        with pytest.raises(ValueError, match="`system` cannot be told from keys"):
            detect_system(weights, {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "sit",
            {"num_heads": 0, "depth": "x"},
            r"config\['depth'\].*'x', allowed: positive.*config\['num_heads'\].*is 0",
        ),
        ("sit", {"input_size": [10]}, r"config\['input_size'\]` is \[10\], allowed: positive integers"),
        ("sit", {"mlp_ratio": "4"}, r"config\['mlp_ratio'\]` is '4', allowed: finite numbers"),
        ("sit", {"mlp_ratio": None}, "`config` lacks mlp_ratio"),
        ("softvq_tokenizer", {"vq_std": "a"}, r"config\['vq_std'\]` is 'a', allowed: finite numbers"),
        ("softvq_tokenizer", {"encoder_model": 3}, r"config\['encoder_model'\]` is 3, allowed: text"),
        ("softvq_tokenizer", {"encoder_override": [1]}, r"config\['encoder_override'\]` is \[1\], allowed: mappings"),
        ("softvq_tokenizer", {"encoder_override": {"depth": -1}}, r"config\['depth'\]` is -1"),
        (
            "softvq_tokenizer",
            {"codebook_l2_norm": "no"},
            r"config\['codebook_l2_norm'\]` is 'no', allowed: true or false",
        ),
    ],
)
def test_config_of_the_wrong_kind(official, tmp_path, name, change, message):
    weights, config = official(name)
    source = write_folder(tmp_path / "official", weights, config | change)
    with pytest.raises(ValueError, match=message):
        convert_pretrained(source, tmp_path / "out", system="sit" if name == "sit" else "softvq")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers(official, tmp_path):
    weights, config = official("sit")
    broken = weights | {"x_embedder.bias": weights["x_embedder.bias"].int()}
    broken["final_layer.linear.bias"] = torch.full_like(weights["final_layer.linear.bias"], float("nan"))
    with pytest.raises(ValueError, match=r"2 not finite numbers: final_layer.*\(NaN or infinite\), x_embedder.*int32"):
        convert_pretrained(write_folder(tmp_path / "nan", broken, config), tmp_path / "out")
    scalar = weights | {"x_embedder.weight": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"`x_embedder` has a weight of shape \(\)"):
        convert_pretrained(write_folder(tmp_path / "scalar", scalar, config), tmp_path / "out")
    torch.save({0: weights["x_embedder.bias"]}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match="not tensors are 0"):
        convert_pretrained(tmp_path / "numbers.pt", tmp_path / "out", config=config)


def test_weights_in_half_precision(official, tmp_path):
    weights, config = official("sit")
    source = write_folder(tmp_path / "half", {key: value.bfloat16() for key, value in weights.items()}, config)
    model = convert_pretrained(source, tmp_path / "out")
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.proj_out.weight, weights["final_layer.linear.weight"].bfloat16().float())


def test_unknown_config_keys_are_named(official_folder, tmp_path, caplog):
    for name in ("sit", "softvq_tokenizer"):
        convert_pretrained(official_folder(name, colour="blue"), tmp_path / name)
        assert "`config` holds colour, which no conversion rule knows" in caplog.text
        caplog.clear()


def test_given_system_decides(official_folder, official, tmp_path):
    source = official_folder("dit", use_cfg=True)
    assert convert_pretrained(source, tmp_path / "out", system="dit").config.timestep_scale == 1.0
    with pytest.raises(ValueError, match="`config` lacks input_size"):
        convert_pretrained(official_folder("softvq_tokenizer"), tmp_path / "wrong", system="sit")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sit", {"system": "var"}, "`system` is 'var', allowed: 'softvq', 'sit', 'dit', 'mar'"),
        ("sit", {"path_type": "vp"}, "`path_type` is 'vp', allowed: 'linear', 'cosine'"),
        ("dit", {"beta_schedule": "cosine"}, "`beta_schedule` is 'cosine', allowed: 'linear', 'squaredcos_cap_v2'"),
        ("sit", {"detect_path": True, "path_type": "linear"}, "allowed: one of them"),
        ("sit", {"detect_path": True}, "needs `images` and `tokenizer`"),
        ("sit", {"detect_path": True, "tokenizer": "x"}, "needs `images` too"),
        ("sit", {"images": "photographs"}, "`images` is 'photographs', allowed: None without `detect_path`"),
        (
            "sit",
            {"images": "nowhere", "detect_path": True, "tokenizer": "x"},
            "`images` is 'nowhere', allowed: a folder",
        ),
        ("sit", {"num_images": 4}, "`num_images` is 4"),
        ("sit", {"device": "gpu"}, "`device` is 'gpu', which cannot be used here"),
        ("sit", {"id2label": "imagenet"}, "allowed: None without `tokenizer`"),
        ("sit", {"beta_schedule": "linear"}, "`beta_schedule` is given, but .* 'sit': allowed for 'dit' only"),
        ("dit", {"path_type": "linear"}, "`path_type` is given, but .* 'dit': allowed for 'sit' only"),
        ("softvq_tokenizer", {"tokenizer": "x"}, "`tokenizer` is given, but .* 'softvq': allowed for 'sit' and 'dit'"),
        ("sit", {"config": "nowhere.json"}, "`config` is the file 'nowhere.json', which cannot be read"),
        ("sit", {"tokenizer": "./nowhere"}, "'./nowhere' does not exist"),
        ("sit", {"tokenizer": "bad id!"}, "'bad id!' is neither a local folder or file nor a Hub id"),
    ],
)
def test_arguments_that_do_not_fit(official_folder, tmp_path, name, options, message):
    source = official_folder(name)
    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert_pretrained(source, tmp_path / "out", **options)
    assert everything_below(tmp_path) == before


def test_sources_that_are_none(official_folder, tmp_path):
    source = official_folder("sit")
    for missing in ("model.safetensors", "config.json"):
        (source / missing).unlink()
        with pytest.raises(ValueError, match=f"which has no {missing}"):
            convert_pretrained(source, tmp_path / "out")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="weights.bin', allowed: training files"):
        convert_pretrained(tmp_path / "weights.bin", tmp_path / "out")
    for nowhere in (tmp_path / "nowhere", "nowhere.pt"):
        with pytest.raises(ValueError, match="does not exist"):
            convert_pretrained(nowhere, tmp_path / "out")
    convert_pretrained(official_folder("softvq_tokenizer_ae"), tmp_path / "converted")
    with pytest.raises(ValueError, match=r"in the format of diffusers already \(AutoencoderSoftVQ\)"):
        convert_pretrained(tmp_path / "converted", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generator_and_tokenizer_of_different_latents(official_folder, tmp_path):
    for name, takes in (("softvq_tokenizer_kl", "6 tokens of 4"), ("softvq_tokenizer_vq", "8 tokens of 4")):
        with pytest.raises(
            ValueError, match=f"makes 8 tokens of 6 channels, but `tokenizer` decodes {takes} channels"
        ):
            convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=official_folder(name))
    with pytest.raises(ValueError, match="which is a generator"):
        convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=official_folder("dit"))
    with pytest.raises(ValueError, match="a VQModel, allowed in a pipeline"):
        convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=official_folder("softvq_tokenizer_cnn"))
    assert not (tmp_path / "out").exists()


def test_output_folders_that_are_refused(official_folder, tmp_path, monkeypatch):
    source = official_folder("softvq_tokenizer_ae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    monkeypatch.setattr(convert_module, "load_official_checkpoint", lambda *_: pytest.fail("read before the check"))
    with pytest.raises(ValueError, match="full', allowed: a folder that does not exist, or is empty"):
        convert_pretrained(source, tmp_path / "full")
    with pytest.raises(ValueError, match="precious', allowed: a folder that does not exist, or is empty"):
        convert_pretrained(source, tmp_path / "full" / "precious")
    for unwritable in (tmp_path / "full" / "precious" / "out", "/proc/out", "/sys/out"):
        with pytest.raises(ValueError, match="allowed: a folder that can be written"):
            convert_pretrained(source, unwritable)
    assert (tmp_path / "full" / "precious").read_text() == "x"
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    with pytest.raises(ValueError, match="volume', a mount point, allowed: a folder inside of it"):
        convert_pretrained(source, tmp_path / "volume")


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["weights", "scheduler", "card"])
def test_failure_while_writing_leaves_nothing(official_folder, tmp_path, monkeypatch, error, step):
    source, tokenizer = official_folder("sit"), official_folder("softvq_tokenizer")
    (tmp_path / "empty").mkdir()
    before = everything_below(tmp_path)
    owner, name = {
        "weights": (ModelMixin, "save_pretrained"),
        "scheduler": (SchedulerMixin, "save_pretrained"),
        "card": (ModelCard, "save"),
    }[step]
    original = getattr(owner, name)

    def fail(self, path, *args, **kwargs):
        original(self, path, *args, **kwargs)
        assert everything_below(tmp_path) != before
        raise error

    monkeypatch.setattr(owner, name, fail)
    for output_dir in (tmp_path / "empty", tmp_path / "new" / "folder"):
        with pytest.raises(type(error)):
            convert_pretrained(source, output_dir, tokenizer=tokenizer)
        assert everything_below(tmp_path) == before


def test_folder_that_somebody_else_fills_meanwhile(official_folder, tmp_path, monkeypatch):
    original = convert_module.export_model

    def export_model(*args):
        original(*args)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr(convert_module, "export_model", export_model)
    with pytest.raises(OSError):
        convert_pretrained(official_folder("softvq_tokenizer_ae"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"official-softvq_tokenizer_ae", "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"theirs"}


# The Hub


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a fresh process with its own cache."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def fill_cache(cache_dir: Path, repo_id: str, weights: dict[str, torch.Tensor], config: dict) -> None:
    """A repository as huggingface_hub keeps it after a download."""
    folder = cache_dir / f"models--{repo_id.replace('/', '--')}"
    write_folder(folder / "snapshots" / ("0" * 40), weights, config)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_pretrained_parts_are_not_downloaded(official_folder, tmp_path, no_network):
    source = official_folder("softvq_tokenizer", enc_pretrained=True, dec_pretrained=True, repa=True, vq_std=0.3)
    pipeline = convert_pretrained(official_folder("sit"), tmp_path / "out", tokenizer=source)
    assert type(pipeline) is SoftVQPipeline


def test_published_generator_from_the_cache(official, tmp_path, caplog):
    """The table of published models has the tokenizer of a generator and stands for the names of its classes."""
    weights, config = official("sit", num_classes=1000)
    table = weights["y_embedder.embedding_table.weight"]
    weights["y_embedder.embedding_table.weight"] = table[torch.arange(1001) % len(table)]
    fill_cache(tmp_path / "cache", "SoftVQVAE/sit-xl_softvq-b-64", weights, config)
    for name in ("softvq-b-64", "softvq-l-64"):
        fill_cache(tmp_path / "cache", f"SoftVQVAE/{name}", *official("softvq_tokenizer", vq_std=0.3))
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    source = "SoftVQVAE/sit-xl_softvq-b-64"
    with caplog.at_level("INFO", logger="softvq_hf"):
        convert_pretrained(source, tmp_path / "generator", **options)
        assert f"The tokenizer of {source} is SoftVQVAE/softvq-b-64" in caplog.text
        card = (tmp_path / "generator" / "README.md").read_text()
        assert "| tokenizer | SoftVQVAE/softvq-b-64, not included |" in card
        assert "The path that this SiT was trained on is not known" in caplog.text
        pipeline = convert_pretrained(source, tmp_path / "right", tokenizer="SoftVQVAE/softvq-b-64", **options)
        assert pipeline.config.id2label[1] == "goldfish" and len(pipeline.config.id2label) == 1000
        assert "images will be wrong" not in caplog.text
        convert_pretrained(source, tmp_path / "mixed", tokenizer="SoftVQVAE/softvq-l-64", **options)
        assert "the latents of SoftVQVAE/softvq-b-64, `tokenizer` is SoftVQVAE/softvq-l-64" in caplog.text

    # the same weights from a folder are nobody's: no names
    source = write_folder(tmp_path / "folder", weights, config)
    pipeline = convert_pretrained(source, tmp_path / "own", tokenizer="SoftVQVAE/softvq-b-64", **options)
    assert pipeline.config.id2label is None


def test_without_network_and_cache(tmp_path):
    for options in ({}, {"tokenizer": "SoftVQVAE/softvq-b-64"}):
        with pytest.raises(OSError) as error:
            convert_pretrained(
                "SoftVQVAE/sit-xl_softvq-b-64",
                tmp_path / "out",
                cache_dir=tmp_path / "cache",
                local_files_only=True,
                **options,
            )
        assert "config.json of 'SoftVQVAE/sit-xl_softvq-b-64' is not in the cache" in str(error.value)
        assert "hf download SoftVQVAE/sit-xl_softvq-b-64 config.json model.safetensors" in str(error.value)
    assert not (tmp_path / "out").exists()


class HubStandIn(BaseHTTPRequestHandler):
    """Serves the files of `folders`, a dictionary of folders by repository, and notes what was asked for."""

    protocol_version = "HTTP/1.1"
    folders: dict[str, Path]
    asked: list[str]

    def log_message(self, *args):
        pass

    def do_GET(self):
        owner, name, _, revision, file = self.path.split("?")[0].strip("/").split("/", 4)
        content, headers = b"", {"X-Error-Code": "RepoNotFound"}
        path = self.folders.get(f"{owner}/{name}", Path("/nowhere")) / file
        self.asked.append(f"{owner}/{name}/{file}@{revision}")
        if path.is_file():
            content, headers = path.read_bytes(), {"ETag": f'"{path.stat().st_size:040x}"', "X-Repo-Commit": "0" * 40}
        elif f"{owner}/{name}" in self.folders:
            headers = {"X-Error-Code": "EntryNotFound"}
        self.send_response(200 if path.is_file() else 404)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


@pytest.mark.slow
def test_download(official_folder, tmp_path):
    """Two files are asked for, no more; what is missing is named."""
    folder = official_folder("softvq_tokenizer", enc_pretrained=True)
    (folder / "README.md").write_text("# not needed")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((folder / "config.json").read_bytes())
    folders = {"user/tokenizer": folder, "user/half": tmp_path / "half"}
    handler = type("Hub", (HubStandIn,), {"folders": folders, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    code = """
from softvq_hf.training.convert import convert_pretrained

convert_pretrained("user/tokenizer", "out", revision="v1")
convert_pretrained("user/tokenizer", "cached", revision="v1", local_files_only=True)
for source, message in (
    ("user/half", "'user/half' has no file model.safetensors"),
    ("user/nothing", "'user/nothing' is neither a local folder or file nor a repository"),
):
    try:
        convert_pretrained(source, "failed")
    except OSError as error:
        assert message in str(error), error
    else:
        raise AssertionError(source)
"""
    try:
        run([sys.executable, "-c", code], tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    files = {"user/tokenizer/config.json@v1", "user/tokenizer/model.safetensors@v1"}
    assert {asked for asked in handler.asked if "user/tokenizer" in asked} == files
    assert not (tmp_path / "failed").exists()
    loaded = [AutoencoderSoftVQ.from_pretrained(tmp_path / name) for name in ("out", "cached")]
    assert same_weights(*loaded)
    assert (
        "| source | user/tokenizer |\n| system | softvq |\n| revision | v1 |"
        in (tmp_path / "out/README.md").read_text()
    )
