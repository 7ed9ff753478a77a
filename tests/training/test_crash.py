"""The crash test of benchmarks/crash_test.py in its short form, on both training scripts."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/crash_test.py"), "--kills=5", "--seed=1"]
    result = subprocess.run(
        [*command, f"--output={tmp_path / 'crash.json'}", f"--work_dir={tmp_path / 'runs'}"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    reports = json.loads((tmp_path / "crash.json").read_text())["reports"]
    assert [report["script"] for report in reports] == ["train_softvq", "train_sit"]
    for report in reports:
        assert report["kills"] == 5 and report["differences"] == []
        assert report["half_written"] >= 1 and report["compared_tensors"] > 50 and report["compared_metrics"] > 100
    assert "bit-equal" in (tmp_path / "crash.md").read_text()


def test_the_comparison_sees_every_difference():
    spec = importlib.util.spec_from_file_location("crash_test", ROOT / "benchmarks/crash_test.py")
    crash_test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crash_test)

    def state(**changes) -> dict:
        values = {
            "weight": torch.ones(2),
            "random": (np.arange(3), random.Random(0).getstate()),
            "step": 3,
            "rate": 0.1,
        }
        return {"checkpoint": values | changes, "metrics": [{"loss": 1.0}]}

    assert crash_test.differing(state(), state(), "run") == []
    for changes in (
        {"weight": torch.tensor([1.0, 1.0 + 2**-23])},
        {"weight": torch.ones(2, dtype=torch.float64)},
        {"random": (np.arange(3), random.Random(1).getstate())},
        {"random": (np.array([0, 1, 3]), random.Random(0).getstate())},
        {"step": 4},
        {"rate": 0.1 + 2**-53},
        {"more": 1},
    ):
        assert crash_test.differing(state(), state(**changes), "run")
    longer = state() | {"metrics": [{"loss": 1.0}, {"loss": 2.0}]}
    assert crash_test.differing(state(), longer, "run") == ["run: metrics"]
