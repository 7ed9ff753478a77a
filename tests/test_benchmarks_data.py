"""benchmarks/data.py: small files, every contestant, and what becomes of the figures."""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import Dataset

from softvq_hf.data.transforms import adm_center_crop
from softvq_hf.training.arguments import parse_args


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CONTESTANTS = ("exact", "jpeg_draft", "fast_resize", "jpeg_draft_fast_resize")


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("data")
    torch.set_num_threads(threads)
    for name in ("data", "side_by_side"):
        sys.modules.pop(name, None)


def tiny_arguments(benchmark, output_dir: Path, **changes):
    options = {"image_sizes": ["96x64", "47x40"], "num_images": 8, "resolution": 32, "batch_size": 2, "rounds": 1}
    options |= {"num_workers": [1], "step_milliseconds": [1.0, 0.0], "num_batches": 2}
    return benchmark.DataBenchmarkArguments(output_dir=str(output_dir), **{**options, **changes})


def test_a_run(benchmark, tmp_path):
    benchmark.main(tiny_arguments(benchmark, tmp_path))
    report = json.loads((tmp_path / "data.json").read_text())
    names = {f"{size}.{contestant}.vs_image_folder" for size in ("96x64", "47x40") for contestant in CONTESTANTS}
    assert set(report["ratios"]) == names
    assert all(0 < ratio["min"] <= ratio["median"] <= ratio["max"] for ratio in report["ratios"].values())

    large, small = (report["measurements"][size]["pixel_errors"] for size in ("96x64", "47x40"))
    assert large["exact"]["max"] == small["exact"]["max"] == 0 and large["exact"]["psnr"] is None
    assert large["jpeg_draft"]["max"] > 2 and large["jpeg_draft"]["psnr"] > large["jpeg_draft"]["worst_psnr"] > 25
    assert small["jpeg_draft"]["max"] == 0
    assert 0 < small["fast_resize"]["max"] <= 2

    waiting = report["measurements"]["waiting"]
    assert waiting["images"] == "96x64" and len(waiting["cases"]) == 2
    assert all(0 <= share["median"] <= 1 for share in waiting["cases"][0]["share_of_waiting"].values())
    table = (tmp_path / "data.md").read_text()
    assert table.count("\n| 96x64 |") == table.count("\n| 47x40 |") == 1 + len(CONTESTANTS)


def test_own_images(benchmark, tmp_path):
    benchmark.write_photographs(tmp_path / "images", (60, 50), 8, quality=90)
    folder = str(tmp_path / "images")
    benchmark.main(tiny_arguments(benchmark, tmp_path, train_data_dir=folder, num_images=6))
    report = json.loads((tmp_path / "data.json").read_text())
    assert set(report["ratios"]) == {f"folder.{contestant}.vs_image_folder" for contestant in CONTESTANTS}
    assert report["measurements"]["waiting"]["images"] == "folder"


def test_other_pixels_than_those_of_image_folder_are_refused(benchmark, tmp_path):
    benchmark.write_photographs(tmp_path / "images", (60, 50), 8, quality=90)
    path = next((tmp_path / "images").rglob("*.jpg"))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 3
    PIL.Image.open(path).save(path, exif=exif)
    with pytest.raises(ValueError, match="differ from those of ImageFolder by up to .* EXIF"):
        benchmark.main(tiny_arguments(benchmark, tmp_path, train_data_dir=str(tmp_path / "images")))


@pytest.mark.parametrize("size", [(100, 80), (33, 131), (20, 30)])
def test_the_official_crop_is_the_same_by_other_calls(benchmark, size):
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    crop = benchmark.center_crop(noise, 24)
    np.testing.assert_array_equal(np.array(crop), np.array(adm_center_crop(noise, 24)))


class Slow(Dataset):
    """Batches of one, each of which takes `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        time.sleep(self.seconds)
        return index


def test_waiting_is_what_the_step_does_not_hide(benchmark):
    # without a worker process loading and step take turns
    rate, share = benchmark.measure_waiting(benchmark.build_loader(Slow(0.06), 1), 0.02, 5)
    assert 0.6 < share < 0.9 and 4 < rate < 12.6
    rate, share = benchmark.measure_waiting(benchmark.build_loader(Slow(0.02), 1, num_workers=1), 0.1, 5)
    assert share < 0.3 and 4 < rate < 10


def test_pixel_errors(benchmark):
    image = torch.zeros(3, 4, 4)
    other = image.clone()
    other[0, 0, 0] = 12 / 127.5
    error = benchmark.pixel_error([{"pixel_values": image}, {"pixel_values": other}], [(image, 0), (image, 0)])
    assert error["max"] == 12 and error["mean"] == pytest.approx(12 / 96) and error["share"] == pytest.approx(1 / 96)
    assert error["psnr"] == pytest.approx(10 * np.log10(255**2 / (144 / 96)))
    assert error["worst_psnr"] == pytest.approx(10 * np.log10(255**2 / (144 / 48)))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rounds", "0"], "`--rounds` is 0, allowed: integers from 1 on"),
        (["--jpeg_quality", "101"], "`--jpeg_quality` is 101, allowed: 1 to 100"),
        (["--num_workers", "0"], r"`--num_workers` is \[0\], allowed: integers from 1 on"),
        (["--step_milliseconds", "-1"], r"`--step_milliseconds` is \[-1.0\], allowed: numbers from 0 on"),
        (["--image_sizes", "500"], "`--image_sizes` has '500', allowed: width x height"),
        (["--image_sizes", "0x4"], "`--image_sizes` has '0x4', allowed: width x height"),
        (["--train_data_dir", "nowhere"], "`--train_data_dir` is 'nowhere', allowed: a folder that exists"),
    ],
)
def test_arguments_out_of_range(benchmark, options, message):
    with pytest.raises(ValueError, match=message):
        parse_args(benchmark.DataBenchmarkArguments, ["--output_dir", "out", *options])


def test_the_short_form_is_short(benchmark):
    args = parse_args(benchmark.DataBenchmarkArguments, ["--output_dir", "out", "--short"])
    assert args.image_sizes == ["500x375", "1000x750"] and args.num_images * args.rounds < 100
    assert args.num_batches * len(args.step_milliseconds) * args.rounds < 50
