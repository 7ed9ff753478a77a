"""`softvq_hf.metrics.rate`: tokens, numbers and bits of an image."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from softvq_hf.metrics.rate import Rate, rate
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


TOKENIZER = {
    "sample_size": 16,
    "encoder_patch_size": 8,
    "decoder_patch_size": 8,
    "num_latent_tokens": 4,
    "latent_channels": 6,
    "codebook_size": 32,
    "num_codebooks": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 1,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
}


@pytest.mark.parametrize("quantizer", ["softvq", "kl", "none"])
def test_continuous_latents(quantizer):
    model = AutoencoderSoftVQ(**TOKENIZER, quantizer=quantizer)
    latent = model.eval().encode(torch.zeros(1, 3, 16, 16)).latent
    figures = rate(model.config)
    assert (figures["tokens_per_image"], figures["floats_per_image"]) == (latent.shape[1], latent.numel()) == (4, 24)
    assert (figures["bits_per_image_16"], figures["bits_per_image_32"]) == (384, 768)
    assert figures["compression_16"] == 16 * 16 * 3 * 8 / 384 and figures["compression_32"] == 8
    assert "bits_per_image" not in figures


def test_vq():
    model = AutoencoderSoftVQ(**TOKENIZER, quantizer="vq")
    assert rate(model.config) == {
        "tokens_per_image": 4,
        "floats_per_image": None,
        "bits_per_image": 20.0,
        "compression": 16 * 16 * 3 * 8 / 20,
    }
    assert rate({**model.config, "codebook_size": 1})["compression"] == math.inf


def test_published_tokenizer():
    """64 tokens of 32 channels at 256 px."""
    figures = rate(
        {"sample_size": 256, "in_channels": 3, "num_latent_tokens": 64, "latent_channels": 32, "quantizer": "softvq"}
    )
    assert figures["floats_per_image"] == 2048 and figures["compression_16"] == 48


def test_2d_latents():
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    for size in ((32, 32), (16, 24)):
        latents = vae.encode(torch.zeros(1, 3, *size)).latent_dist.mode()
        figures = rate(vae.config, size)
        assert figures["floats_per_image"] == latents.numel()
        assert figures["tokens_per_image"] == latents[0, 0].numel()
        assert figures["compression_32"] == size[0] * size[1] * 24 / (latents.numel() * 32)
    assert rate(vae.config) == rate(vae.config, (32, 32))
    with pytest.raises(ValueError, match="`image_size` is 32 x 30, allowed for this tokenizer: multiples of 4"):
        rate(vae.config, (32, 30))
    with pytest.raises(
        ValueError, match="`sample_size` of `config` is 30 x 30, allowed for this tokenizer: multiples"
    ):
        rate({**vae.config, "sample_size": 30})


def test_sizes_that_are_not_square():
    config = AutoencoderSoftVQ(**{**TOKENIZER, "sample_size": (16, 32)}).config
    assert rate(config)["compression_32"] == 16
    assert rate(config, (32, 32)) == rate(config, 32) and rate(config, 32)["compression_32"] == 32


@pytest.mark.parametrize("image_size", [0, (0, 0), (16, -16), (16,), 16.0, "16", (16.0, 16.0)])
def test_sizes_that_are_none(image_size):
    config = AutoencoderSoftVQ(**TOKENIZER).config
    with pytest.raises(ValueError, match=r"`image_size` is .*, allowed: one integer or two, height and width, from 1"):
        Rate(config, image_size)
    with pytest.raises(ValueError, match=r"`sample_size` of `config` is .*, allowed: one integer or two"):
        Rate({**config, "sample_size": image_size})


@pytest.mark.parametrize("config", [None, [1], AutoencoderSoftVQ(**TOKENIZER)], ids=type)
def test_what_is_no_configuration(config):
    with pytest.raises(ValueError, match=f"`config` is of type {type(config).__name__}, allowed: a mapping, the `co"):
        Rate(config)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, "sample_size"),
        ({"quantizer": "vq"}, "codebook_size and sample_size"),
        ({"num_latent_tokens": None, "sample_size": 16}, "block_out_channels"),
    ],
)
def test_configuration_that_lacks_something(changes, missing):
    config = {"in_channels": 3, "latent_channels": 6, "num_latent_tokens": 4, **changes}
    config = {name: value for name, value in config.items() if value is not None}
    with pytest.raises(ValueError, match=f"`config` lacks {missing}, allowed: the `config` of"):
        Rate(config)


def test_other_models():
    with pytest.raises(ValueError, match="`config` is that of DiTTransformer1DModel, allowed: AutoencoderSoftVQ and"):
        rate({"_class_name": "DiTTransformer1DModel", "in_channels": 4})


def test_metric_counts_images_and_knows_the_latents_of_its_configuration():
    model = AutoencoderSoftVQ(**TOKENIZER).eval()
    metric = Rate(model.config)
    for batch_size in (3, 2):
        metric.add_batch(predictions=model.encode(torch.zeros(batch_size, 3, 16, 16)).latent)
    with pytest.raises(ValueError, match=r"latents of shape \(6, 4\), allowed with this `config`: \(4, 6\)"):
        metric.add_batch(predictions=torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match=r"`predictions` holds NaN or infinite numbers, in the latents \[1\] of the"):
        metric.add_batch(predictions=torch.tensor([0.0, math.nan]).view(2, 1, 1).expand(2, 4, 6))
    assert metric.compute() == {**rate(model.config), "num_images": 5}
