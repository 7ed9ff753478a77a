"""How the distribution of a model's images differs from that of real ones: all figures of one network together."""

from typing import Any

import torch
from accelerate import PartialState

from softvq_hf.evaluation.reference import Reference
from softvq_hf.metrics.features import FeatureExtractor
from softvq_hf.metrics.frechet_distance import FrechetDistance
from softvq_hf.metrics.inception_score import InceptionScore
from softvq_hf.metrics.kernel_distance import KernelDistance
from softvq_hf.metrics.precision_recall import PrecisionRecall


# What the figures are called: those of Inception have the names of the literature, which belong to no other network.
INCEPTION_NAMES = {
    "frechet_distance": "fid",
    "spatial_frechet_distance": "sfid",
    "classifier_score": "inception_score",
    "classifier_score_std": "inception_score_std",
    "kernel_distance": "kid",
    "kernel_distance_std": "kid_std",
}
OTHER_NAMES = {"frechet_distance": "fd", "spatial_frechet_distance": "spatial_fd"}


class DistributionMetrics:
    """
    Fréchet distance, its spatial form, Inception score, kernel distance, precision and recall by one network, which
    looks at every image once.

    Memory does not grow with the number of images. With the about 2048 features of Inception: 34 MB for each of up to
    four covariances, and for the kernel distance and for precision and recall up to `capacity` features each of
    either side, 1.6 GB in all at 50 000.

    Args:
        extractor ([`FeatureExtractor`]): The network.
        reference ([`Reference`], *optional*): What predictions are compared with; without it, `references` are added.
        num_splits (`int`, *optional*, defaults to 10): As in [`InceptionScore`].
        num_subsets (`int`, *optional*, defaults to 100): As in [`KernelDistance`].
        subset_size (`int`, *optional*, defaults to 1000): As in [`KernelDistance`].
        num_neighbors (`int`, *optional*, defaults to 3): As in [`PrecisionRecall`].
        capacity (`int`, *optional*, defaults to 50000): Features of either side that are kept for those two.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        reference: Reference | None = None,
        num_splits: int = 10,
        num_subsets: int = 100,
        subset_size: int = 1000,
        num_neighbors: int = 3,
        capacity: int = 50_000,
    ) -> None:
        self.extractor = extractor
        self.reference = reference
        self.frechet_distance = FrechetDistance(reference=None if reference is None else reference.statistics)
        self.spatial_frechet_distance = FrechetDistance(
            reference=None if reference is None else reference.spatial_statistics
        )
        self.inception_score = InceptionScore(num_splits=num_splits)
        self.kernel_distance = KernelDistance(num_subsets=num_subsets, subset_size=subset_size, capacity=capacity)
        self.precision_recall = PrecisionRecall(num_neighbors=num_neighbors, capacity=capacity)

    def add(
        self,
        *,
        predictions: torch.Tensor | None = None,
        references: torch.Tensor | None = None,
        indices: torch.Tensor,
    ) -> None:
        """
        Look at a batch of images.

        Args:
            predictions (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Images of the model, uint8.
            references (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Real images, uint8.
            indices (`torch.Tensor` of shape `(B,)`): Numbers of the images in their whole set, int64.

        Raises:
            ValueError: If `references` are given beside a `reference`, or images have another shape or dtype.
        """
        if references is not None and self.reference is not None:
            raise ValueError("`references` are given to metrics that have a `reference`, allowed: one of them.")
        if predictions is not None:
            found = self.extractor(predictions)
            self.frechet_distance.add_batch(predictions=found.features)
            self.kernel_distance.add_batch(predictions=found.features, indices=indices)
            self.precision_recall.add_batch(predictions=found.features, indices=indices)
            if found.spatial_features is not None:
                self.spatial_frechet_distance.add_batch(predictions=found.spatial_features)
            if found.logits is not None:
                self.inception_score.add_batch(predictions=found.logits, indices=indices)
        if references is not None:
            found = self.extractor(references)
            self.frechet_distance.add_batch(references=found.features)
            self.kernel_distance.add_batch(references=found.features, indices=indices)
            self.precision_recall.add_batch(references=found.features, indices=indices)
            if found.spatial_features is not None:
                self.spatial_frechet_distance.add_batch(references=found.spatial_features)

    def compute(self) -> dict[str, Any]:
        """
        The figures of all that was added. Collective; what was added is forgotten.

        Returns:
            `dict`: `label`, that of the network; `metrics`, with Inception `fid`, `sfid`, `inception_score`,
            `inception_score_std`, `kid`, `kid_std`, `precision` and `recall`, with any other network, whose figures
            are no FID, `fd`, `spatial_fd`, `classifier_score`, `kernel_distance` and so on, `None` for what cannot be
            had; `notes`, why it cannot be had, and what a reader should know; `num_predictions`; `num_references`,
            `None` where a reference does not say.

        Raises:
            ValueError: If there are fewer than two predictions, or references.
        """
        notes = []
        distance = self.frechet_distance.compute()
        num_predictions, num_references = distance["num_predictions"], distance["num_references"]
        figures: dict[str, float | None] = {"frechet_distance": distance["frechet_distance"]}
        most_features = max(self.extractor.num_features, self.extractor.num_spatial_features or 0)
        for images, count in (("predictions", num_predictions), ("references", num_references)):
            if count is not None and count <= most_features:
                notes.append(
                    f"{count} {images} for up to {most_features} features: a Fréchet distance over so few images is"
                    " far too high, and can only be compared with one over as many."
                )

        figures["spatial_frechet_distance"] = None
        if self.extractor.num_spatial_features is None:
            notes.append("No spatial Fréchet distance: the network has no feature maps.")
        elif self.reference is not None and self.reference.spatial_statistics is None:
            notes.append("No spatial Fréchet distance: the reference has no statistics of spatial features.")
        else:
            figures["spatial_frechet_distance"] = self.spatial_frechet_distance.compute()["frechet_distance"]

        figures |= {"classifier_score": None, "classifier_score_std": None}
        if self.extractor.num_classes is None:
            notes.append("No classifier score: the network gives no logits.")
        elif num_predictions < self.inception_score.num_splits:
            notes.append(
                f"No classifier score: {num_predictions} images are fewer than {self.inception_score.num_splits}"
                " splits."
            )
        else:
            score = self.inception_score.compute()
            figures["classifier_score"] = score["inception_score"]
            figures["classifier_score_std"] = score["inception_score_std"]

        figures |= {"kernel_distance": None, "kernel_distance_std": None, "precision": None, "recall": None}
        num_reference_features = num_references
        if self.reference is not None:
            num_reference_features = 0 if self.reference.features is None else len(self.reference.features)
        if num_reference_features == 0:
            notes.append("No kernel distance, precision and recall: the reference has statistics, but no features.")
            return self._result(figures, notes, num_predictions, num_references)
        if self.reference is not None and PartialState().is_main_process:
            indices = torch.arange(num_reference_features)
            self.kernel_distance.add_batch(references=self.reference.features, indices=indices)
            self.precision_recall.add_batch(references=self.reference.features, indices=indices)
        fewest = min(num_predictions, num_reference_features)
        if fewest < self.kernel_distance.subset_size:
            notes.append(
                f"No kernel distance: its subsets have {self.kernel_distance.subset_size} images, there are {fewest}."
            )
        else:
            distance = self.kernel_distance.compute()
            figures["kernel_distance"] = distance["kernel_distance"]
            figures["kernel_distance_std"] = distance["kernel_distance_std"]
        if fewest <= self.precision_recall.num_neighbors:
            notes.append(
                f"No precision and recall: {fewest} images have no neighbour number"
                f" {self.precision_recall.num_neighbors}."
            )
        else:
            shares = self.precision_recall.compute()
            figures |= {"precision": shares["precision"], "recall": shares["recall"]}
        return self._result(figures, notes, num_predictions, num_references)

    def _result(
        self, figures: dict[str, float | None], notes: list[str], num_predictions: int, num_references: int | None
    ) -> dict[str, Any]:
        label = self.extractor.label
        names = INCEPTION_NAMES if label == "Inception" else OTHER_NAMES
        return {
            "label": label,
            "metrics": {names.get(name, name): value for name, value in figures.items()},
            "notes": [f"{label}: {note}" for note in notes],
            "num_predictions": num_predictions,
            "num_references": num_references,
        }


def name_figures(results: list[dict[str, Any]], prefix: str) -> dict[str, float | None]:
    """
    Figures of several networks in one table.

    Args:
        results (`list[dict]`): From [`DistributionMetrics.compute`].
        prefix (`str`): What comes before "fid": "r" for reconstructions, "g" for generated images.

    Returns:
        `dict`: figures of Inception as they are called there, but `rfid` or `gfid`; others with the name of the
        network, such as "fd (tiny_classifier)".
    """
    table = {}
    for result in results:
        for name, value in result["metrics"].items():
            if result["label"] != "Inception":
                table[f"{name} ({result['label']})"] = value
            else:
                table[f"{prefix}fid" if name == "fid" else name] = value
    return table
