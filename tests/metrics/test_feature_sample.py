"""The sample of features: uniform, and the same however the features come."""

import pickle

import numpy as np
import pytest
import torch

from softvq_hf.metrics.feature_sample import FeatureSample


def collect(features, indices, batch_size, capacity, seed=0) -> FeatureSample:
    sample = FeatureSample(capacity, seed)
    for start in range(0, len(features), batch_size):
        sample.update(features[start : start + batch_size], indices[start : start + batch_size])
    return sample


@pytest.fixture
def numbered():
    """Features that are their own index, so that a sample tells which it holds."""
    return torch.arange(300).float()[:, None].repeat(1, 3), np.arange(300)


@pytest.mark.parametrize("capacity", [1, 20, 299, 300, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 50, 300])
def test_same_sample_for_every_batch_size_and_order(numbered, capacity, batch_size):
    features, indices = numbered
    expected = collect(features, indices, 300, capacity).features()
    order = np.random.default_rng(0).permutation(300)
    assert expected.shape == (min(capacity, 300), 3)
    assert torch.equal(collect(features, indices, batch_size, capacity).features(), expected)
    assert torch.equal(collect(features[order], indices[order], batch_size, capacity).features(), expected)


@pytest.mark.parametrize("capacity", [20, 300])
@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_same_sample_for_every_number_of_processes(numbered, capacity, num_processes):
    features, indices = numbered
    merged = FeatureSample(capacity)
    merged.merge(FeatureSample(capacity))  # a process without any sample
    for rank in range(num_processes):
        part = collect(features[rank::num_processes], indices[rank::num_processes], 16, capacity)
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert torch.equal(merged.features(), collect(features, indices, 300, capacity).features())
    assert merged.count == 300


def test_a_sample_goes_on_after_pickling(numbered):
    features, indices = numbered
    sample = collect(features[:30], indices[:30], 30, 100)
    assert len(pickle.dumps(sample)) < 30 * (3 * 4 + 8) + 2000  # without the 70 free places
    sample = pickle.loads(pickle.dumps(sample))
    sample.update(features[30:], indices[30:])
    assert torch.equal(sample.features(), collect(features, indices, 300, 100).features())
    empty = pickle.loads(pickle.dumps(FeatureSample(10)))
    empty.update(features[:5], indices[:5])
    assert len(empty) == 5


def test_every_feature_is_kept_equally_often_over_seeds(numbered):
    features, indices = numbered
    kept = torch.stack([collect(features, indices, 300, 60, seed).features()[:, 0].long() for seed in range(1000)])
    counts = kept.flatten().bincount(minlength=300).double()
    # 1000 draws of probability 0.2: standard deviation sqrt(160) = 12.6; chi-square of 300 of them
    assert counts.mean() == 200
    assert (counts - 200).abs().max() < 5 * 12.7
    assert 0.75 < ((counts - 200) ** 2 / 160).mean() < 1.25


def test_pairs_are_kept_independently(numbered):
    features, indices = numbered
    kept = torch.zeros(1000, 300)
    for seed in range(1000):
        kept[seed, collect(features, indices, 300, 60, seed).features()[:, 0].long()] = 1
    correlation = torch.corrcoef(kept.T) - torch.eye(300)
    assert correlation.abs().max() < 0.2  # 5 or 6 standard deviations of 1 / sqrt(1000)


def test_order_of_a_full_sample_does_not_follow_the_indices(numbered):
    features, indices = numbered
    order = collect(features, indices, 300, 300).features()[:, 0]
    assert order.sort().values.tolist() == list(range(300))
    assert abs(np.corrcoef(order, np.arange(300))[0, 1]) < 0.2


def test_float64_stays_float64_in_any_order(numbered):
    features, indices = numbered
    assert collect(features.half(), indices, 50, 20).features().dtype == torch.float32
    precise = features.double() + 1e12 + 1e-3
    sample = collect(precise, indices, 7, 20)
    assert sample.features().dtype == torch.float64
    assert torch.equal(sample.features(), collect(features, indices, 7, 20).features().double() + 1e12 + 1e-3)
    for first, last in [(features, precise), (precise, features)]:
        mixed = collect(first[:150], indices[:150], 7, 300)
        mixed.merge(pickle.loads(pickle.dumps(collect(last[150:], indices[150:], 7, 300))))
        expected = torch.cat([first[:150].double(), last[150:].double()])
        assert torch.equal(mixed.features().sort(0).values, expected.sort(0).values)


def test_memory_is_bounded():
    sizes = []
    for count in (100, 10_000):
        sizes.append(len(pickle.dumps(collect(torch.randn(count, 8), np.arange(count), 64, 100))))
    assert abs(sizes[1] - sizes[0]) < 32
    assert 100 * (8 * 4 + 8) < sizes[0] < 100 * (8 * 4 + 8) + 2000


def test_index_given_twice_is_refused(numbered):
    features, indices = numbered
    with pytest.raises(ValueError, match=r"`indices` held \[0, 1\] more than once"):
        collect(torch.cat([features, features[:2]]), np.append(indices, [0, 1]), 16, 1000).features()


def test_other_number_of_features_is_refused(numbered):
    sample = collect(*numbered, 300, 10)
    with pytest.raises(ValueError, match="have 5 numbers, allowed after the earlier ones: 3"):
        sample.update(torch.randn(4, 5), np.arange(300, 304))


@pytest.mark.parametrize("capacity", [0, -1, 2.5, None])
def test_bad_capacity_is_refused(capacity):
    with pytest.raises(ValueError, match=f"`capacity` is {capacity}, allowed: integers from 1 on"):
        FeatureSample(capacity)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match=f"`seed` is {seed}, allowed: integers from 0"):
        FeatureSample(10, seed)
