"""DDPM training on tokenizer latents, of whole images (DiT, arXiv 2212.09748) and of single tokens (MAR, arXiv
2406.11838): the noise is learned by its squared error, the variance by the variational bound of Improved DDPM (arXiv
2102.09672). Step 0 is the least noisy one."""

import math
from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from torch import nn

from softvq_hf.losses.draws import to_device
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.schedulers.scheduling_ddpm_temperature import exact_betas


def diffusion_loss(
    transformer: nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    **transformer_kwargs,
) -> dict[str, torch.Tensor]:
    """Squared error of the predicted noise, and the variational bound for a learned variance, one value per sample.

    `x_t = sqrt(ab_t) x + sqrt(1 - ab_t) e` is shown to the transformer, which predicts `e` and, where it has twice the
    channels, the logarithm of the variance between its two bounds. Both terms weigh 1: for 1000 steps this is the
    hybrid loss of Improved DDPM. The bound does not move the predicted noise. Coefficients are computed in float64,
    everything else in float32 whatever the latents' dtype is.

    Args:
        transformer (`torch.nn.Module`):
            Called as `transformer(hidden_states, timestep=, class_labels=)`, returns an output with `sample`, as
            [`DiTTransformer1DModel`] does with `timestep_scale` 1; its label dropout applies in train mode. It may be
            wrapped for distributed training.
        scheduler ([`~diffusers.DDPMScheduler`]):
            The chain: only its config is used, see [`exact_betas`]. `variance_type` is "learned_range" if the
            transformer learns the variance, and fixed otherwise.
        latents (`torch.Tensor`):
            Normalised latents of shape `(B, L, C)`, or `(B, C, H, W)` for a 2-D transformer.
        class_labels (`torch.Tensor` of shape `(B,)`): int64 class ids.
        timesteps (`torch.Tensor` of shape `(B,)`):
            int64 steps from 0 to `num_train_timesteps - 1`, best on the CPU, where they are looked up.
        noise (`torch.Tensor`): Standard normal, of the shape of `latents`.
        transformer_kwargs: Passed on to the transformer, e.g. `force_drop_ids`.

    Returns:
        `dict[str, torch.Tensor]`: float32 of shape `(B,)`, means over all entries of a sample: "loss" (the sum of the
        others), "mse" and, with a learned variance, "vb" in bits per entry. The training loss is the mean of "loss".

    Raises:
        ValueError: If the shapes disagree, a timestep is out of range, the scheduler's config does not suit, or the
            transformer's channels are not those of its `variance_type`.
        TypeError: If `timesteps` is not of an integer dtype.
    """

    def predict(noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return transformer(noisy_latents, timestep=timesteps, class_labels=class_labels, **transformer_kwargs).sample

    return _denoising_losses(predict, scheduler, latents, timesteps, noise)


def token_diffusion_loss(
    transformer: MARTransformer1DModel,
    scheduler: SchedulerMixin,
    tokens: torch.Tensor,
    conditions: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The loss of [`diffusion_loss`] for single tokens, each with its own condition (MAR, section 3.2).

    Args:
        transformer ([`MARTransformer1DModel`]): Its denoiser predicts noise and variance; not wrapped.
        scheduler ([`~diffusers.DDPMScheduler`]): The chain, with the `variance_type` "learned_range".
        tokens (`torch.Tensor` of shape `(N, C)`): Normalised tokens. No gradient flows into them.
        conditions (`torch.Tensor` of shape `(N, D)`): Of the transformer, whose gradients they carry.
        timesteps (`torch.Tensor` of shape `(N,)`): As in [`diffusion_loss`].
        noise (`torch.Tensor` of shape `(N, C)`): Standard normal.

    Returns:
        `dict[str, torch.Tensor]`: float32 of shape `(N,)`: "loss", the sum of "mse" and "vb", as [`diffusion_loss`].

    Raises:
        ValueError: As [`diffusion_loss`], or if there is not one condition for each token.
        TypeError: If `timesteps` is not of an integer dtype.
    """
    if len(conditions) != len(tokens):
        raise ValueError(f"`conditions` holds {len(conditions)} rows, allowed: {len(tokens)}, one for each token.")

    def predict(noisy_tokens: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return transformer.denoise(noisy_tokens, timesteps, conditions)

    return _denoising_losses(predict, scheduler, tokens.detach(), timesteps, noise)


def _denoising_losses(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The losses of what `predict` makes of noisy latents and their timesteps: see [`diffusion_loss`]."""
    config = scheduler.config
    if noise.shape != latents.shape:
        raise ValueError(
            f"`noise` has shape {tuple(noise.shape)}, allowed: that of `latents`, {tuple(latents.shape)}."
        )
    if timesteps.shape != latents.shape[:1]:
        raise ValueError(
            f"`timesteps` has shape {tuple(timesteps.shape)}, allowed: ({latents.shape[0]},), one per sample."
        )
    if len(timesteps) == 0:
        raise ValueError("`timesteps` is empty, allowed: at least one sample.")
    if timesteps.is_floating_point():
        raise TypeError(f"`timesteps` is of dtype {timesteps.dtype}, allowed: integers, the steps of the chain.")
    if config.prediction_type != "epsilon":
        raise ValueError(f"`scheduler` has `prediction_type` {config.prediction_type!r}, allowed: 'epsilon'.")
    steps = timesteps.cpu()
    if steps.min() < 0 or steps.max() >= config.num_train_timesteps:
        raise ValueError(
            f"`timesteps` reach from {steps.min()} to {steps.max()}, allowed: 0 to {config.num_train_timesteps - 1}."
        )

    betas = exact_betas(scheduler)
    alphas_cumprod = (1 - betas).cumprod(0)

    def at_steps(table: torch.Tensor) -> torch.Tensor:
        """The entries of the samples' steps as float32, shaped to broadcast over a sample."""
        return to_device(table[steps].float(), latents.device).reshape(-1, *[1] * (latents.ndim - 1))

    latents, noise = latents.float(), noise.float()
    noisy_latents = at_steps(alphas_cumprod.sqrt()) * latents + at_steps((1 - alphas_cumprod).sqrt()) * noise
    prediction = predict(noisy_latents, to_device(timesteps, latents.device)).float()

    channel_dim = 1 if latents.ndim == 4 else -1
    channels = latents.shape[channel_dim]
    learned = config.variance_type == "learned_range"
    if config.variance_type == "learned" or prediction.shape[channel_dim] != (2 if learned else 1) * channels:
        raise ValueError(
            f"`transformer` returned shape {tuple(prediction.shape)} for latents of shape {tuple(latents.shape)} and "
            f"`scheduler` has `variance_type` {config.variance_type!r}, allowed: 'learned_range' with `out_channels` "
            "twice `in_channels`, or a fixed variance with `out_channels` equal to `in_channels`."
        )
    if not learned:
        mse = (prediction - noise).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse}

    predicted_noise, variance_range = prediction.chunk(2, dim=channel_dim)
    mse = (predicted_noise - noise).square().flatten(1).mean(1)

    # The posterior q(x_{t-1} | x_t, x). Its variance is 0 at step 0, where that of step 1 stands in.
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    variances = betas * (1 - previous) / (1 - alphas_cumprod)
    smallest_log_variance = at_steps(torch.cat([variances[1:2], variances[1:]]).log())
    largest_log_variance = at_steps(betas.log())
    data_weight = at_steps(betas * previous.sqrt() / (1 - alphas_cumprod))
    noisy_part = at_steps((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod)) * noisy_latents
    mean = data_weight * latents + noisy_part

    # Its prediction p(x_{t-1} | x_t), of which only the variance learns here
    predicted_latents = (
        at_steps((1 / alphas_cumprod).sqrt()) * noisy_latents
        - at_steps((1 / alphas_cumprod - 1).sqrt()) * predicted_noise.detach()
    )
    predicted_mean = data_weight * predicted_latents + noisy_part
    fraction = (variance_range + 1) / 2
    predicted_log_variance = fraction * largest_log_variance + (1 - fraction) * smallest_log_variance

    divergence = 0.5 * (
        predicted_log_variance
        - smallest_log_variance
        - 1
        + (smallest_log_variance - predicted_log_variance).exp()
        + (mean - predicted_mean).square() * (-predicted_log_variance).exp()
    )
    log_likelihood = _discretised_log_likelihood(latents, predicted_mean, 0.5 * predicted_log_variance)
    is_first = to_device(steps == 0, latents.device)[:, None]
    nats = torch.where(is_first, -log_likelihood.flatten(1), divergence.flatten(1))
    vb = nats.mean(1) / math.log(2)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _discretised_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-probability that a normal variable falls into the bin around `x`, of the 256 bins of [-1, 1], the outer two
    of which are open: the decoder of 8-bit images, which the official code applies to latents too."""
    below = _normal_cdf((x - mean - 1 / 255) * (-log_std).exp())
    above = _normal_cdf((x - mean + 1 / 255) * (-log_std).exp())
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The approximation by tanh that the official loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
