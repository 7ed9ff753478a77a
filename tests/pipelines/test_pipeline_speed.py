"""What makes SoftVQPipeline fast: modulations once for each step and class, no reading back, compiled blocks."""

import copy
import itertools

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines import pipeline_softvq
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


def record_modulated_rows(transformer) -> list[int]:
    """A list that fills with the number of rows of every modulation that the first block computes."""
    rows = []
    transformer.transformer_blocks[0].norm1.linear.register_forward_hook(
        lambda _, inputs, output: rows.append(len(inputs[0]))
    )
    return rows


def compute_in_the_transformer(pipeline) -> None:
    """Leave the modulation to the transformer's own forward pass."""
    pipeline.modulate = lambda timesteps, class_ids, guided: iter([None] * len(timesteps))


ARGUMENTS = {
    "guidance_scale": 2.0,
    "guidance_interval": (0.0, 0.7),
    "num_inference_steps": 10,
    "output_type": "latent",
}


@pytest.mark.parametrize("labels", [[3], [0, 3, 3, 1], [2, 2, 2, 2, 2]])
@pytest.mark.parametrize("make_scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_modulation_is_computed_once_for_each_step_and_class(tiny_pipeline, make_scheduler, labels):
    latents = torch.randn(len(labels), 10, 6)
    expected_pipeline = tiny_pipeline(make_scheduler())
    compute_in_the_transformer(expected_pipeline)
    expected = expected_pipeline(labels, latents=latents, **ARGUMENTS).images

    pipeline = tiny_pipeline(make_scheduler())
    rows = record_modulated_rows(pipeline.transformer)
    result = pipeline(labels, latents=latents, **ARGUMENTS).images

    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    num_calls = pipeline.num_timesteps
    # with the null class, 64 rows at a time are those of all steps
    assert sum(rows) <= num_calls * (len(set(labels)) + 1)
    assert len(rows) == -(-num_calls // (64 // (len(set(labels)) + 1)))


def test_steps_without_guidance_need_no_null_class(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(pipeline_softvq, "MODULATION_ROWS", 2)  # one step at a time
    pipeline = tiny_pipeline()
    rows = record_modulated_rows(pipeline.transformer)
    pipeline([1, 1], **ARGUMENTS)
    assert rows == [1, 1, 1] + [2] * 7  # times 1, 0.9 and 0.8 lie above the interval


def test_classes_without_a_null_class(tiny_pipeline):
    pipeline = tiny_pipeline(class_dropout_prob=0.0)
    rows = record_modulated_rows(pipeline.transformer)
    pipeline([1, 3, 1], num_inference_steps=4, output_type="latent")
    assert rows == [8]


def test_a_callback_may_turn_guidance_on(tiny_pipeline):
    def guide(pipeline, step, timestep, callback_kwargs):
        pipeline._guidance_scale = 2.0
        return callback_kwargs

    latents = torch.randn(2, 10, 6)
    arguments = {"num_inference_steps": 3, "latents": latents, "output_type": "latent", "callback_on_step_end": guide}
    expected_pipeline = tiny_pipeline()
    compute_in_the_transformer(expected_pipeline)
    expected = expected_pipeline([0, 1], **arguments).images
    torch.testing.assert_close(tiny_pipeline()([0, 1], **arguments).images, expected, rtol=0, atol=1e-5)
    unguided = tiny_pipeline()([0, 1], **{**arguments, "callback_on_step_end": None}).images
    assert not torch.allclose(expected, unguided, atol=1e-3)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_weights_that_hooks_move_stay_in_the_blocks(tiny_pipeline, offload_type):
    latents = torch.randn(2, 10, 6)
    expected = tiny_pipeline()([0, 1], latents=latents, **ARGUMENTS).images
    pipeline = tiny_pipeline()
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipeline.transformer.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **options)
    rows = record_modulated_rows(pipeline.transformer)
    result = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert rows == [2, 2, 2] + [4] * 7  # of each call, by the block itself


@pytest.mark.parametrize(
    ("scheduler", "transformer_config"),
    [
        (FlowMatchEulerDiscreteScheduler(), {}),
        (FlowMatchHeunDiscreteScheduler(), {}),
        (StochasticInterpolantScheduler(), {}),
        (StochasticInterpolantScheduler(path_type="cosine"), {}),
        (DDPMScheduler(variance_type="learned_range", clip_sample=False), {"out_channels": 12, "timestep_scale": 1.0}),
        (DDIMScheduler(clip_sample=False), {"out_channels": 12, "timestep_scale": 1.0}),
    ],
    ids=["euler", "heun", "sde_linear", "sde_cosine", "ddpm", "ddim"],
)
def test_nothing_is_read_back_while_sampling(tiny_pipeline, scheduler, transformer_config):
    """Tensors on the meta device have no values: whatever waits for one of an accelerator fails on them."""
    pipeline = tiny_pipeline(scheduler, **transformer_config).to("meta")
    latents = pipeline([0, 3, 3], **ARGUMENTS).images
    assert latents.is_meta and latents.shape == (3, 10, 6)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        latents.sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("freeze_weights", [False, True])
@pytest.mark.parametrize("sampler", ["euler", "em_cosine"])
def test_fast_sampling_keeps_the_reference_trajectories(golden, tiny_pipeline, sampler, freeze_weights):
    reference, tensors = golden("sit")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=convert_checkpoint("sit", weights, reference["config"]))
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    if sampler == "em_cosine":
        noise = iter(tensors["input.noise"])
        pipeline.scheduler = StochasticInterpolantScheduler(path_type="cosine")
        step = pipeline.scheduler.step
        pipeline.scheduler.step = lambda *arguments, generator=None, **options: step(
            *arguments, variance_noise=next(noise, None), **options
        )

    sampling = reference["sampling"]
    latents = pipeline(
        tensors["input.y"],
        guidance_scale=sampling["cfg_scale"],
        guidance_interval=(sampling["guidance_low"], sampling["guidance_high"]),
        num_inference_steps=sampling["num_steps"],
        latents=tensors["input.latents"],
        output_type="latent",
    ).images
    torch.testing.assert_close(latents.double(), tensors[f"output.{sampler}_cfg"], rtol=0, atol=1e-5)
    compiled = [pipeline.transformer] if freeze_weights else pipeline.transformer.transformer_blocks
    assert all(module._compiled_call_impl is not None for module in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("freeze_weights", [False, True])
def test_fast_sampling_again_takes_new_weights(tiny_pipeline, freeze_weights):
    pipeline, expected_pipeline = tiny_pipeline(), tiny_pipeline()
    pipeline.enable_fast_sampling(freeze_weights=True)
    latents = torch.randn(2, 10, 6)
    before = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    weights = {name: torch.randn_like(weight) * 0.2 for name, weight in pipeline.transformer.state_dict().items()}
    for transformer in (pipeline.transformer, expected_pipeline.transformer):
        transformer.load_state_dict(weights)
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    result = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    expected = expected_pipeline([0, 1], latents=latents, **ARGUMENTS).images
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_frozen_weights_that_change_are_frozen_anew(tiny_pipeline, wrapped, caplog):
    """Also below a later `torch.compile`, which finds the frozen programs."""
    pipeline, expected_pipeline = tiny_pipeline(), tiny_pipeline()
    pipeline.enable_fast_sampling(freeze_weights=True)
    latents = torch.randn(2, 10, 6)
    before = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    own_transformer = pipeline.transformer
    if wrapped:
        pipeline.transformer = torch.compile(own_transformer)
    torch.testing.assert_close(pipeline([0, 1], latents=latents, **ARGUMENTS).images, before, rtol=0, atol=1e-5)
    assert "frozen anew" not in caplog.text
    weights = {name: torch.randn_like(weight) * 0.2 for name, weight in own_transformer.state_dict().items()}
    for transformer in (own_transformer, expected_pipeline.transformer):
        transformer.load_state_dict(weights)
    result = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    expected = expected_pipeline([0, 1], latents=latents, **ARGUMENTS).images
    assert "frozen anew" in caplog.text
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def count_frozen(monkeypatch) -> list[str]:
    """A list that fills with the modes in which transformers are compiled as a whole; nothing is."""
    modes = []

    def compile_module(module, mode):
        if isinstance(module, DiTTransformer1DModel):
            modes.append(mode)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    return modes


@pytest.mark.parametrize("inference_mode", [False, True])
def test_weights_are_frozen_anew_only_after_a_change(tiny_pipeline, inference_mode, monkeypatch):
    with torch.inference_mode(inference_mode):
        pipeline = tiny_pipeline()
    frozen = count_frozen(monkeypatch)
    pipeline.enable_fast_sampling("default", freeze_weights=True)
    for _ in range(2):
        pipeline([0], num_inference_steps=2, output_type="latent")
    assert frozen == ["default"]
    layer = pipeline.transformer.proj_out
    if inference_mode:  # changes of such a tensor are not counted
        layer.weight = torch.nn.Parameter(layer.weight.clone())
    else:
        layer.load_state_dict({name: weight + 1 for name, weight in layer.state_dict().items()})
    pipeline([0], num_inference_steps=2, output_type="latent")
    assert frozen == ["default"] * 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_entry_that_changes_or_a_weight_that_is_replaced_is_seen_once(tiny_pipeline, monkeypatch, wrapped):
    pipeline = tiny_pipeline()
    frozen = count_frozen(monkeypatch)
    transformer = pipeline.transformer
    layer = transformer.proj_out
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())  # such tensors have as many changes in place
    pipeline.enable_fast_sampling(freeze_weights=True)
    if wrapped:
        pipeline.transformer = torch.compile(transformer, backend="eager")
    sampled = [sample for _, _, sample in pipeline.get_weight_versions()]
    with torch.no_grad():
        transformer.transformer_blocks[0].norm1.linear.weight[0, 1] += 1.0
    assert sampled == [sample for _, _, sample in pipeline.get_weight_versions()]  # not by its bytes
    for _ in range(2):
        pipeline([0], num_inference_steps=2, output_type="latent")
        assert len(frozen) == 2
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    pipeline([0], num_inference_steps=2, output_type="latent")
    assert len(frozen) == 3


def test_a_transformer_that_is_compiled_anew_without_freezing_is_frozen_no_longer(tiny_pipeline, monkeypatch):
    pipeline = tiny_pipeline()
    frozen = count_frozen(monkeypatch)
    pipeline.enable_fast_sampling(freeze_weights=True)
    pipeline.enable_fast_sampling()
    pipeline.transformer.load_state_dict({name: w + 1 for name, w in pipeline.transformer.state_dict().items()})
    pipeline([0], num_inference_steps=2, output_type="latent")
    assert len(frozen) == 1


@pytest.mark.slow
@pytest.mark.parametrize("freeze_weights", [False, True])
def test_fast_sampling_of_a_wrapped_transformer(tiny_pipeline, freeze_weights):
    pipeline, expected_pipeline = tiny_pipeline(), tiny_pipeline()
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    expected_pipeline.transformer.load_state_dict(pipeline.transformer.state_dict())
    transformer, pipeline.transformer = pipeline.transformer, torch.compile(pipeline.transformer)
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    compiled = [transformer] if freeze_weights else transformer.transformer_blocks
    assert all(module._compiled_call_impl is not None for module in compiled)
    latents = torch.randn(2, 10, 6)
    result = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    expected = expected_pipeline([0, 1], latents=latents, **ARGUMENTS).images
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def fuse_lora(transformer) -> None:
    transformer.fuse_lora()
    transformer.unload_lora()


def copy_averages(transformer) -> None:
    other = [torch.randn_like(parameter) for parameter in transformer.parameters()]
    EMAModel(other).copy_to(transformer.parameters())


def round_to_bfloat16(transformer) -> None:
    transformer.to(torch.bfloat16).to(torch.float32)


def scale_last_columns(transformer) -> None:
    for weight in transformer.transformer_blocks.parameters():
        weight.data[..., weight.shape[-1] // 2 :] *= 3


@pytest.mark.parametrize("change", [fuse_lora, copy_averages, round_to_bfloat16, scale_last_columns])
def test_changes_that_torch_does_not_count_are_seen(tiny_pipeline, monkeypatch, change):
    """These write to `.data`."""
    pipeline = tiny_pipeline(num_attention_heads=8, attention_head_dim=16)
    frozen = count_frozen(monkeypatch)
    pipeline.enable_fast_sampling(freeze_weights=True)
    if change is fuse_lora:
        pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    versions = [weight._version for weight in pipeline.transformer.parameters()]
    change(pipeline.transformer)
    assert change is fuse_lora or versions == [weight._version for weight in pipeline.transformer.parameters()]
    for _ in range(2):
        pipeline([0], num_inference_steps=2, output_type="latent")
        assert len(frozen) == 2


@pytest.mark.slow
def test_a_lora_that_is_fused_into_frozen_weights(tiny_pipeline):
    """With the base weights frozen, which it changes without a trace: its own are gone before the next call."""
    pipeline, expected_pipeline = tiny_pipeline(), tiny_pipeline()
    for parameter in pipeline.transformer.parameters():  # a new one predicts zeros
        torch.nn.init.normal_(parameter, std=0.2)
    expected_pipeline.transformer.load_state_dict(pipeline.transformer.state_dict())
    pipeline.enable_fast_sampling(freeze_weights=True)
    latents = torch.randn(2, 10, 6)
    before = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    for transformer in (pipeline.transformer, expected_pipeline.transformer):
        torch.manual_seed(1)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v", "linear"], init_lora_weights=False))
        fuse_lora(transformer)
    result = pipeline([0, 1], latents=latents, **ARGUMENTS).images
    expected = expected_pipeline([0, 1], latents=latents, **ARGUMENTS).images
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_pipelines_that_share_a_frozen_transformer(tiny_pipeline, monkeypatch):
    pipeline = tiny_pipeline()
    other = SoftVQPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    other.vae = tiny_pipeline().vae
    frozen = count_frozen(monkeypatch)
    pipeline.enable_fast_sampling(freeze_weights=True)
    other.vae._compiled_call_impl = own = other.vae.forward  # as of its owner
    pipeline.transformer.load_state_dict({name: w + 1 for name, w in pipeline.transformer.state_dict().items()})
    for each in (other, pipeline):  # the first sees it for both
        each([0], num_inference_steps=2, output_type="latent")
        assert len(frozen) == 2
    assert other.vae._compiled_call_impl is own
    copied = tiny_pipeline()
    copied.transformer = copy.deepcopy(pipeline.transformer)  # which is not compiled
    copied([0], num_inference_steps=2, output_type="latent")
    assert len(frozen) == 2


def test_modulation_is_computed_apart_for_a_transformer_that_torch_compile_has_wrapped(tiny_pipeline):
    pipeline = tiny_pipeline()
    rows = record_modulated_rows(pipeline.transformer)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline([0, 1], **ARGUMENTS)
    assert len(rows) == 1


@pytest.mark.slow
def test_each_batch_size_of_fast_sampling_has_one_program(tiny_pipeline):
    """The place of a step among the timesteps makes no other one."""
    torch.compiler.reset()
    pipeline = tiny_pipeline()
    pipeline.enable_fast_sampling(freeze_weights=True)
    counters = torch._dynamo.utils.counters["stats"]
    programs = [counters["unique_graphs"]]
    # guided in the last 7 of 10 steps: each batch size comes up at several steps; the third is a dynamic one
    for labels in ([0, 1], [0, 1, 2], [0, 1, 2, 3, 3]):
        pipeline(labels, **ARGUMENTS)
        programs.append(counters["unique_graphs"])
    assert [after - before for before, after in itertools.pairwise(programs)] == [2, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("freeze_weights", [False, True])
def test_fast_sampling_decodes_the_same_images(tiny_pipeline, freeze_weights):
    latents = torch.randn(2, 10, 6)
    expected = tiny_pipeline()([0, 1], latents=latents, num_inference_steps=2, output_type="pt").images
    pipeline = tiny_pipeline()
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    images = pipeline([0, 1], latents=latents, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("freeze_weights", [False, True])
def test_fast_sampling_in_bfloat16(tiny_pipeline, freeze_weights):
    """Within the tolerance of `benchmarks/generation.py`, beside the pipeline that computes all of it in bfloat16."""

    def build():
        pipeline = tiny_pipeline()
        for parameter in pipeline.transformer.parameters():  # a new one predicts zeros
            torch.nn.init.normal_(parameter, std=0.1)
        return pipeline.to(torch.bfloat16)

    latents = torch.randn(3, 10, 6)
    expected_pipeline = build()
    compute_in_the_transformer(expected_pipeline)
    pipeline = build()
    pipeline.transformer.load_state_dict(expected_pipeline.transformer.state_dict())
    expected = expected_pipeline([0, 1, 1], latents=latents, **ARGUMENTS).images
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    result = pipeline([0, 1, 1], latents=latents, **ARGUMENTS).images
    assert pipeline.transformer.dtype == torch.bfloat16
    assert (expected - latents).abs().max() > 0.1  # the transformer has moved them
    assert (result - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_cuda_graphs_compile_the_transformer_as_a_whole(tiny_pipeline, mode):
    """On a CPU the compiler leaves the graphs out."""
    latents = torch.randn(2, 10, 6)
    expected = tiny_pipeline()([0, 1], latents=latents, **ARGUMENTS | {"output_type": "pt"}).images
    pipeline = tiny_pipeline()
    pipeline.enable_fast_sampling(mode=mode)
    assert pipeline.transformer._compiled_call_impl is not None
    assert not any(block._compiled_call_impl for block in pipeline.transformer.transformer_blocks)
    images = pipeline([0, 1], latents=latents, **ARGUMENTS | {"output_type": "pt"}).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "of_blocks"), [("reduce-overhead", "default"), ("max-autotune", "max-autotune-no-cudagraphs")]
)
def test_blocks_are_compiled_without_cuda_graphs(tiny_pipeline, monkeypatch, mode, of_blocks):
    """The graph of a block would overwrite what the one before has left."""
    modes = {}
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: modes.setdefault(options["mode"], []).append(type(self))
    )
    pipeline = tiny_pipeline()
    pipeline.enable_fast_sampling(mode=mode)
    assert modes.pop(mode) == [type(pipeline.transformer)]
    assert modes.keys() == {of_blocks} and len(modes[of_blocks]) > 1


def test_convolutions_of_a_2d_tokenizer_get_the_channels_last_format(tiny_pipeline, monkeypatch):
    count_frozen(monkeypatch)
    pipeline = tiny_pipeline()
    pipeline.vae = AutoencoderKL(block_out_channels=(32,), layers_per_block=1, latent_channels=4)
    weight = pipeline.vae.decoder.conv_in.weight
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    pipeline.enable_fast_sampling()
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_what_the_transformer_gave_may_be_overwritten_by_its_next_call(tiny_pipeline):
    """As a CUDA graph does; PNDM keeps predictions, and in float32 a cast would not copy them."""
    latents = torch.randn(2, 10, 6)
    expected_pipeline = tiny_pipeline(PNDMScheduler(skip_prk_steps=True), timestep_scale=1.0)
    expected = expected_pipeline([0, 1], latents=latents, output_type="latent").images
    pipeline = tiny_pipeline(PNDMScheduler(skip_prk_steps=True), timestep_scale=1.0)
    memory = torch.empty(2, 10, 6)
    pipeline.transformer.register_forward_hook(lambda module, inputs, output: (memory.copy_(output[0]),))
    result = pipeline([0, 1], latents=latents, output_type="latent").images
    assert (expected - latents).abs().max() > 0.1
    assert torch.equal(result, expected)


def test_fast_sampling_again_replaces_what_was_compiled(tiny_pipeline):
    pipeline = tiny_pipeline()
    pipeline.enable_fast_sampling(mode="reduce-overhead")
    pipeline.enable_fast_sampling()
    assert pipeline.transformer._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in pipeline.transformer.transformer_blocks)
    pipeline.enable_fast_sampling(freeze_weights=True)
    assert pipeline.transformer._compiled_call_impl is not None
    assert not any(block._compiled_call_impl for block in pipeline.transformer.transformer_blocks)


def test_modes_that_are_not_allowed(tiny_pipeline):
    with pytest.raises(ValueError, match="`mode` is 'fast', allowed: None, 'default', 'max-autotune-no-cudagraphs'"):
        tiny_pipeline().enable_fast_sampling(mode="fast")
    with pytest.raises(ValueError, match=r"`mode` is \['default'\], allowed: None"):
        tiny_pipeline().enable_fast_sampling(mode=["default"])
    with pytest.raises(ValueError, match="'reduce-overhead', allowed with `freeze_weights`, .*: None, 'default', "):
        tiny_pipeline().enable_fast_sampling(mode="reduce-overhead", freeze_weights=True)


def test_an_interrupted_call_computes_nothing_more(tiny_pipeline):
    pipeline = tiny_pipeline()
    rows = record_modulated_rows(pipeline.transformer)

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return {}

    pipeline(list(range(4)) * 16, num_inference_steps=50, callback_on_step_end=stop, output_type="latent")
    assert len(rows) == 1 and rows[0] < 50 * 4


@pytest.mark.parametrize("num_steps", [30, 90])
def test_labels_are_copied_to_the_device_before_the_transformer_is_called(tiny_pipeline, monkeypatch, num_steps):
    """A copy from the processor waits until the device has done what it was asked to."""
    pipeline = tiny_pipeline()
    made, calls = [], []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: made.append(len(calls)) or tensor(*args, **options))
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    pipeline([0, 1, 2], guidance_scale=2.0, num_inference_steps=num_steps, output_type="latent")
    assert made and set(made) == {0} and len(calls) == num_steps


@pytest.mark.parametrize("freeze_weights", [False, True])
def test_weights_are_frozen_while_the_transformer_is_called(tiny_pipeline, freeze_weights, monkeypatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *arguments, **options: None)  # nothing to compile for this
    pipeline.enable_fast_sampling(freeze_weights=freeze_weights)
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: seen.append(torch._inductor.config.freezing))
    pipeline([0], num_inference_steps=2, output_type="pt")
    assert seen == [freeze_weights] * 2
    assert not torch._inductor.config.freezing
