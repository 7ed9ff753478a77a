"""Shared by the tests of the training scripts: tiny models, and the two ways to run a script."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


ROOT = Path(__file__).parents[2]

# 32 pixels, 8 tokens of 4 channels
TOKENIZER = {
    "encoder_patch_size": 8,
    "decoder_patch_size": 8,
    "num_latent_tokens": 8,
    "latent_channels": 4,
    "codebook_size": 16,
    "num_codebooks": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 1,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
}
ARGUMENTS = {
    "train_softvq": "SoftVQTrainingArguments",
    "cache_latents": "CacheLatentsArguments",
    "linear_probe": "LinearProbeArguments",
    "train_sit": "SiTTrainingArguments",
    "train_mar": "MARTrainingArguments",
}
MAR = {
    "buffer_size": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 1,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
    "denoiser_hidden_size": 16,
    "denoiser_num_layers": 1,
}
GENERATOR_RUN = {
    "train_batch_size": 4,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "checkpointing_steps": 2,
    "validation_steps": 3,
    "num_inference_steps": 2,
    "num_sample_classes": 3,
    "num_samples_per_class": 2,
}
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.fixture
def tokenizer_config() -> dict:
    return dict(TOKENIZER)


@pytest.fixture
def transformer_config() -> dict:
    return dict(TRANSFORMER)


@pytest.fixture
def mar_config() -> dict:
    return dict(MAR)


@pytest.fixture
def tokenizer_dir(tmp_path) -> Path:
    """A saved tokenizer with latent statistics."""
    AutoencoderSoftVQ(sample_size=32, **TOKENIZER, scaling_factor=2.0, shift_factor=0.1).save_pretrained(
        tmp_path / "tokenizer"
    )
    return tmp_path / "tokenizer"


@pytest.fixture
def autoencoder_kl_dir(tmp_path):
    """A saved tokenizer of diffusers: 8 x 8 latents of 4 channels for 32 pixels, scaled by 0.18215."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    vae.save_pretrained(tmp_path / "autoencoder_kl")
    return tmp_path / "autoencoder_kl"


@pytest.fixture
def tokenizer_args() -> list[str]:
    """Arguments for two passes over 16 crops of the photographs, in 8 updates of 4 images."""
    return _flags(
        model=json.dumps(TOKENIZER),
        dataset_name="photographs",
        resolution=32,
        max_train_samples=16,
        max_validation_samples=5,
        train_batch_size=4,
        max_train_steps=6,
        learning_rate=1e-3,
        checkpointing_steps=2,
        validation_steps=3,
        num_validation_images=3,
    )


@pytest.fixture
def sit_args() -> list[str]:
    return _flags(model=json.dumps(TRANSFORMER), **GENERATOR_RUN)


@pytest.fixture
def mar_args() -> list[str]:
    return _flags(model=json.dumps(MAR), num_diffusion_steps=2, **GENERATOR_RUN)


def _flags(**arguments) -> list[str]:
    return [f"--{name}={value}" for name, value in arguments.items()]


@pytest.fixture
def launch():
    """Runs a script in processes of its own: `launch("train_softvq", *flags, num_processes=2)`."""

    def run(script: str, *flags: str, num_processes: int = 1) -> None:
        command = [sys.executable, "-m"]
        if num_processes == 1:
            command += ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
            command += ["--mixed_precision=no", "--dynamo_backend=no"]
        else:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command += [str(ROOT / "training" / f"{script}.py"), *map(str, flags)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]

    return run


@pytest.fixture
def run_main(monkeypatch):
    """Runs a script in this process, which is faster: `run_main("train_softvq", *flags)`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def run(script: str, *flags: str) -> None:
        spec = importlib.util.spec_from_file_location(script, ROOT / "training" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        reset_accelerate()
        module.main(module.parse_args(getattr(module, ARGUMENTS[script]), list(map(str, flags))))

    yield run
    reset_accelerate()


@pytest.fixture
def accelerator_states():
    """Lets a test make Accelerators of its own."""
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture
def read_metrics():
    """Lines of `metrics.jsonl` without the clock."""

    def read(output_dir: Path) -> list[dict]:
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        clock = ("time", "images_per_second", "data_wait_share", "memory_gib")
        return [{name: value for name, value in line.items() if name not in clock} for line in lines]

    return read


@pytest.fixture
def assert_same_state():
    """Two folders hold bit-equal weights, averages and optimizer states under the same names."""
    from safetensors.torch import load_file

    def compare(left: Path, right: Path) -> None:
        names = {path.relative_to(left) for path in left.rglob("*.safetensors")}
        assert names == {path.relative_to(right) for path in right.rglob("*.safetensors")} and names
        for name in names:
            tensors, others = load_file(left / name), load_file(right / name)
            assert tensors.keys() == others.keys()
            for key in tensors:
                assert torch.equal(tensors[key], others[key]), f"{name}: {key}"
        for path in left.rglob("optimizer*.bin"):
            state = torch.load(path, weights_only=True)
            other = torch.load(right / path.relative_to(left), weights_only=True)
            assert state["param_groups"] == other["param_groups"] and state["state"].keys() == other["state"].keys()
            for index, moments in state["state"].items():
                for key in moments:
                    assert torch.equal(moments[key], other["state"][index][key]), f"{path.name}: {index} {key}"

    return compare


@pytest.fixture
def run_cache_latents(run_main):
    """Caches the latents of 16 crops of the photographs: `run_cache_latents(tokenizer_dir, latents_dir)`."""

    def run(tokenizer_dir: Path, latents_dir: Path) -> None:
        run_main(
            "cache_latents",
            *_flags(
                pretrained_model_name_or_path=tokenizer_dir,
                output_dir=latents_dir,
                dataset_name="photographs",
                max_train_samples=16,
            ),
        )

    return run


@pytest.fixture
def latents_dir(run_cache_latents, tokenizer_dir, tmp_path) -> Path:
    """Cached latents of the photographs."""
    run_cache_latents(tokenizer_dir, tmp_path / "latents")
    return tmp_path / "latents"
