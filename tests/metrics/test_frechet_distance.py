"""The Fréchet distance against torch-fidelity's and torchmetrics' own, and its sides."""

import logging

import pytest
import torch
from torch import nn
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from softvq_hf.metrics.frechet_distance import FrechetDistance
from softvq_hf.metrics.gaussian import GaussianAccumulator, GaussianStatistics


class Identity(nn.Identity):
    """torchmetrics takes features from any module that says how many."""

    num_features = 32


@pytest.fixture
def features():
    """Like those of a network: not negative, correlated, of unequal variances."""
    mixing = torch.randn(32, 32)
    predictions, references = ((torch.randn(400, 32) @ mixing + shift).relu() for shift in (0.0, 0.3))
    return predictions, references


def distance(predictions, references, **options) -> float:
    return FrechetDistance(**options).compute(predictions=predictions, references=references)["frechet_distance"]


def test_agrees_with_torch_fidelity(features):
    statistics = [fid_features_to_statistics(side.double()) for side in features]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert distance(*features) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torchmetrics(features):
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    metric.update(features[1].double(), real=True)
    metric.update(features[0].double(), real=False)
    assert distance(*features) == pytest.approx(metric.compute().item(), rel=1e-9)


def test_agrees_with_the_libraries_with_fewer_samples_than_features():
    predictions, references = torch.randn(20, 32), torch.randn(25, 32) * 2
    statistics = [fid_features_to_statistics(side.double()) for side in (predictions, references)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    metric.update(references.double(), real=True)
    metric.update(predictions.double(), real=False)
    assert distance(predictions, references) == pytest.approx(expected, rel=1e-5)
    assert distance(predictions, references) == pytest.approx(metric.compute().item(), rel=1e-5)


def test_grows_with_the_shift_and_is_symmetric(features):
    values = [distance(features[0] + shift, features[1]) for shift in (0.0, 1.0, 2.0)]
    assert values[0] < values[1] < values[2]
    assert distance(*features) == pytest.approx(distance(*features[::-1]), rel=1e-12)


@pytest.mark.parametrize("num_samples", [2, 10, 400])
def test_identical_sets_have_no_distance(features, num_samples):
    side = features[0][:num_samples]
    assert 0 <= distance(side, side) < 1e-10


def test_reference_statistics_replace_references(features):
    accumulator = GaussianAccumulator()
    accumulator.update(features[1])
    metric = FrechetDistance(reference=accumulator.statistics())
    result = metric.compute(predictions=features[0])
    assert result == FrechetDistance().compute(predictions=features[0], references=features[1])
    with pytest.raises(ValueError, match="`references` were given to a metric that has a `reference`"):
        metric.add_batch(predictions=features[0], references=features[1])
    with pytest.raises(ValueError, match="`predictions` has 5 features per sample, allowed as with the others: 32"):
        metric.add_batch(predictions=torch.randn(4, 5))


def test_reference_of_unknown_count(features):
    reference = GaussianStatistics(None, torch.zeros(32), torch.eye(32))
    assert FrechetDistance(reference=reference).compute(predictions=features[0])["num_references"] is None


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_one_sample_is_an_error(features, side):
    batch = {"predictions": features[0], "references": features[1]}
    batch[side] = batch[side][:1]
    with pytest.raises(ValueError, match=rf"`{side}` has 1 sample\(s\), allowed: 2 or more"):
        FrechetDistance().compute(**batch)


@pytest.mark.parametrize("num_samples", [32, 33])
def test_fewer_samples_than_features_are_told(features, num_samples, caplog):
    with caplog.at_level(logging.WARNING):
        result = FrechetDistance().compute(predictions=features[0][:num_samples], references=features[1])
    assert result["frechet_distance"] > distance(*features)
    if num_samples == 32:
        assert "32 predictions for 32 features" in caplog.text
    else:
        assert not caplog.records


@pytest.mark.parametrize("reference", ["statistics.npz", 3, (torch.zeros(6), torch.eye(6))])
def test_reference_of_another_type_is_refused(reference):
    with pytest.raises(ValueError, match=f"`reference` is of type {type(reference).__name__}, allowed"):
        FrechetDistance(reference=reference)
