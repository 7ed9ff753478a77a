"""Peak signal-to-noise ratio."""

from typing import Any

import evaluate
import torch

from softvq_hf.metrics.image_pairs import FEATURES, INPUTS_DESCRIPTION, ImagePairMetric, MeanAccumulator
from softvq_hf.metrics.streaming import Accumulator


_DESCRIPTION = """
Peak signal-to-noise ratio of images in decibels: 10 log10(255^2 / MSE), with the mean squared error over the pixels
and channels of one 8-bit image; the mean over the images. Higher is better.
"""
_RETURNS = """\
Returns:
    psnr (`float`): Mean over the images in dB; infinite if a pair of images is identical.
    num_images (`int`): Number of pairs.
    num_identical_pairs (`int`): Pairs of identical images among them.
    psnr_of_differing_pairs (`float` or `None`): Mean over the other pairs in dB; `None` if there are none.
"""


class PSNR(ImagePairMetric):
    """
    Mean over images of the peak signal-to-noise ratio of each in decibels, `10 log10(255^2 / MSE)`, on 8-bit images.

    The mean of the ratios is what papers report; it is not the ratio of the mean squared error over all images, which
    is lower. By definition a pair of identical images has an infinite ratio, and the mean is `math.inf` then;
    `num_identical_pairs` counts them, and `psnr_of_differing_pairs` is the mean over the others.

    The squared differences of 8-bit images are integers and summed exactly, so a ratio does not depend on batch size
    or device.

    Args:
        rounding, kwargs: As in [`~softvq_hf.metrics.image_pairs.ImagePairMetric`].

    Example:

    ```python
    >>> metric = evaluate.load("src/softvq_hf/metrics/psnr.py")  # or PSNR()
    >>> metric.add_batch(predictions=reconstructions, references=images)
    >>> metric.compute()["psnr"]
    ```
    """

    key = "psnr"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=INPUTS_DESCRIPTION + _RETURNS, features=FEATURES
        )

    def new_accumulators(self) -> dict[str, Accumulator]:
        return {**super().new_accumulators(), "differing": MeanAccumulator()}

    def accumulate(self, values: torch.Tensor) -> None:
        super().accumulate(values)
        self.accumulators["differing"].update(values[values.isfinite()])

    def result(self, accumulators: dict[str, Accumulator]) -> dict[str, Any]:
        figures, differing = super().result(accumulators), accumulators["differing"]
        return {
            **figures,
            "num_identical_pairs": figures["num_images"] - differing.count,
            "psnr_of_differing_pairs": differing.mean() if differing.count > 0 else None,
        }

    def measure(self, predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        # integers are exact, and every device has them; the sum over a row fits into 32 bits
        squares = (predictions.int() - references.int()).square().sum(3, dtype=torch.int32)
        mean_squared_error = squares.cpu().sum((1, 2)).double() / predictions[0].numel()
        return 10 * torch.log10(255**2 / mean_squared_error)
