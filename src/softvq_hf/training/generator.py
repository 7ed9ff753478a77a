"""What training a generator, finding its path and converting it share: a tokenizer's latents, and the DDPM chain."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


def load_tokenizer(name_or_path: str) -> AutoencoderSoftVQ | AutoencoderKL:
    """
    Load a tokenizer of this library or diffusers' `AutoencoderKL`, as its config says.

    Args:
        name_or_path (`str`): A folder or a Hub repository.

    Returns:
        [`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`].

    Raises:
        ValueError: If it is another model.
        OSError: If there is none.
    """
    class_name = AutoencoderSoftVQ.load_config(name_or_path).get("_class_name")
    for tokenizer_class in (AutoencoderSoftVQ, AutoencoderKL):
        if tokenizer_class.__name__ == class_name:
            return tokenizer_class.from_pretrained(name_or_path)
    raise ValueError(
        f"The tokenizer {name_or_path!r} is a {class_name}, allowed: AutoencoderSoftVQ and AutoencoderKL."
    )


def get_latent_shape(vae: AutoencoderSoftVQ | AutoencoderKL, resolution: int) -> tuple[int, ...]:
    """
    The shape of one image's latents.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        resolution (`int`): Side of the square images in pixels, on which the latents of an `AutoencoderKL` depend.

    Returns:
        `tuple[int, ...]`: (tokens, channels), or (channels, side, side) for the 2-D latents of an `AutoencoderKL`.

    Raises:
        ValueError: If an `AutoencoderKL` does not divide `resolution`.
    """
    if not isinstance(vae, AutoencoderKL):
        return vae.config.num_latent_tokens, vae.config.latent_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor != 0:
        raise ValueError(f"`resolution` is {resolution}, allowed for this tokenizer: multiples of {factor}.")
    return vae.config.latent_channels, resolution // factor, resolution // factor


def encode_latents(
    vae: AutoencoderSoftVQ | AutoencoderKL, pixel_values: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Normalised latents, as generators are trained on.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
        generator (`torch.Generator`, *optional*):
            Source of a draw from the posterior of an `AutoencoderKL`; without one its mode is taken.

    Returns:
        `torch.Tensor`: float32 of shape `(B, L, C)`, or `(B, C, H, W)` for an `AutoencoderKL`.
    """
    if not isinstance(vae, AutoencoderKL):
        return vae.scale_latent(vae.encode(pixel_values).latent.float())
    posterior = vae.encode(pixel_values).latent_dist
    latents = (posterior.mode() if generator is None else posterior.sample(generator)).float()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def build_ddpm_scheduler(beta_schedule: str, learned_variance: bool) -> DDPMScheduler:
    """
    The chain of DiT (arXiv 2212.09748) as its authors sample it: no clipping, steps from the first to the last.

    Args:
        beta_schedule (`str`): "squaredcos_cap_v2" (cosine, all published 1-D models) or "linear" (the original DiT).
        learned_variance (`bool`): Whether the transformer predicts the variance as well.

    Returns:
        [`~diffusers.DDPMScheduler`]: with 1000 training steps.
    """
    return DDPMScheduler(
        beta_schedule=beta_schedule,
        variance_type="learned_range" if learned_variance else "fixed_large",
        clip_sample=False,
        timestep_spacing="linspace",
    )
