"""From a PIL image of any mode to `pixel_values`: RGB conversion, the random and centre crops of ADM (arXiv
2105.05233, the pre-processing of the ImageNet diffusion literature), and [-1, 1] tensors."""

import numpy as np
import PIL.Image
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


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
        `PIL.Image.Image`: Mode "RGB", same size; `image` itself where there is nothing to convert.

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
    return image if image.mode == "RGB" else image.convert("RGB")


def halve(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Halve both sides, rounded down, with a box filter.

    The pixels are those of `image.resize` with `PIL.Image.Resampling.BOX`, which takes means of two columns, rounds
    them to 8 bit, and takes means of two rows. `image.reduce` does the same faster, if there are no columns and rows
    over; of tall images Pillow takes the rows first.
    """
    if image.width % 2 == 0 and image.height % 2 == 0 and image.height < 2 * image.width:
        return image.reduce((2, 1)).reduce((1, 2))
    return image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)


def resize_short_side(image: PIL.Image.Image, size: int, *, fast: bool = False) -> PIL.Image.Image | torch.Tensor:
    """
    Resize so that the short side is `size` pixels: halved with a box filter while it is at least twice that, then
    bicubic.

    Args:
        image (`PIL.Image.Image`): Mode "RGB", any size; smaller images are enlarged.
        size (`int`): New short side in pixels.
        fast (`bool`, *optional*, defaults to `False`): Bicubic with the 8-bit kernels of torch, which are faster than
            those of Pillow and round a little differently.

    Returns:
        `PIL.Image.Image`; with `fast` a `torch.Tensor` of shape `(3, H, W)`, uint8.
    """
    while min(image.size) >= 2 * size:
        image = halve(image)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if not fast:
        return image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return F.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)


def adm_center_crop(image: PIL.Image.Image, size: int, *, fast: bool = False) -> PIL.Image.Image | torch.Tensor:
    """
    The centre crop of ADM: short side to `size`, then the `size` x `size` centre. Arguments and result are those of
    [`resize_short_side`].
    """
    resized = resize_short_side(image, size, fast=fast)
    height, width = F.get_size(resized)
    return F.crop(resized, (height - size) // 2, (width - size) // 2, size, size)


def largest_short_side(size: int) -> int:
    """The largest short side that [`adm_random_crop`] may draw: ceil(size / 0.8), 320 for 256."""
    return -(-5 * size // 4)


def adm_random_crop(
    image: PIL.Image.Image, size: int, generator: np.random.Generator, *, fast: bool = False
) -> PIL.Image.Image | torch.Tensor:
    """
    The random crop of ADM: short side to a random integer from `size` to [`largest_short_side`], then a square of
    `size` at a random place. Besides `generator`, arguments and result are those of [`resize_short_side`].

    Args:
        generator (`numpy.random.Generator`): Source of the short side and the place.
    """
    short_side = int(generator.integers(size, largest_short_side(size), endpoint=True))
    resized = resize_short_side(image, short_side, fast=fast)
    height, width = F.get_size(resized)
    left = int(generator.integers(0, width - size, endpoint=True))
    top = int(generator.integers(0, height - size, endpoint=True))
    return F.crop(resized, top, left, size, size)


def random_horizontal_flip(
    image: PIL.Image.Image | torch.Tensor, generator: np.random.Generator
) -> PIL.Image.Image | torch.Tensor:
    """Mirror left and right with probability 1/2."""
    return F.horizontal_flip(image) if generator.random() < 0.5 else image


def to_pixel_values(image: PIL.Image.Image | torch.Tensor) -> torch.Tensor:
    """
    An 8-bit RGB image as a model takes it.

    Args:
        image (`PIL.Image.Image` or `torch.Tensor`): Mode "RGB"; or shape `(3, H, W)`, uint8.

    Returns:
        `torch.Tensor` of shape `(3, H, W)`, float32 in [-1, 1]: 0 becomes -1, 255 becomes 1.
    """
    pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float().div_(127.5).sub_(1.0)
