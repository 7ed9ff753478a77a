"""What PSNR, SSIM and LPIPS share: a number per pair of images, averaged over the pairs."""

from abc import abstractmethod
from typing import Any

import datasets
import torch

from softvq_hf.metrics.images import ImageRange, check_images, check_rounding
from softvq_hf.metrics.streaming import RESET, Accumulator, StreamingMetric


# What `evaluate` tells of the inputs. Images are taken as they come, not encoded.
FEATURES = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
INPUTS_DESCRIPTION = """
Args:
    predictions: Images, such as reconstructions: a tensor or an array of shape (B, 3, H, W), uint8 in [0, 255], or
        floating point in [0, 1], which is rounded to 8 bits; an array of shape (B, H, W, 3), uint8; or a list of
        images.
    references: Images of the same shape, such as the originals.
"""


class MeanAccumulator:
    """
    Sum in float64 and count of a number per sample.

    Attributes:
        total (`float`): The sum.
        count (`int`): How many numbers it has.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, values: torch.Tensor) -> None:
        """Add `values` of shape `(B,)`, on any device."""
        self.total += values.cpu().double().sum().item()  # not every device has float64
        self.count += len(values)

    def merge(self, other: "MeanAccumulator") -> None:
        """Add what another accumulator has."""
        self.total += other.total
        self.count += other.count

    def mean(self) -> float:
        """
        The mean.

        Raises:
            ValueError: If nothing was added.
        """
        if self.count == 0:
            raise ValueError("No sample was added, allowed: one or more.")
        return self.total / self.count


class ImagePairMetric(StreamingMetric):
    """
    The mean of a number per pair of images. A metric sets `key` and implements `_info` and `measure`.

    Memory does not grow with the number of images: a sum in float64, a count and the brightest value of either side.

    Args:
        rounding (`str`, *optional*, defaults to `"round"`):
            How floating point images become 8-bit ones, which all are before they are measured: see
            [`~softvq_hf.metrics.images.to_uint8`].
        kwargs: As in [`StreamingMetric`].

    Attributes:
        key (`str`): Name of the number in the result.

    Raises:
        ValueError: If `rounding` is unknown.
    """

    key: str

    def __init__(self, rounding: str = "round", **kwargs: Any) -> None:
        check_rounding(rounding)
        self.rounding = rounding
        super().__init__(**kwargs)

    @abstractmethod
    def measure(self, predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """One number per pair, `(B,)`, of uint8 images `(B, 3, H, W)` on the same device."""

    def new_accumulators(self) -> dict[str, Accumulator]:
        return {
            "mean": MeanAccumulator(),
            "predictions": ImageRange("predictions"),
            "references": ImageRange("references"),
        }

    def accumulate(self, values: torch.Tensor) -> None:
        """Take in the numbers `(B,)` of [`~ImagePairMetric.measure`]."""
        self.accumulators["mean"].update(values)

    def update(self, predictions: Any, references: Any) -> None:
        predictions = check_images(predictions, "predictions", self.rounding)
        references = check_images(references, "references", self.rounding)
        if predictions.shape != references.shape:
            raise ValueError(
                f"`predictions` has shape {tuple(predictions.shape)}, allowed: that of `references`, "
                f"{tuple(references.shape)}."
            )
        values = self.measure(predictions, references.to(predictions.device))
        self.accumulate(values)
        self.accumulators["predictions"].update(predictions)
        self.accumulators["references"].update(references)

    def result(self, accumulators: dict[str, Accumulator]) -> dict[str, Any]:
        accumulators["predictions"].check(RESET)
        accumulators["references"].check(RESET)
        return {self.key: accumulators["mean"].mean(), "num_images": accumulators["mean"].count}
