"""Ancestral sampling of a DDPM chain with a temperature: how MAR (arXiv 2406.11838, section 3.2) makes tokens.

diffusers' `DDPMScheduler` is the same chain without a temperature; its noise cannot be given either, and its tables
are products of float32 numbers, which moves a trajectory by 1e-4.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


def exact_betas(scheduler: SchedulerMixin) -> torch.Tensor:
    """Betas of a DDPM chain in float64.

    The tables of diffusers' schedulers are float32, where the last `alphas_cumprod` of the cosine schedule is off by
    1.3e-5.

    Args:
        scheduler ([`~diffusers.DDPMScheduler`]): Its config says the schedule: "linear", "squaredcos_cap_v2" (the
            cosine schedule) or `trained_betas`.

    Returns:
        `torch.Tensor`: float64 of shape `(num_train_timesteps,)`, on the CPU.

    Raises:
        ValueError: If the schedule is another one.
    """
    config = scheduler.config
    if config.rescale_betas_zero_snr:
        raise ValueError("`scheduler` has `rescale_betas_zero_snr` True, allowed: False, a chain that keeps a signal.")
    if config.trained_betas is not None:
        return torch.as_tensor(config.trained_betas, dtype=torch.float64)
    num_steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, num_steps, dtype=torch.float64)
    if config.beta_schedule == "squaredcos_cap_v2":
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(
        f"`scheduler` has `beta_schedule` {config.beta_schedule!r}, allowed: 'linear', 'squaredcos_cap_v2', or "
        "`trained_betas`."
    )


@dataclass
class StepCoefficients:
    """
    What a step from one timestep to the next computes with, as double-precision numbers.

    Attributes:
        data_from_sample (`float`): Of the sample, in the predicted data.
        data_from_noise (`float`): Of the predicted noise, in the predicted data.
        mean_from_data (`float`): Of the predicted data, in the mean of the next sample.
        mean_from_sample (`float`): Of the sample, in the mean of the next sample.
        smallest_log_variance (`float`): Logarithm of the variance where the model says -1.
        largest_log_variance (`float`): Logarithm of the variance where the model says 1.
    """

    data_from_sample: float
    data_from_noise: float
    mean_from_data: float
    mean_from_sample: float
    smallest_log_variance: float
    largest_log_variance: float


class TemperatureDDPMScheduler(DDPMScheduler):
    r"""
    [`~diffusers.DDPMScheduler`] whose steps add noise times a temperature, for models that predict the noise and the
    logarithm of the variance between its two bounds (`variance_type` "learned_range", arXiv 2102.09672).

    Coefficients are computed in float64, samples in float32 at least. The arguments are those of the base class; the
    defaults are MAR's chain. `clip_sample=True` keeps the data that a model predicts within `clip_sample_range`
    standard deviations, which the first steps of an early training need.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: list[float] | None = None,
        variance_type: str = "learned_range",
        clip_sample: bool = False,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 6.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            variance_type=variance_type,
            clip_sample=clip_sample,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """
        Set the steps, as [`~diffusers.DDPMScheduler.set_timesteps`] does.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, from 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` are; steps are looked up on the CPU.
            timesteps (`list` of `int`, *optional*): The steps themselves, decreasing.

        Raises:
            ValueError: If the configuration is that of another chain, or the steps are not allowed.
        """
        for name, allowed in {"variance_type": "learned_range", "prediction_type": "epsilon"}.items():
            if self.config[name] != allowed:
                raise ValueError(f"`scheduler` has `{name}` {self.config[name]!r}, allowed: {allowed!r}.")
        if self.config.thresholding:
            raise ValueError("`scheduler` has `thresholding` True, allowed: False.")
        num_train_timesteps = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps} and `timesteps` is {timesteps}, allowed: one of them."
            )
        if num_inference_steps is not None and not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, allowed: 1 to {num_train_timesteps}.")
        if timesteps is not None and not (timesteps and 0 <= min(timesteps) <= max(timesteps) < num_train_timesteps):
            raise ValueError(
                f"`timesteps` is {timesteps}, allowed: decreasing steps from 0 to {num_train_timesteps - 1}."
            )
        super().set_timesteps(num_inference_steps, timesteps=timesteps)
        steps = self.timesteps.tolist()
        if device is not None:
            self.timesteps = self.timesteps.to(device)

        # The chain of the steps that are left: its betas are ratios of what the whole chain leaves of the signal
        alphas_cumprod = (1 - exact_betas(self)).cumprod(0)[steps[::-1]]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / previous
        variances = betas * (1 - previous) / (1 - alphas_cumprod)
        if len(steps) > 1:
            variances[0] = variances[1]  # that of the last step is 0, and no noise is added there
        else:
            variances[0] = betas[0]
        columns = (
            (1 / alphas_cumprod).sqrt(),
            -(1 / alphas_cumprod - 1).sqrt(),
            betas * previous.sqrt() / (1 - alphas_cumprod),
            (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
            variances.log(),
            betas.log(),
        )
        rows = torch.stack(columns, dim=1).tolist()
        self._coefficients = {step: StepCoefficients(*row) for step, row in zip(steps[::-1], rows, strict=True)}
        self._last_step = steps[-1]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Go one step towards the data.

        Args:
            model_output (`torch.Tensor` of shape `(N, 2 * C, ...)`): The predicted noise, then the variance.
            timestep (`int`): One of `timesteps`.
            sample (`torch.Tensor` of shape `(N, C, ...)`): The sample at `timestep`.
            generator (`torch.Generator`, *optional*): Source of the noise.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`DDPMSchedulerOutput`].
            variance_noise (`torch.Tensor` of the shape of `sample`, *optional*):
                The unit normal to use instead of drawing one. The last step ignores it.
            temperature (`float`, *optional*, defaults to 1.0): Factor of the noise, above 0.

        Returns:
            [`DDPMSchedulerOutput`] or `tuple`: the next sample, in the dtype of `sample`, and the predicted data.

        Raises:
            ValueError: If `set_timesteps` has not set this timestep, the shapes do not fit each other, or the
                temperature is not allowed.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` is {temperature}, allowed: finite numbers above 0.")
        coefficients = getattr(self, "_coefficients", {}).get(int(timestep))
        if coefficients is None:
            raise ValueError(f"`timestep` is {timestep}, allowed: one of `timesteps`, after `set_timesteps`.")
        channels = sample.shape[1]
        if model_output.shape != (len(sample), 2 * channels, *sample.shape[2:]):
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)}, allowed: that of `sample`,"
                f" {tuple(sample.shape)}, with twice the channels."
            )
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noise, variance_range = model_output.to(dtype).chunk(2, dim=1)
        noisy = sample.to(dtype)

        data = coefficients.data_from_sample * noisy + coefficients.data_from_noise * noise
        if self.config.clip_sample:
            data = data.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        previous = coefficients.mean_from_data * data + coefficients.mean_from_sample * noisy
        if int(timestep) != self._last_step:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
            fraction = (variance_range + 1) / 2
            log_variance = (
                fraction * coefficients.largest_log_variance + (1 - fraction) * coefficients.smallest_log_variance
            )
            previous = previous + temperature * (0.5 * log_variance).exp() * variance_noise.to(dtype)
        previous = previous.to(sample.dtype)

        if not return_dict:
            return previous, data
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=data)
