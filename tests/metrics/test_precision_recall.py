"""Precision and recall against torch-fidelity's own and their definition."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from softvq_hf.metrics.precision_recall import PrecisionRecall, precision_recall


@pytest.fixture
def features():
    return torch.randn(200, 4), torch.randn(150, 4) * 1.3 + 0.8


def compute(predictions, references, **options) -> tuple[float, float]:
    result = PrecisionRecall(**options).compute(predictions=predictions, references=references)
    return result["precision"], result["recall"]


def share_inside(points: torch.Tensor, manifold: torch.Tensor, num_neighbors: int) -> float:
    """The paper's equation 1, sample by sample."""
    inside = 0
    for point in points.double():
        distances = (manifold.double() - point).norm(dim=1)
        radii = [(manifold.double() - other).norm(dim=1).sort().values[num_neighbors] for other in manifold.double()]
        inside += bool((distances <= torch.stack(radii)).any())
    return inside / len(points)


@pytest.mark.parametrize("num_neighbors", [1, 3, 5])
def test_equals_the_definition(features, num_neighbors):
    predictions, references = features[0][:40], features[1][:30] + 1
    precision, recall = compute(predictions, references, num_neighbors=num_neighbors)
    assert 0 < recall < 1 and 0 < precision < 1
    assert precision == pytest.approx(share_inside(predictions, references, num_neighbors))
    assert recall == pytest.approx(share_inside(references, predictions, num_neighbors))


@pytest.mark.parametrize("num_neighbors", [1, 3, 10])
def test_agrees_with_torch_fidelity(features, num_neighbors):
    expected = prc_features_to_metric(*features, prc_neighborhood=num_neighbors, save_cpu_ram=False, verbose=False)
    precision, recall = compute(*features, num_neighbors=num_neighbors)
    assert precision == pytest.approx(expected[KEY_METRIC_PRECISION], abs=1e-6)
    assert recall == pytest.approx(expected[KEY_METRIC_RECALL], abs=1e-6)


def test_predictions_of_one_of_two_modes_are_precise_with_half_the_recall():
    references = torch.randn(200, 4) + 50 * (torch.arange(200) % 2)[:, None]
    predictions = references[::2] + 1e-3 * torch.randn(100, 4)
    precision, recall = compute(predictions, references)
    assert precision == 1
    assert recall == pytest.approx(0.5, abs=0.02)
    assert compute(references, predictions) == (recall, precision)


def test_sets_far_apart_share_nothing(features):
    assert compute(features[0], features[1] + 1000) == (0, 0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_identical_sets_share_everything(features, offset):
    assert compute(features[0] + offset, features[0] + offset) == (1, 1)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1000.3])
def test_identical_constant_sets_share_everything(offset):
    constant = torch.full((40, 7), offset)
    assert compute(constant, constant) == (1, 1)


def test_a_common_offset_changes_nothing(features):
    """Products of features that are far from zero lose the digits of their distances, unless these are centred."""
    assert compute(features[0] + 1024, features[1] + 1024) == pytest.approx(compute(*features), abs=0.02)


def test_capacity_chooses_features(features):
    result = PrecisionRecall(capacity=20).compute(predictions=features[0], references=features[1])
    assert (result["num_predictions"], result["num_references"]) == (200, 150)
    assert round(result["precision"] * 20, 4).is_integer() and round(result["recall"] * 20, 4).is_integer()


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_fewer_samples_than_neighbors_are_an_error(features, side):
    batch = {"predictions": features[0], "references": features[1]}
    batch[side] = batch[side][:3]
    with pytest.raises(ValueError, match=rf"`{side}` has 3 sample\(s\), allowed with `num_neighbors` 3: 4 or more"):
        PrecisionRecall().compute(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 0}, "`num_neighbors` is 0, allowed: integers from 1 to below `capacity`, 50000"),
        ({"num_neighbors": 10, "capacity": 10}, "`num_neighbors` is 10, allowed: integers from 1 to below `capacity`"),
        ({"num_neighbors": 1.5}, "`num_neighbors` is 1.5"),
        ({"capacity": 0}, "`capacity` is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrecisionRecall(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_function_equals_the_metric(features, dtype):
    assert precision_recall(*(side.to(dtype) for side in features), num_neighbors=5) == pytest.approx(
        compute(*features, num_neighbors=5), abs=1e-6
    )


class Float64Recorder(TorchDispatchMode):
    """Shapes of the tensors of float64 that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.float64:
            self.shapes.add(tuple(output.shape))
        return output


def test_features_are_not_copied_to_float64(features):
    with Float64Recorder() as recorder:
        precision_recall(*features)
    assert recorder.shapes <= {(4,)}  # their mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_neighbors": 0}, "`num_neighbors` is 0, allowed: integers from 1 on"),
        ({"references": torch.randn(3, 4)}, r"`references` has 3 sample\(s\), allowed with `num_neighbors` 3: 4"),
        ({"references": torch.randn(9, 5)}, "`predictions` has 4 features per sample, allowed .*: 5"),
    ],
)
def test_function_refuses(features, change, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(**{"predictions": features[0], "references": features[1], **change})
