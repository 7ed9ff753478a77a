"""Discriminators: the official logits, what a generator's step may and may not change, building by name, saving."""

import copy
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTModel

from softvq_hf.losses.adversarial import hinge_generator_loss
from softvq_hf.losses.discriminators import (
    DISCRIMINATORS,
    MaskBitDiscriminator,
    PatchGANDiscriminator,
    build_discriminator,
    frozen_discriminator,
)


@pytest.fixture
def official_patchgan(golden):
    description, tensors = golden("softvq_discriminators")
    config = {"hidden_channels": description["config"]["ndf"], "num_layers": description["config"]["n_layers"]}
    discriminator = build_discriminator("patchgan", **config)
    prefix = "weights.patchgan."
    discriminator.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return discriminator, tensors


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_patchgan_logits(official_patchgan, mode):
    discriminator, tensors = official_patchgan
    logits = discriminator.train(mode == "train")(tensors["input.image"])
    torch.testing.assert_close(logits, tensors[f"output.patchgan_{mode}"], atol=1e-6, rtol=0)


def test_published_patchgan_size_and_initialisation():
    discriminator = PatchGANDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    convolutions = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert abs(convolutions[3].weight.std().item() - 0.02) < 1e-3
    norm_weights = torch.cat([m.weight for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)])
    assert abs(norm_weights.mean().item() - 1) < 5e-3 and abs(norm_weights.std().item() - 0.02) < 3e-3
    with torch.device("meta"):
        assert PatchGANDiscriminator()(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_official_maskbit_logits(golden):
    _, tensors = golden("softvq_discriminators")
    discriminator = build_discriminator("maskbit", hidden_channels=32, num_layers=2)
    prefix = "weights.maskbit."
    discriminator.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    torch.testing.assert_close(
        discriminator(tensors["input.image"]), tensors["output.maskbit_eval"], atol=1e-6, rtol=0
    )
    with torch.device("meta"):
        published = MaskBitDiscriminator()
        assert published(torch.empty(2, 3, 256, 256)).shape == (2, 1, 16, 16)
    assert [m.out_channels for m in published.main if isinstance(m, nn.Conv2d)] == [64, 64, 128, 256, 1]


def test_a_generators_step_leaves_the_discriminator_as_it_was(official_patchgan):
    discriminator, tensors = official_patchgan
    discriminator.train()
    before = snapshot(discriminator)
    images = tensors["input.image"].clone().requires_grad_()
    with frozen_discriminator(discriminator) as judge:
        logits = judge(images)
    hinge_generator_loss(logits).backward()

    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())
    torch.testing.assert_close(logits, tensors["output.patchgan_train"], atol=1e-6, rtol=0)

    # Apart from that it is the training pass: same gradients of the images, and that pass does move the statistics.
    same_images = tensors["input.image"].clone().requires_grad_()
    hinge_generator_loss(discriminator(same_images)).backward()
    torch.testing.assert_close(images.grad, same_images.grad, atol=0, rtol=1e-6)
    assert images.grad.abs().sum() > 0
    assert discriminator.main[3].num_batches_tracked == before["main.3.num_batches_tracked"] + 1
    assert not torch.equal(discriminator.main[3].running_mean, before["main.3.running_mean"])
    assert discriminator.main[0].weight.grad.abs().sum() > 0


def tiny_dino():
    config = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return build_discriminator("dino", backbone=ViTModel(ViTConfig(**config), add_pooling_layer=False), depths=(1,))


TINY_DISCRIMINATORS = {
    "dino": tiny_dino,
    "patchgan": lambda: build_discriminator("patchgan", hidden_channels=8, num_layers=2),
    "maskbit": lambda: build_discriminator("maskbit", hidden_channels=32, num_layers=2),
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_generators_step_leaves_no_trace_and_changes_no_gradient(name):
    frozen = TINY_DISCRIMINATORS[name]().train()
    unfrozen = copy.deepcopy(frozen)
    before = snapshot(frozen)
    images = torch.rand(2, 3, 256, 256) * 2 - 1
    results = []
    for discriminator, context in [(frozen, frozen_discriminator(frozen)), (unfrozen, nullcontext(unfrozen))]:
        leaf = images.clone().requires_grad_()
        with context as judge:
            logits = judge(leaf, torch.Generator().manual_seed(1))
        hinge_generator_loss(logits).backward()
        results.append((logits.detach(), leaf.grad))
        assert discriminator.training
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6 * results[1][1].abs().max().item(), rtol=0)
    assert results[0][1].abs().sum() > 0

    after = frozen.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.grad is None and p.requires_grad for p in frozen.parameters())
    moved = {key for key, value in unfrozen.state_dict().items() if not torch.equal(value, before[key])}
    expected = {"dino": ("running_mean", "_u", "_v"), "patchgan": ("running_mean",), "maskbit": ()}[name]
    assert all(any(key.endswith(suffix) for key in moved) for suffix in expected) and bool(moved) == bool(expected)


def test_frozen_discriminator_keeps_what_was_frozen_and_survives_errors(official_patchgan):
    discriminator, tensors = official_patchgan
    discriminator.main[0].requires_grad_(False)
    discriminator.main[3].track_running_stats = False
    with pytest.raises(ZeroDivisionError), frozen_discriminator(discriminator):
        1 / 0  # noqa: B018
    assert not discriminator.main[0].weight.requires_grad
    assert discriminator.main[2].weight.requires_grad
    assert not discriminator.main[3].track_running_stats
    assert discriminator.main[6].track_running_stats

    discriminator.eval()
    with frozen_discriminator(discriminator):
        logits = discriminator(tensors["input.image"])
    torch.testing.assert_close(logits, tensors["output.patchgan_eval"], atol=1e-6, rtol=0)


def test_saving(official_patchgan, tmp_path):
    discriminator, tensors = official_patchgan
    save_file(discriminator.state_dict(), tmp_path / "discriminator.safetensors")
    loaded = build_discriminator("patchgan", hidden_channels=8, num_layers=2)
    loaded.load_state_dict(load_file(tmp_path / "discriminator.safetensors"))
    assert torch.equal(loaded.eval()(tensors["input.image"]), discriminator.eval()(tensors["input.image"]))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["patchgan", "maskbit"])
def test_smallest_images(name, num_layers):
    discriminator = build_discriminator(name, hidden_channels=32, num_layers=num_layers).eval()
    size = 3 * 2**num_layers if name == "patchgan" else 2 * 2**num_layers
    assert discriminator(torch.zeros(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"sides of {size} pixels or more"):
        discriminator(torch.zeros(1, 3, size - 1, size))


def test_bad_input():
    with pytest.raises(ValueError, match=f"`name` is 'patchgun', allowed: {', '.join(DISCRIMINATORS)}"):
        build_discriminator("patchgun")
    with pytest.raises(TypeError, match="width"):
        build_discriminator("patchgan", width=3)
    for name in ("patchgan", "maskbit"):
        with pytest.raises(ValueError, match="`num_layers` is 0"):
            build_discriminator(name, num_layers=0)
    with pytest.raises(ValueError, match="`hidden_channels` is 48, allowed: multiples of 32"):
        MaskBitDiscriminator(hidden_channels=48)
    with pytest.raises(ValueError, match=r"`images` has shape \(1, 1, 64, 64\), allowed: \(B, 3, H, W\)"):
        PatchGANDiscriminator(hidden_channels=2)(torch.zeros(1, 1, 64, 64))
