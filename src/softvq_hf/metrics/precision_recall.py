"""Precision and recall of generated images."""

from typing import Any

import evaluate
import numpy as np
import torch
from accelerate import PartialState

from softvq_hf.metrics.feature_metric import FEATURES, SampledFeatureMetric, check_feature_sets
from softvq_hf.metrics.feature_sample import FeatureSample
from softvq_hf.metrics.features import FeatureExtractor
from softvq_hf.metrics.precision import full_float32


_DESCRIPTION = """
Precision: the share of generated images whose features lie among those of the real ones, that is not farther from at
least one of them than its k-th neighbour. Recall: the share of real images that lie among the generated ones. They
separate quality from coverage, and depend on the number of samples: take as many of either, as a rule 10 000 to 50
000.
"""
_CITATION = """
@inproceedings{kynkaanniemi2019improved,
    title = {Improved Precision and Recall Metric for Assessing Generative Models},
    author = {Kynk{\\"a}{\\"a}nniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2019},
    note = {arXiv:1904.06991}
}
"""
_INPUTS = """
Args:
    predictions: Generated `(B, 3, H, W)` images (uint8, or floating point in [0, 1]), or `(B, D)` features without a
        `feature_extractor`.
    references: The same of real images. Their number may differ.
    indices: `(B,)` integers from 0 on, the number of each sample in the whole set, of predictions and references
        alike. Needed with several processes; without, samples are counted.
Returns:
    precision (`float`), recall (`float`): In [0, 1]; higher is better.
    num_predictions (`int`), num_references (`int`): Numbers of samples.
"""


def precision_recall(
    predictions: torch.Tensor, references: torch.Tensor, *, num_neighbors: int = 3
) -> tuple[float, float]:
    """
    Precision and recall (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
    arXiv 1904.06991, equations 1 and 2) of features, by torch-fidelity, on the device of the process.

    Features in float32 or less are compared in float32, those in float64 in float64 (with Apple's devices, which have
    none, on the CPU).

    Memory on that device: a centred copy of all features in float32, 820 MB for 50 000 times the 2048 features of
    Inception on either side. On the CPU as much as five distance matrices of 1000 times the number of samples while
    neighbours are sorted, 1 GB there. Time grows with `(N + M) ** 2 * D`: 40 TFLOP there.

    Args:
        predictions (`torch.Tensor` of shape `(N, D)`): Features of generated images, floating point.
        references (`torch.Tensor` of shape `(M, D)`): Those of real images.
        num_neighbors (`int`, *optional*, defaults to 3): Which neighbour's distance is the radius, from 1 on.

    Returns:
        `tuple[float, float]`: precision and recall, in [0, 1].

    Raises:
        ValueError: If `num_neighbors` is out of range, a set has no more samples than that, the shapes do not fit, or
            the features are so large that their distances are not finite.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if not isinstance(num_neighbors, int) or num_neighbors < 1:
        raise ValueError(f"`num_neighbors` is {num_neighbors}, allowed: integers from 1 on.")
    check_feature_sets(predictions, references, num_neighbors + 1, f"`num_neighbors` {num_neighbors}")
    dtype = torch.promote_types(torch.promote_types(predictions.dtype, references.dtype), torch.float32)
    predictions, references = predictions.to("cpu", dtype), references.to("cpu", dtype)
    # Distances are differences of large products: without the common mean they keep more of their digits. Unlike
    # numpy, torch would copy all features to float64 for it.
    mean = torch.from_numpy(references.numpy().mean(0, dtype=np.float64)).to(dtype)
    predictions, references = predictions - mean, references - mean
    for side, features in (("predictions", predictions), ("references", references)):
        largest = torch.linalg.vector_norm(features, dim=1).max().item()
        # no distance is above twice the larger norm, and its square is computed
        if not 4 * largest * largest <= torch.finfo(dtype).max:
            raise ValueError(
                f"`{side}` has features at a distance of {largest:.4g} from the mean of `references`, too large for "
                f"distances in {dtype}, or not finite."
            )
    device = PartialState().device
    if device.type == "mps" and dtype == torch.float64:
        device = torch.device("cpu")
    with full_float32(device.type):
        shares = prc_features_to_metric(
            predictions.to(device),
            references.to(device),
            prc_neighborhood=num_neighbors,
            prc_batch_size=1000,
            save_cpu_ram=True,
            verbose=False,
        )
    return shares[KEY_METRIC_PRECISION], shares[KEY_METRIC_RECALL]


class PrecisionRecall(SampledFeatureMetric):
    """
    Precision and recall of generated images; see [`precision_recall`].

    The paper takes VGG16 features; the evaluation suite of ADM, which the published numbers of this field come from,
    the pooled Inception features.

    Memory: up to `capacity` features of either side in float32, 410 MB each for 50 000 times the 2048 features of
    Inception. While it is computed as much again, and what [`precision_recall`] takes.

    Args:
        feature_extractor ([`FeatureExtractor`] or `str`, *optional*):
            See [`FeatureMetric`]. Without it `predictions` and `references` are features.
        num_neighbors (`int`, *optional*, defaults to 3): Which neighbour's distance is the radius, from 1 on.
        capacity (`int`, *optional*, defaults to 50000): Number of features to keep of either side; see
            [`FeatureSample`].
        seed (`int`, *optional*, defaults to 0): Chooses the features that are kept.
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractor | str | None = None,
        num_neighbors: int = 3,
        capacity: int = 50_000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.num_neighbors = num_neighbors
        super().__init__(feature_extractor, capacity, seed, **kwargs)
        if not isinstance(num_neighbors, int) or not 1 <= num_neighbors < capacity:
            raise ValueError(
                f"`num_neighbors` is {num_neighbors}, allowed: integers from 1 to below `capacity`, {capacity}."
            )

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=FEATURES,
        )

    def measure(self, accumulators: dict[str, FeatureSample]) -> dict[str, Any]:
        precision, recall = precision_recall(
            accumulators["predictions"].features(),
            accumulators["references"].features(),
            num_neighbors=self.num_neighbors,
        )
        return {
            "precision": precision,
            "recall": recall,
            "num_predictions": accumulators["predictions"].count,
            "num_references": accumulators["references"].count,
        }
