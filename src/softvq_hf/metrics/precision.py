"""The precision that figures are computed in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """
    Within it float32 is float32, whatever is set around it: without autocast, and without TF32, whose 10 bits CUDA
    takes for convolutions by default, and for matrix products if it is asked to.

    Args:
        device_type (`str`): Where the numbers are, such as `"cuda"`.
    """
    operations = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision
