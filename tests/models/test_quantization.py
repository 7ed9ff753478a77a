"""DiTTransformer1DModel with weights of 8 bits: torchao through diffusers' quantization config."""

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torch import nn

from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline


pytest.importorskip("torchao")
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # noqa: E402
from torchao.utils import TorchAOBaseTensor  # noqa: E402


# docs/sampling.md leaves these in bfloat16
ENDS = ["proj_in", "timestep_embedder", "norm_out", "proj_out"]
CONFIGS = [Int8WeightOnlyConfig(), Float8WeightOnlyConfig()]
# largest relative error of a velocity beside float32: bfloat16 has one of 0.6%
TOLERANCES = {"Int8WeightOnlyConfig": 0.015, "Float8WeightOnlyConfig": 0.05}


def name_of(config) -> str:
    return config.__class__.__name__


@pytest.fixture
def pipeline(tiny_pipeline):
    return tiny_pipeline(num_layers=2, num_attention_heads=4, attention_head_dim=32)


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def quantized_layers(transformer: nn.Module) -> set[str]:
    return {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, TorchAOBaseTensor)
    }


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_prediction(pipeline, folder, config):
    latents, labels = torch.randn(3, 10, 6), torch.tensor([0, 3, 4])
    with torch.no_grad():
        expected = pipeline.transformer(latents, 600.0, labels).sample

    errors = []
    for left_out in (ENDS, None):
        transformer = DiTTransformer1DModel.from_pretrained(
            folder,
            subfolder="transformer",
            quantization_config=TorchAoConfig(config, modules_to_not_convert=left_out),
            dtype=torch.bfloat16,
        )
        all_layers = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
        in_blocks = {name for name in all_layers if name.startswith("transformer_blocks.")}
        assert len(in_blocks) == 2 * 7 and len(all_layers) == 2 * 7 + 5
        assert quantized_layers(transformer) == (all_layers if left_out is None else in_blocks)
        with torch.no_grad():
            errors.append(relative_error(transformer(latents.bfloat16(), 600.0, labels).sample, expected))
    assert 0 < errors[0] < TOLERANCES[name_of(config)]
    assert errors[0] < errors[1] < 0.1  # the ends count more than their share


def test_the_modulation_can_be_left_out(folder):
    transformer = DiTTransformer1DModel.from_pretrained(
        folder,
        subfolder="transformer",
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[*ENDS, "norm1"]),
        dtype=torch.bfloat16,
    )
    layers = quantized_layers(transformer)
    assert len(layers) == 2 * 6 and not any("norm1" in name for name in layers)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_pipeline_is_sampled_saved_and_loaded(pipeline, folder, tmp_path, config):
    arguments = {
        "num_inference_steps": 5,
        "guidance_scale": 2.0,
        "guidance_interval": (0.0, 0.6),
        "latents": torch.randn(2, 10, 6),
        "output_type": "latent",
    }
    expected = pipeline([0, 3], **arguments).images
    quantized = SoftVQPipeline.from_pretrained(
        folder,
        quantization_config=PipelineQuantizationConfig(
            quant_mapping={"transformer": TorchAoConfig(config, modules_to_not_convert=ENDS)}
        ),
        dtype={"transformer": torch.bfloat16, "default": torch.float32},
    )
    quantized.set_progress_bar_config(disable=True)
    assert len(quantized_layers(quantized.transformer)) == 2 * 7
    assert quantized.transformer.dtype == torch.bfloat16 and quantized.vae.dtype == torch.float32
    latents = quantized([0, 3], **arguments).images
    assert latents.dtype == torch.float32
    assert 0 < relative_error(latents, expected) < TOLERANCES[name_of(config)]

    # stored with 8 bits, and loaded without saying so
    quantized.save_pretrained(tmp_path / "quantized")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "quantized" / weights).stat().st_size < 0.5 * (folder / weights).stat().st_size
    loaded = SoftVQPipeline.from_pretrained(
        tmp_path / "quantized", dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    loaded.set_progress_bar_config(disable=True)
    assert quantized_layers(loaded.transformer) == quantized_layers(quantized.transformer)
    assert relative_error(loaded([0, 3], **arguments).images, latents) < 1e-3
