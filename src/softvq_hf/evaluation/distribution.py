"""How the distribution of a model's images differs from that of real ones: all figures of one network together."""

from typing import Any

import torch

from softvq_hf.evaluation.accelerator import merge_over_processes
from softvq_hf.evaluation.reference import Reference
from softvq_hf.metrics.feature_sample import FeatureSample
from softvq_hf.metrics.features import FeatureExtractor
from softvq_hf.metrics.frechet_distance import FrechetDistance
from softvq_hf.metrics.images import ImageRange
from softvq_hf.metrics.inception_score import InceptionScore
from softvq_hf.metrics.kernel_distance import kernel_distance
from softvq_hf.metrics.precision_recall import precision_recall


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

    Memory does not grow with the number of images. With the about 2048 features of Inception a process holds 34 MB for
    each of up to four covariances, and up to `capacity` features of either side: 0.8 GB for 50 000 of both. In
    [`~DistributionMetrics.compute`] every process has the features of all processes, up to three times: 2.5 GB there,
    and 0.4 GB of distances.

    Args:
        extractor ([`FeatureExtractor`]): The network.
        reference ([`Reference`], *optional*): What predictions are compared with; without it, `references` are added.
        has_references (`bool`, *optional*, defaults to `True`):
            Whether there are real images. Without, the Inception score, which compares with none, is all.
        num_splits (`int`, *optional*, defaults to 10): As in [`InceptionScore`].
        num_subsets (`int`, *optional*, defaults to 100): As in [`kernel_distance`].
        subset_size (`int`, *optional*, defaults to 1000): As in [`kernel_distance`].
        num_neighbors (`int`, *optional*, defaults to 3): As in [`precision_recall`].
        capacity (`int`, *optional*, defaults to 50000):
            Features of either side that these two look at, a uniform sample; see [`FeatureSample`].
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        reference: Reference | None = None,
        has_references: bool = True,
        num_splits: int = 10,
        num_subsets: int = 100,
        subset_size: int = 1000,
        num_neighbors: int = 3,
        capacity: int = 50_000,
    ) -> None:
        self.extractor = extractor
        self.reference = reference
        self.has_references = has_references
        self.num_splits = num_splits
        self.num_subsets = num_subsets
        self.subset_size = subset_size
        self.num_neighbors = num_neighbors
        self.capacity = capacity
        self._forget()

    def _forget(self) -> None:
        """Start from no image."""
        statistics = None if self.reference is None else self.reference.statistics
        spatial_statistics = None if self.reference is None else self.reference.spatial_statistics
        self.frechet_distance = FrechetDistance(reference=statistics)
        self.spatial_frechet_distance = FrechetDistance(reference=spatial_statistics)
        self.inception_score = InceptionScore(num_splits=self.num_splits)
        self.samples = {side: FeatureSample(self.capacity) for side in ("predictions", "references")}
        self.ranges = {side: ImageRange(side) for side in ("predictions", "references")}

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
        for side, images in (("predictions", predictions), ("references", references)):
            if images is None:
                continue
            found = self.extractor(images)
            self.ranges[side].update(images)
            if found.logits is not None and side == "predictions":
                self.inception_score.add_batch(predictions=found.logits.cpu(), indices=indices)
            if not self.has_references:
                continue
            features = found.features.cpu()
            self.frechet_distance.add_batch(**{side: features})
            self.samples[side].update(features, indices.numpy())
            if found.spatial_features is not None:
                self.spatial_frechet_distance.add_batch(**{side: found.spatial_features.cpu()})

    def compute(self) -> dict[str, Any]:
        """
        The figures of all that was added. Collective; what was added is forgotten.

        Returns:
            `dict`: `label`, that of the network; `metrics`, with Inception `fid`, `sfid`, `inception_score`,
            `inception_score_std`, `kid`, `kid_std`, `precision` and `recall`, with any other network, whose figures
            are no FID, `fd`, `spatial_fd`, `classifier_score`, `kernel_distance` and so on, `None` for what cannot be
            had (those of real images are not there if there are none); `notes`, why it cannot be had, and what a
            reader should know; `num_predictions`; `num_references`, `None` where a reference does not say.

        Raises:
            ValueError: If there are fewer than two predictions, or references, or no image of a side has a value above
                1.
        """
        ranges = {side: merge_over_processes(image_range) for side, image_range in self.ranges.items()}
        for image_range in ranges.values():
            image_range.check()
        if not self.has_references:
            num_predictions = ranges["predictions"].num_images
            figures, notes = self._classifier_score(num_predictions)
            self._forget()
            return self._result(figures, ["No real images: only the classifier score.", *notes], num_predictions, None)

        distance = self.frechet_distance.compute()
        num_predictions, num_references = distance["num_predictions"], distance["num_references"]
        counts = {"predictions": num_predictions, "references": num_references}
        figures: dict[str, float | None] = {"frechet_distance": distance["frechet_distance"]}
        notes = few_images_notes("Fréchet distance", self.extractor.num_features, counts)

        figures["spatial_frechet_distance"] = None
        if self.extractor.num_spatial_features is None:
            notes.append("No spatial Fréchet distance: the network has no feature maps.")
        elif self.reference is not None and self.reference.spatial_statistics is None:
            notes.append("No spatial Fréchet distance: the reference has no statistics of spatial features.")
        else:
            figures["spatial_frechet_distance"] = self.spatial_frechet_distance.compute()["frechet_distance"]
            notes += few_images_notes("spatial Fréchet distance", self.extractor.num_spatial_features, counts)

        score, score_notes = self._classifier_score(num_predictions)
        figures |= score
        notes += score_notes

        figures |= {"kernel_distance": None, "kernel_distance_std": None, "precision": None, "recall": None}
        if self.reference is not None and self.reference.features is None:
            notes.append("No kernel distance, precision and recall: the reference has statistics, but no features.")
            self._forget()
            return self._result(figures, notes, num_predictions, num_references)
        predictions = merge_over_processes(self.samples["predictions"]).features()
        if self.reference is None:
            references = merge_over_processes(self.samples["references"]).features()
        else:
            references = self.reference.features[: self.capacity]  # which are in random order
        fewest = min(len(predictions), len(references))
        if fewest < self.subset_size:
            notes.append(f"No kernel distance: its subsets have {self.subset_size} images, there are {fewest}.")
        else:
            figures["kernel_distance"], figures["kernel_distance_std"] = kernel_distance(
                predictions, references, num_subsets=self.num_subsets, subset_size=self.subset_size
            )
        if fewest <= self.num_neighbors:
            notes.append(f"No precision and recall: {fewest} images have no neighbour number {self.num_neighbors}.")
        else:
            figures["precision"], figures["recall"] = precision_recall(
                predictions, references, num_neighbors=self.num_neighbors
            )
        self._forget()
        return self._result(figures, notes, num_predictions, num_references)

    def _classifier_score(self, num_predictions: int) -> tuple[dict[str, float | None], list[str]]:
        """The Inception score by name, and why it cannot be had. Collective."""
        figures = {"classifier_score": None, "classifier_score_std": None}
        if self.extractor.num_classes is None:
            return figures, ["No classifier score: the network gives no logits."]
        if num_predictions < self.num_splits:
            return figures, [f"No classifier score: {num_predictions} images are fewer than {self.num_splits} splits."]
        score = self.inception_score.compute()
        figures["classifier_score"] = score["inception_score"]
        figures["classifier_score_std"] = score["inception_score_std"]
        return figures, []

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


def few_images_notes(figure: str, num_features: int, counts: dict[str, int | None]) -> list[str]:
    """
    What a reader of a distance between Gaussians should know, one note for each side.

    Args:
        figure (`str`): What it is called.
        num_features (`int`): Features that it is over.
        counts (`dict`): Images by the name of their side; `None` where it is not known.
    """
    return [
        f"{count} {images} for the {num_features} features of the {figure}: over so few images it is far too high, and"
        " can only be compared with one over as many."
        for images, count in counts.items()
        if count is not None and count <= num_features
    ]


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
