"""Flow-matching training of SiT (arXiv 2401.08740, section 2) on tokenizer latents, with the time convention of
SoftVQ-VAE (arXiv 2412.10958): t = 0 is data, t = 1 is noise, and the network predicts the velocity of the path."""

import math

import torch
from diffusers import SchedulerMixin
from torch import nn

from softvq_hf.losses.draws import to_device


def lognormal_times(normal: torch.Tensor, path_type: str) -> torch.Tensor:
    """Times at which the noise-to-data ratio `s(t) / a(t)` of a path equals `exp(normal)`.

    With standard-normal draws the ratio is log-normal with location 0 and scale 1, the "lognormal" time density.

    Args:
        normal (`torch.Tensor`): Standard-normal draws of any shape.
        path_type (`str`): "linear" (`a = 1 - t`, `s = t`) or "cosine" (`a = cos(pi t / 2)`, `s = sin(pi t / 2)`).

    Returns:
        `torch.Tensor`: times in [0, 1], with the shape and dtype of `normal`.

    Raises:
        ValueError: If `path_type` is unknown.
    """
    if path_type == "linear":
        return torch.sigmoid(normal)
    if path_type == "cosine":
        return torch.atan(torch.exp(normal)) * (2 / math.pi)
    raise ValueError(f"`path_type` is {path_type!r}, allowed: 'linear', 'cosine'.")


def sample_flow_times(
    batch_size: int,
    weighting: str,
    path_type: str,
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draws one training time per sample.

    The loss itself is not weighted: `weighting` names the density of the times, as in the published recipe.

    Args:
        batch_size (`int`): Number of times, at least 1.
        weighting (`str`): "uniform" (on [0, 1)) or "lognormal" (see [`lognormal_times`]).
        path_type (`str`): "linear" or "cosine"; only the log-normal density depends on it.
        generator (`torch.Generator` or a list of one per sample, *optional*):
            Source of the draws, which are made on its device (CPU without one), so that the times of a step do not
            depend on `device`.
        device (`torch.device` or `str`, *optional*): Where the times are returned; by default where they are drawn.

    Returns:
        `torch.Tensor`: float32 times of shape `(batch_size,)` in [0, 1], 0 = data, 1 = noise.

    Raises:
        ValueError: If `batch_size`, `weighting` or `path_type` is not one of the allowed values.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, allowed: 1 or more.")
    if path_type not in ("linear", "cosine"):
        raise ValueError(f"`path_type` is {path_type!r}, allowed: 'linear', 'cosine'.")
    if isinstance(generator, list):
        if len(generator) != batch_size:
            raise ValueError(f"`generator` has {len(generator)} entries, allowed: {batch_size}, one per sample.")
        times = torch.cat([sample_flow_times(1, weighting, path_type, one) for one in generator])
        return to_device(times, device)
    draw_device = generator.device if generator is not None else "cpu"
    if weighting == "uniform":
        times = torch.rand(batch_size, generator=generator, device=draw_device, dtype=torch.float32)
    elif weighting == "lognormal":
        normal = torch.randn(batch_size, generator=generator, device=draw_device, dtype=torch.float32)
        times = lognormal_times(normal, path_type)
    else:
        raise ValueError(f"`weighting` is {weighting!r}, allowed: 'uniform', 'lognormal'.")
    return to_device(times, device)


def flow_matching_loss(
    transformer: nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    times: torch.Tensor,
    noise: torch.Tensor,
    **transformer_kwargs,
) -> torch.Tensor:
    """Squared error between the predicted and the true velocity of the interpolant, one value per sample.

    `x_t = a(t) x + s(t) e` is shown to the transformer, which predicts `a'(t) x + s'(t) e`. Interpolant, target and
    error are float32 whatever the latents' dtype is: in bfloat16 the times themselves would be rounded to 8 bits.

    Args:
        transformer (`torch.nn.Module`):
            Called as `transformer(hidden_states, timestep=, class_labels=)`, returns an output with `sample`, as
            [`DiTTransformer1DModel`] does; its label dropout applies in train mode. It may be wrapped for distributed
            training.
        scheduler ([`StochasticInterpolantScheduler`]):
            The path: `add_noise`, `get_velocity` and `config.num_train_timesteps` are used.
        latents (`torch.Tensor`):
            Normalised latents of shape `(B, L, C)`, or `(B, C, H, W)` for a 2-D transformer.
        class_labels (`torch.Tensor` of shape `(B,)`): int64 class ids.
        times (`torch.Tensor` of shape `(B,)`): float32 times in [0, 1], see [`sample_flow_times`].
        noise (`torch.Tensor`): Standard normal, of the shape of `latents`.
        transformer_kwargs: Passed on to the transformer, e.g. `force_drop_ids`.

    Returns:
        `torch.Tensor`: float32 of shape `(B,)`, the mean over all entries of a sample. The training loss is its mean.

    Raises:
        ValueError: If the shapes disagree or the transformer returns more channels than the latents have.
    """
    if noise.shape != latents.shape:
        raise ValueError(
            f"`noise` has shape {tuple(noise.shape)}, allowed: that of `latents`, {tuple(latents.shape)}."
        )
    if times.shape != latents.shape[:1]:
        raise ValueError(f"`times` has shape {tuple(times.shape)}, allowed: ({latents.shape[0]},), one per sample.")
    latents, noise = latents.float(), noise.float()
    timesteps = times.float() * scheduler.config.num_train_timesteps
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    prediction = transformer(
        noisy_latents, timestep=timesteps, class_labels=class_labels, **transformer_kwargs
    ).sample.float()
    if prediction.shape != velocity.shape:
        raise ValueError(
            f"`transformer` returned shape {tuple(prediction.shape)} for latents of shape {tuple(latents.shape)}, "
            "allowed: the same shape; flow matching needs `out_channels` equal to `in_channels`."
        )
    return (prediction - velocity).square().flatten(1).mean(1)
