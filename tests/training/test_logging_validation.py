"""metrics.jsonl, the check of losses, PSNR and pictures."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.logging import MetricsLogger, mean_over_batches, reduce_losses
from softvq_hf.training.state import TrainerState
from softvq_hf.training.validation import averaged_weights, evaluate_reconstruction, image_grid, reconstruction_grid


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
    metrics.log({"validation/psnr": 20.0})
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


def test_losses_that_are_not_finite(accelerator_states):
    accelerator = Accelerator(cpu=True)
    losses = {"loss": torch.tensor(2.0, requires_grad=True), "kl": torch.tensor(0.5, dtype=torch.bfloat16)}
    assert reduce_losses(accelerator, losses, step=7) == {"loss": 2.0, "kl": 0.5}
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match=f"kl = {value} at step 7"):
            reduce_losses(accelerator, {**losses, "kl": torch.tensor(value)}, step=7)


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


def test_averaged_weights_come_and_go():
    model = Darker()
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    with torch.no_grad():
        model.shift.fill_(1.0)
    with pytest.raises(RuntimeError, match="inside"), averaged_weights(ema, model):
        assert model.shift.item() == pytest.approx(0.2) and not model.training
        raise RuntimeError("inside")
    assert model.shift.item() == 1.0 and model.training
    with averaged_weights(None, model):
        assert model.shift.item() == 1.0 and not model.training


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
