"""Time the loading of images on one core: JPEG files to cropped tensors, beside torchvision's `ImageFolder`.

    python benchmarks/data.py --output_dir outputs/benchmark_data
    python benchmarks/data.py --output_dir outputs/benchmark_data_imagenet --train_data_dir path/to/imagenet/train

| | |
|---|---|
| `image_folder` | `ImageFolder`, ADM's centre crop by Pillow, `RandomHorizontalFlip`, `ToTensor`, `Normalize` |
| `exact` | `load_image_dataset`, centre crops and random flips: the same pixels, which is checked before |
| `jpeg_draft`, `fast_resize` | the same with this option |
| `jpeg_draft_fast_resize` | the same with both |

All read the same files, which the operating system holds in memory, through a `DataLoader` without worker processes,
in one thread. Seconds are those that the processor spends on it, so other programs disturb little. Errors are those of
pixels against `image_folder`, in grey levels of 256. By default the files are made of the built-in photographs, in
`--image_sizes` and with `--jpeg_quality`.

The second table is about an accelerator that takes `--step_milliseconds` for a batch, while `--num_workers` processes
load the next ones: how many images it gets, and the share of time in which it waits for them.

`--output_dir` gets `data.json` and `data.md`. Ratios are `<images>.<contestant>.vs_image_folder`: images per second.
"""

import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from side_by_side import Contestant, Spread, Timings, markdown_table, time_in_turn, write_report
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Lambda, Normalize, RandomHorizontalFlip, ToTensor
from tqdm.auto import tqdm

from softvq_hf.data import ImageDataset, collate_images, load_image_dataset
from softvq_hf.data.photographs import PHOTOGRAPHS, load_photograph
from softvq_hf.training.arguments import check_output_dir, parse_args


# Ours by name: options of `load_image_dataset`.
OPTIONS = {
    "exact": {},
    "jpeg_draft": {"jpeg_draft": True},
    "fast_resize": {"fast_resize": True},
    "jpeg_draft_fast_resize": {"jpeg_draft": True, "fast_resize": True},
}
WAITING = ("image_folder", "exact", "jpeg_draft_fast_resize")


@dataclass(kw_only=True)
class DataBenchmarkArguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder for data.json and data.md."})
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Folder with one subfolder of JPEG files for each class."}
    )
    image_sizes: list[str] = field(
        default_factory=lambda: ["500x375", "1000x750", "2000x1500"],
        metadata={"help": "Width x height in pixels of the files that are made without --train_data_dir."},
    )
    jpeg_quality: int = field(default=90, metadata={"help": "Of those files, as libjpeg counts it."})
    num_images: int = field(default=64, metadata={"help": "Files of each size, or of --train_data_dir."})
    resolution: int = field(default=256, metadata={"help": "Side of the crops in pixels."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch."})
    rounds: int = field(default=5, metadata={"help": "Timed calls of each."})
    num_workers: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Worker processes that keep an accelerator busy."}
    )
    step_milliseconds: list[float] = field(
        default_factory=lambda: [50.0, 100.0, 200.0], metadata={"help": "What the accelerator takes for a batch."}
    )
    num_batches: int = field(default=16, metadata={"help": "Batches that the accelerator takes."})
    short: bool = field(
        default=False,
        metadata={
            "help": "Two sizes, few images, two rounds, one case of waiting; flags for these count for nothing."
        },
    )

    def __post_init__(self) -> None:
        if self.short:
            self.image_sizes, self.num_images, self.rounds = ["500x375", "1000x750"], 24, 2
            self.batch_size, self.num_workers, self.step_milliseconds, self.num_batches = 8, [1], [20.0], 8
        for name in ("num_images", "resolution", "batch_size", "rounds", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"`--jpeg_quality` is {self.jpeg_quality}, allowed: 1 to 100.")
        if any(workers < 1 for workers in self.num_workers):
            raise ValueError(f"`--num_workers` is {self.num_workers}, allowed: integers from 1 on.")
        if any(not 0 <= milliseconds < math.inf for milliseconds in self.step_milliseconds):
            raise ValueError(f"`--step_milliseconds` is {self.step_milliseconds}, allowed: numbers from 0 on.")
        if self.train_data_dir is not None and not Path(self.train_data_dir).is_dir():
            raise ValueError(f"`--train_data_dir` is {self.train_data_dir!r}, allowed: a folder that exists.")
        if not self.image_sizes:
            raise ValueError("`--image_sizes` is empty, allowed: one or more of width x height, such as 500x375.")
        for size in self.image_sizes:
            if len(size.split("x")) != 2 or not all(side.isdecimal() and int(side) > 0 for side in size.split("x")):
                raise ValueError(f"`--image_sizes` has {size!r}, allowed: width x height, such as 500x375.")


@dataclass
class Source:
    """
    The same files for all.

    Attributes:
        contestants (`dict`): Datasets by name, with random flips.
        errors (`dict`): By name, the error of the pixels against `image_folder`, see [`pixel_error`].
        bytes_per_file (`float`): On average.
    """

    contestants: dict[str, Dataset]
    errors: dict[str, dict[str, Any]]
    bytes_per_file: float


def write_photographs(folder: Path, size: tuple[int, int], num_images: int, quality: int) -> None:
    """Write JPEG files of `size` (width, height), parts of the built-in photographs, below `folder`."""
    generator = np.random.default_rng(0)
    for number in range(num_images):
        name = list(PHOTOGRAPHS)[number % len(PHOTOGRAPHS)]
        photograph = load_photograph(name)
        scale = generator.uniform(0.8, 1.0) * min(photograph.width / size[0], photograph.height / size[1])
        width, height = int(scale * size[0]), int(scale * size[1])
        left = generator.integers(photograph.width - width, endpoint=True)
        top = generator.integers(photograph.height - height, endpoint=True)
        box = (left, top, left + width, top + height)
        (folder / name).mkdir(parents=True, exist_ok=True)
        image = photograph.resize(size, PIL.Image.Resampling.LANCZOS, box=box)
        image.save(folder / name / f"{number:04d}.jpg", quality=quality)


def center_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """ADM's centre crop, in the calls of Pillow that define it."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_folder(folder: str | Path, resolution: int, train: bool) -> ImageFolder:
    """What official training scripts load: `ImageFolder` with their transform, without its flips if not `train`."""
    transforms = [Lambda(partial(center_crop, size=resolution)), ToTensor(), Normalize([0.5] * 3, [0.5] * 3, True)]
    if train:
        transforms.insert(1, RandomHorizontalFlip())
    return ImageFolder(folder, Compose(transforms))


def grey_levels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Integers from 0 to 255 of `pixel_values` in [-1, 1]."""
    return ((pixel_values + 1) * 127.5).round().int()


def pixel_error(dataset: ImageDataset, reference: Dataset) -> dict[str, Any]:
    """
    How far the pixels of a dataset are from those of another one that yields the same images in the same order.

    Returns:
        `dict`: `max` and `mean` absolute difference in grey levels; `share` of the values that differ; `psnr` of all
        images together and `worst_psnr` of one in dB, `None` where all are equal.
    """
    largest, means, shares, squares = [], [], [], []
    for item, (pixel_values, _) in zip(dataset, reference, strict=True):
        difference = (grey_levels(item["pixel_values"]) - grey_levels(pixel_values)).abs().double()
        largest.append(int(difference.max()))
        means.append(difference.mean().item())
        shares.append((difference > 0).double().mean().item())
        squares.append(difference.square().mean().item())
    return {
        "max": max(largest),
        "mean": statistics.mean(means),
        "share": statistics.mean(shares),
        "psnr": psnr(statistics.mean(squares)),
        "worst_psnr": psnr(max(squares)),
    }


def psnr(mean_square: float) -> float | None:
    """In dB, of a mean square difference in grey levels; `None` for 0."""
    return 10 * math.log10(255**2 / mean_square) if mean_square > 0 else None


def load_source(folder: str | Path, cache_dir: str, args: DataBenchmarkArguments) -> Source:
    """
    Load a folder of images in all ways.

    Raises:
        ValueError: If an image cannot be read, or `exact` is not equal to `image_folder`.
    """
    options = {"resolution": args.resolution, "label_column": None, "cache_dir": cache_dir}
    options |= {"max_samples": args.num_images, "max_unreadable_fraction": 0}
    load = partial(load_image_dataset, str(folder), **options)
    crops, reference = load(train=False), image_folder(folder, args.resolution, train=False)
    places = {"/".join(Path(path).parts[-2:]): place for place, (path, _) in enumerate(reference.samples)}
    indices = [places[item["image_id"]] for item in crops]
    reference = Subset(reference, indices)

    errors = {name: pixel_error(load(train=False, **OPTIONS[name]), reference) for name in OPTIONS}
    if errors["exact"]["max"] > 0:
        raise ValueError(
            f"The crops of {folder} differ from those of ImageFolder by up to {errors['exact']['max']} grey levels,"
            " allowed: none. (ImageFolder ignores the orientation in EXIF data.)"
        )
    contestants = {"image_folder": Subset(image_folder(folder, args.resolution, train=True), indices)}
    contestants |= {name: load(train=True, center_crop=True, **OPTIONS[name]) for name in OPTIONS}
    sizes = [Path(reference.dataset.samples[place][0]).stat().st_size for place in indices]
    return Source(contestants, errors, statistics.mean(sizes))


def build_loader(dataset: Dataset, batch_size: int, **options) -> DataLoader:
    """A `DataLoader` as it is used for the dataset."""
    collate_fn = collate_images if isinstance(dataset, ImageDataset) else None
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn, **options)


def load_all(loader: DataLoader) -> None:
    """One pass through all images."""
    for _ in loader:
        pass


def measure_waiting(loader: DataLoader, step_seconds: float, num_batches: int) -> tuple[float, float]:
    """
    Take batches as an accelerator does that needs `step_seconds` for each of them.

    Args:
        loader (`DataLoader`): Of at least `num_batches` + 1 batches. The first one is not counted.

    Returns:
        `tuple` of two `float`: batches per second, and the share of time without a batch.
    """
    batches, waited = iter(loader), 0.0
    next(batches)
    started = time.perf_counter()
    for _ in range(num_batches):
        time.sleep(step_seconds)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    seconds = time.perf_counter() - started
    return num_batches / seconds, waited / seconds


def measure_all_waiting(source: Source, args: DataBenchmarkArguments) -> list[dict[str, Any]]:
    """Images per second and share of waiting, by workers and step, of the `WAITING` in turn."""
    cases = []
    num_samples = (args.num_batches + 1) * args.batch_size
    for num_workers in args.num_workers:
        loaders = {}
        for name in WAITING:
            sampler = RandomSampler(source.contestants[name], num_samples=num_samples)
            loaders[name] = build_loader(
                source.contestants[name],
                args.batch_size,
                sampler=sampler,
                num_workers=num_workers,
                persistent_workers=True,
            )
        for milliseconds in args.step_milliseconds:
            results = {name: [] for name in WAITING}
            for i in range(args.rounds):
                for name in WAITING if i % 2 == 0 else reversed(WAITING):
                    results[name].append(measure_waiting(loaders[name], milliseconds / 1000, args.num_batches))
            cases.append(
                {
                    "num_workers": num_workers,
                    "step_milliseconds": milliseconds,
                    "images_per_second": {
                        name: asdict(Spread.of([args.batch_size * rate for rate, _ in results[name]]))
                        for name in WAITING
                    },
                    "share_of_waiting": {
                        name: asdict(Spread.of([share for _, share in results[name]])) for name in WAITING
                    },
                }
            )
    return cases


def source_rows(name: str, source: Source, timings: Timings) -> list[list[object]]:
    """Rows of the first table."""
    rows = []
    for contestant in timings.seconds:
        rate = timings.rate(contestant)
        row = [name, contestant, rate, f"{1000 / rate.median:.1f}", timings.ratio(contestant, "image_folder")]
        error = source.errors.get(contestant)
        if error is None:
            row += ["", "", ""]
        elif error["max"] == 0:
            row += [0, 0, "identical"]
        else:
            row += [error["max"], f"{error['mean']:.3f}", f"{error['psnr']:.1f} ({error['worst_psnr']:.1f})"]
        rows.append(row)
    return rows


def waiting_rows(cases: list[dict[str, Any]], batch_size: int) -> list[list[object]]:
    """Rows of the second table."""
    rows = []
    for case in cases:
        milliseconds = case["step_milliseconds"]
        demand = f"{1000 * batch_size / milliseconds:.0f}" if milliseconds > 0 else "all"
        row = [case["num_workers"], f"{milliseconds:g}", demand]
        for name in WAITING:
            rate, share = case["images_per_second"][name]["median"], case["share_of_waiting"][name]["median"]
            row.append(f"{rate:.0f}, {share:.0%}")
        rows.append(row)
    return rows


def main(args: DataBenchmarkArguments) -> None:
    check_output_dir(args.output_dir)
    torch.set_num_threads(1)  # as in a worker process of a DataLoader
    rows, ratios, measurements = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        # 1. The files
        if args.train_data_dir is not None:
            folders = {"folder": Path(args.train_data_dir)}
        else:
            folders = {size: Path(folder, size) for size in args.image_sizes}
            for size, target in folders.items():
                width, height = map(int, size.split("x"))
                write_photographs(target, (width, height), args.num_images, args.jpeg_quality)
        sources = {
            name: load_source(path, str(Path(folder, "cache")), args)
            for name, path in tqdm(folders.items(), desc="compare pixels", leave=False)
        }

        # 2. On one core
        for name, source in tqdm(sources.items(), desc="one core", leave=False):
            loaders = {key: build_loader(dataset, args.batch_size) for key, dataset in source.contestants.items()}
            passes = {key: Contestant(partial(load_all, loaders[key]), len(loaders[key].dataset)) for key in loaders}
            timings = time_in_turn(passes, args.rounds, torch.device("cpu"), clock=time.process_time)
            rows += source_rows(name, source, timings)
            for contestant in OPTIONS:
                ratios[f"{name}.{contestant}.vs_image_folder"] = timings.ratio(contestant, "image_folder")
            measurements[name] = {
                "bytes_per_file": source.bytes_per_file,
                "pixel_errors": source.errors,
                "images_per_second": {contestant: asdict(timings.rate(contestant)) for contestant in timings.seconds},
                "seconds": timings.seconds,
            }

        # 3. With worker processes, for an accelerator that takes its time
        first = next(iter(sources))
        waiting = measure_all_waiting(sources[first], args)
    measurements["waiting"] = {"images": first, "cases": waiting}

    header = ["images", "contestant", "images/s on one core", "cores for 1000 images/s", "times `image_folder`"]
    header += ["largest error", "mean error", "PSNR, dB (worst image)"]
    table = markdown_table(header, rows) + "\n"
    header = ["workers", "ms for a batch", "images/s that it could take"]
    header += [f"`{name}`: images/s, waiting" for name in WAITING]
    table += f"An accelerator that takes {args.batch_size} images of {first} in a batch:\n\n"
    table += markdown_table(header, waiting_rows(waiting, args.batch_size))
    write_report(args.output_dir, "data", table, ratios, asdict(args), measurements)


if __name__ == "__main__":
    sys.exit(main(parse_args(DataBenchmarkArguments)))
