"""Metrics over several processes, on processors with gloo: the same figures as from one, whoever has which samples."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softvq_hf import metrics


SCRIPT = Path(__file__).parent / "distributed_metrics.py"
METRICS = Path(metrics.__file__).parent


@pytest.fixture(scope="module")
def script():
    """The script as a module, for one process."""
    spec = importlib.util.spec_from_file_location("distributed_metrics", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Of each of two processes, what the script has written."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    command += [f"--folder={METRICS}", f"--output_dir={folder}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("part", ["interleaved", "unequal", "none", "by evaluate.load"])
def test_two_processes_compute_as_one(part, results, script):
    assert results[0][part] == results[1][part]  # exactly
    expected = script.compute("interleaved")  # one process has them all
    assert results[0][part].keys() == expected.keys()
    for name, figures in expected.items():
        assert figures.keys() == results[0][part][name].keys()
        for key, value in figures.items():
            assert results[0][part][name][key] == pytest.approx(value, rel=1e-9), f"{key} of {name}"


def test_the_figures_depend_on_every_sample(script, monkeypatch):
    """So that the test above would see a sample that is lost."""
    monkeypatch.setitem(script.PARTS, "fewer", lambda process, num_processes: range(1, script.NUM_SAMPLES))
    expected, fewer = script.compute("interleaved"), script.compute("fewer")
    for name in expected:
        assert fewer[name] != expected[name], name


def test_order_of_samples_and_batch_size_do_not_count(script, monkeypatch):
    backwards = range(script.NUM_SAMPLES - 1, -1, -1)
    monkeypatch.setitem(script.PARTS, "backwards", lambda process, num_processes: backwards)
    expected, others = script.compute("interleaved"), script.compute("backwards", batch_size=7)
    for name, figures in expected.items():
        for key, value in figures.items():
            assert others[name][key] == pytest.approx(value, rel=1e-9), f"{key} of {name}"


def test_files_of_several_processes_are_not_merged():
    with pytest.raises(ValueError, match="`num_process` is 2, allowed: 1"):
        metrics.PSNR(num_process=2, process_id=0)
