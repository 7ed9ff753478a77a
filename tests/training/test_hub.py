"""Export, model cards and upload; upload and download against a stand-in for the Hub on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.hub import export_pipeline, export_tokenizer, pipeline_card, push_folder, tokenizer_card


def run_python(code: str, folder: Path, **environment: str) -> None:
    """Run code in a fresh process with its own cache."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def snippet(card: ModelCard) -> str:
    """The code example of a card."""
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)


# Export and cards


def test_export_pipeline(tiny_pipeline, tmp_path):
    export_pipeline(tiny_pipeline(), tmp_path / "exported")
    files = {str(path.relative_to(tmp_path / "exported")) for path in (tmp_path / "exported").rglob("*.*")}
    assert files == {
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


def test_export_tokenizer(tiny_pipeline, tmp_path):
    vae = tiny_pipeline().vae
    card = tokenizer_card(vae, repo_id="user/tokenizer", dataset_name="photographs")
    export_tokenizer(vae, tmp_path / "tokenizer", card)
    loaded = AutoencoderSoftVQ.from_pretrained(tmp_path / "tokenizer")
    assert all(loaded.config[name] == value for name, value in vae.config.items() if not name.startswith("_"))
    assert all(torch.equal(*pair) for pair in zip(vae.parameters(), loaded.parameters(), strict=True))
    assert (tmp_path / "tokenizer" / "README.md").read_text() == str(card)


@pytest.mark.parametrize("make_card", [tokenizer_card, pipeline_card])
def test_full_card(tiny_pipeline, make_card):
    pipeline = tiny_pipeline()
    card = make_card(
        pipeline.vae if make_card is tokenizer_card else pipeline,
        repo_id="user/model",
        dataset_name="photographs",
        evaluation_dataset="held-out crops of photographs, 64 images",
        training_settings={
            "learning_rate": 1e-4,
            "transform": "a|b",
            "hub_token": "hf_secret",
            "max_train_samples": None,
        },
        metrics={"psnr": 21.23456, "rfid": 100},
        base_model="user/base",
    )
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert card.data.base_model == "user/base" and "user/base" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["psnr"].metric_value == 21.23456 and results["rfid"].metric_value == 100.0
    assert results["psnr"].dataset_name == "held-out crops of photographs, 64 images"
    assert "model-index:" in str(card)

    assert "| psnr | 21.23 |" in card.text and "| rfid | 100 |" in card.text
    assert "| learning_rate | 0.0001 |" in card.text and r"| transform | a\|b |" in card.text
    assert "hf_secret" not in str(card) and "max_train_samples" not in card.text
    assert f"- torch {torch.__version__.split('+')[0]}" in card.text and "- softvq-hf" in card.text
    assert "chen2025softvqvae" in card.text
    num_parameters = pipeline.vae.num_parameters()
    if make_card is pipeline_card:
        assert "trust_remote_code=True" in snippet(card)
        num_parameters += pipeline.transformer.num_parameters()
    assert f"{num_parameters:,} parameters" in card.text
    for leftover in ("TODO", "{{", "{%", "More Information", "None"):
        assert leftover not in str(card)


@pytest.mark.parametrize("make_card", [tokenizer_card, pipeline_card])
def test_card_says_only_what_it_was_told(tiny_pipeline, make_card):
    pipeline = tiny_pipeline()
    card = make_card(pipeline.vae if make_card is tokenizer_card else pipeline, repo_id="user/model")
    assert card.data.eval_results is None and "model-index" not in str(card)
    assert "## Results" not in card.text and "## Training" not in card.text
    with pytest.raises(ValueError, match="`evaluation_dataset` and `dataset_name` are None, allowed with `metrics`"):
        make_card(
            pipeline.vae if make_card is tokenizer_card else pipeline, repo_id="user/model", metrics={"psnr": 20.0}
        )


@pytest.mark.slow
def test_code_examples_of_cards_run(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    export_pipeline(pipeline, tmp_path / "generator", pipeline_card(pipeline, repo_id="generator"))
    export_tokenizer(pipeline.vae, tmp_path / "tokenizer", tokenizer_card(pipeline.vae, repo_id="tokenizer"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(
        tmp_path / "photo.png"
    )

    cards = [ModelCard.load(tmp_path / name / "README.md") for name in ("generator", "tokenizer")]
    run_python("\n".join(map(snippet, cards)), tmp_path, HF_HUB_OFFLINE="1")
    assert Image.open(tmp_path / "sample.png").size == (16, 16)
    assert Image.open(tmp_path / "reconstruction.png").size == (16, 16)


# Upload and download


class HubStandIn(BaseHTTPRequestHandler):
    """The few requests of huggingface_hub that creating, uploading and downloading a model repository make."""

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
            repository = self.repositories["/".join(self.path.split("/")[3:5])]
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.commit_messages.append(entry["value"]["summary"])
                else:
                    repository[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": f"{address}/user/model/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({"error": self.path}, status=404)

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/(user/[^/]+)(/revision/.*|/tree/.*)?", path):
            files = self.repositories.get(found[1])
            if files is None:
                self.answer({"error": "no such repository"}, status=404, X_Error_Code="RepoNotFound")
            elif "/tree/" in path:
                self.answer(
                    [{"type": "file", "path": n, "size": len(c), "oid": self.etag(c)} for n, c in files.items()]
                )
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer({"id": found[1], "sha": "0" * 40, "siblings": siblings})
        elif found := re.fullmatch(r"/(user/[^/]+)/resolve/[^/]+/(.*)", path):
            content = self.repositories[found[1]].get(found[2])
            if content is None:
                self.answer({"error": "no such file"}, status=404, X_Error_Code="EntryNotFound")
            else:
                self.answer(content, ETag=f'"{self.etag(content)}"', X_Repo_Commit="0" * 40)
        else:
            self.answer({"error": self.path}, status=404)

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


GENERATE = """
import numpy, torch
pipeline.set_progress_bar_config(disable=True)
images = pipeline(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
numpy.save("images.npy", images)
"""


@pytest.fixture
def exported(tiny_pipeline, tmp_path):
    """An exported pipeline; its folder is `tmp_path / "exported"`. Returns what `GENERATE` makes of it."""
    pipeline = tiny_pipeline()
    export_pipeline(pipeline, tmp_path / "exported", pipeline_card(pipeline, repo_id="user/model"))
    generator = torch.Generator().manual_seed(0)
    return pipeline(0, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.slow
def test_push_and_load_from_the_hub(exported, hub, tmp_path):
    for name in ("checkpoint-10/model.safetensors", "logs/events", ".cache/lock", "metrics.jsonl"):
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
    assert not [name for name in files if name.startswith(("checkpoint-", "logs", "."))]
    assert hub.commit_messages == ["Train SiT"]

    # Our class leaves the code in the repository alone, needs no flag, and works from the cache.
    run_python(
        "import pathlib\n"
        "from softvq_hf import SoftVQPipeline\n"
        "SoftVQPipeline.from_pretrained('user/model')\n"
        "pipeline = SoftVQPipeline.from_pretrained('user/model', local_files_only=True)\n"
        "assert not list(pathlib.Path('hf_home').rglob('*.py'))\n" + GENERATE,
        tmp_path,
        HF_ENDPOINT=hub.address,
    )
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), exported, rtol=0, atol=1e-6)

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
def test_load_weights_only_repository(tiny_pipeline, exported, hub, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    files = {
        str(path.relative_to(tmp_path / "saved")): path.read_bytes()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    files["vae/diffusion_pytorch_model.fp16.safetensors"] = b"another variant, not to be downloaded"
    hub.repositories["user/model"] = files
    run_python(
        "import pathlib\n"
        "from softvq_hf import SoftVQPipeline\n"
        "pipeline = SoftVQPipeline.from_pretrained('user/model')\n"
        "assert not list(pathlib.Path('hf_home').rglob('*fp16*'))\n" + GENERATE,
        tmp_path,
        HF_ENDPOINT=hub.address,
    )
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), exported, rtol=0, atol=1e-6)


def test_push_refuses_what_is_no_model_folder(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="`folder` is .*, allowed: an existing folder with a model card"):
            push_folder("user/model", folder)
