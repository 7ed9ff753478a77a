"""Training with several processes: data parallel and sharded (FSDP2), on processors with gloo."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.training.accelerator import build_fsdp_plugin
from softvq_hf.training.distributed import averaged_model


MODELS = {
    "train_softvq": AutoencoderSoftVQ,
    "train_sit": DiTTransformer1DModel,
    "train_mar": MARTransformer1DModel,
}
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "accelerate"

# Every loss that looks at more than one image. Not PatchGAN: without a GPU its BatchNorm counts a process's images.
GAN = [
    "--discriminator=maskbit",
    "--adversarial_start=2",
    "--adaptive_adversarial_weight",
    "--lecam_weight=0.001",
    "--consistency_weight=4.0",
    "--augment_discriminator",
]
# Adam's steps have the size of the learning rate where gradients are mere rounding, unless epsilon is above them.
RUN = ["--max_train_steps=4", "--validation_steps=0", "--adam_epsilon=1e-4", "--ema_decay=0.5", "--max_grad_norm=0.5"]


@pytest.fixture
def launch_with_config():
    """Starts a script by `accelerate launch` as a user does: `launch_with_config("fsdp2", "train_sit", *flags)`."""

    def run(config: str, script: str, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={CONFIGS / config}.yaml"]
        command += ["--num_processes=2", "--mixed_precision=no", f"--main_process_port={port}"]
        command += [str(ROOT / "training" / f"{script}.py"), *map(str, flags)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
        assert result.returncode == 0, result.stderr[-6000:]

    return run


@pytest.fixture
def softvq_flags(tokenizer_args) -> list[str]:
    return [*tokenizer_args, *GAN, *RUN]


@pytest.fixture
def sit_flags(tokenizer_dir, run_cache_latents, sit_args, tmp_path) -> list[str]:
    run_cache_latents(tokenizer_dir, tmp_path / "latents")
    return [*sit_args, *RUN, f"--latents_dir={tmp_path / 'latents'}"]


@pytest.fixture
def mar_flags(mar_args, mar_config, latents_dir) -> list[str]:
    """Without dropout, whose draws belong to a batch."""
    model = json.dumps({**mar_config, "attention_dropout": 0.0, "dropout": 0.0})
    return [*mar_args, *RUN, f"--latents_dir={latents_dir}", f"--model={model}"]


def assert_same_weights(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], tolerance: float) -> None:
    """Differences stay below `tolerance` times the largest entry of the tensor (0.001 for weights near 0)."""
    assert weights.keys() == others.keys() and weights
    for name in weights:
        difference = (weights[name] - others[name]).abs().max()
        assert difference <= tolerance * weights[name].abs().max().clamp(min=1e-3), f"{name}: {difference}"


def assert_same_losses(metrics: list[dict], others: list[dict], tolerance: float) -> None:
    assert [line.keys() for line in metrics] == [line.keys() for line in others] and metrics
    for line, other in zip(metrics, others, strict=True):
        for name, value in line.items():
            expected = None if value is None else pytest.approx(value, rel=tolerance, abs=tolerance * 1e-2)
            assert other[name] == expected, f"{line['step']} {name}"


def model_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights of all models of an unsharded checkpoint, without the name that data parallel training adds."""
    return {
        f"{file.name} {name.removeprefix('module.')}": tensor
        for file in sorted(checkpoint.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("script", MODELS)
def test_two_processes_train_as_one(script, request, run_main, launch, tmp_path, read_metrics):
    """Half the images on each of two processes: the same losses and weights, up to rounding."""
    flags = request.getfixturevalue(f"{script.removeprefix('train_')}_flags")
    one, two = tmp_path / "one", tmp_path / "two"
    run_main(script, *flags, "--train_batch_size=4", f"--output_dir={one}")
    launch(script, *flags, "--train_batch_size=2", f"--output_dir={two}", num_processes=2)

    assert_same_losses(read_metrics(one), read_metrics(two), tolerance=1e-4)
    weights, others = model_weights(one / "checkpoint-4"), model_weights(two / "checkpoint-4")
    assert_same_weights(weights, others, tolerance=1e-4)
    start = model_weights(one / "checkpoint-2")  # the updates are much larger than the tolerance
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    part = "." if script == "train_softvq" else "transformer"
    averages, others = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for folder in (one, two))
    assert_same_weights(averages, others, tolerance=1e-4)


@pytest.mark.parametrize("script", MODELS)
def test_fsdp2_trains_saves_resumes_and_exports(script, request, run_main, launch_with_config, tmp_path, read_metrics):
    flags = request.getfixturevalue(f"{script.removeprefix('train_')}_flags")
    one, sharded, resumed = tmp_path / "one", tmp_path / "sharded", tmp_path / "resumed"
    run_main(script, *flags, "--train_batch_size=4", "--validation_steps=4", f"--output_dir={one}")
    flags = [*flags, "--train_batch_size=2", "--validation_steps=4"]
    launch_with_config("fsdp2", script, *flags, f"--output_dir={sharded}")

    # the same training, and a result that one process loads
    assert_same_losses(read_metrics(one), read_metrics(sharded), tolerance=1e-4)
    folder = "" if script == "train_softvq" else "transformer"
    weights, others = (MODELS[script].from_pretrained(run / folder).state_dict() for run in (one, sharded))
    assert_same_weights(weights, others, tolerance=1e-4)

    # interrupted after the second update
    shutil.copytree(sharded, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    launch_with_config("fsdp2", script, *flags, f"--output_dir={resumed}", "--resume_from_checkpoint=latest")
    assert read_metrics(sharded) == read_metrics(resumed)
    last = sharded / "checkpoint-4"
    files = sorted(path.name for path in last.glob("*.bin"))
    assert len(files) == (4 if script == "train_softvq" else 2)  # a model and an optimizer, twice in a GAN
    for file in files:
        state, other = (torch.load(run / "checkpoint-4" / file, weights_only=True) for run in (sharded, resumed))
        if file.startswith("optimizer"):
            groups, others = ([{**g, "betas": list(g["betas"])} for g in s["param_groups"]] for s in (state, other))
            assert groups == others
            state, other = ({f"{p} {k}": m[k] for p, m in s["state"].items() for k in m} for s in (state, other))
        assert_same_weights(state, other, tolerance=0)
    averages, others = (load_file(run / "checkpoint-4" / "ema.safetensors") for run in (sharded, resumed))
    assert_same_weights(averages, others, tolerance=0)


BREAK_LOSS = """
import os, runpy, sys
import torch
original, calls = torch.nn.functional.mse_loss, []

def broken(*args, **kwargs):
    calls.append(None)
    return original(*args, **kwargs) * (torch.nan if len(calls) == 4 and os.environ["RANK"] == "1" else 1)

torch.nn.functional.mse_loss = broken
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_fsdp2_leaves_out_an_update_that_is_not_finite(softvq_flags, launch_with_config, tmp_path, read_metrics):
    """The second of two accumulated batches is broken on one process: FSDP2 goes on as DDP does."""
    (tmp_path / "break_loss.py").write_text(BREAK_LOSS)
    flags = [*softvq_flags, "--gradient_accumulation_steps=2", "--consistency_weight=0", "--train_batch_size=2"]
    script = str(ROOT / "training" / "train_softvq.py")
    for config in ("multi_gpu", "fsdp2"):
        launch_with_config(config, tmp_path / "break_loss", script, *flags, f"--output_dir={tmp_path / config}")
    metrics, others = read_metrics(tmp_path / "multi_gpu"), read_metrics(tmp_path / "fsdp2")
    assert [line["step"] for line in others if line["loss"] is None] == [2]
    assert_same_losses(metrics, others, tolerance=1e-4)
    weights, others = (
        AutoencoderSoftVQ.from_pretrained(tmp_path / config).state_dict() for config in ("multi_gpu", "fsdp2")
    )
    assert_same_weights(weights, others, tolerance=1e-4)

    # the discriminator's optimizer had taken no step when the checkpoint was written
    shutil.copytree(tmp_path / "fsdp2", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    flags += [f"--output_dir={tmp_path / 'resumed'}", "--resume_from_checkpoint=latest"]
    launch_with_config("fsdp2", "train_softvq", *flags)
    assert read_metrics(tmp_path / "resumed") == read_metrics(tmp_path / "fsdp2")


def test_averaged_model_gives_the_weights_back(accelerator_states):
    accelerator = Accelerator(cpu=True)
    model = DiTTransformer1DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8).train()
    ema = EMAModel(model.parameters(), decay=0.5, foreach=True)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for average in ema.shadow_params:
            average.add_(1.0)
    with averaged_model(accelerator, model, ema) as averaged:
        assert not averaged.training
        assert all(torch.equal(weight, before[name] + 1) for name, weight in averaged.named_parameters())
    assert model.training
    assert_same_weights(model.state_dict(), before, tolerance=0)


def test_fsdp1_is_refused(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="`fsdp_version` .* is 1, allowed: 2"):
        build_fsdp_plugin()


@pytest.mark.parametrize(
    ("name", "distributed_type"),
    [
        ("one_process", DistributedType.NO),
        ("single_gpu", DistributedType.NO),
        ("multi_gpu", DistributedType.MULTI_GPU),
        ("multi_node", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
    ],
)
def test_configurations_are_known_to_the_launcher(name, distributed_type):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys, but for those of plugins
    assert config.distributed_type == distributed_type
    launcher = vars(launch_command_parser().parse_args(["script.py"]))
    assert launcher.keys() >= config.fsdp_config.keys() | config.deepspeed_config.keys()
    assert config.fsdp_config.get("fsdp_version", 2) == config.deepspeed_config.get("zero_stage", 2) == 2


def test_every_configuration_is_tested():
    assert len(list(CONFIGS.glob("*.yaml"))) == 6
