"""Fréchet distance between two sets of images or features: FID on Inception features."""

from typing import Any

import evaluate
import torch
from accelerate.logging import get_logger

from softvq_hf.metrics.feature_metric import FEATURES, FeatureMetric
from softvq_hf.metrics.features import FeatureExtractor
from softvq_hf.metrics.gaussian import GaussianAccumulator, GaussianStatistics, frechet_distance


logger = get_logger(__name__)

_DESCRIPTION = """
Fréchet distance between Gaussians fitted to the features of two sets of images. On the 2048 pooled features of the
Inception network of torch-fidelity it is the FID (rFID for reconstructions, gFID for generated images); with
`spatial=True` on spatial features of that network it is the sFID. With any other network it is not, and must be named
after that network. It is biased: fewer samples give a higher value, so that only numbers over as many samples compare.
"""
_CITATION = """
@inproceedings{heusel2017gans,
    title = {{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
    author = {Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2017},
    note = {arXiv:1706.08500}
}
@inproceedings{nash2021generating,
    title = {Generating images with sparse representations},
    author = {Nash, Charlie and Menick, Jacob and Dieleman, Sander and Battaglia, Peter},
    booktitle = {International Conference on Machine Learning},
    year = {2021},
    note = {arXiv:2103.03841}
}
"""
_INPUTS = """
Args:
    predictions: `(B, 3, H, W)` images (uint8, or floating point in [0, 1]), or `(B, D)` features without a
        `feature_extractor`.
    references: The same of the set to compare with. Their number may differ.
    indices: Numbers of the samples in the whole set. Taken for the sake of other metrics of features; the order of the
        samples does not count here.
Returns:
    frechet_distance (`float`): From 0 on; lower is better.
    num_predictions (`int`), num_references (`int` or `None`): Numbers of samples.
"""


class FrechetDistance(FeatureMetric):
    """
    Fréchet distance between Gaussians fitted to the features of two sets of images; see [`frechet_distance`].

    Memory: mean and covariance of either side in float64, 34 MB each for the 2048 features of Inception, and 8 MB for
    features that wait to be taken in, whatever the number of images.

    Args:
        feature_extractor ([`FeatureExtractor`] or `str`, *optional*):
            `"inception"` for FID and sFID, `"dinov2"`, or any other; see [`FeatureMetric`]. Without it `predictions`
            and `references` are features.
        spatial (`bool`, *optional*, defaults to `False`):
            Compare the extractor's spatial features: sFID of Nash et al., arXiv 2103.03841, on Inception.
        reference ([`GaussianStatistics`], *optional*):
            Statistics to compare with, instead of `references`.
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: If `feature_extractor` or `reference` is of another type.
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractor | str | None = None,
        spatial: bool = False,
        reference: GaussianStatistics | None = None,
        **kwargs: Any,
    ) -> None:
        if reference is not None and not isinstance(reference, GaussianStatistics):
            raise ValueError(
                f"`reference` is of type {type(reference).__name__}, allowed: GaussianStatistics, or None."
            )
        self.layer = "spatial_features" if spatial else "features"
        self.reference = reference
        super().__init__(feature_extractor, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=FEATURES,
        )

    def new_accumulator(self) -> GaussianAccumulator:
        return GaussianAccumulator()

    def num_features(self) -> int | None:
        return super().num_features() if self.reference is None else len(self.reference.mean)

    def accumulate(self, features: dict[str, torch.Tensor], indices: Any) -> None:
        if self.reference is not None and "references" in features:
            raise ValueError("`references` were given to a metric that has a `reference`, allowed: either.")
        for side, batch in features.items():
            self.accumulators[side].update(batch)

    def measure(self, accumulators: dict[str, GaussianAccumulator]) -> dict[str, Any]:
        sides = ("predictions", "references") if self.reference is None else ("predictions",)
        for side in sides:
            count, num_features = accumulators[side].count, accumulators[side].num_features
            if count < 2:
                raise ValueError(f"`{side}` has {count} sample(s), allowed: 2 or more, to have a covariance.")
            if count <= num_features:
                logger.warning(
                    f"There are {count} {side} for {num_features} features: their covariance is singular and the"
                    " Fréchet distance is far too high. Compare it only with numbers over as many."
                )
        predictions = accumulators["predictions"].statistics()
        references = self.reference or accumulators["references"].statistics()
        return {
            "frechet_distance": frechet_distance(predictions, references),
            "num_predictions": predictions.count,
            "num_references": references.count,
        }
