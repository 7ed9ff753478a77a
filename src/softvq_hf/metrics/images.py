"""Images as metrics take them: checked, as 8-bit tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from softvq_hf.metrics.batches import not_finite, to_tensor


ROUNDINGS = ("round", "truncate")


def check_rounding(rounding: str) -> None:
    """Raises a `ValueError` if `rounding` is not one of [`to_uint8`]."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"`rounding` is {rounding!r}, allowed: {', '.join(map(repr, ROUNDINGS))}.")


def to_uint8(images: torch.Tensor, rounding: str = "round") -> torch.Tensor:
    """
    8-bit images from floating point ones.

    Args:
        images (`torch.Tensor`): Floating point, clamped to [0, 1].
        rounding (`str`, *optional*, defaults to `"round"`):
            `"round"` (half to even) to the nearest of the 256 values, or `"truncate"` to the one below: half a grey
            level darker on average. The official sampling scripts of SiT and DiT truncate; those of the tokenizers of
            LlamaGen and SoftVQ-VAE add 128 to `127.5 * x` before they do, which rounds.

    Returns:
        `torch.Tensor`: uint8, same shape.

    Raises:
        ValueError: If `rounding` is unknown.
    """
    check_rounding(rounding)
    scaled = images.clamp(0, 1).float() * 255
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


def check_images(images: Any, argument: str, rounding: str = "round") -> torch.Tensor:
    """
    A batch of images as one 8-bit tensor.

    Args:
        images: One of
            - `torch.Tensor` or `numpy.ndarray` of shape `(B, 3, H, W)`, or `(B, H, W, 3)` for arrays of uint8: uint8
              in [0, 255], or floating point in [0, 1];
            - a sequence of such images without the batch dimension, or of `PIL.Image.Image`.
        argument (`str`): What the caller calls them, for the errors.
        rounding (`str`, *optional*, defaults to `"round"`): As in [`to_uint8`]; for floating point images.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: uint8.

    Raises:
        ValueError: If there is no image, their sizes differ, a value is not finite or out of its range ([-1, 1] and
            [0, 255] are named where they are met), or the shape or type is another one.
    """
    if not isinstance(images, (torch.Tensor, np.ndarray)):
        if not isinstance(images, Sequence):
            raise ValueError(
                f"`{argument}` is of type {type(images).__name__}, allowed: a tensor, an array or a sequence of "
                "images."
            )
        if len(images) == 0:
            raise ValueError(f"`{argument}` holds no image.")
        tensors = [_image_to_tensor(image, argument) for image in images]
        sizes = sorted({tuple(tensor.shape[-2:]) for tensor in tensors})
        if len(sizes) > 1:
            raise ValueError(
                f"`{argument}` holds images of the sizes {', '.join(f'{h} x {w}' for h, w in sizes)} (height x width),"
                " allowed: one size. Crop them first."
            )
        if len({tensor.dtype.is_floating_point for tensor in tensors}) > 1:
            raise ValueError(f"`{argument}` holds 8-bit and floating point images, allowed: one kind.")
        images = torch.stack(tensors)
    else:
        images = to_tensor(images, argument)
    if images.ndim == 4 and images.dtype == torch.uint8 and images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 1:
        raise ValueError(
            f"`{argument}` has shape {tuple(images.shape)}, allowed: (B, 3, H, W), or (B, H, W, 3) for 8-bit arrays."
        )
    if len(images) == 0:
        raise ValueError(f"`{argument}` holds no image.")
    if images.dtype == torch.uint8:
        return images
    if not images.dtype.is_floating_point:
        raise ValueError(
            f"`{argument}` has dtype {images.dtype}, allowed: uint8 in [0, 255], or floating point in [0, 1]."
        )
    broken = not_finite(images)
    if broken:
        raise ValueError(f"`{argument}` holds values that are not finite (NaN or infinite), in the images {broken}.")
    lowest, highest = images.min().item(), images.max().item()
    if lowest < 0 or highest > 1:
        if highest > 2:
            hint = " These look like values in [0, 255]: pass them as uint8, or divide by 255."
        elif lowest < 0 and lowest >= -1.01 and highest <= 1.01:
            hint = " These look like pixel values in [-1, 1]: pass `pixel_values / 2 + 0.5`, clamped."
        else:
            hint = " Clamp them."
        raise ValueError(
            f"`{argument}` holds values from {lowest:.4g} to {highest:.4g}, allowed for floating point: [0, 1].{hint}"
        )
    return to_uint8(images, rounding)


class ImageRange:
    """
    The brightest value of 8-bit images, streamed: images in [0, 1] that were cast to 8 bits without a factor of 255
    are black to the eye, and every figure of them is wrong.

    Args:
        argument (`str`): What the caller calls the images, for the error.

    Attributes:
        num_images (`int`): How many images there were.
        brightest (`int`): Their highest value.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.num_images = 0
        self.brightest = 0

    def update(self, images: torch.Tensor) -> None:
        """Take in uint8 images of shape `(B, 3, H, W)`."""
        self.num_images += len(images)
        self.brightest = max(self.brightest, images.max().item())

    def merge(self, other: "ImageRange") -> None:
        """Take in what another one has seen."""
        self.num_images += other.num_images
        self.brightest = max(self.brightest, other.brightest)

    def check(self, remedy: str = "") -> None:
        """
        Args:
            remedy (`str`, *optional*): What else the error tells to do.

        Raises:
            ValueError: If there were two images or more, and none has a value above 1.
        """
        if self.num_images > 1 and self.brightest <= 1:
            raise ValueError(
                f"`{self.argument}` holds no value above {self.brightest} in any of {self.num_images} 8-bit images, "
                f"allowed: [0, 255]. Images in [0, 1] are passed as floating point, without a cast to uint8.{remedy}"
            )


class ImageSize:
    """
    The size of images, streamed: one for all of them, since features of images depend on it.

    Attributes:
        size (`tuple[int, int]`, *optional*): Height and width in pixels, `None` before the first images.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None

    def update(self, images: torch.Tensor, argument: str) -> None:
        """
        Take in images of shape `(B, 3, H, W)`.

        Raises:
            ValueError: If the others had another size. It names `argument`.
        """
        self._take(tuple(images.shape[-2:]), f"`{argument}`")

    def merge(self, other: "ImageSize") -> None:
        """Take in what another one has seen, likewise."""
        if other.size is not None:
            self._take(other.size, "Another process")

    def _take(self, size: tuple[int, int], who: str) -> None:
        if self.size not in (None, size):
            raise ValueError(
                f"{who} has images of {size[0]} x {size[1]} pixels (height x width), allowed as with the others: "
                f"{self.size[0]} x {self.size[1]}. Crop them first."
            )
        self.size = size


def _image_to_tensor(image: Any, argument: str) -> torch.Tensor:
    """One image of any allowed kind as `(3, H, W)`."""
    if isinstance(image, PIL.Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"`{argument}` holds an image of PIL mode {image.mode!r}, allowed: 'RGB'.")
        image = np.array(image)
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        raise ValueError(
            f"`{argument}` holds an object of type {type(image).__name__}, allowed: tensors, arrays and PIL images."
        )
    image = to_tensor(image, argument)
    if image.ndim == 3 and image.dtype == torch.uint8 and image.shape[-1] == 3 and image.shape[0] != 3:
        image = image.permute(2, 0, 1)
    if image.ndim != 3:
        raise ValueError(f"`{argument}` holds an image of shape {tuple(image.shape)}, allowed: (3, H, W).")
    return image
