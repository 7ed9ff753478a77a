"""Latents as generators take them, from tokenizers of either kind."""

import pytest
import torch
from diffusers import VQModel

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.generator import build_ddpm_scheduler, encode_latents, get_latent_shape, load_tokenizer


def test_tokens(tokenizer_dir):
    vae = load_tokenizer(str(tokenizer_dir)).eval()
    assert type(vae) is AutoencoderSoftVQ
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = encode_latents(vae, pixel_values)
        torch.testing.assert_close(latents, (vae.encode(pixel_values).latent - 0.1) * 2.0)
    assert latents.shape == (2, *get_latent_shape(vae, 32))


@pytest.mark.parametrize(("shift_factor", "expected_mean"), [(None, 0.0), (0.5, -0.5 * 0.18215)])
@torch.no_grad()
def test_scale_of_2d_latents(autoencoder_kl_dir, shift_factor, expected_mean):
    vae = load_tokenizer(str(autoencoder_kl_dir))
    vae.register_to_config(shift_factor=shift_factor)
    # a posterior of mean 0 and standard deviation 1
    for parameter in vae.quant_conv.parameters():
        torch.nn.init.zeros_(parameter)
    pixel_values = torch.randn(16, 3, 32, 32)
    latents = encode_latents(vae, pixel_values, torch.Generator().manual_seed(0))
    assert latents.shape == (16, *get_latent_shape(vae, 32)) and latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(expected_mean, abs=0.01)
    assert latents.std().item() == pytest.approx(0.18215, rel=0.05)
    assert torch.equal(latents, encode_latents(vae, pixel_values, torch.Generator().manual_seed(0)))
    assert not torch.equal(latents, encode_latents(vae, pixel_values, torch.Generator().manual_seed(1)))
    # without a generator the mode
    torch.testing.assert_close(encode_latents(vae, pixel_values), torch.full_like(latents, expected_mean))


def test_bad_input(autoencoder_kl_dir, tmp_path):
    VQModel(block_out_channels=(32,)).save_pretrained(tmp_path / "vqmodel")
    with pytest.raises(ValueError, match="is a VQModel, allowed: AutoencoderSoftVQ and AutoencoderKL"):
        load_tokenizer(str(tmp_path / "vqmodel"))
    with pytest.raises(ValueError, match="`resolution` is 30, allowed for this tokenizer: multiples of 4"):
        get_latent_shape(load_tokenizer(str(autoencoder_kl_dir)), 30)


@pytest.mark.parametrize(("learned_variance", "variance_type"), [(True, "learned_range"), (False, "fixed_large")])
def test_ddpm_scheduler_is_that_of_the_authors(learned_variance, variance_type):
    config = build_ddpm_scheduler("linear", learned_variance).config
    assert (config.beta_schedule, config.variance_type, config.clip_sample) == ("linear", variance_type, False)
    assert (config.timestep_spacing, config.num_train_timesteps) == ("linspace", 1000)
