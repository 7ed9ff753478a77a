"""What users of diffusers expect of any model and pipeline, asked of all of ours alike.

The cases are those of the common tests of diffusers, which our classes pass as well. Group and CPU offload need an
accelerator there; here the hooks run on the CPU, and weights that are put away hold NaN or sit on the meta device, so
that a weight which is used although its hook did not fire cannot go unnoticed.
"""

import accelerate
import pytest
import torch
from accelerate.utils import compute_module_sizes
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import group_offloading
from diffusers.models.attention import AttentionModuleMixin
from peft import LoraConfig
from torch import nn

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline


TOKENIZER = {
    "sample_size": [16, 32],
    "encoder_patch_size": 4,
    "decoder_patch_size": 8,
    "num_latent_tokens": 8,
    "latent_channels": 4,
    "codebook_size": 16,
    "num_codebooks": 2,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 48,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 3,
}
MAETOK = {
    "quantizer": "none",
    "position_embedding_type": "rope_mixed",
    "encoder_mask_token": True,
    "decoder_type": "movq",
    "decoder_cls_token": False,
}
SWIGLU_CONV = {
    "position_embedding_type": "rope_axial",
    "encoder_activation_fn": "swiglu",
    "decoder_activation_fn": "swiglu",
    "decoder_patch_size": 16,
    "pixel_head": "conv",
}
TRANSFORMER = {
    "num_tokens": 8,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 10,
}
MAR = {
    "num_tokens": 8,
    "in_channels": 4,
    "buffer_size": 2,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 32,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 2,
    "denoiser_hidden_size": 32,
    "denoiser_num_layers": 2,
    "num_classes": 10,
}
MODELS = {
    "softvq": (AutoencoderSoftVQ, TOKENIZER | {"num_register_tokens": 2}),
    "vq": (AutoencoderSoftVQ, TOKENIZER | {"quantizer": "vq"}),
    "kl": (AutoencoderSoftVQ, TOKENIZER | {"quantizer": "kl"}),
    "none": (AutoencoderSoftVQ, TOKENIZER | {"quantizer": "none"}),
    "maetok": (AutoencoderSoftVQ, TOKENIZER | MAETOK),
    "swiglu_conv": (AutoencoderSoftVQ, TOKENIZER | SWIGLU_CONV),
    "tokens": (DiTTransformer1DModel, TRANSFORMER | {"qk_norm": True}),
    "tokens_variance": (DiTTransformer1DModel, TRANSFORMER | {"out_channels": 8}),
    "patches": (DiTTransformer1DModel, TRANSFORMER | {"patch_size": 2, "sample_size": 8}),
    "mar": (MARTransformer1DModel, MAR),
    "mar_patches": (MARTransformer1DModel, MAR | {"patch_size": 2, "sample_size": 4}),
}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

all_models = pytest.mark.parametrize("name", MODELS)
one_of_each = pytest.mark.parametrize("name", ["softvq", "tokens", "mar"])


def build(name: str, **changes) -> AutoencoderSoftVQ | DiTTransformer1DModel:
    """A fresh model with always the same weights, in eval mode."""
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    model = model_class(**config | changes)
    for name, module in model.named_modules():
        if name.endswith("modulation"):  # starts from zero
            nn.init.normal_(module.weight)
    return model.eval()


def inputs_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, AutoencoderSoftVQ):
        inputs = {"pixel_values": torch.rand(2, 3, 16, 32, generator=generator).mul(2).sub(1).to(dtype)}
        if model.config.encoder_mask_token:
            inputs["mask"] = torch.rand(2, 32, generator=generator) < 0.5
        return inputs
    if isinstance(model, MARTransformer1DModel):
        hidden_states = torch.randn(2, model.num_tokens, model.token_channels, generator=generator).to(dtype)
        return {
            "hidden_states": hidden_states,
            "class_labels": torch.tensor([3, 10]),
            "visible_positions": torch.tensor([[0, 3], [1, 2]]),
        }
    shape = (2, 4, 8, 8) if model.is_2d else (2, 8, 4)
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "timestep": torch.tensor([900.0, 20.0]),
        "class_labels": torch.tensor([3, 10]),
    }


def call(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor | float]:
    """What a model gives, and the sum of its losses."""
    output = model(**inputs_of(model, dtype))
    if not isinstance(model, MARTransformer1DModel):
        return output.sample, sum(output[key] for key in output if key.endswith("_loss"))
    conditions = output.conditions.flatten(0, 1)  # and what the denoiser makes of them
    noisy_tokens = torch.ones(len(conditions), model.token_channels, dtype=dtype)
    return model.denoise(noisy_tokens, torch.arange(len(conditions)) * 50, conditions), 0.0


@torch.no_grad()
def predict(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return call(model, dtype)[0]


def check_output(model: nn.Module, expected: torch.Tensor, atol: float = 1e-5) -> None:
    """The output of `forward` and, for a tokenizer, of `encode` and `decode` called one by one as pipelines do."""
    torch.testing.assert_close(predict(model), expected, atol=atol, rtol=0)
    if isinstance(model, AutoencoderSoftVQ):
        with torch.no_grad():
            latent = model.encode(**inputs_of(model)).latent
            torch.testing.assert_close(model.decode(latent).sample, expected, atol=atol, rtol=0)


# Saving and loading


@all_models
def test_save_and_load_in_shards_with_a_variant(name, tmp_path):
    model = build(name)
    size = compute_module_sizes(model)[""]
    model.save_pretrained(tmp_path, variant="ema", max_shard_size=f"{int(0.75 * size / 1024)}KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards and all(shard.startswith("diffusion_pytorch_model.ema-0000") for shard in shards)
    loaded = type(model).from_pretrained(tmp_path, variant="ema")
    assert torch.equal(predict(loaded), predict(model))
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.bin"):
        type(model).from_pretrained(tmp_path)


@all_models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_save_and_load_in_half_precision(name, dtype, tmp_path):
    model = build(name).to(dtype)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (True, False):
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        output = predict(loaded, dtype)
        assert output.dtype == dtype and torch.isfinite(output).all()
        assert torch.equal(output, predict(model, dtype))


@all_models
def test_fresh_model_from_config_and_on_the_meta_device(name, tmp_path):
    model = build(name)
    model.save_config(tmp_path)
    again = type(model).from_config(type(model).load_config(tmp_path))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    with torch.device("meta"):
        on_meta = type(model)(**MODELS[name][1])
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}
    assert on_meta.num_parameters() == model.num_parameters()


@all_models
def test_tuple_holds_what_the_output_holds(name):
    model = build(name)
    as_tuple = model(**inputs_of(model), return_dict=False)
    as_output = model(**inputs_of(model)).to_tuple()
    assert len(as_tuple) > 0
    assert all(torch.equal(x, y) for x, y in zip(as_tuple, as_output, strict=False))


# Attention


@all_models
def test_attention_processors_can_be_read_and_replaced(name):
    model = build(name)
    expected = predict(model)
    processors = model.attn_processors
    attentions = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    assert len(processors) == len(attentions) > 0
    replacements = {key: type(processor)() for key, processor in processors.items()}
    model.set_attn_processor(dict(replacements))
    assert [attention.get_processor() for attention in attentions] == list(replacements.values())
    assert torch.equal(predict(model), expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(dict([replacements.popitem()]))


@all_models
def test_fused_projections_compute_the_same(name):
    model = build(name)
    expected = predict(model)
    model.fuse_qkv_projections()
    attentions = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    for attention in attentions:
        assert attention.fused_projections
        attention.to_q.register_forward_hook(lambda *_: pytest.fail("a fused model still calls to_q"))
    torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=0)
    model.unfuse_qkv_projections()
    assert not any(hasattr(attention, "to_qkv") for attention in attentions)


# Training


@all_models
def test_training_step_reaches_every_weight_with_and_without_checkpointing(name):
    model = build(name).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(2)  # of the labels that a transformer drops
        sample, losses = call(model)
        (sample.square().mean() + losses).backward()
        return {key: value.grad for key, value in model.named_parameters() if value.requires_grad}

    assert not model.is_gradient_checkpointing
    expected = gradients()
    assert [key for key, gradient in expected.items() if gradient is None] == []
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[key], msg=key)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@all_models
def test_lora_changes_saves_and_loads(name, tmp_path):
    model = build(name)
    base = predict(model)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS, init_lora_weights=False))
    adapted = predict(model)
    assert (adapted - base).abs().max() > 1e-2, "a fresh model hardly answers to its attention layers"
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(predict(model), base)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(predict(model), adapted, atol=1e-5, rtol=0)


# Compilation


@all_models
def test_repeated_blocks_compile_once(name):
    torch.compiler.reset()
    model = build(name)
    expected = predict(model)
    names = {type(module).__name__ for module in model.modules()}
    blocks = {name for name in names if name.endswith("Block")}
    assert blocks and blocks <= set(model._repeated_blocks) and blocks <= set(model._no_split_modules)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    # Encoder and decoder of MAR have different lengths. With `fullgraph`, going over the limit is an error.
    limit = 2 if isinstance(model, MARTransformer1DModel) else 1
    with torch._dynamo.config.patch(recompile_limit=limit):
        torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=0)


@one_of_each
def test_export(name):
    model = build(name)
    exported = torch.export.export(model, args=(), kwargs=inputs_of(model))
    with torch.no_grad():
        actual, expected = (next(iter(module(**inputs_of(model)).values())) for module in (exported.module(), model))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0, check_stride=False)


# Memory


@all_models
@pytest.mark.parametrize(
    ("storage", "compute"),
    [(torch.float16, torch.float32), (torch.float8_e4m3fn, torch.float32), (torch.float8_e4m3fn, torch.bfloat16)],
    ids=str,
)
def test_layerwise_casting(name, storage, compute):
    model = build(name)
    expected = predict(model)
    model.to(compute)
    size = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    assert model.get_memory_footprint() < size
    assert {module.to_q.weight.dtype for module in model.modules() if hasattr(module, "to_q")} == {storage}
    actual = predict(model, compute)
    assert actual.dtype == compute
    similarity = nn.functional.cosine_similarity(actual.float().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.99
    model.train()  # and the backward pass casts too
    with torch.autocast("cpu"):
        call(model, compute)[0].square().mean().backward()
    assert all(module.to_q.weight.grad is not None for module in model.modules() if hasattr(module, "to_q"))


@all_models
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7, 0.9])
def test_device_map_splits_between_blocks(name, fraction, tmp_path):
    model = build(name, **{key: 4 for key in MODELS[name][1] if key.endswith("num_layers")})
    expected = predict(model)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(fraction * compute_module_sizes(model)[""])},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    check_output(loaded, expected)


@all_models
def test_sequential_offload(name):
    model = build(name)
    expected = predict(model)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    check_output(model, expected)
    check_output(model, expected)


@pytest.fixture
def poisoned_groups(monkeypatch):
    """Groups which diffusers offloads are filled with NaN until they are loaded again."""
    stored = {}

    def tensors(group):
        for module in group.modules:
            yield from module.parameters()
        yield from group.parameters

    def onload(group):
        for tensor in tensors(group):
            if tensor in stored:
                tensor.data = stored.pop(tensor)

    def offload(group):
        for tensor in tensors(group):
            if tensor not in stored:
                stored[tensor] = tensor.data
                tensor.data = torch.full_like(tensor.data, float("nan"))

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)


group_kwargs = pytest.mark.parametrize(
    "kwargs", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}], ids=str
)


@all_models
@group_kwargs
def test_group_offload(name, kwargs, poisoned_groups):
    model = build(name)
    expected = predict(model)
    model.enable_group_offload(torch.device("cpu"), **kwargs)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    check_output(model, expected)
    assert all(parameter.isnan().all() for parameter in model.parameters())


# Pipeline


def build_pipeline() -> SoftVQPipeline:
    pipeline = SoftVQPipeline(
        vae=build("softvq"), transformer=build("tokens"), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: SoftVQPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], guidance_scale=2.0, num_inference_steps=2, generator=generator, output_type="pt").images


def test_pipeline_from_pipeline_shares_the_models():
    pipeline = build_pipeline()
    other = SoftVQPipeline.from_pipe(pipeline)
    assert other.vae is pipeline.vae and other.transformer is pipeline.transformer
    assert torch.equal(generate(other), generate(pipeline))


def test_pipeline_offloads_model_by_model():
    pipeline = build_pipeline()
    expected = generate(pipeline)
    assert set(pipeline.model_cpu_offload_seq.split("->")) == {"transformer", "vae"}
    # the hooks of `enable_model_cpu_offload`: modulation, each forward and decode must fire them
    calls = []

    class CountingOffload(accelerate.hooks.CpuOffload):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return super().pre_forward(module, *args, **kwargs)

    for model in (pipeline.transformer, pipeline.vae):
        accelerate.hooks.add_hook_to_module(model, CountingOffload(torch.device("cpu")))
    assert torch.equal(generate(pipeline), expected)
    assert calls == ["DiTTransformer1DModel"] * 3 + ["AutoencoderSoftVQ"]


def test_pipeline_offloads_layer_by_layer():
    pipeline = build_pipeline()
    expected = generate(pipeline)
    for model in (pipeline.transformer, pipeline.vae):
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    torch.testing.assert_close(generate(pipeline), expected, atol=1e-5, rtol=0)


@group_kwargs
def test_pipeline_group_offload(kwargs, poisoned_groups):
    pipeline = build_pipeline()
    expected = generate(pipeline)
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), **kwargs)
    torch.testing.assert_close(generate(pipeline), expected, atol=1e-5, rtol=0)


def test_pipeline_with_models_in_other_dtypes(tmp_path):
    build_pipeline().save_pretrained(tmp_path)
    pipeline = SoftVQPipeline.from_pretrained(
        tmp_path, dtype={"vae": torch.bfloat16, "default": torch.float16}, device_map="cpu"
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.dtype == torch.bfloat16 and pipeline.transformer.dtype == torch.float16
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float16)
    assert torch.isfinite(generate(pipeline)).all()
