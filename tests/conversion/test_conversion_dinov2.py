"""The encoder starts from DINOv2: the same function of the image, at another patch size and resolution."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from softvq_hf.conversion.dinov2 import (
    load_dinov2_encoder,
    resample_patch_embedding,
    resample_position_embedding,
)
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def backbone(registers: int = 0) -> Dinov2Model | Dinov2WithRegistersModel:
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**SIZE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tokenizer(**changes) -> AutoencoderSoftVQ:
    config = {
        "sample_size": 32,
        "encoder_patch_size": 8,
        "decoder_patch_size": 8,
        "num_latent_tokens": 4,
        "num_codebooks": 1,
        "codebook_size": 8,
        "encoder_hidden_size": 24,
        "encoder_num_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_hidden_size": 24,
        "decoder_num_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    return AutoencoderSoftVQ(**config | changes).eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_encoder_computes_what_dinov2_computes(registers):
    dinov2, model = backbone(registers), tokenizer(num_register_tokens=registers)
    load_dinov2_encoder(model, dinov2)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # the encoder without its latent tokens: prefix and patches only
        hidden_states = model.encoder.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        hidden_states = model.encoder.positions(hidden_states)[:, : -model.config.num_latent_tokens]
        for block in model.encoder.blocks:
            hidden_states = block(hidden_states)
        actual = model.encoder.norm(hidden_states)
        expected = dinov2(pixel_values).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_patch_projection_sees_resized_patches_alike():
    weight = torch.randn(5, 3, 14, 14)
    resized = resample_patch_embedding(weight, 16)
    patch = torch.randn(1, 3, 14, 14)
    bigger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    actual, expected = (bigger * resized).sum((1, 2, 3)), (patch * weight).sum((1, 2, 3))
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(resample_patch_embedding(weight, 14), weight)


def test_positions_are_resampled():
    table = torch.randn(1, 37 * 37, 6)
    assert torch.allclose(resample_position_embedding(table, (37, 37)), table, atol=1e-6)
    smooth = torch.linspace(-1, 1, 37)[None, :, None].expand(1, 37, 37).reshape(1, 37 * 37, 1)
    resampled = resample_position_embedding(smooth, (16, 12)).reshape(16, 12)
    assert (resampled.diff(dim=0) > 0).all() and resampled.diff(dim=1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="has 10 positions"):
        resample_position_embedding(torch.zeros(1, 10, 4), (2, 2))


def test_other_resolution_and_patch_size_run():
    model = tokenizer(sample_size=[32, 64], encoder_patch_size=16, decoder_patch_size=16)
    load_dinov2_encoder(model, backbone())
    assert torch.isfinite(model(torch.randn(1, 3, 32, 64)).sample).all()


def test_backbone_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"encoder_num_layers \(is 3, should be 2\)"):
        load_dinov2_encoder(tokenizer(encoder_num_layers=3), backbone())
    with pytest.raises(ValueError, match="num_register_tokens"):
        load_dinov2_encoder(tokenizer(), backbone(4))
