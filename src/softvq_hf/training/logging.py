"""What a run says: `metrics.jsonl` beside the result, the tracker of accelerate, and pictures in both."""

import json
import math
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.state import TrainerState


METRICS_FILE = "metrics.jsonl"


class MetricsLogger:
    """
    Writes one JSON object per line to `output_dir/metrics.jsonl` and the same values to the tracker.

    A line has "step" (optimizer updates done), "epoch" (passes over the data completed), "time" (seconds of training,
    earlier runs included) and the values by name. A resumed run drops the lines after its checkpoint, so that no step
    is there twice. Only the main process writes.

    Args:
        accelerator (`Accelerator`): Its trackers are started here.
        args (`TrainingArguments`): Tracker names and folders.
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
        if args.report_to != "none":
            # a resumed run replaces the events that the interrupted one wrote after the checkpoint
            accelerator.init_trackers(
                args.tracker_project_name or self.output_dir.resolve().name,
                config={k: v if isinstance(v, (int, float, str)) else str(v) for k, v in args.to_dict().items()},
                init_kwargs={"tensorboard": {"purge_step": state.step + 1}} if state.step > 0 else {},
            )

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
        """Figures of the last validation by name, of an earlier run if this one had none; empty if there was none."""
        for line in reversed((self.output_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()):
            values = {
                name.removeprefix("validation/"): value for name, value in json.loads(line).items() if "/" in name
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


def reduce_losses(accelerator: Accelerator, losses: dict[str, torch.Tensor], step: int) -> dict[str, float]:
    """
    Scalar losses averaged over all processes. To be called on all processes, before the weights are changed.

    Raises:
        FloatingPointError: On every process, if a loss of any process is NaN or infinite.
    """
    means = accelerator.reduce(torch.stack([loss.detach().float() for loss in losses.values()]), "mean").tolist()
    values = dict(zip(losses, means, strict=True))
    broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"{', '.join(broken)} at step {step}: training stops before the weights are spoilt. Resume from the last"
            " checkpoint with a lower `--learning_rate`, or with `--mixed_precision no` (or bf16 in place of fp16)."
        )
    return values


def mean_over_batches(values: list[dict[str, float]]) -> dict[str, float]:
    """Figures of the batches of one update, averaged by name over the batches that have them."""
    names = dict.fromkeys(name for batch in values for name in batch)
    return {name: statistics.fmean(batch[name] for batch in values if name in batch) for name in names}


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
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
