"""Batches of numbers as metrics take them: one tensor, all of it finite."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_tensor(values: torch.Tensor | np.ndarray, argument: str) -> torch.Tensor:
    """
    A tensor of any kind of array: also of one that runs backwards, or is of another byte order than this machine's.

    Args:
        values (`torch.Tensor` or `numpy.ndarray`): Of any shape.
        argument (`str`): What the caller calls them, for the errors.

    Returns:
        `torch.Tensor`: dtype and numbers as they were.

    Raises:
        ValueError: If they are of a dtype that torch has no operations on, such as text, objects, float128 or float8.
    """
    if isinstance(values, np.ndarray):
        try:
            if not values.dtype.isnative or min(values.strides, default=0) < 0:
                values = values.astype(values.dtype.newbyteorder("="), order="C")  # a copy in the order of its axes
            values = torch.from_numpy(values)
        except TypeError as error:
            raise ValueError(
                f"`{argument}` has dtype {values.dtype}, allowed: integers, or floating point of 16 to 64 bits."
            ) from error
    if values.dtype.is_floating_point and values.dtype.itemsize < 2:
        raise ValueError(f"`{argument}` has dtype {values.dtype}, allowed for floating point: 16 to 64 bits.")
    return values


def check_batch(samples: Any, argument: str, shape: str) -> torch.Tensor:
    """
    A batch of samples as one tensor on the CPU.

    Args:
        samples: `torch.Tensor` or `numpy.ndarray`, or a sequence of them without the batch dimension.
        argument (`str`): What the caller calls them, for the errors.
        shape (`str`): The shape that they must have, such as `"(B, L, C)"`: what it says goes into the errors, its
            number of dimensions is checked.

    Returns:
        `torch.Tensor`: dtype and numbers as they were.

    Raises:
        ValueError: If there is no sample, their shapes differ, or they are of another type, dtype or number of
            dimensions.
    """
    if isinstance(samples, Sequence):
        if len(samples) == 0:
            raise ValueError(f"`{argument}` holds no sample.")
        if not all(isinstance(sample, (torch.Tensor, np.ndarray)) for sample in samples):
            raise ValueError(f"`{argument}` holds {samples[0]!r}, allowed: tensors and arrays.")
        shapes = sorted({tuple(sample.shape) for sample in samples})
        if len(shapes) > 1:
            raise ValueError(f"`{argument}` holds samples of the shapes {shapes}, allowed: one shape.")
        batch = torch.stack([to_tensor(sample, argument) for sample in samples])
    elif isinstance(samples, (torch.Tensor, np.ndarray)):
        batch = to_tensor(samples, argument)
    else:
        raise ValueError(f"`{argument}` is of type {type(samples).__name__}, allowed: a tensor or an array.")
    if batch.ndim != shape.count(",") + 1 or batch.numel() == 0:
        raise ValueError(f"`{argument}` has shape {tuple(batch.shape)}, allowed: {shape}, none of them 0.")
    return batch.detach().cpu()


def not_finite(samples: torch.Tensor) -> list[int]:
    """
    Which samples of a batch hold a value that is not finite (NaN or infinite).

    Args:
        samples (`torch.Tensor` of shape `(B, ...)`, two dimensions or more): On any device, which is waited for once.

    Returns:
        `list[int]`: their places in the batch, in order.
    """
    broken = (~samples.isfinite()).flatten(1).any(1).cpu()
    return broken.nonzero().flatten().tolist()
