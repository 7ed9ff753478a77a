"""Shared by the tests of evaluations: tiny networks and images, and the command in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

from softvq_hf.metrics.features import FeatureExtractor, ImageFeatures
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


class MeanColours(FeatureExtractor):
    """Looks at the means over the quarters of an image: 12 features, 12 spatial ones, 3 logits."""

    num_features = 12
    num_spatial_features = 12
    num_classes = 3

    def __init__(self, label: str, scale: float = 1.0) -> None:
        super().__init__()
        self.label = label
        self.scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)

    def description(self) -> dict:
        return {"name": "MeanColours", "scale": self.scale.item()}

    def extract(self, images: torch.Tensor) -> ImageFeatures:
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2) * self.scale
        return ImageFeatures(quarters.flatten(1), quarters.permute(0, 2, 3, 1).flatten(1), quarters.mean((2, 3)) * 10)


@pytest.fixture
def mean_colours():
    """Builds a real extractor of 12 features: `mean_colours("Inception")`."""
    return MeanColours


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Lets the code under test make an accelerator of its own on the CPU, and another one after each call of it."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        GradientState._reset_state()

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()
    yield reset
    reset()


@pytest.fixture
def accelerator(fresh_accelerate):
    """The accelerator of one process on the CPU."""
    return Accelerator(cpu=True)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Builds a folder of 32 x 32 images whose colours vary: `image_folder(20)`."""

    def build(num_images: int, name: str = "images", side: int = 32) -> Path:
        generator = np.random.default_rng(0)
        (tmp_path / name / "val").mkdir(parents=True)
        for number in range(num_images):
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
            image.save(tmp_path / name / "val" / f"{number:03}.png")
        return tmp_path / name

    return build


@pytest.fixture
def tiny_classifier_dir(tmp_path) -> Path:
    """A saved ResNet of 16 features and 5 classes with its image processor."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    ResNetForImageClassification(config).eval().save_pretrained(tmp_path / "tiny_classifier")
    processor = BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor.save_pretrained(tmp_path / "tiny_classifier")
    return tmp_path / "tiny_classifier"


@pytest.fixture
def tiny_tokenizer():
    """Builds a tokenizer of 32 pixels and 8 tokens with 4 channels: `tiny_tokenizer(quantizer="vq")`."""

    def build(**config) -> AutoencoderSoftVQ:
        torch.manual_seed(0)
        return AutoencoderSoftVQ(
            **{
                "sample_size": 32,
                "encoder_patch_size": 8,
                "decoder_patch_size": 8,
                "num_latent_tokens": 8,
                "latent_channels": 4,
                "codebook_size": 16,
                "num_codebooks": 2,
                "encoder_hidden_size": 16,
                "encoder_num_layers": 1,
                "encoder_num_attention_heads": 2,
                "decoder_hidden_size": 16,
                "decoder_num_layers": 1,
                "decoder_num_attention_heads": 2,
                **config,
            }
        ).eval()

    return build


@pytest.fixture
def softvq_hf_command():
    """Runs the command in processes of its own: `softvq_hf_command("evaluate", ..., num_processes=2)`."""

    def run(*words, num_processes: int = 1) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m"]
        if num_processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", "-m"]
        command += ["softvq_hf.cli", *map(str, words)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)

    return run
