"""`training/train_sit.py`: both objectives on cached, live and 2-D latents, exact resumption, the pipeline folder."""

import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    VQModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from softvq_hf.data.latents import LatentDataset
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


TRAINING = Path(__file__).parents[2] / "training"
CONFIGS = TRAINING / "configs"


@pytest.fixture
def train_sit(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_sit", TRAINING / "train_sit.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_sit", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("run", "objective_flags", "losses", "scheduler_class", "scheduler_config", "transformer_config"),
    [
        (
            "launch",
            ["--weighting=lognormal"],
            {"loss"},
            FlowMatchEulerDiscreteScheduler,
            {},
            {"out_channels": None, "timestep_scale": 1e-3},
        ),
        (
            "run_main",
            ["--objective=ddpm"],
            {"loss", "mse", "vb"},
            DDPMScheduler,
            {
                "beta_schedule": "squaredcos_cap_v2",
                "variance_type": "learned_range",
                "clip_sample": False,
                "timestep_spacing": "linspace",
                "prediction_type": "epsilon",
                "num_train_timesteps": 1000,
            },
            {"out_channels": 8, "timestep_scale": 1.0},
        ),
    ],
    ids=["flow_matching", "ddpm"],
)
def test_cached_latents_and_exact_resume(
    request,
    run,
    sit_args,
    latents_dir,
    tmp_path,
    read_metrics,
    assert_same_state,
    objective_flags,
    losses,
    scheduler_class,
    scheduler_config,
    transformer_config,
):
    run = request.getfixturevalue(run)  # in processes of its own, or in this one
    flags = [*sit_args, f"--latents_dir={latents_dir}", *objective_flags, "--checkpoints_total_limit=2"]
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    run("train_sit", *flags, f"--output_dir={full}")

    assert sorted(path.name for path in full.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert [line["step"] for line in read_metrics(full)] == [1, 2, 3, 4, 5, 6]
    for line in read_metrics(full):
        assert line.keys() == {"step", "epoch", "grad_norm", "learning_rate", *losses}
        if losses > {"loss"}:
            assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-5)
    # three rows, one per class, of two samples
    assert sorted(path.name for path in (full / "samples").iterdir()) == ["step-3.png", "step-6.png"]
    assert Image.open(full / "samples/step-3.png").size == (2 * 34 + 2, 3 * 34 + 2)

    # killed after step 4
    shutil.copytree(full, resumed)
    for path in (resumed / "checkpoint-6", resumed / "transformer"):
        shutil.rmtree(path)
    run("train_sit", *flags, f"--output_dir={resumed}", "--resume_from_checkpoint=latest")
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
    assert isinstance(pipeline.scheduler, scheduler_class)
    assert scheduler_config.items() <= dict(pipeline.scheduler.config).items()
    assert transformer_config.items() <= dict(pipeline.transformer.config).items()
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


def test_latents_of_another_tokenizer(run_main, run_cache_latents, sit_args, latents_dir, tmp_path):
    flags = [*sit_args, "--max_train_steps=2", "--validation_steps=0"]
    run_main("train_sit", *flags, f"--latents_dir={latents_dir}", f"--output_dir={tmp_path / 'first'}")
    vae = AutoencoderSoftVQ.from_pretrained(latents_dir / "vae")
    vae.register_to_config(shift_factor=0.3)
    vae.save_pretrained(tmp_path / "other_tokenizer")
    others = tmp_path / "other_latents"
    run_cache_latents(tmp_path / "other_tokenizer", others)
    flags.append(f"--latents_dir={others}")
    with pytest.raises(ValueError, match="was trained on latents of the tokenizer .*, this run .*'shift_factor': 0.3"):
        resume = ["--resume_from_checkpoint=latest", "--max_train_steps=4"]
        run_main("train_sit", *flags, *resume, f"--output_dir={tmp_path / 'first'}")
    flags = [flag for flag in flags if not flag.startswith("--model")]
    flags += [f"--pretrained_model_name_or_path={tmp_path / 'first'}", f"--output_dir={tmp_path / 'second'}"]
    with pytest.raises(ValueError, match="has the `shift_factor` .*, but the latents are of a tokenizer with 0.3"):
        run_main("train_sit", *flags)
    shutil.rmtree(tmp_path / "first/vae")  # the transformer alone
    run_main("train_sit", *flags)


def test_live_latents_ddim_and_fixed_variance(
    run_main, sit_args, transformer_config, tokenizer_dir, tmp_path, read_metrics
):
    flags = [*sit_args, "--dataset_name=photographs", f"--vae={tokenizer_dir}", "--resolution=32"]
    flags += ["--max_train_samples=16", "--max_train_steps=2", "--objective=ddpm", "--beta_schedule=linear"]
    flags += [f"--output_dir={tmp_path / 'ddim'}", "--guidance_scale=1.5"]
    run_main("train_sit", *flags, "--sampler=ddim")
    pipeline = SoftVQPipeline.from_pretrained(tmp_path / "ddim")
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    expected = {
        "beta_schedule": "linear",
        "clip_sample": False,
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
    }
    assert expected.items() <= dict(pipeline.scheduler.config).items()
    assert pipeline.transformer.config.out_channels == 8
    # the arguments that it wrote start the same run again
    written = yaml.safe_load((tmp_path / "ddim/args.yaml").read_text())
    assert (written["objective"], written["sampler"], written["path_type"]) == ("ddpm", "ddim", None)
    run_main("train_sit", f"--config={tmp_path / 'ddim/args.yaml'}", f"--output_dir={tmp_path / 'again'}")
    assert read_metrics(tmp_path / "again") == read_metrics(tmp_path / "ddim")

    fixed = {**transformer_config, "out_channels": 4}
    run_main("train_sit", *flags, f"--model={json.dumps(fixed)}", f"--output_dir={tmp_path / 'fixed'}")
    pipeline = SoftVQPipeline.from_pretrained(tmp_path / "fixed")
    assert isinstance(pipeline.scheduler, DDPMScheduler) and pipeline.scheduler.config.variance_type == "fixed_large"
    assert not pipeline.predicts_variance
    for line in read_metrics(tmp_path / "fixed"):
        assert line["loss"] == line["mse"] and "vb" not in line


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_representation_alignment(
    run_main, sit_args, tokenizer_dir, tmp_path, read_metrics, assert_same_state, objective
):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    flags = [*sit_args, "--dataset_name=photographs", f"--vae={tokenizer_dir}", "--resolution=32"]
    flags += ["--max_train_samples=16", "--max_train_steps=4", "--validation_steps=0", f"--objective={objective}"]
    repa = [f"--repa_teacher={tmp_path / 'dinov2'}", "--repa_layer=1", "--repa_patch_size=8", "--repa_hidden_size=8"]
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    run_main("train_sit", *flags, *repa, "--repa_weight=0.25", f"--output_dir={full}")
    run_main("train_sit", *flags, f"--output_dir={tmp_path / 'plain'}")
    aligned, plain = read_metrics(full)[0], read_metrics(tmp_path / "plain")[0]
    assert -1 <= aligned["alignment"] <= 1 and "alignment" not in plain
    assert aligned["loss"] == pytest.approx(plain["loss"] + 0.25 * aligned["alignment"], rel=1e-5)
    # neither teacher nor projection is part of the result
    names = SoftVQPipeline.from_pretrained(full).transformer.state_dict().keys()
    assert names == SoftVQPipeline.from_pretrained(tmp_path / "plain").transformer.state_dict().keys()

    shutil.copytree(full, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    run_main(
        "train_sit", *flags, *repa, "--repa_weight=0.25", f"--output_dir={resumed}", "--resume_from_checkpoint=latest"
    )
    assert_same_state(full, resumed)

    with pytest.raises(ValueError, match="`--repa_layer` is 2, allowed: 1 to 1"):
        run_main("train_sit", *flags, *repa[:1], "--repa_layer=2", f"--output_dir={tmp_path / 'bad'}")


def test_updates_that_are_not_finite_are_left_out(
    run_main, sit_args, latents_dir, tmp_path, read_metrics, monkeypatch
):
    """One sample of the cache is broken: its batch is named and left out, in both passes."""
    original = LatentDataset.__getitem__

    def broken(self, index):
        item = original(self, index)
        return {**item, "latents": item["latents"] * float("inf")} if index == 5 else item

    monkeypatch.setattr(LatentDataset, "__getitem__", broken)
    flags = [*sit_args, f"--latents_dir={latents_dir}", "--validation_steps=0", "--max_train_steps=8"]
    run_main("train_sit", *flags, f"--output_dir={tmp_path / 'run'}")
    lines = read_metrics(tmp_path / "run")
    assert [line["loss"] is None for line in lines].count(True) == 2 and "grad_norm" in lines[-1]
    state = json.loads((tmp_path / "run/checkpoint-8/trainer_state.json").read_text())
    assert state["trainer"]["nonfinite_batches"] == 2
    weights = load_file(tmp_path / "run/checkpoint-8/model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.parametrize(("objective", "out_channels"), [("flow_matching", 4), ("ddpm", 8)])
def test_2d_latents_of_an_autoencoder_kl(
    run_main, sit_args, autoencoder_kl_dir, tmp_path, read_metrics, assert_same_state, objective, out_channels
):
    flags = [*sit_args, "--dataset_name=photographs", f"--vae={autoencoder_kl_dir}", "--resolution=32"]
    flags += ["--max_train_samples=16", "--max_train_steps=2", f"--objective={objective}", "--guidance_scale=1.5"]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        torch.rand(3)  # the posterior is drawn from the generator of the step, not from the global one
        run_main("train_sit", *flags, f"--output_dir={folder}")
    assert_same_state(*folders)
    assert read_metrics(folders[0]) == read_metrics(folders[1])

    pipelines = [
        SoftVQPipeline.from_pretrained(folders[0]),
        DiffusionPipeline.from_pretrained(folders[0], trust_remote_code=True),
    ]
    assert isinstance(pipelines[0].vae, AutoencoderKL)
    config = pipelines[0].transformer.config
    assert (config.num_tokens, config.patch_size, config.sample_size) == (16, 2, 8)
    assert pipelines[0].transformer.out_channels == out_channels
    images = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = {"guidance_scale": 2.0, "num_inference_steps": 2, "generator": generator, "output_type": "pt"}
        images.append(pipeline(["cat", 3], **arguments).images)
    assert images[0].shape == (2, 3, 32, 32) and images[0].isfinite().all()
    assert torch.equal(*images)


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


def test_learns_the_noise(run_main, sit_args, latents_dir, tmp_path, read_metrics):
    run_main(
        "train_sit",
        *sit_args,
        f"--latents_dir={latents_dir}",
        f"--output_dir={tmp_path / 'run'}",
        "--objective=ddpm",
        "--max_train_steps=120",
        "--checkpointing_steps=1000",
        "--validation_steps=0",
        "--learning_rate=1e-2",
    )
    metrics = read_metrics(tmp_path / "run")
    # an untrained DiT predicts zero, whose error on unit noise is 1
    assert metrics[0]["mse"] == pytest.approx(1.0, abs=0.3)
    for name in ("mse", "vb"):  # the bound at the first timesteps stands out, hence medians
        values = [line[name] for line in metrics]
        assert statistics.median(values[-30:]) < 0.9 * statistics.median(values[:30]), name


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
        (["--dataset_name=photographs", "--vae=2D", "--resolution=30"], "`resolution` is 30, allowed .* 4"),
        (["--dataset_name=photographs", "--vae=VQMODEL"], "is a VQModel, allowed: AutoencoderSoftVQ"),
        (["--latents_dir=x", "--path_type=vp"], "`--path_type` is 'vp', allowed .*flow_matching`: linear, cosine"),
        (["--latents_dir=x", "--sampler=ddpm"], "`--sampler` is 'ddpm', allowed .*flow_matching`: ode, sde"),
        (["--latents_dir=x", "--beta_schedule=linear"], "`--beta_schedule` is 'linear', .*flow_matching`: none"),
        (
            ["--latents_dir=x", "--objective=ddpm", "--path_type=linear"],
            "`--path_type` is 'linear', allowed with `--objective ddpm`: none",
        ),
        (["--latents_dir=x", "--objective=ddpm", "--weighting=uniform"], "`--weighting` is 'uniform', .* ddpm`: none"),
        (["--latents_dir=x", "--objective=ddpm", "--sampler=sde"], "`--sampler` is 'sde', .* ddpm`: ddpm, ddim"),
        (
            ["--latents_dir=x", "--objective=ddpm", "--beta_schedule=scaled_linear"],
            "`--beta_schedule` is 'scaled_linear', allowed .*: squaredcos_cap_v2, linear",
        ),
    ],
)
def test_bad_arguments_stop_before_training(
    flags, message, run_main, sit_args, tokenizer_dir, autoencoder_kl_dir, tmp_path
):
    VQModel(block_out_channels=(32,)).save_pretrained(tmp_path / "vqmodel")
    folders = {"VAE": tokenizer_dir, "2D": autoencoder_kl_dir, "VQMODEL": tmp_path / "vqmodel"}
    for name, folder in folders.items():
        flags = [flag.replace(f"={name}", f"={folder}") for flag in flags]
    with pytest.raises(ValueError, match=message):
        run_main("train_sit", *sit_args, f"--output_dir={tmp_path / 'run'}", *flags)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_transformer_that_does_not_fit_the_latents(run_main, sit_args, transformer_config, latents_dir, tmp_path):
    flags = [*sit_args, f"--latents_dir={latents_dir}", f"--output_dir={tmp_path / 'run'}", "--guidance_scale=2"]
    for change, message in [
        ({"num_tokens": 16}, r"shape \(16, 4\) \(num_tokens, in_channels\), allowed: \(8, 4\)"),
        (
            {"patch_size": 2, "sample_size": 8},
            r"shape \(4, 8, 8\) \(in_channels, sample_size, sample_size\), allowed: \(8, 4\)",
        ),
        ({"out_channels": 8}, "`out_channels` is 8"),
        ({"num_classes": 3}, "`num_classes` is 3"),
        ({"depth": 3}, "`model` has 'depth'"),
        ({"class_dropout_prob": 0.0}, "`--guidance_scale` is 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_main("train_sit", *flags, f"--model={json.dumps({**transformer_config, **change})}")
        assert not (tmp_path / "run/metrics.jsonl").exists()


def test_transformer_of_the_other_objective(run_main, sit_args, transformer_config, latents_dir, tmp_path):
    flags = [*sit_args, f"--latents_dir={latents_dir}", "--max_train_steps=1", "--validation_steps=0"]
    for objective, other in (("flow_matching", "ddpm"), ("ddpm", "flow_matching")):
        run_main("train_sit", *flags, f"--objective={objective}", f"--output_dir={tmp_path / objective}")
        pretrained = [flag for flag in flags if not flag.startswith("--model")]
        pretrained += [f"--pretrained_model_name_or_path={tmp_path / objective}", f"--output_dir={tmp_path / 'other'}"]
        run_main("train_sit", *pretrained, f"--objective={objective}")
        message = "`out_channels` is 8" if other == "flow_matching" else "`timestep_scale` is 0.001, allowed .*: 1.0"
        with pytest.raises(ValueError, match=message):
            run_main("train_sit", *pretrained, f"--objective={other}")

    model = json.dumps({**transformer_config, "timestep_scale": 1e-3})
    with pytest.raises(ValueError, match="`timestep_scale` is 0.001"):
        run_main("train_sit", *flags, "--objective=ddpm", f"--model={model}", f"--output_dir={tmp_path / 'other'}")


@pytest.mark.parametrize(("name", "num_parameters"), [("sit_xl", 675_111_184), ("dit_xl", 675_129_632)])
def test_2d_baselines(train_sit, name, num_parameters):
    flags = [
        "--config",
        str(CONFIGS / f"{name}.yaml"),
        "--dataset_name=photographs",
        "--vae=stabilityai/sd-vae-ft-ema",
    ]
    args = train_sit.parse_args(train_sit.SiTTrainingArguments, flags)
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=4)
        latent_shape = train_sit.get_latent_shape(vae, args.resolution)
        transformer = train_sit.build_transformer(args, latent_shape, num_classes=1000)
    assert latent_shape == (4, 32, 32)
    assert transformer.config.num_tokens == 256
    assert transformer.num_parameters() == num_parameters
