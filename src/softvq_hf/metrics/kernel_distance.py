"""Kernel distance between two sets of images or features: KID on Inception features."""

from typing import Any

import datasets
import evaluate
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from softvq_hf.metrics.feature_metric import SampledFeatureMetric
from softvq_hf.metrics.feature_sample import FeatureSample


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
        alike.
        Needed with several processes; without, samples are counted.
Returns:
    kernel_distance (`float`): Mean over the subsets; lower is better, around 0 for equal distributions.
    kernel_distance_std (`float`): Standard deviation over the subsets.
    num_predictions (`int`), num_references (`int`): Numbers of samples.
"""


class KernelDistance(SampledFeatureMetric):
    """
    Kernel distance (Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, section 4) by torch-fidelity, in
    float64.

    Memory: up to `capacity` features of either side in float32, 410 MB each for 50 000 times the 2048 features of
    Inception, and twice that of either side while it is computed.

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
        feature_extractor: Any = None,
        num_subsets: int = 100,
        subset_size: int = 1000,
        capacity: int = 50_000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(num_subsets, int) or num_subsets < 1:
            raise ValueError(f"`num_subsets` is {num_subsets}, allowed: integers from 1 on.")
        self.num_subsets = num_subsets
        self.subset_size = subset_size
        super().__init__(feature_extractor, capacity, seed, **kwargs)
        if not isinstance(subset_size, int) or not 2 <= subset_size <= capacity:
            raise ValueError(f"`subset_size` is {subset_size}, allowed: integers from 2 to `capacity`, {capacity}.")

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("float32")),
                    "indices": datasets.Value("int64"),
                }
            ),
        )

    def measure(self, accumulators: dict[str, FeatureSample]) -> dict[str, Any]:
        self.check_counts(accumulators, self.subset_size, f"`subset_size` {self.subset_size}")
        distances = kid_features_to_metric(
            accumulators["predictions"].features().double(),  # a difference of means that is far smaller than they are
            accumulators["references"].features().double(),
            kid_subsets=self.num_subsets,
            kid_subset_size=self.subset_size,
            rng_seed=self.seed,
            verbose=False,
        )
        return {
            "kernel_distance": distances[KEY_METRIC_KID_MEAN],
            "kernel_distance_std": distances[KEY_METRIC_KID_STD],
            "num_predictions": accumulators["predictions"].count,
            "num_references": accumulators["references"].count,
        }
