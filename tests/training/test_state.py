"""What a run remembers of where it stands."""

import json

import torch

from softvq_hf.training.state import TrainerState


def test_what_all_processes_share_is_json_and_comes_back():
    state = TrainerState(
        step=7, epoch=1, batch=3, seconds=5.0, nonfinite_batches=2, unreadable=["a"], data_seconds=4.0
    )
    saved = json.loads(json.dumps(state.state_dict()))
    assert saved.keys() == {"step", "epoch", "batch", "seconds", "nonfinite_batches"}

    loaded = TrainerState(started=-1e6)
    loaded.load_state_dict(saved)
    assert (loaded.step, loaded.epoch, loaded.batch, loaded.nonfinite_batches) == (7, 1, 3, 2)
    assert loaded.unreadable == [] and loaded.data_seconds == 0.0
    # the clock goes on from what was saved, not from when this object was made
    assert 5.0 <= saved["seconds"] <= loaded.elapsed() < saved["seconds"] + 100


def test_what_belongs_to_a_process_survives_a_safe_load(tmp_path):
    position = {"snapshot": {"step": 4, "worker_0": {"shard": 1, "offset": 7, "name": "b"}}, "seed": torch.tensor(3)}
    state = TrainerState(step=7, stream=position, unreadable=["train:3", "train:9"])
    torch.save(state.process_state_dict(), tmp_path / "process-0.pt")
    state.unreadable.append("train:12")  # what was saved stays as it was

    loaded = TrainerState()
    loaded.load_process_state_dict(torch.load(tmp_path / "process-0.pt", weights_only=True))
    assert loaded.stream == position and loaded.unreadable == ["train:3", "train:9"] and loaded.step == 0


def test_states_share_no_list():
    first, second = TrainerState(), TrainerState()
    first.unreadable.append("a")
    assert second.unreadable == []
