"""What README and docs show must run: their Python on a tiny pipeline, their commands through the scripts' arguments."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
PYTHON_DOCUMENTS = ["README.md", "docs/quicktour.md", "docs/hub.md", "docs/data.md"]


def python_snippets(document):
    """Fenced Python blocks in order, except those after a `<!-- not run: why -->` line."""
    blocks = re.findall(r"(<!-- not run: .+ -->\n)?```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return [code for not_run, code in blocks if not not_run]


@pytest.fixture(scope="module")
def quickstart_outputs(tmp_path_factory):
    """A folder like the repository after `make quickstart`, with tiny untrained models."""
    from softvq_hf import AutoencoderSoftVQ, DiTTransformer1DModel, SoftVQPipeline, StochasticInterpolantScheduler
    from softvq_hf.data import load_image_dataset

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("repository")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    dataset = load_image_dataset("photographs", split="validation", resolution=64, train=False)
    vae = AutoencoderSoftVQ(
        sample_size=64,
        num_latent_tokens=16,
        latent_channels=16,
        codebook_size=16,
        encoder_hidden_size=16,
        encoder_num_layers=1,
        encoder_num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        shift_factor=0.1,
        scaling_factor=2.0,
    )
    transformer = DiTTransformer1DModel(
        num_tokens=16,
        in_channels=16,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=dataset.num_classes,
    )
    pipeline = SoftVQPipeline(
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=StochasticInterpolantScheduler(),
        id2label=dataset.id2label,
    )
    pipeline.save_pretrained(folder / "outputs/quickstart/generator")
    vae.save_pretrained(folder / "outputs/quickstart/tokenizer")
    return folder


@pytest.mark.parametrize("document", PYTHON_DOCUMENTS)
def test_python_snippets_run(document, quickstart_outputs, monkeypatch):
    monkeypatch.chdir(quickstart_outputs)
    snippets = python_snippets(document)
    assert snippets
    namespace = {}
    for code in snippets:
        exec(compile(code, document, "exec"), namespace)


def test_trust_remote_code_stands_wherever_custom_pipeline_does():
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "training").glob("*.py")]:
        for call in re.findall(r"from_pretrained\([^)]*custom_pipeline=[^)]*\)", document.read_text()):
            assert "trust_remote_code=True" in call or "..." in call, f"{document}: {call}"
