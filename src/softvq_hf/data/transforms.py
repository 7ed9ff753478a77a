"""From a PIL image of any mode to `pixel_values`: RGB conversion, the random and centre crops of ADM (arXiv
2105.05233, the pre-processing of the ImageNet diffusion literature), and [-1, 1] tensors."""

import numpy as np
import PIL.Image
import torch


SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def convert_to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Convert an image of any integer mode to 8-bit RGB.

    - Grey and 1-bit images are repeated over the channels; palettes are looked up; CMYK and YCbCr are converted.
    - Transparency (an alpha channel, or a transparent palette entry or colour) is composited over white.
    - 16-bit grey is scaled to 8 bit, `round(value / 257)`, not clipped. PIL holds some 16-bit files as 32-bit integers
      (mode "I"): these are taken for 16-bit values too, clipped to [0, 65535].

    Args:
        image (`PIL.Image.Image`): Any image, EXIF orientation already applied.

    Returns:
        `PIL.Image.Image`: Mode "RGB", same size.

    Raises:
        ValueError: If the image has floating point pixels (mode "F"), whose range is unknown, or a mode that PIL
            cannot convert.
    """
    if image.mode == "F":
        raise ValueError("the image has floating point pixels (PIL mode 'F'), allowed: integer pixels.")
    if image.mode in SIXTEEN_BIT_MODES:
        values = np.asarray(image).clip(0, 65535)
        image = PIL.Image.fromarray(((values + 128.0) / 257.0).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_short_side(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """
    Resize so that the short side is `size` pixels: halved with a box filter while it is at least twice that, then
    bicubic.

    Args:
        image (`PIL.Image.Image`): Any size; smaller images are enlarged.
        size (`int`): New short side in pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)


def adm_center_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The centre crop of ADM: short side to `size` by [`resize_short_side`], then the `size` x `size` centre."""
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def adm_random_crop(image: PIL.Image.Image, size: int, generator: np.random.Generator) -> PIL.Image.Image:
    """
    The random crop of ADM: short side to a random integer in [size, ceil(size / 0.8)] (256 to 320 for 256) by
    [`resize_short_side`], then a `size` x `size` crop at a random place.

    Args:
        image (`PIL.Image.Image`): Any size; smaller images are enlarged.
        size (`int`): Side of the crop in pixels.
        generator (`numpy.random.Generator`): Source of the short side and the place.
    """
    image = resize_short_side(image, int(generator.integers(size, -(-5 * size // 4), endpoint=True)))
    left = int(generator.integers(0, image.width - size, endpoint=True))
    top = int(generator.integers(0, image.height - size, endpoint=True))
    return image.crop((left, top, left + size, top + size))


def random_horizontal_flip(image: PIL.Image.Image, generator: np.random.Generator) -> PIL.Image.Image:
    """Mirror left and right with probability 1/2."""
    if generator.random() < 0.5:
        return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def to_pixel_values(image: PIL.Image.Image) -> torch.Tensor:
    """
    An 8-bit RGB image as a model takes it.

    Args:
        image (`PIL.Image.Image`): Mode "RGB".

    Returns:
        `torch.Tensor` of shape `(3, H, W)`, float32 in [-1, 1]: 0 becomes -1, 255 becomes 1.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float() / 127.5 - 1.0
