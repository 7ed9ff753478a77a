"""Every metric of the package as a module of `evaluate`."""

import importlib
import inspect
import math
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from torchvision.models import alexnet

from softvq_hf import metrics
from softvq_hf.metrics import StreamingMetric


FOLDER = Path(metrics.__file__).parent

FEATURES = {"predictions": torch.arange(24.0).view(12, 2).sin(), "references": torch.arange(24.0).view(12, 2).cos()}
IMAGES = {name: torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32) ** i for i, name in enumerate(FEATURES, 1)}
RATE_CONFIG = {"sample_size": 64, "in_channels": 3, "num_latent_tokens": 32, "latent_channels": 4}
# By file: what the constructor gets, a batch, and the name of the figure
METRICS = {
    "codebook_usage": ({"codebook_size": 4}, {"predictions": torch.tensor([[[0, 1, 1, 3]]])}, "codebook_usage"),
    "frechet_distance": ({}, FEATURES, "frechet_distance"),
    "inception_score": ({"num_splits": 2}, {"predictions": FEATURES["predictions"]}, "inception_score"),
    "kernel_distance": ({"num_subsets": 2, "subset_size": 4}, FEATURES, "kernel_distance"),
    "latent_statistics": ({}, {"predictions": FEATURES["predictions"].view(2, 6, 2)}, "latent_std"),
    "lpips": ({"net": "alex"}, IMAGES, "lpips"),
    "precision_recall": ({}, FEATURES, "precision"),
    "psnr": ({}, IMAGES, "psnr"),
    "rate": ({"config": RATE_CONFIG}, {"predictions": torch.zeros(3, 32, 4)}, "compression_16"),
    "ssim": ({"rounding": "truncate"}, IMAGES, "ssim"),
}


@pytest.fixture
def modules_cache(tmp_path, monkeypatch) -> None:
    """An empty cache for the modules that `evaluate` loads."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not Path(folder, "evaluate_modules").is_dir()])
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def constructor_arguments(tmp_path) -> dict:
    """Those of [`METRICS`] and, for LPIPS, random weights."""
    with torch.device("meta"):
        network = alexnet().features
    weights = {f"features.{name}": torch.randn(tensor.shape) / 10 for name, tensor in network.state_dict().items()}
    torch.save(weights, tmp_path / "alexnet.pth")
    arguments = {name: dict(given) for name, (given, _, _) in METRICS.items()}
    arguments["lpips"]["weights_path"] = str(tmp_path / "alexnet.pth")
    return arguments


def metric_classes(file: Path) -> list[type[StreamingMetric]]:
    """The metrics that a file of the package defines."""
    module = importlib.import_module(f"softvq_hf.metrics.{file.stem}")
    classes = [
        value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__
    ]
    return [value for value in classes if issubclass(value, StreamingMetric) and not inspect.isabstract(value)]


def test_every_metric_is_one_file_and_tested_here():
    classes = {file.stem: metric_classes(file) for file in FOLDER.glob("*.py") if file.stem != "__init__"}
    assert {name for name, found in classes.items() if found} == METRICS.keys()
    assert all(len(found) <= 1 for found in classes.values())
    for name in METRICS:
        assert classes[name][0].__name__ in metrics.__all__


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_loads_the_metric_by_its_path(name, modules_cache, constructor_arguments):
    _, batch, figure = METRICS[name]
    file = FOLDER / f"{name}.py"
    loaded = evaluate.load(str(file), **constructor_arguments[name])
    assert type(loaded).__module__.startswith("evaluate_modules.")
    imported = metric_classes(file)[0](**constructor_arguments[name])
    assert type(loaded).__name__ == type(imported).__name__
    assert loaded.description and loaded.inputs_description and loaded.features

    loaded.add_batch(**batch)
    imported.add_batch(**batch)
    result = loaded.compute()
    assert result == imported.compute()
    assert math.isfinite(result[figure])
    with pytest.raises(ValueError):  # what was added is forgotten
        loaded.compute()


@pytest.mark.parametrize("name", METRICS)
def test_the_last_batch_may_come_with_compute(name, constructor_arguments):
    _, batch, _ = METRICS[name]
    metric = metric_classes(FOLDER / f"{name}.py")[0](**constructor_arguments[name])
    metric.add_batch(**batch)
    assert metric.compute() == metric.compute(**batch)


@pytest.mark.parametrize("name", METRICS)
def test_misspelt_arguments_are_refused(name, modules_cache, constructor_arguments):
    arguments = {**constructor_arguments[name], "roundin": "truncate"}
    message = r"has no argument `roundin`, allowed: .*`cache_dir`"
    with pytest.raises(ValueError, match=message):
        metric_classes(FOLDER / f"{name}.py")[0](**arguments)
    with pytest.raises(ValueError, match=message):
        evaluate.load(str(FOLDER / f"{name}.py"), **arguments)


def test_arguments_of_evaluate_are_accepted(tmp_path):
    metric = metrics.PSNR(
        config_name="name", keep_in_memory=True, cache_dir=str(tmp_path), experiment_id="first", seed=3, timeout=1
    )
    assert (metric.config_name, metric.experiment_id, metric.seed) == ("name", "first", 3)
    with pytest.raises(ValueError, match="allowed: `rounding`, `config_name`"):
        metrics.PSNR(rounding_mode="truncate")


def test_importing_the_metrics_does_not_load_their_networks():
    """transformers is loaded by `evaluate`, its models only by the extractors that need them."""
    code = "import sys, softvq_hf.metrics; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(output.split())
    assert "softvq_hf.metrics.features" in loaded
    assert not loaded & {"torch_fidelity", "lpips", "transformers.models.bit.image_processing_bit"}
