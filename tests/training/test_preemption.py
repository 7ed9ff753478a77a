"""Signals: remembered until the update is done, agreed on by all processes, harmless to loader workers."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from accelerate import Accelerator
from torch.utils.data import DataLoader

from softvq_hf.training.preemption import (
    PREEMPTED_EXIT_CODE,
    PREEMPTION_SIGNALS,
    ignore_interrupts,
    preemption_handler,
)


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def same_handlers_afterwards(accelerator_states):
    before = [signal.getsignal(number) for number in PREEMPTION_SIGNALS]
    yield
    assert [signal.getsignal(number) for number in PREEMPTION_SIGNALS] == before


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_remembered(number, capfd):
    accelerator = Accelerator(cpu=True)
    with preemption_handler() as preempted:
        assert not preempted(accelerator)
        os.kill(os.getpid(), number)
        assert preempted(accelerator) and preempted(accelerator)
    assert f"{number.name}: a checkpoint follows this update" in capfd.readouterr().err
    with preemption_handler() as preempted:
        assert not preempted(accelerator)


def test_the_second_interrupt_ends_the_run_at_once():
    with pytest.raises(KeyboardInterrupt), preemption_handler():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored():
    """As under `nohup`, or for SIGINT in a script's background jobs."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption_handler() as preempted:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preempted(Accelerator(cpu=True))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def read(number: signal.Signals, **options) -> list[int]:
    """What a loader gives whose workers get a signal, not from their parent, while they work."""
    loader = DataLoader(range(40), batch_size=1, num_workers=2, prefetch_factor=1, **options)
    batches, items = iter(loader), []
    for item in batches:
        items.append(item.item())
        if len(items) == 3:
            subprocess.run(["kill", f"-{number.value}", *(str(worker.pid) for worker in batches._workers)], check=True)
    return items


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS, ids=lambda number: number.name)
def test_signals_to_all_processes_end_no_loader_worker(number):
    with preemption_handler():
        assert read(number, worker_init_fn=ignore_interrupts) == list(range(40))


def test_workers_end_with_the_run():
    """Python terminates the workers that are left at its end, and waits for them."""
    batches = iter(DataLoader(range(40), num_workers=2, persistent_workers=True, worker_init_fn=ignore_interrupts))
    next(batches)
    for worker in batches._workers:
        worker.terminate()
        worker.join(timeout=20)
        assert worker.exitcode == 0


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    """One of two processes is told to stop; then one of them cannot write its part of a checkpoint."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, resource, signal, sys
            import torch
            from accelerate import Accelerator
            from softvq_hf.training.arguments import TrainingArguments
            from softvq_hf.training.checkpointing import CheckpointError, load_checkpoint, save_checkpoint
            from softvq_hf.training.preemption import PREEMPTED_EXIT_CODE, preemption_handler
            from softvq_hf.training.state import TrainerState

            accelerator = Accelerator(cpu=True)
            rank = accelerator.process_index
            args = TrainingArguments(output_dir={str(tmp_path / "run")!r}, max_train_steps=10, train_batch_size=2)
            state = TrainerState(stream={{"offset": 10 + rank}}, unreadable=[f"image-{{rank}}"])
            model = accelerator.prepare(torch.nn.Linear(2, 2))

            with preemption_handler() as preempted:
                for state.step in range(1, 10):
                    if state.step == 3 and rank == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    if preempted(accelerator):
                        save_checkpoint(accelerator, args, state)
                        break
            assert state.step == 3, state

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            for failing in (0, 1):
                state.step += 1
                if rank == failing:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
                try:
                    save_checkpoint(accelerator, args, state)
                    raise AssertionError("nothing failed")
                except CheckpointError as error:
                    assert f"process {{failing}}: " in str(error), error
                    assert f"process {{1 - failing}}: " not in str(error), error
                    assert "checkpoint-3, is intact" in str(error), error
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

            loaded = TrainerState()
            load_checkpoint(accelerator, args.output_dir + "/checkpoint-3", args, loaded)
            assert loaded.step == 3 and loaded.process_state_dict() == state.process_state_dict(), loaded
            print(f"done {{rank}}")  # in one piece: the other process writes as well
            sys.exit(PREEMPTED_EXIT_CODE)
            """
        )
    )
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert "done 0" in result.stdout and "done 1" in result.stdout, result.stderr[-4000:]
    assert f"exitcode  : {PREEMPTED_EXIT_CODE}" in result.stderr
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-3"]
    assert {"process-0.pt", "process-1.pt", "random_states_1.pkl"} <= {
        path.name for path in Path(run, "checkpoint-3").iterdir()
    }
