"""Loaders of the training scripts: resumed order, streams on several processes, and broken files among good ones."""

import io
import json
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

from softvq_hf.data import PhotographDataset, collate_images, load_image_dataset
from softvq_hf.training.dataloader import (
    build_dataloader,
    check_dataset_size,
    resolve_max_train_steps,
    training_batches,
    write_unreadable_report,
)
from softvq_hf.training.state import TrainerState


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def build_accelerator() -> Accelerator:
    return Accelerator(
        cpu=True,
        gradient_accumulation_plugin=GradientAccumulationPlugin(sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0, even_batches=False),
    )


def content(number: int, **options) -> bytes:
    """An encoded picture."""
    noise = np.random.default_rng(number).integers(0, 255, (24, 20, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, **{"format": "PNG", **options})
    return file.getvalue()


def make_shards(folder: Path, per_shard: tuple[int, ...]) -> Path:
    """Webdataset shards of pictures 00000.png, 00001.png, ..."""
    folder.mkdir(parents=True)
    number = 0
    for shard, rows in enumerate(per_shard):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for _ in range(rows):
                info = tarfile.TarInfo(f"{number:05d}.png")
                data = content(number)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                number += 1
    return folder


def make_poisoned_folder(folder: Path) -> set[str]:
    """24 readable images, some of odd kinds, and 5 that are not; returns the ids of these."""
    for number in range(24):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        options = {"format": "JPEG"} if number < 20 else {"format": "GIF", "save_all": True}
        if number in (20, 21):
            options = {"format": "PNG"}  # with the extension of another kind
        if number in (22, 23):
            options["append_images"] = [PIL.Image.new("RGB", (20, 24))] * 2  # animated
        suffix = "gif" if number in (22, 23) else "jpg"
        (folder / "ab"[number % 2] / f"{number:03d}.{suffix}").write_bytes(content(number, **options))
    whole = content(100, format="JPEG")
    (folder / "a" / "001_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "009_zero_bytes.jpg").write_bytes(b"")
    (folder / "b" / "004_text.jpg").write_text("This is no picture.")
    (folder / "b" / "011_header_only.png").write_bytes(content(101)[:40])
    (folder / "b" / "zzz_truncated.png").write_bytes(content(102)[:200])
    return {"a/001_truncated.jpg", "a/009_zero_bytes.jpg", "b/004_text.jpg", "b/011_header_only.png"} | {
        "b/zzz_truncated.png"
    }


def load(source: Path | str, **options):
    return load_image_dataset(str(source), **{"resolution": 8, "train": True, "label_column": None, **options})


def through_a_file(state: TrainerState) -> TrainerState:
    """What a checkpoint keeps of it."""
    file = io.BytesIO()
    torch.save(state.process_state_dict(), file)
    file.seek(0)
    restored = TrainerState()
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    restored.load_process_state_dict(torch.load(file, weights_only=True))
    return restored


def run(source, num_workers: int, steps: int, state: TrainerState | None = None, accumulation: int = 1, **options):
    """Batches up to update `steps`, and the state of the run after each update."""
    accelerator, dataset = build_accelerator(), load(source, **options)
    loader = build_dataloader(accelerator, dataset, 3, collate_fn=collate_images, num_workers=num_workers, train=True)
    state, batches, states = state or TrainerState(), [], []
    for batch in training_batches(accelerator, loader, dataset, state, steps):
        batches.append(batch)
        if len(batches) % accumulation == 0:
            state.step += 1
            states.append(through_a_file(state))
    return batches, states


def same_batches(batches, others) -> bool:
    return len(batches) == len(others) and all(
        batch.keys() == other.keys()
        and batch["image_id"] == other["image_id"]
        and torch.equal(batch["pixel_values"], other["pixel_values"])
        for batch, other in zip(batches, others, strict=True)
    )


SOURCES = ["folder", "stream"]


def make_source(kind: str, folder: Path) -> tuple[Path, dict]:
    if kind == "stream":
        return make_shards(folder, (5, 9, 6)), {"streaming": True, "shuffle_buffer_size": 4}
    make_poisoned_folder(folder)
    return folder, {"max_unreadable_fraction": 0.5}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_resumed_run_gets_the_same_batches(tmp_path, kind, num_workers):
    """From any update on: in the first pass, at its end, in a later one; two batches make an update."""
    source, options = make_source(kind, tmp_path / "images")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches, states = run(source, num_workers, 10, accumulation=2, **options)
    assert len(batches) == 20
    assert states[-1].epoch >= 2
    assert all(len(batch["image_id"]) == len(batch["pixel_values"]) == 3 for batch in batches)
    for step in (1, 3, 5, 9) if num_workers else range(1, 10):
        rest, rest_states = run(source, num_workers, 10, states[step - 1], accumulation=2, **options)
        assert same_batches(rest, batches[2 * step :])
        assert rest_states[-1].state_dict()["epoch"] == states[-1].epoch
        assert rest_states[-1].process_state_dict() == states[-1].process_state_dict()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_passes_of_a_stream_differ_and_are_whole(tmp_path):
    make_shards(tmp_path / "images", (6, 3, 6))
    batches, states = run(tmp_path / "images", 0, 10, streaming=True, shuffle_buffer_size=4)
    passes = [[i for batch in batches[first : first + 5] for i in batch["image_id"]] for first in (0, 5)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == [f"{number:05d}.png" for number in range(15)]
    assert [(state.epoch, state.batch) for state in states] == [(epoch, n) for epoch in (0, 1) for n in range(1, 6)]


def test_seconds_of_waiting_are_counted(tmp_path):
    make_shards(tmp_path / "images", (6,))
    accelerator, dataset, state = build_accelerator(), load(tmp_path / "images", streaming=True), TrainerState()
    loader = build_dataloader(accelerator, dataset, 3, collate_fn=collate_images, num_workers=0, train=True)
    for _ in training_batches(accelerator, loader, dataset, state, 2):
        state.step += 1
        assert state.data_seconds > 0
        state.data_seconds = 0.0


def test_steps_of_a_number_of_epochs():
    accelerator = build_accelerator()
    dataset = PhotographDataset("train", resolution=8, train=True, seed=0, max_samples=23)
    options = {"collate_fn": collate_images, "num_workers": 0}
    loader = build_dataloader(accelerator, dataset, 4, **options, train=True)  # 5 full batches
    assert resolve_max_train_steps(loader, 17, None, 2) == 17
    assert [resolve_max_train_steps(loader, None, 3, accumulation) for accumulation in (1, 2, 4, 15)] == [15, 7, 3, 1]
    with pytest.raises(ValueError, match="`--num_train_epochs` is 3, which is 15 batches.*update of 16"):
        resolve_max_train_steps(loader, None, 3, 16)
    in_order = build_dataloader(accelerator, dataset, 4, **options, train=False)
    assert [len(batch["image_id"]) for batch in in_order] == [4, 4, 4, 4, 4, 3]
    check_dataset_size(dataset, 11, 2)
    with pytest.raises(ValueError, match="`--train_batch_size` is 12 on 2 process.*at most 11"):
        check_dataset_size(dataset, 12, 2)


def test_streams_have_no_length(tmp_path):
    make_shards(tmp_path / "images", (5,))
    accelerator, dataset = build_accelerator(), load(tmp_path / "images", streaming=True)
    options = {"collate_fn": collate_images, "num_workers": 0}
    check_dataset_size(dataset, 1000, 8)
    loader = build_dataloader(accelerator, dataset, 6, **options, train=True)
    assert resolve_max_train_steps(loader, 3, None, 1) == 3
    with pytest.raises(ValueError, match="`--num_train_epochs` is 2.*`--max_train_steps`"):
        resolve_max_train_steps(loader, None, 2, 1)
    with pytest.raises(ValueError, match="no full batch in a whole pass"):
        next(training_batches(accelerator, loader, dataset, TrainerState(), 1))
    in_order = build_dataloader(
        accelerator, load(tmp_path / "images", streaming=True, train=False), 3, **options, train=False
    )
    assert [batch["image_id"][0] for batch in in_order] == ["00000.png", "00003.png"]


@pytest.mark.parametrize("kind", SOURCES)
def test_workers_outlive_interrupts(tmp_path, kind):
    source, options = make_source(kind, tmp_path / "images")
    accelerator, dataset, state = build_accelerator(), load(source, **options), TrainerState()
    loader = build_dataloader(accelerator, dataset, 3, collate_fn=collate_images, num_workers=2, train=True)
    before = children()
    for _ in training_batches(accelerator, loader, dataset, state, 12):
        state.step += 1
        if state.step == 3:  # each worker has given a batch
            workers = children() - before
            assert len(workers) == 2
            for pid in workers:
                os.kill(pid, signal.SIGINT)
                subprocess.run(["kill", "-TERM", str(pid)], check=True)  # from elsewhere, as a launcher does
    assert state.step == 12 and workers <= children()  # the same ones in every pass


def children() -> set[int]:
    pid = os.getpid()
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


# Broken files


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_files_are_listed_at_the_end(tmp_path, streaming, num_workers):
    """Two passes over a folder; also if the run was interrupted after the first batches."""
    broken = make_poisoned_folder(tmp_path / "images")
    options = {"streaming": streaming, "max_unreadable_fraction": 0.5}
    steps = 20
    batches, states = run(tmp_path / "images", num_workers, steps, **options)
    assert not any("unreadable" in batch for batch in batches)
    assert {i for batch in batches for i in batch["image_id"]}.isdisjoint(broken)
    assert len({i for batch in batches for i in batch["image_id"]}) >= 23
    assert states[0].unreadable == [] or len(states[0].unreadable) < 5
    middle = next(state for state in states if 0 < len(state.unreadable) < 5)
    _, resumed = run(tmp_path / "images", num_workers, steps, middle, **options)
    for state in (states[-1], resumed[-1]):
        assert set(state.unreadable) == broken and len(state.unreadable) == 5
        path = write_unreadable_report(build_accelerator(), tmp_path, state)
        assert path == tmp_path / "unreadable_images.txt"
        assert path.read_text().splitlines() == sorted(broken)
        path.unlink()


def test_no_list_without_broken_files(tmp_path):
    assert write_unreadable_report(build_accelerator(), tmp_path, TrainerState()) is None
    assert list(tmp_path.iterdir()) == []


# Two processes


def on_one_of_two_processes(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    datasets.config.HF_DATASETS_CACHE = Path(folder, f"cache-{rank}")
    accelerator, found = build_accelerator(), {}
    assert accelerator.num_processes == 2
    for source in sorted(Path(folder).glob("shards-*")):
        for train in (True, False):
            dataset = load(source, streaming=True, train=train, shuffle_buffer_size=3)
            loader = build_dataloader(accelerator, dataset, 2, collate_fn=collate_images, num_workers=2, train=train)
            for epoch in range(2):
                dataset.set_epoch(epoch)
                key = f"{source.name} {train} {epoch}"
                found[key] = [image_id for batch in loader for image_id in batch["image_id"]]
    # each process is at its own place of the stream, and resumes from there
    options = {"streaming": True, "shuffle_buffer_size": 3}
    batches, states = run(Path(folder, "shards-20"), 2, 9, **options)
    rest, _ = run(Path(folder, "shards-20"), 2, 9, states[4], **options)
    found["resumed"] = same_batches(rest, batches[5:])
    # by index
    batches, states = run(Path(folder, "poisoned"), 0, 12, max_unreadable_fraction=0.5)
    rest, _ = run(Path(folder, "poisoned"), 0, 12, states[6], max_unreadable_fraction=0.5)
    found["resumed by index"] = same_batches(rest, batches[7:])
    found["unreadable"] = states[-1].unreadable
    write_unreadable_report(accelerator, folder, states[-1])
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes_with_two_workers_see_every_image_once_per_epoch(tmp_path):
    counts = {"shards-01": (7,), "shards-03": (5, 9, 6), "shards-04": (4, 4, 4, 4), "shards-20": (1, 2) * 10}
    for name, per_shard in counts.items():
        make_shards(tmp_path / name, per_shard)
    broken = make_poisoned_folder(tmp_path / "poisoned")
    torch.multiprocessing.start_processes(on_one_of_two_processes, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name, per_shard in counts.items():
        for train in (True, False):
            for epoch in range(2):
                key = f"{name} {train} {epoch}"
                assert sorted(first[key] + second[key]) == [f"{i:05d}.png" for i in range(sum(per_shard))], key
                assert abs(len(first[key]) - len(second[key])) <= 2 * max(per_shard)
    assert first["shards-20 True 0"] != first["shards-20 True 1"]
    assert first["shards-20 False 0"] == first["shards-20 False 1"]
    assert first["resumed"] and second["resumed"]
    assert first["resumed by index"] and second["resumed by index"]
    assert set(first["unreadable"]) | set(second["unreadable"]) == broken
    assert (tmp_path / "unreadable_images.txt").read_text().splitlines() == sorted(broken)


@pytest.fixture(autouse=True)
def reset_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
