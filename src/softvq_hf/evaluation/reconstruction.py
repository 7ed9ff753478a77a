"""How well a tokenizer keeps images: reconstruct a data set and compare, pixel by pixel and as distributions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from softvq_hf.evaluation.arguments import EvaluationArguments, EvaluationDataArguments
from softvq_hf.evaluation.data import image_batches, to_8_bit
from softvq_hf.evaluation.distribution import DistributionMetrics, name_figures
from softvq_hf.evaluation.feature_extractors import load_feature_extractors
from softvq_hf.evaluation.reference import ADM_CENTER_CROP
from softvq_hf.evaluation.result import build_result, check_output_file, update_model_card, write_result
from softvq_hf.evaluation.tokens import check_finite, choose_resolution, decode_tokens, encode_tokens
from softvq_hf.metrics.codebook_usage import CodebookUsage
from softvq_hf.metrics.latent_statistics import LatentStatistics
from softvq_hf.metrics.lpips import LPIPS
from softvq_hf.metrics.psnr import PSNR
from softvq_hf.metrics.rate import rate
from softvq_hf.metrics.ssim import SSIM
from softvq_hf.training.generator import load_tokenizer
from softvq_hf.training.hub import read_model_card


# The effective rank of whole latents needs a matrix of so many numbers squared: 134 MB.
MOST_FLAT_NUMBERS = 4096


@dataclass(kw_only=True)
class ReconstructionArguments(EvaluationDataArguments, EvaluationArguments):
    """Arguments of [`evaluate_reconstruction`]. `__post_init__` raises `ValueError` for values that cannot work."""

    model: str = field(
        metadata={"help": "Tokenizer, AutoencoderSoftVQ or diffusers' AutoencoderKL: a local folder or a Hub id."}
    )
    subfolder: str | None = field(
        default=None, metadata={"help": "Folder of the tokenizer inside of --model: 'vae' in a pipeline."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; by default what the tokenizer takes."}
    )
    lpips: str = field(
        default="vgg", metadata={"help": "Network of LPIPS; none leaves it out.", "choices": ["vgg", "alex", "none"]}
    )

    def __post_init__(self) -> None:
        EvaluationDataArguments.__post_init__(self)
        EvaluationArguments.__post_init__(self)
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"`--resolution` is {self.resolution}, allowed: integers from 1 on.")
        if self.update_model_card and not Path(self.model).is_dir():
            raise ValueError(
                f"`--model` is {self.model!r}, allowed with `--update_model_card`: a local folder that exists."
            )


@torch.no_grad()
def evaluate_reconstruction(args: ReconstructionArguments) -> dict[str, Any]:
    """
    Encode and decode every image of a data set once, and compare. Collective: every process of `accelerate launch`
    calls it.

    Images are cropped by the ADM centre crop (arXiv 2105.05233). Latents are not drawn: posteriors give their mode.
    Originals and reconstructions are compared as 8-bit images. The figures do not depend on the number of processes,
    which see the same batches; the size of batches changes them only as far as it changes the rounding of the network.

    Figures, `None` where they cannot be had (the notes say why):

    - `psnr` (dB) and `ssim`: means over images; see [`PSNR`] and [`SSIM`]. `lpips (vgg)` or `lpips (alex)`: see
      [`LPIPS`].
    - `rfid`, `sfid`, `inception_score`, `kid`, `precision`, `recall` and their like by Inception, and `fd (name)`,
      `spatial_fd (name)` and so on by other networks, the originals being the reference; see [`DistributionMetrics`].
    - `codebook_usage` and `codebook_perplexity` ("softvq" and "vq"): see [`CodebookUsage`].

    Args:
        args ([`ReconstructionArguments`]): The model, the images, and what to measure.

    Returns:
        `dict`: see [`build_result`]; with the tables `latents` ([`LatentStatistics`] of raw latents), `rate` (see
        [`rate`]) and, for "softvq" and "vq", `codebook`. Written to `args.output_file`.

    Raises:
        ValueError: If an argument does not fit the model or the data, there are fewer than two readable images, or
            latents or reconstructions are not finite (the images are named).
        OSError: If the model or weights of a network cannot be found or downloaded.
        UnreadableImagesError: If too many images cannot be read.
    """
    check_output_file(args.output_file)
    # without `cpu` accelerate takes each of several CPU processes for the only one
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)

    # 1. The tokenizer, the images and the networks that look at them
    hub_options = {} if args.subfolder is None else {"subfolder": args.subfolder}
    with accelerator.main_process_first():  # which downloads
        vae = load_tokenizer(args.model, **hub_options).to(accelerator.device)
        resolution = choose_resolution(vae, args.resolution)
        if args.update_model_card:
            read_model_card(args.model, None if args.subfolder else vae)
        dataset = args.load_dataset(resolution)
        extractors = load_feature_extractors(args, accelerator.device)
        image_metrics = {"psnr": PSNR(), "ssim": SSIM()}
        if args.lpips != "none":
            image_metrics["lpips"] = LPIPS(net=args.lpips)
    distributions = [DistributionMetrics(extractor) for extractor in extractors]
    codebook_usage = None
    if vae.config.get("quantizer") in ("softvq", "vq"):
        num_codebooks = vae.config.num_codebooks if vae.config.quantizer == "softvq" else 1
        codebook_usage = CodebookUsage(vae.config.codebook_size, num_codebooks)
    image_rate = rate(vae.config, (resolution, resolution))
    num_numbers = image_rate["tokens_per_image"] * vae.config.latent_channels
    latent_statistics = LatentStatistics(flat=num_numbers <= MOST_FLAT_NUMBERS)

    # 2. Reconstruct, and let every metric look
    unreadable = []
    batches = image_batches(
        accelerator, dataset, args.batch_size, num_workers=args.dataloader_num_workers, desc="reconstructions"
    )
    for batch in batches:
        unreadable += batch.get("unreadable", [])
        if len(batch["indices"]) == 0:
            continue
        with accelerator.autocast():
            latents, indices = encode_tokens(vae, batch["pixel_values"])
            check_finite(latents, "latents", batch["image_id"])
            sample = decode_tokens(vae, latents, resolution)
        check_finite(sample, "reconstructions", batch["image_id"])
        originals = to_8_bit(batch["pixel_values"], "round")  # as they were
        reconstructions = to_8_bit(sample, args.rounding)
        for metric in image_metrics.values():
            metric.add_batch(predictions=reconstructions, references=originals)
        for distribution in distributions:
            distribution.add(predictions=reconstructions, references=originals, indices=batch["indices"])
        latent_statistics.add_batch(predictions=latents)
        if codebook_usage is not None:
            codebook_usage.add_batch(predictions=indices)

    # 3. The figures of all processes
    unreadable = sorted(gather_object(unreadable))
    num_images = len(dataset) - len(unreadable)
    if num_images < 2:
        raise ValueError(f"`--dataset` {args.dataset!r} has {num_images} readable image(s), allowed: 2 or more.")
    figures = {name: metric.compute()[name] for name, metric in image_metrics.items()}
    if args.lpips != "none":
        figures[f"lpips ({args.lpips})"] = figures.pop("lpips")
    results = [distribution.compute() for distribution in distributions]
    figures |= name_figures(results, prefix="r")
    details = {"latents": latent_statistics.compute(), "rate": image_rate}
    if codebook_usage is not None:
        details["codebook"] = codebook_usage.compute()
        figures |= {name: details["codebook"][name] for name in ("codebook_usage", "codebook_perplexity")}
    notes = [note for result in results for note in result["notes"]]
    if unreadable:
        notes.append(f"{len(unreadable)} images could not be read and are left out: {', '.join(unreadable)}.")
    if "effective_rank_flat" not in details["latents"]:
        notes.append(f"No effective rank of whole latents: they have more than {MOST_FLAT_NUMBERS} numbers.")

    # 4. The record
    rounding = "rounded" if args.rounding == "round" else "truncated"
    precision = "" if args.mixed_precision == "no" else f", {args.mixed_precision}"
    result = build_result(
        accelerator,
        task="image-reconstruction",
        model=args.model,
        dataset=args.data_record(),
        metrics=figures,
        protocol={
            "name": f"{num_images} images, {ADM_CENTER_CROP} to {resolution} px, {rounding} to 8 bits{precision}",
            "num_images": num_images,
            "num_unreadable": len(unreadable),
            "crop": ADM_CENTER_CROP,
            "resolution": resolution,
            "latents": "deterministic: the mode of a posterior",
            "rounding": args.rounding,
            "batch_size": args.batch_size,
            "feature_extractors": {extractor.label: extractor.description() for extractor in extractors},
        },
        notes=notes,
        **details,
    )
    if accelerator.is_main_process:
        if args.output_file is not None:
            write_result(result, args.output_file)
        if args.update_model_card:
            update_model_card(args.model, result, None if args.subfolder else vae)
    accelerator.wait_for_everyone()
    return result
