"""Masked patches for training a tokenizer's encoder, as MAETok does (arXiv 2502.03444, section 3)."""

import math

import torch


def sample_patch_mask(
    batch_size: int,
    num_patches: int,
    min_ratio: float,
    max_ratio: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Draw which patches the mask token replaces: one share for the batch, other patches for every image.

    The share is normal with mean `max_ratio` and standard deviation 0.25, truncated to [`min_ratio`, `max_ratio`]; the
    number of masked patches is rounded up.

    Args:
        batch_size (`int`): Number of images B.
        num_patches (`int`): Patches N of an image.
        min_ratio (`float`): Smallest share, in [0, `max_ratio`].
        max_ratio (`float`): Largest share, up to 1.
        generator (`torch.Generator`, *optional*): Source of the draws, on the CPU.

    Returns:
        `torch.BoolTensor`: `(B, N)` on the CPU, `True` where a patch is masked.

    Raises:
        ValueError: If the shares are not in order in [0, 1].
    """
    if not 0 <= min_ratio <= max_ratio <= 1:
        raise ValueError(
            f"`min_ratio` is {min_ratio} and `max_ratio` is {max_ratio}, allowed: 0 <= min_ratio <= max_ratio <= 1."
        )
    # inverse of the normal distribution function, between its value at the lower end and 1/2 at the mean
    lowest = 0.5 * (1.0 + math.erf((min_ratio - max_ratio) / (0.25 * math.sqrt(2.0))))
    uniform = lowest + (0.5 - lowest) * torch.rand((), generator=generator, dtype=torch.float64)
    ratio = max_ratio + 0.25 * torch.special.ndtri(uniform).item()
    num_masked = min(math.ceil(num_patches * ratio), num_patches)
    ranks = torch.rand(batch_size, num_patches, generator=generator).argsort(dim=1).argsort(dim=1)
    return ranks < num_masked
