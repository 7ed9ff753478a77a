"""`MARPipeline`: the official trajectories, steps, guidance, inputs, and what it shares with `SoftVQPipeline`."""

import inspect

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from PIL import Image

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.training.generator import build_token_scheduler


OWN_METHODS = ("__init__", "__call__", "check_inputs", "enable_fast_sampling", "freeze_transformer", "num_timesteps")


@pytest.fixture
def pipeline(tiny_mar_pipeline):
    return tiny_mar_pipeline()


def sample(pipeline, class_labels=(0, 1, 3), seed=0, **options):
    options = {"num_inference_steps": 4, "num_diffusion_steps": 3, "output_type": "latent"} | options
    if "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(list(class_labels), **options).images


# The official numbers


def official_pipeline(golden, pipeline):
    description, tensors = golden("mar")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    transformer = convert_checkpoint("mar", weights, description["config"])
    pipeline.register_modules(transformer=transformer, scheduler=build_token_scheduler())
    return pipeline, tensors, description["sample_runs"]


def official_sample(pipeline, tensors, run, settings, **options):
    return pipeline(
        tensors["input.sample.labels"],
        guidance_scale=settings["cfg"],
        guidance_schedule=settings["cfg_schedule"],
        num_inference_steps=settings["num_iter"],
        temperature=settings["temperature"],
        orders=tensors[f"input.sample.{run}.orders"],
        token_noise=tensors[f"input.sample.{run}.noise"],
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("run", ["nocfg", "cfg_linear", "cfg_constant"])
def test_official_trajectories(golden, pipeline, run):
    pipeline, tensors, runs = official_pipeline(golden, pipeline)
    steps = []

    def record(_, step, num_known, tensors):
        steps.append((num_known, (tensors["latents"] != 0).all(dim=2)))
        return {}

    latents = official_sample(pipeline, tensors, run, runs[run], callback_on_step_end=record)
    # 1e-3 is what the reference allows; float32 tables alone would move the result by 1e-4
    torch.testing.assert_close(latents, tensors[f"output.sample.{run}.latents"], atol=5e-5, rtol=0)
    known = torch.stack([mask for _, mask in steps])
    assert torch.equal((~known).sum(0), tensors[f"output.sample.{run}.step_of_token"])
    assert [3 * num_known for num_known, _ in steps] == list(np.cumsum(runs[run]["n_predicted_per_step"]))
    plan = pipeline.plan_steps(runs[run]["num_iter"], runs[run]["cfg"], runs[run]["cfg_schedule"])
    assert [scale for _, scale in plan] == runs[run]["cfg_scale_per_step"]
    assert [remaining for remaining, _ in plan[:-1]] == runs[run]["mask_len_per_step"][:-1]


@pytest.mark.slow
@pytest.mark.parametrize("freeze_weights", [False, True])
def test_fast_sampling_keeps_the_official_trajectory(golden, pipeline, freeze_weights):
    pipeline, tensors, runs = official_pipeline(golden, pipeline)
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    latents = official_sample(pipeline, tensors, "cfg_linear", runs["cfg_linear"])
    torch.testing.assert_close(latents, tensors["output.sample.cfg_linear.latents"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("run", ["nocfg_t095", "cfg3"])
def test_official_chains_of_single_tokens(official_denoiser, pipeline, run):
    transformer, tensors, description = official_denoiser
    settings = description["sample_runs"][run]
    pipeline.register_modules(transformer=transformer, scheduler=build_token_scheduler())
    pipeline.scheduler.set_timesteps(100)
    trajectory = []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *args, **options: trajectory.append(step(*args, **options)) or trajectory[-1]

    is_guided = settings["cfg"] > 1
    conditions = torch.cat(
        [tensors["input.z_cond"], tensors["input.z_uncond"]] if is_guided else [tensors["input.z_cond"]]
    )
    with torch.no_grad():
        tokens = pipeline.make_tokens(
            conditions,
            transformer.embed_timesteps(pipeline.scheduler.timesteps),
            settings["cfg"] if is_guided else None,
            settings["temperature"],
            tensors["input.sample_noise"],
        )
    torch.testing.assert_close(tokens, tensors[f"output.sample.{run}.sample"], atol=1e-4, rtol=0)
    steps, data = (torch.stack([entry[i] for entry in trajectory]) for i in range(2))
    torch.testing.assert_close(steps, tensors[f"output.sample.{run}.trajectory"], atol=1e-3, rtol=0)
    # the first step multiplies errors of the noise by 20,000
    torch.testing.assert_close(data[1:], tensors[f"output.sample.{run}.pred_xstart"][1:], atol=1e-3, rtol=0)


# Steps


@pytest.mark.parametrize(
    ("num_tokens", "num_inference_steps", "expected"),
    [
        (64, 32, [1] * 13 + [2, 2, 2, 3, 2, 2, 3, 3, 2] + [3] * 10),
        (64, 16, [1, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6]),
        (64, 64, [1] * 64),
        (64, 100, [1] * 64),
        (10, 1, [10]),
        (1, 1, [1]),
        (1, 5, [1]),
    ],
)
def test_tokens_of_each_step(pipeline, num_tokens, num_inference_steps, expected):
    pipeline.transformer.num_tokens = num_tokens
    plan = pipeline.plan_steps(num_inference_steps, 3.0, "linear")
    remaining = [num_tokens, *(remaining for remaining, _ in plan)]
    assert [before - after for before, after in zip(remaining, remaining[1:], strict=False)] == expected
    scales = [scale for _, scale in plan]
    assert scales == sorted(scales) and (len(plan) == 1 or 1 < scales[0] < scales[-1] < 3)
    assert {scale for _, scale in pipeline.plan_steps(num_inference_steps, 3.0, "constant")} == {3.0}


def test_more_steps_than_tokens(pipeline):
    latents = sample(pipeline, num_inference_steps=25)
    assert torch.equal(latents, sample(pipeline, num_inference_steps=10))
    assert pipeline.num_timesteps == 10


def test_every_token_is_made_once(pipeline):
    made = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, options: made.append(options["predicted_positions"][0].tolist()), with_kwargs=True
    )
    sample(pipeline, [2], num_inference_steps=6)
    assert sorted(sum(made, [])) == list(range(10))


def test_denoiser_works_on_the_tokens_of_the_step_alone(pipeline, monkeypatch):
    rows = []
    denoise = pipeline.transformer.denoise
    monkeypatch.setattr(
        pipeline.transformer,
        "denoise",
        lambda tokens, **inputs: rows.append(len(tokens)) or denoise(tokens, **inputs),
    )
    for guidance_scale, copies in ((1.0, 1), (2.0, 2)):
        rows.clear()
        sample(pipeline, num_inference_steps=10, guidance_scale=guidance_scale)
        assert rows == [3 * copies] * 30


# Guidance and noise


def test_guidance_extrapolates_from_null_to_conditional(pipeline):
    noise = torch.randn(4, 3, 10, 6)
    orders = torch.stack([torch.randperm(10) for _ in range(3)])
    options = {"num_inference_steps": 1, "orders": orders, "token_noise": noise, "guidance_schedule": "constant"}
    pipeline.scheduler = build_token_scheduler()
    plain = sample(pipeline, **options)
    assert torch.equal(sample(pipeline, guidance_scale=0.5, **options), plain)
    guided = {scale: sample(pipeline, guidance_scale=scale, **options) for scale in (1 + 1e-6, 2.0)}
    torch.testing.assert_close(guided[1 + 1e-6], plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guided[2.0], plain, rtol=1e-2, atol=1e-2)


def test_no_label_is_the_null_class(pipeline):
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["class_labels"].tolist()), with_kwargs=True
    )
    unguided = sample(pipeline, [None, 1, None])
    assert seen[-1] == [4, 1, 4]
    guided = sample(pipeline, [None, 1, None], guidance_scale=2.0)
    assert seen[-1] == [4, 1, 4, 4, 4, 4]
    # there is nothing that guidance could lead away from
    torch.testing.assert_close(guided[[0, 2]], unguided[[0, 2]], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guided[1], unguided[1], rtol=1e-2, atol=1e-2)
    pipeline.transformer.register_to_config(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`class_labels` holds None, allowed: class ids and .* without label dropout"):
        sample(pipeline, [None])


def test_generators(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    together = sample(pipeline, generator=generators)
    alone = sample(pipeline, [1], generator=[torch.Generator().manual_seed(8)])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(sample(pipeline, seed=5), sample(pipeline, seed=5))
    assert not torch.equal(sample(pipeline, seed=5), sample(pipeline, seed=6))


def test_temperature_and_orders_matter(pipeline):
    expected = sample(pipeline)
    assert not torch.equal(sample(pipeline, temperature=0.5), expected)
    orders = torch.arange(10).expand(3, -1)
    assert torch.equal(sample(pipeline, orders=orders), sample(pipeline, orders=orders.int()))
    assert not torch.equal(sample(pipeline, orders=orders), sample(pipeline, orders=orders.flip(1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_transformer_keeps_float32_latents(pipeline, dtype):
    expected = sample(pipeline)
    pipeline.transformer.to(dtype)
    latents = sample(pipeline)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, atol=0.3, rtol=0.1)


# Input and output


def test_output_types(pipeline):
    latents = sample(pipeline)
    assert latents.shape == (3, 10, 6)
    images = sample(pipeline, output_type="pt")
    assert images.shape == (3, 3, 16, 16) and 0 <= images.min() <= images.max() <= 1
    decoded = pipeline.vae.decode(pipeline.vae.unscale_latent(latents)).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert sample(pipeline, output_type="np").shape == (3, 16, 16, 3)
    assert isinstance(sample(pipeline, output_type="pil")[0], Image.Image)
    assert isinstance(pipeline([0], num_inference_steps=1, num_diffusion_steps=1, return_dict=False), tuple)


def test_names(pipeline):
    assert torch.equal(sample(pipeline, ["goldfish", "heron", 1]), sample(pipeline, [3, 2, 1]))


def test_callback_sees_and_changes_latents(pipeline):
    seen = []

    def change(pipeline, step, num_known, tensors):
        seen.append((step, num_known, tensors["latents"].clone()))
        return {"latents": torch.full_like(tensors["latents"], 2.0)} if step == 1 else {}

    latents = sample(pipeline, num_inference_steps=2, callback_on_step_end=change)
    assert [(step, num_known) for step, num_known, _ in seen] == [(0, 3), (1, 10)]
    assert (seen[0][2] == 0).all(dim=2).sum(dim=1).tolist() == [7, 7, 7]
    assert (latents == 2.0).all()

    def stop(pipeline, step, num_known, tensors):
        pipeline._interrupt = step == 0
        return {}

    latents = sample(pipeline, num_inference_steps=10, callback_on_step_end=stop)
    assert (latents == 0).all(dim=2).sum(dim=1).tolist() == [9, 9, 9]


def test_progress_bar(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False)
    sample(pipeline, num_inference_steps=30)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "`temperature` is 0.0, allowed: finite numbers above 0"),
        ({"temperature": -1.0}, ValueError, "`temperature` is -1.0, allowed"),
        ({"temperature": float("nan")}, ValueError, "`temperature` is nan, allowed"),
        (
            {"guidance_schedule": "cosine"},
            ValueError,
            "`guidance_schedule` is 'cosine', allowed: 'linear', 'constant'",
        ),
        ({"guidance_scale": float("inf")}, ValueError, "`guidance_scale` is inf, allowed"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0, allowed: integers from 1 on"),
        ({"temperature": "1"}, TypeError, "`temperature` is '1', allowed: numbers"),
        ({"guidance_scale": None}, TypeError, "`guidance_scale` is None, allowed: numbers"),
        ({"num_inference_steps": 2.5}, TypeError, "`num_inference_steps` is 2.5, allowed: integers"),
        ({"num_diffusion_steps": 0}, ValueError, "`num_diffusion_steps` is 0, allowed: integers from 1 on"),
        ({"num_diffusion_steps": 1001}, ValueError, "`num_diffusion_steps` is 1001, allowed: up to 1000"),
        ({"generator": [torch.Generator()]}, ValueError, "`generator` is a list of 1, allowed"),
        ({"generator": 3}, TypeError, "`generator` is 3, allowed"),
        ({"orders": torch.zeros(3, 10)}, TypeError, "`orders` is of type torch.float32, allowed"),
        ({"orders": torch.zeros(3, 9).long()}, ValueError, r"`orders` has shape \(3, 9\), allowed: \(3, 10\)"),
        ({"orders": torch.zeros(3, 10).long()}, ValueError, r"`orders` holds a row that is no permutation of 0..9"),
        ({"token_noise": torch.zeros(3, 3, 10, 6)}, ValueError, r"`token_noise` has shape \(3, 3, 10, 6\), allowed"),
        ({"token_noise": torch.zeros(4, 3, 10, 6).long()}, TypeError, "`token_noise` is of type torch.int64"),
        ({"token_noise": torch.full((4, 3, 10, 6), torch.nan)}, ValueError, "`token_noise` holds NaN"),
        ({"output_type": "jpg"}, ValueError, "`output_type` is 'jpg', allowed"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "`callback_on_step_end_tensor_inputs` holds"),
        ({"callback_on_step_end_tensor_inputs": None}, TypeError, "`callback_on_step_end_tensor_inputs` is None"),
        ({"class_labels": []}, ValueError, "`class_labels` is empty"),
        ({"class_labels": [4]}, ValueError, "`class_labels` holds the id 4, allowed: 0 to 3"),
        ({"class_labels": ["carp"]}, ValueError, "`class_labels` holds the unknown name 'carp'"),
    ],
)
def test_bad_input_is_refused_before_any_computation(pipeline, options, error, message):
    pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the transformer was called"))
    with pytest.raises(error, match=message):
        sample(pipeline, **options)


def test_latents_that_the_tokenizer_cannot_decode(pipeline):
    pipeline.transformer.num_tokens = 9
    with pytest.raises(ValueError, match=r"makes latents of shape \(9, 6\), allowed: latents of shape \(10, 6\)"):
        sample(pipeline, output_type="pt")
    pipeline.transformer.num_tokens, pipeline.transformer.is_2d = 10, True
    with pytest.raises(
        ValueError, match=r"makes patches of 2-D latents of shape \(10, 6\), allowed: latents of shape"
    ):
        sample(pipeline, output_type="pt")
    pipeline.transformer.is_2d = False
    pipeline.register_modules(vae=AutoencoderKL(latent_channels=6))
    with pytest.raises(ValueError, match="makes 1-D latents of 6 channels, allowed: 2-D latents of 6 channels"):
        sample(pipeline, output_type="pt")


def test_guidance_needs_a_null_class(pipeline):
    pipeline.transformer.register_to_config(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`guidance_scale` is 2.0, allowed: at most 1 for this transformer"):
        sample(pipeline, guidance_scale=2.0)
    assert sample(pipeline).shape == (3, 10, 6)


def test_other_schedulers_are_refused(pipeline):
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="`scheduler` is a DDPMScheduler, allowed: `TemperatureDDPMScheduler`"):
        sample(pipeline)


def test_conditioning_is_left_to_a_denoiser_with_hooks(pipeline):
    expected = sample(pipeline, guidance_scale=2.0)
    assert pipeline.precomputes_conditioning
    embedded = []
    layer = pipeline.transformer.denoiser.condition_embedder
    layer.register_forward_hook(lambda *_: embedded.append(1))
    sample(pipeline, guidance_scale=2.0)
    assert len(embedded) == 4  # once for each autoregressive step
    for module in pipeline.transformer.denoiser.modules():
        add_hook_to_module(module, ModelHook())
    assert not pipeline.precomputes_conditioning
    embedded.clear()
    torch.testing.assert_close(sample(pipeline, guidance_scale=2.0), expected, atol=1e-5, rtol=1e-5)
    assert len(embedded) == 12  # once for each step of the chain


def record_compiled(monkeypatch) -> list[torch.nn.Module]:
    """A list that fills with what is compiled; nothing is."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    return compiled


@pytest.mark.parametrize("freeze_weights", [False, True])
def test_weights_are_frozen_while_the_denoiser_is_called(pipeline, freeze_weights, monkeypatch):
    compiled = record_compiled(monkeypatch)
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    seen = []
    pipeline.transformer.denoiser.register_forward_pre_hook(lambda *_: seen.append(torch._inductor.config.freezing))
    sample(pipeline)
    assert set(seen) == {freeze_weights} and not torch._inductor.config.freezing

    compiled.clear()
    for weight in pipeline.transformer.denoiser.parameters():
        weight.data *= 2  # as a LoRA is fused, and averages are copied
    for _ in range(2):
        sample(pipeline)
        assert compiled.count(pipeline.transformer.denoiser) == freeze_weights


def change_an_entry(transformer) -> None:
    with torch.no_grad():
        transformer.denoiser.blocks[0].modulation.weight[0, 2] += 1.0


def replace_a_weight(transformer) -> None:
    layer = transformer.denoiser.proj_in
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


@pytest.mark.parametrize("change", [change_an_entry, replace_a_weight])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_denoiser_is_frozen_anew_only_after_a_change(pipeline, monkeypatch, change, wrapped):
    compiled = record_compiled(monkeypatch)
    replace_a_weight(pipeline.transformer)  # all such tensors have as many changes in place
    transformer, own_vae = pipeline.transformer, pipeline.vae.forward
    pipeline.enable_fast_sampling(freeze_weights=True)
    pipeline.vae._compiled_call_impl = own_vae  # as of its owner
    if wrapped:
        pipeline.transformer = torch.compile(transformer, backend="eager")
    frozen = [*transformer.encoder_blocks, *transformer.decoder_blocks, transformer.denoiser]
    assert {id(module) for module in frozen} <= {id(module) for module in compiled}
    compiled.clear()
    sample(pipeline)
    assert not compiled
    taken = [entry_bytes for _, _, entry_bytes in pipeline.get_weight_versions()]
    change(transformer)
    assert taken == [entry_bytes for _, _, entry_bytes in pipeline.get_weight_versions()]  # not seen by these
    for _ in range(2):
        sample(pipeline)
        assert [id(module) for module in compiled] == [id(module) for module in frozen]
    assert pipeline.vae._compiled_call_impl is own_vae


def test_a_denoiser_that_is_compiled_anew_without_freezing_is_frozen_no_longer(pipeline, monkeypatch):
    compiled = record_compiled(monkeypatch)
    pipeline.enable_fast_sampling(freeze_weights=True)
    pipeline.enable_fast_sampling()
    compiled.clear()
    change_an_entry(pipeline.transformer)
    sample(pipeline)
    assert not compiled


@pytest.mark.slow
def test_a_frozen_denoiser_that_changes_is_frozen_anew(pipeline, caplog):
    pipeline.enable_fast_sampling(freeze_weights=True)
    before = sample(pipeline)
    weights = {name: weight * 0.5 for name, weight in pipeline.transformer.denoiser.state_dict().items()}
    pipeline.transformer.denoiser.load_state_dict(weights)
    result = sample(pipeline)
    assert "frozen anew" in caplog.text
    eager = MARPipeline(
        pipeline.vae, MARTransformer1DModel.from_config(pipeline.transformer.config), pipeline.scheduler
    )
    eager.transformer.load_state_dict(pipeline.transformer.state_dict())
    eager.transformer.eval()
    eager.set_progress_bar_config(disable=True)
    expected = sample(eager)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_fast_sampling_again_replaces_what_was_compiled(tiny_mar_pipeline):
    pipeline = tiny_mar_pipeline()
    pipeline.enable_fast_sampling(freeze_weights=True)
    assert pipeline.transformer.denoiser._compiled_call_impl is not None
    pipeline.enable_fast_sampling()
    assert pipeline.transformer.denoiser._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in pipeline.transformer.denoiser.blocks)


# Loading, and the methods that stand in both pipelines


def test_save_and_load(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = MARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, guidance_scale=2.0), sample(pipeline, guidance_scale=2.0))
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=inspect.getsourcefile(MARPipeline), trust_remote_code=True
    )
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, guidance_scale=2.0), sample(pipeline, guidance_scale=2.0))


def test_copied_methods_are_the_same():
    source = inspect.getsource(MARPipeline)
    mark = "    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline\n"
    copied = 0
    for name, member in vars(SoftVQPipeline).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not inspect.isfunction(function) or name not in vars(MARPipeline):
            continue
        text = inspect.getsource(function).replace("SoftVQPipeline", "MARPipeline")
        is_marked = mark + text in source
        assert is_marked == (name not in OWN_METHODS), name
        copied += is_marked
    assert copied == source.count(mark) == 12
