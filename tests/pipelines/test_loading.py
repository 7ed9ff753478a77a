"""Every way to load SoftVQPipeline from disk, each in a fresh process, and the names diffusers' loading depends on."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers.pipelines
import numpy as np
import pytest
import torch

from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.hub import export_pipeline


REPOSITORY = Path(__file__).parents[2]

BLOCK_SOFTVQ_HF = (Path(__file__).parents[1] / "fixtures/block_softvq_hf.py").read_text()

GENERATE = """
import numpy, sys, torch
pipeline.set_progress_bar_config(disable=True)
images = pipeline(
    ["goldfish", 0],
    guidance_scale=2.0,
    num_inference_steps=3,
    generator=torch.Generator().manual_seed(0),
    output_type="np",
).images
numpy.save("images.npy", images)
"""


def run_python(code: str, folder: Path, cwd: Path | None = None) -> None:
    """Run code in a fresh, offline process with its own cache for diffusers' copies of code."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = f"import os\nfolder = {str(folder)!r}\nos.chdir({str(cwd or folder)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def pipeline(tiny_pipeline):
    return tiny_pipeline(StochasticInterpolantScheduler(path_type="cosine"))


@pytest.fixture
def expected(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        ["goldfish", 0], guidance_scale=2.0, num_inference_steps=3, generator=generator, output_type="np"
    ).images


@pytest.mark.slow
def test_own_class(pipeline, expected, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    run_python(
        "from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline\n"
        "pipeline = SoftVQPipeline.from_pretrained('generator')\n" + GENERATE,
        tmp_path,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), expected)


@pytest.mark.slow
def test_custom_pipeline(pipeline, expected, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    code = f"""
import sys
from diffusers import DiffusionPipeline

arguments = dict(pretrained_model_name_or_path=folder + "/generator", custom_pipeline="pipelines/pipeline_softvq.py")
try:
    DiffusionPipeline.from_pretrained(**arguments)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code ran without trust_remote_code=True")
assert "softvq_hf" not in sys.modules

pipeline = DiffusionPipeline.from_pretrained(**arguments, trust_remote_code=True)
os.chdir(folder)
{GENERATE}"""
    run_python(code, tmp_path, cwd=REPOSITORY)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), expected)


@pytest.mark.slow
def test_exported_folder_needs_diffusers_only(pipeline, expected, tmp_path):
    export_pipeline(pipeline, tmp_path / "exported")
    code = f"""
{BLOCK_SOFTVQ_HF}
from diffusers import DiffusionPipeline

try:
    import softvq_hf
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("softvq_hf is not blocked")

try:
    DiffusionPipeline.from_pretrained("exported")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code ran without trust_remote_code=True")

pipeline = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
assert type(pipeline).__name__ == "SoftVQPipeline"
assert type(pipeline.scheduler).__name__ == "StochasticInterpolantScheduler"
assert not [name for name in sys.modules if name.split(".")[0] == "softvq_hf"]
{GENERATE}"""
    run_python(code, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), expected)


@pytest.mark.slow
def test_exported_folder_with_own_class(pipeline, expected, tmp_path):
    export_pipeline(pipeline, tmp_path / "exported")
    code = f"""
import sys
from diffusers import DiffusionPipeline
from softvq_hf import AutoencoderSoftVQ, SoftVQPipeline
from softvq_hf.training.hub import export_pipeline

# Our class needs no flag and runs no code from the folder.
pipeline = SoftVQPipeline.from_pretrained("exported")
assert type(pipeline) is SoftVQPipeline and type(pipeline.vae) is AutoencoderSoftVQ
assert not [name for name in sys.modules if name.startswith("diffusers_modules")]

# What came from such a folder can be exported and saved again.
carried = DiffusionPipeline.from_pretrained(
    "exported", custom_pipeline="{REPOSITORY}/pipelines/pipeline_softvq.py", trust_remote_code=True
)
assert type(carried.vae) is not AutoencoderSoftVQ
export_pipeline(carried, "again")
carried.save_pretrained("saved")
assert type(SoftVQPipeline.from_pretrained("saved").vae) is AutoencoderSoftVQ
{GENERATE}"""
    run_python(code, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), expected)

    def files(folder):
        return {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.suffix in (".py", ".safetensors")
        }

    def index(folder):
        return {**json.loads((folder / "model_index.json").read_text()), "_name_or_path": None}

    assert files(tmp_path / "exported") == files(tmp_path / "again")
    assert index(tmp_path / "exported") == index(tmp_path / "again")


def test_index_without_a_component(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["transformer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected .*'transformer'"):
        SoftVQPipeline.from_pretrained(tmp_path)
    loaded = SoftVQPipeline.from_pretrained(tmp_path, transformer=pipeline.transformer)
    assert loaded.transformer is pipeline.transformer


def test_no_folder_has_the_name_of_a_diffusers_pipeline():
    # diffusers takes a component whose module path holds such a name for one of its own, and saves an index that it
    # cannot load
    names = {path.name for path in (REPOSITORY / "src" / "softvq_hf").rglob("*") if path.is_dir()}
    names |= {path.stem for path in (REPOSITORY / "pipelines").glob("pipeline_*.py")} | {"pipelines"}
    assert "models" in names and "pipeline_softvq" in names
    assert not [name for name in names if hasattr(diffusers.pipelines, name)]


def test_pipeline_files_are_loadable_as_custom_pipelines():
    files = [path for path in (REPOSITORY / "pipelines").glob("*.py") if path.name != "__init__.py"]
    assert files
    for path in files:
        # diffusers imports all pipeline files under their stems into one flat name space
        assert path.stem.startswith("pipeline_"), path
        tree = ast.parse(path.read_text())
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        pipelines = [name for name in classes if name.endswith("Pipeline")]
        assert len(pipelines) == 1, path
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, path
