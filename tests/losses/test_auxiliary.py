"""MAETok's auxiliary decoders: their targets against independent computations, their losses, their gradients."""

import math

import pytest
import torch
from skimage import data
from skimage.feature import hog
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from softvq_hf.losses.alignment import FrozenTeacher
from softvq_hf.losses.auxiliary import (
    AUXILIARY_LOSSES,
    HOG_CHANNELS,
    AuxiliaryDecoder,
    feature_loss,
    hog_loss,
    hog_targets,
)


def tiny_decoder(**changes) -> AuxiliaryDecoder:
    sizes = {"latent_channels": 4, "num_latent_tokens": 5, "grid_size": (2, 3), "target_channels": 7}
    return AuxiliaryDecoder(**{**sizes, "hidden_size": 64, "num_layers": 2, **changes})


def modulations(decoder: AuxiliaryDecoder) -> list[nn.Linear]:
    return [module for name, module in decoder.named_modules() if name.endswith("modulation")]


# Histograms


def test_hog_is_that_of_scikit_image():
    """A photograph, whose equal pixels and straight edges fall on the ends of bins, of more columns than rows."""
    images = torch.from_numpy(data.astronaut()[100:164, 60:156].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    cells = hog_targets(images).unflatten(1, (4, 6)).unflatten(3, (3, 9, 2, 2))
    cells = cells.permute(0, 3, 1, 5, 2, 6, 4).reshape(3, 8, 12, 9)  # colour, row and column of the cell, orientation
    for colour in range(3):
        expected = hog(
            images[0, colour].double().numpy(),
            orientations=9,
            pixels_per_cell=(8, 8),
            cells_per_block=(1, 1),
            block_norm="L2",
            feature_vector=False,
        )
        # scikit-image adds 1e-5 to the norm
        torch.testing.assert_close(
            cells[colour].double(), torch.from_numpy(expected[:, :, 0, 0]), atol=1e-4, rtol=0, check_dtype=False
        )


def test_hog_is_that_of_a_loop_over_pixels():
    """Layout of the 108 values, the reflected border, and patches of another size."""
    images = torch.rand(2, 3, 12, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    targets = hog_targets(images, patch_size=6)
    assert targets.shape == (2, 2, HOG_CHANNELS) and targets.dtype == torch.float32
    for image in range(2):
        for colour in range(3):
            pixels = images[image, colour].double().tolist()
            sums = {}
            for row in range(12):
                for column in range(6):
                    inner = 0 < column < 5, 0 < row < 11
                    x = pixels[row][column + 1] - pixels[row][column - 1] if inner[0] else 0.0
                    y = pixels[row + 1][column] - pixels[row - 1][column] if inner[1] else 0.0
                    orientation = int(math.degrees(math.atan2(y, x)) % 180 // 20)
                    cell = sums.setdefault((row // 3, column // 3), [0.0] * 9)
                    cell[orientation] += math.hypot(x, y)
            for (row, column), cell in sums.items():
                for orientation in range(9):
                    index = ((colour * 9 + orientation) * 2 + row % 2) * 2 + column
                    expected = cell[orientation] / math.hypot(*cell)
                    assert targets[image, row // 2, index].item() == pytest.approx(expected, abs=1e-5)


def test_hog_of_edges():
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 12:] = 1  # a vertical edge in the right cells: gradients along the rows
    targets = hog_targets(edge).reshape(3, 9, 2, 2)
    assert torch.equal(targets[:, 0], torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(3, 2, 2))
    assert targets[:, 1:].sum() == 0
    for images in (-edge, edge.mT, torch.zeros_like(edge)):  # falling, horizontal, none
        orientation = hog_targets(images).reshape(3, 9, 2, 2).sum((0, 2, 3)).nonzero().flatten().tolist()
        assert orientation == ([0] if images.min() < 0 else [4] if images.any() else [])


def test_hog_ignores_scale_and_precision():
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).bfloat16()
    targets = hog_targets(images)
    assert targets.dtype == torch.float32 and not targets.requires_grad
    # powers of two are exact
    assert torch.equal(hog_targets(images * 0.25), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hog_targets(images.float().requires_grad_()), targets)


def test_bad_images():
    with pytest.raises(ValueError, match="`patch_size` is 7, allowed: even numbers"):
        hog_targets(torch.zeros(1, 3, 14, 14), patch_size=7)
    for shape in [(1, 3, 40, 32), (1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 16)]:
        with pytest.raises(ValueError, match=r"`images` has shape .*, allowed: \(B, 3, H, W\), .* `patch_size` 16"):
            hog_targets(torch.zeros(shape))


# Decoders


def test_decoder_predicts_every_patch_from_the_latents():
    decoder = tiny_decoder()
    assert all(modulation.weight.abs().sum() == 0 for modulation in modulations(decoder)), "starts without modulation"
    for modulation in modulations(decoder):
        nn.init.normal_(modulation.weight)
    latent = torch.randn(2, 5, 4, requires_grad=True)
    prediction = decoder(latent)
    assert prediction.shape == (2, 6, 7)
    prediction.square().mean().backward()
    assert latent.grad.abs().sum() > 0
    # the last blocks' modulation of latent tokens that are read no more has a gradient too, of zeros: DDP waits for it
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []

    parts = decoder.decoder
    assert parts.is_movq and parts.positions.cls_token is not None and parts.positions.position_embedding is None
    assert parts.rope.theta == 10.0 and parts.rope.frequencies.requires_grad
    assert parts.blocks[0].ff.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_patches_are_in_raster_order():
    """The head's input at each patch is seen in that patch's prediction."""
    decoder = tiny_decoder()
    order = []
    decoder.decoder.norm.register_forward_hook(lambda module, args, output: order.append(output))
    prediction = decoder(torch.randn(1, 5, 4))
    first = decoder.decoder.positions.num_prefix_tokens
    expected = decoder.decoder.pixel_head.proj(order[0][:, first : first + 6])
    torch.testing.assert_close(prediction, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["hog", "dinov2"])
def test_decoders_learn_their_targets(name):
    """Two images: what a decoder learns depends on the place and on the latents, once they modulate."""
    images = nn.functional.interpolate(torch.rand(2, 3, 16, 16) * 2 - 1, size=(32, 32), mode="bilinear")
    if name == "hog":
        target = hog_targets(images)
    else:
        config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
        target = FrozenTeacher(Dinov2Model(Dinov2Config(**config, patch_size=8)), resolution=32, patch_size=16)(images)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    latent = torch.randn(2, 5, 4)
    decoder = tiny_decoder(grid_size=(2, 2), target_channels=target.shape[2])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    loss_of_target = AUXILIARY_LOSSES[name]
    for _ in range(150):
        loss = loss_of_target(decoder(latent), target, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        swapped = loss_of_target(decoder(latent.flip(0)), target, mask)
    margin = {"hog": 4 * loss.item(), "dinov2": 0.1}[name]
    assert swapped > loss + margin


def test_bad_sizes():
    with pytest.raises(ValueError, match="`hidden_size` is 96, allowed: multiples of 64"):
        tiny_decoder(hidden_size=96)
    for name in ("latent_channels", "num_latent_tokens", "target_channels", "num_layers"):
        with pytest.raises(ValueError, match=f"`{name}` is 0, allowed: 1 or more"):
            tiny_decoder(**{name: 0})
    with pytest.raises(ValueError, match="`grid_size` is 0"):
        tiny_decoder(grid_size=(2, 0))
    for shape in [(2, 4, 4), (2, 5, 3), (5, 4)]:
        with pytest.raises(ValueError, match=r"`latent` has shape .*, allowed: \(B, 5, 4\)"):
            tiny_decoder()(torch.zeros(shape))


# Losses


def test_losses_are_means_over_the_masked_patches():
    prediction, target = torch.randn(2, 6, 7), torch.randn(2, 6, 7)
    mask = torch.tensor([[True, False, False, True, False, False], [False, True, True, False, False, False]])
    squares = [(prediction[mask][i] - target[mask][i]).square().mean() for i in range(4)]
    torch.testing.assert_close(hog_loss(prediction, target, mask), sum(squares) / 4)
    cosines = [
        prediction[mask][i] @ target[mask][i] / (prediction[mask][i].norm() * target[mask][i].norm()) for i in range(4)
    ]
    torch.testing.assert_close(feature_loss(prediction, target, mask), -sum(cosines) / 4)

    for loss in (hog_loss, feature_loss):
        everything = loss(prediction, target)
        assert everything.shape == () and not torch.allclose(everything, loss(prediction, target, mask))
        torch.testing.assert_close(everything, loss(prediction, target, torch.ones(2, 6, dtype=torch.bool)))
        # as many masked patches in each image: the mean of two processes' means is that of both batches
        halves = [loss(prediction[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(sum(halves) / 2, loss(prediction, target, mask))
        assert loss(prediction, target, torch.zeros(2, 6, dtype=torch.bool)) == 0
        assert loss(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_bounds():
    features = torch.randn(2, 6, 7)
    torch.testing.assert_close(feature_loss(3 * features, features), torch.tensor(-1.0))
    torch.testing.assert_close(feature_loss(-features, features), torch.tensor(1.0))
    assert hog_loss(features, features) == 0


def test_gradients_reach_masked_patches_only():
    mask = torch.tensor([[True, False, True]])
    for loss in (hog_loss, feature_loss):
        prediction = torch.randn(1, 3, 4, requires_grad=True)
        loss(prediction, torch.randn(1, 3, 4), mask).backward()
        assert prediction.grad.abs().sum(-1).bool().tolist() == mask.tolist()


def test_bad_losses_input():
    prediction = torch.zeros(2, 6, 7)
    for loss in (hog_loss, feature_loss):
        with pytest.raises(ValueError, match=r"`target` has shape \(2, 1, 7\), allowed: \(2, 6, 7\)"):
            loss(prediction, torch.zeros(2, 1, 7))
        with pytest.raises(ValueError, match=r"`prediction` has shape \(6, 7\)"):
            loss(prediction[0], prediction[0])
        for mask in (torch.zeros(2, 6), torch.zeros(2, 5, dtype=torch.bool)):
            with pytest.raises(ValueError, match=r"`mask` has dtype .*, allowed: torch.bool and \(2, 6\)"):
                loss(prediction, prediction, mask)
