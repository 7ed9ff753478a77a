"""Looking at a model during training: reconstructions beside originals, samples by class, PSNR."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.utils import make_grid


@contextmanager
def averaged_weights(ema: EMAModel | None, model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` (unwrapped) has the averaged weights and is in eval mode; afterwards all is as before."""
    training = model.training
    model.eval()
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(model.parameters())
        model.train(training)


@torch.no_grad()
def evaluate_reconstruction(
    accelerator: Accelerator, model: torch.nn.Module, dataloader: DataLoader, num_images: int
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """
    Reconstruct a whole validation set.

    Args:
        accelerator (`Accelerator`): Gathers the figures of all processes.
        model (`torch.nn.Module`): Unwrapped tokenizer in eval mode; returns `sample`.
        dataloader (`DataLoader`): Prepared loader; batches hold `pixel_values` `(B, 3, H, W)` in [-1, 1].
        num_images (`int`): Images to return for a picture.

    Returns:
        `tuple`: `{"psnr": decibels}` (mean over images of the PSNR of each, pixels in [0, 1], clamped), and the first
        originals and reconstructions as `(num_images or fewer, 3, H, W)` float32 tensors on the CPU in [-1, 1].
    """
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # of decibels, of images
    originals, reconstructions = [], []
    for batch in dataloader:
        pixel_values = batch["pixel_values"]
        if len(pixel_values) == 0:  # no image of the batch could be read
            continue
        with accelerator.autocast():
            sample = model(pixel_values).sample
        sample = sample.float().clamp(-1, 1)
        batch_psnr = peak_signal_noise_ratio(
            sample * 0.5 + 0.5, pixel_values * 0.5 + 0.5, data_range=1.0, dim=(1, 2, 3), reduction="none"
        )
        total += torch.stack([batch_psnr.sum(), torch.tensor(len(batch_psnr), device=total.device)])
        if sum(map(len, originals)) < num_images:
            originals.append(pixel_values.cpu())
            reconstructions.append(sample.cpu())
    decibels, images = accelerator.reduce(total, "sum").tolist()
    metrics = {"psnr": decibels / images}
    return metrics, torch.cat(originals)[:num_images], torch.cat(reconstructions)[:num_images]


def image_grid(images: torch.Tensor, images_per_row: int) -> Image.Image:
    """`(N, 3, H, W)` images in [-1, 1] as one picture, row by row."""
    grid = make_grid(images.clamp(-1, 1) * 0.5 + 0.5, nrow=images_per_row, padding=2)
    return Image.fromarray(np.asarray(grid.mul(255).round().byte().permute(1, 2, 0)))


def reconstruction_grid(originals: torch.Tensor, reconstructions: torch.Tensor) -> Image.Image:
    """Originals in the top row, their reconstructions in the bottom row; both `(N, 3, H, W)` in [-1, 1]."""
    return image_grid(torch.cat([originals, reconstructions]), images_per_row=len(originals))
