"""benchmarks/tiny_classifier.py and benchmarks/metric_behaviour.py, on few of the built-in photographs."""

import importlib.util
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from softvq_hf.data import load_image_dataset
from softvq_hf.evaluation.arguments import EvaluationDataArguments
from softvq_hf.metrics.features import TransformersFeatureExtractor
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


ROOT = Path(__file__).parents[1]


def load_benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


tiny_classifier = load_benchmark("tiny_classifier")
metric_behaviour = load_benchmark("metric_behaviour")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folder and result of a classifier of the photographs, trained for a few seconds."""
    folder = tmp_path_factory.mktemp("classifier")
    args = tiny_classifier.TinyClassifierArguments(
        dataset="photographs",
        output_dir=str(folder),
        resolution=32,
        max_samples=512,
        max_validation_samples=64,
        num_train_epochs=3,
        batch_size=32,
        learning_rate=0.05,
        mixed_precision="no",
    )
    return folder, tiny_classifier.main(args)


def test_the_classifier_learns_and_its_folder_is_what_transformers_loads(classifier):
    folder, result = classifier
    assert result["validation_top1"] > 0.5  # by chance 1 in 8
    assert json.loads((folder / "result.json").read_text()) == result
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    assert model.config.id2label[0] == "astronaut"

    dataset = load_image_dataset("photographs", split="validation", resolution=32, train=False, max_samples=64)
    images = torch.stack([item["pixel_values"] for item in dataset])
    labels = torch.tensor([item["class_labels"] for item in dataset])
    images = ((images + 1) * 127.5).round().to(torch.uint8)
    processed = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, tiny_classifier.to_pixel_values(images, model.device), atol=1e-6, rtol=0)
    with torch.no_grad():
        predicted = model.eval()(processed).logits.argmax(1)
    assert (predicted == labels).double().mean().item() == pytest.approx(result["validation_top1"], abs=0.02)


def test_flags_of_the_two_scripts_mean_the_same():
    data_set = {field.name for field in fields(EvaluationDataArguments)}
    for arguments in (tiny_classifier.TinyClassifierArguments, metric_behaviour.MetricBehaviourArguments):
        assert {field.name for field in fields(arguments)} >= data_set | {"output_dir", "resolution", "batch_size"}


def test_the_classifier_is_a_feature_extractor(classifier):
    extractor = TransformersFeatureExtractor(str(classifier[0]))
    features = extractor(torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8))
    assert features.features.shape == (2, 256) and features.logits.shape == (2, 8)
    assert features.spatial_features is not None and len(features.spatial_features) == 2


def test_figures_of_photographs_get_worse_with_what_is_lost(classifier, tmp_path):
    """The command with its defaults for what is lost, and two tokenizers that have not been trained."""
    torch.manual_seed(0)
    for num_latent_tokens in (4, 8):
        AutoencoderSoftVQ(
            sample_size=64,
            encoder_patch_size=16,
            decoder_patch_size=16,
            num_latent_tokens=num_latent_tokens,
            latent_channels=4,
            codebook_size=16,
            num_codebooks=2,
            encoder_hidden_size=16,
            encoder_num_layers=1,
            encoder_num_attention_heads=2,
            decoder_hidden_size=16,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
        ).save_pretrained(tmp_path / f"tokens_{num_latent_tokens}")
    args = metric_behaviour.MetricBehaviourArguments(
        dataset="photographs",
        feature_extractor=str(classifier[0]),
        output_dir=str(tmp_path / "behaviour"),
        max_samples=64,
        tokenizers=[str(tmp_path / "tokens_4"), str(tmp_path / "tokens_8")],
        batch_size=50,
        kernel_subset_size=16,
    )
    metric_behaviour.main(args)
    record = json.loads((tmp_path / "behaviour/behaviour.json").read_text())
    # tokenizers without training have no reason to be in order, and two halves of 32 photographs differ by themselves
    between_halves = ("kernel_distance", "precision")
    violations = [
        line
        for line in record["violations"]
        if "tokenizer" not in line and not any(figure in line for figure in between_halves)
    ]
    assert violations == []
    assert record["num_images"] == 64
    assert list(record["figures"]["tokenizer"]) == ["8 tokens", "4 tokens"]
    originals = record["figures"]["originals"][""]
    assert originals["psnr"] is None and "psnr of originals is inf, which JSON has as null." in record["notes"]
    assert originals["frechet_distance"] == pytest.approx(0, abs=1e-3)
    table = (tmp_path / "behaviour/behaviour.md").read_text()
    assert len(table.splitlines()) == 2 + 1 + 3 * 4 + 2
    assert f"FD ({record['feature_extractor']['label']})" in table and "FID" not in table
    assert (tmp_path / "behaviour/behaviour.png").stat().st_size > 10_000


def figures(worse, **changes):
    """Figures of the originals (0), or of one that has lost more and more."""
    values = {"psnr": 40.0 - worse if worse else math.inf, "ssim": 1 - worse / 10, "frechet_distance": float(worse)}
    values |= {"spatial_frechet_distance": float(worse), "kernel_distance": worse / 10}
    return values | {"precision": 1 - worse / 10, "recall": 1 - worse / 10} | changes


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"precision": 1.0}, []),  # recall has fallen
        ({"kernel_distance": 0.05}, []),  # not above the step before, but above the originals
        ({"frechet_distance": 0.5}, ["blur: frechet_distance is 1 at mild and 0.5 at strong"]),
        ({"frechet_distance": 1.0}, ["blur: frechet_distance is 1 at mild and 1 at strong"]),
        ({"frechet_distance": math.nan}, ["blur: frechet_distance is 1 at mild and nan at strong"]),
        ({"psnr": 39.5}, ["blur: psnr is 39 at mild and 39.5 at strong"]),
        ({"kernel_distance": -0.1}, ["blur: kernel_distance is 0 at originals and -0.1 at strong"]),
        (
            {"precision": 1.0, "recall": 1.0},
            ["blur: precision and recall are 1 and 1 at originals and 1 and 1 at strong"],
        ),
    ],
)
def test_violations_are_named(changes, found):
    results = {"blur": {"mild": figures(1), "strong": figures(2, **changes)}}
    assert metric_behaviour.find_violations(results, figures(0)) == found


def test_degradations_do_what_they_say():
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    images[:, :, :, 32:] = 0
    blurred = metric_behaviour.gaussian_blur(images, 2.0)
    # half a pixel from an edge, a Gaussian of 2 pixels has risen to the normal distribution at 1/4: 0.599
    assert blurred[0, 0, 32, 31].item() == pytest.approx(128 * 0.599, abs=1.5)
    # of twice the side, 4 pixels
    blurred = metric_behaviour.gaussian_blur(images.repeat_interleave(2, 2).repeat_interleave(2, 3), 2.0)
    assert blurred[0, 0, 64, 61].item() == pytest.approx(128 * 0.734, abs=1.5)

    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    noise = metric_behaviour.gaussian_noise(grey, 0.1, torch.Generator().manual_seed(0)).double() - 128
    assert noise.std().item() == pytest.approx(25.5, rel=0.02) and noise.mean().abs().item() < 0.5
    assert not torch.equal(noise[0], noise[1])


def test_tokenizers_that_do_not_fit_are_refused(tiny_pipeline, tmp_path):
    tiny_pipeline().vae.save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"takes images of 16 x 16 pixels, allowed: those of `--resolution`, 32 x 32"):
        metric_behaviour.load_tokenizers([str(tmp_path)], 32, cpu)
    with pytest.raises(ValueError, match="a second one of 10 tokens"):
        metric_behaviour.load_tokenizers([str(tmp_path), str(tmp_path)], 16, cpu)
    (tokenizer,) = metric_behaviour.load_tokenizers([str(tmp_path)], 16, cpu).values()
    tokenizer.decoder.pixel_head.proj.bias.data.fill_(math.inf)
    with pytest.raises(ValueError, match="reconstructions that are not finite"):
        metric_behaviour.reconstruct(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), tokenizer)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="weights that do not fit its config"):
        metric_behaviour.load_tokenizers([str(tmp_path)], 16, cpu)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 16}, "`--resolution` is 16"),
        ({"num_train_epochs": 0}, "`--num_train_epochs` is 0"),
        ({"learning_rate": 0.0}, "`--learning_rate` is 0.0"),
        ({"max_samples": 0}, "`--max_samples` is 0"),
        ({"max_validation_samples": 0}, "`--max_validation_samples` is 0"),
    ],
)
def test_arguments_of_the_classifier_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_classifier.TinyClassifierArguments(dataset="photographs", output_dir="unused", **arguments)


def test_exit_status_tells_of_violations(classifier, tmp_path, capsys):
    """Images of one colour lose nothing by blur."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        PIL.Image.new("RGB", (32, 32), (30 * i, 20, 100)).save(folder / f"{i}.png")
    args = metric_behaviour.MetricBehaviourArguments(
        dataset=str(folder),
        split="train",
        feature_extractor=str(classifier[0]),
        output_dir=str(tmp_path / "behaviour"),
        resolution=32,
        kernel_subset_size=4,
    )
    assert metric_behaviour.main(args) == 1
    line = "Gaussian blur: psnr is inf at originals and inf at σ 0.5"
    assert line in capsys.readouterr().err
    record = json.loads((tmp_path / "behaviour/behaviour.json").read_text())
    assert line in record["violations"] and record["figures"]["Gaussian blur"]["σ 0.5"]["psnr"] is None
    assert "psnr of Gaussian blur σ 0.5 is inf, which JSON has as null." in record["notes"]
