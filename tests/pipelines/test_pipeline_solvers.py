"""SoftVQPipeline with diffusers' multistep solvers: grid, exactness, order, guidance intervals, bad settings."""

import math

import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
MULTISTEP = [
    UniPCMultistepScheduler(**FLOW),
    UniPCMultistepScheduler(solver_order=3, **FLOW),
    DPMSolverMultistepScheduler(**FLOW),
    DPMSolverMultistepScheduler(solver_type="heun", **FLOW),
    DPMSolverMultistepScheduler(solver_order=3, **FLOW),
]


def name_of(scheduler) -> str:
    config = scheduler.config
    return f"{scheduler.__class__.__name__}-{config.get('solver_order')}-{config.get('solver_type')}"


class GaussianFlow(ModelMixin, ConfigMixin):
    """
    The exact velocity of the flow to Gaussian data: each class, and the null class, has a mean of its own, all have
    the standard deviation `data_std`. Guided, the means are guided.
    """

    @register_to_config
    def __init__(self, path_type="linear", data_std=0.5, num_classes=4):
        super().__init__()
        # what SoftVQPipeline asks a transformer for
        self.register_to_config(num_tokens=10, in_channels=6, out_channels=6, sample_size=None)
        self.register_to_config(class_dropout_prob=0.1, timestep_scale=1e-3)
        generator = torch.Generator().manual_seed(1)
        means = torch.randn(num_classes + 1, 10, 6, generator=generator, dtype=torch.float64)
        self.register_buffer("means", means)
        self.placeholder = torch.nn.Parameter(torch.zeros(()))  # a pipeline reads its dtype off the parameters

    def path(self, time):
        """Coefficients of data and noise, and their derivatives."""
        if self.config.path_type == "linear":
            return 1 - time, time, -1.0, 1.0
        angle = math.pi / 2 * time
        return math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        assert not return_dict and (timestep == timestep[0]).all()
        alpha, sigma, alpha_slope, sigma_slope = self.path(timestep[0].item() / 1000)
        mean, variance = self.means[class_labels], self.config.data_std**2
        scale = (alpha * alpha_slope * variance + sigma * sigma_slope) / (alpha**2 * variance + sigma**2)
        velocity = alpha_slope * mean + scale * (hidden_states.double() - alpha * mean)
        return (velocity.to(hidden_states.dtype),)

    def solve(self, states, means, start, end):
        """The exact solution of the ODE from time `start` to `end`, in float64."""
        (alpha, sigma, _, _), (end_alpha, end_sigma, _, _) = self.path(start), self.path(end)
        std = math.hypot(alpha * self.config.data_std, sigma)
        end_std = math.hypot(end_alpha * self.config.data_std, end_sigma)
        return end_alpha * means + end_std / std * (states.double() - alpha * means)


@pytest.fixture
def gaussian_pipeline(tiny_pipeline):
    def build(scheduler, **config):
        pipeline = tiny_pipeline(scheduler)
        pipeline.register_modules(transformer=GaussianFlow(**config).eval())
        return pipeline

    return build


def root_mean_square(difference: torch.Tensor) -> float:
    return difference.double().pow(2).mean().sqrt().item()


# The grid


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_grid(tiny_pipeline, scheduler, num_steps):
    pipeline = tiny_pipeline(scheduler)
    times = pipeline.prepare_timesteps(num_steps, torch.device("cpu"))
    assert times == torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1].tolist()
    # not rounded to integers: 1000, 857.14, 714.29, ...
    expected = torch.linspace(1000, 0, num_steps + 1, dtype=torch.float64)[:-1].float()
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(scheduler.sigmas[1:-1], expected[1:] / 1000, rtol=1e-6, atol=0)
    assert 1 - 2e-6 < scheduler.sigmas[0] < 1 and scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("scheduler_class", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_shifted_grid_is_that_of_euler(tiny_pipeline, scheduler_class):
    pipeline = tiny_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))
    expected = pipeline.prepare_timesteps(6, torch.device("cpu"))
    pipeline.scheduler = scheduler_class(flow_shift=3.0, **FLOW)
    times = pipeline.prepare_timesteps(6, torch.device("cpu"))
    assert times[0] == 1 and times == pytest.approx(expected, abs=1e-6)
    assert (pipeline.scheduler.timesteps.double() / 1000).tolist() == pytest.approx(times, abs=1e-6)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*times, 0], abs=2e-6)


# Exactness and order


@pytest.mark.parametrize("guidance", ["nocfg", "cfg"])
def test_first_order_is_the_reference_euler_trajectory(golden, tiny_pipeline, guidance):
    reference, tensors = golden("sit")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    pipeline = tiny_pipeline(DPMSolverMultistepScheduler(solver_order=1, **FLOW))
    pipeline.register_modules(transformer=convert_checkpoint("sit", weights, reference["config"]))
    sampling = reference["sampling"]
    latents = pipeline(
        tensors["input.y"],
        guidance_scale=sampling["cfg_scale"] if guidance == "cfg" else 1.0,
        guidance_interval=(sampling["guidance_low"], sampling["guidance_high"]),
        num_inference_steps=sampling["num_steps"],
        latents=tensors["input.latents"],
        output_type="latent",
    ).images
    torch.testing.assert_close(latents.double(), tensors[f"output.euler_{guidance}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
def test_flow_to_a_point_is_exact(gaussian_pipeline, scheduler, num_steps):
    pipeline = gaussian_pipeline(scheduler, data_std=0.0)
    latents = pipeline([0, 3], num_inference_steps=num_steps, output_type="latent").images
    torch.testing.assert_close(latents.double(), pipeline.transformer.means[[0, 3]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
def test_order_on_a_gaussian_flow(gaussian_pipeline, scheduler, path_type):
    latents = torch.randn(2, 10, 6)

    def error(scheduler, num_steps):
        pipeline = gaussian_pipeline(scheduler, path_type=path_type)
        exact = pipeline.transformer.solve(latents, pipeline.transformer.means[[0, 3]], 1.0, 0.0)
        result = pipeline([0, 3], num_inference_steps=num_steps, latents=latents, output_type="latent").images
        return root_mean_square(result - exact)

    # Steps of half the size quarter the error of a second-order solver, in the limit; Euler's they halve.
    errors = {num_steps: error(scheduler, num_steps) for num_steps in (10, 80, 160)}
    assert errors[80] / errors[160] > 2.7
    assert errors[160] < 6e-4
    for num_steps, own in errors.items():
        assert own < 0.35 * error(FlowMatchEulerDiscreteScheduler(), num_steps)


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
def test_limit_is_the_solution_for_a_transformer(tiny_pipeline, scheduler):
    pipeline = tiny_pipeline(scheduler)
    latents, labels = torch.randn(2, 10, 6), torch.tensor([0, 3])

    transformer = tiny_pipeline().transformer.double()  # the same weights
    states, step = latents.double(), 1 / 100

    @torch.no_grad()
    def velocity(states, time):
        return transformer(states, 1000 * time, labels).sample

    for i in range(100):  # the classical Runge-Kutta method
        time = 1 - i * step
        k1 = velocity(states, time)
        k2 = velocity(states - step / 2 * k1, time - step / 2)
        k3 = velocity(states - step / 2 * k2, time - step / 2)
        k4 = velocity(states - step * k3, max(time - step, 0.0))
        states = states - step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def error(scheduler, num_steps):
        pipeline.scheduler = scheduler
        result = pipeline(labels, num_inference_steps=num_steps, latents=latents, output_type="latent").images
        return root_mean_square(result - states)

    assert error(scheduler, 20) < 0.25 * error(FlowMatchEulerDiscreteScheduler(), 20)
    assert error(scheduler, 100) < 5e-5


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
def test_every_call_starts_anew(tiny_pipeline, scheduler):
    pipeline = tiny_pipeline(scheduler)
    arguments = {"num_inference_steps": 5, "latents": torch.randn(1, 10, 6), "output_type": "latent"}
    first = pipeline(0, **arguments).images
    pipeline(1, **{**arguments, "num_inference_steps": 3})
    assert torch.equal(pipeline(0, **arguments).images, first)


def test_stochastic_solver_keeps_the_distribution(gaussian_pipeline):
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW)
    pipeline = gaussian_pipeline(scheduler)
    labels, noise = [1] * 500, torch.randn(1, 10, 6).expand(500, -1, -1)

    def sample(seed, **arguments):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(labels, num_inference_steps=100, generator=generator, output_type="latent", **arguments).images

    assert torch.equal(sample(0), sample(0))
    deviations = sample(0, latents=noise).double() - pipeline.transformer.means[1]  # all from one noise
    assert deviations.mean().abs() < 0.02
    assert deviations.std() == pytest.approx(0.5, rel=0.03)


# Guidance


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
def test_order_with_guidance_in_an_interval(gaussian_pipeline, scheduler):
    latents, scale = torch.randn(2, 10, 6), 3.0

    def error(scheduler, num_steps):
        pipeline = gaussian_pipeline(scheduler)
        means, null_mean = pipeline.transformer.means[[0, 3]], pipeline.transformer.means[4]
        guided_means = null_mean + scale * (means - null_mean)
        exact = pipeline.transformer.solve(latents, means, 1.0, 0.7)
        exact = pipeline.transformer.solve(exact, guided_means, 0.7, 0.2)
        exact = pipeline.transformer.solve(exact, means, 0.2, 0.0)
        result = pipeline(
            [0, 3],
            guidance_scale=scale,
            guidance_interval=(0.21, 0.71),  # steps from 0.7 to 0.2
            num_inference_steps=num_steps,
            latents=latents,
            output_type="latent",
        ).images
        return root_mean_square(result - exact)

    # To extrapolate over the switches costs what 2 or 3 orders gain: it is worse than Euler.
    errors = [error(scheduler, num_steps) for num_steps in (20, 40, 80)]
    assert errors[1] / errors[2] > 2.2
    for num_steps, own in zip((20, 40, 80), errors, strict=True):
        assert own < 0.5 * error(FlowMatchEulerDiscreteScheduler(), num_steps)


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
def test_only_steps_in_the_interval_are_guided(tiny_pipeline, scheduler):
    pipeline = tiny_pipeline(scheduler)
    batch_sizes = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: batch_sizes.append(len(args[0])), with_kwargs=True
    )
    pipeline([0, 1], guidance_scale=2.0, guidance_interval=(0.0, 0.3), num_inference_steps=20, output_type="latent")
    expected = [low <= 0.3 for low in torch.linspace(1, 0, 21, dtype=torch.float64)[:-1].tolist()]
    assert batch_sizes == [4 if guided else 2 for guided in expected]


# Configs


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=name_of)
def test_save_and_load(tiny_pipeline, scheduler, tmp_path):
    pipeline = tiny_pipeline(scheduler)
    pipeline.save_pretrained(tmp_path)
    loaded = SoftVQPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert name_of(loaded.scheduler) == name_of(scheduler)
    arguments = {"num_inference_steps": 4, "latents": torch.randn(1, 10, 6), "output_type": "latent"}
    # weights mapped from a file may lie at another alignment, which changes the last bit on some processors
    torch.testing.assert_close(loaded(0, **arguments).images, pipeline(0, **arguments).images, rtol=0, atol=1e-6)


def test_what_a_config_keeps_of_another_scheduler_does_not_count(tiny_pipeline):
    arguments = {"num_inference_steps": 4, "latents": torch.randn(1, 10, 6), "output_type": "latent"}
    expected = tiny_pipeline()(0, **arguments).images
    of_unipc = UniPCMultistepScheduler(beta_schedule="scaled_linear", **FLOW).config
    euler = FlowMatchEulerDiscreteScheduler.from_config(of_unipc)
    assert euler.config.use_flow_sigmas and "beta_schedule" in euler.config
    assert torch.equal(tiny_pipeline(euler)(0, **arguments).images, expected)

    solver = UniPCMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, **FLOW)
    expected = tiny_pipeline(MULTISTEP[0])(0, **arguments).images
    assert torch.equal(tiny_pipeline(solver)(0, **arguments).images, expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler().config),
        DPMSolverMultistepScheduler(),
        DDIMScheduler(),
    ],
)
def test_a_velocity_is_no_noise_of_a_chain(tiny_pipeline, scheduler, caplog):
    tiny_pipeline(scheduler)(0, num_inference_steps=2)
    assert f"`scheduler` is a {scheduler.__class__.__name__} for the noise of a DDPM chain" in caplog.text
    caplog.clear()
    tiny_pipeline(scheduler, timestep_scale=1.0)(0, num_inference_steps=2)
    assert caplog.text == ""


@pytest.mark.parametrize("patch_size", [None, 2])
def test_multistep_solvers_run_the_chain_of_dit(tiny_pipeline, patch_size):
    sizes = {} if patch_size is None else {"patch_size": 2, "sample_size": 4}
    pipeline = tiny_pipeline(DPMSolverMultistepScheduler(), out_channels=12, timestep_scale=1.0, **sizes)
    arguments = {"latents": torch.randn(1, *pipeline.latent_shape), "output_type": "latent"}
    exact = pipeline(0, num_inference_steps=250, **arguments).images
    few = pipeline(0, num_inference_steps=25, **arguments).images
    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    ddim = pipeline(0, num_inference_steps=25, **arguments).images
    assert root_mean_square(few - exact) < root_mean_square(ddim - exact)


@pytest.mark.parametrize("scheduler_class", [DEISMultistepScheduler, SASolverScheduler, DPMSolverSinglestepScheduler])
def test_other_solvers_are_refused(tiny_pipeline, scheduler_class):
    message = f"`scheduler` is a {scheduler_class.__name__} with `use_flow_sigmas=True`, allowed: `UniPC"
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(scheduler_class(**FLOW))(0, num_inference_steps=2)


@pytest.mark.parametrize(
    ("scheduler_class", "setting", "allowed"),
    [
        (UniPCMultistepScheduler, {"prediction_type": "epsilon"}, "'flow_prediction'"),
        (DPMSolverMultistepScheduler, {"prediction_type": "v_prediction"}, "'flow_prediction'"),
        (UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min"}, "'zero'"),
        (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}, "'zero'"),
        (UniPCMultistepScheduler, {"use_karras_sigmas": True}, "False"),
        (DPMSolverMultistepScheduler, {"use_exponential_sigmas": True}, "False"),
        (DPMSolverMultistepScheduler, {"use_beta_sigmas": True}, "False"),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, "False"),
        (UniPCMultistepScheduler, {"use_dynamic_shifting": True}, "False"),
        (UniPCMultistepScheduler, {"thresholding": True}, "False"),
        (UniPCMultistepScheduler, {"solver_type": "bh1"}, "'bh2'"),
        (UniPCMultistepScheduler, {"lower_order_final": False}, "True"),
        (UniPCMultistepScheduler, {"predict_x0": False}, "True"),
        (UniPCMultistepScheduler, {"shift_terminal": 0.1}, "None"),
    ],
    ids=str,
)
def test_settings_that_do_not_solve_the_flow(tiny_pipeline, scheduler_class, setting, allowed):
    name, value = next(iter(setting.items()))
    pipeline = tiny_pipeline(scheduler_class(**{**FLOW, **setting}))
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    message = f"`{name}` of the {scheduler_class.__name__} is {value!r}, allowed for flow matching: {allowed}"
    with pytest.raises(ValueError, match=message):
        pipeline(0, num_inference_steps=4)
    assert not calls


def test_stochastic_solver_needs_the_linear_path(tiny_pipeline):
    arguments = {"num_inference_steps": 4, "output_type": "latent"}
    cosine = StochasticInterpolantScheduler(path_type="cosine").config
    pipeline = tiny_pipeline(DPMSolverMultistepScheduler.from_config(cosine, **FLOW))
    assert torch.isfinite(pipeline(0, **arguments).images).all()

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(cosine, algorithm_type="sde-dpmsolver++", **FLOW)
    with pytest.raises(
        ValueError, match="`algorithm_type` .* is 'sde-dpmsolver\\+\\+', allowed .*: 'dpmsolver\\+\\+'"
    ):
        pipeline(0, **arguments)

    linear = StochasticInterpolantScheduler().config
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(linear, algorithm_type="sde-dpmsolver++", **FLOW)
    assert torch.isfinite(pipeline(0, **arguments).images).all()
