"""Peak signal-to-noise ratio, through torchmetrics."""

import evaluate
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from softvq_hf.metrics.image_pairs import FEATURES, INPUTS_DESCRIPTION, ImagePairMetric


DESCRIPTION = """\
Peak signal-to-noise ratio of images in decibels: 10 log10(255^2 / MSE), with the mean squared error over the pixels
and channels of one 8-bit image; the mean over the images. Higher is better."""
RETURNS = """
Returns `psnr`, the mean over the images in dB, infinite if a pair of images is identical, and `num_images`.
"""


class PSNR(ImagePairMetric):
    """
    Mean over images of the peak signal-to-noise ratio of each in decibels, `10 log10(255^2 / MSE)`, on 8-bit images.

    The mean of the ratios is what papers report; it is not the ratio of the mean squared error over all images, which
    is lower. By definition a pair of identical images has an infinite ratio, and the mean is `math.inf` then.

    The squared differences of 8-bit images are summed exactly, so a ratio does not depend on batch size or device.

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
            description=DESCRIPTION, citation="", inputs_description=INPUTS_DESCRIPTION + RETURNS, features=FEATURES
        )

    def measure(self, predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return peak_signal_noise_ratio(
            predictions.double(), references.double(), data_range=255.0, reduction="none", dim=(1, 2, 3)
        )
