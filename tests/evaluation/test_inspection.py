"""`softvq-hf inspect`, with constructed decoders and real tokenizers of tiny size."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from softvq_hf.cli import main
from softvq_hf.evaluation.inspection import InspectionArguments, decode_grey_levels, inspect_tokenizer, project
from softvq_hf.metrics.codebook_usage import CodebookUsage
from softvq_hf.metrics.latent_statistics import LatentStatistics


PICTURES = {
    *("reconstructions.png", "influence_dropped.png", "influence_swapped.png", "interpolation.png"),
    *("codebook.png", "projection.png", "channels.png"),
}


@pytest.fixture
def labelled_folder(tmp_path):
    """24 images of 32 x 32 pixels in three classes."""
    generator = np.random.default_rng(0)
    for name in ("apple", "bread", "cheese"):
        (tmp_path / "food" / "val" / name).mkdir(parents=True)
        for number in range(8):
            coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(
                tmp_path / "food" / "val" / name / f"{name}-{number}.png"
            )
    return tmp_path / "food"


@pytest.fixture
def tokenizer_dir(tiny_tokenizer, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def inspect(fresh_accelerate, labelled_folder, tokenizer_dir, tmp_path):
    """Inspects a tokenizer in this process: `inspect(num_images=2) -> (record, text of the report, folder)`."""

    def run(**arguments):
        defaults = {"model": str(tokenizer_dir), "dataset": str(labelled_folder), "output_dir": str(tmp_path / "out")}
        report = inspect_tokenizer(
            InspectionArguments(**{**defaults, "num_images": 2, "num_interpolation_steps": 2, **arguments})
        )
        return json.loads((report.parent / "result.json").read_text()), report.read_text(), report.parent

    return run


def pictures_of(report: str) -> set[str]:
    """Sources of the images of a page, which has to be balanced HTML."""
    found, open_tags = set(), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "img":
                found.add(dict(attributes)["src"])
            elif tag != "meta":
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Reader().feed(report)
    assert open_tags == []
    return found


def test_pca_finds_the_directions_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2000, 5, generator=generator) * torch.tensor([0.01, 4.0, 0.01, 2.0, 0.01])
    projected, names = project(points, "pca", seed=0)
    assert abs(np.corrcoef(projected[:, 0], points[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(projected[:, 1], points[:, 3])[0, 1]) > 0.99
    share = (points[:, 1].var() / points.var(0).sum()).item()
    assert names[0] == f"component 1 ({share:.0%} of the variance)"


@pytest.mark.parametrize("num_points", [2, 5, 40])
def test_tsne_takes_few_points_and_repeats_itself(num_points):
    points = torch.randn(num_points, 3)
    projected, _ = project(points, "tsne", seed=1)
    assert projected.shape == (num_points, 2) and np.isfinite(projected).all()
    assert np.array_equal(projected, project(points, "tsne", seed=1)[0])


@torch.no_grad()
def test_numbers_are_those_of_the_model(inspect, tiny_tokenizer, labelled_folder):
    result, report, folder = inspect(num_images=4, batch_size=5)
    assert pictures_of(report) == PICTURES == {path.name for path in folder.glob("*.png")}
    assert all(Image.open(folder / name).width > 300 for name in PICTURES)

    tokenizer = tiny_tokenizer()
    dataset = InspectionArguments(dataset=str(labelled_folder), model="x", output_dir="x").load_dataset(32)
    items = {str(item["image_id"]): item["pixel_values"] for item in map(dataset.__getitem__, range(24))}
    encoded = tokenizer.encode(torch.stack(list(items.values())))
    latents = encoded.latent
    expected = LatentStatistics(flat=False).compute(predictions=latents)
    for name, value in result["latents"].items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert result["codebook"] == CodebookUsage(16, num_codebooks=2).compute(predictions=encoded.indices)
    assert result["protocol"]["num_images"] == 24

    names = list(items)
    chosen = [names.index(name) for name in result["reconstructions"]["image_id"]]
    assert len(set(chosen)) == 4  # no image twice

    def decode(latents):
        return ((tokenizer.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).double()

    reconstructions = decode(latents[chosen])
    for number, reconstruction, psnr in zip(chosen, reconstructions, result["reconstructions"]["psnr"], strict=True):
        original = ((items[names[number]] + 1) * 127.5).round().byte().numpy()
        assert psnr == pytest.approx(
            peak_signal_noise_ratio(original, reconstruction.round().byte().numpy()), abs=0.01
        )

    dropped, swapped = latents[chosen].clone(), latents[chosen].clone()
    dropped[:, 3] = latents[:, 3].mean(0)
    swapped[:, 3] = latents[[*chosen[1:], chosen[0]], 3]
    for changed, kind in ((dropped, "dropped"), (swapped, "swapped")):
        change = (decode(changed) - reconstructions).abs().mean().item()
        assert change > 0
        assert result["influence"][kind]["change"][3] == pytest.approx(change, rel=1e-3)
    assert result["influence"]["tokens"] == list(range(8))


@pytest.mark.parametrize(
    ("quantizer", "sentence"),
    [
        ("vq", "was trained on codewords alone"),
        ("kl", "The quantizer “kl” has no codebook."),
        ("none", "The quantizer “none” has no codebook."),
    ],
)
def test_every_quantizer(inspect, tiny_tokenizer, tokenizer_dir, tmp_path, quantizer, sentence):
    tiny_tokenizer(quantizer=quantizer).save_pretrained(tokenizer_dir)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "codebook.png").write_bytes(b"of another model")
    result, report, folder = inspect()
    has_codebook = quantizer == "vq"
    assert sentence in " ".join(report.split())
    assert pictures_of(report) == (PICTURES if has_codebook else PICTURES - {"codebook.png"})
    assert {path.name for path in folder.glob("*.png")} == pictures_of(report)
    assert ("codebook" in result) == has_codebook == ("codebook_usage" in result["metrics"])


def test_autoencoder_kl(inspect, tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    result, report, _ = inspect(model=str(tmp_path / "pipeline"), subfolder="vae", num_tokens=10, projection="tsne")
    text = " ".join(report.split())
    assert "a token is a position of their grid" in text and "An AutoencoderKL has no codebook." in text
    assert "An image becomes 64 tokens of 4 channels." in text and "9 of 64 tokens are shown" in text
    assert "drawn by t-SNE" in text
    assert result["influence"]["tokens"] == [9, 12, 14, 33, 36, 38, 49, 52, 54]
    # what a position of the grid changes lies where it is, although normalisation spreads it over the image
    x, y = np.array(result["influence"]["swapped"]["centre"]).T
    tokens = np.array(result["influence"]["tokens"])
    assert np.corrcoef(x, tokens % 8)[0, 1] > 0.9 and np.corrcoef(y, tokens // 8)[0, 1] > 0.9


def test_one_channel_and_no_labels(inspect, tiny_tokenizer, tokenizer_dir, image_folder):
    tiny_tokenizer(latent_channels=1, quantizer="none").save_pretrained(tokenizer_dir)
    _, report, folder = inspect(dataset=str(image_folder(6)), label_column="none")
    assert "Latents of one channel have no projection" in report
    assert not (folder / "projection.png").exists()


def test_projection_without_labels(inspect, image_folder):
    _, report, _ = inspect(dataset=str(image_folder(6)), label_column="none")
    assert "projection.png" in pictures_of(report)
    assert "No classes" not in report


@pytest.mark.parametrize("label_column", ["label", "None"])
def test_a_folder_without_classes(inspect, image_folder, label_column):
    """By default labels may be missing, which the report says; `none` of any case asks for none."""
    result, report, _ = inspect(dataset=str(image_folder(6)), label_column=label_column)
    note = "No classes: images has no usable labels in a column 'label', or in one of a usual name."
    assert result["notes"] == ([note] if label_column == "label" else [])
    assert ("No classes" in report) == (label_column == "label") and "projection.png" in pictures_of(report)


def test_a_column_of_labels_that_is_not_there(inspect, image_folder):
    folder = str(image_folder(6))
    with pytest.raises(
        ValueError, match="`label_column` is 'species'.* For an inspection that is `--label_column none`"
    ):
        inspect(dataset=folder, label_column="species")
    with pytest.raises(ValueError, match="cannot be loaded") as error:  # and nothing on labels
        inspect(dataset=folder, split="test", label_column="species")
    assert "--label_column" not in str(error.value)


def test_the_seed_chooses_the_images(inspect):
    first, again, other = (inspect(seed=seed)[0] for seed in (0, 0, 1))
    for record in (first, again, other):
        record.pop("date")
    assert first == again
    assert first["reconstructions"]["image_id"] != other["reconstructions"]["image_id"]
    assert first["latents"] == other["latents"]


def test_unreadable_images_are_left_out_and_named(inspect, labelled_folder):
    (labelled_folder / "val" / "bread" / "bread-3.png").write_bytes(b"no image")
    result, report, _ = inspect()
    assert result["protocol"]["num_images"] == 23 and result["notes"] == [
        "1 images could not be read and are left out: bread/bread-3.png."
    ]
    assert "bread/bread-3.png" in report
    with pytest.raises(ValueError, match="`--num_images` is 24, allowed: up to the number of readable images, 23"):
        inspect(num_images=24)


def test_names_are_escaped(inspect, labelled_folder):
    source = labelled_folder.rename(labelled_folder.with_name("<b>food & more"))
    _, report, _ = inspect(dataset=str(source))
    assert "images of &lt;b&gt;food &amp; more" in report and "<b>" not in report


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_tokenizer_names_the_images(inspect, tiny_tokenizer, tokenizer_dir, value):
    tokenizer = tiny_tokenizer(quantizer="none")
    tokenizer.decoder.pixel_head.proj.bias.data.fill_(value)
    tokenizer.save_pretrained(tokenizer_dir)
    with pytest.raises(ValueError, match=r"decoded images that are not finite .*\.png"):
        inspect()


@torch.no_grad()
def test_only_what_is_broken_is_named(tiny_tokenizer):
    tokenizer = tiny_tokenizer(quantizer="none")
    latents = torch.randn(3, 8, 4)
    images = decode_grey_levels(tokenizer, latents, ["a", "b", "c"], resolution=32, batch_size=2)
    assert images.shape == (3, 3, 32, 32) and images.min() >= 0 and 1 < images.max() <= 255
    latents[1, 5] = 3e38  # more than a layer can add up
    with pytest.raises(ValueError, match=r"decoded images that are not finite \(NaN or infinite\) for b\."):
        decode_grey_levels(tokenizer, latents, ["a", "b", "c"], resolution=32, batch_size=2)


def test_a_collapsed_tokenizer_is_shown(inspect, tiny_tokenizer, tokenizer_dir):
    tokenizer = tiny_tokenizer(quantizer="none")
    torch.nn.init.zeros_(tokenizer.quant_conv.weight)
    tokenizer.save_pretrained(tokenizer_dir)
    result, report, _ = inspect()
    assert pictures_of(report) == PICTURES - {"codebook.png"}
    assert result["influence"]["swapped"]["area"] == [0.0] * 8
    assert result["influence"]["swapped"]["centre"] == [None] * 8
    assert result["latents"]["latent_kurtosis"] is None and "latent_kurtosis is not a number" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 1}, "`--num_images` is 1, allowed: integers from 2 on"),
        ({"num_tokens": 0}, "`--num_tokens` is 0, allowed: integers from 1 on"),
        ({"num_interpolation_steps": 1}, "`--num_interpolation_steps` is 1, allowed: integers from 2 on"),
        ({"batch_size": 0}, "`--batch_size` is 0, allowed: integers from 1 on"),
        ({"seed": -1}, "`--seed` is -1, allowed: integers from 0 on"),
        ({"seed": 2**32}, "`--seed` is 4294967296, allowed: up to 4294967295"),
        ({"resolution": 0}, "`--resolution` is 0, allowed: integers from 1 on"),
        ({"max_samples": 1}, "`--max_samples` is 1, allowed: integers from 2 on"),
        ({"projection": "umap"}, "`--projection` is 'umap', allowed: pca, tsne"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        InspectionArguments(model="x", dataset="x", output_dir="x", **arguments)


def test_command(fresh_accelerate, capsys, tokenizer_dir, labelled_folder, tmp_path):
    words = ["inspect", "--model", tokenizer_dir, "--dataset", labelled_folder, "--output_dir", tmp_path / "out"]
    main([*map(str, words), "--num_images", "2", "--num_interpolation_steps", "2"])
    assert capsys.readouterr().out.splitlines()[-1] == f"Report written to {tmp_path / 'out' / 'report.html'}"
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, words), "--num_images", "100"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: `--num_images` is 100, allowed: up to the number of readable images, 24."


@pytest.mark.slow
def test_several_processes_are_refused(softvq_hf_command, tokenizer_dir, labelled_folder, tmp_path):
    words = ["inspect", "--model", tokenizer_dir, "--dataset", labelled_folder, "--output_dir", tmp_path / "out"]
    refused = softvq_hf_command(*words, num_processes=2)
    assert refused.returncode != 0
    assert "error: 2 processes were launched to inspect a model, allowed: 1." in refused.stderr
