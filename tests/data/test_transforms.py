"""Any image becomes RGB the right way, ADM's crops cut where they should, and pixels land in [-1, 1]."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import load_file

from softvq_hf.data.images import decode_image
from softvq_hf.data.transforms import (
    adm_center_crop,
    adm_random_crop,
    convert_to_rgb,
    halve,
    random_horizontal_flip,
    resize_short_side,
    to_pixel_values,
)


def decode(image: PIL.Image.Image, format: str, **options) -> np.ndarray:
    """Through a real file of the format."""
    file = io.BytesIO()
    image.save(file, format=format, **options)
    decoded = decode_image({"bytes": file.getvalue(), "path": None})
    assert decoded.mode == "RGB"
    return np.array(decoded)


def gradient(width: int = 48, height: int = 32) -> PIL.Image.Image:
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


def test_grey_is_repeated_over_the_channels():
    pixels = decode(PIL.Image.linear_gradient("L"), "PNG")
    assert pixels.shape == (256, 256, 3)
    np.testing.assert_array_equal(pixels, np.repeat(np.array(PIL.Image.linear_gradient("L"))[..., None], 3, axis=-1))


def test_one_bit_is_black_and_white():
    image = PIL.Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    np.testing.assert_array_equal(decode(image, "PNG")[..., 0], [[0, 255], [255, 0]])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 257, 128 * 257], [65535, 129, 128]], dtype=np.uint16)
    pixels = decode(PIL.Image.fromarray(values), format)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 1, 128], [255, 1, 0]])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_thirty_two_bit_integers_are_taken_for_sixteen_bit_values():
    image = PIL.Image.fromarray(np.array([[0, 65535, 70000, -5]], dtype=np.int32))
    assert image.mode == "I"
    np.testing.assert_array_equal(np.array(convert_to_rgb(image))[0, :, 0], [0, 255, 255, 0])


def test_palette_is_looked_up():
    image = gradient().quantize(16)
    np.testing.assert_array_equal(decode(image, "PNG"), np.array(image.convert("RGB")))


def test_transparent_palette_entry_becomes_white():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.putpixel((1, 0), 1)
    pixels = decode(image, "PNG", transparency=0)
    np.testing.assert_array_equal(pixels, [[[255, 255, 255], [0, 100, 0]]])


@pytest.mark.parametrize("mode, color", [("RGBA", (100, 0, 0)), ("LA", (100,))])
def test_alpha_is_composited_over_white(mode, color):
    image = PIL.Image.new(mode, (3, 1))
    for x, alpha in enumerate((0, 255, 51)):  # 51 / 255 = 0.2
        image.putpixel((x, 0), (*color, alpha))
    pixels = decode(image, "PNG")[0, :, 0]
    np.testing.assert_array_equal(pixels, [255, 100, round(0.2 * 100 + 0.8 * 255)])


def test_cmyk_jpeg():
    image = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    red, green, blue = decode(image, "JPEG", quality=95)[8, 8]
    assert red > 240 and green < 15 and blue < 15


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="mode 'F'"):
        convert_to_rgb(PIL.Image.new("F", (2, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_exactly_once(orientation):
    upright = np.array(gradient())
    transposed = PIL.Image.fromarray(upright)
    # how a camera stores the upright picture under each orientation: the inverse of the viewer's transposition
    stored = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    if orientation in stored:
        transposed = transposed.transpose(stored[orientation])
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(decode(transposed, "PNG", exif=exif), upright)


def noise(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("width, height", [(300, 200), (200, 1000), (40, 30), (64, 64), (1, 500)])
def test_resize_short_side(width, height):
    image = resize_short_side(PIL.Image.new("RGB", (width, height)), 64)
    assert min(image.size) == 64
    assert max(image.size) == round(max(width, height) * 64 / min(width, height)) or max(width, height) >= 128
    assert (image.width > image.height) == (width > height)


def test_resize_halves_with_a_box_filter_first():
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    boxed = noise.resize((128, 128), PIL.Image.Resampling.BOX).resize((64, 64), PIL.Image.Resampling.BOX)
    np.testing.assert_array_equal(np.array(resize_short_side(noise, 64)), np.array(boxed))


@pytest.mark.parametrize(
    "width, height",
    [(64, 48), (65, 48), (64, 49), (65, 49), (2, 2), (48, 64), (64, 126), (64, 128), (64, 130), (20, 300), (300, 20)],
)
def test_halving_is_a_box_filter_bit_by_bit(width, height):
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    boxed = noise.resize((width // 2, height // 2), PIL.Image.Resampling.BOX)
    np.testing.assert_array_equal(np.array(halve(noise)), np.array(boxed))


def test_center_crop_takes_the_centre():
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    crop = adm_center_crop(PIL.Image.fromarray(columns).convert("RGB"), 100)
    np.testing.assert_array_equal(np.array(crop)[..., 0], columns[:, 50:150])


ADM_CROPS = load_file(Path(__file__).parents[1] / "fixtures/adm_center_crop.safetensors")


@pytest.mark.parametrize("name", [key.removeprefix("input.") for key in ADM_CROPS if key.startswith("input.")])
def test_center_crop_is_the_stored_reference(name):
    """Computed in float64 from the definition of the crop, by other code."""
    crop = adm_center_crop(PIL.Image.fromarray(ADM_CROPS[f"input.{name}"]), 32)
    np.testing.assert_array_equal(np.array(crop), ADM_CROPS[f"output.{name}"])


def test_random_crop_draws_its_scale_and_place():
    image = gradient(200, 100)
    crops = [np.array(adm_random_crop(image, 40, np.random.default_rng(i))) for i in range(40)]
    assert all(crop.shape == (40, 40, 3) for crop in crops)
    assert len({crop.tobytes() for crop in crops}) > 30
    np.testing.assert_array_equal(crops[3], np.array(adm_random_crop(image, 40, np.random.default_rng(3))))

    # The red gradient covers the width: its slope in a crop tells the scale, short sides 40 to 50 and no others.
    slopes = [(crop[:, -5, 0].mean() - crop[:, 4, 0].mean()) / 31 for crop in crops]
    short_sides = [255 / slope / 2 for slope in slopes]
    assert 38 < min(short_sides) < 42 and 48 < max(short_sides) < 52


def test_random_crop_reaches_the_borders():
    image = gradient(64, 64)
    corners = {np.array(adm_random_crop(image, 32, np.random.default_rng(i)))[0, 0].tobytes() for i in range(300)}
    assert np.array(gradient(64, 64).resize((32, 32), PIL.Image.Resampling.BOX))[0, 0].tobytes() in corners


def grey_levels(image: PIL.Image.Image | torch.Tensor) -> np.ndarray:
    """`(H, W, 3)`"""
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else np.array(image)
    return pixels.astype(int)


def photograph_like(width: int, height: int) -> PIL.Image.Image:
    """Smooth and rough regions, and edges."""
    rough = np.random.default_rng(0).integers(-60, 60, (height, width, 3)) * (np.arange(width) // 16 % 2)[:, None]
    pixels = np.array(gradient(width, height)) + rough
    pixels[height // 4 : height // 3] = 255
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("width, height", [(90, 70), (71, 133), (200, 150), (48, 48), (40, 30)])
def test_fast_crops_are_within_two_grey_levels(width, height):
    image = photograph_like(width, height)
    fast = adm_center_crop(image, 48, fast=True)
    assert isinstance(fast, torch.Tensor) and fast.shape == (3, 48, 48) and fast.dtype == torch.uint8
    difference = np.abs(grey_levels(fast) - grey_levels(adm_center_crop(image, 48)))
    assert difference.max() <= 2 and difference.mean() < 0.05
    for seed in range(10):
        exact = adm_random_crop(image, 40, np.random.default_rng(seed))
        fast = adm_random_crop(image, 40, np.random.default_rng(seed), fast=True)
        difference = np.abs(grey_levels(fast) - grey_levels(exact))
        assert difference.max() <= 2 and difference.mean() < 0.05


def test_flip_is_drawn():
    image = gradient()
    flipped = [np.array(random_horizontal_flip(image, np.random.default_rng(i))) for i in range(200)]
    mirrored = sum(np.array_equal(pixels, np.array(image)[:, ::-1]) for pixels in flipped)
    kept = sum(np.array_equal(pixels, np.array(image)) for pixels in flipped)
    assert mirrored + kept == 200 and 70 < mirrored < 130


def test_tensors_are_flipped_as_images_are():
    image = gradient()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for seed in range(20):
        flipped = random_horizontal_flip(pixels, np.random.default_rng(seed))
        expected = random_horizontal_flip(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(grey_levels(flipped), grey_levels(expected))


def test_pixel_values_span_minus_one_to_one():
    pixels = np.array([[[0, 255, 51]]], dtype=np.uint8)
    pixel_values = to_pixel_values(PIL.Image.fromarray(pixels))
    assert pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()
    torch.testing.assert_close(pixel_values, torch.tensor([-1.0, 1.0, -0.6]).reshape(3, 1, 1))


def test_pixel_values_of_a_tensor():
    image = gradient()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixel_values = to_pixel_values(pixels)
    assert torch.equal(pixel_values, to_pixel_values(image)) and pixel_values.is_contiguous()
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))  # not changed in place
