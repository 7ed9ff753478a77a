"""`training/train_sit.py`: cached and live latents, exact resumption, and the pipeline folder it writes."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


@pytest.fixture
def latents_dir(run_cache_latents, tokenizer_dir, tmp_path):
    run_cache_latents(tokenizer_dir, tmp_path / "latents")
    return tmp_path / "latents"


def test_cached_latents_and_exact_resume(
    launch, sit_args, latents_dir, tmp_path, read_metrics, assert_same_state, monkeypatch
):
    flags = [*sit_args, f"--latents_dir={latents_dir}", "--weighting=lognormal", "--checkpoints_total_limit=2"]
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    launch("train_sit", *flags, f"--output_dir={full}")

    assert sorted(path.name for path in full.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert [line["step"] for line in read_metrics(full)] == [1, 2, 3, 4, 5, 6]
    # three rows, one per class, of two samples
    assert sorted(path.name for path in (full / "samples").iterdir()) == ["step-3.png", "step-6.png"]
    assert Image.open(full / "samples/step-3.png").size == (2 * 34 + 2, 3 * 34 + 2)

    # killed after step 4
    shutil.copytree(full, resumed)
    for path in (resumed / "checkpoint-6", resumed / "transformer"):
        shutil.rmtree(path)
    launch("train_sit", *flags, f"--output_dir={resumed}", "--resume_from_checkpoint=latest")
    assert_same_state(full, resumed)
    assert read_metrics(resumed) == read_metrics(full)
    assert (full / "samples/step-6.png").read_bytes() == (resumed / "samples/step-6.png").read_bytes()

    # what it wrote is a pipeline: with our class, with diffusers' and the pipeline file, and with what lies in it
    pipeline = SoftVQPipeline.from_pretrained(full)
    loaded = [
        DiffusionPipeline.from_pretrained(
            full, custom_pipeline="pipelines/pipeline_softvq.py", trust_remote_code=True
        ),
        DiffusionPipeline.from_pretrained(full, trust_remote_code=True),
    ]
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipeline.config.id2label[1] == "cat" and pipeline.transformer.config.num_classes == 8
    assert (pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor) != (1.0, 0.0)
    samples = []
    for sampler in (pipeline, *loaded):
        sampler.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        samples.append(sampler(["cat", 3], num_inference_steps=2, generator=generator, output_type="pt").images)
    assert samples[0].shape == (2, 3, 32, 32)
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])


def test_live_latents_sde_and_fine_tuning(run_main, sit_args, tokenizer_dir, tmp_path, read_metrics):
    flags = [*sit_args, "--dataset_name=photographs", f"--vae={tokenizer_dir}", "--resolution=32"]
    flags += ["--max_train_samples=16", "--max_train_steps=2", "--sampler=sde", "--path_type=cosine"]
    run_main("train_sit", *flags, "--guidance_scale=1.5", f"--output_dir={tmp_path / 'first'}")
    pipeline = SoftVQPipeline.from_pretrained(tmp_path / "first")
    assert isinstance(pipeline.scheduler, StochasticInterpolantScheduler)
    assert pipeline.scheduler.config.path_type == "cosine"
    config = pipeline.transformer.config
    assert (config.num_tokens, config.in_channels, config.num_classes) == (8, 4, 8)
    # the tokenizer is part of the pipeline and stayed as it was
    for name, weight in AutoencoderSoftVQ.from_pretrained(tokenizer_dir).state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[name], weight), name

    flags = [flag for flag in flags if not flag.startswith("--model")]
    run_main(
        "train_sit",
        *flags,
        f"--pretrained_model_name_or_path={tmp_path / 'first'}",
        "--validation_steps=0",
        "--gradient_accumulation_steps=2",
        f"--output_dir={tmp_path / 'second'}",
    )
    assert [line["step"] for line in read_metrics(tmp_path / "second")] == [1, 2]


def test_learns_the_velocity(run_main, sit_args, latents_dir, tmp_path, read_metrics):
    run_main(
        "train_sit",
        *sit_args,
        f"--latents_dir={latents_dir}",
        f"--output_dir={tmp_path / 'run'}",
        "--max_train_steps=120",
        "--checkpointing_steps=1000",
        "--validation_steps=0",
        "--learning_rate=1e-2",
    )
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    # an untrained SiT predicts zero, whose error on normalised latents is 2
    assert losses[0] == pytest.approx(2.0, abs=0.5)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_tokenizer_without_statistics_is_warned_about(run_main, sit_args, tokenizer_config, tmp_path, caplog):
    AutoencoderSoftVQ(sample_size=32, **tokenizer_config).save_pretrained(tmp_path / "raw")
    flags = ["--dataset_name=photographs", "--resolution=32", "--max_train_samples=16", "--max_train_steps=1"]
    run_main("train_sit", *sit_args, *flags, f"--vae={tmp_path / 'raw'}", f"--output_dir={tmp_path / 'run'}")
    assert "NOT normalised" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "`--latents_dir`, or images"),
        (["--dataset_name=photographs"], "`--latents_dir`, or images"),
        (["--latents_dir=latents", "--vae=vae"], "leave out"),
        (["--latents_dir=VAE"], "`latents_dir`"),
        (["--latents_dir=latents", "--guidance_scale=0.5"], "`--guidance_scale` is 0.5"),
        (["--dataset_name=photographs", "--vae=VAE", "--resolution=64"], "`--resolution` is 64"),
    ],
)
def test_bad_arguments_stop_before_training(flags, message, run_main, sit_args, tokenizer_dir, tmp_path):
    flags = [flag.replace("VAE", str(tokenizer_dir)) for flag in flags]
    with pytest.raises(ValueError, match=message):
        run_main("train_sit", *sit_args, f"--output_dir={tmp_path / 'run'}", *flags)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_transformer_that_does_not_fit_the_latents(run_main, sit_args, transformer_config, latents_dir, tmp_path):
    flags = [*sit_args, f"--latents_dir={latents_dir}", f"--output_dir={tmp_path / 'run'}", "--guidance_scale=2"]
    for change, message in [
        ({"num_tokens": 16}, "`num_tokens` 16 .* 8 tokens of 4 channels"),
        ({"out_channels": 8}, "`out_channels` is 8"),
        ({"num_classes": 3}, "`num_classes` is 3"),
        ({"depth": 3}, "`model` has 'depth'"),
        ({"class_dropout_prob": 0.0}, "`--guidance_scale` is 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_main("train_sit", *flags, f"--model={json.dumps({**transformer_config, **change})}")
        assert not (tmp_path / "run/metrics.jsonl").exists()
