"""`training/train_softvq.py`: what a run leaves behind, exact resumption, and every loss."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from softvq_hf.losses import PerceptualWeightsUnavailable
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


GAN = [
    "--discriminator=patchgan",
    "--adversarial_start=2",
    "--adaptive_adversarial_weight",
    "--lecam_weight=0.001",
    "--consistency_weight=4.0",
    "--augment_discriminator",
    "--gradient_accumulation_steps=3",
    "--lr_scheduler=cosine_with_min_lr",
    "--lr_warmup_steps=2",
    "--min_lr=1e-5",
]


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def interrupt(finished, interrupted, last_step: int) -> None:
    """A copy of a finished run as it would be, had it been killed some time after the checkpoint of `last_step`."""
    shutil.copytree(finished, interrupted)
    for path in interrupted.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > last_step:
            shutil.rmtree(path)
    (interrupted / "diffusion_pytorch_model.safetensors").unlink()
    (interrupted / f".checkpoint-{last_step + 2}.partial").mkdir()
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')


def test_run_and_exact_resume(launch, tokenizer_args, tmp_path, read_metrics, assert_same_state):
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    launch("train_softvq", *tokenizer_args, *GAN, f"--output_dir={full}")

    # what is there
    assert checkpoints(full) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    model = AutoencoderSoftVQ.from_pretrained(full)
    assert model.config.sample_size == 32 and model.config.num_latent_tokens == 8
    assert model(torch.zeros(1, 3, 32, 32)).sample.shape == (1, 3, 32, 32)
    card = (full / "README.md").read_text()
    assert "license: apache-2.0" in card and "psnr" in card and "| adversarial_start | 2 |" in card
    assert any(path.name.startswith("events.out") for path in (full / "logs").rglob("*"))
    # three originals above three reconstructions, 2 pixels apart
    assert sorted(path.name for path in (full / "validation").iterdir()) == ["step-3.png", "step-6.png"]
    assert Image.open(full / "validation/step-3.png").size == (3 * 34 + 2, 2 * 34 + 2)

    # what was logged
    metrics = read_metrics(full)
    assert [line["step"] for line in metrics] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [line["step"] for line in metrics if "validation/psnr" in line] == [3, 6]
    training = [line for line in metrics if "loss" in line]
    assert "discriminator_loss" not in training[0] and "discriminator_loss" in training[1]
    assert {"reconstruction", "entropy", "generator", "grad_norm", "learning_rate"} <= training[1].keys()
    times = [json.loads(line)["time"] for line in (full / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times)

    # the arguments it leaves behind start the same run again, from a checkpoint in the middle of the second pass
    interrupt(full, resumed, last_step=2)
    config = yaml.safe_load((full / "args.yaml").read_text())
    assert config["model"]["codebook_size"] == 16 and "hub_token" not in config
    launch(
        "train_softvq",
        f"--config={full / 'args.yaml'}",
        f"--output_dir={resumed}",
        "--resume_from_checkpoint=latest",
        "--checkpoints_total_limit=3",
    )
    assert checkpoints(resumed) == checkpoints(full)
    assert_same_state(full, resumed)
    assert read_metrics(resumed) == metrics


def test_two_processes_resume_exactly(launch, tokenizer_args, tmp_path, read_metrics, assert_same_state):
    flags = [*tokenizer_args, *GAN[:4], "--train_batch_size=2"]
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    launch("train_softvq", *flags, f"--output_dir={full}", num_processes=2)
    assert [line["step"] for line in read_metrics(full)] == [1, 2, 3, 3, 4, 5, 6, 6]

    interrupt(full, resumed, last_step=4)
    launch("train_softvq", *flags, f"--output_dir={resumed}", "--resume_from_checkpoint=checkpoint-4", num_processes=2)
    assert_same_state(full, resumed)
    assert read_metrics(resumed) == read_metrics(full)


def test_rotation_and_a_finished_run(run_main, tokenizer_args, tmp_path, assert_same_state):
    flags = [*tokenizer_args, f"--output_dir={tmp_path / 'run'}", "--checkpoints_total_limit=2", "--report_to=none"]
    run_main("train_softvq", *flags, "--resume_from_checkpoint=latest")  # nothing there: a fresh start
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / "run/logs").exists()

    # a fresh start would mix its checkpoints with these
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run"):
        run_main("train_softvq", *flags)

    # nothing is left to train
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    run_main("train_softvq", *flags, "--resume_from_checkpoint=latest")
    assert_same_state(tmp_path / "before", tmp_path / "run")

    # a longer run goes on
    run_main("train_softvq", *flags, "--resume_from_checkpoint=latest", "--max_train_steps=8")
    assert checkpoints(tmp_path / "run") == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("quantizer", "flags", "losses"),
    [
        ("kl", ["--reconstruction_loss=l1", "--optimizer=adam", "--mixed_precision=bf16"], {"kl"}),
        ("vq", ["--discriminator=patchgan", "--adversarial_loss=non_saturating"], {"vq", "commit", "entropy"}),
        ("none", ["--gradient_checkpointing", "--no_use_ema", "--lr_scheduler=cosine"], set()),
    ],
)
def test_siblings(quantizer, flags, losses, run_main, tokenizer_args, tokenizer_config, tmp_path, read_metrics):
    flags = [*tokenizer_args, *flags, "--max_train_steps=2", "--validation_steps=0", f"--output_dir={tmp_path}"]
    run_main("train_softvq", *flags, "--model", json.dumps({**tokenizer_config, "quantizer": quantizer}))
    assert AutoencoderSoftVQ.from_pretrained(tmp_path).config.quantizer == quantizer
    metrics = read_metrics(tmp_path)
    assert len(metrics) == 2 and metrics[0].keys() & {"kl", "vq", "commit", "entropy"} == losses


MAETOK = {
    "quantizer": "none",
    "position_embedding_type": "rope_mixed",
    "encoder_mask_token": True,
    "decoder_type": "movq",
    "decoder_cls_token": False,
}


def test_masked_patches_and_exact_resume(
    run_main, tokenizer_args, tokenizer_config, tmp_path, read_metrics, assert_same_state
):
    flags = [*tokenizer_args, "--validation_steps=0", "--model", json.dumps(tokenizer_config | MAETOK)]
    masked = [*flags, "--mask_ratio_min=0.4", "--mask_ratio_max=0.6"]
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    run_main("train_softvq", *masked, f"--output_dir={full}")
    interrupt(full, resumed, last_step=2)
    run_main("train_softvq", *masked, f"--output_dir={resumed}", "--resume_from_checkpoint=latest")
    assert_same_state(full, resumed)
    assert read_metrics(resumed) == read_metrics(full)

    # without masks the latents are others, and the mask token stays as it was drawn
    run_main("train_softvq", *flags, f"--output_dir={tmp_path / 'plain'}")
    assert read_metrics(tmp_path / "plain")[-1]["reconstruction"] != read_metrics(full)[-1]["reconstruction"]
    mask_tokens = [
        AutoencoderSoftVQ.from_pretrained(folder).encoder.positions.mask_token for folder in (full, tmp_path / "plain")
    ]
    assert not torch.equal(*mask_tokens)


@pytest.fixture
def dinov2_dir(tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, layerscale_value=1e-5
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_alignment_and_encoder_init(run_main, tokenizer_args, dinov2_dir, tmp_path, read_metrics):
    run_main(
        "train_softvq",
        *tokenizer_args,
        f"--output_dir={tmp_path / 'run'}",
        "--max_train_steps=2",
        f"--alignment_teacher={dinov2_dir}",
        "--alignment_patch_size=8",
        "--alignment_hidden_size=8",
        f"--encoder_init={dinov2_dir}",
    )
    assert -1 <= read_metrics(tmp_path / "run")[0]["alignment"] <= 1
    # neither teacher nor projection is part of the result
    names = AutoencoderSoftVQ.from_pretrained(tmp_path / "run").state_dict().keys()
    assert not any("teacher" in name or "projection" in name for name in names)


def test_missing_perceptual_weights_stop_before_training(run_main, tokenizer_args, tmp_path, monkeypatch):
    # no cached VGG16, and no network to fetch it from
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(PerceptualWeightsUnavailable, match="VGG16"):
        run_main("train_softvq", *tokenizer_args, f"--output_dir={tmp_path / 'run'}", "--perceptual_weight=1.0")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_auxiliary_decoders(run_main, tokenizer_args, tokenizer_config, dinov2_dir, tmp_path, read_metrics):
    siglip = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7
    )
    SiglipVisionModel(siglip).save_pretrained(tmp_path / "siglip")
    run_main(
        "train_softvq",
        *tokenizer_args,
        f"--output_dir={tmp_path / 'run'}",
        "--model",
        json.dumps(tokenizer_config | MAETOK),
        "--max_train_steps=2",
        "--mask_ratio_min=0.4",
        "--mask_ratio_max=0.6",
        "--auxiliary_hog_weight=1",
        "--auxiliary_dinov2_weight=1",
        f"--auxiliary_dinov2_teacher={dinov2_dir}",
        "--auxiliary_clip_weight=1",
        f"--auxiliary_clip_teacher={tmp_path / 'siglip'}",
        "--auxiliary_hidden_size=64",
        "--auxiliary_num_layers=1",
        "--auxiliary_masked_only",
    )
    line = read_metrics(tmp_path / "run")[0]
    assert line["auxiliary_hog"] > 0
    assert -1 <= line["auxiliary_dinov2"] <= 1 and -1 <= line["auxiliary_clip"] <= 1
    total = sum(line[name] for name in ("reconstruction", "auxiliary_hog", "auxiliary_dinov2", "auxiliary_clip"))
    assert line["loss"] == pytest.approx(total, rel=1e-5)
    names = AutoencoderSoftVQ.from_pretrained(tmp_path / "run").state_dict().keys()
    assert not any("auxiliary" in name for name in names)


def test_dino_discriminator_resumes_exactly(run_main, tokenizer_args, tmp_path, read_metrics, assert_same_state):
    config = ViTConfig(hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    flags = [*tokenizer_args, "--discriminator=dino", f"--discriminator_backbone={tmp_path / 'vit'}", *GAN[1:6]]
    flags += ["--validation_steps=0", "--adversarial_warmup_steps=2", "--max_train_steps=4"]
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    run_main("train_softvq", *flags, f"--output_dir={full}")
    assert {"lecam", "consistency", "discriminator", "adaptive_weight"} <= read_metrics(full)[1].keys()
    interrupt(full, resumed, last_step=2)
    run_main("train_softvq", *flags, f"--output_dir={resumed}", "--resume_from_checkpoint=latest")
    assert_same_state(full, resumed)
    assert read_metrics(resumed) == read_metrics(full)


def fine_tuning_args(tokenizer_args, tokenizer_dir, tmp_path) -> list[str]:
    flags = [flag for flag in tokenizer_args if not flag.startswith("--model")]
    flags += [f"--pretrained_model_name_or_path={tokenizer_dir}", f"--output_dir={tmp_path / 'run'}"]
    return [*flags, "--max_train_steps=2", "--learning_rate=1e-2", "--ema_decay=0"]


def test_decoder_alone(run_main, tokenizer_args, tokenizer_dir, tmp_path):
    flags = fine_tuning_args(tokenizer_args, tokenizer_dir, tmp_path)
    run_main("train_softvq", *flags, "--encoder_tuning=frozen", "--compile", "--gradient_checkpointing")
    before, after = (
        AutoencoderSoftVQ.from_pretrained(tokenizer_dir),
        AutoencoderSoftVQ.from_pretrained(tmp_path / "run"),
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(before.eval().encode(images).latent, after.eval().encode(images).latent)
    assert not torch.equal(before(images).sample, after(images).sample)


def test_adapters(run_main, tokenizer_args, tokenizer_dir, tmp_path, assert_same_state):
    flags = fine_tuning_args(tokenizer_args, tokenizer_dir, tmp_path)
    tuning = ["--encoder_tuning=frozen", "--decoder_tuning=lora", "--lora_rank=2", "--optimizer=adamw_fused"]
    run_main("train_softvq", *flags, *tuning)
    before, after = (
        AutoencoderSoftVQ.from_pretrained(tokenizer_dir),
        AutoencoderSoftVQ.from_pretrained(tmp_path / "run"),
    )
    assert before.state_dict().keys() == after.state_dict().keys()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not torch.equal(before.eval()(images).sample, after.eval()(images).sample)
    before.load_lora_adapter(tmp_path / "run/lora", prefix=None, use_safetensors=True)
    torch.testing.assert_close(before(images).sample, after(images).sample, atol=1e-5, rtol=1e-5)


def test_larger_images(run_main, tokenizer_args, tokenizer_dir, tmp_path):
    flags = fine_tuning_args(tokenizer_args, tokenizer_dir, tmp_path)
    run_main("train_softvq", *flags, "--resolution=64")
    resized = AutoencoderSoftVQ.from_pretrained(tmp_path / "run")
    assert resized.config.sample_size == 64 and resized.encoder.positions.position_embedding.shape[1] == 1 + 8 * 8
    assert resized(torch.zeros(1, 3, 64, 64)).sample.shape == (1, 3, 64, 64)


def test_learns_from_pretrained(run_main, tokenizer_args, tokenizer_dir, tmp_path, read_metrics):
    """A saved tokenizer goes on, and its reconstructions get better."""
    flags = [flag for flag in tokenizer_args if not flag.startswith("--model")]
    run_main(
        "train_softvq",
        *flags,
        f"--pretrained_model_name_or_path={tokenizer_dir}",
        f"--output_dir={tmp_path / 'run'}",
        "--max_train_steps=60",
        "--checkpointing_steps=1000",
        "--learning_rate=5e-3",
        "--ema_decay=0.5",
        "--validation_steps=30",
        "--logging_steps=20",
    )
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics if "loss" in line] == [20, 40, 60]
    psnr = [line["validation/psnr"] for line in metrics if "validation/psnr" in line]
    untrained = AutoencoderSoftVQ.from_pretrained(tokenizer_dir)
    assert psnr[-1] > 10 and psnr[1] > psnr[0]
    assert not torch.equal(
        AutoencoderSoftVQ.from_pretrained(tmp_path / "run").quantize.embedding, untrained.quantize.embedding
    )


@pytest.mark.parametrize("broken_loss", ["mse_loss", "relu"])
def test_an_update_left_out_leaves_nothing_behind(
    broken_loss, run_main, tokenizer_args, tmp_path, read_metrics, assert_same_state, monkeypatch
):
    """Whichever of its accumulated batches was broken, in the tokenizer's losses or in the discriminator's."""
    original, calls = getattr(torch.nn.functional, broken_loss), []

    def break_call(number):
        def broken(*args, **kwargs):
            calls.append(None)
            return original(*args, **kwargs) * (torch.nan if len(calls) == number else 1)

        calls.clear()
        monkeypatch.setattr(torch.nn.functional, broken_loss, broken)

    flags = [*tokenizer_args, "--discriminator=patchgan", "--lecam_weight=0.001", "--gradient_accumulation_steps=2"]
    flags += ["--validation_steps=0", "--checkpointing_steps=1", "--max_train_steps=3", "--report_to=none"]
    per_batch = 1 if broken_loss == "mse_loss" else 4  # two sides of the hinge loss, two of LeCAM
    for name, batch in (("first", 2), ("second", 3)):
        break_call(per_batch * batch + 1)
        run_main("train_softvq", *flags, f"--output_dir={tmp_path / name}")
    lines = read_metrics(tmp_path / "second")
    assert [line["step"] for line in lines if None in line.values()] == [2]
    for weights in ("model.safetensors", "model_1.safetensors"):
        steps = [load_file(tmp_path / f"second/checkpoint-{step}" / weights) for step in (1, 2, 3)]
        trained = [name for name in steps[0] if "running" not in name and "num_batches" not in name]
        assert all(torch.equal(steps[0][name], steps[1][name]) for name in trained)
        assert not all(torch.equal(steps[1][name], steps[2][name]) for name in trained)
        assert all(tensor.isfinite().all() for tensor in steps[2].values())
    norms = [
        [line[name] for name in ("grad_norm", "discriminator_grad_norm")]
        for line in (read_metrics(tmp_path / name)[2] for name in ("first", "second"))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_updates_that_are_not_finite_are_left_out(run_main, tokenizer_args, tmp_path, read_metrics):
    flags = [*tokenizer_args, "--discriminator=maskbit", "--reconstruction_weight=1e39", "--validation_steps=0"]
    run_main("train_softvq", *flags, f"--output_dir={tmp_path / 'run'}", "--max_nonfinite_batches=6")
    lines = read_metrics(tmp_path / "run")
    assert [line["loss"] for line in lines] == [None] * 6
    assert (
        json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())["trainer"]["nonfinite_batches"] == 6
    )
    # nothing has moved
    first, last = (load_file(tmp_path / f"run/checkpoint-{step}/model.safetensors") for step in (2, 6))
    assert all(torch.equal(first[name], last[name]) for name in first)

    with pytest.raises(FloatingPointError, match=r"loss = inf at step 3, on the images .*: number 3 of its kind"):
        run_main("train_softvq", *flags, f"--output_dir={tmp_path / 'stopped'}", "--max_nonfinite_batches=2")
    assert [line["step"] for line in read_metrics(tmp_path / "stopped")] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution=64", '--model={"sample_size": 32}'], "`--resolution` is 64"),
        (['--model={"latents": 8}'], "`model` has 'latents'"),
        (["--model=[1]"], "`--model` is"),
        (['--model={"num_latent_tokens": 7, "num_codebooks": 2}'], "`num_latent_tokens` is 7"),
        (
            ["--mask_ratio_max=0.6"],
            "`--mask_ratio_max` is 0.6, allowed: 0 for a tokenizer without `encoder_mask_token`",
        ),
        (["--mask_ratio_min=0.5"], "`--mask_ratio_min` is 0.5 and `--mask_ratio_max` is 0.0"),
        (["--train_batch_size=17"], "`--train_batch_size` is 17"),
        (["--pretrained_model_name_or_path=somewhere"], "exactly one of them"),
        (["--discriminator=patchgan", "--adversarial_start=7"], "`--adversarial_start` is 7"),
        (["--alignment_weight=0.1"], "`--alignment_teacher` is not given"),
        (["--alignment_patch_size=16"], "`--alignment_teacher` is not given"),
        (["--discriminator_backbone=vit"], "`--discriminator_backbone` is 'vit', which only `--discriminator dino`"),
        (["--global_batch_size=10"], "`--global_batch_size` is 10, allowed: multiples of 4"),
        (["--global_batch_size=8", "--gradient_accumulation_steps=3"], "`--gradient_accumulation_steps` is 3"),
        (["--decoder_tuning=lora"], "`--encoder_tuning` is full and `--decoder_tuning` is lora"),
        (["--encoder_tuning=frozen", "--decoder_tuning=frozen"], "nothing is left to train"),
        (["--auxiliary_masked_only"], "`--auxiliary_masked_only` needs masked patches"),
        (["--auxiliary_hidden_size=100"], "`--auxiliary_hidden_size` is 100"),
        (["--perceptual_weight=-1"], "`--perceptual_weight` is -1"),
        (["--train_data_dir=/nowhere"], "`--dataset_name` is 'photographs' and `--train_data_dir`"),
        (["--report_to=paper"], "`--report_to` is 'paper'"),
        (["--report_to=wandb", "--hub_token=secret"], "`--hub_token`"),
        (["--resume_from_checkpoint=checkpoint-3"], "`--resume_from_checkpoint` is 'checkpoint-3'"),
        (["--train_split=test"], "test"),
    ],
)
def test_bad_arguments_stop_before_training(flags, message, run_main, tokenizer_args, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_main("train_softvq", *tokenizer_args, f"--output_dir={tmp_path}", *flags)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_output_dir_that_cannot_be_written(run_main, tokenizer_args, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`--output_dir` is .*file/run"):
        run_main("train_softvq", *tokenizer_args, f"--output_dir={tmp_path / 'file/run'}")
