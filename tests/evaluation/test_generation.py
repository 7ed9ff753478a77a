"""`softvq-hf evaluate generation`: figures of generated images against real ones, from one process and from two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import ModelCard
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from softvq_hf.data import load_image_dataset
from softvq_hf.evaluation.generation import GenerationArguments, evaluate_generation
from softvq_hf.evaluation.samples import draw_labels
from softvq_hf.metrics.features import load_feature_extractor
from softvq_hf.training.arguments import parse_args


FLAGS = {
    "num_images": 30,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "batch_size": 4,
    "shard_size": 8,
    "seed": 1,
    "reference": "photographs",
    "reference_max_samples": 40,
}


@pytest.fixture
def pipeline_dir(tiny_pipeline, tmp_path) -> Path:
    """A saved pipeline of 16 x 16 pixels whose weights are random all over."""
    pipeline = tiny_pipeline()
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def classifier_dir(tmp_path) -> Path:
    """A feature network of 8 features and 5 classes, random."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", downsample_in_first_stage=False,
        num_labels=5,
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(tmp_path / "tiny_classifier")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "tiny_classifier")
    return tmp_path / "tiny_classifier"


@pytest.fixture
def flags(pipeline_dir, classifier_dir, tmp_path):
    """The command line of an evaluation into `tmp_path / folder`: `flags("folder", **changes)`."""

    def build(folder: str, **changes) -> list[str]:
        arguments = {**FLAGS, "pipeline": pipeline_dir, "feature_extractor": classifier_dir}
        arguments |= {"output_dir": tmp_path / folder, **changes}
        return [f"--{name}={value}" for name, value in arguments.items() if value is not None]

    return build


@pytest.fixture
def evaluate(flags):
    """Evaluates in this process: `evaluate("folder", **changes) -> result`."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        GradientState._reset_state()

    def run(folder: str, **changes) -> dict:
        reset()
        return evaluate_generation(parse_args(GenerationArguments, flags(folder, **changes)))

    yield run
    reset()


def frechet(features: np.ndarray, others: np.ndarray) -> float:
    """The textbook formula in float64."""
    covariance, other = np.cov(features.T), np.cov(others.T)
    trace_of_root = np.sqrt(np.linalg.eigvals(covariance @ other).real.clip(0)).sum()
    return ((features.mean(0) - others.mean(0)) ** 2).sum() + np.trace(covariance + other) - 2 * trace_of_root


def test_figures_are_those_of_the_images_in_the_folder(evaluate, classifier_dir, tmp_path):
    result = evaluate("samples")
    extractor = load_feature_extractor(str(classifier_dir))
    with np.load(tmp_path / "samples/samples.npz") as archive:
        images, labels = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2), archive["arr_1"]
    assert images.shape == (30, 3, 16, 16)
    np.testing.assert_array_equal(labels, draw_labels("iid", 30, 4, seed=1))
    dataset = load_image_dataset("photographs", split="train", resolution=16, train=False, max_samples=40)
    real = torch.stack([dataset[i]["pixel_values"] for i in range(40)]) / 2 + 0.5
    real = (real * 255).round().to(torch.uint8)
    found, expected = (extractor(batch).features.double().numpy() for batch in (images, real))

    metrics = result["metrics"]
    assert metrics["fd (tiny_classifier)"] == pytest.approx(frechet(found, expected), rel=1e-3)
    assert metrics["fd (tiny_classifier)"] > 0.01
    assert metrics["classifier_score (tiny_classifier)"] >= 1
    assert 0 <= metrics["precision (tiny_classifier)"] <= 1
    assert metrics["kernel_distance (tiny_classifier)"] is None
    assert any("kernel distance" in note for note in result["notes"])
    assert not any("fid" in name for name in metrics)

    assert json.loads((tmp_path / "samples/result.json").read_text()) == result
    assert result["task"] == "class-conditional-image-generation" and result["model"] == "pipeline"
    assert result["dataset"]["name"] == "photographs" and result["dataset"]["split"] == "train"
    protocol = result["protocol"]
    assert protocol["name"] == (
        "30 images, iid labels, guidance 2, 2 steps of FlowMatchEulerDiscreteScheduler, rounded to 8 bits"
    )
    assert protocol["num_references"] == {"tiny_classifier": 40}
    assert protocol["pipeline"]["scheduler"]["shift"] == 1.0
    assert protocol["feature_extractors"] == {"tiny_classifier": extractor.description()}


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(evaluate, flags, tmp_path):
    expected = evaluate("one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "softvq_hf.cli", "evaluate", "generation", *flags("two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert result["metrics"][name] == (None if value is None else pytest.approx(value, rel=1e-6)), name
    assert result["protocol"] == expected["protocol"]
    assert result["hardware"] == {"devices": {"cpu": 2}, "num_processes": 2, "mixed_precision": "no"}
    assert (tmp_path / "two/samples.npz").stat().st_size == (tmp_path / "one/samples.npz").stat().st_size
    with np.load(tmp_path / "one/samples.npz") as one, np.load(tmp_path / "two/samples.npz") as two:
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])


def test_images_that_are_there_are_measured_again(evaluate, tmp_path):
    """The images of one run as the reference of the next, on the same images: no distance."""
    evaluate("samples", reference=None, reference_max_samples=None, feature_extractor="none", labels="balanced")
    npz = tmp_path / "samples/samples.npz"
    shard = tmp_path / "samples/images/00001-of-00004.npy"
    made = shard.stat().st_mtime_ns
    result = evaluate("samples", reference=npz, labels="balanced", save_npz=False)
    assert shard.stat().st_mtime_ns == made
    assert result["metrics"]["fd (tiny_classifier)"] == pytest.approx(0, abs=1e-6)
    assert result["metrics"]["precision (tiny_classifier)"] == result["metrics"]["recall (tiny_classifier)"] == 1
    assert result["dataset"]["name"] == "samples.npz" and result["dataset"]["split"] is None
    assert "balanced labels" in result["protocol"]["name"]
    assert any("crop of the images in samples.npz" in note for note in result["notes"])


def test_without_feature_networks_images_are_all(evaluate, tmp_path):
    result = evaluate(
        "samples", reference=None, feature_extractor="none", save_npz=False, output_file=tmp_path / "r.json"
    )
    assert result["metrics"] == {} and not (tmp_path / "samples/samples.npz").exists()
    assert len(list((tmp_path / "samples/images").iterdir())) == 4
    assert json.loads((tmp_path / "r.json").read_text())["protocol"]["num_images"] == 30


def test_a_reference_of_another_protocol_is_refused_before_anything_is_made(evaluate, classifier_dir, tmp_path):
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((8, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="images of 32 x 32 pixels, allowed: 16 x 16"):
        evaluate("samples", reference=tmp_path / "reference.npz")
    protocol = {
        "feature_extractor": load_feature_extractor(str(classifier_dir)).description(),
        "resolution": 32,
        "crop": "ADM centre crop",
    }
    np.savez(tmp_path / "reference.npz", mu=np.zeros(8), sigma=np.eye(8), num_images=9, protocol=json.dumps(protocol))
    with pytest.raises(ValueError, match="another protocol .* resolution is 32 there and 16 here"):
        evaluate("samples", reference=tmp_path / "reference.npz")
    assert not (tmp_path / "samples/images").exists()


def test_model_card(evaluate, pipeline_dir):
    result = evaluate("samples", update_model_card=True)
    (pipeline_dir / "README.md").write_text((pipeline_dir / "README.md").read_text() + "\nOwn words.\n")
    evaluate("others", update_model_card=True, seed=2)  # of the same protocol, in place of the first
    last = evaluate("truncated", update_model_card=True, rounding="truncate")
    card = ModelCard.load(pipeline_dir / "README.md")
    assert "Own words." in card.text
    results = [entry for entry in card.data.eval_results if entry.metric_type == "fd (tiny_classifier)"]
    assert len(results) == 2 and results[-1].metric_value == last["metrics"]["fd (tiny_classifier)"]
    assert results[0].metric_value != result["metrics"]["fd (tiny_classifier)"]
    assert results[-1].dataset_name == "photographs" and results[-1].metric_args["num_images"] == 30
    assert not any("fid" in entry.metric_type.lower() for entry in card.data.eval_results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 1}, "`--num_images` is 1, allowed: integers from 2 on."),
        ({"reference": None}, "`--reference` is None and `--feature_extractor` is .*tiny_classifier, allowed: real"),
        ({"feature_extractor": "none"}, "`--feature_extractor` is none, allowed without `--reference`"),
        (
            {"pipeline": "somebody/pipeline", "update_model_card": True},
            "`--pipeline` is 'somebody/pipeline', allowed with `--update_model_card`: a local folder",
        ),
        ({"batch_size": 0}, "`--batch_size` is 0, allowed: integers from 1 on."),
    ],
)
def test_wrong_arguments(flags, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_args(GenerationArguments, flags("samples", **changes))


def test_wrong_arguments_that_the_pipeline_knows(evaluate, tmp_path):
    with pytest.raises(ValueError, match="`guidance_scale` is -1.0, allowed"):
        evaluate("samples", guidance_scale=-1)
    assert not (tmp_path / "samples/images").exists()


def test_a_pipeline_that_cannot_be_loaded(evaluate, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="`--pipeline` is '.*empty', which cannot be loaded"):
        evaluate("samples", pipeline=tmp_path / "empty")
