"""Euler-Maruyama sampling of stochastic interpolants: the SDE of SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940).

The Euler and Heun samplers of the probability-flow ODE are diffusers' `FlowMatchEulerDiscreteScheduler` and
`FlowMatchHeunDiscreteScheduler`; diffusers has no counterpart of this one.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class StochasticInterpolantSchedulerOutput(BaseOutput):
    """
    Output of [`StochasticInterpolantScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`):
            The sample at the next, smaller time: the input of the next denoising step. Shape and dtype of `sample`.
    """

    prev_sample: torch.Tensor


class StochasticInterpolantScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Euler-Maruyama solver of the reverse SDE of a stochastic interpolant `x_t = a(t) x + s(t) noise`.

    Time runs from t = 1 (noise) to t = 0 (data), and a timestep is `num_train_timesteps * t`. The model predicts the
    velocity `a'(t) x + s'(t) noise`. The score follows from the velocity, the diffusion coefficient is `g(t)^2 = 2 t`
    on both paths, and the last step, of size `last_step_size`, adds no noise. The coefficients of a step are computed
    in float64, the sample in its own dtype, in float32 at least.

    This scheduler inherits from [`~diffusers.SchedulerMixin`] and [`~diffusers.ConfigMixin`].

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000):
            The timestep that stands for t = 1.
        path_type (`str`, *optional*, defaults to `"linear"`):
            The path the model was trained on: `"linear"` (a = 1 - t, s = t) or `"cosine"` (a = cos(pi t / 2),
            s = sin(pi t / 2)).
        last_step_size (`float`, *optional*, defaults to 0.04):
            The time at which the last step starts, in (0, 1).

    Attributes:
        timesteps (`torch.Tensor`): After `set_timesteps`, `num_train_timesteps * times[:-1]`, float64, decreasing.
        times (`torch.Tensor`):
            After `set_timesteps`, the `num_inference_steps + 1` times on the CPU, float64: the start of every step,
            then 0. Compare these, and not `timesteps / num_train_timesteps`, with the limits of a guidance interval.
    """

    _compatibles = []
    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, path_type: str = "linear", last_step_size: float = 0.04):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` is {num_train_timesteps}, allowed: integers from 1 on.")
        if path_type not in ("linear", "cosine"):
            raise ValueError(f"`path_type` is {path_type!r}, allowed: 'linear', 'cosine'.")
        if not 0 < last_step_size < 1:
            raise ValueError(f"`last_step_size` is {last_step_size}, allowed: numbers between 0 and 1, both excluded.")

        self.init_noise_sigma = 1.0  # standard deviation of the sample at t = 1

        # set by `set_timesteps`
        self.num_inference_steps = None
        self.times = None
        self.timesteps = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64)
        self._step_index = None
        self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """The number of the step that comes next, 0 for the first; `None` before the first `step`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The number of the first step, if it was set by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Set the step that the first call of `step` takes, instead of looking it up by its timestep.

        Args:
            begin_index (`int`, *optional*, defaults to 0): The index into `timesteps`.
        """
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Set the grid: `num_inference_steps` times evenly from 1 to `last_step_size`, then 0.

        Args:
            num_inference_steps (`int`): The number of steps, which is the number of model calls.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is moved to.

        Raises:
            ValueError: If `num_inference_steps` is smaller than 1.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, allowed: integers from 1 on.")

        self.num_inference_steps = num_inference_steps
        times = torch.linspace(1, self.config.last_step_size, num_inference_steps, dtype=torch.float64)
        self.times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
        timesteps = self.config.num_train_timesteps * times
        if device is not None:
            timesteps = timesteps.to(device, dtype=self._compute_dtype(torch.device(device)))
        self.timesteps = timesteps

        self._step_index = None
        self._begin_index = None

    @staticmethod
    def _compute_dtype(device: torch.device) -> torch.dtype:
        return torch.float32 if device.type in ("mps", "npu") else torch.float64

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """
        Find the step that starts at a timestep.

        Args:
            timestep (`float` or `torch.Tensor`): One of `timesteps`, in any floating-point dtype from float32 on.

        Returns:
            `int`: The index into `timesteps`.

        Raises:
            ValueError: If no step starts there.
        """
        distance = (self.timesteps - timestep).abs()
        index = distance.argmin().item()
        if distance[index] > 1e-3:
            raise ValueError(
                f"`timestep` is {float(timestep)}, allowed: one of the {len(self.timesteps)} `scheduler.timesteps` "
                f"from {self.timesteps[0].item()} to {self.timesteps[-1].item()}."
            )
        return index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the sample as it is: the model takes it unscaled. For interchangeability with other schedulers.

        Args:
            sample (`torch.Tensor`): The current sample.
            timestep (`float` or `torch.Tensor`, *optional*): The current timestep; not used.

        Returns:
            `torch.Tensor`: `sample`.
        """
        return sample

    def _interpolant(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """a(t), s(t) and their derivatives a'(t), s'(t)."""
        if self.config.path_type == "linear":
            ones = torch.ones_like(times)
            return 1 - times, times, -ones, ones
        angle = times * (math.pi / 2)
        return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> StochasticInterpolantSchedulerOutput | tuple[torch.Tensor]:
        """
        Take one Euler-Maruyama step.

        Args:
            model_output (`torch.Tensor`): The velocity, of the shape of `sample`. With classifier-free guidance, the
                guided velocity: the drift is affine in it.
            timestep (`float` or `torch.Tensor`): The current one of `timesteps`.
            sample (`torch.Tensor`): The current sample, of any floating-point dtype.
            generator (`torch.Generator` or a list of one per sample, *optional*): Source of the noise.
            variance_noise (`torch.Tensor`, *optional*):
                The unit normal noise of this step, of the shape of `sample`, instead of drawing it. The last step
                needs none and ignores it.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`StochasticInterpolantSchedulerOutput`] instead of a tuple.

        Returns:
            [`StochasticInterpolantSchedulerOutput`] or `tuple`: the next sample, in the dtype of `sample`.

        Raises:
            ValueError: If `set_timesteps` was not called, all steps were taken, `timestep` is not on the grid, the
                shapes differ, or both `generator` and `variance_noise` are given.
        """
        if self.num_inference_steps is None:
            raise ValueError("`step` needs the time grid: call `set_timesteps(num_inference_steps)` first.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)}, allowed: that of `sample`, "
                f"{tuple(sample.shape)}."
            )
        if variance_noise is not None and generator is not None:
            raise ValueError("`generator` and `variance_noise` are both given, allowed: at most one of them.")
        if variance_noise is not None and variance_noise.shape != sample.shape:
            raise ValueError(
                f"`variance_noise` has shape {tuple(variance_noise.shape)}, allowed: that of `sample`, "
                f"{tuple(sample.shape)}."
            )
        if self.step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        if self.step_index >= self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps have been taken: call `set_timesteps` to start again."
            )

        time, next_time = self.times[self.step_index], self.times[self.step_index + 1]
        alpha, sigma, d_alpha, d_sigma = (coefficient.item() for coefficient in self._interpolant(time))
        time, dt = time.item(), (next_time - time).item()

        # 1. The score of x_t from the velocity: (ratio * velocity - sample) / variance
        ratio = alpha / d_alpha
        variance = sigma**2 - ratio * d_sigma * sigma

        # 2. Drift and diffusion of the reverse SDE with g(t)^2 = 2t: velocity - t * score (dt is negative)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        velocity_weight, sample_weight = dt * (1 - time * ratio / variance), 1 + dt * time / variance
        prev_sample = sample_weight * sample.to(dtype) + velocity_weight * model_output.to(dtype)
        if self.step_index < self.num_inference_steps - 1:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            prev_sample = prev_sample + math.sqrt(2 * time * -dt) * variance_noise.to(dtype)

        self._step_index += 1
        prev_sample = prev_sample.to(sample.dtype)

        if not return_dict:
            return (prev_sample,)
        return StochasticInterpolantSchedulerOutput(prev_sample=prev_sample)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """
        Interpolate between data and noise, `a(t) x + s(t) noise`: the model input in training.

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, ...)`): Clean latents x.
            noise (`torch.Tensor` of the same shape): Unit normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)`, or a number):
                Timesteps in [0, `num_train_timesteps`], integer or not.

        Returns:
            `torch.Tensor`: the noisy latents, in the dtype of `original_samples`.
        """
        alpha, sigma, _, _ = self._interpolant_like(original_samples, noise, timesteps)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor) -> torch.Tensor:
        """
        The time derivative of the path, `a'(t) x + s'(t) noise`: the model target in training.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): Clean latents x.
            noise (`torch.Tensor` of the same shape): The noise that `add_noise` was given.
            timesteps (`torch.Tensor` of shape `(batch_size,)`, or a number):
                Timesteps in [0, `num_train_timesteps`], integer or not.

        Returns:
            `torch.Tensor`: the velocity, in the dtype of `sample`.
        """
        _, _, d_alpha, d_sigma = self._interpolant_like(sample, noise, timesteps)
        return (d_alpha * sample + d_sigma * noise).to(sample.dtype)

    def _interpolant_like(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The path's coefficients, one per sample and shaped to broadcast over it, in float32 at least."""
        if noise.shape != sample.shape:
            raise ValueError(
                f"`noise` has shape {tuple(noise.shape)}, allowed: that of the samples, {tuple(sample.shape)}."
            )
        dtype = self._compute_dtype(sample.device)
        timesteps = torch.as_tensor(timesteps).to(device=sample.device, dtype=dtype)
        if timesteps.ndim != 0 and tuple(timesteps.shape) != sample.shape[:1]:
            raise ValueError(
                f"`timesteps` has shape {tuple(timesteps.shape)}, allowed: a number or ({sample.shape[0]},), one per "
                "sample."
            )
        times = (timesteps / self.config.num_train_timesteps).reshape(-1, *[1] * (sample.ndim - 1))
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return tuple(coefficient.to(dtype) for coefficient in self._interpolant(times))

    def __len__(self) -> int:
        return self.config.num_train_timesteps
