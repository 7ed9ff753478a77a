"""metrics.jsonl and trackers, the record of a run, figures of validation and pictures."""

import json
import math
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.training_utils import EMAModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.logging import (
    MetricsLogger,
    mean_over_batches,
    reduce_losses,
    step_statistics,
    without_hub_token,
    write_run_record,
)
from softvq_hf.training.state import TrainerState
from softvq_hf.training.validation import evaluate_reconstruction, image_grid, reconstruction_grid


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file(accelerator_states, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_train_steps=1, report_to="none")
    state = TrainerState()
    metrics = MetricsLogger(Accelerator(cpu=True), args, state)
    assert metrics.last_validation() == {}
    for state.step in (1, 2, 3):
        metrics.log({"loss": 1 / state.step, "grad_norm": math.inf if state.step == 2 else 1.0})
        assert len(read(tmp_path)) == state.step  # each line is on disk at once
    metrics.log({"validation/psnr": 20.0, "validation/rfid": math.nan})
    assert metrics.last_validation() == {"psnr": 20.0}
    metrics.close()
    assert read(tmp_path)[1] == {
        "step": 2,
        "epoch": 0,
        "time": read(tmp_path)[1]["time"],
        "loss": 0.5,
        "grad_norm": None,
    }

    # killed in the middle of a line, resumed from step 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    state = TrainerState(step=2, epoch=1, seconds=100.0)
    metrics = MetricsLogger(Accelerator(cpu=True), args, state)
    state.step = 3
    metrics.log({"loss": 0.25})
    metrics.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    assert read(tmp_path)[2]["epoch"] == 1 and read(tmp_path)[2]["time"] >= 100

    # a fresh start leaves nothing of an earlier run
    MetricsLogger(Accelerator(cpu=True), args, TrainerState()).close()
    assert read(tmp_path) == []


def tracked(report_to: str, output_dir: Path, step: int, last_step: int) -> None:
    """A run from `step` on, as the scripts log it: a loss and a picture at each step."""
    args = TrainingArguments(output_dir=str(output_dir), max_train_steps=last_step, tracker_project_name="tiny")
    project = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs"))
    accelerator = Accelerator(cpu=True, log_with=report_to, project_config=project)
    state = TrainerState(step=step)
    metrics = MetricsLogger(accelerator, args, state)
    for state.step in range(step + 1, last_step + 1):
        metrics.log({"loss": step + 1 / state.step, "grad_norm": math.nan})
        metrics.log_image("samples", Image.new("RGB", (8, 4), (255, 0, 0)))
    metrics.close()


def test_tensorboard_goes_on_with_its_curves(accelerator_states, tmp_path):
    tracked("tensorboard", tmp_path, step=0, last_step=4)
    time.sleep(1)  # TensorBoard sorts the files of a process by their second, then as text ("10" before "9")
    tracked("tensorboard", tmp_path, step=2, last_step=5)  # interrupted at 4, resumed from a checkpoint at 2
    events = EventAccumulator(str(tmp_path / "logs" / "tiny"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    values = [1, 1 / 2, 2 + 1 / 3, 2 + 1 / 4, 2 + 1 / 5]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(values)
    pictures = events.Images("samples")
    assert [picture.step for picture in pictures] == [1, 2, 3, 4, 5]
    assert (pictures[0].width, pictures[0].height) == (8, 4)
    assert np.asarray(Image.open(tmp_path / "samples" / "step-5.png"))[0, 0].tolist() == [255, 0, 0]


def test_wandb_goes_on_with_its_run(accelerator_states, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step, last_step in ((0, 3), (2, 4), (0, 1)):  # a run, resumed, and a fresh one in its place
        tracked("wandb", tmp_path, step, last_step)
    runs = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*"), key=os.path.getmtime)
    ids = [run.name.rpartition("-")[2] for run in runs]
    assert len(ids) == 3 and ids[0] == ids[1] != ids[2]
    assert ids[2] == (tmp_path / "logs" / "wandb_run_id").read_text()
    for run in runs:
        assert list(run.glob("*.wandb")) and list((run / "files/media/images").rglob("*.png"))


def test_losses_are_averaged_and_not_judged(accelerator_states):
    accelerator = Accelerator(cpu=True)
    losses = {"loss": torch.tensor(2.0, requires_grad=True), "kl": torch.tensor(0.5, dtype=torch.bfloat16)}
    assert reduce_losses(accelerator, losses) == {"loss": 2.0, "kl": 0.5}
    values = reduce_losses(accelerator, {"loss": torch.tensor(math.nan), "kl": torch.tensor(-math.inf)})
    assert math.isnan(values["loss"]) and values["kl"] == -math.inf


def test_step_statistics(accelerator_states):
    state = TrainerState()
    state.data_seconds = 0.5
    statistics = step_statistics(Accelerator(cpu=True), state, images=12, seconds=2.0)
    assert statistics["images_per_second"] == 6.0 and statistics["data_wait_share"] == 0.25
    assert state.data_seconds == 0.0
    ballast = torch.ones(2**26)  # 256 MiB
    grown = step_statistics(Accelerator(cpu=True), state, images=12, seconds=2.0)
    assert grown["data_wait_share"] == 0.0
    assert 0.2 < grown["memory_gib"] - statistics["memory_gib"] < 0.3 and len(ballast)


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_run_record(accelerator_states, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    script = tmp_path / "code" / "train.py"
    script.write_text("pass")
    (tmp_path / "run").mkdir()
    accelerator = Accelerator(cpu=True)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_train_steps=9, hub_token="hf_secret")
    words = [str(script), "--max_train_steps=9", "--hub_token=hf_secret", "--hub-token", "hf_secret", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", words)

    def starts() -> list[dict]:
        return json.loads((tmp_path / "run" / "run.json").read_text())

    write_run_record(accelerator, args, TrainerState())
    (start,) = starts()
    assert start["command"] == [str(script), "--max_train_steps=9", "--seed", "1"]
    assert start["git_revision"] is None and start["git_dirty"] is None
    assert start["step"] == 0 and start["num_processes"] == 1 and start["devices"] == {"cpu": 1}
    assert start["mixed_precision"] == "no" and start["distributed_type"] == "NO"
    assert abs(datetime.now(UTC) - datetime.fromisoformat(start["started"])).total_seconds() < 60
    assert start["versions"]["torch"] == torch.__version__.split("+")[0] and start["versions"]["python"] >= "3.11"
    assert {"softvq-hf", "diffusers", "transformers", "accelerate", "datasets", "peft"} <= start["versions"].keys()

    # resumed: the history is kept; the code lies in a repository now
    git(tmp_path / "code", "init")
    git(tmp_path / "code", "add", ".")
    git(tmp_path / "code", "commit", "-m", "Code")
    git(tmp_path / "code", "tag", "-a", "v1", "-m", "Version")  # named by its commit all the same
    write_run_record(accelerator, args, TrainerState(step=4))
    script.write_text("raise")
    write_run_record(accelerator, args, TrainerState(step=6))
    assert [start["step"] for start in starts()] == [0, 4, 6]
    assert [start["git_dirty"] for start in starts()] == [None, False, True]
    assert {start["git_revision"] for start in starts()} == {None, git(tmp_path / "code", "rev-parse", "HEAD")}

    # the arguments can be read again, the token is nowhere, and a fresh start has no history
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text()) == args.to_dict()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"args.yaml", "run.json"}
    assert not [path for path in (tmp_path / "run").iterdir() if "hf_secret" in path.read_text()]
    write_run_record(accelerator, args, TrainerState())
    assert len(starts()) == 1


def test_run_record_where_git_is_missing(accelerator_states, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write_run_record(
        Accelerator(cpu=True), TrainingArguments(output_dir=str(tmp_path), max_train_steps=1), TrainerState()
    )
    assert json.loads((tmp_path / "run.json").read_text())[0]["git_revision"] is None


def test_hub_token_is_taken_out_of_command_lines():
    words = [
        "train.py",
        "--hub_token",
        "a",
        "--seed=1",
        "--hub-token=b",
        "--hub_token=",
        "--push_to_hub",
        "--hub-token",
        "c",
    ]
    assert without_hub_token(words) == ["train.py", "--seed=1", "--push_to_hub"]
    assert without_hub_token(["--hub_token_file", "x"]) == ["--hub_token_file", "x"]


def test_mean_over_batches():
    assert mean_over_batches([{"loss": 1.0}, {"loss": 3.0, "grad_norm": 5.0}]) == {"loss": 2.0, "grad_norm": 5.0}


class Darker(torch.nn.Module):
    """Reconstructs images too dark by a known amount: 0.2 in [-1, 1], which is 0.1 in [0, 1], hence 20 dB."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, pixel_values: torch.Tensor) -> DecoderOutput:
        return DecoderOutput(sample=pixel_values - self.shift)


def test_psnr_is_the_mean_over_images(accelerator_states):
    images = [torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0, -1.0, 0.1)]
    dataloader = DataLoader(images, batch_size=2, collate_fn=lambda batch: {"pixel_values": torch.stack(batch)})
    accelerator = Accelerator(cpu=True)
    model = Darker()
    metrics, originals, reconstructions = evaluate_reconstruction(
        accelerator, model, accelerator.prepare(dataloader), num_images=3
    )
    # black stays black, for images are clamped: no error, which torchmetrics gives as infinite
    assert metrics["psnr"] == math.inf
    assert originals.shape == reconstructions.shape == (3, 3, 4, 4)
    metrics, _, _ = evaluate_reconstruction(
        accelerator, model, accelerator.prepare(DataLoader(images[:3], collate_fn=dataloader.collate_fn)), 1
    )
    assert metrics["psnr"] == pytest.approx(20.0, abs=1e-3)


def tiny_tokenizer(quantizer: str) -> AutoencoderSoftVQ:
    """8 tokens in 2 codebooks of 16 codewords ("softvq"), or in one ("vq")."""
    return AutoencoderSoftVQ(
        sample_size=16,
        encoder_patch_size=8,
        decoder_patch_size=8,
        num_latent_tokens=8,
        latent_channels=4,
        codebook_size=16,
        num_codebooks=2 if quantizer == "softvq" else 1,
        quantizer=quantizer,
        tau=0.3,
        encoder_hidden_size=16,
        encoder_num_layers=1,
        encoder_num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
    ).eval()


@pytest.mark.parametrize("quantizer", ["softvq", "vq", "kl"])
def test_codebook_figures(accelerator_states, quantizer):
    model, accelerator = tiny_tokenizer(quantizer), Accelerator(cpu=True)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    # the last batch is smaller, and one has no readable image
    batches = [{"pixel_values": batch} for batch in (images[:2], images[:0], images[2:4], images[4:])]
    metrics, _, _ = evaluate_reconstruction(accelerator, model, batches, num_images=2)
    if quantizer == "kl":
        assert metrics.keys() == {"psnr"}
        return

    with torch.no_grad():
        indices = model.encode(images).indices
        latent = model.quant_conv(model.encoder(images)) if quantizer == "softvq" else None
    choices = [indices[:, k].flatten().tolist() for k in range(indices.shape[1])]
    used = sum(len(set(codebook)) for codebook in choices)
    assert metrics["codebook_usage"] == pytest.approx(used / (16 * len(choices)))
    perplexities = []
    for codebook in choices:
        shares = [codebook.count(code) / len(codebook) for code in set(codebook)]
        perplexities.append(math.exp(-sum(share * math.log(share) for share in shares)))
    assert metrics["codebook_perplexity"] == pytest.approx(sum(perplexities) / len(choices))
    assert 1 < metrics["codebook_perplexity"] <= used
    if quantizer == "softvq":
        _, probabilities, _ = model.quantize(latent)
        assert metrics["max_probability"] == pytest.approx(probabilities.amax(-1).mean().item(), rel=1e-5)
        assert 1 / 16 < metrics["max_probability"] < 1
    else:
        assert "max_probability" not in metrics


def test_no_validation_image(accelerator_states):
    batches = [{"pixel_values": torch.empty(0, 3, 4, 4)}]
    with pytest.raises(ValueError, match="No validation image could be read"):
        evaluate_reconstruction(Accelerator(cpu=True), Darker(), batches, num_images=1)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.logging import reduce_losses, write_run_record
from softvq_hf.training.state import TrainerState
from softvq_hf.training.validation import evaluate_reconstruction

folder = sys.argv[1]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
losses = {"loss": torch.tensor(float(rank)), "kl": torch.tensor(1.0)}
assert reduce_losses(accelerator, losses) == {"loss": 0.5, "kl": 1.0}
loss = torch.tensor(float("nan") if rank == 1 else 1.0)
assert str(reduce_losses(accelerator, {"loss": loss})) == "{'loss': nan}"

model = AutoencoderSoftVQ.from_pretrained(folder).eval()
images = torch.load(f"{folder}/images.pt", weights_only=True)
# three batches for the first process, one for the second; then none for the second
for shares in ([(0, 1), (1, 2), (2, 4)], [(4, 5)]), ([(0, 5)], []):
    batches = [{"pixel_values": images[start:stop]} for start, stop in shares[rank]]
    metrics, originals, _ = evaluate_reconstruction(accelerator, model, batches, num_images=4)
    expected = json.loads(Path(folder, "expected.json").read_text())
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(metrics[name] - value) <= 1e-5 * abs(value), (name, metrics[name], value)
    assert len(originals) == (4 if rank == 0 else len(shares[1]))

write_run_record(accelerator, TrainingArguments(output_dir=folder, max_train_steps=1), TrainerState())
accelerator.wait_for_everyone()
(start,) = json.loads(Path(folder, "run.json").read_text())
assert start["devices"] == {"cpu": 2} and start["num_processes"] == 2 and start["distributed_type"] == "MULTI_CPU"
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes(accelerator_states, tmp_path):
    model, images = tiny_tokenizer("softvq"), torch.rand(5, 3, 16, 16) * 2 - 1
    expected, _, _ = evaluate_reconstruction(Accelerator(cpu=True), model, [{"pixel_values": images}], 1)
    model.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    (tmp_path / "check.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, "check.py", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def test_ema_decay_is_constant_from_the_first_update():
    """`min_decay=decay` with `optimization_step=1`, as the scripts make it."""
    model = Darker()
    ema = EMAModel(model.parameters(), decay=0.9, min_decay=0.9)
    ema.optimization_step = 1
    expected = 0.2
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.shift.fill_(value)
        ema.step(model.parameters())
        expected = 0.9 * expected + 0.1 * value
        assert ema.shadow_params[0].item() == pytest.approx(expected)


def test_grids():
    originals, reconstructions = torch.ones(3, 3, 8, 8), -torch.ones(3, 3, 8, 8)
    grid = np.asarray(reconstruction_grid(originals, reconstructions))
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert (grid[2:10, 2:10] == 255).all() and (grid[12:20, 22:30] == 0).all()
    assert image_grid(torch.zeros(6, 3, 8, 8), images_per_row=2).size == (2 * 10 + 2, 3 * 10 + 2)
