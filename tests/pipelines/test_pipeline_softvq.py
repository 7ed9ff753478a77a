"""SoftVQPipeline: reference trajectories, guidance, labels, outputs, callbacks, schedulers, bad input."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


class GivenNoiseScheduler(StochasticInterpolantScheduler):
    """Takes the noise of step i from `noise[i]` instead of drawing it."""

    noise: torch.Tensor

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        i = 0 if self.step_index is None else self.step_index
        variance_noise = self.noise[i] if i < len(self.noise) else None
        return super().step(model_output, timestep, sample, variance_noise=variance_noise, return_dict=return_dict)


def record_calls(transformer) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A list that fills with (hidden_states, timestep, class_labels) of every call of the transformer."""
    calls = []
    transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[0], kwargs["timestep"], kwargs["class_labels"])), with_kwargs=True
    )
    return calls


# Reference trajectories


@pytest.mark.parametrize("guidance", ["nocfg", "cfg"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "em_linear", "em_cosine"])
def test_sit_trajectories(golden, tiny_pipeline, sampler, guidance):
    reference, tensors = golden("sit")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    transformer = convert_checkpoint("sit", weights, reference["config"])
    if sampler == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler()
    elif sampler == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler()
    else:
        scheduler = GivenNoiseScheduler(path_type=sampler.removeprefix("em_"))
        scheduler.noise = tensors["input.noise"]
    pipeline = tiny_pipeline(scheduler)
    pipeline.register_modules(transformer=transformer)
    calls = record_calls(transformer)

    sampling = reference["sampling"]
    latents = pipeline(
        tensors["input.y"],
        guidance_scale=sampling["cfg_scale"] if guidance == "cfg" else 1.0,
        guidance_interval=(sampling["guidance_low"], sampling["guidance_high"]),
        num_inference_steps=sampling["num_steps"],
        latents=tensors["input.latents"],
        output_type="latent",
    ).images

    name = f"output.{sampler}_{guidance}"
    states = torch.stack([hidden_states[: len(latents)] for hidden_states, _, _ in calls])
    times = torch.stack([timestep[0].double() / 1000 for _, timestep, _ in calls])
    torch.testing.assert_close(latents.double(), tensors[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(states, tensors[f"{name}_states"], rtol=0, atol=1e-5)
    torch.testing.assert_close(times.float(), tensors[f"{name}_times"], rtol=0, atol=1e-6)


def tiny_autoencoder_kl() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def test_sit_trajectory_on_2d_latents(golden, tiny_pipeline):
    reference, tensors = golden("sit")
    weights = {
        key.removeprefix("weights_2d."): value for key, value in tensors.items() if key.startswith("weights_2d.")
    }
    transformer = convert_checkpoint("sit", weights, reference["config_2d"])
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=transformer, vae=tiny_autoencoder_kl())

    sampling = reference["sampling"]
    arguments = {
        "guidance_scale": sampling["cfg_scale"],
        "guidance_interval": (sampling["guidance_low"], sampling["guidance_high"]),
        "num_inference_steps": sampling["num_steps_2d"],
        "latents": tensors["input_2d.latents"],
    }
    latents = pipeline(tensors["input_2d.y"], output_type="latent", **arguments).images
    torch.testing.assert_close(latents.double(), tensors["output_2d.euler_cfg"], rtol=0, atol=1e-5)

    images = pipeline(tensors["input_2d.y"], output_type="pt", **arguments).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))


# Guidance


@pytest.mark.parametrize(
    ("scheduler", "num_calls", "num_guided"),
    [
        (FlowMatchEulerDiscreteScheduler(), 10, 6),  # steps from 0.7, 0.6, ..., 0.2
        (FlowMatchHeunDiscreteScheduler(), 19, 12),  # both calls of these steps
        (StochasticInterpolantScheduler(), 10, 5),  # steps from 0.68, 0.573, 0.467, 0.36, 0.253
    ],
)
def test_only_guided_steps_compute_the_null_half(tiny_pipeline, scheduler, num_calls, num_guided):
    pipeline = tiny_pipeline(scheduler)
    calls = record_calls(pipeline.transformer)
    arguments = {"num_inference_steps": 10, "guidance_interval": (0.15, 0.72), "output_type": "latent"}

    pipeline([0, 1, 3], guidance_scale=1.75, **arguments)
    rows = [len(hidden_states) for hidden_states, _, _ in calls]
    assert len(rows) == num_calls == pipeline.num_timesteps
    assert rows.count(6) == num_guided and rows.count(3) == num_calls - num_guided
    guided_labels = next(class_labels for _, _, class_labels in calls if len(class_labels) == 6)
    assert guided_labels.tolist() == [0, 1, 3, 4, 4, 4]  # 4 is the null class

    calls.clear()
    pipeline([0, 1, 3], guidance_scale=1.0, **arguments)
    assert [len(hidden_states) for hidden_states, _, _ in calls] == [3] * num_calls


@pytest.mark.parametrize(
    ("interval", "num_steps", "num_guided"),
    [
        ((0.0, 1.0), 10, 10),
        ((0.5, 0.5), 10, 1),  # both limits are included
        ((0.0, 0.8), 10, 8),  # float32 has 0.8 above the limit
        ((0.0, 0.3), 10, 2),  # the double precision grid has 0.3 one unit in the last place above the limit
        ((0.0, 0.7), 250, 175),
        ((0.0, 0.05), 10, 0),
    ],
)
def test_interval_is_compared_in_double_precision(tiny_pipeline, interval, num_steps, num_guided):
    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler()):
        times = tiny_pipeline(scheduler).prepare_timesteps(num_steps, torch.device("cpu"))
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            assert len(times) == 2 * num_steps - 1
            times = times[::2]
        assert sum(interval[0] <= time <= interval[1] for time in times) == num_guided


def test_guidance_extrapolates_from_null_to_conditional(tiny_pipeline):
    pipeline = tiny_pipeline()
    x, labels = torch.randn(2, 10, 6), torch.tensor([1, 3])
    with torch.no_grad():
        conditional = pipeline.transformer(x, 1000.0, labels).sample
        null = pipeline.transformer(x, 1000.0, torch.tensor([4, 4])).sample
    latents = pipeline(labels, guidance_scale=3.0, num_inference_steps=1, latents=x, output_type="latent").images
    torch.testing.assert_close(latents, x - (null + 3 * (conditional - null)), rtol=0, atol=1e-5)


# Labels


@pytest.mark.parametrize(
    "class_labels",
    [
        [0, 3],
        (0, 3),
        range(0, 4, 3),
        ["tench", "goldfish"],
        ["tench, Tinca tinca", 3],
        ["Tinca tinca", np.int64(3)],
        torch.tensor([0, 3]),
        np.array([0, 3]),
        [[0], ["goldfish"]],
    ],
)
def test_class_labels_are_ids_or_names(tiny_pipeline, class_labels):
    pipeline = tiny_pipeline()
    calls = record_calls(pipeline.transformer)
    images = pipeline(class_labels, num_inference_steps=1, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    assert calls[0][2].tolist() == [0, 3]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_no_label_is_the_null_class(tiny_pipeline, guidance_scale):
    pipeline = tiny_pipeline()
    calls = record_calls(pipeline.transformer)
    latents = torch.randn(3, 10, 6)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 4, "output_type": "latent"}
    result = pipeline([None, 1, None], latents=latents, **options).images
    assert calls[0][2].tolist() == [4, 1, 4] + [4, 4, 4] * (guidance_scale > 1)
    # there is nothing that guidance could lead away from
    unguided = pipeline(None, latents=latents[:1], num_inference_steps=4, output_type="latent").images
    torch.testing.assert_close(result[:1], unguided, rtol=0, atol=1e-5)
    alone = pipeline(1, latents=latents[1:2], **options).images
    torch.testing.assert_close(result[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_label", [3, "goldfish", torch.tensor(3)])
def test_one_class_label(tiny_pipeline, class_label):
    assert len(tiny_pipeline()(class_label, num_inference_steps=1).images) == 1


def test_names(tiny_pipeline):
    pipeline = tiny_pipeline()
    assert pipeline.get_label_ids("goldfish") == [3]
    assert pipeline.get_label_ids(["heron", "tench"]) == [2, 0]
    assert pipeline.get_label_ids("crane") == [1]  # the whole name of class 1, though class 2 has it as a synonym

    with pytest.raises(ValueError, match="unknown name 'goldfisch'.*did you mean 'goldfish'"):
        pipeline("goldfisch")
    with pytest.raises(ValueError, match="unknown name 'xyz', allowed: the 4 names"):
        pipeline(["goldfish", "xyz"])

    twice = SoftVQPipeline(**pipeline.components, id2label={"0": "crane", "1": "crane, bird", "2": "crane"})
    assert twice.config.id2label == {0: "crane", 1: "crane, bird", 2: "crane"}
    with pytest.raises(
        ValueError, match=r"'crane', which belongs to several classes; allowed: one of their ids \[0, 2\]"
    ):
        twice("crane")

    nameless = SoftVQPipeline(**pipeline.components)
    with pytest.raises(ValueError, match="'goldfish', but this pipeline has no `id2label`"):
        nameless("goldfish")


# Outputs, noise, precision


def test_output_types(tiny_pipeline):
    pipeline = tiny_pipeline()
    latents = torch.randn(2, 10, 6)
    outputs = {
        output_type: pipeline([0, 1], num_inference_steps=2, latents=latents, output_type=output_type).images
        for output_type in ("pil", "np", "pt", "latent")
    }
    with torch.no_grad():
        # scaling_factor 4, shift_factor 0.1
        decoded = pipeline.vae.decode(outputs["latent"] / 4 + 0.1).sample
    torch.testing.assert_close(outputs["pt"], (decoded / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.size for image in outputs["pil"]] == [(16, 16)] * 2
    np.testing.assert_array_equal(np.asarray(outputs["pil"][1]), (outputs["np"][1] * 255).round())

    (images,) = pipeline([0, 1], num_inference_steps=2, latents=latents, output_type="pt", return_dict=False)
    assert torch.equal(images, outputs["pt"])


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), StochasticInterpolantScheduler()])
def test_generators(tiny_pipeline, scheduler):
    pipeline = tiny_pipeline(scheduler)

    def sample(class_labels, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        generator = generators if len(seeds) > 1 else generators[0]
        return pipeline(class_labels, num_inference_steps=3, generator=generator, output_type="latent").images

    assert torch.equal(sample([0, 1], 5), sample([0, 1], 5))
    assert not torch.equal(sample([0, 1], 5), sample([0, 1], 6))
    both = sample([0, 1], 5, 6)
    torch.testing.assert_close(both[:1], sample([0], 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(both[1:], sample([1], 6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_transformer_keeps_float32_latents(tiny_pipeline, dtype):
    pipeline = tiny_pipeline(StochasticInterpolantScheduler())
    latents = torch.randn(2, 10, 6)
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "latents": latents, "output_type": "latent"}
    expected = pipeline([0, 1], generator=torch.Generator().manual_seed(0), **arguments).images

    calls = record_calls(pipeline.transformer)
    pipeline.to(dtype)
    result = pipeline([0, 1], generator=torch.Generator().manual_seed(0), **arguments).images
    assert result.dtype == torch.float32 and calls[0][0].dtype == dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0.1)
    assert pipeline([0, 1], num_inference_steps=1, output_type="np").images.dtype == np.float32


def test_save_and_load(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline(StochasticInterpolantScheduler(path_type="cosine"))
    pipeline.save_pretrained(tmp_path)
    loaded = SoftVQPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)

    assert loaded.config.id2label == pipeline.config.id2label  # integer keys again
    assert loaded.scheduler.config.path_type == "cosine"
    images = [
        pipe(["goldfish"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (pipeline, loaded)
    ]
    # weights mapped from a file may lie at another alignment, which changes the last bit on some processors
    np.testing.assert_allclose(*images, rtol=0, atol=1e-6)


# Callbacks and progress


def test_callback_sees_and_changes_latents(tiny_pipeline):
    pipeline = tiny_pipeline()
    seen = []

    def callback(pipe, step, timestep, callback_kwargs):
        assert pipe is pipeline and list(callback_kwargs) == ["latents"]
        seen.append((step, timestep.item()))
        if step == pipe.num_timesteps - 1:
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}
        return callback_kwargs

    latents = pipeline(0, num_inference_steps=4, callback_on_step_end=callback, output_type="latent").images
    assert seen == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]
    assert not latents.any()


def test_callback_changes_guidance_and_interrupts(tiny_pipeline):
    pipeline = tiny_pipeline()
    calls = record_calls(pipeline.transformer)

    def callback(pipe, step, timestep, callback_kwargs):
        pipe._guidance_scale += 1.0
        pipe._interrupt = step == 1
        return callback_kwargs

    pipeline(0, num_inference_steps=4, callback_on_step_end=callback, output_type="latent")
    assert [len(hidden_states) for hidden_states, _, _ in calls] == [1, 2]
    assert pipeline.guidance_scale == 3.0 and pipeline.interrupt

    pipeline(0, num_inference_steps=4, output_type="latent")
    assert len(calls) == 2 + 4 and not pipeline.interrupt


class HalveLatents(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        return {"latents": callback_kwargs["latents"] / 2}


def test_callback_objects(tiny_pipeline):
    pipeline = tiny_pipeline()
    arguments = {"num_inference_steps": 1, "latents": torch.randn(1, 10, 6), "output_type": "latent"}
    plain = pipeline(0, **arguments).images
    halved = pipeline(0, callback_on_step_end=HalveLatents(), **arguments).images
    both = MultiPipelineCallbacks([HalveLatents(), HalveLatents()])
    quartered = pipeline(0, callback_on_step_end=both, callback_on_step_end_tensor_inputs=[], **arguments).images
    assert torch.equal(halved, plain / 2) and torch.equal(quartered, plain / 4)


@pytest.mark.parametrize(
    ("scheduler", "total"), [(FlowMatchEulerDiscreteScheduler(), 3), (FlowMatchHeunDiscreteScheduler(), 5)]
)
def test_progress_bar(tiny_pipeline, capsys, scheduler, total):
    pipeline = tiny_pipeline(scheduler)
    pipeline.set_progress_bar_config(disable=False)
    pipeline(0, num_inference_steps=3, output_type="latent")
    assert f"{total}/{total}" in capsys.readouterr().err


# Other schedulers


def test_shifted_flow_grid(tiny_pipeline):
    sigma = torch.linspace(1, 0, 5, dtype=torch.float64)[:-1]
    shifted = (3 * sigma / (1 + 2 * sigma)).tolist()
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler(shift=3.0)):
        pipeline = tiny_pipeline(scheduler)
        times = pipeline.prepare_timesteps(4, torch.device("cpu"))
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            times = times[::2]
        assert times == pytest.approx(shifted, abs=1e-6)


@pytest.mark.parametrize("scheduler_class", [FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler])
def test_other_flow_schedulers_solve_the_same_ode(tiny_pipeline, scheduler_class):
    scheduler = scheduler_class()
    if scheduler_class is UniPCMultistepScheduler:
        scheduler = scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True)
    latents = torch.randn(2, 10, 6)
    arguments = {"latents": latents, "guidance_scale": 1.5, "output_type": "latent"}
    exact = tiny_pipeline()([0, 1], num_inference_steps=400, **arguments).images
    euler = tiny_pipeline()([0, 1], num_inference_steps=20, **arguments).images
    other = tiny_pipeline(scheduler)([0, 1], num_inference_steps=20, **arguments).images
    assert (other - exact).abs().max() < 0.5 * (euler - exact).abs().max()


@pytest.mark.parametrize(
    ("scheduler", "num_guided"),
    [
        (
            DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"),
            5,
        ),  # 444, ..., 0
        (DDIMScheduler(clip_sample=False), 6),  # 500, ..., 0
    ],
)
@pytest.mark.parametrize("patch_size", [None, 2])
def test_learned_variance(tiny_pipeline, scheduler, num_guided, patch_size):
    sizes = {} if patch_size is None else {"patch_size": 2, "sample_size": 4}
    pipeline = tiny_pipeline(scheduler, out_channels=12, timestep_scale=1.0, **sizes)
    calls = record_calls(pipeline.transformer)
    generator = torch.Generator().manual_seed(0)
    latents = pipeline(
        [0, 1],
        guidance_scale=2.0,
        guidance_interval=(0.0, 0.5),
        num_inference_steps=10,
        generator=generator,
        output_type="latent",
    ).images
    assert latents.shape == ((2, 10, 6) if patch_size is None else (2, 6, 4, 4))
    assert torch.isfinite(latents).all()
    assert [len(hidden_states) for hidden_states, _, _ in calls].count(4) == num_guided
    assert not any(timestep.is_floating_point() for _, timestep, _ in calls)


def test_guidance_leaves_the_conditional_variance(tiny_pipeline):
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipeline = tiny_pipeline(scheduler, out_channels=12, timestep_scale=1.0)
    pipeline._guidance_scale = 3.0
    x, labels, timestep = torch.randn(2, 10, 6), torch.tensor([1, 3]), torch.tensor(700)
    with torch.no_grad():
        conditional = pipeline.transformer(x, 700, labels).sample
        null = pipeline.transformer(x, 700, torch.tensor([4, 4])).sample
        guided = pipeline.predict(x, timestep, labels, guided=True)
    torch.testing.assert_close(guided[..., 6:], conditional[..., 6:], rtol=0, atol=1e-6)
    expected = null[..., :6] + 3 * (conditional - null)[..., :6]
    torch.testing.assert_close(guided[..., :6], expected, rtol=0, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_labels": 4}, ValueError, "`class_labels` holds the id 4, allowed: 0 to 3"),
        ({"class_labels": [0, -1]}, ValueError, "`class_labels` holds the id -1, allowed: 0 to 3"),
        ({"class_labels": []}, ValueError, "`class_labels` is empty"),
        ({"class_labels": 1.0}, TypeError, "`class_labels` holds 1.0 of type float, allowed"),
        ({"class_labels": torch.tensor([0.5])}, TypeError, "`class_labels` holds 0.5 of type float, allowed"),
        ({"class_labels": True}, TypeError, "`class_labels` holds True of type bool, allowed"),
        ({"class_labels": "catfish"}, ValueError, "unknown name 'catfish'"),
        ({"guidance_scale": -1.0}, ValueError, "`guidance_scale` is -1.0, allowed"),
        ({"guidance_scale": math.nan}, ValueError, "`guidance_scale` is nan, allowed"),
        ({"guidance_scale": math.inf}, ValueError, "`guidance_scale` is inf, allowed"),
        ({"guidance_interval": (0.7, 0.3)}, ValueError, r"`guidance_interval` is \(0.7, 0.3\), allowed"),
        ({"guidance_interval": (-0.1, 0.3)}, ValueError, r"`guidance_interval` is \(-0.1, 0.3\), allowed"),
        ({"guidance_interval": (0.0, 1.5)}, ValueError, r"`guidance_interval` is \(0.0, 1.5\), allowed"),
        ({"guidance_interval": (0.0, math.nan)}, ValueError, r"`guidance_interval` is \(0.0, nan\), allowed"),
        ({"guidance_scale": "2"}, TypeError, "`guidance_scale` is '2', allowed: numbers"),
        ({"guidance_scale": None}, TypeError, "`guidance_scale` is None, allowed: numbers"),
        ({"guidance_interval": ("a", 1)}, TypeError, r"`guidance_interval` is \('a', 1\), allowed: two numbers"),
        (
            {"callback_on_step_end_tensor_inputs": None},
            TypeError,
            "`callback_on_step_end_tensor_inputs` is None, allowed: a list of names",
        ),
        ({"guidance_interval": 0.7}, ValueError, "`guidance_interval` is 0.7, allowed: two numbers"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0, allowed"),
        ({"num_inference_steps": 2.5}, TypeError, "`num_inference_steps` is 2.5, allowed"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "`generator` is a list of 3, allowed: .* 2 labels"),
        ({"generator": 42}, TypeError, "`generator` is 42, allowed"),
        ({"latents": torch.zeros(2, 6, 10)}, ValueError, r"`latents` has shape \(2, 6, 10\), allowed: \(2, 10, 6\)"),
        ({"latents": torch.zeros(1, 10, 6)}, ValueError, r"`latents` has shape \(1, 10, 6\), allowed: \(2, 10, 6\)"),
        ({"latents": torch.full((2, 10, 6), math.nan)}, ValueError, "`latents` holds NaN"),
        ({"latents": torch.zeros(2, 10, 6, dtype=torch.int64)}, TypeError, "`latents` is of type torch.int64"),
        ({"latents": np.zeros((2, 10, 6))}, TypeError, "`latents` is of type ndarray"),
        ({"output_type": "jpeg"}, ValueError, "`output_type` is 'jpeg', allowed"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            ValueError,
            r"`callback_on_step_end_tensor_inputs` holds \['noise'\], allowed: \['latents'\]",
        ),
    ],
)
def test_bad_input_is_refused_before_any_computation(tiny_pipeline, arguments, error, message):
    pipeline = tiny_pipeline()
    calls = record_calls(pipeline.transformer)
    with pytest.raises(error, match=message):
        pipeline(**{"class_labels": [0, 1], **arguments})
    assert not calls


def test_guidance_needs_a_null_class(tiny_pipeline):
    pipeline = tiny_pipeline(class_dropout_prob=0.0)
    assert len(pipeline([0, 1], num_inference_steps=1).images) == 2
    with pytest.raises(ValueError, match="`guidance_scale` is 1.5, allowed: at most 1 .* without label dropout"):
        pipeline([0, 1], guidance_scale=1.5)
    with pytest.raises(ValueError, match="`class_labels` holds None, allowed: class ids and .* without label dropout"):
        pipeline([0, None])


def test_latents_that_the_tokenizer_cannot_decode(tiny_pipeline):
    pipeline = tiny_pipeline()
    other = {**pipeline.transformer.config, "num_tokens": 7}
    pipeline.transformer = type(pipeline.transformer).from_config(other).eval()
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"latents of shape \(7, 6\), allowed: \(10, 6\), which `vae` decodes"):
        pipeline([0])
    assert not calls
    assert pipeline([0], num_inference_steps=1, output_type="latent").images.shape == (1, 7, 6)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), StochasticInterpolantScheduler()])
def test_flow_schedulers_refuse_a_learned_variance(tiny_pipeline, scheduler):
    pipeline = tiny_pipeline(scheduler, out_channels=12)
    with pytest.raises(ValueError, match="`scheduler` is a .*, allowed: `DDPMScheduler`"):
        pipeline([0, 1])
