"""Batches of numbers as metrics take them: one tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


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
        ValueError: If there is no sample, their shapes differ, or they are of another type or number of dimensions.
    """
    if isinstance(samples, Sequence):
        if len(samples) == 0:
            raise ValueError(f"`{argument}` holds no sample.")
        if not all(isinstance(sample, (torch.Tensor, np.ndarray)) for sample in samples):
            raise ValueError(f"`{argument}` holds {samples[0]!r}, allowed: tensors and arrays.")
        shapes = sorted({tuple(sample.shape) for sample in samples})
        if len(shapes) > 1:
            raise ValueError(f"`{argument}` holds samples of the shapes {shapes}, allowed: one shape.")
        batch = torch.stack([torch.as_tensor(sample) for sample in samples])
    elif isinstance(samples, (torch.Tensor, np.ndarray)):
        batch = torch.as_tensor(samples)
    else:
        raise ValueError(f"`{argument}` is of type {type(samples).__name__}, allowed: a tensor or an array.")
    if batch.ndim != shape.count(",") + 1 or batch.numel() == 0:
        raise ValueError(f"`{argument}` has shape {tuple(batch.shape)}, allowed: {shape}, none of them 0.")
    return batch.detach().cpu()
