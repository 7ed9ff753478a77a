"""What a run says: `metrics.jsonl` beside the result, the trackers of accelerate, pictures, what it ran with."""

import importlib.metadata
import json
import math
import os
import platform
import secrets
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType, gather_object
from PIL import Image

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.state import TrainerState


METRICS_FILE = "metrics.jsonl"
ARGUMENTS_FILE = "args.yaml"
RUN_FILE = "run.json"


class MetricsLogger:
    """
    Writes one JSON object per line to `output_dir/metrics.jsonl` and the same values to the trackers.

    A line has "step" (optimizer updates done), "epoch" (passes over the data completed), "time" (seconds of training,
    earlier runs included) and the values by name. A resumed run drops the lines after its checkpoint, so that no step
    is there twice, and goes on with the curves of its trackers. Only the main process writes.

    Args:
        accelerator (`Accelerator`): Its trackers are started here.
        args (`TrainingArguments`): Their project, by default named as the output folder, and configuration.
        state (`TrainerState`): Where the run stands, after a checkpoint was loaded.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments, state: TrainerState):
        self.accelerator = accelerator
        self.output_dir = Path(args.output_dir)
        self.state = state
        if accelerator.is_main_process:
            path = self.output_dir / METRICS_FILE
            truncate_metrics(path, last_step=state.step)
            self.file = path.open("a", encoding="utf-8")
        if accelerator.log_with:
            accelerator.init_trackers(
                args.tracker_project_name or self.output_dir.resolve().name,
                config={k: v if isinstance(v, (int, float, str)) else str(v) for k, v in args.to_dict().items()},
                init_kwargs=self._tracker_options(),
            )

    def _tracker_options(self) -> dict[str, dict[str, Any]]:
        """What lets a resumed run go on with the curves of the interrupted one."""
        options = {}
        if self.state.step > 0:  # replaces the events that were written after the checkpoint
            options["tensorboard"] = {"purge_step": self.state.step + 1}
        if LoggerType.WANDB in self.accelerator.log_with and self.accelerator.is_main_process:
            folder = Path(self.accelerator.logging_dir)
            folder.mkdir(parents=True, exist_ok=True)
            id_file = folder / "wandb_run_id"
            if self.state.step == 0 or not id_file.is_file():
                id_file.write_text(secrets.token_hex(4))
            options["wandb"] = {
                "id": id_file.read_text(),
                "resume": "allow",
                "name": self.output_dir.resolve().name,
                "dir": str(folder),
            }
        return options

    def log(self, values: dict[str, float]) -> None:
        """
        Write `values` for the step that `state` stands at. One that is not finite becomes null: the gradient norm of
        an update that the loss scale of fp16 left out.
        """
        if self.accelerator.is_main_process:
            line = {"step": self.state.step, "epoch": self.state.epoch, "time": round(self.state.elapsed(), 3)}
            line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.accelerator.log(values, step=self.state.step)

    def last_validation(self) -> dict[str, float]:
        """Finite figures of the last validation, of an earlier run if this one had none; empty if there was none."""
        for line in reversed((self.output_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()):
            values = {
                name.removeprefix("validation/"): value
                for name, value in json.loads(line).items()
                if name.startswith("validation/") and value is not None
            }
            if values:
                return values
        return {}

    def log_image(self, folder: str, image: Image.Image) -> None:
        """Write `image` to `output_dir/folder/step-N.png` and to the trackers under the name `folder`."""
        if not self.accelerator.is_main_process:
            return
        (self.output_dir / folder).mkdir(exist_ok=True)
        image.save(self.output_dir / folder / f"step-{self.state.step}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({folder: np.asarray(image)[None]}, step=self.state.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({folder: [image]}, step=self.state.step)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.accelerator.is_main_process:
            self.file.close()
        self.accelerator.end_training()


def reduce_losses(accelerator: Accelerator, losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    Scalar losses averaged over all processes. Collective: every process calls it with the same names. A loss that is
    NaN or infinite on one process is so in the mean, hence on all of them.
    """
    means = accelerator.reduce(torch.stack([loss.detach().float() for loss in losses.values()]), "mean").tolist()
    return dict(zip(losses, means, strict=True))


def mean_over_batches(values: list[dict[str, float]]) -> dict[str, float]:
    """Figures of the batches of one update, averaged by name over the batches that have them."""
    names = dict.fromkeys(name for batch in values for name in batch)
    return {name: statistics.fmean(batch[name] for batch in values if name in batch) for name in names}


def step_statistics(accelerator: Accelerator, state: TrainerState, images: int, seconds: float) -> dict[str, float]:
    """
    Speed and memory of one optimizer update, to be called once for each: the clock of `state.data_seconds` and the
    peak of the device memory start afresh. It waits for no device.

    Args:
        accelerator (`Accelerator`): Names the device.
        state (`TrainerState`): Its `data_seconds` are the seconds of the update that were spent waiting for data.
        images (`int`): Images of the update, those of all processes together.
        seconds (`float`): Duration of the update, waiting for data included.

    Returns:
        `dict`: `images_per_second`; `data_wait_share`, the part of `seconds` that this process waited for data, in
        [0, 1]; `memory_gib`, the most memory that tensors of this process took on the device since the last call, or
        on the CPU and MPS, which share it, the resident memory of this process without its loaders, in GiB.
    """
    data_seconds, state.data_seconds = state.data_seconds, 0.0
    if accelerator.device.type in ("cpu", "mps"):
        memory = psutil.Process().memory_info().rss
    else:
        memory = torch.accelerator.max_memory_allocated(accelerator.device)
        torch.accelerator.reset_peak_memory_stats(accelerator.device)
    return {
        "images_per_second": images / seconds,
        "data_wait_share": data_seconds / seconds,
        "memory_gib": memory / 2**30,
    }


def truncate_metrics(path: Path, last_step: int) -> None:
    """Keep the lines of a `metrics.jsonl` up to `last_step`; a line cut off by a crash is dropped."""
    kept = []
    if path.is_file() and last_step > 0:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                continue
    write_atomically(path, "".join(kept))


def write_run_record(accelerator: Accelerator, args: TrainingArguments, state: TrainerState) -> None:
    """
    Write down what a run is made of, in `args.output_dir`. Collective, once per start, after a checkpoint was loaded.

    `args.yaml` has the resolved arguments of the last start; `--config` takes it. `run.json` is a list with one object
    per start, of which a start from step 0 is the first:

    - "started": date and time, UTC, ISO 8601; "step": optimizer updates that were done before.
    - "command": script and arguments; "versions": of libraries, Python, and the CUDA that torch was built with.
    - "git_revision", "git_dirty": commit of the repository in which the script lies, and whether a tracked file
      differs from it; null outside of a repository.
    - "distributed_type", as accelerate names it, and all of [`hardware_record`].

    The Hub token is in neither file.
    """
    hardware = hardware_record(accelerator)
    if not accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    revision, dirty = _git_revision(Path(sys.argv[0]).resolve().parent)
    start = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": state.step,
        "command": without_hub_token(sys.argv),
        "versions": library_versions(),
        "git_revision": revision,
        "git_dirty": dirty,
        "distributed_type": accelerator.distributed_type.value,
        **hardware,
    }
    run_file = output_dir / RUN_FILE
    earlier = json.loads(run_file.read_text(encoding="utf-8")) if state.step > 0 and run_file.is_file() else []
    write_atomically(run_file, json.dumps([*earlier, start], indent=2) + "\n")
    write_atomically(output_dir / ARGUMENTS_FILE, yaml.safe_dump(args.to_dict(), sort_keys=False))


def hardware_record(accelerator: Accelerator) -> dict[str, Any]:
    """
    What a process group runs on. Collective.

    Args:
        accelerator (`Accelerator`): The processes.

    Returns:
        `dict`: `devices`, number of processes by name of their device; `processor`, its name and number of logical
        cores on the machine of this process; `num_processes`; `mixed_precision`, as accelerate names it.
    """
    device = accelerator.device
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "devices": dict(Counter(gather_object([device_name]))),
        "processor": f"{_processor_name()}, {os.cpu_count()} cores",
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def _processor_name() -> str:
    """As Linux knows it, elsewhere as Python does, which may be the architecture alone."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def library_versions() -> dict[str, str | None]:
    """Versions of this package and of what it computes with, by name. "cuda" is `None` for a torch without it."""
    libraries = ("softvq-hf", "torch", "diffusers", "transformers", "accelerate", "datasets", "peft")
    versions = {library: importlib.metadata.version(library) for library in libraries}
    return {**versions, "python": platform.python_version(), "cuda": torch.version.cuda}


def without_hub_token(argv: Sequence[str]) -> list[str]:
    """Words of a command line without `--hub_token` and its value, in each of the spellings that argparse takes."""
    words, is_token = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if flag.replace("-", "_") == "__hub_token":
            is_token = not equals
        elif is_token:
            is_token = False
        else:
            words.append(word)
    return words


def _git_revision(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the repository that `folder` lies in and whether tracked files differ from it; `None` without one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return revision.removesuffix("-dirty"), revision.endswith("-dirty")


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads `path` finds the old text or the new one, also after a crash."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)
