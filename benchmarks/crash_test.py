"""Kill the training scripts at random moments, resume them, and compare the end with a run that was left alone.

    python benchmarks/crash_test.py --kills 24 --output crash_test.json

For each script a reference run is made, and another one that SIGKILL ends again and again:

- "starting": before the first update after a start, so while data and models are built or a checkpoint is read;
- "training": at any moment;
- "writing": while a checkpoint is being written; such a kill is repeated until it really left a half-written folder;
- "renaming": as a new checkpoint gets its name and the oldest one is deleted.

Between them the run is pre-empted by SIGTERM, which must end it with its own exit status and a checkpoint of the last
update.

After each kill `--resume_from_checkpoint latest` must find a complete checkpoint whose files can all be read, never an
older one than before, or none if there never was one. At the end all files of the checkpoints that are kept (weights,
both optimizers, averages, running statistics, random states, position in the data), the exported model and the metrics
must equal those of the reference bit for bit.

Models and images are tiny, in float32 on the CPU. Every start is a new process, forked from one that has the libraries
imported and nothing else. The result is a JSON file and a Markdown table; the exit status is 1 if anything differed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import runpy
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors.torch import load_file

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.checkpointing import STATE_FILE, find_checkpoint
from softvq_hf.training.preemption import PREEMPTED_EXIT_CODE


ROOT = Path(__file__).parents[1]
# Imported once, before the processes are forked that run the scripts.
PRELOADED = (
    *("softvq_hf.conversion", "softvq_hf.data", "softvq_hf.losses", "softvq_hf.pipelines.pipeline_softvq"),
    *("softvq_hf.training.accelerator", "softvq_hf.training.hub", "softvq_hf.training.validation"),
)

TOKENIZER = {
    "encoder_patch_size": 8,
    "decoder_patch_size": 8,
    "num_latent_tokens": 8,
    "latent_channels": 4,
    "codebook_size": 16,
    "num_codebooks": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 1,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
}
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
# 4 batches in a pass and 3 in an update: checkpoints lie anywhere in a pass
COMMON = {
    "train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "ema_decay": 0.9,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "validation_steps": 5,
    "report_to": "none",
}
ARGUMENTS = {
    "train_softvq": {
        **COMMON,
        "model": json.dumps(TOKENIZER),
        "dataset_name": "photographs",
        "resolution": 32,
        "max_train_samples": 16,
        "max_validation_samples": 2,
        "num_validation_images": 2,
        "discriminator": "patchgan",
        "adversarial_start": 3,
        "adaptive_adversarial_weight": True,
        "lecam_weight": 0.001,
    },
    "train_sit": {
        **COMMON,
        "model": json.dumps(TRANSFORMER),
        "num_inference_steps": 2,
        "num_sample_classes": 2,
        "num_samples_per_class": 1,
    },
}
KINDS = ("starting", "writing", "training", "preempting", "writing", "renaming")
CLOCKS = ("time", "images_per_second", "data_wait_share", "memory_gib")
TIMEOUT = 300.0  # seconds of a run, or until something is seen


def run_script(script: str, arguments: dict[str, Any], log_file: str) -> None:
    """Target of a process: what `python training/<script>.py --name=value ...` does."""
    with open(log_file, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    path = str(ROOT / "training" / f"{script}.py")
    sys.argv = [path, *(f"--{name}={value}" for name, value in arguments.items())]
    runpy.run_path(path, run_name="__main__")


class Run:
    """A training run in its folder, in one process after another."""

    def __init__(self, script: str, arguments: dict[str, Any], output_dir: Path):
        self.script = script
        self.output_dir = output_dir
        self.arguments = {**arguments, "output_dir": output_dir, "resume_from_checkpoint": "latest"}
        self.log_file = output_dir.with_suffix(".log")

    def start(self) -> None:
        self.started = time.perf_counter()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=run_script, args=(self.script, self.arguments, str(self.log_file))
        )
        self.process.start()

    def last_step(self) -> int:
        """Last update in the metrics, 0 before the first one; a line that is being written does not count."""
        path = self.output_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
        return steps[-1] if steps else 0

    def checkpoint_names(self) -> set[str]:
        """Names of checkpoints in the folder, hidden ones included."""
        try:
            return {entry.name for entry in os.scandir(self.output_dir) if "checkpoint-" in entry.name}
        except FileNotFoundError:
            return set()

    def wait_for(self, condition) -> bool:
        """Whether `condition()` became true before the process ended."""
        while not condition():
            if not self.process.is_alive():
                return False
            if time.perf_counter() - self.started > TIMEOUT:
                raise TimeoutError(f"{self.script} hangs, see {self.log_file}")
            time.sleep(0.0002)
        return True

    def finish(self) -> None:
        """Wait for the end of the process."""
        self.process.join(TIMEOUT)
        if self.process.exitcode != 0:
            raise RuntimeError(f"{self.script} ended with {self.process.exitcode}, see {self.log_file}")

    def preempt(self) -> bool:
        """SIGTERM; `False` if the process had ended by itself before."""
        self.process.terminate()
        self.process.join(TIMEOUT)
        if self.process.exitcode not in (0, PREEMPTED_EXIT_CODE):
            raise RuntimeError(f"{self.script} ended with {self.process.exitcode}, see {self.log_file}")
        return self.process.exitcode == PREEMPTED_EXIT_CODE

    def kill(self) -> bool:
        """SIGKILL; `False` if the process had ended by itself before."""
        self.process.kill()
        self.process.join()
        if self.process.exitcode not in (0, -9):
            raise RuntimeError(f"{self.script} ended with {self.process.exitcode}, see {self.log_file}")
        return self.process.exitcode == -9


@dataclass
class Report:
    """What was done to one script, and what came of it."""

    script: str
    steps: int
    kills: int = 0
    by_kind: Counter = field(default_factory=Counter)
    half_written: int = 0  # kills that left a half-written checkpoint
    mid_rotation: int = 0  # kills that left more checkpoints than are kept, or a half-deleted one
    before_first_checkpoint: int = 0
    preemptions: int = 0
    compared_files: int = 0
    compared_tensors: int = 0
    compared_metrics: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


def is_partial(name: str) -> bool:
    return name.endswith(".partial")


def measure(run: Run) -> tuple[float, float]:
    """Let a run go to its end; seconds until the first update, and seconds that writing a checkpoint takes."""
    run.start()
    run.wait_for(lambda: run.last_step() > 0)
    start_seconds = time.perf_counter() - run.started
    write_seconds = []
    while run.wait_for(lambda: any(map(is_partial, run.checkpoint_names()))):
        began = time.perf_counter()
        if not run.wait_for(lambda: not any(map(is_partial, run.checkpoint_names()))):
            break
        write_seconds.append(time.perf_counter() - began)
    run.finish()
    return start_seconds, sorted(write_seconds)[len(write_seconds) // 2]


def kill_at(kind: str, run: Run, start_seconds: float, write_seconds: float, draws: random.Random) -> bool:
    """Start the run and end it at a moment of this kind; `False` if it came to its end before."""
    first_step = run.last_step()
    run.start()
    if kind == "starting":
        time.sleep(draws.uniform(0, start_seconds))
        return run.kill()

    target = first_step + draws.randint(1, 3)
    run.wait_for(lambda: run.last_step() >= target)
    if kind == "preempting":
        return run.preempt()
    if kind == "training":
        time.sleep(draws.uniform(0, 3 * write_seconds))
    elif kind == "writing":
        run.wait_for(lambda: any(map(is_partial, run.checkpoint_names())))
        time.sleep(draws.uniform(0, write_seconds))
    else:
        before = {name for name in run.checkpoint_names() if not name.startswith(".")}
        run.wait_for(lambda: {name for name in run.checkpoint_names() if not name.startswith(".")} != before)
    return run.kill()


def load_all(folder: Path) -> dict[str, Any]:
    """All files of a folder with tensors or counters in them, by relative path, without what the clock decides."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            result[name] = load_file(path)
        elif path.suffix in (".bin", ".pt", ".pkl"):
            result[name] = accelerate.utils.load(path)  # weights_only, with what numpy's random state needs
        elif path.name == STATE_FILE:
            state = json.loads(path.read_text())
            del state["trainer"]["seconds"], state["arguments"]["output_dir"]
            result[name] = state
    return result


def differing(left: Any, right: Any, name: str) -> list[str]:
    """Names of what is not equal bit for bit in two nested structures."""
    if isinstance(left, torch.Tensor):
        equal = isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
        return [] if equal else [name]
    if type(left) is not type(right):
        return [name]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{name}: {sorted(map(str, left.keys() ^ right.keys()))}"]
        return [part for key in left for part in differing(left[key], right[key], f"{name}: {key}")]
    if isinstance(left, (list, tuple)) and len(left) == len(right):
        return [part for i in range(len(left)) for part in differing(left[i], right[i], f"{name}: {i}")]
    if hasattr(left, "tobytes"):
        return [] if left.tobytes() == right.tobytes() else [name]
    return [] if left == right else [name]


def count_tensors(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(count_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(count_tensors, value))
    return int(isinstance(value, torch.Tensor))


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Lines of the metrics without what the clock decides."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def crash_test(script: str, arguments: dict[str, Any], kills: int, folder: Path, draws: random.Random) -> Report:
    """Reference run, killed run, comparison."""
    began = time.perf_counter()
    # enough for all kills: from one to the next it gets about three updates further
    arguments = {**arguments, "max_train_steps": 4 * kills + 12}
    report = Report(script, arguments["max_train_steps"])
    reference = Run(script, arguments, folder / f"{script}-reference")
    start_seconds, write_seconds = measure(reference)
    print(f"{script}: reference run of {report.steps} updates; a checkpoint takes {write_seconds * 1000:.0f} ms")

    run = Run(script, arguments, folder / f"{script}-killed")
    latest_step = 0
    pending = list(KINDS) * kills
    while report.kills < kills:
        kind = pending.pop(0)
        if not kill_at(kind, run, start_seconds, write_seconds, draws):
            report.differences.append(f"the run ended after {report.kills} kills")
            break
        names = run.checkpoint_names()
        latest = find_checkpoint(run.output_dir, "latest")
        step = 0 if latest is None else load_all(latest)[STATE_FILE]["trainer"]["step"]
        if step < latest_step:
            report.differences.append(f"checkpoint-{latest_step} was lost by kill {report.kills} ({kind})")
        latest_step = step

        if kind == "preempting":
            report.preemptions += 1
            if step != run.last_step():
                report.differences.append(f"pre-empted after update {run.last_step()}, checkpoint-{step} was left")
        else:
            report.kills += 1
            report.by_kind[kind] += 1
            half_written = any(map(is_partial, names))
            report.half_written += half_written
            complete = [name for name in names if not name.startswith(".")]
            report.mid_rotation += (
                any(name.endswith(".deleted") for name in names)
                or len(complete) > arguments["checkpoints_total_limit"]
            )
            report.before_first_checkpoint += latest is None
            if kind == "writing" and not half_written:
                pending.insert(0, kind)
        print(f"{script}: kill {report.kills} ({kind}) left {', '.join(sorted(names)) or 'no checkpoint'}")

    run.start()
    run.finish()
    expected, found = load_all(reference.output_dir), load_all(run.output_dir)
    report.differences += differing(expected, found, script)
    expected_metrics, found_metrics = read_metrics(reference.output_dir), read_metrics(run.output_dir)
    report.differences += differing(expected_metrics, found_metrics, "metrics.jsonl")
    if any(name.startswith(".") for name in run.checkpoint_names()):
        report.differences.append(f"left over: {sorted(run.checkpoint_names())}")
    report.compared_files, report.compared_tensors = len(expected), count_tensors(expected)
    report.compared_metrics = sum(map(len, expected_metrics))
    report.seconds = time.perf_counter() - began
    return report


def prepare_latents(folder: Path) -> Path:
    """Cached latents of a tokenizer with random weights, for `train_sit`."""
    torch.manual_seed(0)
    AutoencoderSoftVQ(sample_size=32, **TOKENIZER).save_pretrained(folder / "tokenizer")
    arguments = {"pretrained_model_name_or_path": folder / "tokenizer", "dataset_name": "photographs"}
    run = Run("cache_latents", {**arguments, "max_train_samples": 16}, folder / "latents")
    del run.arguments["resume_from_checkpoint"]
    run.start()
    run.finish()
    return folder / "latents"


def table(reports: list[Report]) -> str:
    """Markdown."""
    lines = [
        "| script | kills | starting / training / writing / renaming | left a half-written checkpoint"
        " | left a rotation undone | before any checkpoint | pre-emptions | compared at the end | result |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        kinds = " / ".join(str(report.by_kind[kind]) for kind in ("starting", "training", "writing", "renaming"))
        compared = (
            f"{report.compared_tensors} tensors in {report.compared_files} files, {report.compared_metrics} metrics"
        )
        result = "bit-equal" if not report.differences else f"{len(report.differences)} differences"
        lines.append(
            f"| `{report.script}` | {report.kills} | {kinds} | {report.half_written} | {report.mid_rotation}"
            f" | {report.before_first_checkpoint} | {report.preemptions} | {compared} | {result} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=list(ARGUMENTS), default=list(ARGUMENTS))
    parser.add_argument("--kills", type=int, default=24, help="Kills per script.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--output", default="crash_test.json", help="JSON file; the table is beside it as .md.")
    parser.add_argument("--work_dir", help="Folder of the runs and their logs, kept; by default a temporary one.")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills is {args.kills}, allowed: integers from 1 on.")

    os.environ |= {
        **{"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "HF_HUB_OFFLINE": "1"},
        "OMP_NUM_THREADS": "1",
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    imports = context.Process(target=int)  # the first process waits until everything is imported
    imports.start()
    imports.join()
    work_dir = Path(tempfile.mkdtemp(prefix="crash-test-") if args.work_dir is None else args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)

    reports = []
    for script in args.scripts:
        arguments = dict(ARGUMENTS[script])
        if script == "train_sit":
            arguments["latents_dir"] = prepare_latents(work_dir)
        reports.append(crash_test(script, arguments, args.kills, work_dir, random.Random(args.seed)))
    if args.work_dir is None:
        shutil.rmtree(work_dir)

    environment = {
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "command": " ".join(sys.argv),
    }
    output = Path(args.output)
    output.write_text(json.dumps({"environment": environment, "reports": [vars(r) for r in reports]}, indent=2) + "\n")
    output.with_suffix(".md").write_text(table(reports) + "\n")
    print(table(reports))
    for report in reports:
        for difference in report.differences:
            print(f"{report.script}: {difference}", file=sys.stderr)
    sys.exit(any(report.differences for report in reports))


if __name__ == "__main__":
    main()
