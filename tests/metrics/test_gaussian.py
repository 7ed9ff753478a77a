"""Means and covariances, streamed, and the distance of Gaussians, against closed forms."""

import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softvq_hf.metrics.gaussian import GaussianAccumulator, GaussianStatistics, frechet_distance


def accumulate(features: torch.Tensor, batch_size: int) -> GaussianAccumulator:
    accumulator = GaussianAccumulator()
    for batch in features.split(batch_size):
        accumulator.update(batch)
    return accumulator


def gaussian(features: torch.Tensor) -> GaussianStatistics:
    return accumulate(features, len(features)).statistics()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_accumulator_equals_numpy_for_every_batch_size(batch_size):
    features = 100 + torch.randn(500, 12, dtype=torch.float64)  # a large mean, which raw squares do not survive
    statistics = accumulate(features, batch_size).statistics()
    assert statistics.count == 500
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [(100, 0), (0, 100), (99, 1), (30, 70)])
def test_merged_accumulators_equal_one(sizes):
    features = torch.randn(100, 5)
    parts = [accumulate(part, 8) if len(part) else GaussianAccumulator() for part in features.split(sizes)]
    merged = GaussianAccumulator()
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    statistics, expected = merged.statistics(), gaussian(features)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, expected.mean, atol=1e-14)
    np.testing.assert_allclose(statistics.covariance, expected.covariance, atol=1e-14)


def test_merging_leaves_the_other_accumulator_as_it_is():
    first, second = accumulate(torch.randn(10, 3), 10), accumulate(torch.randn(10, 3), 10)
    before = second.mean.clone(), second.sum_of_products.clone()
    merged = GaussianAccumulator()
    merged.merge(second)
    merged.merge(first)
    assert torch.equal(second.mean, before[0]) and torch.equal(second.sum_of_products, before[1])


def test_statistics_do_not_change_with_later_batches():
    accumulator = accumulate(torch.randn(10, 3), 10)
    statistics = accumulator.statistics()
    before = statistics.mean.clone(), statistics.covariance.clone()
    accumulator.update(torch.randn(10, 3))
    assert torch.equal(statistics.mean, before[0]) and torch.equal(statistics.covariance, before[1])


def test_memory_does_not_grow():
    sizes = [len(pickle.dumps(accumulate(torch.randn(n, 16), 100))) for n in (100, 10_000)]
    assert abs(sizes[1] - sizes[0]) < 16
    assert 8 * 16 * 17 < sizes[0] < 8 * 16 * 17 + 2000


@pytest.mark.parametrize("num_samples", [0, 1])
def test_too_few_samples_have_no_covariance(num_samples):
    accumulator = GaussianAccumulator()
    if num_samples:
        accumulator.update(torch.randn(num_samples, 3))
    with pytest.raises(ValueError, match=f"{num_samples} sample.*allowed: 2 or more"):
        accumulator.statistics()


def test_other_number_of_features_is_refused():
    accumulator = accumulate(torch.randn(4, 3), 4)
    with pytest.raises(ValueError, match="have 5 numbers, allowed after the earlier ones: 3"):
        accumulator.update(torch.randn(4, 5))


@pytest.mark.parametrize("dimension", [1, 5, 40])
def test_distance_of_commuting_covariances_has_a_closed_form(dimension):
    rotation, _ = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64))
    first, second = torch.rand(2, dimension, dtype=torch.float64) * 10
    means = torch.randn(2, dimension, dtype=torch.float64)
    distance = frechet_distance(
        GaussianStatistics(100, means[0], rotation @ first.diag() @ rotation.T),
        GaussianStatistics(100, means[1], rotation @ second.diag() @ rotation.T),
    )
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_distance_in_one_dimension_is_that_of_means_and_standard_deviations():
    one = torch.ones(1)
    distance = frechet_distance(GaussianStatistics(None, 3 * one, [[4.0]]), GaussianStatistics(9, one, [[25.0]]))
    assert distance == pytest.approx((3 - 1) ** 2 + (2 - 5) ** 2)


def test_distance_equals_the_matrix_square_root():
    first = gaussian(torch.randn(300, 20) @ torch.randn(20, 20))
    second = gaussian(torch.randn(200, 20) @ torch.randn(20, 20) + 1)
    root = scipy.linalg.sqrtm(first.covariance.numpy() @ second.covariance.numpy()).real
    expected = (first.mean - second.mean).square().sum() + (first.covariance + second.covariance).trace()
    expected = expected.item() - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_samples", [2, 10, 63, 64, 1000])
def test_distance_of_a_set_from_itself_is_zero(num_samples):
    features = torch.randn(num_samples, 64).abs() * torch.logspace(0, -6, 64)
    statistics = gaussian(features)
    assert 0 <= frechet_distance(statistics, gaussian(features.flip(0))) < 1e-12 * statistics.covariance.trace()


@pytest.mark.parametrize("num_samples", [2, 5, 30])
def test_distance_with_fewer_samples_than_features_is_exact(num_samples):
    """The trace of the root is, for sets of n samples, that of the n x n products of the samples: no root of zeros."""
    first, second = torch.randn(2, num_samples, 48, dtype=torch.float64)
    centred = [features - features.mean(0) for features in (first, second)]
    nuclear_norm = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc") / (num_samples - 1)
    traces = sum(features.square().sum() for features in centred) / (num_samples - 1)
    expected = (first.mean(0) - second.mean(0)).square().sum() + traces - 2 * nuclear_norm
    assert frechet_distance(gaussian(first), gaussian(second)) == pytest.approx(expected.item(), rel=1e-12)


def test_distance_of_constant_sets_is_that_of_their_means():
    first, second = gaussian(torch.ones(5, 3)), gaussian(torch.zeros(7, 3))
    assert frechet_distance(first, second) == 3
    assert frechet_distance(first, first) == 0


def test_distance_of_scaled_features_scales_with_the_square():
    first, second = torch.randn(2, 50, 8, dtype=torch.float64)
    distance = frechet_distance(gaussian(first), gaussian(second))
    scaled = frechet_distance(gaussian(1e-6 * first), gaussian(1e-6 * second))
    assert scaled == pytest.approx(1e-12 * distance, rel=1e-9)


def test_distance_of_other_dimensions_is_refused():
    with pytest.raises(ValueError, match="`first` has 3 features and `second` has 4"):
        frechet_distance(gaussian(torch.randn(9, 3)), gaussian(torch.randn(9, 4)))


def test_covariance_with_a_negative_eigenvalue_is_refused():
    indefinite = GaussianStatistics(10, torch.zeros(2), [[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="eigenvalue -1 beside 3"):
        frechet_distance(indefinite, indefinite)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (torch.zeros(2, 2), torch.eye(2), r"`mean` has shape \(2, 2\)"),
        (torch.zeros(0), torch.zeros(0, 0), r"`mean` has shape \(0,\)"),
        (torch.zeros(3), torch.eye(2), r"`covariance` has shape \(2, 2\), allowed with 3 means: \(3, 3\)"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), "`mean` holds values that are not finite"),
        (torch.zeros(2), torch.full((2, 2), float("inf")), "`covariance` holds values that are not finite"),
        (torch.zeros(2), [[1.0, 0.5], [0.0, 1.0]], "differs from its transpose by up to 0.5"),
        (torch.zeros(2), [[1.0, 0.0], [0.0, -1.0]], "holds the variance -1"),
    ],
)
def test_statistics_that_are_not_valid_are_refused(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        GaussianStatistics(10, mean, covariance)


def test_statistics_take_float32_arrays_with_their_rounding():
    covariance = np.cov(np.random.default_rng(0).normal(size=(100, 4)), rowvar=False)
    statistics = GaussianStatistics(None, np.zeros(4, np.float32), covariance.astype(np.float32))
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    assert frechet_distance(statistics, GaussianStatistics(100, torch.zeros(4), covariance)) < 1e-12


@pytest.mark.parametrize("batch_size", [1, 100, 511, 512, 513, 1300])
def test_blocks_give_what_numpy_gives(batch_size):
    """More samples than wait for each other."""
    features = 10 + torch.randn(1300, 6, dtype=torch.float64)
    statistics = accumulate(features, batch_size).statistics()
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


class ProductCounter(TorchDispatchMode):
    """How many matrix products there are."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


def test_small_batches_are_multiplied_together():
    features = torch.randn(1100, 3)
    with ProductCounter() as counter:
        accumulate(features, 1).statistics()
    assert counter.count == 3


def test_waiting_features_are_copies():
    features = torch.randn(20, 3, dtype=torch.float64)
    expected = gaussian(features.clone())
    accumulator = accumulate(features, 5)
    features.zero_()
    assert torch.equal(accumulator.statistics().mean, expected.mean)


def test_pickles_have_the_features_that_wait():
    features = torch.randn(20, 3)
    accumulator = pickle.loads(pickle.dumps(accumulate(features, 5)))
    accumulator.update(features + 1)
    expected = gaussian(torch.cat([features, features + 1]))
    assert accumulator.count == 40
    np.testing.assert_allclose(accumulator.statistics().covariance, expected.covariance, atol=1e-12)
