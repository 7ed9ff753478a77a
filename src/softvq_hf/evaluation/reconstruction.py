"""How well a tokenizer keeps images: reconstruct a data set and compare, pixel by pixel and as distributions."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from softvq_hf.data.latents import tokenizer_fingerprint
from softvq_hf.evaluation.accelerator import build_accelerator
from softvq_hf.evaluation.arguments import EvaluationArguments, EvaluationDataArguments, TokenizerArguments
from softvq_hf.evaluation.data import image_batches, to_8_bit, unreadable_notes
from softvq_hf.evaluation.distribution import DistributionMetrics, name_figures
from softvq_hf.evaluation.reference import ADM_CENTER_CROP
from softvq_hf.evaluation.result import build_result, check_output_file, update_model_card, write_result
from softvq_hf.evaluation.tokens import (
    check_finite,
    choose_resolution,
    codebook_usage,
    decode_tokens,
    encode_tokens,
)
from softvq_hf.metrics.latent_statistics import LatentStatistics
from softvq_hf.metrics.lpips import LPIPS
from softvq_hf.metrics.psnr import PSNR
from softvq_hf.metrics.rate import rate
from softvq_hf.metrics.ssim import SSIM
from softvq_hf.metrics.weights import FeatureWeightsUnavailable
from softvq_hf.training.hub import read_model_card


# The effective rank of whole latents needs a matrix of so many numbers squared: 134 MB.
MOST_FLAT_NUMBERS = 4096
LPIPS_NETWORKS = ("vgg", "alex", "none")


@dataclass(kw_only=True)
class ReconstructionArguments(TokenizerArguments, EvaluationDataArguments, EvaluationArguments):
    """Arguments of [`evaluate_reconstruction`]. `__post_init__` raises `ValueError` for values that cannot work."""

    lpips: str = field(
        default="vgg", metadata={"help": "Network of LPIPS; none leaves it out.", "choices": list(LPIPS_NETWORKS)}
    )
    lpips_weights: str | None = field(
        default=None,
        metadata={"help": "File of that network's weights; by default it is downloaded to torch's hub cache."},
    )

    def __post_init__(self) -> None:
        TokenizerArguments.__post_init__(self)
        EvaluationDataArguments.__post_init__(self)
        EvaluationArguments.__post_init__(self)
        if self.lpips not in LPIPS_NETWORKS:
            raise ValueError(f"`--lpips` is {self.lpips!r}, allowed: {', '.join(LPIPS_NETWORKS)}.")
        if self.lpips_weights is not None and self.lpips == "none":
            raise ValueError(f"`--lpips_weights` is {self.lpips_weights!r} and `--lpips` is none, allowed: a network.")
        if self.lpips_weights is not None and not Path(self.lpips_weights).is_file():
            raise ValueError(f"`--lpips_weights` is {self.lpips_weights!r}, allowed: a file that exists.")
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

    - `psnr` (dB) and `ssim`: means over images; see [`PSNR`] and [`SSIM`]. Where some reconstructions equal their
      originals, `psnr` is infinite, and `psnr_of_differing_pairs` is the mean over the others. `lpips (vgg)` or
      `lpips (alex)`: see [`LPIPS`].
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
    accelerator = build_accelerator(args.mixed_precision)

    # 1. The tokenizer, the images and the networks that look at them
    with accelerator.main_process_first():  # which downloads
        vae = args.load_tokenizer().to(accelerator.device)
        resolution = choose_resolution(vae, args.resolution)
        if args.update_model_card:
            read_model_card(args.model, None if args.subfolder else vae)
        dataset = args.load_dataset(resolution)
        extractors = args.load_feature_extractors(accelerator.device)
        image_metrics = {"psnr": PSNR(), "ssim": SSIM()}
        if args.lpips != "none":
            try:
                image_metrics["lpips"] = LPIPS(net=args.lpips, weights_path=args.lpips_weights)
            except FeatureWeightsUnavailable as error:
                raise FeatureWeightsUnavailable(
                    f"{error} For an evaluation that is `--lpips_weights`; `--lpips none` does without."
                ) from error
    distributions = [DistributionMetrics(extractor) for extractor in extractors]
    codebook = codebook_usage(vae)
    image_rate = rate(vae.config, (resolution, resolution))
    num_numbers = image_rate["tokens_per_image"] * vae.config.latent_channels
    latent_statistics = LatentStatistics(flat=num_numbers <= MOST_FLAT_NUMBERS)

    # 2. Reconstruct, and let every metric look
    unreadable = []
    batches = image_batches(
        accelerator, dataset, args.batch_size, num_workers=args.dataloader_num_workers, desc="reconstructions"
    )
    with contextlib.closing(batches):
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
            if codebook is not None:
                codebook.add_batch(predictions=indices)

    # 3. The figures of all processes
    unreadable = gather_object(unreadable)
    num_images = len(dataset) - len(unreadable)
    if num_images < 2:
        raise ValueError(f"`--dataset` {args.dataset!r} has {num_images} readable image(s), allowed: 2 or more.")
    image_results = {name: metric.compute() for name, metric in image_metrics.items()}
    figures = {name: result[name] for name, result in image_results.items()}
    num_identical = image_results["psnr"]["num_identical_pairs"]
    if num_identical > 0:
        figures["psnr_of_differing_pairs"] = image_results["psnr"]["psnr_of_differing_pairs"]
    if args.lpips != "none":
        figures[f"lpips ({args.lpips})"] = figures.pop("lpips")
    results = [distribution.compute() for distribution in distributions]
    figures |= name_figures(results, prefix="r")
    details = {"latents": latent_statistics.compute(), "rate": image_rate}
    if codebook is not None:
        details["codebook"] = codebook.compute()
        figures |= {name: details["codebook"][name] for name in ("codebook_usage", "codebook_perplexity")}
    notes = [*(note for result in results for note in result["notes"]), *unreadable_notes(unreadable)]
    if num_identical > 0:
        notes.append(
            f"{num_identical} of {num_images} reconstructions equal their originals, which makes psnr infinite;"
            " psnr_of_differing_pairs is the mean over the others."
        )
    if "effective_rank_flat" not in details["latents"]:
        notes.append(f"No effective rank of whole latents: they have more than {MOST_FLAT_NUMBERS} numbers.")

    # 4. The record
    result = build_result(
        accelerator,
        task="image-reconstruction",
        model=args.model,
        dataset=args.data_record(),
        metrics=figures,
        protocol={
            "name": f"{num_images} images, {ADM_CENTER_CROP} to {resolution} px, {args.precision_in_words()}",
            "num_images": num_images,
            "num_unreadable": len(unreadable),
            "tokenizer": tokenizer_fingerprint(vae),
            "mixed_precision": args.mixed_precision,
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
