"""Precision and recall of generated images."""

from typing import Any

import datasets
import evaluate
from accelerate import PartialState
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from softvq_hf.metrics.feature_metric import SampledFeatureMetric
from softvq_hf.metrics.feature_sample import FeatureSample


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
        alike.
        Needed with several processes; without, samples are counted.
Returns:
    precision (`float`), recall (`float`): In [0, 1]; higher is better.
    num_predictions (`int`), num_references (`int`): Numbers of samples.
"""


class PrecisionRecall(SampledFeatureMetric):
    """
    Precision and recall (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
    arXiv 1904.06991, equations 1 and 2) by torch-fidelity, on the device of the process.

    The paper takes VGG16 features; the evaluation suite of ADM, which the published numbers of this field come from,
    the pooled Inception features.

    Memory: up to `capacity` features of either side in float32, 410 MB each for 50 000 times the 2048 features of
    Inception; while it is computed two distance matrices of 1000 times `capacity`, 400 MB. Time grows with
    `capacity ** 2 * D`: 40 TFLOP there, seconds on an accelerator, a quarter of an hour and more on a few CPU cores.

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
        feature_extractor: Any = None,
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
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("float32")),
                    "indices": datasets.Value("int64"),
                }
            ),
        )

    def measure(self, accumulators: dict[str, FeatureSample]) -> dict[str, Any]:
        self.check_counts(accumulators, self.num_neighbors + 1, f"`num_neighbors` {self.num_neighbors}")
        predictions, references = accumulators["predictions"].features(), accumulators["references"].features()
        # Distances are differences of large products: without the common mean they keep more of their digits.
        mean = references.mean(0, dtype=references.double().dtype)
        device = PartialState().device
        shares = prc_features_to_metric(
            (predictions - mean).float().to(device),
            (references - mean).float().to(device),
            prc_neighborhood=self.num_neighbors,
            prc_batch_size=1000,
            save_cpu_ram=True,
            verbose=False,
        )
        return {
            "precision": shares[KEY_METRIC_PRECISION],
            "recall": shares[KEY_METRIC_RECALL],
            "num_predictions": accumulators["predictions"].count,
            "num_references": accumulators["references"].count,
        }
