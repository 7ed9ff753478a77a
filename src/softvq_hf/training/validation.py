"""Looking at a model in training: reconstructions beside originals, samples by class, PSNR, use of the codebook."""

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.utils import make_grid

from softvq_hf.metrics.codebook_usage import codebook_statistics


@torch.no_grad()
def evaluate_reconstruction(
    accelerator: Accelerator, model: torch.nn.Module, dataloader: DataLoader, num_images: int
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """
    Reconstruct a whole validation set. Collective at the end only: processes may have different numbers of batches.

    Args:
        accelerator (`Accelerator`): Adds up the figures of all processes.
        model (`torch.nn.Module`): Tokenizer in eval mode, not wrapped; returns `sample`.
        dataloader (`DataLoader`): Prepared loader; batches hold `pixel_values` `(B, 3, H, W)` in [-1, 1].
        num_images (`int`): Images to return for a picture.

    Returns:
        `tuple`: figures by name, and the first originals and reconstructions of this process as
        `(num_images or fewer, 3, H, W)` float32 tensors on the CPU in [-1, 1]. The figures are

        - `psnr`: decibels, the mean over images of the PSNR of each, pixels in [0, 1], clamped.
        - `codebook_usage` ("softvq" and "vq"): share of the codewords, in [0, 1], that are the most probable or the
            nearest one of at least one token. Few images cannot use many codewords.
        - `codebook_perplexity` ("softvq" and "vq"): exponential of the entropy of those choices, from 1 (always the
            same codeword) to the size of the codebook (all equally often); the mean over codebooks.
        - `max_probability` ("softvq"): mean over tokens of the probability of the most probable codeword; 1 would be
            hard assignment.

    Raises:
        ValueError: If there is no image at all.
    """
    config = getattr(model, "config", {})
    quantizer = config.get("quantizer")
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # images, decibels, probabilities
    if quantizer in ("softvq", "vq"):
        num_codebooks = config.num_codebooks if quantizer == "softvq" else 1
        counts = torch.zeros(num_codebooks, config.codebook_size, dtype=torch.int64, device=accelerator.device)
    originals, reconstructions = [], []
    for batch in dataloader:
        pixel_values = batch["pixel_values"]
        if len(pixel_values) == 0:  # no image of the batch could be read
            continue
        with accelerator.autocast():
            output = model(pixel_values)
        sample = output.sample.float().clamp(-1, 1)
        batch_psnr = peak_signal_noise_ratio(
            sample * 0.5 + 0.5, pixel_values * 0.5 + 0.5, data_range=1.0, dim=(1, 2, 3), reduction="none"
        )
        totals[0] += len(pixel_values)
        totals[1] += batch_psnr.sum()
        if quantizer == "softvq":
            totals[2] += output.max_probability * len(pixel_values)
        if quantizer in ("softvq", "vq"):
            for codebook_counts, indices in zip(counts, output.indices.unbind(1), strict=True):
                codebook_counts += indices.flatten().bincount(minlength=config.codebook_size)
        if sum(map(len, originals)) < num_images:
            originals.append(pixel_values.cpu())
            reconstructions.append(sample.cpu())

    images, decibels, probabilities = accelerator.reduce(totals, "sum").tolist()
    if images == 0:
        raise ValueError("No validation image could be read.")
    metrics = {"psnr": decibels / images}
    if quantizer in ("softvq", "vq"):
        usage, perplexity = codebook_statistics(accelerator.reduce(counts, "sum"))
        metrics |= {"codebook_usage": usage, "codebook_perplexity": perplexity.mean().item()}
    if quantizer == "softvq":
        metrics["max_probability"] = probabilities / images
    if not originals:  # all images lie with the other processes
        return metrics, torch.empty(0), torch.empty(0)
    return metrics, torch.cat(originals)[:num_images], torch.cat(reconstructions)[:num_images]


def image_grid(images: torch.Tensor, images_per_row: int) -> Image.Image:
    """`(N, 3, H, W)` images in [-1, 1] as one picture, row by row."""
    grid = make_grid(images.clamp(-1, 1) * 0.5 + 0.5, nrow=images_per_row, padding=2)
    return Image.fromarray(np.asarray(grid.mul(255).round().byte().permute(1, 2, 0)))


def reconstruction_grid(originals: torch.Tensor, reconstructions: torch.Tensor) -> Image.Image:
    """Originals in the top row, their reconstructions in the bottom row; both `(N, 3, H, W)` in [-1, 1]."""
    return image_grid(torch.cat([originals, reconstructions]), images_per_row=len(originals))
