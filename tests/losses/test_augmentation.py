"""DiffAugment: the official result of every change with given draws, and the draws themselves."""

import pytest
import torch

from softvq_hf.losses.augmentation import (
    STRONG_AUGMENTATION,
    WEAK_AUGMENTATION,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    cut_out,
    differentiable_augmentation,
    translate,
)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_official_changes(golden):
    _, tensors = golden("softvq_losses")
    image = tensors["input.image"]
    assert_close(adjust_brightness(image, tensors["input.aug_u0"]), tensors["output.aug_brightness"])
    assert_close(adjust_saturation(image, tensors["input.aug_u1"]), tensors["output.aug_saturation"])
    assert_close(adjust_contrast(image, tensors["input.aug_u2"]), tensors["output.aug_contrast"])
    shift = tensors["input.aug_shift_rows"], tensors["input.aug_shift_cols"]
    assert_close(translate(image, *shift), tensors["output.aug_translation"])


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_official_cutout(golden, ratio):
    _, tensors = golden("softvq_losses")
    centre = tensors[f"input.aug_cut_rows_{ratio}"], tensors[f"input.aug_cut_cols_{ratio}"]
    assert_close(cut_out(tensors["input.image"], *centre, ratio), tensors[f"output.aug_cutout_{ratio}"])


def test_cutout_at_the_border():
    images = torch.ones(4, 1, 8, 8)
    centre = torch.tensor([0, 4, 7, 8])
    holes = cut_out(images, centre, centre, 0.5) == 0  # side 4, from centre - 2
    assert holes.sum((1, 2, 3)).sqrt().tolist() == [2, 4, 3, 2]
    assert cut_out(images, centre, centre, 0.0).sum() == images.sum()


def test_draws():
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    strong = differentiable_augmentation(images, 0.5, 1.0, generator=torch.Generator().manual_seed(1))
    again = differentiable_augmentation(images, 0.5, 1.0, generator=torch.Generator().manual_seed(1))
    other = differentiable_augmentation(images, 0.5, 1.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(strong, again) and not torch.equal(strong, other)
    assert torch.equal(differentiable_augmentation(images, 0.5, 0.0), images)

    # Each change is made for the whole batch or not at all, in about half of the calls.
    generator = torch.Generator().manual_seed(3)
    unchanged = [
        torch.equal(differentiable_augmentation(images, 0.2, 0.5, generator=generator), images) for _ in range(400)
    ]
    assert 30 <= sum(unchanged) <= 70


def sample_generators(indices):
    return [torch.Generator().manual_seed(100 + index) for index in indices]


@pytest.mark.parametrize("form", [WEAK_AUGMENTATION, STRONG_AUGMENTATION], ids=["weak", "strong"])
def test_amounts_do_not_depend_on_how_the_batch_is_split(form):
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    changed = 0
    for seed in range(8):
        generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
        whole = differentiable_augmentation(
            images, **form, generator=generators[0], sample_generators=sample_generators(range(6))
        )
        first = differentiable_augmentation(
            images[:2], **form, generator=generators[1], sample_generators=sample_generators(range(2))
        )
        rest = differentiable_augmentation(
            images[2:], **form, generator=generators[2], sample_generators=sample_generators(range(2, 6))
        )
        torch.testing.assert_close(torch.cat([first, rest]), whole, atol=1e-6, rtol=0)
        states = [generator.get_state() for generator in generators]
        assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
        changed += not torch.equal(whole, images)
    assert changed >= 4
    # Equal images are changed differently, each by its own draws.
    alike = differentiable_augmentation(
        images[:1].repeat(6, 1, 1, 1), **STRONG_AUGMENTATION, sample_generators=sample_generators(range(6))
    )
    assert len({tuple(image.flatten().tolist()) for image in alike}) == 6


def test_weak_and_strong_form():
    """The published forms: each change in half of the calls and holes of 0.2, or always and holes of 0.5."""
    images = torch.rand(4, 3, 16, 16) * 2 - 1

    def changed(form):
        generator = torch.Generator().manual_seed(6)
        augmented = [differentiable_augmentation(images, **form, generator=generator) for _ in range(60)]
        return sum(not torch.equal(result, images) for result in augmented)

    assert changed(STRONG_AUGMENTATION) == 60 and 40 <= changed(WEAK_AUGMENTATION) <= 59
    assert (WEAK_AUGMENTATION["cutout_ratio"], STRONG_AUGMENTATION["cutout_ratio"]) == (0.2, 0.5)


def test_translations_reach_an_eighth_of_the_size():
    generator = torch.Generator().manual_seed(4)
    images = torch.zeros(500, 1, 32, 16)
    images[:, :, 16, 8] = 1
    shifts = set()
    for _ in range(50):
        moved = differentiable_augmentation(images, 0.0, 0.5, generator=generator)
        if moved.sum() == 500 and not torch.equal(moved, images):  # translated, neither coloured nor cut
            shifts |= {(row - 16, column - 8) for _, _, row, column in moved.nonzero().tolist()}
    assert {row for row, _ in shifts} == set(range(-4, 5))
    assert {column for _, column in shifts} == set(range(-2, 3))


@pytest.mark.parametrize(("size", "last_centre"), [(8, 8), (6, 5)], ids=["even side", "odd side"])
def test_holes_reach_the_far_corner(size, last_centre):
    """A hole of 4 in 8 pixels may be centred on 0 to 8, one of 3 in 6 pixels on 0 to 5."""
    generator = torch.Generator().manual_seed(5)
    images = torch.ones(300, 1, size, size)
    found = [0, 0]
    for _ in range(40):
        cut = differentiable_augmentation(images, 0.5, 0.5, generator=generator)
        for i, centre in enumerate([last_centre, last_centre + 1]):
            corner = cut_out(images[:1], torch.tensor([centre]), torch.tensor([centre]), 0.5)
            found[i] += (cut == corner).all(3).all(2).sum().item()
    assert found[0] > 0
    assert found[1] == 0


def test_gradients_reach_the_images():
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    differentiable_augmentation(images, 0.5, 1.0).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_bad_input():
    with pytest.raises(ValueError, match="`cutout_ratio` is 1.5"):
        differentiable_augmentation(torch.zeros(1, 3, 8, 8), 1.5, 1.0)
    with pytest.raises(ValueError, match="`probability` is -1"):
        differentiable_augmentation(torch.zeros(1, 3, 8, 8), 0.5, -1)
    with pytest.raises(ValueError, match="`sample_generators` has length 2, allowed: 3, one per image"):
        differentiable_augmentation(torch.zeros(3, 3, 8, 8), 0.5, 1.0, sample_generators=sample_generators(range(2)))
