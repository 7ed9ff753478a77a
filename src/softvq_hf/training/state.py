"""Where a run stands, and the batches from there on: what an interruption must not change."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset


@dataclass
class TrainerState:
    """
    Args:
        step (`int`): Optimizer updates done.
        epoch (`int`): Passes over the data completed.
        batch (`int`): Batches of the current pass that were handed out (per process).
        seconds (`float`): Training time of the runs before this one.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter, repr=False)

    def elapsed(self) -> float:
        """Seconds of training so far, runs before an interruption included."""
        return self.seconds + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.epoch, "batch": self.batch, "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.epoch, self.batch = (state_dict[name] for name in ("step", "epoch", "batch"))
        self.seconds, self.started = state_dict["seconds"], time.perf_counter()


def prepare_dataloader(accelerator: Accelerator, dataloader: DataLoader) -> DataLoader:
    """The loader of this process. Streams have divided themselves among the processes already."""
    if not isinstance(dataloader.dataset, IterableDataset):
        return accelerator.prepare(dataloader)
    return prepare_data_loader(
        dataloader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
    )


def resolve_max_train_steps(
    dataloader: DataLoader, max_train_steps: int | None, num_train_epochs: int | None, accumulation_steps: int
) -> int:
    """Optimizer updates of the run: `max_train_steps`, or what `num_train_epochs` passes amount to."""
    if max_train_steps is not None:
        return max_train_steps
    return num_train_epochs * -(-len(dataloader) // accumulation_steps)


def check_dataset_size(dataset: Dataset, batch_size: int, num_processes: int) -> None:
    """
    Raises:
        ValueError: If the dataset cannot fill one batch on each process (training drops incomplete batches).
    """
    if isinstance(dataset, IterableDataset):
        return
    if len(dataset) < batch_size * num_processes:
        raise ValueError(
            f"`--train_batch_size` is {batch_size} on {num_processes} process(es), allowed: at most"
            f" {len(dataset) // num_processes}, for the dataset has {len(dataset)} samples."
        )


def training_batches(
    accelerator: Accelerator, dataloader: DataLoader, dataset: Dataset, state: TrainerState, max_train_steps: int
) -> Iterator[dict[str, Any]]:
    """
    Batches from where `state` stands until `state.step`, which the caller advances, reaches `max_train_steps`.

    Every pass has its own order, a function of seed and epoch; a resumed run skips what the interrupted one consumed.

    Args:
        accelerator (`Accelerator`): With `use_seedable_sampler` on.
        dataloader (`DataLoader`): The prepared loader of `dataset`.
        dataset (`Dataset`): Told the epoch itself, since a loader does not always pass it on.
        state (`TrainerState`): Read at the start; `epoch` and `batch` are kept up to date.
        max_train_steps (`int`): Optimizer updates in all.

    Raises:
        ValueError: If a whole pass yields no batch.
    """
    while state.step < max_train_steps:
        dataset.set_epoch(state.epoch)
        dataloader.set_epoch(state.epoch)
        loader = accelerator.skip_first_batches(dataloader, state.batch) if state.batch > 0 else dataloader
        for batch in loader:
            state.batch += 1
            yield batch
            if state.step >= max_train_steps:
                return
        if state.batch == 0:
            raise ValueError("The training data gave no full batch in a whole pass: lower `--train_batch_size`.")
        state.epoch, state.batch = state.epoch + 1, 0
