"""Checkpoints of a training run: written beside and renamed, rotated, found again, compared with the run, loaded.

A checkpoint is a folder `checkpoint-N` with what accelerate saves (models, optimizers, loss scale, random states),
`ema.safetensors`, one `process-R.pt` for each process and `trainer_state.json`. It gets its name when all of it is on
the disk, and loses it before the first file is deleted: what is half-written or half-deleted begins with a dot.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.lr_scheduler import LRScheduler

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.distributed import full_tensors, shard_like
from softvq_hf.training.state import TrainerState


logger = get_logger(__name__)

STATE_FILE = "trainer_state.json"
EMA_FILE = "ema.safetensors"

# Arguments that may be others when a run is resumed. The weights do not depend on them, or by rounding alone
# (`compile`, `channels_last`).
FREE_ARGUMENTS = {
    # folders, logs, trackers, Hub
    *("output_dir", "cache_dir", "logging_dir", "logging_steps", "report_to", "tracker_project_name"),
    *("push_to_hub", "hub_model_id", "hub_private", "resume_from_checkpoint"),
    # when to save and when to stop
    *("checkpointing_steps", "checkpoints_total_limit", "max_nonfinite_batches", "max_unreadable_fraction"),
    # validation and samples
    *("validation_steps", "validation_split", "max_validation_samples", "num_validation_images", "sampler"),
    *("num_inference_steps", "guidance_scale", "num_sample_classes", "num_samples_per_class"),
    *("num_diffusion_steps", "temperature", "guidance_schedule", "clip_sample_range"),
    # how the same computation is done
    *("dataloader_num_workers", "gradient_checkpointing", "compile", "channels_last"),
    # compared by what they amount to: images per update, and the precision that accelerate settled on
    *("train_batch_size", "gradient_accumulation_steps", "global_batch_size", "mixed_precision"),
}
# Arguments that name a file or folder, which may have moved.
PATH_ARGUMENTS = {
    *(
        "dataset_name",
        "train_data_dir",
        "latents_dir",
        "vae",
        "pretrained_model_name_or_path",
        "encoder_init",
        "perceptual_trunk",
    ),
    *("discriminator_backbone", "alignment_teacher", "repa_teacher"),
    *("auxiliary_dinov2_teacher", "auxiliary_clip_teacher"),
}
# Schedules that are the same for every length of the run, which may therefore change.
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
LENGTH_ARGUMENTS = ("max_train_steps", "num_train_epochs")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message says which one is intact."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints in `output_dir`, oldest first."""
    folders = [
        path
        for path in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / STATE_FILE).is_file()
    ]
    return sorted(folders, key=_checkpoint_step)


def _checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def clean_up(output_dir: str | Path) -> None:
    """
    Remove half-written and half-deleted checkpoints, which an interruption left behind.

    For the start of a run; [`save_checkpoint`] does it too. No other run may be writing to `output_dir`.
    """
    for suffix in ("partial", "deleted"):
        for path in Path(output_dir).glob(f".checkpoint-*.{suffix}"):
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        resume_from_checkpoint (`str`, *optional*):
            A checkpoint folder (a path, or its name in `output_dir`) or "latest".

    Returns:
        `Path`, or `None` for a fresh start: nothing to resume was asked for, or "latest" found no checkpoint.

    Raises:
        ValueError: If the checkpoint does not exist or is not complete; if `output_dir` holds checkpoints that a fresh
            start, or a start from an earlier checkpoint, would mix with its own.
    """
    present = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if present:
            raise ValueError(
                f"`--output_dir` {str(output_dir)!r} holds the checkpoints of an earlier run (last:"
                f" {present[-1].name}). Pass `--resume_from_checkpoint latest` to go on, or choose another folder."
            )
        return None
    if resume_from_checkpoint == "latest":
        return present[-1] if present else None

    path = Path(resume_from_checkpoint)
    if not path.is_dir():
        path = Path(output_dir) / path.name
    if not (path / STATE_FILE).is_file():
        raise ValueError(
            f"`--resume_from_checkpoint` is {resume_from_checkpoint!r}, allowed: 'latest' or the folder of a complete"
            f" checkpoint; `--output_dir` has: {', '.join(p.name for p in present) or 'none'}."
        )
    if present and path.resolve() != present[-1].resolve():
        raise ValueError(
            f"`--resume_from_checkpoint` is {resume_from_checkpoint!r}, but `--output_dir` holds"
            f" {present[-1].name}: remove the checkpoints after the one to resume from, or choose another"
            " `--output_dir`."
        )
    return path


def open_output_dir(accelerator: Accelerator, args: TrainingArguments) -> Path | None:
    """
    Remove what an interrupted run left half-written in `args.output_dir`, and find the checkpoint to resume from.
    Collective, before any work is done.

    Returns:
        `Path`: A complete checkpoint that fits the arguments; `None` for a fresh start.

    Raises:
        ValueError: As [`find_checkpoint`] and [`check_resumable`].
    """
    if accelerator.is_main_process:
        clean_up(args.output_dir)
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_resumable(checkpoint, args, accelerator.num_processes)
    return checkpoint


def check_resumable(checkpoint: str | Path, args: TrainingArguments, num_processes: int) -> None:
    """
    Compare the arguments of a run with those that its checkpoint was written with, before any work is done.

    The arguments in `FREE_ARGUMENTS` may differ, and the length of a run whose learning rate does not depend on it. An
    update may be split differently into processes and accumulated batches, if it has as many images as before. A file
    or folder of `PATH_ARGUMENTS` may have another path, if that exists: it is taken for the same, with a warning.

    Args:
        checkpoint (`str` or `Path`): A complete checkpoint, from [`find_checkpoint`].
        args (`TrainingArguments`): Arguments of the run that is to go on.
        num_processes (`int`): Processes of the run that is to go on.

    Raises:
        ValueError: If the run would not be the same one, with all that differs; if the checkpoint does not say what it
            was written with.
    """
    trainer_state = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
    if "arguments" not in trainer_state:
        raise ValueError(
            f"`--resume_from_checkpoint` {checkpoint} was written by an older version of softvq_hf, which did not keep"
            " the arguments of the run and drew its random numbers differently. Finish the run with that version, or"
            " start a new one in another `--output_dir`, from its weights with `--pretrained_model_name_or_path`."
        )
    if trainer_state["arguments_class"] != type(args).__name__:
        raise ValueError(
            f"`--resume_from_checkpoint` {checkpoint} belongs to a run with {trainer_state['arguments_class']}, this"
            f" script takes {type(args).__name__}."
        )

    saved = trainer_state["arguments"]
    given = json.loads(json.dumps(args.to_dict()))  # tuples become lists, as in what was saved
    defaults = {item.name: item.default for item in dataclasses.fields(args)}
    free = set(FREE_ARGUMENTS)
    if args.streaming:
        free.remove("dataloader_num_workers")  # a stream is divided among them
    if args.lr_scheduler in CONSTANT_SCHEDULES:
        free.update(LENGTH_ARGUMENTS)

    differences = []
    for name in [*given, *(name for name in saved if name not in given)]:
        # an argument that is newer than the checkpoint did not change anything then: that is its default
        before = saved.get(name, defaults.get(name))
        now = given.get(name, "not an argument of this version")
        if name in free or before == now:
            continue
        if name in PATH_ARGUMENTS and before is not None and now is not None and Path(now).exists():
            logger.warning(f"`--{name}` was {before!r} and is {now!r} now, taken for the same at another place.")
        elif isinstance(before, dict) and isinstance(now, dict):
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    values = [repr(part[key]) if key in part else "not given" for part in (before, now)]
                    differences.append(f"`{name}.{key}`: saved {values[0]}, given {values[1]}")
        else:
            note = ""
            if name in LENGTH_ARGUMENTS:
                note = f" (`--lr_scheduler {args.lr_scheduler}` depends on the length of the run)"
            differences.append(f"`--{name}`: saved {before!r}, given {now!r}{note}")

    before, now = trainer_state["batch_split"], _batch_split(args, num_processes)
    images = [split[0] * split[1] * split[2] for split in (before, now)]
    words = ["{} images x {} process(es) x {} accumulated".format(*split) for split in (before, now)]
    if images[0] != images[1]:
        differences.append(f"images per update: saved {images[0]} ({words[0]}), given {images[1]} ({words[1]})")
    elif args.streaming and before != now:
        differences.append(f"batches of a stream, whose position belongs to them: saved {words[0]}, given {words[1]}")
    elif trainer_state["trainer"]["batch"] * before[0] * before[1] % (now[0] * now[1]) != 0:
        differences.append(
            f"images per batch: saved {before[0] * before[1]}, given {now[0] * now[1]}, of which the"
            f" {trainer_state['trainer']['batch'] * before[0] * before[1]} images that this pass has used up are no"
            " whole number"
        )
    elif before[2] != now[2]:
        logger.warning(
            f"An update was {words[0]} and is {words[1]} now: losses that are no means over images (codebook entropy,"
            " LeCAM, adaptive weight) and BatchNorm see other batches."
        )
    step = trainer_state["trainer"]["step"]
    if args.max_train_steps is not None and args.max_train_steps < step:
        differences.append(
            f"`--max_train_steps`: given {args.max_train_steps}, the checkpoint has {step} updates done"
        )
    if differences:
        raise ValueError(
            f"`--resume_from_checkpoint` {checkpoint} belongs to a run with other arguments, which would not go on but"
            " become another one. Give the saved values, or choose another `--output_dir`. "
            + "; ".join(differences)
            + "."
        )


def _batch_split(args: TrainingArguments, num_processes: int) -> list[int]:
    """What makes up the images of an update: those of a batch, processes, accumulated batches."""
    return [args.train_batch_size, num_processes, args.resolve_accumulation(num_processes)]


def save_checkpoint(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: TrainerState,
    *,
    ema: EMAModel | None = None,
    buffers: dict[str, torch.nn.Module] | None = None,
    lr_schedulers: Sequence[LRScheduler] = (),
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """
    Write `checkpoint-{state.step}`, then delete the oldest checkpoints over the limit. To be called on all processes,
    between updates.

    Nothing is written if the checkpoint is there already. Until the new one is complete and on the disk, its name
    begins with a dot and all earlier ones stay.

    Args:
        accelerator (`Accelerator`): Holds the prepared models and optimizers.
        args (`TrainingArguments`): Arguments of the run; they are kept with it.
        state (`TrainerState`): Where the run stands.
        ema (`EMAModel`, *optional*): Averaged weights, sharded as the model is.
        buffers (`dict`, *optional*): Modules by name that are not prepared but have a state, e.g. running averages.
        lr_schedulers (sequence of `LRScheduler`): Schedules, which are not prepared.
        tokenizer (`dict`, *optional*):
            Of a generator, what its latents are of, as JSON can hold it:
            [`~softvq_hf.training.generator.describe_tokenizer`].

    Returns:
        `Path`: The folder of the checkpoint.

    Raises:
        CheckpointError: On all processes, if one of them could not write its part, e.g. to a full disk. What was
            written is removed, and the earlier checkpoints are as they were.
    """
    output_dir = Path(args.output_dir)
    final = output_dir / f"checkpoint-{state.step}"
    partial, deleted = (output_dir / f".{final.name}.{suffix}" for suffix in ("partial", "deleted"))
    if broadcast_object_list([(final / STATE_FILE).is_file()])[0]:
        return final
    averages = None if ema is None else full_tensors(ema.shadow_params)  # collective: before anything can fail

    with _all_or_none(accelerator, final, partial):
        if accelerator.is_main_process:
            clean_up(output_dir)
            partial.mkdir(parents=True)
    with _all_or_none(accelerator, final, partial):
        unstepped = _unstepped_optimizers(accelerator)
        accelerator.save_state(partial)
        _forget_steps(accelerator, unstepped)
        torch.save(state.process_state_dict(), partial / f"process-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            for name, module in (buffers or {}).items():
                save_file(module.state_dict(), partial / f"{name}.safetensors")
            if averages is not None:
                save_file({f"{i:05d}": average.contiguous() for i, average in enumerate(averages)}, partial / EMA_FILE)
    with _all_or_none(accelerator, final, partial):
        if accelerator.is_main_process:
            missing = [i for i in range(accelerator.num_processes) if not (partial / f"process-{i}.pt").is_file()]
            if missing:
                raise FileNotFoundError(
                    f"files of the processes {missing}: `--output_dir` must be one folder that all machines share"
                )
            trainer_state = {
                "trainer": state.state_dict(),
                "lr_schedulers": [scheduler.state_dict() for scheduler in lr_schedulers],
                "unstepped_optimizers": unstepped,
                "buffers": sorted(buffers or {}),
                "arguments_class": type(args).__name__,
                "arguments": args.to_dict(),
                "batch_split": _batch_split(args, accelerator.num_processes),
                "mixed_precision": accelerator.mixed_precision,
                "sharding": _sharding(accelerator),
            }
            if tokenizer is not None:
                trainer_state["tokenizer"] = tokenizer
            if ema is not None:
                trainer_state["ema"] = {k: v for k, v in ema.state_dict().items() if k != "shadow_params"}
            for path in partial.rglob("*"):
                _sync(path)
            (partial / STATE_FILE).write_text(json.dumps(trainer_state, indent=2), encoding="utf-8")
            _sync(partial / STATE_FILE)
            _sync(partial)
            if final.exists():  # not complete, or it would have been returned
                final.rename(deleted)
            partial.rename(final)
            _sync(output_dir)

    if accelerator.is_main_process:
        if args.checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                old.rename(output_dir / f".{old.name}.deleted")  # a kill must not leave half of it under its name
        clean_up(output_dir)
    accelerator.wait_for_everyone()
    logger.info(f"Saved {final}")
    return final


@contextmanager
def _all_or_none(accelerator: Accelerator, final: Path, partial: Path) -> Iterator[None]:
    """An error of one process inside ends in `CheckpointError` on all of them, so that none waits for another."""
    error = None
    try:
        yield
    except (Exception, CheckpointException) as caught:  # full disks have as many names as there are file formats
        error = caught
    errors = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if not any(errors):
        return

    reasons = [f"process {i}: {reason}" if len(errors) > 1 else reason for i, reason in enumerate(errors) if reason]
    free = ""
    with suppress(OSError):  # the folder may be gone
        free = f" ({shutil.disk_usage(final.parent).free / 2**20:.0f} MiB were free there)"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    intact = list_checkpoints(final.parent)
    raise CheckpointError(
        f"Step {_checkpoint_step(final)} could not be saved as {final}{free}."
        + (f" The last checkpoint, {intact[-1].name}, is intact." if intact else " There is no earlier checkpoint.")
        + " Make room, lower `--checkpoints_total_limit`, and go on with `--resume_from_checkpoint latest`. "
        + "; ".join(reasons)
    ) from error


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)


def _sharding(accelerator: Accelerator) -> str | None:
    """What decides the files of models and optimizers."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return accelerator.distributed_type.value
    return None


def _unstepped_optimizers(accelerator: Accelerator) -> list[int]:
    """Positions of the optimizers that have taken no step yet, as a discriminator's that starts later."""
    return [i for i, optimizer in enumerate(accelerator._optimizers) if not optimizer.state]


def _forget_steps(accelerator: Accelerator, positions: Sequence[int]) -> None:
    """Undo that FSDP2, in saving and loading, steps an optimizer without state with zeros, which Adam would count."""
    if accelerator.distributed_type == DistributedType.FSDP:
        for position in positions:
            accelerator._optimizers[position].state.clear()


def load_checkpoint(
    accelerator: Accelerator,
    path: str | Path,
    args: TrainingArguments,
    state: TrainerState,
    *,
    ema: EMAModel | None = None,
    buffers: dict[str, torch.nn.Module] | None = None,
    lr_schedulers: Sequence[LRScheduler] = (),
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """
    Load what [`save_checkpoint`] wrote into the same objects, given in the same order. To be called on all processes,
    after [`check_resumable`].

    Where a batch is split differently now, `state.batch` counts the batches of this run.

    Raises:
        ValueError: If the checkpoint was written by a run with other parts (averaged weights, schedules), models,
            precision or sharding, or on the latents of another tokenizer.
        CheckpointError: If a file cannot be read.
    """
    path = Path(path)
    trainer_state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    saved = {
        "use_ema": "ema" in trainer_state,
        "number of optimizers": len(trainer_state["lr_schedulers"]),
        "running averages": trainer_state["buffers"],
        "mixed_precision": trainer_state["mixed_precision"],
        "sharding": trainer_state["sharding"],
    }
    wanted = {
        "use_ema": ema is not None,
        "number of optimizers": len(lr_schedulers),
        "running averages": sorted(buffers or {}),
        "mixed_precision": accelerator.mixed_precision,
        "sharding": _sharding(accelerator),
    }
    if saved != wanted:
        raise ValueError(f"`--resume_from_checkpoint` {path} was written with {saved}, this run has {wanted}.")
    before = trainer_state.get("tokenizer", tokenizer)  # older checkpoints do not say
    if before != tokenizer:
        raise ValueError(
            f"`--resume_from_checkpoint` {path} was trained on latents of the tokenizer {before}, this run has those"
            f" of {tokenizer}. Allowed: latents of the same tokenizer, normalised alike."
        )

    try:
        _load_parts(accelerator, path, trainer_state, state, ema, buffers or {}, lr_schedulers)
    except (Exception, CheckpointException) as error:
        if "state_dict" in str(error) or "state dict" in str(error):  # torch's word for other names or shapes
            raise ValueError(
                f"`--resume_from_checkpoint` {path} holds other models than this run builds. Train the new model in"
                f" another `--output_dir`, or remove the old one. {error}"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read. Remove it to go on from the checkpoint before it. {type(error).__name__}: {error}"
        ) from error

    before, now = trainer_state["batch_split"], _batch_split(args, accelerator.num_processes)
    if before != now:
        state.batch = state.batch * before[0] * before[1] // (now[0] * now[1])
        accelerator.step = 0  # batches of the update that has begun
    logger.info(f"Resumed from {path} at step {state.step}")


def _load_parts(
    accelerator: Accelerator,
    path: Path,
    trainer_state: dict[str, Any],
    state: TrainerState,
    ema: EMAModel | None,
    buffers: dict[str, torch.nn.Module],
    lr_schedulers: Sequence[LRScheduler],
) -> None:
    accelerator.load_state(path)
    _forget_steps(accelerator, trainer_state.get("unstepped_optimizers", []))
    for scheduler, scheduler_state in zip(lr_schedulers, trainer_state["lr_schedulers"], strict=True):
        scheduler.load_state_dict(scheduler_state)
    for name, module in buffers.items():
        module.load_state_dict(load_file(path / f"{name}.safetensors"))
    if ema is not None:
        averages = load_file(path / EMA_FILE)
        ema.load_state_dict(trainer_state["ema"])
        ema.shadow_params = shard_like([averages[name] for name in sorted(averages)], ema.shadow_params)

    state.load_state_dict(trainer_state["trainer"])
    # more or fewer processes than before share what all of them met
    for rank in range(accelerator.process_index, trainer_state["batch_split"][1], accelerator.num_processes):
        process_state = torch.load(path / f"process-{rank}.pt", weights_only=True)
        if rank == accelerator.process_index:
            state.load_process_state_dict(process_state)
        for image in process_state["unreadable"]:
            if image not in state.unreadable:
                state.unreadable.append(image)
