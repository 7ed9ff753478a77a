"""DiT in SoftVQPipeline: official ancestral and DDIM trajectories of 1-D and 2-D models, and their schedulers."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.losses import exact_betas
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
NUM_STEPS = 10  # of the official trajectories: 999, 888, ..., 0


def ddpm_scheduler(schedule: str, exact: bool = False, **config) -> DDPMScheduler:
    """The scheduler as DiT is trained and sampled; with `exact`, tables in float64 instead of its float32 ones."""
    config = {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace", **config}
    scheduler = DDPMScheduler(beta_schedule=SCHEDULES[schedule], **config)
    return with_exact_tables(scheduler) if exact else scheduler


def with_exact_tables(scheduler):
    scheduler.betas = exact_betas(scheduler)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


class RespacedDDIM(DPMSolverMultistepScheduler):
    """DDIM on the steps `round(i * 999 / (K - 1))`, as the first-order DPM-Solver, which DDIM is."""

    def set_timesteps(self, num_inference_steps, device=None):
        timesteps = np.linspace(0, self.config.num_train_timesteps - 1, num_inference_steps).round()[::-1]
        super().set_timesteps(device=device, timesteps=timesteps.astype(int).tolist())


def respaced_ddim(scheduler_class: str, schedule: str):
    if scheduler_class == "dpm_solver":
        return RespacedDDIM(solver_order=1, beta_schedule=SCHEDULES[schedule])
    # DDIMScheduler steps back by `num_train_timesteps // num_inference_steps`: 1110 // 10 is the 111 of these steps.
    betas = exact_betas(ddpm_scheduler(schedule)).tolist()
    return DDIMScheduler(num_train_timesteps=1110, trained_betas=betas, clip_sample=False)


class OfficialDiT:
    """A reference model and its numbers: `model.inputs`, `model.outputs`, and `model.sample(scheduler, ...)`."""

    def __init__(self, golden, tiny_pipeline, monkeypatch, suffix=""):
        self.reference, tensors = golden("dit")
        weights, self.inputs, self.outputs = (
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in (f"weights{suffix}.", f"input{suffix}.", f"output{suffix}.")
        )
        self.transformer = convert_checkpoint("dit", weights, self.reference[f"config{suffix}"])
        self.pipeline = tiny_pipeline()
        self.pipeline.register_modules(transformer=self.transformer)
        self.monkeypatch = monkeypatch

    def use_analytic_denoiser(self, schedule):
        """The exact denoiser of Gaussian data takes the place of the network."""
        alphas_cumprod = (1 - exact_betas(ddpm_scheduler(schedule))).cumprod(0)
        mean, std = self.inputs["gauss_mean"], self.inputs["gauss_std"]

        def forward(hidden_states, timestep, class_labels, return_dict):
            a = alphas_cumprod[timestep.long()].float().reshape(-1, 1, 1)
            noise = (1 - a).sqrt() * (hidden_states - a.sqrt() * mean) / (a * std**2 + 1 - a)
            return (torch.cat([noise, hidden_states.tanh()], dim=-1),)

        self.monkeypatch.setattr(self.transformer, "forward", forward)
        return forward

    def sample(self, scheduler, guidance_scale=1.0, num_inference_steps=NUM_STEPS, first_state=None):
        """The latents after every step. With `first_state` the first step is not ours: it ends there."""
        self.pipeline.register_modules(scheduler=scheduler)
        noise = self.inputs["noise"][:, : len(self.inputs["latents"])]
        if noise.ndim == 4:  # DDPMScheduler works on (B, C, L)
            noise = noise.transpose(2, 3)
        noise = iter(noise)
        self.monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(noise))
        states = []

        def keep_state(pipeline, step, timestep, callback_kwargs):
            if step == 0 and first_state is not None:
                callback_kwargs = {"latents": first_state}
            states.append(callback_kwargs["latents"])
            return callback_kwargs

        latents = self.pipeline(
            self.inputs["y"],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            latents=self.inputs["latents"],
            output_type="latent",
            callback_on_step_end=keep_state,
        ).images
        assert torch.equal(latents, states[-1])
        return torch.stack(states)


@pytest.fixture
def official_dit(golden, tiny_pipeline, monkeypatch):
    return lambda suffix="": OfficialDiT(golden, tiny_pipeline, monkeypatch, suffix)


def assert_close_to_scale(actual, expected, tolerance):
    """Within `tolerance`, relative to the largest value where that is above 1."""
    difference = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert difference <= tolerance, f"differs by {difference}"


# The network


@pytest.mark.parametrize("guidance", ["nocfg", "cfg"])
@pytest.mark.parametrize(
    ("schedule", "exact", "tolerance"),
    [
        ("linear", True, 1e-5),
        # what the float32 tables of DDPMScheduler cost: 1 - alphas_cumprod[0] is 1e-4
        ("linear", False, 1e-4),
        # The first step divides by sqrt(alphas_cumprod[999]), 4.9e-5: values reach 6000, rounding is amplified.
        ("cosine", True, 3e-5),
        ("cosine", False, 3e-5),
    ],
)
@pytest.mark.parametrize("suffix", ["", "_2d"], ids=["1d", "2d"])
def test_ancestral_trajectories(official_dit, suffix, schedule, exact, tolerance, guidance):
    dit = official_dit(suffix)
    scale = dit.reference["diffusion"]["cfg_scale"] if guidance == "cfg" else 1.0
    states = dit.sample(ddpm_scheduler(schedule, exact), scale)
    name = f"ddpm_{schedule}_{guidance}"
    assert dit.pipeline.scheduler.timesteps.flip(0).tolist() == dit.outputs[f"timestep_map_{schedule}"].tolist()
    for state, expected in zip(states, dit.outputs[f"{name}_states"], strict=True):
        assert_close_to_scale(state, expected, tolerance)
    assert_close_to_scale(states[-1], dit.outputs[name], tolerance)


@pytest.mark.parametrize("scheduler_class", ["ddim", "dpm_solver"])
@pytest.mark.parametrize(("schedule", "tolerance"), [("linear", 1e-5), ("cosine", 3e-5)])
@pytest.mark.parametrize("suffix", ["", "_2d"], ids=["1d", "2d"])
def test_ddim_trajectories(official_dit, suffix, schedule, tolerance, scheduler_class):
    dit = official_dit(suffix)
    states = dit.sample(respaced_ddim(scheduler_class, schedule))
    assert dit.pipeline.scheduler.timesteps.flip(0).tolist() == dit.outputs[f"timestep_map_{schedule}"].tolist()
    assert_close_to_scale(states[-1], dit.outputs[f"ddim_{schedule}_nocfg"], tolerance)


@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "leading"},
        {"clip_sample": True},
        {"variance_type": "fixed_small"},
        {"variance_type": "fixed_large"},
    ],
    ids=lambda config: "-".join(map(str, *config.items())),
)
def test_other_configurations_sample_something_else(official_dit, config):
    dit = official_dit()
    states = dit.sample(ddpm_scheduler("linear", **config))
    assert (states[-1] - dit.outputs["ddpm_linear_nocfg"]).abs().max() > 0.01


# An exact denoiser: values stay of order 1, so tolerances are tight. The first step of the cosine chain multiplies
# rounding by 20291 (in float64 the official sampler itself comes 5e-4 away from its own float32 state): it is compared
# apart, and the others start from its official end.


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 5e-6), (False, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_trajectory_of_an_exact_denoiser(official_dit, schedule, exact, tolerance):
    dit = official_dit()
    dit.use_analytic_denoiser(schedule)
    expected = dit.outputs[f"ddpm_{schedule}_gauss_states"]
    scheduler = ddpm_scheduler(schedule, exact)
    if schedule == "linear":
        torch.testing.assert_close(dit.sample(scheduler), expected, atol=tolerance, rtol=0)
        return
    torch.testing.assert_close(dit.sample(scheduler), expected, atol=2e-3, rtol=0)
    states = dit.sample(scheduler, first_state=expected[0])
    torch.testing.assert_close(states, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scheduler_class", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_trajectory_of_an_exact_denoiser(official_dit, schedule, scheduler_class):
    dit = official_dit()
    denoiser = dit.use_analytic_denoiser(schedule)
    expected = dit.outputs[f"ddim_{schedule}_gauss"]
    scheduler = respaced_ddim(scheduler_class, schedule)
    if schedule == "linear":
        torch.testing.assert_close(dit.sample(scheduler)[-1], expected, atol=5e-6, rtol=0)
        return
    torch.testing.assert_close(dit.sample(scheduler)[-1], expected, atol=2e-3, rtol=0)

    # the first step in the official order of operations
    a, a_next = (1 - exact_betas(ddpm_scheduler(schedule))).cumprod(0)[[999, 888]]
    latents = dit.inputs["latents"]
    noise = denoiser(latents, torch.full((len(latents),), 999), None, False)[0][..., :6]
    x0 = (1 / a).sqrt().float() * latents - (1 / a - 1).sqrt().float() * noise
    first_state = a_next.sqrt().float() * x0 + (1 - a_next).sqrt().float() * noise
    states = dit.sample(scheduler, first_state=first_state)
    torch.testing.assert_close(states[-1], expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [4, 50, 250])
@pytest.mark.parametrize("spacing", ["strided", "rounded"])
def test_ddim_with_any_number_of_steps(official_dit, spacing, num_steps):
    if spacing == "strided":  # the official "ddimK": the default of DDIMScheduler
        steps = [i * (1000 // num_steps) for i in range(num_steps)]
        scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    else:
        steps = [round(i * 999 / (num_steps - 1)) for i in range(num_steps)]
        scheduler = respaced_ddim("dpm_solver", "linear")
    dit = official_dit()
    denoiser = dit.use_analytic_denoiser("linear")
    alphas_cumprod = (1 - exact_betas(ddpm_scheduler("linear"))).cumprod(0)
    expected = dit.inputs["latents"].double()
    for i in reversed(range(num_steps)):
        a = alphas_cumprod[steps[i]]
        a_next = alphas_cumprod[steps[i - 1]] if i > 0 else torch.ones(())
        noise = denoiser(expected, torch.full((3,), steps[i]), None, False)[0][..., :6]
        expected = a_next.sqrt() * (expected - (1 - a).sqrt() * noise) / a.sqrt() + (1 - a_next).sqrt() * noise

    states = dit.sample(scheduler, num_inference_steps=num_steps)
    assert scheduler.timesteps.flip(0).tolist() == steps
    torch.testing.assert_close(states[-1].double(), expected, atol=1e-5, rtol=0)


# 2-D latents, from labels to pixels: the baselines SiT-XL/2 and DiT-XL/2 in small


@pytest.mark.parametrize(
    ("out_channels", "timestep_scale", "scheduler"),
    [
        (4, 1e-3, StochasticInterpolantScheduler()),
        (8, 1.0, ddpm_scheduler("linear")),
        (8, 1.0, DDIMScheduler(clip_sample=False)),
        (4, 1.0, ddpm_scheduler("linear", variance_type="fixed_large")),
    ],
    ids=["sit", "dit", "dit-ddim", "dit-fixed-variance"],
)
def test_patches_of_an_autoencoder_kl(tmp_path, out_channels, timestep_scale, scheduler):
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()
    transformer = DiTTransformer1DModel(
        num_tokens=16,
        in_channels=4,
        out_channels=out_channels,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=4,
        timestep_scale=timestep_scale,
        patch_size=2,
        sample_size=8,
    ).eval()
    pipeline = SoftVQPipeline(vae=vae, transformer=transformer, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path)
    loaded = SoftVQPipeline.from_pretrained(tmp_path)

    images = []
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = {"guidance_scale": 1.5, "num_inference_steps": 3, "generator": generator}
        images.append(pipe([0, 3], output_type="pt", **arguments).images)
    assert images[0].shape == (2, 3, 32, 32) and images[0].isfinite().all()
    torch.testing.assert_close(*images, atol=1e-6, rtol=0)

    arguments["generator"] = torch.Generator().manual_seed(0)
    latents = pipeline([0, 3], output_type="latent", **arguments).images
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        decoded = vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(images[0], (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)
