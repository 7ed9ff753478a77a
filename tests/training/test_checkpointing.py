"""Saving, finding, rotating, loading checkpoints; kills and full disks on the way; what a resumed run may change."""

import copy
import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.checkpointing import (
    FREE_ARGUMENTS,
    PATH_ARGUMENTS,
    CheckpointError,
    check_resumable,
    clean_up,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from softvq_hf.training.generator_arguments import MARTrainingArguments, SiTTrainingArguments
from softvq_hf.training.state import TrainerState
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments


pytestmark = pytest.mark.usefixtures("accelerator_states")


@dataclass(kw_only=True)
class ModelArguments(TrainingArguments):
    model: dict | str | None = None
    alignment_teacher: str | None = None
    use_everything: bool = False


def arguments(output_dir, **values) -> ModelArguments:
    return ModelArguments(**{"output_dir": str(output_dir), "max_train_steps": 10, "train_batch_size": 4} | values)


def names(folder: Path) -> list[str]:
    """Everything about checkpoints in a folder, hidden or not."""
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def make_checkpoint(folder, name: str, complete: bool = True) -> None:
    (folder / name).mkdir()
    if complete:
        (folder / name / "trainer_state.json").write_text("{}")


def test_latest_is_the_newest_complete_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path, None) is None and find_checkpoint(tmp_path, "latest") is None
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-100",
        ".checkpoint-300.partial",
        ".checkpoint-8.deleted",
    ):
        make_checkpoint(tmp_path, name)
    make_checkpoint(tmp_path, "checkpoint-200", complete=False)
    make_checkpoint(tmp_path, "checkpoint-old")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, "checkpoint-100") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-100")) == tmp_path / "checkpoint-100"
    # one from another run
    (tmp_path / "new").mkdir()
    assert find_checkpoint(tmp_path / "new", str(tmp_path / "checkpoint-10")) == tmp_path / "checkpoint-10"

    clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-200", "checkpoint-9", "checkpoint-old"]


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        (None, "holds the checkpoints of an earlier run .last: checkpoint-20"),
        ("checkpoint-30", "`--resume_from_checkpoint` is 'checkpoint-30'.*has: checkpoint-10, checkpoint-20"),
        ("checkpoint-10", "but `--output_dir` holds checkpoint-20"),
    ],
)
def test_checkpoints_that_cannot_be_resumed_from(resume, message, tmp_path):
    make_checkpoint(tmp_path, "checkpoint-10")
    make_checkpoint(tmp_path, "checkpoint-20")
    with pytest.raises(ValueError, match=message):
        find_checkpoint(tmp_path, resume)


class Run:
    """Two models with an optimizer each, averages of the first one's weights, statistics, schedules."""

    def __init__(self, width: int = 2):
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        self.models = [torch.nn.Linear(width, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))]
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in self.models]
        schedules = [LambdaLR(optimizer, lambda step: 1 / (step + 1)) for optimizer in self.optimizers]
        for i in range(2):
            prepared = self.accelerator.prepare(self.models[i], self.optimizers[i])
            self.models[i], self.optimizers[i] = prepared
        self.ema = EMAModel(self.models[0].parameters(), decay=0.9, min_decay=0.9)
        self.averages = torch.nn.BatchNorm1d(2, affine=False)
        self.parts = {"ema": self.ema, "lr_schedulers": schedules, "buffers": {"averages": self.averages}}
        self.state = TrainerState()

    def update(self) -> None:
        """One step, with draws from the global generators, which a checkpoint keeps too."""
        x = torch.randn(4, self.models[0].in_features)
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            x = model(x.detach())
            x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for schedule in self.parts["lr_schedulers"]:
            schedule.step()
        self.ema.step(self.models[0].parameters())
        self.averages(x.detach())
        self.state.step += 1
        self.state.epoch, self.state.batch = divmod(self.state.step, 3)

    def save(self, args) -> Path:
        return save_checkpoint(self.accelerator, args, self.state, **self.parts)

    def load(self, path, args) -> None:
        load_checkpoint(self.accelerator, path, args, self.state, **self.parts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that must be the same, by name."""
        result = {f"ema.{i}": average for i, average in enumerate(self.ema.shadow_params)}
        for i in range(2):
            result |= {f"model{i}.{k}": v for k, v in self.models[i].state_dict().items()}
            for key, moments in self.optimizers[i].state_dict()["state"].items():
                result |= {f"optimizer{i}.{key}.{name}": value for name, value in moments.items()}
            result[f"rate{i}"] = torch.tensor(self.parts["lr_schedulers"][i].get_last_lr())
        result |= {f"averages.{k}": v for k, v in self.averages.state_dict().items()}
        counters = (self.state.step, self.state.epoch, self.state.batch, self.ema.optimization_step)
        return copy.deepcopy(result) | {"counters": torch.tensor(counters), "random": torch.get_rng_state()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_that_is_stopped_after_any_update_ends_as_if_it_had_not(stop, tmp_path):
    args = arguments(tmp_path)
    uninterrupted, first, second = Run(), Run(), Run()
    for run, updates in ((uninterrupted, 6), (first, stop)):
        torch.manual_seed(1)
        for _ in range(updates):
            run.update()
        if run is uninterrupted:
            expected = run.tensors()
    first.state.nonfinite_batches, first.state.unreadable, first.state.stream = 2, ["7"], {"shard": 3}
    first.save(args)

    torch.manual_seed(99)
    second.load(find_checkpoint(tmp_path, "latest"), args)
    assert second.state.elapsed() >= first.state.elapsed() - 60 and second.state.nonfinite_batches == 2
    assert second.state.unreadable == ["7"] and second.state.stream == {"shard": 3}
    for _ in range(6 - stop):
        second.update()
    assert_equal(second.tensors(), expected)


def test_rotation_keeps_the_newest(tmp_path):
    args, run = arguments(tmp_path, checkpoints_total_limit=2), Run()
    for _ in range(4):
        run.update()
        assert run.save(args) == tmp_path / f"checkpoint-{run.state.step}"
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    everything = arguments(tmp_path)
    run.update()
    run.save(everything)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_a_complete_checkpoint_is_not_written_again(tmp_path):
    args, run = arguments(tmp_path, checkpoints_total_limit=1), Run()
    run.update()
    path = run.save(args)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert run.save(args) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before and names(tmp_path) == [path.name]


def test_leftovers_and_an_incomplete_folder_of_the_same_name(tmp_path):
    make_checkpoint(tmp_path, "checkpoint-1", complete=False)
    (tmp_path / "checkpoint-1/model.safetensors").write_text("cut o")
    make_checkpoint(tmp_path, ".checkpoint-1.partial")
    make_checkpoint(tmp_path, ".checkpoint-7.partial")
    args, run = arguments(tmp_path), Run()
    run.update()
    run.save(args)
    assert names(tmp_path) == ["checkpoint-1"]
    expected = run.tensors()
    again = Run()
    again.load(tmp_path / "checkpoint-1", args)
    assert_equal(again.tensors(), expected)


def in_a_child(function) -> int:
    """Exit status of a forked process that ran `function`."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_kill_before_any_file_operation_leaves_a_good_checkpoint(tmp_path):
    """SIGKILL in place of the 1st, 2nd, ... operation on the folder, until saving gets through without one."""
    folder = tmp_path / "run"
    args, run = arguments(folder, checkpoints_total_limit=1), Run()
    folder.mkdir()
    run.update()
    run.save(args)
    states = {1: run.tensors()}
    run.update()
    states[2] = run.tensors()
    shutil.copytree(folder, tmp_path / "before")

    def killed_save(number: int) -> None:
        remaining = number
        torch.set_rng_state(states[2]["random"])

        def kill(event: str, arguments: tuple) -> None:
            nonlocal remaining
            touches = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
            if touches and (event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(str(folder))):
                remaining -= 1
                if remaining == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        run.save(args)
        os._exit(0)

    found = []
    for number in range(1, 200):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
        status = in_a_child(lambda number=number: killed_save(number))
        latest = find_checkpoint(folder, "latest")
        found.append((latest.name, *(name for name in names(folder) if name.startswith("."))))
        again = Run()
        again.load(latest, args)
        assert_equal(again.tensors(), states[again.state.step])
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert names(folder) == ["checkpoint-2"]
    # the kills met every stage
    assert len(found) >= 20 and set(found) == {
        ("checkpoint-1",),
        ("checkpoint-1", ".checkpoint-2.partial"),
        ("checkpoint-2",),
        ("checkpoint-2", ".checkpoint-1.deleted"),
    }


@pytest.mark.parametrize("file_size", [0, 300, 1000, 3000])
def test_a_full_disk_is_a_clear_error_and_leaves_the_checkpoint_before(file_size, tmp_path):
    """No file may grow beyond `file_size` bytes: the writes of safetensors, torch and Python fail."""
    args, run = arguments(tmp_path, checkpoints_total_limit=1), Run()
    run.update()
    run.save(args)
    expected = run.tensors()
    run.update()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            run.save(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    message = str(caught.value)
    assert message.startswith(f"Step 2 could not be saved as {tmp_path / 'checkpoint-2'} (")
    assert "MiB were free there). The last checkpoint, checkpoint-1, is intact." in message
    # the first failure says why: safetensors writes the models, torch the optimizers
    reason = "SafetensorError: .*File too large" if file_size < 400 else "RuntimeError: "
    assert re.search(f"`--resume_from_checkpoint latest`. {reason}", message)

    assert names(tmp_path) == ["checkpoint-1"]
    again = Run()
    again.load(find_checkpoint(tmp_path, "latest"), args)
    assert_equal(again.tensors(), expected)
    run.save(args)  # there is room again
    assert names(tmp_path) == ["checkpoint-2"]


def test_no_space_left_for_the_first_checkpoint(tmp_path, monkeypatch):
    """The disk is full when the data are flushed, as with delayed allocation and on network file systems."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"There is no earlier checkpoint\..*No space left on device"):
        Run().save(arguments(tmp_path))
    assert names(tmp_path) == []


def test_file_systems_that_cannot_flush_folders(tmp_path, monkeypatch):
    def fsync(descriptor: int, flush=os.fsync) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert Run().save(arguments(tmp_path)) == find_checkpoint(tmp_path, "latest")


def test_checkpoint_of_another_kind_of_run(tmp_path):
    args, run = arguments(tmp_path), Run()
    run.save(args)
    with pytest.raises(ValueError, match="'use_ema': True.*this run has .'use_ema': False"):
        load_checkpoint(run.accelerator, tmp_path / "checkpoint-0", args, TrainerState(), **{**run.parts, "ema": None})
    state_file = tmp_path / "checkpoint-0/trainer_state.json"
    state_file.write_text(state_file.read_text().replace('"mixed_precision": "no"', '"mixed_precision": "fp16"'))
    with pytest.raises(ValueError, match="'mixed_precision': 'fp16'.*this run has .*'mixed_precision': 'no'"):
        run.load(tmp_path / "checkpoint-0", args)


def test_checkpoint_of_another_model(tmp_path):
    args = arguments(tmp_path)
    Run().save(args)
    with pytest.raises(ValueError, match=r"checkpoint-0 holds other models(.|\n)*size mismatch"):
        Run(width=3).load(tmp_path / "checkpoint-0", args)


@pytest.mark.parametrize("name", ["model_1.safetensors", "optimizer_1.bin", "ema.safetensors", "process-0.pt"])
def test_damaged_checkpoint(name, tmp_path):
    args, run = arguments(tmp_path), Run()
    run.update()
    path = run.save(args) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="checkpoint-1 cannot be read. Remove it to go on from the checkpoint b"):
        Run().load(path.parent, args)


# Arguments of a resumed run


BASE = {
    "model": {"tau": 0.07, "codebook_size": 16},
    "lr_scheduler": "cosine",
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}


def saved_run(tmp_path, batch: int = 2, **values) -> Path:
    run = Run()
    run.state.step, run.state.batch = 3, batch
    return run.save(arguments(tmp_path, **{**BASE, **values}))


def test_arguments_that_do_not_matter_may_change(tmp_path):
    path = saved_run(tmp_path)
    changed = arguments(
        tmp_path / "elsewhere",
        **{**BASE, "checkpointing_steps": 7, "logging_steps": 3, "validation_steps": 0, "report_to": "wandb"},
        checkpoints_total_limit=3,
        resume_from_checkpoint="latest",
        dataloader_num_workers=2,
        gradient_checkpointing=True,
        compile=True,
        push_to_hub=True,
        max_nonfinite_batches=0,
    )
    check_resumable(path, changed, num_processes=1)


def test_other_arguments_are_listed_with_both_values(tmp_path):
    path = saved_run(tmp_path)
    changed = arguments(
        tmp_path,
        **{**BASE, "model": {"codebook_size": 32, "num_codebooks": 2, "tau": 0.07}},
        learning_rate=2e-4,
        seed=1,
        use_everything=True,
    )
    with pytest.raises(ValueError) as caught:
        check_resumable(path, changed, num_processes=1)
    assert re.search(r"Give the saved values, or choose another `--output_dir`\. (.*)\.$", str(caught.value))[1] == (
        "`--learning_rate`: saved 0.0001, given 0.0002; `--seed`: saved 42, given 1;"
        " `model.codebook_size`: saved 16, given 32; `model.num_codebooks`: saved not given, given 2;"
        " `--use_everything`: saved False, given True"
    )


def test_the_length_of_a_run_may_change_where_the_schedule_does_not_know_it(tmp_path):
    path = saved_run(tmp_path / "cosine")
    with pytest.raises(ValueError, match=r"`--max_train_steps`: saved 10, given 20 \(`--lr_scheduler cosine` depends"):
        check_resumable(path, arguments(tmp_path, **{**BASE, "max_train_steps": 20}), 1)
    constant = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}
    path = saved_run(tmp_path / "constant", **constant)
    check_resumable(path, arguments(tmp_path, **{**BASE, **constant, "max_train_steps": 20}), 1)
    with pytest.raises(ValueError, match="`--lr_scheduler`: saved 'constant_with_warmup', given 'constant'"):
        check_resumable(path, arguments(tmp_path, **{**BASE, "lr_scheduler": "constant", "lr_warmup_steps": 0}), 1)
    with pytest.raises(ValueError, match="`--max_train_steps`: given 2, the checkpoint has [3-9] updates done"):
        check_resumable(path, arguments(tmp_path, **{**BASE, **constant, "max_train_steps": 2}), 1)


@pytest.mark.parametrize(
    ("split", "num_processes", "batch"),
    [
        ({"train_batch_size": 2, "gradient_accumulation_steps": 2}, 2, 6),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 1}, 1, 3),
        ({"train_batch_size": 1, "global_batch_size": 8, "gradient_accumulation_steps": None}, 2, 12),
    ],
)
def test_an_update_may_be_split_differently(split, num_processes, batch, tmp_path):
    path = saved_run(tmp_path, batch=6)
    args, run = arguments(tmp_path, **{**BASE, **split}), Run()
    check_resumable(path, args, num_processes)

    if num_processes == 1:
        run.load(path, args)
        assert (run.state.step, run.state.batch) == (3, batch)
        # the next update begins with the next batch
        assert run.accelerator.step == 0


def test_an_update_must_stay_as_large_and_begin_at_a_batch(tmp_path):
    path = saved_run(tmp_path, batch=3)
    with pytest.raises(ValueError, match=r"images per update: saved 8 \(4 images x 1 process.* 2 acc.*, given 16"):
        check_resumable(path, arguments(tmp_path, **BASE), num_processes=2)
    wider = {"train_batch_size": 8, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match="images per batch: saved 4, given 8, of which the 12 images that this pass"):
        check_resumable(path, arguments(tmp_path, **{**BASE, **wider}), num_processes=1)


def test_a_stream_is_not_split_differently(tmp_path):
    path = saved_run(tmp_path, streaming=True)
    other = {"train_batch_size": 2}
    with pytest.raises(ValueError, match="batches of a stream"):
        check_resumable(path, arguments(tmp_path, **{**BASE, **other}, streaming=True), num_processes=2)
    with pytest.raises(ValueError, match="`--dataloader_num_workers`: saved 0, given 1"):
        check_resumable(path, arguments(tmp_path, **BASE, streaming=True, dataloader_num_workers=1), num_processes=1)


def test_files_may_have_moved(tmp_path, caplog):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    path = saved_run(tmp_path, train_data_dir=str(tmp_path / "old"), alignment_teacher="facebook/dinov2-base")
    moved = {**BASE, "train_data_dir": str(tmp_path / "new")}
    check_resumable(path, arguments(tmp_path, **moved, alignment_teacher=str(tmp_path / "old")), 1)
    assert "`--train_data_dir` was" in caplog.text and "`--alignment_teacher` was" in caplog.text
    for teacher in ("facebook/dinov2-large", None):
        with pytest.raises(ValueError, match="`--alignment_teacher`: saved 'facebook/dinov2-base', given"):
            check_resumable(path, arguments(tmp_path, **moved, alignment_teacher=teacher), 1)


def test_checkpoints_of_other_versions_and_scripts(tmp_path):
    path = saved_run(tmp_path)
    state_file = path / "trainer_state.json"
    state = json.loads(state_file.read_text())

    # an argument that came later counts as what it defaults to, one that is gone has no value any more
    newer = copy.deepcopy(state)
    del newer["arguments"]["use_everything"]
    state_file.write_text(json.dumps(newer))
    check_resumable(path, arguments(tmp_path, **BASE), 1)
    with pytest.raises(ValueError, match="`--use_everything`: saved False, given True"):
        check_resumable(path, arguments(tmp_path, **BASE, use_everything=True), 1)
    newer["arguments"]["old_weight"] = 0.5
    state_file.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="`--old_weight`: saved 0.5, given 'not an argument of this version'"):
        check_resumable(path, arguments(tmp_path, **BASE), 1)

    state_file.write_text(json.dumps({**state, "arguments_class": "SiTTrainingArguments"}))
    with pytest.raises(ValueError, match="belongs to a run with SiTTrainingArguments, this script takes ModelArgum"):
        check_resumable(path, arguments(tmp_path, **BASE), 1)

    del state["arguments"]
    state_file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="older version of softvq_hf, which did not keep the arguments"):
        check_resumable(path, arguments(tmp_path, **BASE), 1)


def test_the_tables_name_arguments_of_the_scripts():
    groups = (SoftVQTrainingArguments, SiTTrainingArguments, MARTrainingArguments)
    known = {item.name for group in groups for item in fields(group)}
    assert FREE_ARGUMENTS | PATH_ARGUMENTS <= known and not FREE_ARGUMENTS & PATH_ARGUMENTS
