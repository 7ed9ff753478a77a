"""Images as metrics take them."""

import numpy as np
import PIL.Image
import pytest
import torch

from softvq_hf.metrics.images import ImageRange, check_images, to_uint8


LEVELS = torch.arange(256, dtype=torch.uint8)


def test_rounding_gives_back_every_level_and_truncating_loses_half_a_level():
    assert torch.equal(to_uint8(LEVELS / 255), LEVELS)
    values = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert (to_uint8(values).double() - values * 255).mean().item() == pytest.approx(0, abs=1e-3)
    assert (to_uint8(values, "truncate").double() - values * 255).mean().item() == pytest.approx(-0.5, abs=0.01)


def test_rounding_clamps():
    values = torch.tensor([-0.5, 1.5])
    assert to_uint8(values).tolist() == to_uint8(values, "truncate").tolist() == [0, 255]


def test_unknown_rounding():
    with pytest.raises(ValueError, match="`rounding` is 'floor', allowed: 'round', 'truncate'"):
        to_uint8(torch.rand(1), "floor")


@pytest.mark.parametrize(
    "convert",
    [
        lambda images: images,
        lambda images: images / 255,
        lambda images: images.double() / 255,
        lambda images: images.numpy(),
        lambda images: images.permute(0, 2, 3, 1).numpy(),
        lambda images: images.numpy() / 255,
        lambda images: (images / 255).numpy().astype(">f4"),
        lambda images: images.flip(3).numpy()[..., ::-1],
        lambda images: [image.flip(2).numpy()[..., ::-1] for image in images],
        lambda images: list(images),
        lambda images: [image.permute(1, 2, 0).numpy() for image in images],
        lambda images: [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
    ],
    ids=[
        "uint8",
        "float32",
        "float64",
        "array",
        "array HWC",
        "float array",
        "big-endian",
        "backwards",
        "list backwards",
        "list",
        "list HWC",
        "PIL",
    ],
)
def test_all_kinds_of_images_are_the_same(convert):
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    checked = check_images(convert(images), "predictions")
    assert checked.dtype == torch.uint8 and torch.equal(checked, images)


def test_rounding_is_passed_on():
    images = torch.full((1, 3, 2, 2), 100.9 / 255)
    assert check_images(images, "predictions").unique().tolist() == [101]
    assert check_images(images, "predictions", "truncate").unique().tolist() == [100]


def nan_images() -> torch.Tensor:
    images = torch.rand(3, 3, 4, 4)
    images[1, 0, 0, 0] = torch.nan
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 4, 4) * 255, r"values from .* These look like values in \[0, 255\]"),
        (torch.rand(2, 3, 4, 4) * 2 - 1, r"These look like pixel values in \[-1, 1\]: pass `pixel_values / 2 \+ 0.5`"),
        (torch.rand(2, 3, 4, 4) * 1.5, "Clamp them"),
        (nan_images(), r"not finite .*, in the images \[1\]"),
        (torch.randint(0, 256, (2, 3, 4, 4)), "dtype torch.int64, allowed: uint8"),
        (torch.rand(2, 1, 4, 4), r"shape \(2, 1, 4, 4\), allowed: \(B, 3, H, W\)"),
        (torch.rand(3, 4, 4), r"shape \(3, 4, 4\)"),
        (torch.rand(0, 3, 4, 4), "holds no image"),
        ([], "holds no image"),
        ([torch.rand(3, 4, 4), torch.rand(3, 4, 5)], "sizes 4 x 4, 4 x 5 .* Crop them first"),
        ([torch.rand(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)], "8-bit and floating point"),
        ([PIL.Image.fromarray(np.zeros((4, 4), np.uint8))], "PIL mode 'L', allowed: 'RGB'"),
        (np.zeros((2, 3, 4, 4), np.longdouble), "dtype .*, allowed"),
        (np.zeros((2, 3, 4, 4), object), "dtype object, allowed"),
        ([np.zeros((3, 4, 4), object)], "dtype object, allowed"),
        (torch.zeros(2, 3, 4, 4).to(torch.float8_e5m2), "dtype torch.float8_e5m2, allowed"),
        (["photograph.png"], "object of type str"),
        (None, "of type NoneType"),
    ],
)
def test_bad_images_are_refused_by_name(images, message):
    with pytest.raises(ValueError, match=f"`references` .*{message}"):
        check_images(images, "references")


def test_a_range_of_0_to_1_in_8_bits_is_noticed_over_all_images():
    images = torch.randint(0, 2, (3, 3, 4, 4), dtype=torch.uint8)
    dark, bright = ImageRange("predictions"), ImageRange("predictions")
    dark.update(images)
    with pytest.raises(ValueError, match="`predictions` holds no value above 1 in any of 3 8-bit images"):
        dark.check()
    bright.update(torch.full((1, 3, 4, 4), 2, dtype=torch.uint8))
    dark.merge(bright)
    dark.check()
    assert (dark.num_images, dark.brightest) == (4, 2)


def test_one_black_image_is_an_image():
    black = ImageRange("predictions")
    black.update(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    black.check()
    assert black.num_images == 1
