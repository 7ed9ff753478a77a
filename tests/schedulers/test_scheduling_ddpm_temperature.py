"""`TemperatureDDPMScheduler`: the official chain of MAR, and what a temperature does to it."""

import pytest
import torch
from diffusers import DDPMScheduler

from softvq_hf.schedulers.scheduling_ddpm_temperature import TemperatureDDPMScheduler, exact_betas


CHAIN = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "clip_sample": False,
    "timestep_spacing": "linspace",
}


def build(num_inference_steps=100, **changes):
    scheduler = TemperatureDDPMScheduler(**CHAIN | changes)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def public_config(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_official_tables(golden):
    _, tensors = golden("mar_diffloss")
    scheduler = build()
    betas = exact_betas(scheduler)
    torch.testing.assert_close(betas, tensors["output.schedule.train.betas"], rtol=1e-6, atol=0)
    alphas_cumprod = tensors["output.schedule.train.alphas_cumprod"]
    torch.testing.assert_close((1 - betas).cumprod(0), alphas_cumprod, rtol=1e-6, atol=0)

    steps = tensors["output.schedule.gen.timestep_map"].tolist()
    assert scheduler.timesteps.tolist() == steps[::-1]
    columns = {
        "mean_from_data": "posterior_mean_coef1",
        "mean_from_sample": "posterior_mean_coef2",
        "smallest_log_variance": "posterior_log_variance_clipped",
    }
    for ours, official in columns.items():
        values = torch.tensor([getattr(scheduler._coefficients[step], ours) for step in steps], dtype=torch.float64)
        torch.testing.assert_close(values, tensors[f"output.schedule.gen.{official}"], rtol=1e-6, atol=1e-12)
    values = torch.tensor([scheduler._coefficients[step].largest_log_variance for step in steps], dtype=torch.float64)
    torch.testing.assert_close(values, tensors["output.schedule.gen.betas"].log(), rtol=1e-6, atol=1e-12)


def test_same_chain_as_diffusers():
    """The steps of the base class, but for its float32 tables, with the noise of the same generator."""
    ours, theirs = build(10), DDPMScheduler(**CHAIN)
    theirs.set_timesteps(10)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    sample = torch.randn(5, 6)
    for timestep in ours.timesteps[1:].tolist():
        model_output = torch.randn(5, 12)
        generators = [torch.Generator().manual_seed(timestep) for _ in range(2)]
        result = ours.step(model_output, timestep, sample, generator=generators[0])
        expected = theirs.step(model_output, timestep, sample, generator=generators[1])
        scale = expected.pred_original_sample.abs().max().item()
        torch.testing.assert_close(
            result.pred_original_sample, expected.pred_original_sample, rtol=0, atol=3e-4 * scale
        )
        torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=0, atol=3e-4 * scale)


def test_temperature_scales_the_noise_alone():
    scheduler = build()
    sample, model_output, noise = torch.randn(4, 3), torch.randn(4, 6), torch.randn(4, 3)
    timestep = scheduler.timesteps[40].item()

    def step(temperature):
        return scheduler.step(
            model_output, timestep, sample, variance_noise=noise, temperature=temperature
        ).prev_sample

    torch.testing.assert_close(step(1.0), (step(0.5) + step(1.5)) / 2)
    assert not torch.allclose(step(0.5), step(1.0), atol=1e-2)


def test_last_step_adds_no_noise():
    scheduler = build()
    arguments = torch.randn(4, 6), scheduler.timesteps[-1].item(), torch.randn(4, 3)
    results = [scheduler.step(*arguments, variance_noise=torch.randn(4, 3)).prev_sample for _ in range(2)]
    assert torch.equal(*results)


def test_predicted_data_can_be_clipped():
    scheduler = build(clip_sample=True, clip_sample_range=6.0)
    data = scheduler.step(torch.full((1, 4), -1.0), scheduler.timesteps[0].item(), torch.zeros(1, 2))
    assert data.pred_original_sample.tolist() == [[6.0, 6.0]]
    data = build().step(torch.full((1, 4), -1.0), scheduler.timesteps[0].item(), torch.zeros(1, 2))
    assert data.pred_original_sample.min() > 300


def test_low_precision_predictions_leave_a_float32_sample():
    scheduler = build()
    sample = torch.randn(4, 3)
    result = scheduler.step(torch.randn(4, 6).bfloat16(), scheduler.timesteps[3].item(), sample, temperature=0.9)
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == torch.float32


def test_whole_chain_and_one_step():
    assert build(1000).timesteps.tolist() == list(range(999, -1, -1))
    scheduler = build(1)
    assert torch.isfinite(scheduler.step(torch.randn(2, 4), scheduler.timesteps[0].item(), torch.randn(2, 2))[0]).all()


def test_the_chain_of_mar_is_the_default():
    assert public_config(TemperatureDDPMScheduler()) == public_config(build(clip_sample_range=6.0))


def test_save_and_load(tmp_path):
    scheduler = build(clip_sample=True, clip_sample_range=6.0)
    scheduler.save_pretrained(tmp_path)
    loaded = TemperatureDDPMScheduler.from_pretrained(tmp_path)
    assert public_config(loaded) == public_config(scheduler)
    from_diffusers = TemperatureDDPMScheduler.from_config(DDPMScheduler(**CHAIN).config)
    assert public_config(from_diffusers) == public_config(build())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variance_type": "fixed_small"}, "`variance_type` 'fixed_small', allowed: 'learned_range'"),
        ({"prediction_type": "v_prediction"}, "`prediction_type` 'v_prediction', allowed: 'epsilon'"),
        ({"thresholding": True}, "`thresholding` True, allowed: False"),
        ({"beta_schedule": "sigmoid"}, "`beta_schedule` 'sigmoid', allowed"),
        ({"rescale_betas_zero_snr": True}, "`rescale_betas_zero_snr` True"),
    ],
)
def test_other_chains_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("num_inference_steps", [0, 1001])
def test_number_of_steps_out_of_range(num_inference_steps):
    with pytest.raises(ValueError, match=f"`num_inference_steps` is {num_inference_steps}, allowed: 1 to 1000"):
        build(num_inference_steps)


def test_bad_steps():
    scheduler = build()
    with pytest.raises(ValueError, match="`timestep` is 998, allowed: one of `timesteps`"):
        scheduler.step(torch.zeros(1, 4), 998, torch.zeros(1, 2))
    with pytest.raises(
        ValueError, match=r"`model_output` has shape \(1, 2\), allowed: that of `sample`, \(1, 2\), with"
    ):
        scheduler.step(torch.zeros(1, 2), 999, torch.zeros(1, 2))
    for temperature in (-1.0, 0.0, float("nan")):
        with pytest.raises(ValueError, match=f"`temperature` is {temperature}, allowed: finite numbers above 0"):
            scheduler.step(torch.zeros(1, 4), 999, torch.zeros(1, 2), temperature=temperature)
    with pytest.raises(ValueError, match="`num_inference_steps` is None and `timesteps` is None, allowed: one of"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match=r"`timesteps` is \[5, -3\], allowed: decreasing steps from 0 to 999"):
        scheduler.set_timesteps(timesteps=[5, -3])
    with pytest.raises(ValueError, match="after `set_timesteps`"):
        TemperatureDDPMScheduler(**CHAIN).step(torch.zeros(1, 4), 999, torch.zeros(1, 2))
