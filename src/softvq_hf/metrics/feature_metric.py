"""What the metrics of features share: features checked, or taken from images by a network."""

from abc import ABC, abstractmethod
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState

from softvq_hf.metrics.batches import check_batch, not_finite
from softvq_hf.metrics.feature_sample import FeatureSample
from softvq_hf.metrics.features import FeatureExtractor, load_feature_extractor
from softvq_hf.metrics.images import ImageRange, ImageSize, check_images
from softvq_hf.metrics.streaming import RESET, StreamingMetric


# What the metrics of two sets of features take, as `evaluate` describes it
FEATURES = datasets.Features(
    {
        "predictions": datasets.Sequence(datasets.Value("float32")),
        "references": datasets.Sequence(datasets.Value("float32")),
        "indices": datasets.Value("int64"),
    }
)


def check_features(features: Any, argument: str, num_features: int | None = None) -> torch.Tensor:
    """
    A batch of features as one tensor on the CPU.

    Args:
        features: `torch.Tensor` or `numpy.ndarray` of shape `(B, D)`, or a sequence of B of shape `(D,)`;
            floating point.
        argument (`str`): What the caller calls them, for the errors.
        num_features (`int`, *optional*): The `D` of earlier batches.

    Returns:
        `torch.Tensor` of shape `(B, D)`: dtype and numbers as they were.

    Raises:
        ValueError: If the shape or the type is another one, `D` has changed, or a value is not finite.
    """
    features = check_batch(features, argument, "(B, D)")
    if not features.dtype.is_floating_point:
        raise ValueError(
            f"`{argument}` has dtype {features.dtype}, allowed for features: floating point. For images give a"
            " `feature_extractor`."
        )
    if num_features is not None and features.shape[1] != num_features:
        raise ValueError(
            f"`{argument}` has {features.shape[1]} features per sample, allowed as with the others: {num_features}."
        )
    broken = not_finite(features)
    if broken:
        raise ValueError(f"`{argument}` holds values that are not finite (NaN or infinite), in the samples {broken}.")
    return features


def check_feature_sets(predictions: torch.Tensor, references: torch.Tensor, minimum: int, argument: str) -> None:
    """
    Raises a `ValueError` if either set of features has fewer than the `minimum` samples that `argument` asks for, or
    they are not of shape `(N, D)` and `(M, D)`.
    """
    for side, features in (("predictions", predictions), ("references", references)):
        if features.ndim != 2:
            raise ValueError(f"`{side}` has shape {tuple(features.shape)}, allowed: (number of samples, features).")
        if len(features) < minimum:
            raise ValueError(f"`{side}` has {len(features)} sample(s), allowed with {argument}: {minimum} or more.")
    if predictions.shape[1] != references.shape[1]:
        raise ValueError(
            f"`predictions` has {predictions.shape[1]} features per sample, allowed as in `references`:"
            f" {references.shape[1]}."
        )


class FeatureMetric(StreamingMetric, ABC):
    """
    A metric of features of images. `predictions` and `references` do not depend on each other: either may be missing
    from a batch, and their numbers may differ.

    A metric implements `_info`, [`~FeatureMetric.new_accumulator`], [`~FeatureMetric.accumulate`] and
    [`~FeatureMetric.measure`].

    Args:
        feature_extractor ([`FeatureExtractor`] or `str`, *optional*):
            Network whose features are compared, or its name for [`load_feature_extractor`]; `predictions` and
            `references` are images then, as in [`check_images`], and all of one size. Without it they are features
            already.
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: If `feature_extractor` is none of these.

    Attributes:
        layer (`str`): Which output of the extractor is compared: the name of a field of [`ImageFeatures`].
    """

    layer = "features"

    def __init__(self, feature_extractor: FeatureExtractor | str | None = None, **kwargs: Any) -> None:
        if isinstance(feature_extractor, str):
            feature_extractor = load_feature_extractor(feature_extractor)
        if feature_extractor is not None and not isinstance(feature_extractor, FeatureExtractor):
            raise ValueError(
                f"`feature_extractor` is of type {type(feature_extractor).__name__}, allowed: a FeatureExtractor, the "
                "name of one, or None for features."
            )
        self.feature_extractor = feature_extractor
        super().__init__(**kwargs)

    @abstractmethod
    def new_accumulator(self) -> Any:
        """An empty accumulator for one side; it has `num_features`, `None` before the first batch."""

    @abstractmethod
    def accumulate(self, features: dict[str, torch.Tensor], indices: Any) -> None:
        """Take in checked features `(B, D)` by the name of their side; all or, with an error, none of them."""

    @abstractmethod
    def measure(self, accumulators: dict[str, Any]) -> dict[str, Any]:
        """The metric by name, from the accumulators of both sides."""

    def num_features(self) -> int | None:
        """The `D` of earlier batches of either side, `None` before the first one."""
        return self.accumulators["predictions"].num_features or self.accumulators["references"].num_features

    def new_accumulators(self) -> dict[str, Any]:
        accumulators = {side: self.new_accumulator() for side in ("predictions", "references")}
        if self.feature_extractor is not None:
            accumulators |= {f"{side}_range": ImageRange(side) for side in ("predictions", "references")}
            accumulators["size"] = ImageSize()
        return accumulators

    def update(self, predictions: Any, references: Any, indices: Any = None) -> None:
        samples = {"predictions": predictions, "references": references}
        samples = {side: batch for side, batch in samples.items() if batch is not None}
        if not samples:
            raise ValueError("`predictions` and `references` are None, allowed: at least one of them.")
        features, ranges, num_features = {}, {}, self.num_features()
        size = ImageSize()
        if self.feature_extractor is not None:
            size.merge(self.accumulators["size"])
        for side, batch in samples.items():
            if self.feature_extractor is not None:
                images = check_images(batch, side)
                size.update(images, side)
                ranges[side] = ImageRange(side)
                ranges[side].update(images)
                batch = self.extract(images)
            features[side] = check_features(batch, side, num_features)
            num_features = features[side].shape[1]
        self.accumulate(features, indices)
        for side, image_range in ranges.items():
            self.accumulators[f"{side}_range"].merge(image_range)
            self.accumulators["size"].merge(size)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """
        Features `(B, D)` of checked images.

        Raises:
            ValueError: If the extractor does not have the output that is asked for.
        """
        features = getattr(self.feature_extractor(images), self.layer)
        if features is None:
            raise ValueError(
                f"`feature_extractor` {self.feature_extractor.label} has no {self.layer}, which are needed."
            )
        return features

    def result(self, accumulators: dict[str, Any]) -> dict[str, Any]:
        if self.feature_extractor is not None:
            accumulators["predictions_range"].check(RESET)
            accumulators["references_range"].check(RESET)
        return self.measure(accumulators)


class SampledFeatureMetric(FeatureMetric, ABC):
    """
    A metric of the features themselves, of which it keeps a uniform sample of either side.

    Args:
        feature_extractor ([`FeatureExtractor`] or `str`, *optional*): As in [`FeatureMetric`].
        capacity (`int`): Number of features to keep of either side, as in [`FeatureSample`].
        seed (`int`): Chooses the sample, as in [`FeatureSample`].
        kwargs: As in [`StreamingMetric`].
    """

    def __init__(
        self, feature_extractor: FeatureExtractor | str | None, capacity: int, seed: int, **kwargs: Any
    ) -> None:
        self.capacity = capacity
        super().__init__(feature_extractor, seed=seed, **kwargs)

    def new_accumulator(self) -> FeatureSample:
        return FeatureSample(self.capacity, self.seed)

    def accumulate(self, features: dict[str, torch.Tensor], indices: Any) -> None:
        numbers = {
            side: sample_indices(indices, side, len(batch), self.accumulators[side].count)
            for side, batch in features.items()
        }
        for side, batch in features.items():
            self.accumulators[side].update(batch, numbers[side])


def sample_indices(indices: Any, argument: str, num_samples: int, num_earlier: int) -> np.ndarray:
    """
    The number of each sample of a batch in the whole set, for metrics that choose samples or put them into groups.

    Args:
        indices: `(B,)` integers from 0 on, or `None` for the next ones after the earlier samples.
        argument (`str`): What the caller calls the samples, for the errors.
        num_samples (`int`): B.
        num_earlier (`int`): Samples that this process has already added.

    Returns:
        `numpy.ndarray` of shape `(B,)`: int64.

    Raises:
        ValueError: If there are no indices with several processes, whose samples would get the same ones, or the
            indices are no integers, negative, or not one for each sample.
    """
    if indices is None:
        # without `cpu` accelerate takes each of several CPU processes for the only one
        if PartialState(cpu=not torch.accelerator.is_available()).num_processes > 1:
            raise ValueError(
                "`indices` is None, allowed with several processes: the number of each sample in the whole set, so"
                " that the result does not depend on which process has it."
            )
        return np.arange(num_earlier, num_earlier + num_samples)
    try:
        indices = np.asarray(indices.detach().cpu() if isinstance(indices, torch.Tensor) else indices)
    except (TypeError, ValueError) as error:  # numpy has no bfloat16, and no rows of different lengths
        raise ValueError(f"`indices` cannot be read as numbers ({error}), allowed: integers from 0 on.") from error
    if indices.shape != (num_samples,):
        raise ValueError(
            f"`indices` has shape {indices.shape}, allowed with {num_samples} `{argument}`: ({num_samples},)."
        )
    if not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"`indices` has dtype {indices.dtype}, allowed: integers from 0 on.")
    if indices.min() < 0 or indices.max() >= 2**63:
        raise ValueError(f"`indices` holds {indices.min()} to {indices.max()}, allowed: 0 to 2 ** 63 - 1.")
    return indices.astype(np.int64)
