"""The Inception score against torch-fidelity's and torchmetrics' own, and known values."""

import math

import pytest
import torch
from torch import nn
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from softvq_hf.metrics.inception_score import InceptionScore


@pytest.mark.parametrize("num_splits", [1, 4, 10])
def test_agrees_with_torch_fidelity_on_the_same_splits(num_splits):
    logits = 3 * torch.randn(200, 12)
    by_split = torch.cat([logits[split::num_splits] for split in range(num_splits)])
    expected = isc_features_to_metric(by_split, splits=num_splits, shuffle=False)
    result = InceptionScore(num_splits=num_splits).compute(predictions=logits)
    assert result["inception_score"] == pytest.approx(expected[KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert result["inception_score_std"] == pytest.approx(expected[KEY_METRIC_ISC_STD], rel=1e-9, abs=1e-14)
    assert result["num_predictions"] == 200


def test_agrees_with_shuffled_splits_within_their_spread():
    logits = 3 * torch.randn(5000, 12)
    expected = isc_features_to_metric(logits, splits=10, shuffle=True)
    result = InceptionScore().compute(predictions=logits)
    assert abs(result["inception_score"] - expected[KEY_METRIC_ISC_MEAN]) < 2 * expected[KEY_METRIC_ISC_STD]


def test_agrees_with_torchmetrics():
    logits = 3 * torch.randn(200, 12)
    metric = TorchmetricsInceptionScore(feature=nn.Identity(), splits=1)
    metric.update(logits)
    result = InceptionScore(num_splits=1).compute(predictions=logits)
    assert result["inception_score"] == pytest.approx(metric.compute()[0].item(), rel=1e-5)  # float32 there


def test_sure_and_even_classifier_scores_the_number_of_classes():
    logits = 1000 * torch.eye(5).repeat(20, 1)  # probabilities of 0 and 1, to the last digit
    result = InceptionScore(num_splits=2).compute(predictions=logits)
    assert result["inception_score"] == pytest.approx(5, rel=1e-12)
    assert result["inception_score_std"] == pytest.approx(0, abs=1e-12)


def test_equal_images_score_one():
    result = InceptionScore(num_splits=3).compute(predictions=torch.randn(1, 8).expand(30, 8))
    assert result["inception_score"] == pytest.approx(1, rel=1e-12)


def test_sorted_classes_do_no_harm():
    logits = 1000 * torch.eye(5).repeat_interleave(20, 0)
    assert InceptionScore(num_splits=10).compute(predictions=logits)["inception_score"] == pytest.approx(5)


def test_one_sample_per_split_scores_one():
    assert InceptionScore(num_splits=4).compute(predictions=torch.randn(4, 8))["inception_score"] == pytest.approx(1)


def test_extreme_logits_are_finite():
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e30, 1e30, 0.0]])
    assert math.isclose(InceptionScore(num_splits=1).compute(predictions=logits)["inception_score"], 2)


def test_fewer_samples_than_splits_are_an_error():
    with pytest.raises(ValueError, match=r"`num_splits` is 10, allowed with 7 sample\(s\): at most as many"):
        InceptionScore().compute(predictions=torch.randn(7, 5))


@pytest.mark.parametrize("num_splits", [0, -1, 1.5])
def test_bad_num_splits_is_refused(num_splits):
    with pytest.raises(ValueError, match=f"`num_splits` is {num_splits}, allowed: integers from 1 on"):
        InceptionScore(num_splits=num_splits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_probabilities_are_refused(num_classes, dtype):
    with pytest.raises(ValueError, match="`predictions` looks like probabilities"):
        InceptionScore().add_batch(predictions=(3 * torch.randn(16, num_classes)).softmax(1).to(dtype))


def test_logits_that_nearly_sum_to_1_are_taken():
    logits = torch.tensor([[0.5, 0.505], [0.2, 0.805]])
    assert 1 < InceptionScore(num_splits=1).compute(predictions=logits)["inception_score"] < 2


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="`predictions` has 1 class, allowed: logits of 2 or more"):
        InceptionScore().add_batch(predictions=torch.randn(4, 1))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"predictions": torch.randn(4, 5), "references": torch.randn(4, 5)}, "`references` were given"),
        ({"predictions": None, "references": torch.randn(4, 5)}, "`references` were given"),
        ({"predictions": None}, "`predictions` and `references` are None"),
    ],
)
def test_references_are_refused_and_predictions_needed(batch, message):
    with pytest.raises(ValueError, match=message):
        InceptionScore().add_batch(**batch)


def test_splits_that_are_empty_are_left_out():
    """As where images could not be read: their indices are missing."""
    logits = 3 * torch.randn(60, 12)
    indices = torch.arange(80)[torch.arange(80) % 4 != 1]
    result = InceptionScore(num_splits=4).compute(predictions=logits, indices=indices)
    expected = isc_features_to_metric(torch.cat([logits[split::3] for split in range(3)]), splits=3, shuffle=False)
    assert result["inception_score"] == pytest.approx(expected[KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert result["inception_score_std"] == pytest.approx(expected[KEY_METRIC_ISC_STD], rel=1e-9)
    assert result["num_predictions"] == 60
