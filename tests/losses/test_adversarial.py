"""Adversarial losses: the official numbers of every part and of whole generator and discriminator losses."""

import math
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from softvq_hf.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    LeCAMRegularizer,
    adaptive_weight,
    adversarial_weight,
    consistency_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_generator_loss,
    vanilla_discriminator_loss,
)
from softvq_hf.losses.perceptual import warmup_weight


@pytest.fixture
def tensors(golden):
    return golden("softvq_losses")[1]


def assert_close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), expected, atol=1e-6, rtol=1e-6)


def test_official_hinge_and_vanilla(tensors):
    real, fake = tensors["input.logits_real"], tensors["input.logits_fake"]
    assert_close(hinge_discriminator_loss(real, fake), tensors["output.hinge_d"])
    assert_close(hinge_generator_loss(fake), tensors["output.hinge_g"])
    assert_close(vanilla_discriminator_loss(real, fake), tensors["output.vanilla_d"])


def test_non_saturating_is_cross_entropy_the_right_way_round(tensors):
    real, fake = tensors["input.logits_real"], tensors["input.logits_fake"].clone().requires_grad_()
    discriminator_loss, generator_loss = ADVERSARIAL_LOSSES["non_saturating"]
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    expected = F.binary_cross_entropy_with_logits(torch.cat([real, fake]), torch.cat([ones, zeros]))
    assert_close(discriminator_loss(real, fake), expected)
    assert_close(generator_loss(fake), F.binary_cross_entropy_with_logits(fake, ones))
    # The official swap makes the generator's gradient the same for every logit; here sure fakes are pushed hardest.
    non_saturating_generator_loss(fake).backward()
    assert_close(fake.grad * fake.numel(), -torch.sigmoid(-fake.detach()))


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_each_side_improves_in_its_own_direction(name):
    discriminator_loss, generator_loss = ADVERSARIAL_LOSSES[name]
    high, low = torch.full((2, 5), 0.5), torch.full((2, 5), -0.5)
    assert discriminator_loss(high, low) < discriminator_loss(low, high)
    assert generator_loss(high) < generator_loss(low)


def test_official_lecam_sequence(tensors):
    lecam = LeCAMRegularizer()
    for real, fake, expected in zip(
        tensors["input.lecam_real"], tensors["input.lecam_fake"], tensors["output.lecam_sequence"], strict=True
    ):
        penalty = lecam(real, fake)
        torch.testing.assert_close(
            torch.stack([lecam.ema_real, lecam.ema_fake, penalty]), expected, atol=1e-6, rtol=1e-5
        )


def test_lecam_averages_are_saved_and_take_no_gradient(tensors):
    lecam = LeCAMRegularizer()
    real = tensors["input.lecam_real"].clone().requires_grad_()
    fake = tensors["input.lecam_fake"].clone().requires_grad_()
    penalties = [lecam(real[step], fake[step]) for step in range(3)]
    sum(penalties).backward()  # the averages move between forward and backward
    assert real.grad[:3].abs().sum() > 0 and fake.grad[:3].abs().sum() > 0
    assert not lecam.ema_real.requires_grad and not lecam.ema_fake.requires_grad

    resumed = LeCAMRegularizer()
    resumed.load_state_dict(lecam.state_dict())
    assert torch.equal(resumed(real[3], fake[3]), lecam(real[3], fake[3]))
    assert not torch.equal(LeCAMRegularizer()(real[3], fake[3]), lecam(real[3], fake[3]))
    averages = resumed.state_dict()["ema_real"].clone(), resumed.state_dict()["ema_fake"].clone()
    assert not resumed(real[3] * math.inf, fake[3] * math.nan).isfinite()
    assert torch.equal(torch.stack(averages), torch.stack([resumed.ema_real, resumed.ema_fake]))
    with pytest.raises(ValueError, match="`decay` is 1.0"):
        LeCAMRegularizer(decay=1.0)


def generator_terms(tensors):
    """Reconstruction, perceptual stand-in and hinge term of the reference, as functions of its last layer."""
    image, last_layer = tensors["input.image"], nn.Parameter(tensors["input.last_w"].clone())
    reconstruction = torch.einsum("oc,bchw->bohw", last_layer, tensors["input.recon"])
    logits = 3 * torch.tanh(reconstruction.mean((2, 3)) @ tensors["input.disc_w"])
    perceptual = (image - reconstruction).abs().mean()
    return image, reconstruction, perceptual, hinge_generator_loss(logits), last_layer


@pytest.mark.parametrize("step", [1, 99, 100, 101])
def test_official_generator_loss(tensors, step):
    image, reconstruction, perceptual, hinge, _ = generator_terms(tensors)
    quantizer_losses = 0.3 + 0.02 - 0.05 - 0.07
    loss = (
        F.mse_loss(reconstruction, image) + perceptual + adversarial_weight(step, 0.2, 100) * hinge + quantizer_losses
    )
    assert_close(loss.detach(), tensors[f"output.gen_plain_step{step}"])


@pytest.mark.parametrize("step", [40, 100])
def test_official_generator_loss_with_adaptive_weight_and_warmup(tensors, step):
    image, reconstruction, perceptual, hinge, last_layer = generator_terms(tensors)
    loss = F.l1_loss(reconstruction, image) + warmup_weight(step, 1.0, 80) * perceptual
    weight = adaptive_weight(loss, hinge, last_layer)
    name = f"output.gen_adaptive_warm_step{step}"
    assert_close(weight, tensors[f"{name}_adaptive_weight"])
    assert not weight.requires_grad
    total = loss + weight * adversarial_weight(step, 0.2, 100) * hinge + 0.3 + 0.02 - 0.05 - 0.07
    assert_close(total.detach(), tensors[name])
    total.backward()  # both graphs are still there
    assert last_layer.grad.abs().sum() > 0


def test_adaptive_weight_is_limited():
    last_layer = nn.Parameter(torch.ones(3))
    loss = 1e9 * last_layer.sum()
    assert adaptive_weight(loss, 1e-9 * last_layer.sum(), last_layer) == 1e4
    assert adaptive_weight(loss, 1e-9 * last_layer.sum(), last_layer, max_weight=7.0) == 7.0
    last_layer.requires_grad_(False)
    with pytest.raises(ValueError, match="`last_layer` has requires_grad=False"):
        adaptive_weight(loss, loss, last_layer)


@pytest.mark.parametrize("step", [99, 100])
def test_official_discriminator_loss(tensors, step):
    logits = [tensors[f"input.logits_{name}"] for name in ("real", "fake", "real_strong", "fake_strong")]
    weight = adversarial_weight(step, 0.2, 100)
    loss = weight * (hinge_discriminator_loss(*logits[:2]) + 0.001 * LeCAMRegularizer()(*logits[:2]))
    loss = loss + adversarial_weight(step, 4.0, 100) * consistency_loss(*logits)
    assert_close(loss, tensors[f"output.disc_step{step}"])


def test_official_discriminator_loss_without_regularisation(tensors):
    real, fake = tensors["input.logits_real"], tensors["input.logits_fake"]
    loss = adversarial_weight(100, 0.2, 100) * hinge_discriminator_loss(real, fake)
    assert_close(loss, tensors["output.disc_plain_step100"])


def run_half_of_the_batch(rank, folder, tensors):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    lecam = LeCAMRegularizer()
    for real, fake in zip(tensors["input.lecam_real"], tensors["input.lecam_fake"], strict=True):
        penalty = lecam(real[rank : rank + 1], fake[rank : rank + 1])
    half = {**tensors, **{f"input.{key}": tensors[f"input.{key}"][rank : rank + 1] for key in ("image", "recon")}}
    image, reconstruction, _, hinge, last_layer = generator_terms(half)
    weight = adaptive_weight(F.mse_loss(reconstruction, image), hinge, last_layer)
    save_file({**lecam.state_dict(), "penalty": penalty, "weight": weight}, f"{folder}/rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_batch(tensors, tmp_path):
    """Averages, penalty and adaptive weight of two processes with half a batch each are those of the whole batch."""
    torch.multiprocessing.spawn(run_half_of_the_batch, args=(str(tmp_path), tensors), nprocs=2)
    halves = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]

    real_average, fake_average, penalty = tensors["output.lecam_sequence"][-1]
    image, reconstruction, _, hinge, last_layer = generator_terms(tensors)
    weight = adaptive_weight(F.mse_loss(reconstruction, image), hinge, last_layer)
    for half in halves:
        assert_close(half["ema_real"], real_average)
        assert_close(half["ema_fake"], fake_average)
        assert_close(half["weight"], weight)
    assert_close((halves[0]["penalty"] + halves[1]["penalty"]) / 2, penalty)


def test_adversarial_weight_starts_at_its_step():
    assert [adversarial_weight(step, 0.2, 100) for step in (0, 99, 100, 101)] == [0.0, 0.0, 0.2, 0.2]


def test_adversarial_weight_grows_from_its_start():
    weights = [adversarial_weight(step, 0.2, 100, warmup_steps=4) for step in (99, 100, 101, 103, 104, 5000)]
    assert weights == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.2, 0.2])
    # Steps are counted from 1: a start at 0 is one at the first step.
    assert [adversarial_weight(1, 0.2, start, warmup_steps=4) for start in (0, 1)] == pytest.approx([0.05, 0.05])
    with pytest.raises(ValueError, match="`warmup_steps` is -1"):
        adversarial_weight(1, 0.2, 0, warmup_steps=-1)


def test_consistency_is_zero_where_augmentation_changes_nothing():
    """Over real and fake alike, and with gradients on both sides."""
    real, fake, strong_real, strong_fake = torch.randn(4, 3, 5, requires_grad=True).unbind()
    assert consistency_loss(real, fake, real, fake) == 0
    loss = consistency_loss(real, fake, strong_real, strong_fake)
    assert_close(loss, ((real - strong_real).square().mean() + (fake - strong_fake).square().mean()).detach() / 2)
    for gradient in torch.autograd.grad(loss, (real, fake, strong_real, strong_fake)):
        assert gradient.abs().sum() > 0
