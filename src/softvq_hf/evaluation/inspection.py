"""Pictures of the latent space of a tokenizer: what it keeps, what each token does, and how latents are spread."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch.utils.data import Dataset

from softvq_hf.evaluation.accelerator import build_accelerator
from softvq_hf.evaluation.arguments import EvaluationDataArguments, TokenizerArguments
from softvq_hf.evaluation.data import image_batches, to_8_bit, unreadable_notes
from softvq_hf.evaluation.latent_edits import choose_tokens, interpolate, spatial_extent, token_influence
from softvq_hf.evaluation.plots import (
    channel_figure,
    codebook_figure,
    influence_figure,
    interpolation_figure,
    projection_figure,
    reconstruction_figure,
)
from softvq_hf.evaluation.reference import ADM_CENTER_CROP
from softvq_hf.evaluation.result import build_result, write_result
from softvq_hf.evaluation.tokens import (
    check_finite,
    choose_resolution,
    codebook_usage,
    decode_tokens,
    encode_tokens,
)
from softvq_hf.metrics.codebook_usage import CodebookUsage
from softvq_hf.metrics.latent_statistics import LatentStatistics
from softvq_hf.metrics.psnr import PSNR
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.arguments import check_output_dir


logger = get_logger(__name__)

TEMPLATE = Path(__file__).parent / "templates" / "inspection.html"
PROJECTIONS = ("pca", "tsne")
PICTURES = (
    *("reconstructions.png", "influence_dropped.png", "influence_swapped.png", "interpolation.png", "channels.png"),
    *("codebook.png", "projection.png"),
)
DEFAULT_LABEL_COLUMN = "label"
REPORT_FILE, RESULT_FILE = "report.html", "result.json"


@dataclass(kw_only=True)
class InspectionArguments(TokenizerArguments, EvaluationDataArguments):
    """Arguments of [`inspect_tokenizer`]. `__post_init__` raises `ValueError` for values that cannot work."""

    output_dir: str = field(metadata={"help": "Folder for the report, its pictures and its numbers."})
    label_column: str = field(
        default=DEFAULT_LABEL_COLUMN,
        metadata={"help": "Column of the class labels, which images may lack by default; none for no labels."},
    )
    max_samples: int | None = field(
        default=1000, metadata={"help": "Encode only this many images, spread evenly over the data set."}
    )
    num_images: int = field(
        default=8, metadata={"help": "Images in the pictures, drawn from the encoded ones; neighbours make a pair."}
    )
    num_tokens: int = field(
        default=64,
        metadata={"help": "Tokens to drop and to swap, each in --num_images images; of more tokens, evenly spread."},
    )
    num_interpolation_steps: int = field(default=7, metadata={"help": "Images of a strip, both ends included."})
    projection: str = field(
        default="pca", metadata={"help": "From pooled latents to two dimensions.", "choices": list(PROJECTIONS)}
    )
    batch_size: int = field(default=32, metadata={"help": "Images per forward pass."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of images, and of t-SNE."})

    def __post_init__(self) -> None:
        TokenizerArguments.__post_init__(self)
        EvaluationDataArguments.__post_init__(self)
        lowest = {"num_images": 2, "num_tokens": 1, "num_interpolation_steps": 2, "batch_size": 1, "seed": 0}
        for name, minimum in lowest.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from {minimum} on.")
        if self.seed >= 2**32:
            raise ValueError(f"`--seed` is {self.seed}, allowed: up to {2**32 - 1}.")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"`--projection` is {self.projection!r}, allowed: {', '.join(PROJECTIONS)}.")


@dataclass
class EncodedImages:
    """
    Latents of the readable images of a data set.

    Args:
        latents (`torch.Tensor` of shape `(N, L, C)`): Raw latents, float32 on the CPU.
        numbers (`torch.Tensor` of shape `(N,)`): Numbers of the images in the data set, int64.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*): int64; `None` without labels.
        codebook ([`CodebookUsage`], *optional*): Has seen the indices of all images; `None` without a codebook.
        unreadable (`list[str]`): Ids of the other images.
    """

    latents: torch.Tensor
    numbers: torch.Tensor
    class_labels: torch.Tensor | None
    codebook: CodebookUsage | None
    unreadable: list[str]


@torch.no_grad()
def inspect_tokenizer(args: InspectionArguments) -> Path:
    """
    Look at a tokenizer: encode images, draw pictures of their latents, and write a report. One process.

    Images are cropped by the ADM centre crop (arXiv 2105.05233). Latents are raw and not drawn: posteriors give their
    mode. `args.output_dir` gets, earlier files of these names being replaced:

    - `reconstructions.png`: originals, reconstructions, absolute errors and the PSNR of each;
    - `influence_dropped.png` and `influence_swapped.png`: which pixels change when a token is replaced by its mean
      over all images, or by the token of another image; see [`token_influence`];
    - `interpolation.png`: what is decoded from latents on the straight line between those of two images;
    - `codebook.png` ("softvq" and "vq"): how often each codeword is chosen;
    - `projection.png` (from two channels on): latents, averaged over tokens, in two dimensions, by class;
    - `channels.png`: mean, standard deviation and kurtosis of each channel;
    - `result.json`: the numbers, as [`build_result`] gives them, with the tables `reconstructions`, `influence`,
      `latents` and, where there is one, `codebook`;
    - `report.html`: all of it on a page that needs nothing but the pictures beside it.

    Memory: latents of all images, 8 MB for 1000 of 64 tokens with 32 channels, and the influence maps,
    `num_images * num_tokens * resolution**2 * 4` bytes, 134 MB for 8 images of 64 tokens at 256 pixels.

    Args:
        args ([`InspectionArguments`]): The model, the images, and what to draw.

    Returns:
        `Path`: of `report.html`.

    Raises:
        ValueError: If an argument does not fit the model or the data, there are fewer readable images than pictures,
            several processes were launched, or latents or decoded images are not finite (the images are named).
        OSError: If the model cannot be found.
        UnreadableImagesError: If too many images cannot be read.
    """
    check_output_dir(args.output_dir)
    output_dir = Path(args.output_dir)
    accelerator = build_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes were launched to inspect a model, allowed: 1.")

    # 1. The tokenizer, the latents of all images, and the images to look at
    vae = args.load_tokenizer().to(accelerator.device)
    resolution = choose_resolution(vae, args.resolution)
    dataset, notes = load_labelled_images(args, resolution)
    encoded = encode_images(
        accelerator, vae, dataset, batch_size=args.batch_size, num_workers=args.dataloader_num_workers
    )
    num_encoded, num_tokens, num_channels = encoded.latents.shape
    if num_encoded < args.num_images:
        raise ValueError(
            f"`--num_images` is {args.num_images}, allowed: up to the number of readable images, {num_encoded}."
        )
    chosen = torch.randperm(num_encoded, generator=torch.Generator().manual_seed(args.seed))[: args.num_images]
    items = [dataset[number] for number in encoded.numbers[chosen].tolist()]
    image_id = [str(item["image_id"]) for item in items]
    originals = to_8_bit(torch.stack([item["pixel_values"] for item in items]), "round")
    latents = encoded.latents[chosen]
    decode = partial(decode_grey_levels, vae, resolution=resolution, batch_size=args.batch_size)

    for name in (*PICTURES, RESULT_FILE, REPORT_FILE):  # not all are made of every tokenizer
        Path(output_dir, name).unlink(missing_ok=True)

    # 2. Reconstructions
    reconstructions = decode(latents, image_id).round().byte()
    psnr = PSNR().measure(reconstructions, originals).tolist()
    figure = reconstruction_figure(originals, reconstructions, psnr)
    figure.savefig(output_dir / "reconstructions.png")

    # 3. What a token does: without it, and with that of the next image
    tokens = choose_tokens(num_tokens, args.num_tokens, is_grid=isinstance(vae, AutoencoderKL))
    influence = {}
    for change, replacements in (
        ("dropped", encoded.latents.mean(0).expand_as(latents)),
        ("swapped", latents.roll(-1, dims=0)),
    ):
        maps = token_influence(decode, latents, replacements, tokens, image_id, desc=f"tokens {change}")
        influence[change] = asdict(spatial_extent(maps))
        figure = influence_figure(originals[0], maps[0], maps.mean(0), tokens, len(maps))
        figure.savefig(output_dir / f"influence_{change}.png")

    # 4. Between images
    num_pairs = args.num_images // 2
    first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
    path = interpolate(latents[first], latents[second], args.num_interpolation_steps)
    names = [
        f"step {step} from {start} to {end}"
        for start, end in zip(image_id[first], image_id[second], strict=True)
        for step in range(args.num_interpolation_steps)
    ]
    strips = decode(path.flatten(0, 1), names).unflatten(0, path.shape[:2]).round().byte()
    interpolation_figure(originals[first], strips, originals[second]).savefig(output_dir / "interpolation.png")

    # 5. How the latents of all images are spread
    latent_statistics = LatentStatistics(flat=False)
    latent_statistics.add_batch(predictions=encoded.latents)
    statistics = latent_statistics.compute()
    channel_figure(statistics).savefig(output_dir / "channels.png")
    figures = {name: statistics[name] for name in ("latent_mean", "latent_std", "latent_kurtosis", "effective_rank")}
    details: dict[str, Any] = {"latents": statistics}
    if encoded.codebook is not None:
        counts = encoded.codebook.accumulators["counts"].counts
        details["codebook"] = encoded.codebook.compute()
        figures |= {name: details["codebook"][name] for name in ("codebook_usage", "codebook_perplexity")}
        codebook_figure(counts, details["codebook"]).savefig(output_dir / "codebook.png")
    if num_channels > 1:
        points, axis_names = project(encoded.latents.mean(1), args.projection, args.seed)
        figure = projection_figure(points, axis_names, encoded.class_labels, dataset.id2label)
        figure.savefig(output_dir / "projection.png")

    # 6. The record and the report
    result = build_result(
        accelerator,
        task="latent-inspection",
        model=args.model,
        dataset=args.data_record(),
        metrics=figures,
        protocol={
            "name": f"{num_encoded} images, {ADM_CENTER_CROP} to {resolution} px",
            "num_images": num_encoded,
            "crop": ADM_CENTER_CROP,
            "resolution": resolution,
            "latents": "raw and deterministic: the mode of a posterior",
            "projection": args.projection,
            "scikit-learn": importlib.metadata.version("scikit-learn"),
            "seed": args.seed,
        },
        notes=[*notes, *unreadable_notes(encoded.unreadable)],
        reconstructions={"image_id": image_id, "psnr": psnr},
        influence={"tokens": tokens, **influence},
        **details,
    )
    write_result(result, output_dir / RESULT_FILE)
    write_report(result, vae, num_tokens, output_dir)
    return output_dir / REPORT_FILE


def load_labelled_images(args: InspectionArguments, resolution: int) -> tuple[Dataset, list[str]]:
    """
    The images, with class labels unless there are none in the default column.

    Args:
        args ([`InspectionArguments`]): Which images, and the column of their labels.
        resolution (`int`): Side of the square images in pixels.

    Returns:
        `tuple`: the data set, and what the notes of the record say about its labels.

    Raises:
        ValueError: As [`softvq_hf.data.load_image_dataset`].
    """
    if args.label_column.lower() == "none":
        return args.load_dataset(resolution), []
    try:
        return args.load_dataset(resolution, label_column=args.label_column), []
    except ValueError as error:
        dataset = args.load_dataset(resolution)  # what is wrong with more than the labels is an error here, too
        if args.label_column != DEFAULT_LABEL_COLUMN:
            raise ValueError(f"{error} For an inspection that is `--label_column none`.") from error
        name = args.data_record()["name"]
        note = f"No classes: {name} has no usable labels in a column 'label', or in one of a usual name."
        logger.warning(f"{note} `--label_column` names another one.")
        return dataset, [note]


def encode_images(
    accelerator: Accelerator,
    vae: AutoencoderSoftVQ | AutoencoderKL,
    dataset: Dataset,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> EncodedImages:
    """
    Encode a data set, with a progress bar.

    Args:
        accelerator (`Accelerator`): Names the device; of one process.
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        dataset (`Dataset`): From [`softvq_hf.data.load_image_dataset`] with `train=False`.
        batch_size (`int`): Images per forward pass.
        num_workers (`int`, *optional*, defaults to 0): Loader processes.

    Returns:
        [`EncodedImages`]

    Raises:
        ValueError: If no image can be read, or latents are not finite.
    """
    codebook = codebook_usage(vae)
    latents, numbers, class_labels, unreadable = [], [], [], []
    for batch in image_batches(accelerator, dataset, batch_size, num_workers=num_workers, desc="latents"):
        unreadable += batch.get("unreadable", [])
        if len(batch["indices"]) == 0:
            continue
        batch_latents, codewords = encode_tokens(vae, batch["pixel_values"])
        check_finite(batch_latents, "latents", batch["image_id"])
        latents.append(batch_latents.float().cpu())
        numbers.append(batch["indices"])
        if "class_labels" in batch:
            class_labels.append(batch["class_labels"])
        if codebook is not None:
            codebook.add_batch(predictions=codewords)
    if not latents:
        raise ValueError("None of the images of `--dataset` can be read.")
    return EncodedImages(
        torch.cat(latents),
        torch.cat(numbers),
        torch.cat(class_labels) if class_labels else None,
        codebook,
        unreadable,
    )


def decode_grey_levels(
    vae: AutoencoderSoftVQ | AutoencoderKL,
    latents: torch.Tensor,
    image_id: Sequence[str],
    *,
    resolution: int,
    batch_size: int,
) -> torch.Tensor:
    """
    Images of latents.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        latents (`torch.Tensor` of shape `(N, L, C)`): Raw latents on any device.
        image_id (`Sequence[str]` of length N): What they are, for the error.
        resolution (`int`): Side R of the square images in pixels.
        batch_size (`int`): Latents per forward pass.

    Returns:
        `torch.Tensor` of shape `(N, 3, R, R)`: float32 in [0, 255], clamped, not rounded, on the CPU.

    Raises:
        ValueError: If pixels are not finite. It names the images.
    """
    samples = torch.cat(
        [decode_tokens(vae, batch.to(vae.device), resolution).float().cpu() for batch in latents.split(batch_size)]
    )
    check_finite(samples, "decoded images", image_id)  # clamped, infinite ones would be black or white
    return (samples.clamp(-1, 1) + 1) * 127.5


def project(latents: torch.Tensor, projection: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """
    Vectors in two dimensions, by scikit-learn.

    Args:
        latents (`torch.Tensor` of shape `(N, C)`): N and C from 2 on.
        projection (`str`): "pca" (the two directions of most variance), or "tsne" (neighbours stay neighbours, other
            distances mean nothing; perplexity 30, or a third of N - 1 where that is less).
        seed (`int`): Of t-SNE.

    Returns:
        `tuple`: points `(N, 2)`, and what the axes are.
    """
    if projection == "pca":
        pca = PCA(n_components=2, svd_solver="full")
        with np.errstate(invalid="ignore"):  # no variance at all: shares of 0 / 0
            points = pca.fit_transform(latents.double().numpy())
        shares = np.nan_to_num(pca.explained_variance_ratio_)
        return points, tuple(f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    tsne = TSNE(perplexity=min(30.0, (len(latents) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(latents.numpy()), ("t-SNE, first axis", "t-SNE, second axis")


def write_report(
    result: dict[str, Any], vae: AutoencoderSoftVQ | AutoencoderKL, num_tokens: int, output_dir: Path
) -> None:
    """
    The page that shows the pictures in `output_dir`.

    Args:
        result (`dict`): The record, from [`inspect_tokenizer`].
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): Tells what does not apply.
        num_tokens (`int`): Tokens of an image.
        output_dir (`Path`): The folder.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    report = environment.get_template(TEMPLATE.name).render(
        result=result,
        result_file=RESULT_FILE,
        num_tokens=num_tokens,
        num_channels=vae.config.latent_channels,
        is_grid=isinstance(vae, AutoencoderKL),
        quantizer=vae.config.get("quantizer", "kl"),
    )
    (output_dir / REPORT_FILE).write_text(report, encoding="utf-8")
