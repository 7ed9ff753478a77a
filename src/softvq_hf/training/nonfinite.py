"""What becomes of a batch whose loss or gradient is NaN or infinite: it is left out, counted, and named."""

import math

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.state import TrainerState


logger = get_logger(__name__)


def check_finite(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: TrainerState,
    values: dict[str, float],
    image_ids: list[str | int],
) -> bool:
    """
    Whether a batch may change the weights. If not, it is counted in `state` and named in a warning.

    To be called on all processes, with figures of the global batch (means over the processes), so that all of them
    decide alike. The caller leaves out the whole update that the batch belongs to.

    Args:
        accelerator (`Accelerator`): Gathers the identity of the batch.
        args (`TrainingArguments`): `max_nonfinite_batches` and `train_batch_size`.
        state (`TrainerState`): Counts such batches in `nonfinite_batches`, which checkpoints keep.
        values (`dict[str, float]`): Losses, or norms of gradients, by name.
        image_ids (`list`): Images of this process's batch.

    Returns:
        `bool`: `True` if all values are finite.

    Raises:
        FloatingPointError: On all processes, if there were more such batches than `max_nonfinite_batches`.
    """
    broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if not broken:
        return True
    state.nonfinite_batches += 1
    images = ", ".join(map(str, gather_object(list(image_ids))))
    message = f"{', '.join(broken)} at step {state.step + 1}, on the images {images}"
    if state.nonfinite_batches > args.max_nonfinite_batches:
        raise FloatingPointError(
            f"{message}: number {state.nonfinite_batches} of its kind, `--max_nonfinite_batches` is"
            f" {args.max_nonfinite_batches}. No update has spoilt the weights. Train anew, from an earlier result,"
            " with a lower `--learning_rate` or with `--mixed_precision no` (or bf16 in place of fp16)."
        )
    logger.warning(
        f"{message}: this update is left out ({state.nonfinite_batches} so far, {args.max_nonfinite_batches} allowed)"
    )
    return False
