"""Inception score of generated images."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from softvq_hf.metrics.feature_metric import FeatureMetric, sample_indices
from softvq_hf.metrics.features import FeatureExtractor


_DESCRIPTION = """
Inception score: exponential of the mean Kullback-Leibler divergence between the class probabilities that a classifier
gives to each image and their mean over the images; from 1 (all images look alike to it) to its number of classes. It
sees no reference: it says how surely and how evenly a classifier sees its classes, nothing about likeness to real
images.
"""
_CITATION = """
@inproceedings{salimans2016improved,
    title = {Improved Techniques for Training {GANs}},
    author = {Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and
        Chen, Xi},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2016},
    note = {arXiv:1606.03498}
}
"""
_INPUTS = """
Args:
    predictions: `(B, 3, H, W)` images (uint8, or floating point in [0, 1]), or `(B, K)` logits, before softmax,
        without a `feature_extractor`.
    indices: `(B,)` integers from 0 on, the number of each sample in the whole set. Needed with several processes;
        without, samples are counted.
Returns:
    inception_score (`float`): Mean over the splits; higher is better.
    inception_score_std (`float`): Standard deviation over the splits.
    num_predictions (`int`): Number of samples.
"""


class ProbabilitySums:
    """
    Sums over the samples of each split, in float64: of the class probabilities p, and of their sums of p log p.
    Memory: `num_splits * (K + 2) * 8` bytes, 81 kB for 10 splits of 1008 classes.
    """

    def __init__(self, num_splits: int) -> None:
        self.counts = torch.zeros(num_splits, dtype=torch.int64)
        self.negative_entropies = torch.zeros(num_splits, dtype=torch.float64)
        self.probabilities: torch.Tensor | None = None  # (num_splits, K)

    @property
    def num_features(self) -> int | None:
        """`K`, the number of classes, or `None` before the first batch."""
        return None if self.probabilities is None else self.probabilities.shape[1]

    def update(self, logits: torch.Tensor, splits: torch.Tensor) -> None:
        """Take in `(B, K)` logits and the `(B,)` int64 splits they belong to."""
        log_probabilities = logits.double().log_softmax(1)
        probabilities = log_probabilities.exp()
        if self.probabilities is None:
            self.probabilities = torch.zeros(len(self.counts), logits.shape[1], dtype=torch.float64)
        self.probabilities.index_add_(0, splits, probabilities)
        self.negative_entropies.index_add_(0, splits, (probabilities * log_probabilities).sum(1))
        self.counts += splits.bincount(minlength=len(self.counts))

    def merge(self, other: "ProbabilitySums") -> None:
        """Take in what another process has accumulated."""
        if other.probabilities is None:
            return
        if self.probabilities is None:
            self.probabilities = torch.zeros_like(other.probabilities)
        self.counts += other.counts
        self.negative_entropies += other.negative_entropies
        self.probabilities += other.probabilities


class InceptionScore(FeatureMetric):
    """
    Inception score (Salimans et al., "Improved Techniques for Training GANs", arXiv 1606.03498, section 4) of
    generated images.

    Sample i belongs to the split `i % num_splits`, so that images sorted by class do no harm; other implementations
    cut a shuffled or unshuffled list into pieces. Where indices have gaps, a split may stay empty: it is left out of
    mean and standard deviation. The mean over the splits depends on their size: the published numbers are over 50 000
    images in 10 splits.

    Args:
        feature_extractor ([`FeatureExtractor`] or `str`, *optional*):
            Classifier; `"inception"` for the published protocol. See [`FeatureMetric`]. Without it `predictions` are
            logits.
        num_splits (`int`, *optional*, defaults to 10): Groups whose scores are averaged, from 1 to the number of
            samples.
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: If `num_splits` is below 1; on adding, if `predictions` look like probabilities or there are
            references; on computing, if there are fewer samples than that.
    """

    layer = "logits"

    def __init__(
        self, feature_extractor: FeatureExtractor | str | None = None, num_splits: int = 10, **kwargs: Any
    ) -> None:
        if not isinstance(num_splits, int) or num_splits < 1:
            raise ValueError(f"`num_splits` is {num_splits}, allowed: integers from 1 on.")
        self.num_splits = num_splits
        super().__init__(feature_extractor, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "indices": datasets.Value("int64")}
            ),
        )

    def new_accumulator(self) -> ProbabilitySums:
        return ProbabilitySums(self.num_splits)

    def accumulate(self, features: dict[str, torch.Tensor], indices: Any) -> None:
        if "references" in features:
            raise ValueError("`references` were given, allowed: none. The Inception score compares with nothing.")
        logits = features["predictions"]
        if logits.shape[1] < 2:
            raise ValueError("`predictions` has 1 class, allowed: logits of 2 or more.")
        tolerance = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-5
        if logits.min() >= 0 and (logits.double().sum(1) - 1).abs().max() < tolerance:
            raise ValueError(
                "`predictions` looks like probabilities (each row sums to 1), allowed: logits, before softmax."
            )
        sums = self.accumulators["predictions"]
        indices = sample_indices(indices, "predictions", len(logits), int(sums.counts.sum()))
        sums.update(logits, torch.from_numpy(indices % self.num_splits))

    def measure(self, accumulators: dict[str, ProbabilitySums]) -> dict[str, Any]:
        sums = accumulators["predictions"]
        num_predictions = int(sums.counts.sum())
        if num_predictions < self.num_splits:
            raise ValueError(
                f"`num_splits` is {self.num_splits}, allowed with {num_predictions} sample(s): at most as many."
            )
        filled = sums.counts > 0
        counts = sums.counts[filled]
        means = sums.probabilities[filled] / counts[:, None]
        divergences = sums.negative_entropies[filled] / counts + torch.special.entr(means).sum(1)
        scores = divergences.exp().numpy()
        if not np.isfinite(scores).all():
            raise ValueError("The Inception score is not finite: `predictions` are too large for float64.")
        return {
            "inception_score": float(np.mean(scores)),
            "inception_score_std": float(np.std(scores)),
            "num_predictions": num_predictions,
        }
