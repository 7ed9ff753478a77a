"""All tokenizers seen as making tokens."""

import pytest
import torch
from diffusers import AutoencoderKL

from softvq_hf.evaluation.tokens import check_finite, choose_resolution, decode_tokens, encode_tokens


@pytest.fixture
def autoencoder_kl() -> AutoencoderKL:
    """4 x 4 latents of 3 channels for 16 x 16 pixels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=3,
        sample_size=16,
    ).eval()


@torch.no_grad()
def test_tokens_of_2d_latents_go_row_by_row_and_back(autoencoder_kl):
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens, indices = encode_tokens(autoencoder_kl, pixel_values)
    latents = autoencoder_kl.encode(pixel_values).latent_dist.mode()
    assert indices is None and tokens.shape == (2, 16, 3)
    assert torch.equal(tokens[:, 1 * 4 + 2], latents[:, :, 1, 2])
    assert torch.equal(decode_tokens(autoencoder_kl, tokens, 16), autoencoder_kl.decode(latents).sample)


@torch.no_grad()
@pytest.mark.parametrize("quantizer", ["softvq", "vq", "kl", "none"])
def test_tokens_of_every_quantizer(tiny_tokenizer, quantizer):
    tokenizer = tiny_tokenizer(quantizer=quantizer)
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens, indices = encode_tokens(tokenizer, pixel_values)
    assert tokens.shape == (2, 8, 4)
    assert (indices is None) == (quantizer in ("kl", "none"))
    assert torch.equal(tokens, encode_tokens(tokenizer, pixel_values)[0])  # nothing is drawn
    assert torch.allclose(decode_tokens(tokenizer, tokens, 32), tokenizer(pixel_values).sample, atol=1e-6)


@torch.no_grad()
def test_another_resolution(tiny_tokenizer):
    tokenizer = tiny_tokenizer(position_embedding_type="rope_axial", encoder_hidden_size=32, decoder_hidden_size=32)
    tokens, _ = encode_tokens(tokenizer, torch.rand(1, 3, 48, 48) * 2 - 1)
    assert decode_tokens(tokenizer, tokens, 48).shape == (1, 3, 48, 48)


def test_resolution(tiny_tokenizer):
    assert choose_resolution(tiny_tokenizer(), None) == 32
    rotary = {"position_embedding_type": "rope_axial", "encoder_hidden_size": 32, "decoder_hidden_size": 32}
    assert choose_resolution(tiny_tokenizer(**rotary), 48) == 48
    with pytest.raises(ValueError, match="`--resolution` is 50, allowed: multiples of 8 pixels"):
        choose_resolution(tiny_tokenizer(**rotary), 50)
    with pytest.raises(ValueError, match="`--resolution` is 48, allowed: 32 x 32 pixels, which the absolute"):
        choose_resolution(tiny_tokenizer(), 48)
    assert choose_resolution(tiny_tokenizer(), 32) == 32
    with pytest.raises(ValueError, match="The tokenizer takes 32 x 16 pixels, allowed: squares"):
        choose_resolution(tiny_tokenizer(sample_size=[32, 16]), None)


def test_resolution_of_2d_latents(autoencoder_kl):
    assert choose_resolution(autoencoder_kl, 24) == 24
    with pytest.raises(ValueError, match="`--resolution` does not fit the tokenizer: .* 18, .*multiples of 4"):
        choose_resolution(autoencoder_kl, 18)


def test_images_that_are_not_finite_are_named():
    values = torch.zeros(3, 2)
    check_finite(values, "latents", ["a", "b", "c"])
    values[1, 0] = torch.nan
    values[2, 1] = torch.inf
    with pytest.raises(ValueError, match="latents that are not finite .* for b, c"):
        check_finite(values, "latents", ["a", "b", "c"])
