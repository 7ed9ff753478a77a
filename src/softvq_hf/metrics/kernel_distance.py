"""Kernel distance between two sets of images or features: KID on Inception features."""

import math
from typing import Any

import evaluate
import numpy as np
import torch

from softvq_hf.metrics.feature_metric import FEATURES, SampledFeatureMetric, check_feature_sets
from softvq_hf.metrics.feature_sample import FeatureSample
from softvq_hf.metrics.features import FeatureExtractor


_DESCRIPTION = """
Squared maximum mean discrepancy between the features of two sets of images under the polynomial kernel (x.y / D +
1)^3, unbiased, averaged over random subsets. On the 2048 pooled Inception features it is the KID. Unlike the Fréchet
distance its expectation does not depend on the number of samples; a value below 0 means that the sets do not differ
measurably.
"""
_CITATION = """
@inproceedings{binkowski2018demystifying,
    title = {Demystifying {MMD} {GANs}},
    author = {Bi{\\'n}kowski, Miko{\\l}aj and Sutherland, Danica J. and Arbel, Michael and Gretton, Arthur},
    booktitle = {International Conference on Learning Representations},
    year = {2018},
    note = {arXiv:1801.01401}
}
"""
_INPUTS = """
Args:
    predictions: `(B, 3, H, W)` images (uint8, or floating point in [0, 1]), or `(B, D)` features without a
        `feature_extractor`.
    references: The same of the set to compare with. Their number may differ.
    indices: `(B,)` integers from 0 on, the number of each sample in the whole set, of predictions and references
        alike. Needed with several processes; without, samples are counted.
Returns:
    kernel_distance (`float`): Mean over the subsets; lower is better, around 0 for equal distributions.
    kernel_distance_std (`float`): Standard deviation over the subsets.
    num_predictions (`int`), num_references (`int`): Numbers of samples.
"""


def kernel_distance(
    predictions: torch.Tensor,
    references: torch.Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Kernel distance (Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, section 4) of two sets of features,
    by torch-fidelity in float64: a difference of means that is far smaller than they are.

    Only the features of one subset at a time are copied to float64, on the CPU.

    Args:
        predictions (`torch.Tensor` of shape `(N, D)`): Features of generated images, floating point.
        references (`torch.Tensor` of shape `(M, D)`): Those of the images to compare with.
        num_subsets (`int`, *optional*, defaults to 100): Random subsets whose distances are averaged, from 1 on.
        subset_size (`int`, *optional*, defaults to 1000): Samples in a subset of either set, from 2 on.
        seed (`int`, *optional*, defaults to 0): Chooses the subsets, from 0 to 2 ** 32 - 1.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the subsets.

    Raises:
        ValueError: If a number is out of range, a set has fewer samples than a subset, the shapes do not fit, or the
            features are so large that the distance is not finite.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    check_subsets(num_subsets, subset_size)
    check_feature_sets(predictions, references, subset_size, f"`subset_size` {subset_size}")
    generator = np.random.RandomState(seed)
    distances = []
    for _ in range(num_subsets):
        subsets = [
            features[torch.from_numpy(generator.choice(len(features), subset_size, replace=False))].double()
            for features in (predictions.cpu(), references.cpu())
        ]
        distance = kid_features_to_metric(*subsets, kid_subsets=1, kid_subset_size=subset_size, verbose=False)
        distances.append(distance[KEY_METRIC_KID_MEAN])
    mean, spread = float(np.mean(distances)), float(np.std(distances))
    if not (math.isfinite(mean) and math.isfinite(spread)):
        raise ValueError(
            f"The kernel distance is {mean} with a standard deviation of {spread}: the features are too large, or not "
            "finite."
        )
    return mean, spread


def check_subsets(num_subsets: int, subset_size: int) -> None:
    """Raises a `ValueError` if a number of [`kernel_distance`] is out of range."""
    if not isinstance(num_subsets, int) or num_subsets < 1:
        raise ValueError(f"`num_subsets` is {num_subsets}, allowed: integers from 1 on.")
    if not isinstance(subset_size, int) or subset_size < 2:
        raise ValueError(f"`subset_size` is {subset_size}, allowed: integers from 2 on.")


class KernelDistance(SampledFeatureMetric):
    """
    Kernel distance between two sets of images; see [`kernel_distance`].

    Memory: up to `capacity` features of either side in float32, 410 MB each for 50 000 times the 2048 features of
    Inception, and as much again while it is computed.

    Args:
        feature_extractor ([`FeatureExtractor`] or `str`, *optional*):
            `"inception"` for KID; see [`FeatureMetric`]. Without it `predictions` and `references` are features.
        num_subsets (`int`, *optional*, defaults to 100): Random subsets whose distances are averaged, from 1 on.
        subset_size (`int`, *optional*, defaults to 1000): Samples in a subset, from 2 to `capacity`.
        capacity (`int`, *optional*, defaults to 50000): Number of features to keep of either side; see
            [`FeatureSample`].
        seed (`int`, *optional*, defaults to 0): Chooses the features that are kept and the subsets.
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractor | str | None = None,
        num_subsets: int = 100,
        subset_size: int = 1000,
        capacity: int = 50_000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_subsets(num_subsets, subset_size)
        self.num_subsets = num_subsets
        self.subset_size = subset_size
        super().__init__(feature_extractor, capacity, seed, **kwargs)
        if subset_size > capacity:
            raise ValueError(f"`subset_size` is {subset_size}, allowed: integers from 2 to `capacity`, {capacity}.")

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=FEATURES,
        )

    def measure(self, accumulators: dict[str, FeatureSample]) -> dict[str, Any]:
        distance, spread = kernel_distance(
            accumulators["predictions"].features(),
            accumulators["references"].features(),
            num_subsets=self.num_subsets,
            subset_size=self.subset_size,
            seed=self.seed,
        )
        return {
            "kernel_distance": distance,
            "kernel_distance_std": spread,
            "num_predictions": accumulators["predictions"].count,
            "num_references": accumulators["references"].count,
        }
