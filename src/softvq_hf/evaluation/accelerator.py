"""The processes of an evaluation, and what they have seen together."""

from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object

from softvq_hf.metrics.streaming import Accumulator


# How long processes wait for the slowest one, while they have no images left, or the main one computes or downloads.
LONGEST_WAIT = timedelta(hours=6)

AccumulatorT = TypeVar("AccumulatorT", bound=Accumulator)


def build_accelerator(mixed_precision: str = "no") -> Accelerator:
    """
    The `Accelerator` of an evaluation, on processors as well, where processes may wait for each other for six hours.

    Args:
        mixed_precision (`str`, *optional*, defaults to `"no"`): Autocast dtype of the model: "no", "fp16" or "bf16".
    """
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it each of several CPU processes passes for the only one
        mixed_precision=mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )


def merge_over_processes(accumulator: AccumulatorT) -> AccumulatorT:
    """
    What all processes have accumulated. Collective; every process gets it.

    Args:
        accumulator (`Accumulator`): That of this process. Alone it is returned as it is.

    Returns:
        `Accumulator`: those of all processes, merged in the order of their ranks.
    """
    merged, *others = gather_object([accumulator])
    for other in others:
        merged.merge(other)
    return merged
