"""Batches of every kind of array, and which samples of a batch are not finite."""

import numpy as np
import pytest
import torch

from softvq_hf.metrics.batches import check_batch, not_finite


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 5)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_names_the_samples(shape, value):
    samples = torch.randn(shape)
    assert not_finite(samples) == []
    samples[1].view(-1)[-1] = value
    samples[3].view(-1)[0] = value
    assert not_finite(samples) == not_finite(samples.bfloat16()) == [1, 3]


def test_integers_are_finite():
    assert not_finite(torch.randint(0, 256, (2, 3), dtype=torch.uint8)) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", ">f4", ">f8", ">i2"])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda array: array,
        lambda array: array[::-1, ::-1],
        lambda array: array[::2],
        lambda array: array.T,
        lambda array: array[:1][::-1],
        lambda array: list(array[:, ::-1]),
    ],
    ids=["contiguous", "backwards", "strided", "transposed", "one backwards", "list"],
)
def test_arrays_of_any_order_are_taken(dtype, arrange):
    array = np.arange(12).reshape(4, 3).astype(dtype)
    batch = check_batch(arrange(array), "predictions", "(B, D)")
    assert batch.tolist() == np.asarray(arrange(array)).tolist()
    assert str(batch.dtype) == f"torch.{array.dtype.name}"


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros((2, 3), np.longdouble),
        np.zeros((2, 3), object),
        np.full((2, 3), "a"),
        np.zeros((2, 3), "datetime64[s]"),
        torch.zeros(2, 3).to(torch.float8_e4m3fn),
        torch.zeros(2, 3).to(torch.float8_e5m2),
        [np.zeros(3, np.longdouble)],
    ],
    ids=["longdouble", "objects", "text", "dates", "float8_e4m3fn", "float8_e5m2", "list"],
)
def test_dtypes_without_operations_are_refused(samples):
    with pytest.raises(ValueError, match="`predictions` has dtype .*, allowed"):
        check_batch(samples, "predictions", "(B, D)")
