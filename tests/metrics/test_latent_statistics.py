"""`softvq_hf.metrics.latent_statistics`: streamed moments and effective ranks against numpy and scipy."""

import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch

from softvq_hf.metrics.latent_statistics import LatentStatistics, Moments


@pytest.fixture
def latents() -> torch.Tensor:
    """40 latents of 5 tokens of 4 channels: other tails, spreads and places, and far from 0."""
    normal = torch.randn(40, 5, 4, dtype=torch.float64)
    channels = [normal[..., 0], normal[..., 1].abs() * 3 - 7, normal[..., 2] ** 3, normal[..., 3].sign() + 1000]
    return torch.stack(channels, dim=-1).float()


def entropy_rank(vectors: np.ndarray) -> float:
    singular_values = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False)
    return math.exp(scipy.stats.entropy(singular_values))


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_agrees_with_numpy_and_scipy(latents, batch_size):
    metric = LatentStatistics()
    for batch in latents.split(batch_size):
        metric.add_batch(predictions=batch)
    result = metric.compute()

    numbers = latents.double().numpy()
    tokens = numbers.reshape(-1, 4)
    assert result["num_tokens"] == 200
    assert result["latent_mean"] == pytest.approx(numbers.mean(), rel=1e-12)
    assert result["latent_std"] == pytest.approx(numbers.std(), rel=1e-12)
    assert result["latent_channel_mean"] == pytest.approx(tokens.mean(0), rel=1e-12)
    assert result["latent_channel_std"] == pytest.approx(tokens.std(0), rel=1e-11)
    kurtosis = scipy.stats.kurtosis(tokens, fisher=False)
    assert result["latent_channel_kurtosis"] == pytest.approx(kurtosis, rel=1e-9)
    assert result["latent_kurtosis"] == pytest.approx(kurtosis.mean(), rel=1e-9)
    assert kurtosis[2] > 6 and kurtosis[3] < 1.2  # heavy tails, and none
    assert result["effective_rank"] == pytest.approx(entropy_rank(tokens), rel=1e-8)
    assert result["effective_rank_flat"] == pytest.approx(entropy_rank(numbers.reshape(40, -1)), rel=1e-8)


def test_merged_moments_are_those_of_the_union():
    parts = [torch.randn(n, 3, dtype=torch.float64) * n + 10**n for n in (1, 2, 6)]
    moments = Moments()
    moments.merge(Moments())  # a process without samples
    for part in parts:
        moments.merge(Moments.of(part))
    moments.merge(Moments())
    union = torch.cat(parts)
    assert moments.count == 9
    torch.testing.assert_close(moments.mean, union.mean(0), rtol=1e-12, atol=0)
    for power, sums in ((2, moments.squares), (3, moments.cubes), (4, moments.fourths)):
        torch.testing.assert_close(sums, (union - union.mean(0)).pow(power).sum(0), rtol=1e-10, atol=0)


def test_digits_far_from_zero():
    """Sums of squares would lose all digits of a deviation of 0.01 around 100,000."""
    latents = torch.randn(64, 4, 2, dtype=torch.float64) * 0.01 + 1e5
    metric = LatentStatistics()
    for batch in latents.split(5):
        metric.add_batch(predictions=batch)
    result = metric.compute()
    assert result["latent_channel_std"] == pytest.approx(latents.flatten(0, 1).std(0, correction=0), rel=1e-6)
    kurtosis = scipy.stats.kurtosis(latents.flatten(0, 1).numpy() - 1e5, fisher=False)
    assert result["latent_channel_kurtosis"] == pytest.approx(kurtosis, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_effective_rank_counts_directions(rank):
    directions = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q[:rank]
    weights = torch.randn(30, rank, dtype=torch.float64)
    weights = torch.linalg.qr(weights - weights.mean(0)).Q  # centred and orthonormal: equal singular values
    latents = (weights @ directions).reshape(30, 1, 6) + 3
    result = LatentStatistics().compute(predictions=latents)
    assert result["effective_rank"] == pytest.approx(rank, abs=1e-4)
    assert result["effective_rank_flat"] == pytest.approx(rank, abs=1e-4)


def test_does_not_depend_on_the_scale(latents):
    raw = LatentStatistics().compute(predictions=latents.double())
    scaled = LatentStatistics().compute(predictions=(latents.double() - 4) * 0.3)
    for name in ("latent_channel_kurtosis", "effective_rank", "effective_rank_flat"):
        assert scaled[name] == pytest.approx(raw[name], rel=1e-8)
    assert scaled["latent_std"] == pytest.approx(0.3 * raw["latent_std"])


@pytest.mark.parametrize("num_latents", [1, 10])
def test_constant_latents(num_latents):
    """0.1 is no binary number; sums of it are rounded."""
    metric = LatentStatistics()
    for _ in range(num_latents):
        metric.add_batch(predictions=torch.full((1, 3, 2), 0.1))
    result = metric.compute()
    assert result["latent_std"] == 0 and result["latent_channel_std"] == [0, 0]
    assert all(map(math.isnan, [result["latent_kurtosis"], *result["latent_channel_kurtosis"]]))
    assert result["effective_rank"] == result["effective_rank_flat"] == 0


def test_a_dead_channel_is_left_out_of_the_mean(latents):
    latents[..., 1] = 0.1
    result = LatentStatistics().compute(predictions=latents)
    kurtosis = result["latent_channel_kurtosis"]
    assert math.isnan(kurtosis[1]) and result["latent_channel_std"][1] == 0
    assert result["latent_kurtosis"] == pytest.approx((kurtosis[0] + kurtosis[2] + kurtosis[3]) / 3)


def test_one_image_has_no_directions_of_whole_latents(latents):
    result = LatentStatistics().compute(predictions=latents[:1])
    assert result["effective_rank_flat"] == 0 and result["effective_rank"] > 1


def test_memory_does_not_grow(latents):
    sizes = {}
    for flat in (True, False):
        metric = LatentStatistics(flat=flat)
        for rounds in (1, 10):
            for _ in range(rounds):
                metric.add_batch(predictions=latents)
            sizes[flat, rounds] = len(pickle.dumps(metric.accumulators))
        assert ("effective_rank_flat" in metric.compute()) == flat
    for flat in (True, False):
        assert abs(sizes[flat, 1] - sizes[flat, 10]) < 20  # a longer count
    assert sizes[True, 1] - sizes[False, 1] >= 20 * 20 * 8


@pytest.mark.parametrize(
    "predictions, message",
    [
        (torch.zeros(2, 5, 4, dtype=torch.int64), "dtype torch.int64, allowed: floating point"),
        (torch.zeros(2, 5), r"shape \(2, 5\), allowed: \(B, L, C\)"),
        (torch.zeros(0, 5, 4), r"shape \(0, 5, 4\)"),
        (torch.zeros(2, 4, 5), r"latents of shape \(4, 5\), allowed: \(5, 4\)"),
        (torch.stack([torch.zeros(5, 4), torch.full((5, 4), math.nan)]), r"NaN or infinite.*\[1\]"),
        (torch.full((1, 5, 4), math.inf), r"NaN or infinite.*\[0\]"),
    ],
)
def test_refuses(latents, predictions, message):
    metric = LatentStatistics()
    metric.add_batch(predictions=latents)
    with pytest.raises(ValueError, match=f"`predictions`.*{message}"):
        metric.add_batch(predictions=predictions)
    assert metric.compute() == LatentStatistics().compute(predictions=latents)


def test_refuses_references_and_nothing(latents):
    with pytest.raises(ValueError, match="`references` are given"):
        LatentStatistics().add_batch(predictions=latents, references=latents)
    with pytest.raises(ValueError, match="No `predictions` were added"):
        LatentStatistics().compute()


def test_another_shape_after_computing(latents):
    metric = LatentStatistics()
    metric.compute(predictions=latents)
    assert metric.compute(predictions=latents[:, :2])["num_tokens"] == 80


def test_latents_too_large_for_their_moments_are_an_error():
    with pytest.raises(ValueError, match="The fourth moment of `predictions` is not finite"):
        LatentStatistics().compute(predictions=1e100 * torch.randn(3, 4, 2, dtype=torch.float64))
