"""`softvq-hf evaluate reconstruction`, with real tokenizers of tiny size."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from softvq_hf.data import UnreadableImagesError
from softvq_hf.data.latents import tokenizer_fingerprint
from softvq_hf.evaluation.reconstruction import ReconstructionArguments, evaluate_reconstruction
from softvq_hf.metrics.codebook_usage import CodebookUsage


@pytest.fixture
def tokenizer_dir(tiny_tokenizer, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def evaluate(fresh_accelerate, image_folder, tokenizer_dir):
    """Runs an evaluation in this process, on 20 images unless told otherwise."""

    def run(**arguments):
        if "dataset" not in arguments:
            arguments["dataset"] = str(image_folder(20))
        options = {"model": str(tokenizer_dir), "lpips": "none", "feature_extractor": ["none"], "batch_size": 8}
        return evaluate_reconstruction(ReconstructionArguments(**{**options, **arguments}))

    return run


def assert_same_figures(figures, expected, tolerance):
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == (None if value is None else pytest.approx(value, rel=tolerance)), name


def originals_and_reconstructions(folder, tokenizer):
    dataset = ReconstructionArguments(dataset=str(folder), model="x").load_dataset(32)
    pixel_values = torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])
    with torch.no_grad():
        encoded = tokenizer.encode(pixel_values)
        sample = tokenizer.decode(encoded.latent).sample
    return encoded, *(
        ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy() for x in (pixel_values, sample)
    )


def test_figures(evaluate, image_folder, tiny_tokenizer, tiny_classifier_dir):
    folder = image_folder(20)
    result = evaluate(dataset=str(folder), feature_extractor=[str(tiny_classifier_dir)])
    encoded, originals, reconstructions = originals_and_reconstructions(folder, tiny_tokenizer())
    psnr = [peak_signal_noise_ratio(*pair) for pair in zip(originals, reconstructions, strict=True)]
    metrics = result["metrics"]
    assert metrics["psnr"] == pytest.approx(sum(psnr) / 20, rel=1e-4)
    usage = CodebookUsage(16, num_codebooks=2).compute(predictions=encoded.indices)
    assert result["codebook"] == usage and metrics["codebook_perplexity"] == usage["codebook_perplexity"]
    assert result["latents"]["latent_mean"] == pytest.approx(encoded.latent.mean().item(), rel=1e-4)
    assert result["rate"]["tokens_per_image"] == 8 and result["rate"]["floats_per_image"] == 32
    assert metrics["fd (tiny_classifier)"] > 0 and metrics["kernel_distance (tiny_classifier)"] is None
    assert "its subsets have 1000 images, there are 20" in " ".join(result["notes"])
    protocol = result["protocol"]
    assert protocol["name"] == "20 images, ADM centre crop to 32 px, rounded to 8 bits"
    assert protocol["tokenizer"] == tokenizer_fingerprint(tiny_tokenizer()) and protocol["mixed_precision"] == "no"
    assert protocol["num_images"] == 20 and protocol["feature_extractors"].keys() == {"tiny_classifier"}
    assert result["dataset"]["name"] == "images" and result["model"] == "tokenizer"


def test_runs_and_sizes_of_batches_give_the_same_numbers(evaluate, image_folder, tiny_classifier_dir):
    options = {"dataset": str(image_folder(21)), "feature_extractor": [str(tiny_classifier_dir)]}
    first, again, single = (evaluate(batch_size=size, **options)["metrics"] for size in (8, 8, 1))
    assert first == again
    assert_same_figures(single, first, tolerance=1e-3)


def test_identical_pairs_beside_an_infinite_psnr(evaluate, image_folder, tiny_tokenizer, tmp_path):
    """A decoder of zeros makes grey images, and one of the originals is one."""
    tokenizer = tiny_tokenizer(quantizer="none")
    for parameter in tokenizer.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    tokenizer.save_pretrained(tmp_path / "grey")
    folder = image_folder(4)
    others = evaluate(dataset=str(folder), model=str(tmp_path / "grey"))
    Image.new("RGB", (32, 32), (128, 128, 128)).save(folder / "val" / "grey.png")
    result = evaluate(dataset=str(folder), model=str(tmp_path / "grey"))
    assert result["metrics"]["psnr"] is None and "psnr_of_differing_pairs" not in others["metrics"]
    assert result["metrics"]["psnr_of_differing_pairs"] == pytest.approx(others["metrics"]["psnr"], rel=1e-12)
    assert any(note.startswith("1 of 5 reconstructions equal their originals") for note in result["notes"])


def test_result_is_written(evaluate, tmp_path):
    result = evaluate(output_file=str(tmp_path / "out" / "result.json"))
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result


def test_rounding_of_the_official_scripts(evaluate, image_folder):
    folder = str(image_folder(4))
    rounded, truncated = (evaluate(dataset=folder, rounding=rounding) for rounding in ("round", "truncate"))
    assert rounded["metrics"]["psnr"] != truncated["metrics"]["psnr"]
    assert rounded["metrics"]["psnr"] == pytest.approx(truncated["metrics"]["psnr"], abs=0.1)
    assert "truncated to 8 bits" in truncated["protocol"]["name"]


@pytest.mark.parametrize("quantizer", ["vq", "kl", "none"])
def test_quantizers(evaluate, tiny_tokenizer, tmp_path, quantizer):
    tiny_tokenizer(quantizer=quantizer).save_pretrained(tmp_path / quantizer)
    result = evaluate(model=str(tmp_path / quantizer))
    assert ("codebook_usage" in result["metrics"]) == (quantizer == "vq") == ("codebook" in result)
    assert result["metrics"]["psnr"] > 0


def test_autoencoder_kl_and_resolution(evaluate, image_folder, tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    options = {"dataset": str(image_folder(4)), "model": str(tmp_path / "pipeline"), "subfolder": "vae"}
    result = evaluate(**options)
    assert result["rate"]["tokens_per_image"] == 256 and len(result["latents"]["latent_channel_mean"]) == 4
    result = evaluate(**options, resolution=16)
    assert result["rate"]["tokens_per_image"] == 64 and result["protocol"]["resolution"] == 16
    with pytest.raises(ValueError, match="multiples of 2"):
        evaluate(**options, resolution=17)


def test_large_latents_have_no_effective_rank_of_the_whole(evaluate, monkeypatch):
    monkeypatch.setattr("softvq_hf.evaluation.reconstruction.MOST_FLAT_NUMBERS", 31)
    result = evaluate()
    assert "effective_rank_flat" not in result["latents"] and result["latents"]["effective_rank"] > 1
    assert "more than 31 numbers" in result["notes"][-1]


def test_unreadable_images_are_named_and_counted(evaluate, image_folder):
    folder = image_folder(20)
    (folder / "val" / "007.png").write_bytes(b"no image")
    result = evaluate(dataset=str(folder), batch_size=1)
    assert (result["protocol"]["num_images"], result["protocol"]["num_unreadable"]) == (19, 1)
    assert result["notes"] == ["1 images could not be read and are left out: val/007.png."]
    with pytest.raises(UnreadableImagesError, match="1 of the"):
        evaluate(dataset=str(folder), max_unreadable_fraction=0.0)


def test_an_unreadable_image_is_no_reason_to_leave_figures_out(evaluate, image_folder, tiny_classifier_dir):
    """11 images in 10 splits: without number 5 its split is empty, and the classifier score is that of the others."""
    folder = image_folder(11)
    (folder / "val" / "005.png").write_bytes(b"no image")
    options = {"feature_extractor": [str(tiny_classifier_dir)], "batch_size": 1, "max_unreadable_fraction": 0.1}
    metrics = evaluate(dataset=str(folder), **options)["metrics"]
    assert metrics["classifier_score (tiny_classifier)"] >= 1 and metrics["fd (tiny_classifier)"] > 0
    assert metrics["precision (tiny_classifier)"] is not None


def test_images_of_mixed_sizes_are_cropped(evaluate, image_folder):
    folder = image_folder(4)
    Image.new("RGB", (90, 40), "red").save(folder / "val" / "wide.png")
    Image.new("L", (10, 20)).save(folder / "val" / "small.png")
    assert evaluate(dataset=str(folder))["protocol"]["num_images"] == 6


def test_diverged_tokenizer_names_the_images(evaluate, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer(quantizer="none")
    torch.nn.init.constant_(tokenizer.quant_conv.weight, float("nan"))
    tokenizer.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ValueError, match=r"latents that are not finite .* for val/000.png, val/001.png"):
        evaluate(model=str(tmp_path / "diverged"))


def test_resolution_is_checked_before_the_data_are_loaded(evaluate):
    with pytest.raises(ValueError, match="`--resolution` is 48, allowed: 32 x 32 pixels"):
        evaluate(resolution=48, dataset="nowhere")


def test_one_image_is_too_few(evaluate, image_folder):
    with pytest.raises(ValueError, match=r"1 readable image\(s\), allowed: 2 or more"):
        evaluate(dataset=str(image_folder(1)))


def test_a_model_that_is_not_there(evaluate, tiny_pipeline, image_folder, tmp_path):
    """Neither is a pipeline a tokenizer, nor the folder itself what is in a subfolder that does not exist."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "empty").mkdir()
    folder = str(image_folder(4))
    with pytest.raises(OSError, match="`--model` is '.*empty', which cannot be loaded. [^`]*$"):
        evaluate(model=str(tmp_path / "empty"), dataset=folder)
    with pytest.raises(OSError, match="`--model` is '.*pipeline', .* whose tokenizer is at `--subfolder vae`"):
        evaluate(model=str(tmp_path / "pipeline"), dataset=folder)
    with pytest.raises(ValueError, match="`--subfolder` is 'vea', allowed: a folder inside of '.*tokenizer' with"):
        evaluate(subfolder="vea", dataset=folder)
    assert evaluate(model=str(tmp_path / "pipeline"), subfolder="vae", dataset=folder)["metrics"]["psnr"] > 0


def test_an_error_does_not_stand_behind_the_progress_bar(evaluate, tiny_tokenizer, tmp_path, capsys):
    tokenizer = tiny_tokenizer(quantizer="none")
    torch.nn.init.constant_(tokenizer.quant_conv.weight, float("nan"))
    tokenizer.save_pretrained(tmp_path / "diverged")
    try:
        evaluate(model=str(tmp_path / "diverged"))
    except ValueError:
        assert capsys.readouterr().err.endswith("\n")
    else:
        pytest.fail("latents were not finite")


def test_empty_folder(evaluate, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        evaluate(dataset=str(tmp_path / "empty"))


def test_model_card(evaluate, tokenizer_dir):
    evaluate(update_model_card=True)
    card = ModelCard.load(tokenizer_dir / "README.md")
    assert {result.metric_type for result in card.data.eval_results} >= {"psnr", "ssim", "codebook_usage"}


def test_model_card_of_a_model_of_diffusers_is_asked_for_before_the_work(evaluate, tmp_path):
    AutoencoderKL(norm_num_groups=4, block_out_channels=(4,)).save_pretrained(tmp_path / "kl")
    with pytest.raises(ValueError, match="has no README.md"):
        evaluate(model=str(tmp_path / "kl"), update_model_card=True, dataset="nowhere")


def test_missing_weights_of_lpips_are_named_with_the_way_around(evaluate, image_folder, tmp_path, monkeypatch):
    def refuse_connection(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("urllib.request.urlopen", refuse_connection)
    with pytest.raises(OSError, match="alexnet-owt.* `--lpips_weights`; `--lpips none` does without"):
        evaluate(dataset=str(image_folder(4)), lpips="alex")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update_model_card": True}, "allowed with `--update_model_card`: a local folder that exists"),
        ({"resolution": 0}, "`--resolution` is 0"),
        ({"lpips": "squeeze"}, "`--lpips` is 'squeeze', allowed: vgg, alex, none"),
        ({"lpips": "none", "lpips_weights": "vgg16.pth"}, "`--lpips_weights` is 'vgg16.pth' and `--lpips` is none"),
        ({"lpips_weights": "nowhere.pth"}, "`--lpips_weights` is 'nowhere.pth', allowed: a file that exists"),
        ({"mixed_precision": "fp8"}, "`--mixed_precision` is 'fp8', allowed: no, fp16, bf16"),
        ({"rounding": "floor"}, "`rounding` is 'floor', allowed: 'round', 'truncate'"),
        ({"batch_size": 0}, "`--batch_size` is 0"),
        ({"max_samples": 1}, "`--max_samples` is 1, allowed: integers from 2 on"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionArguments(dataset="photographs", model="someone/softvq", **arguments)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(
    evaluate, softvq_hf_command, image_folder, tokenizer_dir, tiny_classifier_dir, tmp_path
):
    """21 images in batches of 4: three for either process, the last one with a single image. One cannot be read."""
    folder = image_folder(21)
    (folder / "val" / "007.png").write_bytes(b"no image")
    one = evaluate(dataset=str(folder), feature_extractor=[str(tiny_classifier_dir)], batch_size=4)
    flags = ["--dataset", folder, "--model", tokenizer_dir, "--feature_extractor", tiny_classifier_dir]
    flags += ["--lpips=none", "--batch_size=4", "--output_file", tmp_path / "two.json"]
    run = softvq_hf_command("evaluate", "reconstruction", *flags, num_processes=2)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count('"psnr"') == 1  # printed once
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["hardware"]["devices"] == {"cpu": 2} and two["hardware"]["num_processes"] == 2
    assert_same_figures(two["metrics"], one["metrics"], tolerance=1e-9)
    assert two["codebook"] == one["codebook"] and two["protocol"] == one["protocol"] and two["notes"] == one["notes"]
    assert two["latents"]["latent_channel_kurtosis"] == pytest.approx(one["latents"]["latent_channel_kurtosis"])
