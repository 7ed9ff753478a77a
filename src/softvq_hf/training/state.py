"""Where a run stands: what an interruption must not change."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerState:
    """
    Counters of a run that a checkpoint keeps. What all processes share is in `state_dict`, what belongs to one process
    in `process_state_dict`.

    Args:
        step (`int`): Optimizer updates done.
        epoch (`int`): Passes over the data completed.
        batch (`int`): Batches of the current pass that were handed out (per process).
        seconds (`float`): Training time of the runs before this one.
        nonfinite_batches (`int`): Updates left out because a loss or a gradient was not finite.
        unreadable (`list[str]`):
            Ids of the unreadable images that this process met, in their order, each once.
        stream (`dict`, *optional*):
            Position of this process in a stream: the state of its `StatefulDataLoader`. `None` for data sets of known
            length, whose position is `epoch` and `batch`.
        data_seconds (`float`): Seconds spent on waiting for data since it was last set to 0; not kept.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    nonfinite_batches: int = 0
    unreadable: list[str] = field(default_factory=list)
    stream: dict[str, Any] | None = None
    data_seconds: float = field(default=0.0, repr=False)
    started: float = field(default_factory=time.perf_counter, repr=False)

    def elapsed(self) -> float:
        """Seconds of training so far, runs before an interruption included."""
        return self.seconds + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """What all processes share, as JSON can hold it."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.elapsed(),
            "nonfinite_batches": self.nonfinite_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` of an earlier run gave; its clock goes on from now."""
        self.step, self.epoch, self.batch = (state_dict[name] for name in ("step", "epoch", "batch"))
        self.nonfinite_batches = state_dict["nonfinite_batches"]
        self.seconds, self.started = state_dict["seconds"], time.perf_counter()

    def process_state_dict(self) -> dict[str, Any]:
        """What belongs to this process: its position in a stream, and the unreadable images it met."""
        return {"stream": self.stream, "unreadable": list(self.unreadable)}

    def load_process_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `process_state_dict` of the same process of an earlier run gave."""
        self.stream, self.unreadable = state_dict["stream"], list(state_dict["unreadable"])
