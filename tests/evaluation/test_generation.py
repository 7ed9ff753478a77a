"""`softvq-hf evaluate generation`: figures of generated images against real ones, from one process and from two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BitImageProcessor, ResNetConfig, ResNetModel

from softvq_hf.data import load_image_dataset
from softvq_hf.evaluation.generation import GenerationArguments, evaluate_generation
from softvq_hf.evaluation.samples import draw_labels
from softvq_hf.metrics.features import load_feature_extractor
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.training.arguments import parse_args
from softvq_hf.training.hub import export_pipeline


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
def flags(pipeline_dir, tiny_classifier_dir, tmp_path):
    """The command line of an evaluation into `tmp_path / folder`: `flags("folder", **changes)`."""

    def build(folder: str, **changes) -> list[str]:
        arguments = {**FLAGS, "pipeline": pipeline_dir, "feature_extractor": tiny_classifier_dir}
        arguments |= {"output_dir": tmp_path / folder, **changes}
        return [f"--{name}={value}" for name, value in arguments.items() if value is not None]

    return build


@pytest.fixture
def evaluate(flags, fresh_accelerate):
    """Evaluates in this process: `evaluate("folder", **changes) -> result`."""

    def run(folder: str, **changes) -> dict:
        fresh_accelerate()
        return evaluate_generation(parse_args(GenerationArguments, flags(folder, **changes)))

    return run


def frechet(features: np.ndarray, others: np.ndarray) -> float:
    """The textbook formula in float64."""
    covariance, other = np.cov(features.T), np.cov(others.T)
    trace_of_root = np.sqrt(np.linalg.eigvals(covariance @ other).real.clip(0)).sum()
    return ((features.mean(0) - others.mean(0)) ** 2).sum() + np.trace(covariance + other) - 2 * trace_of_root


def test_figures_are_those_of_the_images_in_the_folder(evaluate, tiny_classifier_dir, tmp_path):
    result = evaluate("samples")
    extractor = load_feature_extractor(str(tiny_classifier_dir))
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
        "30 images, iid labels, guidance 2, 2 steps of FlowMatchEulerDiscreteScheduler, truncated to 8 bits, against"
        " 40 real images"
    )
    assert protocol["num_references"] == {"tiny_classifier": 40}
    assert protocol["pipeline"]["scheduler"]["shift"] == 1.0
    assert protocol["feature_extractors"] == {"tiny_classifier": extractor.description()}


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(evaluate, flags, softvq_hf_command, tmp_path):
    expected = evaluate("one")
    process = softvq_hf_command("evaluate", "generation", *flags("two"), num_processes=2)
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert result["metrics"][name] == (None if value is None else pytest.approx(value, rel=1e-6)), name
    assert result["protocol"] == expected["protocol"]
    assert result["hardware"]["devices"] == {"cpu": 2} and result["hardware"]["num_processes"] == 2
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
    assert len(list((tmp_path / "samples/images").glob("*.npy"))) == 4
    assert json.loads((tmp_path / "r.json").read_text())["protocol"]["num_images"] == 30


def test_without_real_images_the_classifier_score_is_all(evaluate, tmp_path):
    result = evaluate("samples", reference=None, reference_max_samples=None)
    alone = evaluate("samples")["metrics"]
    names = ("classifier_score (tiny_classifier)", "classifier_score_std (tiny_classifier)")
    assert result["metrics"] == {name: alone[name] for name in names}
    assert result["dataset"]["name"] is None and "against" not in result["protocol"]["name"]
    assert result["protocol"]["num_references"] == {"tiny_classifier": None}


def test_without_real_images_a_network_needs_logits(evaluate, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "features_only")
    BitImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "features_only")
    with pytest.raises(ValueError, match="`--reference` is None, allowed with features_only, which gives no logits"):
        evaluate("samples", reference=None, feature_extractor=tmp_path / "features_only")
    assert not (tmp_path / "samples/images").exists()


def test_a_split_that_the_reference_lacks(evaluate, image_folder):
    with pytest.raises(ValueError, match="^`--reference` is '.*images' with `--reference_split` 'train': "):
        evaluate("samples", reference=image_folder(4))


def test_a_file_in_place_of_the_folder(evaluate, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^`--output_dir` is '.*file', allowed: a folder"):
        evaluate("file")


def test_a_reference_of_another_protocol_is_refused_before_anything_is_made(evaluate, tiny_classifier_dir, tmp_path):
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((8, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="images of 32 x 32 pixels, allowed: 16 x 16"):
        evaluate("samples", reference=tmp_path / "reference.npz")
    extractor = load_feature_extractor(str(tiny_classifier_dir))
    protocol = {
        "feature_extractor": extractor.description(),
        "resolution": 32,
        "crop": "ADM centre crop",
    }
    np.savez(
        tmp_path / "reference.npz",
        mu=np.zeros(extractor.num_features),
        sigma=np.eye(extractor.num_features),
        num_images=9,
        protocol=json.dumps(protocol),
    )
    with pytest.raises(ValueError, match="another protocol .* `resolution` is 32 there and 16 here"):
        evaluate("samples", reference=tmp_path / "reference.npz")
    assert not (tmp_path / "samples/images").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "another plan: `seed` is 1 there and 2 here"),
        ({"guidance_scale": -1}, "`guidance_scale` is -1.0, allowed"),
        ({"rounding": "round"}, "another plan: `rounding` is truncate there and round here"),
    ],
)
def test_what_is_wrong_with_the_images_comes_before_the_reference(evaluate, tmp_path, changes, message):
    """There are no images in the reference: measuring it is another error."""
    evaluate("samples", reference=None, reference_max_samples=None, feature_extractor="none", save_npz=False)
    (tmp_path / "no_images").mkdir()
    with pytest.raises(ValueError, match=message):
        evaluate("samples", reference=tmp_path / "no_images", **changes)
    with pytest.raises(ValueError, match="no_images"):
        evaluate("samples", reference=tmp_path / "no_images")


def test_guidance_without_a_null_class_comes_before_the_reference(evaluate, tiny_pipeline, tmp_path):
    tiny_pipeline(class_dropout_prob=0.0).save_pretrained(tmp_path / "without_null_class")
    (tmp_path / "no_images").mkdir()
    with pytest.raises(ValueError, match="`guidance_scale` is 2.0, allowed: at most 1 for this transformer"):
        evaluate("samples", pipeline=tmp_path / "without_null_class", reference=tmp_path / "no_images")


def test_unreadable_images_of_the_reference_are_counted_and_named(evaluate, image_folder):
    folder = image_folder(120)
    (folder / "val" / "007.png").write_bytes(b"no image")
    changes = {"reference": folder, "reference_split": "validation", "reference_max_samples": None}
    result = evaluate("samples", **changes)
    assert result["protocol"]["num_references"] == {"tiny_classifier": 119}
    assert "Reference: 1 images could not be read and are left out: val/007.png." in result["notes"]


def test_model_card(evaluate, pipeline_dir):
    result = evaluate("samples", update_model_card=True)
    (pipeline_dir / "README.md").write_text((pipeline_dir / "README.md").read_text() + "\nOwn words.\n")
    evaluate("others", update_model_card=True, seed=2)  # of the same protocol, in place of the first
    last = evaluate("rounded", update_model_card=True, rounding="round")
    card = ModelCard.load(pipeline_dir / "README.md")
    assert "Own words." in card.text
    results = [entry for entry in card.data.eval_results if entry.metric_type == "fd (tiny_classifier)"]
    assert len(results) == 2 and results[-1].metric_value == last["metrics"]["fd (tiny_classifier)"]
    assert results[0].metric_value != result["metrics"]["fd (tiny_classifier)"]
    assert results[-1].dataset_name == "photographs" and results[-1].metric_args["num_images"] == 30
    assert not any("fid" in entry.metric_type.lower() for entry in card.data.eval_results)


def test_a_model_card_that_cannot_be_read_is_an_error_before_anything_is_made(evaluate, pipeline_dir, tmp_path):
    (pipeline_dir / "README.md").write_text("---\nmodel-index: [\n---\n")
    with pytest.raises(ValueError, match="README.md has metadata that cannot be read"):
        evaluate("samples", update_model_card=True)
    assert not (tmp_path / "samples/images").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 1}, "`--num_images` is 1, allowed: integers from 2 on."),
        (
            {"reference": None, "update_model_card": True},
            "`--reference` is None, allowed with `--update_model_card`: real images",
        ),
        ({"feature_extractor": "none"}, "`--feature_extractor` is none, allowed without `--reference`"),
        (
            {"pipeline": "somebody/pipeline", "update_model_card": True},
            "`--pipeline` is 'somebody/pipeline', allowed with `--update_model_card`: a local folder",
        ),
        ({"batch_size": 0}, "`--batch_size` is 0, allowed: integers from 1 on."),
        ({"seed": -1}, "`--seed` is -1, allowed: integers from 0 on."),
        ({"shard_size": 0}, "`--shard_size` is 0, allowed: integers from 1 on."),
        ({"num_inference_steps": 0}, "`--num_inference_steps` is 0, allowed: integers from 1 on."),
        ({"guidance_interval": 0.5}, "`--guidance_interval` is 0.5, allowed: two numbers"),
        ({"reference_max_samples": 1}, "`--reference_max_samples` is 1, allowed: integers from 2 on."),
        ({"dataloader_num_workers": -1}, "`--dataloader_num_workers` is -1, allowed: integers from 0 on."),
        ({"reference": "nowhere.npz"}, "`--reference` is 'nowhere.npz', allowed: an .npz file that exists"),
    ],
)
def test_wrong_arguments(flags, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_args(GenerationArguments, flags("samples", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_interval": [0.5, 0.2]}, "`--guidance_interval` is 0.5 0.2, allowed: two numbers"),
        ({"guidance_interval": [0.0, 0.5, 1.0]}, "`--guidance_interval` is 0.0 0.5 1.0, allowed: two numbers"),
        ({"labels": "uniform"}, "`--labels` is 'uniform', allowed: iid, balanced."),
        ({"rounding": "floor"}, "`rounding` is 'floor', allowed: 'round', 'truncate'."),
        ({"mixed_precision": "fp8"}, "`--mixed_precision` is 'fp8', allowed: no, fp16, bf16."),
    ],
)
def test_wrong_arguments_in_python(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationArguments(pipeline="x", output_dir="x", reference="photographs", **changes)


def test_wrong_arguments_that_the_pipeline_knows(evaluate, tmp_path):
    with pytest.raises(ValueError, match="`guidance_scale` is -1.0, allowed"):
        evaluate("samples", guidance_scale=-1)
    assert not (tmp_path / "samples/images").exists()


@pytest.mark.parametrize("is_exported", [False, True])
def test_pipelines_of_mar(evaluate, fresh_accelerate, tiny_mar_pipeline, tiny_classifier_dir, tmp_path, is_exported):
    pipeline = tiny_mar_pipeline()
    (export_pipeline if is_exported else MARPipeline.save_pretrained)(pipeline, tmp_path / "mar")
    changes = {"pipeline": tmp_path / "mar", "num_diffusion_steps": 3, "num_inference_steps": 20}
    changes |= {"temperature": 0.9, "guidance_schedule": "constant"} if is_exported else {}
    result = evaluate("samples", **changes, update_model_card=is_exported)
    protocol = result["protocol"]
    guidance, temperature = ("constant", 0.9) if is_exported else ("linear", 1)
    words = f"{guidance} guidance 2, 10 autoregressive steps of 3 at temperature {temperature}"
    assert words in protocol["name"] and protocol["num_inference_steps"] == 20
    assert (protocol["guidance_schedule"], protocol["temperature"]) == (guidance, temperature)
    assert result["metrics"]["fd (tiny_classifier)"] > 0
    if is_exported:
        assert ModelCard.load(tmp_path / "mar/README.md").data.eval_results
    arguments = {"pipeline": str(tmp_path / "mar"), "output_dir": str(tmp_path / "others"), "reference": "photographs"}
    arguments["feature_extractor"] = [str(tiny_classifier_dir)]
    fresh_accelerate()
    with pytest.raises(
        ValueError, match="`--guidance_interval` is .*, allowed with a SoftVQPipeline; .* a MARPipeline"
    ):
        evaluate_generation(GenerationArguments(**arguments, guidance_interval=[0.0, 0.7]))


def test_arguments_of_mar_for_another_pipeline(evaluate, tmp_path):
    with pytest.raises(ValueError, match="`--temperature` is 0.9, allowed with a MARPipeline; .* is a SoftVQPipeline"):
        evaluate("samples", temperature=0.9)
    assert not (tmp_path / "samples/images").exists()


def test_a_pipeline_that_cannot_be_loaded(evaluate, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="`--pipeline` is '.*empty', which cannot be loaded"):
        evaluate("samples", pipeline=tmp_path / "empty")
