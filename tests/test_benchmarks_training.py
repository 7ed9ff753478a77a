"""benchmarks/training.py on models of a few thousand parameters."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.training.accelerator import build_accelerator


ROOT = Path(__file__).parents[1]


def load_benchmark(file, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their types up there, and the timing scripts each other
    spec.loader.exec_module(module)
    return module


load_benchmark("side_by_side.py", "side_by_side")
training_benchmark = load_benchmark("training.py", "benchmarks_training")

MODEL = {"encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 8, "latent_channels": 4}
MODEL |= {"codebook_size": 16, "num_codebooks": 2}
for side in ("encoder", "decoder"):
    MODEL |= {f"{side}_hidden_size": 16, f"{side}_num_layers": 2, f"{side}_num_attention_heads": 2}
TINY_SOFTVQ = {
    **{"output_dir": "x", "dataset_name": "photographs", "resolution": 32, "max_train_steps": 10, "model": MODEL},
    **{"perceptual_weight": 1.0, "perceptual_dropout": True, "discriminator": "dino", "adversarial_weight": 0.2},
    **{"adversarial_start": 5, "lecam_weight": 0.001, "consistency_weight": 4.0, "augment_discriminator": True},
    **{"alignment_teacher": "none", "alignment_patch_size": 8, "alignment_hidden_size": 16},
}
TINY_SIT = {
    **{"output_dir": "x", "max_train_steps": 10},
    "model": {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8},
}
VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def tiny_recipes(monkeypatch, tmp_path):
    """Tiny recipes in place of the real ones; everything in float32 on the CPU."""
    for name, recipe in (("SOFTVQ_RECIPE", TINY_SOFTVQ), ("SIT_RECIPE", TINY_SIT)):
        path = tmp_path / f"{name.split('_')[0].lower()}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        monkeypatch.setattr(training_benchmark, name, path)
    monkeypatch.setattr(training_benchmark, "DINOV2_LARGE", {**VIT, "num_hidden_layers": 3})
    monkeypatch.setattr(training_benchmark, "DINO_SMALL", {**VIT, "num_hidden_layers": 12})
    monkeypatch.setattr(training_benchmark, "LATENT_SHAPE", (8, 4))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


def arguments(tmp_path, **values):
    small = {"tokenizer_batch_size": 2, "transformer_batch_size": 3, "matmul_size": 32, "rounds": 2}
    values = {**small, "device": "cpu", "dtype": "float32", **values}
    return training_benchmark.TrainingBenchmarkArguments(output_dir=str(tmp_path / "out"), **values)


def test_every_update_is_timed_and_compared(tiny_recipes, tmp_path):
    with torch.compiler.set_stance("force_eager"):  # as it is with a compiler, in less time
        training_benchmark.main(arguments(tmp_path))
    record = json.loads((tmp_path / "out/training.json").read_text())
    kinds = ["reconstruction", "perceptual", "adversarial", "alignment", "all"]
    expected = {f"softvq.{kind}.vs_reconstruction" for kind in kinds[1:]}
    assert record["ratios"].keys() == {"sit.compile.vs_eager"}
    assert record["measurements"]["losses"].keys() == expected
    updates = record["measurements"]["softvq"]
    for kind in kinds:
        seconds = updates[kind]["seconds"]
        assert updates[kind]["images_per_second"]["max"] == pytest.approx(2 / min(seconds))
        flops = 2e9 * updates[kind]["gflops_per_image"]
        assert updates[kind]["flops_per_second"]["max"] == pytest.approx(flops / min(seconds))
        assert 0 < updates[kind]["peak_share"]["min"] <= updates[kind]["peak_share"]["max"]
    gflops = {kind: updates[kind]["gflops_per_image"] for kind in kinds}
    parts = sum(gflops[kind] - gflops["reconstruction"] for kind in kinds[1:4])
    assert gflops["all"] == pytest.approx(gflops["reconstruction"] + parts)
    assert min(gflops[kind] for kind in kinds[1:]) > gflops["reconstruction"]
    assert record["settings"]["recipes"]["softvq"]["adversarial_start"] == 0
    assert "| sit, compile |" in (tmp_path / "out/training.md").read_text()


def test_an_update_has_the_losses_of_its_name_and_moves_the_weights(tiny_recipes, tmp_path):
    recipe = training_benchmark.softvq_recipe(arguments(tmp_path))
    updates = training_benchmark.softvq_updates(recipe, build_accelerator(recipe), short=False)
    losses = {name: update().keys() for name, update in updates.items()}
    parts = {"perceptual": "perceptual", "adversarial": "discriminator_grad_norm", "alignment": "alignment"}
    assert losses["reconstruction"].isdisjoint(parts.values())
    for name, part in parts.items():
        assert losses[name] & set(parts.values()) == {part}
    assert set(parts.values()) < losses["all"]
    before = updates["all"]()["reconstruction"]
    assert min(updates["reconstruction"]()["reconstruction"] for _ in range(40)) < before


def test_short_has_fewer_layers_and_losses(tiny_recipes, tmp_path):
    args = arguments(tmp_path, short=True)
    recipe = training_benchmark.softvq_recipe(args)
    assert recipe.model["encoder_num_layers"] == 2 and recipe.train_batch_size == 1
    assert training_benchmark.sit_recipe(args).model["num_layers"] == 2
    updates = training_benchmark.softvq_updates(recipe, build_accelerator(recipe), short=True)
    assert list(updates) == ["reconstruction", "all"]


def test_compiled_blocks_that_compute_something_else_are_an_error(tiny_recipes, tmp_path, monkeypatch):
    def compile_badly(transformer):
        transformer.transformer_blocks[1].forward = lambda hidden_states, *args, **kwargs: 2 * hidden_states

    monkeypatch.setattr(DiTTransformer1DModel, "compile_repeated_blocks", compile_badly)
    recipe = training_benchmark.sit_recipe(arguments(tmp_path))
    with pytest.raises(ValueError, match="The losses are .*, allowed: a difference of 0.0001 of each other"):
        training_benchmark.sit_updates(recipe, build_accelerator(recipe))


def test_an_update_that_would_be_left_out_is_an_error():
    linear, ones = torch.nn.Linear(3, 4), torch.ones(2, 3)
    assert training_benchmark.count_flops("x", lambda: {"loss": linear(ones).sum().item()}) == 2 * 2 * 3 * 4
    with pytest.raises(ValueError, match="The update x gives {'loss': nan}"):
        training_benchmark.count_flops("x", lambda: {"loss": math.nan})


@pytest.mark.parametrize("name", ["tokenizer_batch_size", "transformer_batch_size", "matmul_size", "rounds"])
def test_bad_arguments_are_an_error(name, tmp_path):
    with pytest.raises(ValueError, match=f"`--{name}` is 0, allowed: integers from 1 on"):
        arguments(tmp_path, **{name: 0})


def test_a_device_may_have_a_number(tiny_recipes, tmp_path):
    training_benchmark.main(arguments(tmp_path, device="cpu:0", rounds=1))
    assert (tmp_path / "out" / "training.json").is_file()


@pytest.mark.parametrize("device", ["meta", "cpu:1"])
def test_a_device_where_nothing_would_run_is_an_error(tiny_recipes, tmp_path, device):
    with pytest.raises(ValueError, match=f"`--device` is {device}, allowed: cpu, or where accelerate runs, here cpu"):
        training_benchmark.main(arguments(tmp_path, device=device))
