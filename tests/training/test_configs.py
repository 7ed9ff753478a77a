"""The recipes in training/configs: each is a run of its script, and the published models come out at their sizes."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from softvq_hf.conversion.published_models import load_published_models
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.training.arguments import check_model_config, parse_args


TRAINING = Path(__file__).parents[2] / "training"
CONFIGS = TRAINING / "configs"
ARGUMENTS = {
    "train_softvq": "SoftVQTrainingArguments",
    "cache_latents": "CacheLatentsArguments",
    "train_sit": "SiTTrainingArguments",
    "train_mar": "MARTrainingArguments",
}
QUICKSTART = {
    "quickstart/softvq.yaml": "train_softvq",
    "quickstart/cache_latents.yaml": "cache_latents",
    "quickstart/sit.yaml": "train_sit",
    "quickstart/mar.yaml": "train_mar",
}
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
RECIPES = [name for name in ALL if name not in QUICKSTART]
GENERATORS = [name for name in RECIPES if re.match(r"(generators/)?(sit|dit|mar)_", name)]
TOKENIZERS = [name for name in RECIPES if name not in GENERATORS]
# the config of every published model: softvq_l_64.yaml for SoftVQ-L-64, generators/sit_xl_softvq_l_64.yaml
PUBLISHED = {
    ("generators/" if model.kind == "generator" else "")
    + model.name.lower().replace(" on ", "_").replace("-", "_")
    + ".yaml": model
    for model in load_published_models()
}

# Parameters for 64 tokens of 32 channels, as published, the position table included. There is no DiT-B/1: SiT-B/1 with
# twice the output channels.
SIZES = {
    "sit_b.yaml": 130_377_248,
    "sit_l.yaml": 457_922_592,
    "sit_xl.yaml": 674_926_880,
    "dit_b.yaml": 130_377_248 + 32 * 769,
    "dit_l.yaml": 457_955_392,
    "dit_xl.yaml": 674_963_776,
    "mar_b.yaml": 207_543_872,
    "mar_l.yaml": 477_814_336,
    "mar_h.yaml": 941_760_064,
}
# of MAR for 32 tokens of 64 channels
MAR_SIZES_32 = {"mar_b": 207_593_088, "mar_l": 477_871_744, "mar_h": 941_825_664}

NO_ALIGNMENT = {"alignment_teacher", "alignment_weight", "alignment_patch_size"}
# what an ablation changes of softvq_b_64.yaml, and nothing else
ABLATIONS = {
    "tau_0.01": {"tau"},
    "tau_0.1": {"tau"},
    "tau_1.0": {"tau"},
    "codebook_size_1024": {"codebook_size"},
    "codebook_size_16384": {"codebook_size"},
    "num_codebooks_1": {"num_codebooks"},
    "num_codebooks_64": {"num_codebooks", "codebook_size"},
    "num_latent_tokens_32": {"num_latent_tokens"},
    "num_latent_tokens_128": {"num_latent_tokens"},
    "num_latent_tokens_256": {"num_latent_tokens"},
    "quantizer_vq": {"quantizer", "num_codebooks"},
    "quantizer_vq_no_alignment": {"quantizer", "num_codebooks", *NO_ALIGNMENT},
    "quantizer_kl": {"quantizer"},
    "quantizer_kl_no_alignment": {"quantizer", *NO_ALIGNMENT},
    "quantizer_none": {"quantizer"},
    "quantizer_none_no_alignment": {"quantizer", *NO_ALIGNMENT},
    "no_alignment": NO_ALIGNMENT,
    "alignment_clip": {"alignment_teacher"},
    "encoder_from_scratch": {"encoder_init"},
    "encoder_from_scratch_no_alignment": {"encoder_init", *NO_ALIGNMENT},
}


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules."""
    modules = {}
    for name in ARGUMENTS:
        spec = importlib.util.spec_from_file_location(f"configured_{name}", TRAINING / f"{name}.py")
        modules[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
        spec.loader.exec_module(modules[name])
    yield modules
    for module in modules.values():
        del sys.modules[module.__name__]


@pytest.fixture
def parse(scripts):
    """Arguments of a config as its own script, or another one, reads them: `parse("sit_xl.yaml", "--seed=1")`."""

    def parse_config(name: str, *flags: str, script: str | None = None):
        script = script or script_of(name)
        if name in SIZES:  # for the latents of any tokenizer
            flags = ("--latents_dir=latents", *flags)
        return parse_args(getattr(scripts[script], ARGUMENTS[script]), ["--config", str(CONFIGS / name), *flags])

    return parse_config


def script_of(name: str) -> str:
    if name in QUICKSTART:
        return QUICKSTART[name]
    if name not in GENERATORS:
        return "train_softvq"
    return "train_mar" if "mar_" in name else "train_sit"


def header_of(name: str) -> str:
    """The comment at the head of a file, in one line."""
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    length = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ") for line in lines[:length])


def build_tokenizer(args) -> AutoencoderSoftVQ:
    check_model_config(AutoencoderSoftVQ, args.model)
    with torch.device("meta"):
        return AutoencoderSoftVQ(**args.model)


def build_transformer(script, args, latent_shape: tuple[int, int]) -> DiTTransformer1DModel | MARTransformer1DModel:
    build = script.build_mar if hasattr(script, "build_mar") else script.build_transformer
    with torch.device("meta"):
        return build(args, latent_shape, num_classes=1000)


def differences(args, others) -> set[str]:
    """Names of the arguments, and of the model's, that differ, but for the folder of the result."""
    changed = {field.name for field in dataclasses.fields(args)} - {"output_dir", "model"}
    changed = {name for name in changed if getattr(args, name) != getattr(others, name)}
    model, other_model = args.model or {}, others.model or {}
    return changed | {key for key in {*model, *other_model} if model.get(key) != other_model.get(key)}


def test_every_published_model_has_a_config():
    assert len(PUBLISHED) == len(load_published_models())
    assert set(PUBLISHED) <= set(RECIPES)
    # SiT-XL, DiT-XL and MAR for each published tokenizer, whether that generator was published or not
    tokenizers = [name for name, model in PUBLISHED.items() if model.kind == "tokenizer"]
    assert {name for name in GENERATORS if "/" in name} == {
        f"generators/{generator}_{name}"
        for generator in ("sit_xl", "dit_xl", "mar_b", "mar_l", "mar_h")
        for name in tokenizers
    }
    assert set(SIZES) | {name for name in GENERATORS if "/" in name} == set(GENERATORS)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is(name, parse):
    header = header_of(name)
    for label in ("Published: ", "Inferred: ", "Official "):
        assert label in header
    assert f"training/{script_of(name)}.py \\ --config training/configs/{name}" in header
    args = parse(name)
    assert args.output_dir == f"outputs/{name.removeprefix('generators/').removesuffix('.yaml')}"
    # the published batch, whatever the number of processes
    batch_size = 2048 if script_of(name) == "train_mar" else 256
    assert args.global_batch_size == batch_size
    assert [args.resolve_accumulation(n) * n * args.train_batch_size for n in (1, 2, 4, 8)] == [batch_size] * 4
    assert args.resume_from_checkpoint == "latest" and args.use_ema and args.ema_decay == 0.9999


@pytest.mark.parametrize("name", PUBLISHED)
def test_headers_have_the_published_figures(name):
    published, header = PUBLISHED[name], header_of(name)
    assert published.repo_id in header and f"{published.resolution} px" in header
    assert "{} tokens of {} channels".format(*published.latent_shape) in header
    for figure in published.published.values():
        assert f"{figure:.2f}" in header
    if published.kind == "generator":
        assert f"{published.num_parameters:,} parameters" in header


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if model.kind == "tokenizer"])
def test_tokenizers_have_the_settings_of_the_official_config(name, parse):
    args, official = parse(name), PUBLISHED[name].config
    assert args.model["quantizer"] == ("softvq" if name.startswith("softvq") else "none")
    for ours, theirs in (
        (args.model["encoder_patch_size"], "enc_patch_size"),
        (args.model["decoder_patch_size"], "dec_patch_size"),
        (args.model["codebook_size"], "codebook_size"),
        (args.model["num_codebooks"], "num_codebooks"),
        (args.model["codebook_l2_norm"], "codebook_l2_norm"),
        (args.model["tau"], "tau"),
        (args.model.get("rope_theta"), "rope_theta"),
        (args.model.get("decoder_cls_token"), "dec_cls_token"),
        (args.entropy_weight, "entropy_loss_ratio"),
        (args.alignment_teacher is not None, "repa"),
        (args.alignment_mode, "repa_align"),
        (args.alignment_weight, "repa_loss_weight"),
        (args.alignment_hidden_size, "repa_proj_dim"),
        (args.alignment_patch_size, "repa_patch_size"),
        (args.mask_ratio_min, "enc_token_drop"),
        (args.mask_ratio_max, "enc_token_drop_max"),
    ):
        assert theirs not in official or ours == official[theirs], theirs
    size = re.match(r"vit_(\w+?)_patch14_dinov2", official["encoder_model"])[1]
    assert args.encoder_init == f"facebook/dinov2-{size}"
    if args.alignment_mode == "repeat" and args.alignment_teacher is not None:
        patches = (args.resolution // args.alignment_patch_size) ** 2
        assert patches % args.model["num_latent_tokens"] == 0
    else:
        assert args.auxiliary_hog_weight > 0 and args.auxiliary_dinov2_weight > 0 and args.auxiliary_clip_weight > 0

    # what the official code does, not what its YAML says
    assert (args.optimizer, args.adam_beta1, args.adam_beta2, args.adam_weight_decay) == ("adam", 0.9, 0.95, 0.0)
    assert (args.perceptual_weight, args.perceptual_warmup_steps, args.perceptual_dropout) == (1.0, 10000, True)
    assert (args.lr_scheduler, args.learning_rate, args.lr_warmup_start, args.min_lr) == (
        *("cosine_with_min_lr", 1e-4, 1e-5, 1e-5),
    )
    assert (args.discriminator, args.discriminator_backbone) == ("dino", "facebook/dino-vits16")
    assert args.augment_discriminator and not args.adaptive_adversarial_weight
    assert (args.adversarial_loss, args.adversarial_weight, args.adversarial_start) == ("hinge", 0.2, 20000)
    assert (args.lecam_weight, args.consistency_weight, args.num_train_epochs) == (0.001, 4.0, 50)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_come_out_at_their_size(name, parse):
    args = parse(name)
    args.check_length(args.num_train_epochs * 5004)  # updates in an epoch of ImageNet
    if name == "maetok_b_128_decoder.yaml":  # goes on from the first stage
        assert args.model is None and args.encoder_tuning == "frozen" and args.mask_ratio_max == 0
        assert args.pretrained_model_name_or_path == parse("maetok_b_128.yaml").output_dir
        return
    model = build_tokenizer(args)
    assert model.config.sample_size == args.resolution
    assert (model.config.encoder_hidden_size, model.config.encoder_num_layers) in ((384, 12), (768, 12), (1024, 24))
    assert model.config.encoder_mask_token == (args.mask_ratio_max > 0)
    if name in PUBLISHED:
        published = PUBLISHED[name]
        assert args.resolution == published.resolution
        assert (model.config.num_latent_tokens, model.config.latent_channels) == published.latent_shape
        # the official decoders carry tensors that nothing reads, which are not built here
        assert model.num_parameters() == published.num_parameters - published.num_unused_parameters


def test_recommended_recipe_is_what_the_author_suggested(parse):
    recommended, published = parse("softvq_l_64_recommended.yaml"), parse("softvq_l_64.yaml")
    assert differences(recommended, published) == {
        *("adaptive_adversarial_weight", "adversarial_start", "num_train_epochs")
    }
    assert recommended.adaptive_adversarial_weight
    assert recommended.adversarial_start > published.adversarial_start
    assert recommended.num_train_epochs > published.num_train_epochs


def test_ablations_vary_one_thing(parse):
    assert {f"ablations/{name}.yaml" for name in ABLATIONS} == {name for name in RECIPES if "ablations/" in name}
    base = parse("softvq_b_64.yaml")
    for name, expected in ABLATIONS.items():
        args = parse(f"ablations/{name}.yaml")
        assert differences(args, base) == expected, name
        assert (args.alignment_teacher is None) == name.endswith("no_alignment") == (args.alignment_weight == 0)
        assert "Varied: " in header_of(f"ablations/{name}.yaml")
        for key, value in re.findall(r"(tau|codebook_size|num_codebooks|num_latent_tokens|quantizer)_([\w.]+)", name):
            assert str(args.model[key]) == value.removesuffix("_no_alignment")


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_come_out_at_their_size(name, parse, scripts):
    args = parse(name)
    latent_shape = (64, 32)
    if name not in SIZES:
        tokenizer = parse(re.sub(r"^generators/(sit_xl|dit_xl|mar_.)_", "", name))
        latent_shape = (tokenizer.model["num_latent_tokens"], tokenizer.model["latent_channels"])
        assert args.resolution == tokenizer.resolution
        assert args.latents_dir == f"{tokenizer.output_dir}_latents"
        # the first of the two commands makes these latents of that tokenizer
        assert f"--pretrained_model_name_or_path {tokenizer.output_dir} " in header_of(name)
        assert f"--output_dir {args.latents_dir} " in header_of(name)
    model = build_transformer(scripts[script_of(name)], args, latent_shape)
    if name in SIZES:
        assert model.num_parameters() == SIZES[name]
    elif name in PUBLISHED:
        assert latent_shape == PUBLISHED[name].latent_shape
        assert model.num_parameters() == PUBLISHED[name].num_parameters
    if script_of(name) == "train_mar":
        check_mar_recipe(args, model)
        size = Path(name).stem[:5]
        if latent_shape in ((64, 32), (32, 64)):
            sizes = {f"{key}.yaml": value for key, value in MAR_SIZES_32.items()} if latent_shape[0] == 32 else SIZES
            assert model.num_parameters() == sizes[f"{size}.yaml"]
        return
    is_dit = "dit_" in name
    assert model.out_channels == (2 if is_dit else 1) * model.config.in_channels
    if is_dit:
        assert (args.objective, args.beta_schedule, args.sampler) == ("ddpm", "squaredcos_cap_v2", "ddpm")
        assert args.max_grad_norm == 0
    else:
        assert (args.objective, args.path_type, args.weighting) == ("flow_matching", "linear", "lognormal")
        assert args.max_grad_norm == 1
    assert (args.optimizer, args.learning_rate, args.adam_weight_decay) == ("adamw", 1e-4, 0.0)
    assert (args.adam_beta1, args.adam_beta2, args.max_train_steps) == (0.9, 0.999, 3_000_000)


def check_mar_recipe(args, model) -> None:
    """The published recipe (arXiv 2406.11838): 800 epochs of 2048 images, 100 of them for warming up."""
    assert (args.optimizer, args.adam_beta1, args.adam_beta2, args.adam_weight_decay) == ("adamw", 0.9, 0.95, 0.02)
    assert args.learning_rate * args.global_batch_size / args.lr_base_batch_size == pytest.approx(8e-4)
    assert (args.lr_scheduler, args.max_grad_norm) == ("constant_with_warmup", 3.0)
    assert args.max_train_steps == round(800 * 1_281_167 / 2048)
    assert args.lr_warmup_steps == round(100 * 1_281_167 / 2048)
    assert (args.mask_ratio_min, args.diffusion_batch_mul, args.clip_sample_range) == (0.7, 4, None)
    assert args.num_inference_steps == min(64, model.num_tokens)
    config = model.config
    assert (config.buffer_size, config.attention_dropout, config.dropout) == (64, 0.1, 0.1)
    assert config.class_dropout_prob == 0.1


def test_latents_of_another_tokenizer_are_refused(parse, scripts):
    args = parse("generators/sit_xl_softvq_l_64.yaml")
    with pytest.raises(ValueError, match=r"The transformer takes latents of shape \(64, 32\)"):
        build_transformer(scripts["train_sit"], args, (32, 64))


def test_quickstart_configs_fit_each_other(parse):
    tokenizer, latents, generator, mar = (parse(name) for name in QUICKSTART)
    assert latents.pretrained_model_name_or_path == tokenizer.output_dir
    assert latents.output_dir == generator.latents_dir == mar.latents_dir
    assert latents.dataset_name == tokenizer.dataset_name == "photographs"
    # the last checkpoint is the end, so that running it again has nothing to do
    for args in (tokenizer, generator, mar):
        assert args.max_train_steps % args.checkpointing_steps == 0 and args.resume_from_checkpoint == "latest"
    with torch.device("meta"):
        model = AutoencoderSoftVQ(**{"sample_size": tokenizer.resolution, **tokenizer.model})
        DiTTransformer1DModel(
            num_tokens=model.config.num_latent_tokens, in_channels=model.config.latent_channels, **generator.model
        )
        MARTransformer1DModel(
            num_tokens=model.config.num_latent_tokens, in_channels=model.config.latent_channels, **mar.model
        )


@pytest.mark.parametrize("name", ALL)
def test_a_config_for_another_script_is_an_error(name, parse):
    for script in ARGUMENTS:
        if script != script_of(name):
            with pytest.raises(ValueError, match="which this script does not know|is needed|are missing|allowed:"):
                parse(name, script=script)


def test_no_two_files_are_the_same_run():
    runs = {}
    for name in ALL:
        written = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
        written.pop("output_dir")
        assert written not in runs.values(), f"{name} is another file with another output_dir"
        runs[name] = written
