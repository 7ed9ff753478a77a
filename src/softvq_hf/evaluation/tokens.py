"""Every tokenizer as one that makes tokens: the positions of the 2-D latents of an `AutoencoderKL` count as such."""

import math

import torch
from diffusers import AutoencoderKL

from softvq_hf.metrics.batches import not_finite
from softvq_hf.metrics.codebook_usage import CodebookUsage
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.generator import get_image_size, get_latent_shape


def choose_resolution(vae: AutoencoderSoftVQ | AutoencoderKL, resolution: int | None) -> int:
    """
    Side of the square images that a tokenizer is given.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        resolution (`int`, *optional*): The side in pixels, if the user has chosen one; else that of the configuration.

    Raises:
        ValueError: If the tokenizer does not take images of `resolution`, or there is none and the tokenizer is made
            for images that are not square.
    """
    if resolution is not None:
        if isinstance(vae, AutoencoderKL):
            try:
                get_latent_shape(vae, resolution)
            except ValueError as error:
                raise ValueError(f"`--resolution` does not fit the tokenizer: {error}") from error
        elif not vae._allows_sample_size((resolution, resolution)):
            raise ValueError(f"`--resolution` is {resolution}, allowed: {vae._allowed_sample_sizes()}.")
        return resolution
    height, width = get_image_size(vae)
    if height != width:
        raise ValueError(f"The tokenizer takes {height} x {width} pixels, allowed: squares, or give `--resolution`.")
    return height


def encode_tokens(
    vae: AutoencoderSoftVQ | AutoencoderKL, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Raw latents without chance: a posterior gives its mode.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        pixel_values (`torch.Tensor` of shape `(B, 3, R, R)`): Images in [-1, 1].

    Returns:
        `tuple`: latents `(B, L, C)`, those of an `AutoencoderKL` row by row, and the indices of the codewords
        `(B, num_codebooks, L / num_codebooks)` of "softvq" (the most probable ones) and "vq", otherwise `None`.

    Raises:
        ValueError: If an [`AutoencoderSoftVQ`] takes images of another size.
    """
    if isinstance(vae, AutoencoderKL):
        return vae.encode(pixel_values).latent_dist.mode().flatten(2).mT, None
    encoded = vae.encode(pixel_values)
    return encoded.latent, encoded.indices


def decode_tokens(vae: AutoencoderSoftVQ | AutoencoderKL, latents: torch.Tensor, resolution: int) -> torch.Tensor:
    """
    The inverse of [`encode_tokens`].

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        latents (`torch.Tensor` of shape `(B, L, C)`): Raw latents, as [`encode_tokens`] returns them.
        resolution (`int`): Side R of the square images in pixels.

    Returns:
        `torch.Tensor` of shape `(B, 3, R, R)`: nominally in [-1, 1], not clamped.
    """
    if isinstance(vae, AutoencoderKL):
        side = math.isqrt(latents.shape[1])
        return vae.decode(latents.mT.unflatten(2, (side, side))).sample
    return vae.decode(latents, sample_size=(resolution, resolution)).sample


def codebook_usage(vae: AutoencoderSoftVQ | AutoencoderKL) -> CodebookUsage | None:
    """
    The metric that takes the indices of [`encode_tokens`].

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.

    Returns:
        [`CodebookUsage`] or `None`: for "softvq" and "vq"; other tokenizers have no codebook.
    """
    if vae.config.get("quantizer") not in ("softvq", "vq"):
        return None
    num_codebooks = vae.config.num_codebooks if vae.config.quantizer == "softvq" else 1
    return CodebookUsage(vae.config.codebook_size, num_codebooks)


def check_finite(values: torch.Tensor, name: str, image_id: list[str | int]) -> None:
    """
    Refuse what a diverged model gives.

    Args:
        values (`torch.Tensor` of shape `(B, ...)`): Latents or images.
        name (`str`): What they are, for the error.
        image_id (`list` of length B): The images that they come from, for the error.

    Raises:
        ValueError: If values are not finite. It names the images.
    """
    broken = [str(image_id[i]) for i in not_finite(values)]
    if broken:
        raise ValueError(
            f"The tokenizer gives {name} that are not finite (NaN or infinite) for {', '.join(broken)}. Its weights"
            " have diverged, or half precision is too coarse for it."
        )
