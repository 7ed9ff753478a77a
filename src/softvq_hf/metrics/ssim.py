"""Structural similarity (Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
Transactions on Image Processing 13, 2004), through torchmetrics."""

import evaluate
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from softvq_hf.metrics.image_pairs import FEATURES, INPUTS_DESCRIPTION, ImagePairMetric


# Side of the Gaussian window, whose standard deviation is 1.5 pixels.
WINDOW_SIZE = 11

DESCRIPTION = """\
Structural similarity of images in [-1, 1], 1 for identical ones: Gaussian windows of 11 x 11 pixels with a standard
deviation of 1.5 pixels that lie within the image, K1 = 0.01, K2 = 0.03, of each channel of the 8-bit images; the mean
over windows, channels and images. Higher is better."""
CITATION = """\
@article{wang2004image,
  title={Image quality assessment: from error visibility to structural similarity},
  author={Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  journal={IEEE Transactions on Image Processing},
  volume={13}, number={4}, pages={600--612}, year={2004}
}"""
RETURNS = """
Returns `ssim`, the mean over the images, and `num_images`.
"""


class SSIM(ImagePairMetric):
    """
    Mean structural similarity of 8-bit images, with the full range of 256 values as data range.

    As in the paper and in scikit-image, only windows within the image count. torchmetrics' own mean also has those
    that reach over the border, into a reflection of the image, which on small images differs in the third decimal;
    [`SSIM`] takes the map of the windows from it and leaves them out.

    Args:
        rounding, kwargs: As in [`~softvq_hf.metrics.image_pairs.ImagePairMetric`].

    Example:

    ```python
    >>> metric = evaluate.load("src/softvq_hf/metrics/ssim.py")  # or SSIM()
    >>> metric.add_batch(predictions=reconstructions, references=images)
    >>> metric.compute()["ssim"]
    ```
    """

    key = "ssim"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION + RETURNS,
            features=FEATURES,
        )

    def measure(self, predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        height, width = predictions.shape[2:]
        if min(height, width) < WINDOW_SIZE:
            raise ValueError(
                f"`predictions` has images of {height} x {width} pixels, allowed: sides of {WINDOW_SIZE} pixels, the "
                "window of SSIM, or more."
            )
        _, similarity = structural_similarity_index_measure(
            predictions.float() / 255,
            references.float() / 255,
            gaussian_kernel=True,
            sigma=1.5,
            kernel_size=WINDOW_SIZE,
            data_range=1.0,
            reduction="none",
            return_full_image=True,
        )
        border = WINDOW_SIZE // 2
        return similarity[:, :, border : height - border, border : width - border].mean((1, 2, 3))
