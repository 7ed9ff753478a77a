"""Export, model cards and upload; upload and download against a stand-in for the Hub on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler
from huggingface_hub import ModelCard
from PIL import Image

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.hub import (
    export_model,
    export_pipeline,
    generator_card,
    pipeline_card,
    push_folder,
    read_model_card,
    tokenizer_card,
    training_command,
)


ROOT = Path(__file__).parents[2]

BLOCK_SOFTVQ_HF = (Path(__file__).parents[1] / "fixtures/block_softvq_hf.py").read_text()


def run_python(code: str, folder: Path, **environment: str) -> None:
    """Run code in a fresh process with its own cache."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def snippets(card: ModelCard) -> list[str]:
    """The code examples of a card."""
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def file_names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def make_card(kind: str, pipeline: SoftVQPipeline, **facts) -> ModelCard:
    """The card of a pipeline or of one of its parts."""
    if kind == "pipeline":
        return pipeline_card(pipeline, repo_id="user/model", **facts)
    if kind == "generator":
        return generator_card(pipeline.transformer, repo_id="user/model", **facts)
    return tokenizer_card(pipeline.vae, repo_id="user/model", **facts)


KINDS = pytest.mark.parametrize("kind", ["tokenizer", "generator", "pipeline"])
FACTS = {
    "dataset_name": "user/photographs",
    "evaluation_dataset": "held-out crops of user/photographs",
    "num_evaluation_images": 5000,
    "evaluation_protocol": "Mean over images.",
    "training_command": "accelerate launch train.py --learning_rate=1e-4",
    "training_settings": {
        "learning_rate": 1e-4,
        "transform": "a|b",
        "hub_token": "hf_secret",
        "max_train_samples": None,
    },
    "metrics": {"psnr": 21.23456, "rfid": 100},
    "base_model": "user/base",
}


# Export


def test_export_pipeline(tiny_pipeline, tmp_path):
    export_pipeline(tiny_pipeline(), tmp_path / "exported")
    assert file_names(tmp_path / "exported") == {
        "README.md",
        "model_index.json",
        "pipeline_softvq.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/transformer_dit_1d.py",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/autoencoder_softvq.py",
    }
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_softvq", "SoftVQPipeline"]
    assert index["vae"] == ["autoencoder_softvq", "AutoencoderSoftVQ"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


@pytest.mark.parametrize(
    ("component", "source"), [("vae", "autoencoder_softvq"), ("transformer", "transformer_dit_1d")]
)
def test_export_model(tiny_pipeline, tmp_path, component, source):
    model = getattr(tiny_pipeline(), component)
    export_model(model, tmp_path)
    assert file_names(tmp_path) == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        f"{source}.py",
    }
    loaded = type(model).from_pretrained(tmp_path)
    assert "auto_map" not in loaded.config
    assert all(loaded.config[name] == value for name, value in model.config.items() if not name.startswith("_"))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), loaded.parameters(), strict=True))

    card = make_card({"vae": "tokenizer", "transformer": "generator"}[component], tiny_pipeline())
    export_model(loaded, tmp_path / "again", card)
    assert (tmp_path / "again" / "README.md").read_text() == str(card)
    for name in file_names(tmp_path / "again") - {"README.md", "config.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_export_model_of_diffusers(tmp_path):
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    with pytest.raises(ValueError, match="`model_card` is None, allowed for a AutoencoderKL of diffusers"):
        export_model(vae, tmp_path / "vae")
    assert not (tmp_path / "vae").exists()
    export_model(vae, tmp_path / "vae", ModelCard("# An autoencoder"))
    assert file_names(tmp_path / "vae") == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_exported_model_needs_diffusers_only(tiny_pipeline, tmp_path, component):
    model = getattr(tiny_pipeline(), component)
    export_model(model, tmp_path / "exported")
    run_python(
        f"""
{BLOCK_SOFTVQ_HF}
from diffusers import AutoModel
try:
    AutoModel.from_pretrained("exported")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code ran without trust_remote_code=True")

model = AutoModel.from_pretrained("exported", trust_remote_code=True)
assert type(model).__name__ == {type(model).__name__!r} and not model.training
assert not [name for name in sys.modules if name.split(".")[0] == "softvq_hf"]
model.save_pretrained("saved")
""",
        tmp_path,
        HF_HUB_OFFLINE="1",
    )
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), loaded.parameters(), strict=True))

    # what was loaded in such a way can be exported again, and our class runs no code from the folder
    run_python(
        f"""
import sys
from diffusers import AutoModel
from softvq_hf import {type(model).__name__}
from softvq_hf.training.hub import export_model
{type(model).__name__}.from_pretrained("exported")
assert not [name for name in sys.modules if name.startswith("diffusers_modules")]
export_model(AutoModel.from_pretrained("exported", trust_remote_code=True), "again")
""",
        tmp_path,
        HF_HUB_OFFLINE="1",
    )
    assert file_names(tmp_path / "again") == file_names(tmp_path / "exported")
    for name in file_names(tmp_path / "again") - {"README.md", "config.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()


# Cards


@KINDS
def test_full_card(tiny_pipeline, kind):
    pipeline = tiny_pipeline()
    card = make_card(kind, pipeline, **FACTS)
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert "softvq-hf" in card.data.tags and ("softvq" in card.data.tags) == (kind == "tokenizer")
    assert card.data.datasets == ["user/photographs"] and "datasets/user/photographs" in card.text
    assert card.data.base_model == "user/base" and "user/base" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["psnr"].metric_value == 21.23456 and results["rfid"].metric_value == 100.0
    for result in results.values():
        assert result.dataset_name == "held-out crops of user/photographs"
        assert result.dataset_type == "user/photographs"
        assert result.dataset_args == {"num_images": 5000}
        assert result.metric_args == {"protocol": "Mean over images."}
    assert "model-index:" in str(card)
    # the metadata can be read again
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()

    assert "Measured on held-out crops of user/photographs, 5,000 images. Mean over images." in card.text
    assert "| psnr | 21.23 |" in card.text and "| rfid | 100 |" in card.text
    assert "```bash\naccelerate launch train.py --learning_rate=1e-4\n```" in card.text
    assert "| learning_rate | 0.0001 |" in card.text and r"| transform | a\|b |" in card.text
    assert "hf_secret" not in str(card) and "max_train_samples" not in card.text
    assert f"- torch {torch.__version__.split('+')[0]}" in card.text and "- softvq-hf" in card.text
    assert ("chen2025softvqvae" in card.text) == (kind != "generator")
    assert ("ma2024sit" in card.text) == (kind != "tokenizer")
    parts = {"tokenizer": ["vae"], "generator": ["transformer"], "pipeline": ["vae", "transformer"]}[kind]
    num_parameters = sum(getattr(pipeline, part).num_parameters() for part in parts)
    assert f"{num_parameters:,} parameters" in card.text
    for leftover in ("TODO", "{{", "{%", "More Information", "None"):
        assert leftover not in str(card)


@KINDS
def test_card_has_the_config(tiny_pipeline, kind):
    pipeline = tiny_pipeline()
    config = json.loads(re.search(r"```json\n(.*?)```", make_card(kind, pipeline).text, re.DOTALL).group(1))
    if kind == "pipeline":
        assert config.keys() == {"vae", "transformer", "scheduler"}
        assert config["scheduler"]["_class_name"] == "FlowMatchEulerDiscreteScheduler"
        config = config["vae"]
    model_class = DiTTransformer1DModel if kind == "generator" else AutoencoderSoftVQ
    assert config.pop("_class_name") == model_class.__name__
    model = model_class(**config)
    part = pipeline.transformer if kind == "generator" else pipeline.vae
    assert model.num_parameters() == part.num_parameters()


@KINDS
def test_card_says_only_what_it_was_told(tiny_pipeline, kind, tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    card = make_card(kind, pipeline)
    assert card.data.eval_results is None and "model-index" not in str(card)
    assert "## Results" not in card.text and "## Training" not in card.text
    assert card.data.datasets is None and card.data.base_model is None
    assert make_card(kind, pipeline, license=None).data.license is None
    assert make_card(kind, pipeline, license="other").data.license == "other"

    # only what is on the Hub goes into the metadata
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "images").mkdir(parents=True)
    names = {name: name for name in ("photographs", "data/images", "the photographs of user/name")}
    names |= {str(tmp_path / "data"): "data", "~/my/data": "data", f"half of {tmp_path}/data": "half of data"}
    for local, name in names.items():
        card = make_card(kind, pipeline, dataset_name=local, base_model=local)
        assert card.data.datasets is None and card.data.base_model is None
        assert f"Trained on {name}." in card.text and f"Training started from {name}." in card.text

    with pytest.raises(ValueError, match="`evaluation_dataset` and `dataset_name` are None, allowed with `metrics`"):
        make_card(kind, pipeline, metrics={"psnr": 20.0}, evaluation_protocol="x")
    with pytest.raises(ValueError, match="`evaluation_protocol` is None, allowed with `metrics`: words"):
        make_card(kind, pipeline, metrics={"psnr": 20.0}, dataset_name="x")
    with pytest.raises(TypeError, match="Unknown arguments metric, allowed: dataset_name, metrics"):
        make_card(kind, pipeline, metric={"psnr": 20.0})


def test_cards_tell_systems_apart(tiny_pipeline):
    dit = tiny_pipeline(DDPMScheduler(), out_channels=12, timestep_scale=1.0)
    for card in (pipeline_card(dit, repo_id="x"), generator_card(dit.transformer, repo_id="x")):
        assert "dit" in card.data.tags and "ma2024sit" not in card.text and "[DiT]" in card.text
    assert "the noise of a DDPM chain and its variance" in card.text

    card = generator_card(tiny_pipeline().transformer, repo_id="x", tokenizer="user/tokenizer")
    assert "sit" in card.data.tags and "the velocity of a flow from noise to data" in card.text
    assert "[user/tokenizer](https://huggingface.co/user/tokenizer)" in card.text

    maetok = AutoencoderSoftVQ(
        **{**tiny_pipeline().vae.config, "quantizer": "none", "decoder_type": "movq", "encoder_mask_token": True}
    )
    card = tokenizer_card(maetok, repo_id="x")
    assert "[MAETok]" in card.text and "chen2025maetok" in card.text and "chen2025softvqvae" not in card.text

    latent_2d = {"in_channels": 4, "patch_size": 2, "sample_size": 8}
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    transformer = DiTTransformer1DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=4, **latent_2d
    )
    pipeline = SoftVQPipeline(vae=vae, transformer=transformer, scheduler=StochasticInterpolantScheduler())
    card = pipeline_card(pipeline, repo_id="x")
    assert "AutoencoderKL" in card.text and "16 × 16 pixels" in card.text
    assert "a map of 4 channels, 8 × 8" in card.text


def test_training_command():
    argv = ["training/train.py", "--config", "a b.yaml", "--hub_token", "hf_1", "--push_to_hub", "--hub-token", "hf_2"]
    assert training_command(8, "bf16", [*argv, '--model={"tau": 0.1}']) == (
        "accelerate launch --num_processes=8 --mixed_precision=bf16 \\\n"
        "    training/train.py \\\n    --config 'a b.yaml' \\\n    --push_to_hub \\\n    '--model={\"tau\": 0.1}'"
    )
    assert training_command(1, "no").endswith(sys.argv[-1]) or len(sys.argv) > 1


@KINDS
def test_card_is_filled_from_the_folder_of_a_run(tiny_pipeline, kind, tmp_path):
    start = {
        "started": "2026-01-01T00:00:00+00:00",
        "step": 0,
        "command": [
            "/home/user/code/train.py",
            "--train_data_dir=/home/user/images",
            "--output_dir",
            "/home/user/runs/1",
            "--seed=1",
        ],
        "versions": {"softvq-hf": "0.0.7", "torch": "2.15.0", "python": "3.11.0", "cuda": None},
        "git_revision": "abc123",
        "git_dirty": False,
        "num_processes": 4,
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "bf16",
        "devices": {"NVIDIA H200": 3, "NVIDIA A100": 1},
    }
    settings = {"output_dir": "/home/user/runs/1", "learning_rate": 1e-4, "max_train_samples": None}
    with pytest.raises(ValueError, match="`run_dir` is .*, allowed: the folder of a training run, with run.json"):
        make_card(kind, tiny_pipeline(), run_dir=tmp_path)
    (tmp_path / "run.json").write_text(json.dumps([start]))
    with pytest.raises(ValueError, match="`run_dir` is .*, with args.yaml"):
        make_card(kind, tiny_pipeline(), run_dir=tmp_path)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    card = make_card(kind, tiny_pipeline(), run_dir=tmp_path, dataset_name="/home/user/images")
    assert (
        "accelerate launch --num_processes=4 --mixed_precision=bf16 \\\n    train.py \\\n"
        "    --train_data_dir=images \\\n    --output_dir 1 \\\n    --seed=1\n"
    ) in card.text
    assert (
        "It ran on 3 × NVIDIA H200, 1 × NVIDIA A100 (MULTI_GPU, mixed precision: bf16), git revision `abc123`.\n"
    ) in card.text
    assert "| output_dir | 1 |\n| learning_rate | 0.0001 |\n" in card.text
    assert "- softvq-hf 0.0.7\n- torch 2.15.0\n- python 3.11.0\n\n" in card.text
    for leftover in ("/home", "None", "{{", "{%", "cuda", str(tmp_path)):
        assert leftover not in str(card)

    last = {**start, "step": 50, "git_revision": "def456", "git_dirty": True, "devices": {"cpu": 1}}
    (tmp_path / "run.json").write_text(json.dumps([start, start, last]))
    card = make_card(kind, tiny_pipeline(), run_dir=tmp_path, training_command="make it")
    assert "1 × cpu" in card.text and "```bash\nmake it\n```" in card.text
    assert "git revision `def456` with local changes, interrupted and resumed 2 times.\n" in card.text
    (tmp_path / "run.json").write_text(json.dumps([{**start, "git_revision": None, "distributed_type": "NO"}]))
    assert "1 × NVIDIA A100 (mixed precision: bf16).\n" in make_card(kind, tiny_pipeline(), run_dir=tmp_path).text


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")


@pytest.mark.slow
def test_code_examples_of_cards_run_without_the_package(tiny_pipeline, photo, tmp_path):
    pipeline = tiny_pipeline()
    export_pipeline(pipeline, tmp_path / "pipeline", pipeline_card(pipeline, repo_id="pipeline"))
    export_model(pipeline.vae, tmp_path / "tokenizer", tokenizer_card(pipeline.vae, repo_id="tokenizer"))
    card = generator_card(pipeline.transformer, repo_id="generator")
    export_model(pipeline.transformer, tmp_path / "generator", card)
    card = generator_card(pipeline.transformer, repo_id="folder", subfolder="transformer")
    export_model(pipeline.transformer, tmp_path / "folder" / "transformer", card)

    folders = ("pipeline", "tokenizer", "generator", "folder/transformer")
    code = [snippets(ModelCard.load(tmp_path / name / "README.md")) for name in folders]
    assert [len(examples) for examples in code] == [1, 1, 1, 1]
    check = "assert prediction.shape == (1, 10, 6)\ndel prediction\n"
    code = code[0] + code[1] + code[2] + [check] + code[3] + [check]
    run_python(BLOCK_SOFTVQ_HF + "\n".join(code), tmp_path, HF_HUB_OFFLINE="1")
    assert Image.open(tmp_path / "sample.png").size == (16, 16)
    assert Image.open(tmp_path / "reconstruction.png").size == (16, 16)


@pytest.mark.slow
def test_code_examples_of_cards_run_with_the_package(tiny_pipeline, tmp_path):
    code = ["from pathlib import Path"]
    export_model(tiny_pipeline().vae, tmp_path / "tokenizer")
    schedulers = {
        "flow": None,
        "interpolant": StochasticInterpolantScheduler(path_type="cosine"),
        "chain": DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False),
    }
    for name, scheduler in schedulers.items():
        changes = {"out_channels": 12, "timestep_scale": 1.0} if name == "chain" else {}
        transformer = tiny_pipeline(**changes).transformer
        card = generator_card(transformer, repo_id=name, tokenizer="tokenizer", scheduler=scheduler)
        export_model(transformer, tmp_path / name, card)
        examples = snippets(card)
        assert len(examples) == 2
        # the sentence below the examples
        inline = re.findall(r"With `softvq_hf` installed, `(.*?)` needs no flag", card.text)
        assert len(inline) == 1
        code += [*examples, *inline, f"Path('sample.png').rename('{name}.png')"]
    assert "DDPMScheduler(beta_schedule='squaredcos_cap_v2', variance_type='learned_range'" in card.text

    # fewer steps, for speed
    run_python(
        "\n".join(code).replace("num_inference_steps=50", "num_inference_steps=2"), tmp_path, HF_HUB_OFFLINE="1"
    )
    for name in schedulers:
        assert Image.open(tmp_path / f"{name}.png").size == (16, 16)


@pytest.mark.slow
def test_code_examples_of_folders_without_source_run_with_the_package(tiny_pipeline, photo, tmp_path):
    """As `save_pretrained` leaves them."""
    pipeline, code = tiny_pipeline(), []
    for name, model in {"pipeline": pipeline, "vae": pipeline.vae, "transformer": pipeline.transformer}.items():
        model.save_pretrained(tmp_path / name)
        code += snippets(read_model_card(tmp_path / name, model))
    assert len(code) == 3
    run_python("\n".join([*code, "assert prediction.shape == (1, 10, 6)"]), tmp_path, HF_HUB_OFFLINE="1")
    assert Image.open(tmp_path / "sample.png").size == (16, 16)
    assert Image.open(tmp_path / "reconstruction.png").size == (16, 16)


# Upload and download


class HubStandIn(BaseHTTPRequestHandler):
    """
    The few requests of huggingface_hub that creating, uploading and downloading a model repository make.
    `repositories["user/name"]` are the files on the main branch, `repositories["user/name@v1"]` those of revision v1.
    """

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    commit_messages: list[str]

    def log_message(self, *args):
        pass

    def answer(self, body: object = b"", status: int = 200, **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        address = f"http://{self.headers['Host']}"
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers["Content-Length"]))

        if self.headers.get("Authorization") != "Bearer hf_write":
            self.answer({"error": "no write access"}, status=401)
        elif self.path == "/api/repos/create":
            name = json.loads(content)["name"]
            self.repositories.setdefault(f"user/{name}", {})
            self.answer({"url": f"{address}/user/{name}", "name": f"user/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            revision = urllib.parse.unquote(self.path.split("/commit/")[1].split("?")[0])
            if revision != "main":
                name += f"@{revision}"
            repository = self.repositories.setdefault(name, {})
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.commit_messages.append(entry["value"]["summary"])
                else:
                    repository[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": f"{address}/user/model/commit/{'0' * 40}", "commitOid": "0" * 40})
        elif self.path.endswith("/discussions"):
            self.answer({"num": 1})
        else:
            self.answer({"error": self.path}, status=404)

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/(user/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            files, commit = self.find(found[1], found[3] or "main")
            if files is None:
                self.answer({"error": "no such repository"}, status=404, X_Error_Code="RepoNotFound")
            elif found[2] == "tree":
                self.answer(
                    [{"type": "file", "path": n, "size": len(c), "oid": self.etag(c)} for n, c in files.items()]
                )
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer({"id": found[1], "sha": commit, "siblings": siblings})
        elif found := re.fullmatch(r"/api/models/(user/[^/]+)/discussions/1", path):
            self.answer(
                {
                    "title": "Upload",
                    "num": 1,
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "draft",
                    "repo": {"name": found[1], "type": "model"},
                    "isPullRequest": True,
                    "changes": {"base": "refs/heads/main"},
                    "filesWithConflicts": [],
                    "events": [],
                }
            )
        elif found := re.fullmatch(r"/(user/[^/]+)/resolve/([^/]+)/(.*)", path):
            files, commit = self.find(found[1], found[2])
            if files is None:
                self.answer({"error": "no such repository"}, status=404, X_Error_Code="RepoNotFound")
            elif found[3] not in files:
                self.answer({"error": "no such file"}, status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                content = files[found[3]]
                self.answer(content, ETag=f'"{self.etag(content)}"', X_Repo_Commit=commit)
        else:
            self.answer({"error": self.path}, status=404)

    def find(self, repository: str, revision: str) -> tuple[dict[str, bytes] | None, str | None]:
        """Files and commit of a revision, which may be given by its commit."""
        for name, files in self.repositories.items():
            name, _, branch = name.partition("@")
            commit = self.etag((branch or "main").encode())
            if name == repository and revision in (branch or "main", commit):
                return files, commit
        return None, None

    do_HEAD = do_GET

    @staticmethod
    def etag(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub():
    """A running stand-in: `hub.address`, `hub.repositories["user/name"]` and `hub.commit_messages`."""
    handler = type("Hub", (HubStandIn,), {"repositories": {}, "commit_messages": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.commit_messages = handler.repositories, handler.commit_messages
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
GENERATE = """
import numpy, torch
pipeline.set_progress_bar_config(disable=True)
images = pipeline(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
numpy.save("images.npy", images)
"""


def generate(pipeline: SoftVQPipeline) -> np.ndarray:
    """What `GENERATE` makes."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(0, num_inference_steps=2, generator=generator, output_type="np").images


def read_folder(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in file_names(folder)}


@pytest.fixture
def exported(tiny_pipeline, tmp_path):
    """An exported pipeline; its folder is `tmp_path / "exported"`. Returns what `GENERATE` makes of it."""
    pipeline = tiny_pipeline()
    export_pipeline(pipeline, tmp_path / "exported", pipeline_card(pipeline, repo_id="user/model"))
    return generate(pipeline)


@pytest.mark.slow
def test_push_and_load_from_the_hub(exported, hub, tmp_path):
    for name in ("checkpoint-10/model.safetensors", "logs/events", ".cache/lock", "run.json", "metrics.jsonl"):
        (tmp_path / "exported" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "exported" / name).write_text("x")
    run_python(
        "from softvq_hf.training.hub import push_folder\n"
        "url = push_folder('model', 'exported', token='hf_write', private=True, commit_message='Train SiT')\n"
        f"assert url == '{hub.address}/user/model', url\n",
        tmp_path,
        HF_ENDPOINT=hub.address,
    )
    files = hub.repositories["user/model"]
    assert {"README.md", "metrics.jsonl", "pipeline_softvq.py", "vae/config.json"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoint-", "logs", ".", "run.json"))]
    assert hub.commit_messages == ["Train SiT"]
    card = files["README.md"].decode()
    assert card.count("user/model") >= 3 and str(tmp_path) not in card  # it named the folder

    # Our class leaves the code in the repository alone, needs no flag, and works from the cache.
    load = (
        "import pathlib\n"
        "from softvq_hf import SoftVQPipeline\n"
        "pipeline = SoftVQPipeline.from_pretrained('user/model')\n"
        "pipeline = SoftVQPipeline.from_pretrained('user/model', local_files_only=True)\n"
        "assert not list(pathlib.Path('hf_home').rglob('*.py'))\n" + GENERATE
    )
    for environment in ({"HF_ENDPOINT": hub.address}, OFFLINE):
        run_python(load, tmp_path, **environment)
        np.testing.assert_allclose(np.load(tmp_path / "images.npy"), exported, rtol=0, atol=1e-6)
        (tmp_path / "images.npy").unlink()

    # Plain diffusers runs the code in the repository, and asks for the flag.
    run_python(
        """
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained("user/model")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code ran without trust_remote_code=True")
pipeline = DiffusionPipeline.from_pretrained("user/model", trust_remote_code=True)
assert "diffusers_modules" in type(pipeline).__module__
"""
        + GENERATE
        # once the code is in the cache our class still leaves it alone
        + "from softvq_hf import AutoencoderSoftVQ, SoftVQPipeline\n"
        "assert type(SoftVQPipeline.from_pretrained('user/model').vae) is AutoencoderSoftVQ\n",
        tmp_path,
        HF_ENDPOINT=hub.address,
    )
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), exported, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_load_weights_only_repository(tiny_pipeline, hub, tmp_path):
    """What `save_pretrained` writes: no code. With variants, revisions and split weights."""
    pipeline, other = tiny_pipeline(), tiny_pipeline()
    with torch.no_grad():
        for parameter in other.vae.decoder.parameters():
            parameter.mul_(1.5)
    pipeline.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved" / "vae").glob("*-of-*.safetensors"))) > 1
    other.vae.save_pretrained(tmp_path / "saved" / "vae", variant="ema", max_shard_size="20KB")
    other.transformer.save_pretrained(tmp_path / "saved" / "transformer", variant="fp16")
    hub.repositories["user/model"] = read_folder(tmp_path / "saved")
    other.save_pretrained(tmp_path / "other")
    hub.repositories["user/model@v1"] = read_folder(tmp_path / "other")

    cases = {
        "usual": ({}, pipeline),
        "revision": ({"revision": "v1", "cache_dir": "usual"}, other),
        "variant": ({"variant": "ema"}, other),  # the transformer has no such variant, and comes as it is
        "given": ({"vae": "saved/vae"}, pipeline),
    }
    code = f"""
from softvq_hf import AutoencoderSoftVQ, SoftVQPipeline
for case, arguments in { {case: arguments for case, (arguments, _) in cases.items()} }.items():
    if "vae" in arguments:
        arguments["vae"] = AutoencoderSoftVQ.from_pretrained(arguments["vae"])
    pipeline = SoftVQPipeline.from_pretrained("user/model", **{{"cache_dir": case, **arguments}})
{textwrap.indent(GENERATE.replace('"images.npy"', 'f"{case}.npy"'), "    ")}
"""
    assert not np.allclose(generate(pipeline), generate(other), rtol=0, atol=1e-2)
    for environment in ({"HF_ENDPOINT": hub.address}, OFFLINE):
        run_python(code, tmp_path, **environment)
        for case, (_, expected) in cases.items():
            np.testing.assert_allclose(np.load(tmp_path / f"{case}.npy"), generate(expected), rtol=0, atol=1e-6)
            (tmp_path / f"{case}.npy").unlink()

    # what is not needed is not downloaded: other variants, the usual weights beside a variant, parts that are given
    files = {case: file_names(tmp_path / case) for case in ("usual", "variant", "given")}
    weights = {case: [name for name in names if name.endswith(".safetensors")] for case, names in files.items()}
    assert weights["usual"] and not [name for name in weights["usual"] if ".ema" in name or ".fp16" in name]
    assert {"/vae/" in name for name in weights["variant"]} == {True, False}
    for name in weights["variant"]:
        assert ("/vae/" in name) == (".ema-" in name) and ".fp16" not in name
    assert weights["given"] and not [name for name in files["given"] if "/vae/" in name]


@pytest.mark.slow
def test_push_to_hub(tiny_pipeline, hub, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    hub.repositories["user/known"] = {"README.md": b"---\nlicense: mit\n---\n# My own words\n"}
    run_python(
        f"""
from softvq_hf import SoftVQPipeline
from softvq_hf.training.hub import push_to_hub, tokenizer_card
from diffusers import AutoencoderKL

pipeline = SoftVQPipeline.from_pretrained("saved")
write = dict(token="hf_write")
card = tokenizer_card(pipeline.vae, repo_id="user/tokenizer", dataset_name="user/images")
url = push_to_hub(pipeline.vae, "user/tokenizer", model_card=card, commit_message="Train", **write)
assert url == "{hub.address}/user/tokenizer", url
push_to_hub(pipeline.transformer, "generator", private=True, **write)  # a repository of one's own
push_to_hub(pipeline, "user/pipeline", **write)
assert pipeline.push_to_hub("user/method", commit_message="By method", **write) == "{hub.address}/user/method"
pipeline.save_pretrained("saved again", push_to_hub=True, repo_id="user/saved", **write)
push_to_hub(pipeline.vae, "user/known", **write)
url = pipeline.push_to_hub("user/method", create_pr=True, model_card=card, **write)
assert url == "{hub.address}/user/method/discussions/1", url

# what cannot be done is an error, and nothing is sent
for arguments in (dict(variant="ema"), dict(subfolder="x"), dict(safe_serialization=False)):
    try:
        pipeline.push_to_hub("user/never", **arguments, **write)
    except ValueError as error:
        assert str(error).startswith(f"`{{list(arguments)[0]}}` is"), error
    else:
        raise AssertionError(arguments)
try:
    push_to_hub(AutoencoderKL(block_out_channels=[8], norm_num_groups=4), "user/never", **write)
except ValueError as error:
    assert "`model_card` is None" in str(error), error
else:
    raise AssertionError("no card")
try:
    push_to_hub(pipeline.vae, "user/never", token="hf_read")
except Exception as error:
    assert "401" in str(error), error
else:
    raise AssertionError("no write access")
""",
        tmp_path,
        HF_ENDPOINT=hub.address,
    )
    repositories = hub.repositories
    assert "user/never" not in repositories
    model_files = {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    assert repositories["user/tokenizer"].keys() == model_files | {"autoencoder_softvq.py"}
    assert repositories["user/generator"].keys() == model_files | {"transformer_dit_1d.py"}
    export_pipeline(pipeline, tmp_path / "exported")
    for name in ("user/pipeline", "user/method", "user/saved"):
        assert repositories[name].keys() == file_names(tmp_path / "exported"), name
    assert hub.commit_messages == [
        "Train",
        "Upload DiTTransformer1DModel",
        "Upload SoftVQPipeline",
        "By method",
        "Upload SoftVQPipeline",
        "Upload AutoencoderSoftVQ",
        "Upload SoftVQPipeline",
    ]
    cards = {name: ModelCard(files["README.md"].decode()) for name, files in repositories.items()}
    assert cards["user/tokenizer"].data.datasets == ["user/images"]
    # the card loads the repository by its full name; a card that was there stays
    assert 'from_pretrained("user/generator", trust_remote_code=True)' in cards["user/generator"].text
    assert cards["user/known"].text.strip() == "# My own words" and cards["user/known"].data.license == "mit"
    assert 'from_pretrained("user/method", trust_remote_code=True)' in cards["user/method"].text
    assert repositories["user/method@refs/pr/1"]["README.md"] == repositories["user/tokenizer"]["README.md"]

    # tokenizer and generator load from the Hub without this package, by a revision as well
    repositories["user/tokenizer@v1"] = repositories["user/tokenizer"]
    run_python(
        BLOCK_SOFTVQ_HF
        + """
from diffusers import AutoModel
vae = AutoModel.from_pretrained("user/tokenizer", trust_remote_code=True)
AutoModel.from_pretrained("user/tokenizer", revision="v1", trust_remote_code=True)
transformer = AutoModel.from_pretrained("user/generator", trust_remote_code=True)
vae.save_pretrained("vae"), transformer.save_pretrained("transformer")
""",
        tmp_path,
        HF_ENDPOINT=hub.address,
    )
    for name in ("vae", "transformer"):
        loaded = type(getattr(pipeline, name)).from_pretrained(tmp_path / name)
        parameters = zip(loaded.parameters(), getattr(pipeline, name).parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in parameters)


def test_push_of_a_carried_pipeline_needs_the_package(tiny_pipeline, tmp_path):
    export_pipeline(tiny_pipeline(), tmp_path / "exported")
    run_python(
        BLOCK_SOFTVQ_HF
        + """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
try:
    pipeline.push_to_hub("user/model")
except ModuleNotFoundError as error:
    assert "the package softvq-hf must be installed" in str(error), error
else:
    raise AssertionError("pushed")
""",
        tmp_path,
        HF_HUB_OFFLINE="1",
    )


@pytest.mark.slow
def test_push_by_the_training_script(hub, tokenizer_args, tmp_path):
    arguments = [
        *(word for word in tokenizer_args if "steps" not in word),
        "--output_dir=outputs/tokenizer",
        "--push_to_hub",
        "--hub_token=hf_write",
        "--max_train_steps=2",
        "--validation_steps=1",
        "--checkpointing_steps=1",
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": hub.address, "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    command = [sys.executable, str(ROOT / "training" / "train_softvq.py"), *arguments]

    def train(command):
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    result = train([word.replace("hf_write", "hf_read") for word in command])
    assert result.returncode != 0 and "401" in result.stderr
    assert not list((tmp_path / "outputs").rglob("*.jsonl"))  # before any work

    result = train(command)
    assert result.returncode == 0, result.stderr[-4000:]
    files = hub.repositories["user/tokenizer"]
    assert {"config.json", "autoencoder_softvq.py", "args.yaml", "metrics.jsonl"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoint-", "logs"))]
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("user/tokenizer", trust_remote_code=True)' in card.text
    (result,) = card.data.eval_results
    assert result.metric_type == "psnr" and result.dataset_args == {"num_images": 5}
    assert "PSNR in dB" in result.metric_args["protocol"]
    assert (
        "accelerate launch --num_processes=1 --mixed_precision=no" in card.text and "--max_train_steps=2" in card.text
    )
    assert not [name for name, content in files.items() if b"hf_write" in content]
    assert card.data.datasets is None and "Trained on photographs." in card.text


def test_push_refuses_what_is_no_model_folder(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="`folder` is .*, allowed: an existing folder with a model card"):
            push_folder("user/model", folder)


def test_pushed_card_names_the_repository_and_nothing_else_changes(hub, tmp_path):
    """Also where the name of the folder is part of many words."""
    run_python(
        """
from pathlib import Path
from softvq_hf import AutoencoderSoftVQ
from softvq_hf.training.hub import export_model, push_folder, tokenizer_card
vae = AutoencoderSoftVQ(
    sample_size=16, encoder_patch_size=8, decoder_patch_size=8, num_latent_tokens=4, num_codebooks=2, codebook_size=8,
    latent_channels=4, encoder_hidden_size=16, encoder_num_layers=1, encoder_num_attention_heads=2,
    decoder_hidden_size=16, decoder_num_layers=1, decoder_num_attention_heads=2,
)
card = tokenizer_card(
    vae, repo_id="to", dataset_name="photographs", metrics={"psnr": 20.0}, evaluation_protocol="PSNR in dB."
)
export_model(vae, "to", card)
before = Path("to/README.md").read_text()
push_folder("model", "to", token="hf_write")
after = Path("to/README.md").read_text()
assert "# user/model" in after and 'from_pretrained("user/model"' in after and "name: user/model" in after
names = ["# user/model", 'from_pretrained("user/model"', "name: user/model"]
for name in names:
    after = after.replace(name, name.replace("user/model", "to"))
assert after == before
""",
        tmp_path,
        HF_ENDPOINT=hub.address,
    )
