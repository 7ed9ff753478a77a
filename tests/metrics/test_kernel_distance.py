"""The kernel distance against torch-fidelity's and torchmetrics' own, and its definition."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torchmetrics.image.kid import KernelInceptionDistance

from softvq_hf.metrics.kernel_distance import KernelDistance, kernel_distance


class Identity(nn.Identity):
    """torchmetrics takes features from any module that says how many."""

    num_features = 16


@pytest.fixture
def features():
    return torch.randn(300, 16), torch.randn(300, 16) * 1.2 + 0.2


def compute(features, **options):
    return KernelDistance(**options).compute(predictions=features[0], references=features[1])


def test_equals_the_definition_when_a_subset_is_the_whole_set(features):
    result = compute(features, num_subsets=3, subset_size=300)
    first, second = (side.double() for side in features)
    kernels = [(x @ y.T / 16 + 1) ** 3 for x, y in ((first, first), (second, second), (first, second))]
    within = sum(kernel.sum() - kernel.trace() for kernel in kernels[:2]) / (300 * 299)
    assert result["kernel_distance"] == pytest.approx((within - 2 * kernels[2].mean()).item(), rel=1e-10)
    assert result["kernel_distance_std"] < 1e-12


def test_agrees_with_torch_fidelity(features):
    """Exactly on all samples; with subsets, which are drawn from lists of another order, within their spread."""
    whole = kid_features_to_metric(*features, kid_subsets=1, kid_subset_size=300, verbose=False)
    result = compute(features, num_subsets=1, subset_size=300)
    assert result["kernel_distance"] == pytest.approx(whole[KEY_METRIC_KID_MEAN], rel=1e-4)  # float32 there
    subsets = kid_features_to_metric(*features, kid_subsets=100, kid_subset_size=50, verbose=False)
    result = compute(features, num_subsets=100, subset_size=50)
    spread = subsets[KEY_METRIC_KID_STD]
    assert abs(result["kernel_distance"] - subsets[KEY_METRIC_KID_MEAN]) < 4 * spread * (2 / 100) ** 0.5
    assert result["kernel_distance_std"] == pytest.approx(spread, rel=0.4)


def test_agrees_with_torchmetrics(features):
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=300)
    metric.update(features[1], real=True)
    metric.update(features[0], real=False)
    result = compute(features, num_subsets=1, subset_size=300)
    assert result["kernel_distance"] == pytest.approx(metric.compute()[0].item(), rel=1e-4)  # float32 there


def test_is_not_biased(features):
    """Of equal distributions it is 0 on average, whatever the number of samples, unlike the Fréchet distance."""
    equal = torch.randn(2, 2000, 16)
    small = [compute(equal[:, start : start + 50], num_subsets=1, subset_size=50) for start in range(0, 2000, 50)]
    values = torch.tensor([result["kernel_distance"] for result in small])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5
    assert compute(features, num_subsets=10, subset_size=100)["kernel_distance"] > 10 * values.mean().abs()


def test_identical_sets_are_not_above_zero(features):
    identical = (features[0], features[0])
    assert -0.1 < compute(identical, num_subsets=1, subset_size=300)["kernel_distance"] < 0


def test_identical_constant_sets_have_no_distance():
    constant = torch.ones(20, 4)
    result = compute((constant, constant), num_subsets=2, subset_size=10)
    assert (result["kernel_distance"], result["kernel_distance_std"]) == (0, 0)


def test_seed_chooses_the_subsets(features):
    values = [compute(features, num_subsets=3, subset_size=50, seed=seed)["kernel_distance"] for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_capacity_chooses_features(features):
    few = compute(features, num_subsets=5, subset_size=50, capacity=60)
    assert few["num_predictions"] == 300
    assert few != compute(features, num_subsets=5, subset_size=50)


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_fewer_samples_than_a_subset_are_an_error(features, side):
    batch = {"predictions": features[0], "references": features[1]}
    batch[side] = batch[side][:99]
    with pytest.raises(ValueError, match=rf"`{side}` has 99 sample\(s\), allowed with `subset_size` 100: 100 or more"):
        KernelDistance(subset_size=100).compute(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_subsets": 0}, "`num_subsets` is 0, allowed: integers from 1 on"),
        ({"subset_size": 1}, "`subset_size` is 1, allowed: integers from 2 on"),
        ({"subset_size": 20, "capacity": 10}, "`subset_size` is 20, allowed: integers from 2 to `capacity`, 10"),
        ({"capacity": 0}, "`capacity` is 0"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KernelDistance(**options)


def test_function_equals_torch_fidelity_in_float64(features):
    predictions, references = features[0], features[1][:200]
    expected = kid_features_to_metric(
        predictions.double(), references.double(), kid_subsets=7, kid_subset_size=50, rng_seed=3, verbose=False
    )
    result = kernel_distance(predictions, references, num_subsets=7, subset_size=50, seed=3)
    assert result == pytest.approx((expected[KEY_METRIC_KID_MEAN], expected[KEY_METRIC_KID_STD]), rel=1e-9)
    metric = KernelDistance(num_subsets=7, subset_size=300, seed=3)
    result = metric.compute(predictions=features[0], references=features[1])
    expected = kernel_distance(*features, num_subsets=7, subset_size=300)  # all samples: the order does not count
    assert result["kernel_distance"] == pytest.approx(expected[0], rel=1e-9)


class LargestFloat64(TorchDispatchMode):
    """Elements of the largest tensor of float64 that an operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.float64:
            self.size = max(self.size, output.numel())
        return output


def test_only_a_subset_at_a_time_is_in_float64(features):
    with LargestFloat64() as largest:
        kernel_distance(*features, num_subsets=2, subset_size=20)
    assert largest.size == 20 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_subsets": 0}, "`num_subsets` is 0, allowed: integers from 1 on"),
        ({"subset_size": 1}, "`subset_size` is 1, allowed: integers from 2 on"),
        ({"predictions": torch.randn(30)}, r"`predictions` has shape \(30,\)"),
        ({"predictions": torch.randn(30, 5)}, "`predictions` has 5 features per sample, allowed .*: 16"),
        ({"references": torch.randn(19, 16)}, r"`references` has 19 sample\(s\), allowed with `subset_size` 20: 20"),
    ],
)
def test_function_refuses(features, change, message):
    arguments = {"predictions": features[0], "references": features[1], "subset_size": 20, **change}
    with pytest.raises(ValueError, match=message):
        kernel_distance(**arguments)
