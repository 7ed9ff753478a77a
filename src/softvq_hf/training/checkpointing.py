"""Checkpoints of a training run: written beside and renamed, rotated, found again, loaded.

A checkpoint is a folder `checkpoint-N` with what accelerate saves (models, optimizers, loss scale), `ema.safetensors`
and `trainer_state.json`.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LRScheduler

from softvq_hf.training.state import TrainerState


logger = get_logger(__name__)

STATE_FILE = "trainer_state.json"
EMA_FILE = "ema.safetensors"


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


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    state: TrainerState,
    checkpoints_total_limit: int | None = None,
    *,
    ema: EMAModel | None = None,
    buffers: dict[str, torch.nn.Module] | None = None,
    lr_schedulers: Sequence[LRScheduler] = (),
) -> Path:
    """
    Write `checkpoint-{state.step}`, then delete the oldest checkpoints over the limit. To be called on all processes.

    Args:
        accelerator (`Accelerator`): Holds the prepared models and optimizers.
        output_dir (`str` or `Path`): Folder of the run.
        state (`TrainerState`): Where the run stands.
        checkpoints_total_limit (`int`, *optional*): Checkpoints to keep.
        ema (`EMAModel`, *optional*): Averaged weights.
        buffers (`dict`, *optional*): Modules by name that are not prepared but have a state, e.g. running averages.
        lr_schedulers (sequence of `LRScheduler`): Schedules, which are not prepared.

    Returns:
        `Path`: The folder of the checkpoint.
    """
    output_dir = Path(output_dir)
    final, partial = output_dir / f"checkpoint-{state.step}", output_dir / f".checkpoint-{state.step}.partial"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)

    if accelerator.is_main_process:
        trainer_state = {
            "trainer": state.state_dict(),
            "lr_schedulers": [scheduler.state_dict() for scheduler in lr_schedulers],
            "buffers": sorted(buffers or {}),
        }
        for name, module in (buffers or {}).items():
            save_file(module.state_dict(), partial / f"{name}.safetensors")
        if ema is not None:
            ema_state = ema.state_dict()
            shadow_params = ema_state.pop("shadow_params")
            save_file({f"{i:05d}": p.contiguous() for i, p in enumerate(shadow_params)}, partial / EMA_FILE)
            trainer_state["ema"] = ema_state
        (partial / STATE_FILE).write_text(json.dumps(trainer_state, indent=2))
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        if checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[:-checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    logger.info(f"Saved {final}")
    return final


def load_checkpoint(
    accelerator: Accelerator,
    path: str | Path,
    state: TrainerState,
    *,
    ema: EMAModel | None = None,
    buffers: dict[str, torch.nn.Module] | None = None,
    lr_schedulers: Sequence[LRScheduler] = (),
) -> None:
    """
    Load what [`save_checkpoint`] wrote into the same objects, given in the same order.

    Raises:
        ValueError: If the checkpoint was written by a run with other parts (averaged weights, schedules) or models.
    """
    path = Path(path)
    trainer_state = json.loads((path / STATE_FILE).read_text())
    saved = {
        "use_ema": "ema" in trainer_state,
        "number of optimizers": len(trainer_state["lr_schedulers"]),
        "running averages": trainer_state["buffers"],
    }
    wanted = {
        "use_ema": ema is not None,
        "number of optimizers": len(lr_schedulers),
        "running averages": sorted(buffers or {}),
    }
    if saved != wanted:
        raise ValueError(f"`--resume_from_checkpoint` {path} was written with {saved}, this run has {wanted}.")

    try:
        accelerator.load_state(path)
    except RuntimeError as error:  # torch's word for weights of other names or shapes
        raise ValueError(
            f"`--resume_from_checkpoint` {path} holds other models than this run builds. Train the new model in"
            f" another `--output_dir`, or remove the old one. {error}"
        ) from error
    for scheduler, scheduler_state in zip(lr_schedulers, trainer_state["lr_schedulers"], strict=True):
        scheduler.load_state_dict(scheduler_state)
    for name, module in (buffers or {}).items():
        module.load_state_dict(load_file(path / f"{name}.safetensors"))
    if ema is not None:
        shadow_params = load_file(path / EMA_FILE)
        shadow_params = [shadow_params[name] for name in sorted(shadow_params)]
        ema.load_state_dict({**trainer_state["ema"], "shadow_params": shadow_params})
        ema.to(accelerator.device)
    state.load_state_dict(trainer_state["trainer"])
    logger.info(f"Resumed from {path} at step {state.step}")
