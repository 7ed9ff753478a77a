"""Shared fixtures: the reference models under tests/fixtures and a seeded global generator."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def golden():
    """Reads a reference: `golden(name) -> (description dict, {"weights.*" | "input.*" | "output.*": tensor})`."""

    def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        return json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")

    return load


@pytest.fixture
def official_denoiser(golden):
    """The reference of MAR's diffusion MLP as `(MARTransformer1DModel, tensors, description)`; the rest is random."""
    from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel

    description, tensors = golden("mar_diffloss")
    config = description["config"]
    model = MARTransformer1DModel(
        num_tokens=10,
        in_channels=config["target_channels"],
        encoder_hidden_size=16,
        encoder_num_layers=1,
        encoder_num_attention_heads=2,
        decoder_hidden_size=config["z_channels"],
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        denoiser_hidden_size=config["width"],
        denoiser_num_layers=config["depth"],
        num_classes=4,
    )
    names = {
        "time_embed.mlp.0": "timestep_embedder.linear_1",
        "time_embed.mlp.2": "timestep_embedder.linear_2",
        "cond_embed": "condition_embedder",
        "input_proj": "proj_in",
        "final_layer.adaLN_modulation.1": "modulation_out",
        "final_layer.linear": "proj_out",
    }
    for i in range(config["depth"]):
        official, ours = f"res_blocks.{i}", f"blocks.{i}"
        names |= {f"{official}.in_ln": f"{ours}.norm", f"{official}.adaLN_modulation.1": f"{ours}.modulation"}
        names |= {f"{official}.mlp.0": f"{ours}.linear_1", f"{official}.mlp.2": f"{ours}.linear_2"}
    model.denoiser.load_state_dict(
        {
            f"{ours}.{part}": tensors[f"weights.net.{official}.{part}"]
            for official, ours in names.items()
            for part in ("weight", "bias")
        }
    )
    return model.eval(), tensors, description


@pytest.fixture(autouse=True)
def seed_everything():
    """Every test starts from the same global torch seed."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_pipeline():
    """
    Builds a real pipeline of 10 tokens with 6 channels, 16 x 16 pixels and 4 classes:
    `tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **transformer_config)`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
    from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
    from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline

    def build(scheduler=None, **transformer_config):
        torch.manual_seed(0)
        vae = AutoencoderSoftVQ(
            sample_size=16,
            encoder_patch_size=8,
            decoder_patch_size=8,
            num_latent_tokens=10,
            latent_channels=6,
            codebook_size=8,
            num_codebooks=2,
            encoder_hidden_size=16,
            encoder_num_layers=1,
            encoder_num_attention_heads=2,
            decoder_hidden_size=16,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            scaling_factor=4.0,
            shift_factor=0.1,
        )
        config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4}
        transformer = DiTTransformer1DModel(num_tokens=10, in_channels=6, **{**config, **transformer_config})
        pipeline = SoftVQPipeline(
            vae=vae.eval(),
            transformer=transformer.eval(),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
            id2label={0: "tench, Tinca tinca", 1: "crane", 2: "crane, heron", 3: "goldfish"},
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def tiny_mar_pipeline(tiny_pipeline):
    """Builds a real `MARPipeline` with the tokenizer and the classes of `tiny_pipeline`."""
    from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
    from softvq_hf.pipelines.pipeline_mar import MARPipeline
    from softvq_hf.training.generator import build_token_scheduler

    def build():
        other = tiny_pipeline()
        torch.manual_seed(0)
        transformer = MARTransformer1DModel(
            num_tokens=10,
            in_channels=6,
            buffer_size=2,
            encoder_hidden_size=16,
            encoder_num_layers=1,
            encoder_num_attention_heads=2,
            decoder_hidden_size=16,
            decoder_num_layers=2,
            decoder_num_attention_heads=2,
            denoiser_hidden_size=16,
            denoiser_num_layers=1,
            num_classes=4,
        )
        # an untrained network leaves the range of the data at the first steps
        scheduler = build_token_scheduler(clip_sample_range=3.0)
        pipeline = MARPipeline(other.vae, transformer.eval(), scheduler, id2label=other.config.id2label)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build
