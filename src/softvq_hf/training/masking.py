"""Masks: of patches, to train a tokenizer's encoder (MAETok, arXiv 2502.03444, section 3), and of latent tokens, which
MAR learns to make (arXiv 2406.11838, section 3.3)."""

import math

import torch


def sample_patch_mask(
    batch_size: int,
    num_patches: int,
    min_ratio: float,
    max_ratio: float,
    generator: torch.Generator | None = None,
    sample_generators: list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    Draw which patches, or tokens, the mask token replaces: one share for the batch, others for every image.

    The share is normal with mean `max_ratio` and standard deviation 0.25, truncated to [`min_ratio`, `max_ratio`]; the
    number of masked patches is rounded up.

    Args:
        batch_size (`int`): Number of images B.
        num_patches (`int`): Patches or tokens N of an image.
        min_ratio (`float`): Smallest share, in [0, `max_ratio`].
        max_ratio (`float`): Largest share, up to 1.
        generator (`torch.Generator`, *optional*):
            Source of the share, on the CPU. In distributed training it is the same on every process, so that all
            images of a global batch have equally many masked patches.
        sample_generators (`list[torch.Generator]`, *optional*):
            B sources, on the CPU, of which patches of each image are masked; without them, `generator`.

    Returns:
        `torch.BoolTensor`: `(B, N)` on the CPU, `True` where a patch is masked.

    Raises:
        ValueError: If there is no image or patch, the shares are not in order in [0, 1], or there is not one sample
            generator for each image.
    """
    for name, value in {"batch_size": batch_size, "num_patches": num_patches}.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}, allowed: integers from 1 on.")
    if not 0 <= min_ratio <= max_ratio <= 1:
        raise ValueError(
            f"`min_ratio` is {min_ratio} and `max_ratio` is {max_ratio}, allowed: 0 <= min_ratio <= max_ratio <= 1."
        )
    if sample_generators is None:
        sample_generators = [generator] * batch_size
    elif len(sample_generators) != batch_size:
        raise ValueError(
            f"`sample_generators` has {len(sample_generators)} entries, allowed: {batch_size}, one for each image."
        )
    # inverse of the normal distribution function, between its value at the lower end and 1/2 at the mean
    lowest = 0.5 * (1.0 + math.erf((min_ratio - max_ratio) / (0.25 * math.sqrt(2.0))))
    uniform = lowest + (0.5 - lowest) * torch.rand((), generator=generator, dtype=torch.float64)
    ratio = max_ratio + 0.25 * torch.special.ndtri(uniform).item()
    num_masked = min(math.ceil(num_patches * ratio), num_patches)
    draws = torch.stack([torch.rand(num_patches, generator=source) for source in sample_generators])
    return draws.argsort(dim=1).argsort(dim=1) < num_masked
