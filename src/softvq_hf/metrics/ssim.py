"""Structural similarity (Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
Transactions on Image Processing 13, 2004), through scikit-image."""

import evaluate
import torch
from skimage.metrics import structural_similarity

from softvq_hf.metrics.image_pairs import FEATURES, INPUTS_DESCRIPTION, ImagePairMetric


# Side of the Gaussian window, whose standard deviation is 1.5 pixels.
WINDOW_SIZE = 11

_DESCRIPTION = """
Structural similarity of images in [-1, 1], 1 for identical ones: Gaussian windows of 11 x 11 pixels with a standard
deviation of 1.5 pixels that lie within the image, K1 = 0.01, K2 = 0.03, of each channel of the 8-bit images; the mean
over windows, channels and images. Higher is better.
"""
_CITATION = """
@article{wang2004image,
  title={Image quality assessment: from error visibility to structural similarity},
  author={Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  journal={IEEE Transactions on Image Processing},
  volume={13}, number={4}, pages={600--612}, year={2004}
}
"""
_RETURNS = """\
Returns:
    ssim (`float`): Mean over the images.
    num_images (`int`): Number of pairs.
"""


class SSIM(ImagePairMetric):
    """
    Mean structural similarity of 8-bit images, with the full range of 256 values as data range.

    Only windows within the image count, as in the paper. It is computed in float64, on the CPU: variances are
    differences of squares, and in float32 those of flat bright images are wrong by up to 1e-3.

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
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=INPUTS_DESCRIPTION + _RETURNS,
            features=FEATURES,
        )

    def measure(self, predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        height, width = predictions.shape[2:]
        if min(height, width) < WINDOW_SIZE:
            raise ValueError(
                f"`predictions` has images of {height} x {width} pixels, allowed: sides of {WINDOW_SIZE} pixels, the "
                "window of SSIM, or more."
            )
        similarities = [
            structural_similarity(
                prediction,
                reference,
                data_range=255,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                channel_axis=0,
            )
            for prediction, reference in zip(predictions.cpu().numpy(), references.cpu().numpy(), strict=True)
        ]
        return torch.tensor(similarities, dtype=torch.float64)
