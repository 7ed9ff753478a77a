"""Batches for the training scripts, from where a run stands on, and the list of images that could not be read."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from softvq_hf.training.preemption import ignore_interrupts
from softvq_hf.training.state import TrainerState


logger = get_logger(__name__)

UNREADABLE_FILE = "unreadable_images.txt"


def build_dataloader(
    accelerator: Accelerator,
    dataset: Dataset,
    batch_size: int,
    *,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None,
    num_workers: int,
    train: bool,
) -> DataLoader | StatefulDataLoader:
    """
    The loader of this process, prepared: not to be given to `accelerator.prepare` again.

    Worker processes outlive the signals that pre-empt a run, and loaders draw nothing from torch's global random
    number generator, whose state therefore does not depend on how often a run was interrupted.

    Args:
        accelerator (`Accelerator`): With `use_seedable_sampler` on and `even_batches` off.
        dataset (`Dataset`): A dataset of known length, which the processes share by index, or a stream
            ([`~softvq_hf.data.StreamingImageDataset`]), which has shared itself out already.
        batch_size (`int`): Samples in a batch of this process.
        collate_fn (`Callable`, *optional*): Makes a batch of items; by default torch's.
        num_workers (`int`): Worker processes, 0 to load in this one.
        train (`bool`): Shuffle, and leave out of every pass, other ones each time, the samples that make no whole
            update. (A stream shuffles itself, and [`training_batches`] drops its incomplete batches.) Otherwise
            everything comes in order, on the device of the accelerator.

    Returns:
        `DataLoader`; for training on a stream `StatefulDataLoader`, whose batches [`training_batches`] moves.
    """
    is_stream = isinstance(dataset, IterableDataset)
    options = {
        "batch_size": batch_size,
        "collate_fn": collate_fn,
        "num_workers": num_workers,
        "worker_init_fn": ignore_interrupts if num_workers > 0 else None,
        "persistent_workers": train and num_workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
        "generator": torch.Generator(),
    }
    if not is_stream:
        if not train:
            return accelerator.prepare(DataLoader(dataset, **options))
        # whole updates, so that a pass has the same images however an update is divided; in a data set that is smaller
        # than an update, whole batches
        batch = batch_size * accelerator.num_processes
        update = batch * accelerator.gradient_accumulation_steps
        num_samples = len(dataset) // update * update or len(dataset) // batch * batch
        sampler = RandomSampler(dataset, num_samples=num_samples)
        return accelerator.prepare(DataLoader(dataset, sampler=sampler, drop_last=True, **options))
    if train:
        return StatefulDataLoader(dataset, **options)
    return prepare_data_loader(
        DataLoader(dataset, **options),
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
    )


def resolve_max_train_steps(
    dataloader: DataLoader | StatefulDataLoader,
    max_train_steps: int | None,
    num_train_epochs: int | None,
    accumulation_steps: int,
) -> int:
    """
    Optimizer updates of the run: `max_train_steps`, or as many as the batches of `num_train_epochs` passes are enough
    for. Every update takes `accumulation_steps` batches, also across the end of a pass.

    Raises:
        ValueError: If passes are asked for of a stream, whose length is not known, or they are not enough for one
            update.
    """
    if max_train_steps is not None:
        return max_train_steps
    if isinstance(dataloader.dataset, IterableDataset):
        raise ValueError(
            f"`--num_train_epochs` is {num_train_epochs}, but the length of a stream is not known: give"
            " `--max_train_steps` instead."
        )
    steps = num_train_epochs * len(dataloader) // accumulation_steps
    if steps == 0:
        raise ValueError(
            f"`--num_train_epochs` is {num_train_epochs}, which is {num_train_epochs * len(dataloader)} batches on"
            f" each process, too few for one update of {accumulation_steps} accumulated batches. Allowed: more epochs,"
            " `--max_train_steps`, or fewer accumulated batches."
        )
    return steps


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
    accelerator: Accelerator,
    dataloader: DataLoader | StatefulDataLoader,
    dataset: Dataset,
    state: TrainerState,
    max_train_steps: int,
) -> Iterator[dict[str, Any]]:
    """
    Batches from where `state` stands until `state.step`, which the caller advances, reaches `max_train_steps`.

    Every pass has its own order, a function of seed and epoch. A resumed run gets exactly the batches that the
    uninterrupted one would have got: by index, or in a stream by the state of its loader. Processes come to the end of
    their parts of a stream at different times, so `state.epoch` and `state.batch` are then those of this process.

    Args:
        accelerator (`Accelerator`): The one that `dataloader` was built with.
        dataloader (`DataLoader` or `StatefulDataLoader`): Made by [`build_dataloader`] with `train=True`.
        dataset (`Dataset`): The dataset of `dataloader`.
        state (`TrainerState`): Read at the start. `epoch`, `batch` and `stream` are those after the batch handed out;
            ids of images found unreadable are added to `unreadable`, seconds spent on waiting to `data_seconds`.
        max_train_steps (`int`): Optimizer updates in all.

    Yields:
        `dict`: A full batch on the accelerator's device, without `unreadable`.

    Raises:
        ValueError: If a whole pass yields no batch.
    """
    is_stream = isinstance(dataset, IterableDataset)
    unreadable = set(state.unreadable)
    if is_stream and state.stream is not None:
        state.epoch, state.batch = state.stream["epoch"], state.stream["batch"]
        dataloader.load_state_dict(state.stream["dataloader"])
    while state.step < max_train_steps:
        dataset.set_epoch(state.epoch)
        batches = dataloader
        if not is_stream:
            dataloader.set_epoch(state.epoch)
            if state.batch > 0:
                batches = accelerator.skip_first_batches(dataloader, state.batch)
        batches = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            state.data_seconds += time.perf_counter() - started
            if batch is None:
                break
            for image_id in batch.pop("unreadable", ()):
                if image_id not in unreadable:
                    unreadable.add(image_id)
                    state.unreadable.append(image_id)
            if is_stream:
                if len(batch["pixel_values"]) < dataloader.batch_size:
                    continue
                batch = send_to_device(batch, accelerator.device, non_blocking=dataloader.pin_memory)
            state.batch += 1
            if is_stream:
                position = dataloader.state_dict()
                state.stream = {"epoch": state.epoch, "batch": state.batch, "dataloader": position}
            yield batch
            if state.step >= max_train_steps:
                return
        if state.batch == 0:
            raise ValueError(
                "The training data gave no full batch in a whole pass: lower `--train_batch_size`, or for a stream"
                " `--dataloader_num_workers`, each of which makes batches of its own part."
            )
        state.epoch, state.batch = state.epoch + 1, 0


def write_unreadable_report(accelerator: Accelerator, output_dir: str | Path, state: TrainerState) -> Path | None:
    """
    List the images that could not be read, one id per line, in `unreadable_images.txt`. To be called on all processes,
    at the end of a run.

    Args:
        accelerator (`Accelerator`): Gathers what the processes met.
        output_dir (`str` or `Path`): Folder of the run.
        state (`TrainerState`): `unreadable` of this process, runs before an interruption included.

    Returns:
        `Path` of the file on the main process; `None` if all images could be read, and on the other processes.
    """
    unreadable = sorted(set(gather_object(state.unreadable)))
    if not unreadable or not accelerator.is_main_process:
        return None
    path = Path(output_dir, UNREADABLE_FILE)
    path.write_text("".join(f"{image_id}\n" for image_id in unreadable), encoding="utf-8")
    logger.warning(f"{len(unreadable)} images could not be read and were left out; {path} lists them.")
    return path
