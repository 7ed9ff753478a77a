"""What training a generator, finding its path and converting it share: a tokenizer's latents, and DDPM chains."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from safetensors import SafetensorError

from softvq_hf.data.latents import tokenizer_fingerprint
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.schedulers.scheduling_ddpm_temperature import TemperatureDDPMScheduler


def load_tokenizer(name_or_path: str, **hub_options: Any) -> AutoencoderSoftVQ | AutoencoderKL:
    """
    Load a tokenizer of this library or diffusers' `AutoencoderKL`, as its config says.

    Args:
        name_or_path (`str`): A folder or a Hub repository.
        hub_options: `subfolder` (or `None`), `token`, `cache_dir` and `local_files_only`, as in
            [`~diffusers.ModelMixin.from_pretrained`].

    Returns:
        [`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]: in eval mode.

    Raises:
        ValueError: If it is another model, its weights cannot be read or do not fit its config, or there is none in
            `subfolder` of a folder.
        OSError: If there is none.
    """
    subfolder = hub_options.get("subfolder")
    # diffusers would take the config.json of the folder itself
    if subfolder is not None and Path(name_or_path).is_dir():
        if not Path(name_or_path, subfolder, "config.json").is_file():
            raise ValueError(
                f"`--subfolder` is {subfolder!r}, allowed: a folder inside of {name_or_path!r} with the config.json of"
                " a tokenizer, such as 'vae' in a pipeline."
            )
    class_name = AutoencoderSoftVQ.load_config(name_or_path, **hub_options).get("_class_name")
    classes = {"AutoencoderSoftVQ": AutoencoderSoftVQ, "AutoencoderKL": AutoencoderKL}
    if class_name not in classes:
        raise ValueError(f"The tokenizer {name_or_path!r} is a {class_name}, allowed: {' and '.join(classes)}.")
    try:
        vae, keys = classes[class_name].from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **hub_options
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The tokenizer {name_or_path!r} cannot be loaded: {error}") from error
    wrong = {kind: names for kind, names in keys.items() if names}
    if wrong:
        raise ValueError(f"The tokenizer {name_or_path!r} has weights that do not fit its config: {wrong}.")
    return vae.eval()


def describe_tokenizer(vae: AutoencoderSoftVQ | AutoencoderKL) -> dict[str, Any]:
    """What decides the latents that a generator learns, as JSON: weights and configuration, and the statistics."""
    return {
        "fingerprint": tokenizer_fingerprint(vae),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor,
    }


def check_pretrained_latents(name_or_path: str, vae: AutoencoderSoftVQ | AutoencoderKL) -> None:
    """
    Check that a pipeline to go on from was trained on latents that are normalised in the same way.

    Args:
        name_or_path (`str`): A folder or a Hub repository; one without a tokenizer passes.
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer of the latents to train on.

    Raises:
        ValueError: If the statistics of the two tokenizers differ.
    """
    try:
        config = AutoencoderSoftVQ.load_config(name_or_path, subfolder="vae")
    except OSError:
        return
    for name in ("shift_factor", "scaling_factor"):
        before, now = config.get(name), vae.config[name]
        if not math.isclose(before or 0.0, now or 0.0, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(
                f"`--pretrained_model_name_or_path` is {name_or_path!r}, whose tokenizer has the `{name}` {before},"
                f" but the latents are of a tokenizer with {now}. Allowed: latents of the tokenizer it was trained"
                " with; or a folder that holds its `transformer` alone, to start from the weights all the same."
            )


def load_transformer(model_class: type[ModelMixin], name_or_path: str) -> ModelMixin:
    """
    The transformer of a pipeline to go on from.

    Args:
        model_class (`type`): [`DiTTransformer1DModel`] or [`MARTransformer1DModel`].
        name_or_path (`str`): A folder or a Hub repository with the transformer in `transformer`.

    Raises:
        ValueError: If it is of another class, or its weights do not fit its config.
        OSError: If there is none.
    """
    class_name = model_class.load_config(name_or_path, subfolder="transformer").get("_class_name")
    if class_name != model_class.__name__:
        raise ValueError(
            f"`--pretrained_model_name_or_path` is {name_or_path!r}, whose transformer is a {class_name}, allowed:"
            f" {model_class.__name__}."
        )
    transformer, keys = model_class.from_pretrained(name_or_path, subfolder="transformer", output_loading_info=True)
    wrong = {kind: names for kind, names in keys.items() if names}
    if wrong:
        raise ValueError(f"The transformer of {name_or_path!r} has weights that do not fit its config: {wrong}.")
    return transformer


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
    factor = _downsampling_factor(vae)
    if resolution % factor != 0:
        raise ValueError(f"`resolution` is {resolution}, allowed for this tokenizer: multiples of {factor}.")
    return vae.config.latent_channels, resolution // factor, resolution // factor


def get_image_size(vae: ModelMixin, transformer: ModelMixin | None = None) -> tuple[int, int]:
    """
    Height and width of the images that a tokenizer decodes.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        transformer ([`DiTTransformer1DModel`], *optional*):
            The generator of its latents, which decides the size where the tokenizer is an `AutoencoderKL`.

    Returns:
        `tuple[int, int]`: pixels.
    """
    sample_size = vae.config.sample_size
    if isinstance(vae, AutoencoderKL) and transformer is not None:
        sample_size = transformer.config.sample_size * _downsampling_factor(vae)
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def _downsampling_factor(vae: AutoencoderKL) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode_latents(
    vae: AutoencoderSoftVQ | AutoencoderKL,
    pixel_values: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    Normalised latents, as generators are trained on.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
        generator (`torch.Generator` or a list of one per image, *optional*):
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


def build_token_scheduler(clip_sample_range: float | None = None) -> TemperatureDDPMScheduler:
    """
    The chain of MAR's single tokens (arXiv 2406.11838): cosine schedule, learned variance, steps from the first to the
    last.

    Args:
        clip_sample_range (`float`, *optional*): Largest absolute value of the data that the chain predicts, in
            standard deviations; by default, as published, there is none.

    Returns:
        [`TemperatureDDPMScheduler`]: with 1000 training steps.
    """
    if clip_sample_range is None:
        return TemperatureDDPMScheduler()
    return TemperatureDDPMScheduler(clip_sample=True, clip_sample_range=clip_sample_range)
