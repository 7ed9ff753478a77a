"""`training/train_mar.py`: exact resumption, the pipeline folder, draws, weight decay, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from softvq_hf.losses import token_diffusion_loss
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.schedulers.scheduling_ddpm_temperature import TemperatureDDPMScheduler
from softvq_hf.training import generator_loop
from softvq_hf.training.arguments import parse_args
from softvq_hf.training.generator_arguments import MARTrainingArguments
from softvq_hf.training.mar import MARWithLoss, build_mar, parameter_groups
from softvq_hf.training.optimization import build_optimizer
from softvq_hf.training.randomness import batch_generators


def mar_arguments(tmp_path, *flags, model):
    return parse_args(
        MARTrainingArguments,
        [
            f"--model={json.dumps(model)}",
            "--latents_dir=latents",
            f"--output_dir={tmp_path}",
            "--max_train_steps=1",
            *flags,
        ],
    )


@pytest.mark.parametrize("run", ["launch", "run_main"])
def test_cached_latents_and_exact_resume(
    request, run, mar_args, latents_dir, tmp_path, read_metrics, assert_same_state
):
    run = request.getfixturevalue(run)  # in processes of its own, or in this one
    flags = [*mar_args, f"--latents_dir={latents_dir}", "--checkpoints_total_limit=2", "--guidance_scale=1.5"]
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    run("train_mar", *flags, f"--output_dir={full}")

    assert [line["step"] for line in read_metrics(full)] == [1, 2, 3, 4, 5, 6]
    for line in read_metrics(full):
        names = {"step", "epoch", "grad_norm", "learning_rate", "loss", "mse", "vb", "mask_ratio"}
        assert line.keys() == names
        assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-5)
        assert line["mask_ratio"] in (0.75, 0.875, 1.0)  # of 8 tokens, at least 0.7
    assert len({line["mask_ratio"] for line in read_metrics(full)}) > 1
    assert sorted(path.name for path in (full / "samples").iterdir()) == ["step-3.png", "step-6.png"]
    assert Image.open(full / "samples/step-3.png").size == (2 * 34 + 2, 3 * 34 + 2)

    # killed after step 4
    shutil.copytree(full, resumed)
    for path in (resumed / "checkpoint-6", resumed / "transformer"):
        shutil.rmtree(path)
    run("train_mar", *flags, f"--output_dir={resumed}", "--resume_from_checkpoint=latest")
    assert_same_state(full, resumed)
    assert read_metrics(resumed) == read_metrics(full)
    assert (full / "samples/step-6.png").read_bytes() == (resumed / "samples/step-6.png").read_bytes()

    # what it wrote is a pipeline: with our class, with diffusers' and the pipeline file, and with what lies in it
    loaded = [
        MARPipeline.from_pretrained(full),
        DiffusionPipeline.from_pretrained(full, custom_pipeline="pipelines/pipeline_mar.py", trust_remote_code=True),
        DiffusionPipeline.from_pretrained(full, trust_remote_code=True),
    ]
    pipeline = loaded[0]
    assert isinstance(pipeline.scheduler, TemperatureDDPMScheduler)
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline.config.id2label[1] == "cat" and pipeline.transformer.config.num_classes == 8
    samples = []
    for sampler in loaded:
        sampler.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        samples.append(
            sampler(
                ["cat", 3], num_inference_steps=2, num_diffusion_steps=2, generator=generator, output_type="pt"
            ).images
        )
    assert samples[0].shape == (2, 3, 32, 32)
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    card = (full / "README.md").read_text()
    assert "[MAR](https://arxiv.org/abs/2406.11838)" in card and "li2024autoregressive" in card
    assert "DiT" not in card and "SiT" not in card


def test_fine_tuning_and_clipped_samples(run_main, run_cache_latents, mar_args, latents_dir, tmp_path, read_metrics):
    flags = [*mar_args, f"--latents_dir={latents_dir}", "--max_train_steps=2", "--clip_sample_range=6"]
    run_main("train_mar", *flags, f"--output_dir={tmp_path / 'first'}")
    config = MARPipeline.from_pretrained(tmp_path / "first").scheduler.config
    assert (config.clip_sample, config.clip_sample_range) == (True, 6.0)
    flags = [flag for flag in flags if not flag.startswith("--model")]
    run_main(
        "train_mar",
        *flags,
        f"--pretrained_model_name_or_path={tmp_path / 'first'}",
        "--validation_steps=0",
        "--gradient_accumulation_steps=2",
        "--gradient_checkpointing=true",
        "--learning_rate=1e-12",
        f"--output_dir={tmp_path / 'second'}",
    )
    first, second = (MARPipeline.from_pretrained(tmp_path / name).transformer for name in ("first", "second"))
    for name, weight in first.state_dict().items():  # it went on from these
        torch.testing.assert_close(second.state_dict()[name], weight, atol=1e-6, rtol=0)
    assert [line["step"] for line in read_metrics(tmp_path / "second")] == [1, 2]

    # the transformer of another generator
    config = json.loads((tmp_path / "first/transformer/config.json").read_text())
    (tmp_path / "sit/transformer").mkdir(parents=True)
    config["_class_name"] = "DiTTransformer1DModel"
    (tmp_path / "sit/transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a DiTTransformer1DModel, allowed: MARTransformer1DModel"):
        sit = f"--pretrained_model_name_or_path={tmp_path / 'sit'}"
        run_main("train_mar", *flags, sit, f"--output_dir={tmp_path / 'fourth'}")

    # latents of a tokenizer with other statistics
    vae = AutoencoderSoftVQ.from_pretrained(tmp_path / "first/vae")
    vae.register_to_config(scaling_factor=1.5)
    vae.save_pretrained(tmp_path / "first/vae")
    with pytest.raises(ValueError, match="has the `scaling_factor` 1.5, but the latents are of a tokenizer with 2.0"):
        run_main(
            "train_mar",
            *flags,
            f"--pretrained_model_name_or_path={tmp_path / 'first'}",
            f"--output_dir={tmp_path / 'third'}",
        )

    # a run that is to go on with such latents
    vae.save_pretrained(tmp_path / "other_tokenizer")
    others = tmp_path / "other_latents"
    run_cache_latents(tmp_path / "other_tokenizer", others)
    flags = [flag for flag in [*mar_args, *flags] if not flag.startswith("--latents_dir")]
    with pytest.raises(ValueError, match="'scaling_factor': 2.0, .*, this run has those of .*'scaling_factor': 1.5"):
        run_main(
            "train_mar",
            *flags,
            f"--latents_dir={others}",
            "--max_train_steps=4",
            "--resume_from_checkpoint=latest",
            f"--output_dir={tmp_path / 'first'}",
        )


@pytest.mark.slow
def test_compiled_training_in_bfloat16(run_main, mar_args, latents_dir, tmp_path, read_metrics):
    flags = [*mar_args, f"--latents_dir={latents_dir}", "--max_train_steps=2", "--validation_steps=0"]
    run_main("train_mar", *flags, f"--output_dir={tmp_path / 'eager'}")
    fast = ["--mixed_precision=bf16", "--compile=true", f"--output_dir={tmp_path / 'fast'}"]
    run_main("train_mar", *flags, *fast)
    for line, expected in zip(read_metrics(tmp_path / "fast"), read_metrics(tmp_path / "eager"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.05)
    weights = MARPipeline.from_pretrained(tmp_path / "fast").transformer.state_dict()
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert not any("_orig_mod" in name for name in weights)


@pytest.fixture
def tiny(mar_config, tmp_path):
    """Arguments, a model with its loss in eval mode, and a batch of 3 latents."""
    args = mar_arguments(tmp_path, "--diffusion_batch_mul=2", model=mar_config)
    torch.manual_seed(0)
    transformer = build_mar(args, (8, 4), num_classes=8)
    for parameter in transformer.parameters():  # at its start the denoiser gives zeros
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = TemperatureDDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    return args, MARWithLoss(args, transformer, scheduler).eval(), torch.randn(3, 8, 4), torch.tensor([0, 3, 7])


def test_loss_is_the_mean_over_masked_tokens(tiny):
    """Against the official order of things: all tokens through the loss, then a mean over the masked ones."""
    args, model, latents, labels = tiny
    losses = model(latents, labels, batch_generators(0, 1, 0, 0, 3))

    # the same draws, in the same order
    generators = batch_generators(0, 1, 0, 0, 3)
    from softvq_hf.training.masking import sample_patch_mask

    mask = sample_patch_mask(3, 8, 0.7, 1.0, generators.shared, generators.samples)
    dropped = generators.rand() < 0.1
    num_masked = mask[0].sum().item()
    timesteps = generators.randint(1000, 2, num_masked)
    noise = generators.randn(2, num_masked, 4)
    conditions = model.transformer(
        latents, labels, (~mask).nonzero()[:, 1].view(3, -1), force_drop_ids=dropped
    ).conditions
    total = 0.0
    for sample in range(3):
        for repeat in range(2):
            expected = token_diffusion_loss(
                model.transformer,
                model.scheduler,
                latents[sample][mask[sample]],
                conditions[sample][mask[sample]],
                timesteps[sample, repeat],
                noise[sample, repeat],
            )
            total += expected["loss"].sum()
    torch.testing.assert_close(losses["loss"], total / (6 * num_masked))
    assert losses["mask_ratio"].item() == num_masked / 8
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])


def test_draws_belong_to_the_sample(tiny):
    """Each sample's loss is the same in whatever batch it stands, at the same masking ratio."""
    _, model, latents, labels = tiny
    together = model(latents, labels, batch_generators(0, 1, 0, 0, 3))["loss"]
    alone = [model(latents[i : i + 1], labels[i : i + 1], batch_generators(0, 1, 0, i, 1))["loss"] for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).mean())


@pytest.mark.parametrize("class_dropout_prob", [0.0, 1.0])
def test_labels_are_dropped_as_often_as_the_model_says(tiny, class_dropout_prob):
    _, model, latents, labels = tiny
    model.transformer.register_to_config(class_dropout_prob=class_dropout_prob)
    loss, other = (model(latents, ids, batch_generators(0, 1, 0, 0, 3))["loss"] for ids in (labels, 7 - labels))
    assert torch.equal(loss, other) == (class_dropout_prob == 1.0)


def test_the_smallest_share_of_masked_tokens_is_the_given_one(tiny):
    args, model, latents, labels = tiny
    for smallest, expected in ((0.7, {0.75, 0.875, 1.0}), (1.0, {1.0})):
        args.mask_ratio_min = smallest
        shares = {
            model(latents, labels, batch_generators(0, step, step, 0, 3))["mask_ratio"].item() for step in range(30)
        }
        assert shares == expected


def test_masked_tokens_are_not_seen(tiny):
    _, model, latents, labels = tiny
    seen = {}
    model.transformer.register_forward_pre_hook(lambda _, args, options: seen.update(options), with_kwargs=True)
    model(latents, labels, batch_generators(0, 1, 0, 0, 3))
    positions = torch.cat([seen["visible_positions"], seen["predicted_positions"]], dim=1)
    assert torch.equal(positions.sort(dim=1).values, torch.arange(8).expand(3, -1))
    assert 6 <= seen["predicted_positions"].shape[1] <= 8


def test_loss_falls(tiny):
    _, model, latents, labels = tiny
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = model(latents, labels, batch_generators(0, step, step, 0, 3))["mse"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_weight_decay_reaches_matrices_and_tables_outside_of_the_denoiser(tiny):
    args, model, _, _ = tiny
    args.adam_weight_decay = 0.02
    optimizer = build_optimizer(args, parameter_groups(model), 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays.keys() == set(names.values())
    for name, decay in decays.items():
        is_kept = "denoiser" in name or name.endswith("bias") or "norm" in name
        assert decay == (0.0 if is_kept else 0.02), name
    assert decays["transformer.mask_token"] == decays["transformer.class_embedder.weight"] == 0.02
    assert decays["transformer.encoder_pos_embed"] == decays["transformer.proj_in.weight"] == 0.02


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_ratio_min=0"], "`--mask_ratio_min` is 0.0, allowed: numbers above 0, up to 1"),
        (["--mask_ratio_min=1.1"], "`--mask_ratio_min` is 1.1, allowed"),
        (["--diffusion_batch_mul=0"], "`--diffusion_batch_mul` is 0, allowed: integers from 1 on"),
        (["--num_diffusion_steps=1001"], "`--num_diffusion_steps` is 1001, allowed: integers from 1 to 1000"),
        (["--temperature=0"], "`--temperature` is 0.0, allowed: finite numbers above 0"),
        (["--clip_sample_range=-1"], "`--clip_sample_range` is -1.0, allowed"),
        (["--guidance_scale=0.5"], "`--guidance_scale` is 0.5, allowed: finite numbers from 1 on"),
        (["--guidance_scale=inf"], "`--guidance_scale` is inf, allowed: finite numbers from 1 on"),
        (["--num_inference_steps=0"], "`--num_inference_steps` is 0, allowed: integers from 1 on"),
        (["--dataset_name=photographs"], "`--latents_dir` is 'latents', which brings images along"),
        (["--max_train_samples=4"], "`--max_train_samples` is 4, allowed with `--latents_dir`: leave it out"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, mar_config, flags, message):
    with pytest.raises(ValueError, match=message):
        mar_arguments(tmp_path, *flags, model=mar_config)


def test_latents_are_needed(tmp_path):
    with pytest.raises(ValueError, match="`--latents_dir` is missing, allowed: a folder written by"):
        parse_args(MARTrainingArguments, ["--model={}", f"--output_dir={tmp_path}", "--max_train_steps=1"])


@pytest.mark.parametrize(
    ("changes", "num_classes", "message"),
    [
        ({"num_tokens": 9}, 8, r"The transformer takes tokens of shape \(9, 4\), allowed: \(8, 4\)"),
        ({"sample_size": 4}, 8, r"The transformer takes patches of 2-D latents, tokens of shape \(16, 4\)"),
        ({"num_classes": 7}, 8, "`num_classes` is 7, allowed: 8, as in the data, or more"),
        ({"buffer_size": 0}, 8, "`buffer_size` must be positive, but is 0"),
        ({"depth": 3}, 8, "`--model` .*depth|depth.*MARTransformer1DModel"),
    ],
)
def test_models_that_do_not_fit(tmp_path, mar_config, changes, num_classes, message):
    with pytest.raises(ValueError, match=message):
        build_mar(mar_arguments(tmp_path, model=mar_config | changes), (8, 4), num_classes)


def test_guidance_needs_label_dropout(tmp_path, mar_config):
    args = mar_arguments(tmp_path, "--guidance_scale=2", model=mar_config | {"class_dropout_prob": 0.0})
    with pytest.raises(ValueError, match="`--guidance_scale` is 2.0, allowed: 1 for a transformer"):
        build_mar(args, (8, 4), 8)


def test_gradient_checkpointing_reaches_transformer_and_denoiser(tmp_path, mar_config):
    for flags in ([], ["--gradient_checkpointing=true"]):
        transformer = build_mar(mar_arguments(tmp_path, *flags, model=mar_config), (8, 4), 8)
        assert transformer.gradient_checkpointing == transformer.denoiser.gradient_checkpointing == bool(flags)


def test_new_weights_are_the_initial_ones(tmp_path, mar_config):
    transformer = build_mar(mar_arguments(tmp_path, model=mar_config), (8, 4), 8)
    assert isinstance(transformer, MARTransformer1DModel)
    assert not transformer.denoiser.proj_out.weight.any() and transformer.mask_token.any()


def test_what_the_script_trains_and_samples(run_main, monkeypatch, mar_args, latents_dir, tmp_path):
    """It hands its parts and flags to the loop that it shares with `train_sit.py`."""
    given = {}
    monkeypatch.setattr(generator_loop, "train_generator", lambda *arguments, **options: given.update(options))
    options = {
        "guidance_scale": 1.5,
        "guidance_schedule": "constant",
        "num_inference_steps": 5,
        "num_diffusion_steps": 3,
        "temperature": 0.9,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    run_main("train_mar", *mar_args, f"--latents_dir={latents_dir}", f"--output_dir={tmp_path / 'out'}", *flags)
    assert given["sample_options"] == options

    latents, vae = torch.randn(2, 8, 4), given["vae"]
    (normalised,) = given["prepare_batch"]({"latents": latents}, None)
    assert vae.config.scaling_factor != 1 and vae.config.shift_factor != 0
    torch.testing.assert_close(normalised, (latents - vae.config.shift_factor) * vae.config.scaling_factor)

    model = given["model"]
    for group, expected in zip(given["parameters"], parameter_groups(model), strict=True):
        assert group.get("weight_decay") == expected.get("weight_decay")
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in expected["params"]]
    pipeline = given["build_pipeline"](model.transformer)
    assert isinstance(pipeline, MARPipeline) and pipeline.vae is vae and pipeline.transformer is model.transformer
