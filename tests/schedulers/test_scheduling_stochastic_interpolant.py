"""StochasticInterpolantScheduler: grid, step, paths, noise, bookkeeping, bad input."""

import math

import pytest
import torch

from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


def coefficients(path_type: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if path_type == "linear":
        return 1 - t, t
    return torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)


def test_grid_is_even_down_to_the_last_step():
    scheduler = StochasticInterpolantScheduler(last_step_size=0.1)
    scheduler.set_timesteps(10)

    assert scheduler.timesteps.dtype == torch.float64 and scheduler.times.dtype == torch.float64
    expected = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    torch.testing.assert_close(scheduler.times, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.times[:-1], rtol=0, atol=0)


@pytest.mark.parametrize(("high", "num_guided"), [(0.7, 172), (1.0, 250)])
def test_published_guidance_interval_selects_the_published_number_of_steps(high, num_guided):
    scheduler = StochasticInterpolantScheduler()
    scheduler.set_timesteps(250)
    assert (scheduler.times[:-1] <= high).sum() == num_guided


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0.04, 0.3, 1.0])
def test_step_follows_the_closed_form_of_the_drift(path_type, t):
    scheduler = StochasticInterpolantScheduler(path_type=path_type, last_step_size=0.04)
    scheduler.set_timesteps(3)
    scheduler.times = torch.tensor([t, t / 2, 0.0], dtype=torch.float64)
    scheduler.num_inference_steps = 2
    scheduler.set_begin_index(0)
    x, velocity, noise = torch.randn(3, 2, 5, 4, dtype=torch.float64)

    if path_type == "linear":
        drift = (2 - t) * velocity + x
    else:
        drift = velocity + t * (2 / math.pi / math.tan(math.pi * t / 2) * velocity + x)
    first = x - t / 2 * drift + math.sqrt(2 * t) * math.sqrt(t / 2) * noise

    prev_sample = scheduler.step(velocity, scheduler.timesteps[0], x, variance_noise=noise).prev_sample
    torch.testing.assert_close(prev_sample, first, rtol=0, atol=1e-13)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sde_keeps_the_distribution_of_gaussian_data(path_type):
    # data ~ N(2, 0.5^2): the velocity field is known in closed form
    mean, std = 2.0, 0.5
    scheduler = StochasticInterpolantScheduler(path_type=path_type)
    scheduler.set_timesteps(200)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    for timestep in scheduler.timesteps:
        t = timestep / 1000
        alpha, sigma = coefficients(path_type, t)
        d_alpha, d_sigma = (-1.0, 1.0) if path_type == "linear" else (-math.pi / 2 * sigma, math.pi / 2 * alpha)
        variance = alpha**2 * std**2 + sigma**2
        residual = (x - alpha * mean) / variance
        data, noise = mean + alpha * std**2 * residual, sigma * residual  # posterior means
        velocity = (d_alpha * data + d_sigma * noise).float()
        x = scheduler.step(velocity, timestep, x, generator=generator).prev_sample

    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.std().item() == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("shape", [(3, 10, 6), (3, 4, 8, 8)])
def test_add_noise_and_velocity_are_the_path_and_its_derivative(path_type, shape):
    scheduler = StochasticInterpolantScheduler(path_type=path_type)
    x, noise = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)

    alpha, sigma = (c.reshape(-1, *[1] * (len(shape) - 1)) for c in coefficients(path_type, t))
    torch.testing.assert_close(scheduler.add_noise(x, noise, 1000 * t), alpha * x + sigma * noise, rtol=0, atol=1e-12)

    h = 1e-5
    difference = scheduler.add_noise(x, noise, 1000 * (t + h)) - scheduler.add_noise(x, noise, 1000 * (t - h))
    torch.testing.assert_close(scheduler.get_velocity(x, noise, 1000 * t), difference / (2 * h), rtol=0, atol=1e-7)


def test_low_precision_samples_keep_their_dtype_and_exact_times():
    scheduler = StochasticInterpolantScheduler(path_type="cosine")
    x, noise = torch.randn(2, 4, 10, 6).bfloat16()
    timesteps = torch.tensor([1.0, 333.3, 777.7, 999.0])

    noisy = scheduler.add_noise(x, noise, timesteps)
    exact = scheduler.add_noise(x.double(), noise.double(), timesteps.double())
    assert noisy.dtype == scheduler.get_velocity(x, noise, timesteps).dtype == torch.bfloat16
    assert torch.equal(noisy, exact.bfloat16())  # rounded once, at the end

    scheduler.set_timesteps(4)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == torch.bfloat16


def test_float32_trajectory_stays_close_to_float64():
    scheduler = StochasticInterpolantScheduler()
    noise = torch.randn(49, 2, 10, 6)
    samples = []
    for dtype in (torch.float32, torch.float64):
        scheduler.set_timesteps(50)
        x = torch.ones(2, 10, 6, dtype=dtype)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.sin(3 * x), t, x, variance_noise=noise[min(i, 48)]).prev_sample
        samples.append(x)
    assert samples[0].dtype == torch.float32
    assert 0 < (samples[0] - samples[1]).abs().max() < 1e-5


def test_noise_comes_from_the_generators():
    def sample(generator, batch_size=2):
        scheduler = StochasticInterpolantScheduler()
        scheduler.set_timesteps(3)
        x = torch.zeros(batch_size, 10, 6)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x, generator=generator).prev_sample
        return x

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    assert torch.equal(sample(generators(5)[0]), sample(generators(5)[0]))
    assert not torch.equal(sample(generators(5)[0]), sample(generators(6)[0]))
    both = sample(generators(5, 6))
    assert torch.equal(both[:1], sample(generators(5), batch_size=1))
    assert torch.equal(both[1:], sample(generators(6), batch_size=1))


def test_last_step_draws_no_noise():
    scheduler = StochasticInterpolantScheduler()
    scheduler.set_timesteps(1)
    x, velocity, noise = torch.randn(3, 2, 10, 6)
    with_noise = scheduler.step(velocity, scheduler.timesteps[0], x, variance_noise=noise).prev_sample
    scheduler.set_timesteps(1)
    without = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(with_noise, without)
    torch.testing.assert_close(without, -velocity, rtol=0, atol=1e-6)  # x - ((2 - 1) v + x) at t = 1


def test_step_index_is_looked_up_once_and_counts():
    scheduler = StochasticInterpolantScheduler()
    scheduler.set_timesteps(5)
    x = torch.zeros(1, 2, 2)
    assert scheduler.step_index is None and scheduler.begin_index is None

    scheduler.step(x, scheduler.timesteps[2].float(), x)  # may start inside, in float32 as well
    assert scheduler.step_index == 3

    scheduler.set_timesteps(5)
    assert scheduler.step_index is None
    scheduler.set_begin_index(4)
    scheduler.step(x, scheduler.timesteps[4].item(), x)
    assert scheduler.step_index == 5
    with pytest.raises(ValueError, match="All 5 steps have been taken"):
        scheduler.step(x, scheduler.timesteps[4], x)


def test_save_and_load(tmp_path):
    scheduler = StochasticInterpolantScheduler(path_type="cosine", last_step_size=0.02, num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    loaded = StochasticInterpolantScheduler.from_pretrained(tmp_path)
    assert loaded.config.path_type == "cosine" and loaded.config.last_step_size == 0.02
    loaded.set_timesteps(2)
    assert loaded.timesteps.tolist() == [500.0, 10.0] and len(loaded) == 500


def test_interchangeable_parts():
    scheduler = StochasticInterpolantScheduler()
    x = torch.randn(1, 2, 2)
    assert scheduler.scale_model_input(x, 3.0) is x
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_type": "gvp"}, "`path_type` is 'gvp', allowed: 'linear', 'cosine'"),
        ({"last_step_size": 0.0}, "`last_step_size` is 0.0, allowed"),
        ({"last_step_size": 1.0}, "`last_step_size` is 1.0, allowed"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` is 0, allowed"),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        StochasticInterpolantScheduler(**arguments)


def test_bad_input():
    scheduler = StochasticInterpolantScheduler()
    x = torch.zeros(2, 10, 6)
    with pytest.raises(ValueError, match="call `set_timesteps"):
        scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="`num_inference_steps` is 0, allowed"):
        scheduler.set_timesteps(0)

    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep` is 0.0, allowed: one of the 4"):
        scheduler.step(x, 0, x)  # an index instead of a timestep
    with pytest.raises(ValueError, match=r"`model_output` has shape \(2, 10, 12\), allowed"):
        scheduler.step(torch.zeros(2, 10, 12), 1000.0, x)
    with pytest.raises(ValueError, match=r"`variance_noise` has shape \(1, 10, 6\), allowed"):
        scheduler.step(x, 1000.0, x, variance_noise=x[:1])
    with pytest.raises(ValueError, match="at most one of them"):
        scheduler.step(x, 1000.0, x, variance_noise=x, generator=torch.Generator())

    with pytest.raises(ValueError, match=r"`noise` has shape \(1, 10, 6\), allowed"):
        scheduler.add_noise(x, x[:1], 500.0)
    with pytest.raises(ValueError, match=r"`timesteps` has shape \(3,\), allowed"):
        scheduler.get_velocity(x, x, torch.zeros(3))
