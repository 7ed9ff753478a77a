"""Show on real images that the figures of `softvq_hf.metrics` behave: the more is lost, the worse they are.

    python benchmarks/tiny_classifier.py --dataset path/to/tiny-imagenet --output_dir outputs/tiny_classifier
    python benchmarks/metric_behaviour.py --dataset path/to/tiny-imagenet --split validation \\
        --feature_extractor outputs/tiny_classifier --output_dir outputs/metric_behaviour \\
        --tokenizers outputs/tokens_64 outputs/tokens_16 outputs/tokens_4

The images of a split are degraded step by step, by Gaussian blur, Gaussian noise, JPEG, and by tokenizers of fewer and
fewer tokens, and measured:

- PSNR and SSIM against the same originals, pixel by pixel.
- Fréchet distances between the features of all degraded images and all originals, as for reconstructions.
- Kernel distance, precision and recall between one half of the degraded images and the other half of the originals,
  drawn at random. They take the two sets for independent draws: with the same images on both sides the kernel distance
  is negative for little loss, and each image is found in the neighbourhood of its own original.

`--output_dir` gets `behaviour.json`, `behaviour.md` (a table) and `behaviour.png`. The exit status is 1, and a line
names what is wrong, unless in every series

- PSNR and SSIM fall and the Fréchet distances rise from each step to the next;
- at the last step the kernel distance is above that of the originals, and the lower one of precision and recall below.

The other figures need not change in one direction at every step. The kernel distance of two halves scatters around 0
for little loss (`kernel_distance_std` in the JSON file tells how much). Precision alone does not see blur: blurred
images crowd together inside of the neighbourhoods that it is counted in, and it is recall that falls.

The features of the originals and of one step are held in memory: 4 (D + S) bytes for an image with D features and S
spatial ones, 1.5 kB with benchmarks/tiny_classifier.py.
"""

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from diffusers import AutoencoderKL
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from softvq_hf.data import collate_images
from softvq_hf.evaluation.accelerator import build_accelerator
from softvq_hf.evaluation.arguments import EvaluationDataArguments
from softvq_hf.evaluation.data import to_8_bit
from softvq_hf.evaluation.tokens import check_finite, decode_tokens, encode_tokens
from softvq_hf.metrics import PSNR, SSIM, FrechetDistance, KernelDistance, PrecisionRecall
from softvq_hf.metrics.features import FeatureExtractor, load_feature_extractor
from softvq_hf.metrics.images import to_uint8
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.generator import get_image_size, get_latent_shape, load_tokenizer
from softvq_hf.training.logging import library_versions


# From mild to strong. Blur: standard deviation in 1/64 of the side of the image. Noise: standard deviation, images in
# [0, 1]. JPEG: quality as libjpeg counts it.
BLUR = (0.5, 0.75, 1, 2)
NOISE = (0.02, 0.05, 0.1, 0.2)
JPEG = (50, 25, 10, 5)

# What falls from each step to the next (-1) or rises (+1).
DIRECTIONS = {"psnr": -1, "ssim": -1, "frechet_distance": 1, "spatial_frechet_distance": 1}

Degradation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(kw_only=True)
class MetricBehaviourArguments(EvaluationDataArguments):
    """Arguments of this script besides those on where the images are."""

    feature_extractor: str = field(
        metadata={"help": "Network of the features: inception, or a folder or Hub id of a convolutional one."}
    )
    output_dir: str = field(metadata={"help": "Folder for behaviour.json, behaviour.md and behaviour.png."})
    resolution: int = field(default=64, metadata={"help": "Side of the square images in pixels."})
    tokenizers: list[str] = field(
        default_factory=list, metadata={"help": "Folders of tokenizers with different numbers of tokens; optional."}
    )
    batch_size: int = field(default=100, metadata={"help": "Images at a time."})
    kernel_subset_size: int = field(
        default=1000, metadata={"help": "Images in a subset of the kernel distance; at most half of all."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noise, the halves and the subsets."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"`--batch_size` is {self.batch_size}, allowed: integers from 1 on.")


def gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur 8-bit images `(B, 3, R, R)` by a standard deviation of `sigma` / 64 of their side."""
    sigma = sigma * images.shape[-1] / 64
    kernel_size = 2 * math.ceil(3 * sigma) + 1
    horizontal = F.gaussian_blur(images / 255, kernel_size=[kernel_size, 1], sigma=sigma)
    return to_uint8(F.gaussian_blur(horizontal, kernel_size=[1, kernel_size], sigma=sigma))


def gaussian_noise(images: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """Add noise of standard deviation `std` to 8-bit images `(B, 3, R, R)`, taken as numbers in [0, 1]."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)  # the same on every device
    return to_uint8(images / 255 + std * noise)


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """8-bit images `(B, 3, R, R)` through JPEG files of Pillow."""
    decoded = []
    for image in images.cpu():
        file = io.BytesIO()
        F.to_pil_image(image).save(file, format="JPEG", quality=quality)
        decoded.append(F.pil_to_tensor(PIL.Image.open(file)))
    return torch.stack(decoded).to(images.device)


@torch.no_grad()
def reconstruct(images: torch.Tensor, tokenizer: AutoencoderSoftVQ | AutoencoderKL) -> torch.Tensor:
    """8-bit images `(B, 3, R, R)` through a tokenizer."""
    latents, _ = encode_tokens(tokenizer, images / 127.5 - 1)
    sample = decode_tokens(tokenizer, latents, images.shape[-1])
    check_finite(sample, "reconstructions", [f"image {i} of a batch" for i in range(len(images))])
    return to_8_bit(sample, "round")


def load_tokenizers(
    folders: list[str], resolution: int, device: torch.device
) -> dict[int, AutoencoderSoftVQ | AutoencoderKL]:
    """Tokenizers by their number of tokens, most tokens first."""
    tokenizers = {}
    for folder in folders:
        tokenizer = load_tokenizer(folder).to(device)
        height, width = get_image_size(tokenizer)
        if (height, width) != (resolution, resolution):
            raise ValueError(
                f"`--tokenizers` has {folder!r}, which takes images of {height} x {width} pixels, allowed: those of"
                f" `--resolution`, {resolution} x {resolution}."
            )
        num_tokens = math.prod(get_latent_shape(tokenizer, resolution)) // tokenizer.config.latent_channels
        if num_tokens in tokenizers:
            raise ValueError(
                f"`--tokenizers` has {folder!r}, a second one of {num_tokens} tokens, allowed: one of each number."
            )
        tokenizers[num_tokens] = tokenizer
    return dict(sorted(tokenizers.items(), reverse=True))


def build_series(
    tokenizers: dict[int, AutoencoderSoftVQ | AutoencoderKL], seed: int
) -> dict[str, dict[str, Degradation]]:
    """Degradations by series and step, from mild to strong. The noise is the same at all its steps, only stronger."""
    series = {
        "Gaussian blur": {f"σ {sigma:g}": partial(gaussian_blur, sigma=sigma) for sigma in BLUR},
        "Gaussian noise": {
            f"σ {std:g}": partial(gaussian_noise, std=std, generator=torch.Generator().manual_seed(seed))
            for std in NOISE
        },
        "JPEG": {f"quality {quality}": partial(jpeg, quality=quality) for quality in JPEG},
    }
    if tokenizers:
        series["tokenizer"] = {
            f"{num_tokens} tokens": partial(reconstruct, tokenizer=tokenizer)
            for num_tokens, tokenizer in tokenizers.items()
        }
    return series


class Originals:
    """
    The images of a split and their features, which every step is compared with.

    Args:
        args ([`MetricBehaviourArguments`]): Where the images are.
        extractor ([`FeatureExtractor`]): Computes the features.
        device (`torch.device`): Where images and `extractor` are. The features are kept on the CPU.
    """

    def __init__(self, args: MetricBehaviourArguments, extractor: FeatureExtractor, device: torch.device):
        self.device = device
        self.dataloader = DataLoader(
            args.load_dataset(args.resolution),
            batch_size=args.batch_size,
            collate_fn=collate_images,
            num_workers=args.dataloader_num_workers,
        )
        features = [extractor(images) for images in self.batches()]
        self.features = torch.cat([batch.features.cpu() for batch in features])
        self.spatial_features = torch.cat([batch.spatial_features.cpu() for batch in features])

    def batches(self) -> Iterator[torch.Tensor]:
        """8-bit images, `(B, 3, R, R)`."""
        for batch in self.dataloader:
            yield to_8_bit(batch["pixel_values"], "round").to(self.device)


def measure(
    degradation: Degradation, originals: Originals, extractor: FeatureExtractor, args: MetricBehaviourArguments
) -> dict[str, float]:
    """All figures of one step."""
    psnr, ssim = PSNR(), SSIM()
    extracted = []
    for images in originals.batches():
        degraded = degradation(images)
        psnr.add_batch(predictions=degraded, references=images)
        ssim.add_batch(predictions=degraded, references=images)
        extracted.append(extractor(degraded))
    features = torch.cat([batch.features.cpu() for batch in extracted])
    spatial_features = torch.cat([batch.spatial_features.cpu() for batch in extracted])

    same_images = {"predictions": features, "references": originals.features}
    same_images_spatial = {"predictions": spatial_features, "references": originals.spatial_features}
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(args.seed))
    half = len(features) // 2
    other_images = {"predictions": features[order[:half]], "references": originals.features[order[half:]]}
    kernel_distance = KernelDistance(subset_size=args.kernel_subset_size, seed=args.seed).compute(**other_images)
    precision_recall = PrecisionRecall().compute(**other_images)
    return {
        "psnr": psnr.compute()["psnr"],
        "ssim": ssim.compute()["ssim"],
        "frechet_distance": FrechetDistance().compute(**same_images)["frechet_distance"],
        "spatial_frechet_distance": FrechetDistance().compute(**same_images_spatial)["frechet_distance"],
        "kernel_distance": kernel_distance["kernel_distance"],
        "kernel_distance_std": kernel_distance["kernel_distance_std"],
        "precision": precision_recall["precision"],
        "recall": precision_recall["recall"],
    }


def find_violations(results: dict[str, dict[str, dict[str, float]]], undegraded: dict[str, float]) -> list[str]:
    """
    Where a figure does not get worse.

    Args:
        results (`dict`): Figures by series and step, from mild to strong.
        undegraded (`dict[str, float]`): Figures of the originals, compared with themselves.

    Returns:
        `list[str]`: one line for each; empty if all is as it has to be.
    """
    violations = []
    for series, steps in results.items():
        path = {"originals": undegraded, **steps}
        names = list(path)
        for figure, direction in DIRECTIONS.items():
            for before, after in zip(names, names[1:], strict=False):
                if not direction * (path[after][figure] - path[before][figure]) > 0:
                    violations.append(
                        f"{series}: {figure} is {path[before][figure]:.6g} at {before} and {path[after][figure]:.6g}"
                        f" at {after}"
                    )
        last = path[names[-1]]
        if not last["kernel_distance"] > undegraded["kernel_distance"]:
            violations.append(
                f"{series}: kernel_distance is {undegraded['kernel_distance']:.6g} at originals and"
                f" {last['kernel_distance']:.6g} at {names[-1]}"
            )
        if not min(last["precision"], last["recall"]) < min(undegraded["precision"], undegraded["recall"]):
            violations.append(
                f"{series}: precision and recall are {undegraded['precision']:.6g} and {undegraded['recall']:.6g} at"
                f" originals and {last['precision']:.6g} and {last['recall']:.6g} at {names[-1]}"
            )
    return violations


def without_infinity(
    results: dict[str, dict[str, dict[str, float]]], notes: list[str]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """The figures as JSON has them, `None` for those that are not finite, which `notes` name."""
    written = {}
    for series, steps in results.items():
        written[series] = {step: dict(figures) for step, figures in steps.items()}
        for step, figures in written[series].items():
            for figure, value in figures.items():
                if not math.isfinite(value):
                    figures[figure] = None
                    notes.append(f"{figure} of {f'{series} {step}'.strip()} is {value}, which JSON has as null.")
    return written


def figure_titles(label: str) -> dict[str, str]:
    """What the figures are called in the table and the picture; the distances carry the name of their network."""
    return {
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "frechet_distance": f"FD ({label})",
        "spatial_frechet_distance": f"spatial FD ({label})",
        "kernel_distance": f"kernel distance ({label})",
        "precision": f"precision ({label})",
        "recall": f"recall ({label})",
    }


def to_table(
    results: dict[str, dict[str, dict[str, float]]], undegraded: dict[str, float], titles: dict[str, str]
) -> str:
    """Markdown: one line per step."""
    lines = ["| | | " + " | ".join(titles.values()) + " |", "|---|---|" + "---|" * len(titles)]
    for series, steps in {"originals": {"": undegraded}, **results}.items():
        for step, figures in steps.items():
            values = [f"{figures[figure]:.4g}" for figure in titles]
            lines.append(f"| {series} | {step} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, dict[str, float]]], titles: dict[str, str], path: Path) -> None:
    """One panel per figure, one line per series; distances on a logarithmic axis."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        for (series, steps), marker in zip(results.items(), "osD^", strict=False):
            values = [figures[name] for figures in steps.values()]
            axis.plot(range(1, len(values) + 1), values, marker=marker, label=f"{series}:\n{', '.join(steps)}")
        if name.endswith("distance"):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step, from mild to strong")
        axis.set_xticks(range(1, max(map(len, results.values())) + 1))
        axis.grid(which="both", alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, labels, loc="center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def main(args: MetricBehaviourArguments) -> int:
    """Measure, write the result, and return the exit status: 1 if something does not behave."""
    check_output_dir(args.output_dir)
    started = time.perf_counter()
    device = build_accelerator().device
    extractor = load_feature_extractor(args.feature_extractor).to(device)
    if extractor.num_spatial_features is None:
        raise ValueError(
            f"`--feature_extractor` is {args.feature_extractor!r}, which has no spatial features, allowed: inception"
            " and convolutional networks."
        )
    series = build_series(load_tokenizers(args.tokenizers, args.resolution, device), args.seed)
    originals = Originals(args, extractor, device)

    undegraded = measure(lambda images: images, originals, extractor, args)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tqdm(total=sum(map(len, series.values())), unit="step") as progress:
        for name, steps in series.items():
            results[name] = {}
            for step, degradation in steps.items():
                progress.set_description(f"{name}, {step}")
                results[name][step] = measure(degradation, originals, extractor, args)
                progress.update()

    violations = find_violations(results, undegraded)
    titles = figure_titles(extractor.label)
    table = to_table(results, undegraded, titles)
    output_dir = Path(args.output_dir)
    (output_dir / "behaviour.md").write_text(table, encoding="utf-8")
    plot(results, titles, output_dir / "behaviour.png")
    notes = []
    record = {
        "figures": without_infinity({"originals": {"": undegraded}, **results}, notes),
        "violations": violations,
        "notes": notes,
        "num_images": len(originals.features),
        "feature_extractor": {"label": extractor.label, **extractor.description()},
        "arguments": asdict(args),
        "versions": library_versions(),
        "device": str(device),
        "cpus": os.cpu_count(),
        "seconds": time.perf_counter() - started,
        "command": sys.argv,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    (output_dir / "behaviour.json").write_text(text + "\n", encoding="utf-8")
    print(table)
    for violation in violations:
        print(violation, file=sys.stderr)
    return int(len(violations) > 0)


if __name__ == "__main__":
    sys.exit(main(parse_args(MetricBehaviourArguments)))
