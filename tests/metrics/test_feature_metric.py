"""What all metrics of features do alike: input, errors, images through an extractor, memory, repetition."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from softvq_hf.metrics.features import FeatureExtractor, ImageFeatures
from softvq_hf.metrics.frechet_distance import FrechetDistance
from softvq_hf.metrics.inception_score import InceptionScore
from softvq_hf.metrics.kernel_distance import KernelDistance
from softvq_hf.metrics.precision_recall import PrecisionRecall


class TinyFeatureExtractor(FeatureExtractor):
    """Linear features of images of 4 x 4 pixels, at random; and no logits if there shall be none."""

    label = "tiny"
    num_features = 6
    num_spatial_features = 5

    def __init__(self, num_classes: int | None = 7) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.linear = nn.Linear(3 * 4 * 4, 6 + 5 + (num_classes or 0))

    def description(self) -> dict[str, str]:
        return {"name": "tiny"}

    def extract(self, images: torch.Tensor) -> ImageFeatures:
        features, spatial, logits = self.linear(images.flatten(1) / 255).tensor_split([6, 11], dim=1)
        return ImageFeatures(features, spatial, logits if self.num_classes else None)


METRICS = {
    "frechet_distance": lambda **options: FrechetDistance(**options),
    "inception_score": lambda **options: InceptionScore(num_splits=3, **options),
    "kernel_distance": lambda **options: KernelDistance(num_subsets=5, subset_size=20, capacity=60, **options),
    "precision_recall": lambda **options: PrecisionRecall(capacity=60, **options),
}


TWO_SIDED = ["frechet_distance", "kernel_distance", "precision_recall"]


@pytest.fixture(params=METRICS)
def metric_name(request):
    return request.param


@pytest.fixture
def features():
    return torch.randn(90, 6), torch.randn(90, 6) + 0.5


def sides(name, predictions, references) -> dict:
    """The Inception score takes predictions only."""
    both = {"predictions": predictions, "references": references}
    return both if name in TWO_SIDED else {"predictions": predictions}


def add_in_batches(metric, name, predictions, references, batch_size, order):
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        metric.add_batch(**sides(name, predictions[chosen], references[chosen]), indices=chosen)
    return metric.compute()


def test_two_runs_are_equal(metric_name, features):
    first, second = (METRICS[metric_name]().compute(**sides(metric_name, *features)) for _ in range(2))
    assert first == second
    assert all(type(value) in (float, int) for value in first.values())
    assert first["num_predictions"] == 90


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_batch_size_and_order_do_not_matter(metric_name, features, batch_size):
    expected = METRICS[metric_name]().compute(**sides(metric_name, *features))
    order = torch.randperm(90)
    result = add_in_batches(METRICS[metric_name](), metric_name, *features, batch_size, order)
    assert result == pytest.approx(expected, rel=1e-10)
    if metric_name in ("kernel_distance", "precision_recall"):
        assert result == expected  # of exactly the same sample


def test_without_indices_samples_are_counted(metric_name, features):
    expected = METRICS[metric_name]().compute(**sides(metric_name, *features), indices=range(90))
    metric = METRICS[metric_name]()
    for start in range(0, 90, 32):
        metric.add_batch(**sides(metric_name, *(side[start : start + 32] for side in features)))
    assert metric.compute() == pytest.approx(expected, rel=1e-10)


def test_one_sample_at_a_time(metric_name, features):
    metric = METRICS[metric_name]()
    for i, (prediction, reference) in enumerate(zip(*features, strict=True)):
        both = {"prediction": prediction, "reference": reference}
        metric.add(**(both if metric_name in TWO_SIDED else {"prediction": prediction}), indices=i)
    expected = METRICS[metric_name]().compute(**sides(metric_name, *features))
    assert metric.compute() == pytest.approx(expected, rel=1e-10)


def test_merged_processes_equal_one(metric_name, features):
    expected = METRICS[metric_name]().compute(**sides(metric_name, *features))
    processes = [METRICS[metric_name]() for _ in range(3)]
    for process, chosen in zip(processes, (torch.arange(0, 70), torch.arange(70, 90)), strict=False):
        process.add_batch(**sides(metric_name, *(side[chosen] for side in features)), indices=chosen)
    merged = processes[0].new_accumulators()
    for process in processes[::-1]:  # the first to merge has no sample
        for name, accumulator in pickle.loads(pickle.dumps(process.accumulators)).items():
            merged[name].merge(accumulator)
    assert processes[0].result(merged) == pytest.approx(expected, rel=1e-10)


def test_memory_does_not_grow(metric_name):
    sizes = []
    for count in (100, 10_000):
        metric = METRICS[metric_name]()
        for batch in torch.randn(count, 6).split(500):
            metric.add_batch(**sides(metric_name, batch, batch))
        sizes.append(len(pickle.dumps(metric.accumulators)))
    assert abs(sizes[1] - sizes[0]) < 64


@pytest.mark.parametrize(
    "make", [np.asarray, list, lambda features: features.double(), lambda features: features.bfloat16()]
)
def test_kinds_of_features(metric_name, make):
    predictions, references = torch.randn(2, 90, 6).bfloat16().float()
    expected = METRICS[metric_name]().compute(**sides(metric_name, predictions, references))
    result = METRICS[metric_name]().compute(**sides(metric_name, make(predictions), make(references)))
    assert result == pytest.approx(expected, rel=1e-6)


def test_images_give_what_their_features_give(metric_name):
    extractor = TinyFeatureExtractor()
    predictions, references = torch.randint(0, 256, (2, 90, 3, 4, 4), dtype=torch.uint8)
    layer = "logits" if metric_name == "inception_score" else "features"
    extracted = [getattr(extractor(images), layer) for images in (predictions, references)]
    expected = METRICS[metric_name]().compute(**sides(metric_name, *extracted))
    metric = METRICS[metric_name](feature_extractor=extractor)
    assert metric.compute(**sides(metric_name, predictions, references)) == expected
    as_floats = metric.compute(**sides(metric_name, predictions / 255, references.permute(0, 2, 3, 1).numpy()))
    assert as_floats == expected


def test_images_that_are_none_are_refused(metric_name):
    metric = METRICS[metric_name](feature_extractor=TinyFeatureExtractor())
    with pytest.raises(ValueError, match="`predictions` holds values from .* pass them as uint8"):
        metric.add_batch(predictions=torch.full((2, 3, 4, 4), 200.0))
    with pytest.raises(ValueError, match="`predictions` holds values that are not finite"):
        metric.add_batch(predictions=torch.full((2, 3, 4, 4), float("nan")))


def test_images_of_another_range_are_refused_at_the_end(metric_name):
    """One of them may be black; if all are, they were cast without a factor of 255."""
    metric = METRICS[metric_name](feature_extractor=TinyFeatureExtractor())
    images = torch.rand(90, 3, 4, 4)
    metric.add_batch(**sides(metric_name, images.round().byte(), images.round().byte()))
    with pytest.raises(ValueError, match="`predictions` holds no value above 1 in any of 90 8-bit images.*`reset()"):
        metric.compute()
    metric.add_batch(**sides(metric_name, images[:1], images[:1]), indices=[90])
    assert metric.compute()["num_predictions"] == 91


def test_a_batch_that_compute_refuses_is_taken_back(metric_name, features):
    metric, expected = METRICS[metric_name](), METRICS[metric_name]()
    for each in (metric, expected):
        each.add_batch(**sides(metric_name, *(side[:1] for side in features)))
    with pytest.raises(ValueError):  # too few, or too large
        metric.compute(**sides(metric_name, *(1e200 * side[:1].double() for side in features)))
    expected.add_batch(**sides(metric_name, *(side[1:] for side in features)))
    result = metric.compute(**sides(metric_name, *(side[1:] for side in features)))
    assert result == pytest.approx(expected.compute(), rel=1e-10)
    metric.add_batch(**sides(metric_name, *features))
    metric.reset()
    with pytest.raises(ValueError):
        metric.compute()


class MeanColour(FeatureExtractor):
    """Features of images of any size: 3, and as many logits."""

    label = "mean"
    num_features = num_classes = 3
    num_spatial_features = None

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def description(self) -> dict[str, str]:
        return {"name": "mean"}

    def extract(self, images: torch.Tensor) -> ImageFeatures:
        means = images.float().mean((2, 3)) * self.scale
        return ImageFeatures(means, logits=means)


def test_images_of_another_size_are_refused(metric_name):
    """Between batches, between processes, and between the sides."""
    images, larger = (torch.randint(0, 256, (90, 3, *size), dtype=torch.uint8) for size in ((4, 4), (6, 8)))
    expected = METRICS[metric_name](feature_extractor=MeanColour()).compute(**sides(metric_name, images, images))
    metric, other = (METRICS[metric_name](feature_extractor=MeanColour()) for _ in range(2))
    metric.add_batch(**sides(metric_name, images, images), indices=range(90))
    with pytest.raises(ValueError, match="`predictions` has images of 6 x 8 pixels .*allowed as with the others: 4 x"):
        metric.add_batch(**sides(metric_name, larger, larger), indices=range(90, 180))
    if metric_name in TWO_SIDED:
        with pytest.raises(ValueError, match="`references` has images of 6 x 8 pixels .*as with the others: 4 x 4"):
            other.add_batch(predictions=images, references=larger)
    assert other.num_features() is None  # nothing of it was taken in
    other.add_batch(predictions=larger, indices=range(90, 180))
    with pytest.raises(ValueError, match="Another process has images of 6 x 8 pixels"):
        pickle.loads(pickle.dumps(metric.accumulators["size"])).merge(other.accumulators["size"])
    assert metric.compute() == expected


@pytest.mark.parametrize("extractor", [nn.Linear(2, 2), 3, ["inception"], torch.randn(4, 6)])
def test_what_is_no_feature_extractor_is_refused(metric_name, extractor):
    with pytest.raises(ValueError, match=f"`feature_extractor` is of type {type(extractor).__name__}, allowed"):
        METRICS[metric_name](feature_extractor=extractor)


def test_unknown_feature_extractor_is_refused(metric_name):
    with pytest.raises(OSError, match="no-such-folder"):
        METRICS[metric_name](feature_extractor="./no-such-folder")


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (torch.zeros(4, 6, dtype=torch.uint8), "`predictions` has dtype torch.uint8.*give a `feature_extractor`"),
        (torch.zeros(4, 3, 8, 8), r"`predictions` has shape \(4, 3, 8, 8\)"),
        (torch.zeros(4), r"`predictions` has shape \(4,\)"),
        (torch.zeros(0, 6), r"`predictions` has shape \(0, 6\)"),
        ([], "`predictions` holds no sample"),
        ([torch.zeros(3), torch.zeros(4)], r"shapes \[\(3,\), \(4,\)\]"),
        ("features.npz", "`predictions`"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [0.0, float("inf")]]), r"not finite.*samples \[1, 2\]"),
    ],
)
def test_features_that_are_none_are_refused(metric_name, predictions, message):
    with pytest.raises(ValueError, match=message):
        METRICS[metric_name]().add_batch(predictions=predictions)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.arange(5), r"`indices` has shape \(5,\), allowed with 90 `predictions`: \(90,\)"),
        (-torch.arange(90), "`indices` holds -89"),
        (torch.arange(90) / 2, "has dtype float32, allowed: integers"),
        (torch.arange(90).bfloat16(), "`indices` cannot be read as numbers"),
        ([str(i) for i in range(90)], "has dtype <U2, allowed: integers"),
        ([2**70] * 90, "has dtype object, allowed: integers"),
        ([True] * 90, "has dtype bool, allowed: integers"),
        (np.full(90, 2**63, np.uint64), r"`indices` holds .*, allowed: 0 to 2 \*\* 63 - 1"),
        ([[0, 1], [0]], "`indices` cannot be read as numbers"),
    ],
)
@pytest.mark.parametrize("name", ["inception_score", "kernel_distance", "precision_recall"])
def test_bad_indices_are_refused(name, features, indices, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name]().add_batch(**sides(name, *features), indices=indices)


@pytest.mark.parametrize("make", [list, lambda indices: indices.astype(np.uint16), lambda i: i.astype(">i4")])
@pytest.mark.parametrize("name", ["inception_score", "kernel_distance", "precision_recall"])
def test_indices_of_any_integers(name, features, make):
    indices = np.arange(90)[::-1]
    expected = METRICS[name]().compute(**sides(name, *features), indices=indices)
    assert METRICS[name]().compute(**sides(name, *features), indices=make(indices)) == expected


@pytest.mark.parametrize("offset", [0.0, 1e9])
@pytest.mark.parametrize("metric_name", TWO_SIDED)
def test_float64_features_keep_their_differences(metric_name, features, offset):
    """Beside an offset of 1e9 float32 has steps of 64."""
    predictions, references = (side.double() for side in features)
    expected = METRICS[metric_name]().compute(predictions=predictions, references=references)
    metric = METRICS[metric_name]()
    if metric_name == "kernel_distance":  # the kernel grows with the offset: compare with its definition in float64
        result = metric.compute(predictions=predictions + offset, references=references)
        float32 = metric.compute(predictions=(predictions + offset).float(), references=references)
        assert offset == 0 or result["kernel_distance"] != float32["kernel_distance"]
    else:
        result = metric.compute(predictions=predictions + offset, references=references + offset)
        assert result == pytest.approx(expected, rel=1e-5)


def test_features_too_large_for_any_figure_are_an_error(metric_name, features):
    predictions, references = (side.double() * 1e308 / side.abs().max() for side in features)
    with pytest.raises(ValueError, match="not finite"):
        METRICS[metric_name]().compute(**sides(metric_name, predictions, references))


@pytest.mark.parametrize("name", ["kernel_distance", "precision_recall"])
def test_sample_added_twice_is_refused(name):
    features = torch.randn(30, 6)
    metric = METRICS[name]()
    metric.add_batch(predictions=features, references=features, indices=range(30))
    metric.add_batch(predictions=features[:1], indices=[29])
    with pytest.raises(ValueError, match=r"`indices` held \[29\] more than once"):
        metric.compute()


def test_batch_that_is_refused_leaves_everything_as_it_was(metric_name, features):
    expected = METRICS[metric_name]().compute(**sides(metric_name, *features))
    metric = METRICS[metric_name]()
    metric.add_batch(**sides(metric_name, *features))
    bad = sides(metric_name, features[0], features[1][:, :5])
    if metric_name == "inception_score":
        bad = {"predictions": features[0][:, :5]}
    with pytest.raises(ValueError, match=" has 5 features per sample, allowed as with the others: 6"):
        metric.add_batch(**bad)
    assert metric.compute() == expected


@pytest.mark.parametrize("metric_name", TWO_SIDED)
def test_numbers_of_features_of_the_two_sides_must_agree(metric_name):
    metric = METRICS[metric_name]()
    with pytest.raises(ValueError, match="`references` has 5 features per sample, allowed as with the others: 6"):
        metric.add_batch(predictions=torch.randn(4, 6), references=torch.randn(4, 5))
    metric.add_batch(references=torch.randn(4, 5))
    with pytest.raises(ValueError, match="`predictions` has 6 features per sample, allowed as with the others: 5"):
        metric.add_batch(predictions=torch.randn(4, 6))


@pytest.mark.parametrize("metric_name", TWO_SIDED)
def test_sides_may_come_apart_and_differ_in_number(metric_name, features):
    predictions, references = features[0], features[1][:50]
    metric = METRICS[metric_name]()
    metric.add_batch(references=references[:20])
    metric.add_batch(predictions=predictions)
    metric.add_batch(references=references[20:])
    result = metric.compute()
    assert (result["num_predictions"], result["num_references"]) == (90, 50)
    assert result == pytest.approx(METRICS[metric_name]().compute(predictions=predictions, references=references))


def test_missing_side_is_an_error_and_nothing_is_forgotten(metric_name, features):
    metric = METRICS[metric_name]()
    if metric_name != "inception_score":
        metric.add_batch(references=features[1])
    with pytest.raises(ValueError, match="`predictions` has 0 sample|`num_splits` is 3"):
        metric.compute()
    metric.add_batch(predictions=features[0])
    assert metric.compute() == METRICS[metric_name]().compute(**sides(metric_name, *features))


def test_what_was_added_is_forgotten_after_computing(metric_name, features):
    metric = METRICS[metric_name]()
    metric.compute(**sides(metric_name, *features))
    again = metric.compute(**sides(metric_name, *features))
    assert again == METRICS[metric_name]().compute(**sides(metric_name, *features))


def test_extractor_without_logits_has_no_inception_score():
    metric = InceptionScore(TinyFeatureExtractor(num_classes=None))
    with pytest.raises(ValueError, match="`feature_extractor` tiny has no logits"):
        metric.add_batch(predictions=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_spatial_features_of_images():
    extractor = TinyFeatureExtractor()
    predictions, references = torch.randint(0, 256, (2, 90, 3, 4, 4), dtype=torch.uint8)
    spatial = [extractor(images).spatial_features for images in (predictions, references)]
    result = FrechetDistance(extractor, spatial=True).compute(predictions=predictions, references=references)
    assert result == FrechetDistance().compute(predictions=spatial[0], references=spatial[1])
    assert result != FrechetDistance(extractor).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("metric_name", TWO_SIDED)
def test_batch_without_any_side_is_refused(metric_name):
    with pytest.raises(ValueError, match="`predictions` and `references` are None"):
        METRICS[metric_name]().add_batch(indices=[0])
