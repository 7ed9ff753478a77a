"""Finding, rotating, saving and loading checkpoints, and the batches from there on."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset

from softvq_hf.training.checkpointing import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from softvq_hf.training.state import (
    TrainerState,
    check_dataset_size,
    prepare_dataloader,
    resolve_max_train_steps,
    training_batches,
)


def make_checkpoint(folder, name: str, complete: bool = True) -> None:
    (folder / name).mkdir()
    if complete:
        (folder / name / "trainer_state.json").write_text("{}")


def test_latest_is_the_newest_complete_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path, None) is None and find_checkpoint(tmp_path, "latest") is None
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100"):
        make_checkpoint(tmp_path, name)
    make_checkpoint(tmp_path, "checkpoint-200", complete=False)
    make_checkpoint(tmp_path, ".checkpoint-300.partial")
    make_checkpoint(tmp_path, "checkpoint-old")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, "checkpoint-100") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-100")) == tmp_path / "checkpoint-100"
    # one from another run
    (tmp_path / "new").mkdir()
    assert find_checkpoint(tmp_path / "new", str(tmp_path / "checkpoint-10")) == tmp_path / "checkpoint-10"


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


def parts(accelerator: Accelerator):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=0.9, min_decay=0.9)
    averages = torch.nn.BatchNorm1d(2, affine=False)
    return model, optimizer, {"ema": ema, "lr_schedulers": [schedule], "buffers": {"averages": averages}}


def update(model, optimizer, others) -> None:
    model(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    others["lr_schedulers"][0].step()
    others["ema"].step(model.parameters())
    others["buffers"]["averages"](torch.randn(4, 2, generator=torch.Generator().manual_seed(1)))


def test_round_trip_and_rotation(accelerator_states, tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer, others = parts(accelerator)
    state = TrainerState()
    for step in (1, 2, 3):
        update(model, optimizer, others)
        state.step, state.epoch, state.batch = step, step // 2, step % 2
        save_checkpoint(accelerator, tmp_path, state, checkpoints_total_limit=2, **others)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert not list(tmp_path.glob(".*"))
    update(model, optimizer, others)

    accelerator.free_memory()
    again, again_optimizer, again_others = parts(accelerator)
    loaded = TrainerState()
    load_checkpoint(accelerator, tmp_path / "checkpoint-3", loaded, **again_others)
    assert (loaded.step, loaded.epoch, loaded.batch) == (3, 1, 1)
    assert (
        loaded.elapsed()
        >= json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())["trainer"]["seconds"]
    )
    update(again, again_optimizer, again_others)
    assert torch.equal(model.weight, again.weight)
    for average, other in zip(others["ema"].shadow_params, again_others["ema"].shadow_params, strict=True):
        assert torch.equal(average, other)
    assert others["ema"].optimization_step == again_others["ema"].optimization_step
    assert others["lr_schedulers"][0].get_last_lr() == again_others["lr_schedulers"][0].get_last_lr()
    running_mean = others["buffers"]["averages"].running_mean
    assert torch.equal(running_mean, again_others["buffers"]["averages"].running_mean) and running_mean.abs().sum() > 0


def test_checkpoint_of_another_kind_of_run(accelerator_states, tmp_path):
    accelerator = Accelerator(cpu=True)
    _, _, others = parts(accelerator)
    save_checkpoint(accelerator, tmp_path, TrainerState(step=1), **others)
    with pytest.raises(ValueError, match="'use_ema': True.*this run has .'use_ema': False"):
        load_checkpoint(accelerator, tmp_path / "checkpoint-1", TrainerState(), **{**others, "ema": None})


def test_checkpoint_of_another_model(accelerator_states, tmp_path):
    accelerator = Accelerator(cpu=True)
    save_checkpoint(accelerator, tmp_path, TrainerState(step=1))
    accelerator.prepare(torch.nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, TrainerState(step=2))
    accelerator.free_memory()
    accelerator.prepare(torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"checkpoint-2 holds other models(.|\n)*size mismatch"):
        load_checkpoint(accelerator, tmp_path / "checkpoint-2", TrainerState())


class Numbers(Dataset):
    """Items are (epoch, index)."""

    def __init__(self, length: int):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([self.epoch, index])


class NumberStream(IterableDataset):
    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        yield from (torch.tensor([self.epoch, index]) for index in range(10))


def batches(dataset, state: TrainerState, last_step: int) -> list[list]:
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3, even_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    shuffle = not isinstance(dataset, IterableDataset)
    dataloader = prepare_dataloader(accelerator, DataLoader(dataset, batch_size=3, shuffle=shuffle, drop_last=True))
    result = []
    for batch in training_batches(accelerator, dataloader, dataset, state, last_step):
        result.append(batch.tolist())
        state.step += 1
    return result


@pytest.mark.parametrize("dataset", [Numbers(10), NumberStream()], ids=["map", "stream"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
def test_batches_go_on_where_they_stopped(dataset, stop, accelerator_states):
    """Three batches in a pass; stops in the middle of one, at its end, and in the second one."""
    uninterrupted = batches(dataset, TrainerState(), last_step=8)
    seen = {tuple(item) for batch in uninterrupted[:3] for item in batch}
    assert len(seen) == 9 and {epoch for epoch, _ in seen} == {0}  # no sample twice in a pass
    assert uninterrupted[:3] != [[[0, index] for _, index in batch] for batch in uninterrupted[3:6]] or isinstance(
        dataset, IterableDataset
    )

    state = TrainerState()
    first = batches(dataset, state, last_step=stop)
    resumed = TrainerState()
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert first + batches(dataset, resumed, last_step=8) == uninterrupted


def test_data_that_give_no_batch(accelerator_states):
    with pytest.raises(ValueError, match="`--train_batch_size` is 3 on 4 process.*at most 2, for the dataset has 10"):
        check_dataset_size(Numbers(10), 3, num_processes=4)
    check_dataset_size(Numbers(12), 3, num_processes=4)
    with pytest.raises(ValueError, match="no full batch"):
        batches(Numbers(2), TrainerState(), last_step=1)


def test_number_of_steps():
    dataloader = DataLoader(Numbers(10), batch_size=2)
    assert resolve_max_train_steps(dataloader, 7, 3, accumulation_steps=1) == 7
    assert resolve_max_train_steps(dataloader, None, 3, accumulation_steps=1) == 15
    assert resolve_max_train_steps(dataloader, None, 3, accumulation_steps=2) == 9
