"""Time one update of each training script: what every loss costs, and what share of the matmul peak is reached.

    python benchmarks/training.py --output_dir outputs/benchmark_training

The updates are made of the parts that `training/train_softvq.py` and `training/train_sit.py` are made of (losses,
backward passes, clipping, optimizers, averages of the weights), with the recipes in `training/configs`, on random
images and latents that are on the device already. Weights are random, also those that would be downloaded: LPIPS,
DINO-S and DINOv2-L have their real shapes.

`train_softvq` (SoftVQ-L-64) is timed with reconstruction and codebook entropy alone, with each of the other losses
beside them, and with all; `train_sit` (SiT-XL on latents of 64 tokens with 32 channels) as it is and with
`--compile`. The peak is that of a product of two square matrices in the autocast dtype, timed in the same rounds. The
operations of an update are counted by `torch.utils.flop_counter`: products, convolutions and attention of forward and
backward passes, two for a product and its sum.

`--output_dir` gets `training.json` and `training.md`. `peak_share` of an update is its operations per second over
those of the square product. Images per second are compared:

- `sit_xl.compile.vs_eager`: with `--compile` beside without, a ratio for `make bench`;
- `softvq_l_64.<losses>.vs_reconstruction`: beside reconstruction alone, a measurement, for what losses cost falls as a
  ratio when the rest of an update becomes faster.
"""

import copy
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from side_by_side import (
    Contestant,
    Spread,
    Timings,
    default_device,
    default_dtype,
    markdown_table,
    square_product,
    time_in_turn,
    working_memory,
    write_report,
)
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from softvq_hf.losses import FrozenTeacher, LeCAMRegularizer, PerceptualLoss, adversarial_weight, build_discriminator
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.accelerator import build_accelerator
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.distributed import backward, place_teacher, prepare_model
from softvq_hf.training.generator_arguments import SiTTrainingArguments
from softvq_hf.training.optimization import build_ema, build_optimizer, end_batch
from softvq_hf.training.randomness import batch_generators
from softvq_hf.training.state import TrainerState
from softvq_hf.training.tokenizer import TokenizerWithHeads, build_tokenizer, discriminator_losses, tokenizer_losses
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments
from softvq_hf.training.transformer import TransformerWithLoss, build_transformer


CONFIGS = Path(__file__).parents[1] / "training" / "configs"
SOFTVQ_RECIPE, SIT_RECIPE = CONFIGS / "softvq_l_64.yaml", CONFIGS / "sit_xl.yaml"
LATENT_SHAPE, NUM_CLASSES = (64, 32), 1000

# What the recipe would download.
DINOV2_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
DINO_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}

# Settings of the recipe that turn the losses off, by their name here.
LOSSES = {
    "perceptual": {"perceptual_weight": 0.0},
    "adversarial": {"adversarial_weight": 0.0},
    "alignment": {"alignment_weight": 0.0},
}
SHORT_NUM_LAYERS = 2
# Largest difference between the losses of compiled and plain blocks, as a share.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(kw_only=True)
class TrainingBenchmarkArguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder for training.json and training.md."})
    tokenizer_batch_size: int = field(default=2, metadata={"help": "Images of an update of the tokenizer."})
    transformer_batch_size: int = field(default=8, metadata={"help": "Latents of an update of the transformer."})
    matmul_size: int = field(default=4096, metadata={"help": "Side of the matrices whose product is the peak."})
    rounds: int = field(default=3, metadata={"help": "Timed updates of each."})
    device: str | None = field(default=None, metadata={"help": "By default the accelerator, where there is one."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Autocast dtype; by default bfloat16 where that is fast.",
            "choices": ["float32", "bfloat16"],
        },
    )
    short: bool = field(
        default=False,
        metadata={
            "help": "Two layers, small batches, two rounds, no single losses; flags for these count for nothing."
        },
    )

    def __post_init__(self) -> None:
        if self.short:
            self.tokenizer_batch_size, self.transformer_batch_size = 1, 4
            self.matmul_size, self.rounds = 2048, 2
        for name in ("tokenizer_batch_size", "transformer_batch_size", "matmul_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        self.device = default_device() if self.device is None else self.device
        self.dtype = default_dtype(self.device) if self.dtype is None else self.dtype


Update = Callable[[], dict[str, float]]  # one update of the weights; gives losses and norms of gradients by name


def softvq_recipe(args: TrainingBenchmarkArguments) -> SoftVQTrainingArguments:
    """The published recipe at the batch size of the benchmark, adversarial from the first update on."""
    recipe = parse_args(SoftVQTrainingArguments, ["--config", str(SOFTVQ_RECIPE)])
    layers = {"encoder_num_layers": SHORT_NUM_LAYERS, "decoder_num_layers": SHORT_NUM_LAYERS} if args.short else {}
    return replace(
        recipe,
        output_dir=args.output_dir,
        model=recipe.model | layers,
        encoder_init=None,
        adversarial_start=0,
        train_batch_size=args.tokenizer_batch_size,
        global_batch_size=None,
        mixed_precision="bf16" if args.dtype == "bfloat16" else "no",
        report_to="none",
    )


def sit_recipe(args: TrainingBenchmarkArguments) -> SiTTrainingArguments:
    """The published recipe at the batch size of the benchmark."""
    recipe = parse_args(SiTTrainingArguments, ["--config", str(SIT_RECIPE), "--latents_dir=none"])
    return replace(
        recipe,
        output_dir=args.output_dir,
        model=recipe.model | ({"num_layers": SHORT_NUM_LAYERS} if args.short else {}),
        train_batch_size=args.transformer_batch_size,
        global_batch_size=None,
        mixed_precision="bf16" if args.dtype == "bfloat16" else "no",
        report_to="none",
    )


def random_perceptual_loss(recipe: SoftVQTrainingArguments) -> PerceptualLoss:
    """LPIPS with random weights in its VGG16."""
    with torch.device("meta"):
        features = vgg16().features
    for layer in features.to_empty(device="cpu"):
        if isinstance(layer, torch.nn.Conv2d):
            layer.reset_parameters()
    with tempfile.TemporaryDirectory() as folder:
        trunk = Path(folder, "vgg16.pth")
        torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, trunk)
        return PerceptualLoss(trunk, dropout=recipe.perceptual_dropout).train()


def softvq_updates(recipe: SoftVQTrainingArguments, accelerator: Accelerator, short: bool) -> dict[str, Update]:
    """One update of `training/train_softvq.py` by the losses in it. All have the same weights and optimizers."""
    device = accelerator.device
    tokenizer = build_tokenizer(recipe)
    teacher_config = DINOV2_LARGE | ({"num_hidden_layers": SHORT_NUM_LAYERS} if short else {})
    teacher = Dinov2Model(Dinov2Config(**teacher_config))
    teacher = place_teacher(accelerator, FrozenTeacher(teacher, recipe.resolution, recipe.alignment_patch_size))
    perceptual_loss = random_perceptual_loss(recipe).to(device)
    discriminator = build_discriminator("dino", backbone=ViTModel(ViTConfig(**DINO_SMALL), add_pooling_layer=False))
    lecam = LeCAMRegularizer().to(device)
    if recipe.channels_last:
        for convolutional in (perceptual_loss, discriminator):
            convolutional.to(memory_format=torch.channels_last)

    model = TokenizerWithHeads(recipe, tokenizer, {"alignment": teacher})
    optimizer = build_optimizer(recipe, model.parameters(), recipe.learning_rate)
    model_without_heads = accelerator.prepare(TokenizerWithHeads(recipe, tokenizer, {}))
    model, optimizer = prepare_model(accelerator, model, optimizer)
    discriminator_optimizer = build_optimizer(recipe, discriminator.parameters(), recipe.learning_rate)
    discriminator, discriminator_optimizer = prepare_model(accelerator, discriminator, discriminator_optimizer)
    ema, state = build_ema(recipe, tokenizer), TrainerState()
    resolution, batch_size = recipe.resolution, recipe.train_batch_size
    pixel_values = torch.rand(batch_size, 3, resolution, resolution, device=device) * 2 - 1
    image_ids = list(range(batch_size))

    def update(args: SoftVQTrainingArguments) -> dict[str, float]:
        step = state.step + 1
        generators = batch_generators(args.seed, step, 0, 0, batch_size)
        adversarial = adversarial_weight(step, args.adversarial_weight, args.adversarial_start)
        trained_model = model if args.alignment_weight > 0 else model_without_heads
        teachers = {"alignment": teacher} if args.alignment_weight > 0 else {}
        perceptual = perceptual_loss if args.perceptual_weight > 0 else None
        judges = (teachers, perceptual, discriminator, adversarial)
        with accelerator.accumulate(trained_model, discriminator):
            output, losses = tokenizer_losses(
                args, accelerator, trained_model, *judges, pixel_values, generators, step
            )
            backward(accelerator, trained_model, losses["loss"])
            trained = {"grad_norm": (trained_model, optimizer)}
            if adversarial > 0:
                losses |= discriminator_losses(
                    args, discriminator, lecam, adversarial, pixel_values, output.sample, generators
                )
                backward(accelerator, discriminator, losses["discriminator_loss"])
                trained["discriminator_grad_norm"] = (discriminator, discriminator_optimizer)
            values, _ = end_batch(accelerator, args, state, trained, losses, True, image_ids)
        state.step = step
        ema.step(tokenizer.parameters())
        return values

    nothing = {name: off for settings in LOSSES.values() for name, off in settings.items()}
    recipes = {"reconstruction": replace(recipe, **nothing)}
    if not short:
        for loss, settings in LOSSES.items():
            own = {name: getattr(recipe, name) for name in settings}
            recipes[loss] = replace(recipe, **nothing | own)
    recipes["all"] = recipe
    return {name: partial(update, args) for name, args in recipes.items()}


def sit_updates(recipe: SiTTrainingArguments, accelerator: Accelerator) -> dict[str, Update]:
    """
    One update of `training/train_sit.py`, without ("eager") and with `--compile`. Both have the same weights and
    optimizer.

    Raises:
        ValueError: If the two differ in their losses.
    """
    device, batch_size = accelerator.device, recipe.train_batch_size
    transformer = build_transformer(recipe, LATENT_SHAPE, NUM_CLASSES)
    for parameter in transformer.parameters():  # at its start the transformer gives zeros, whatever its blocks do
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    transformers = {"eager": transformer}
    shared = {id(parameter): parameter for parameter in transformer.parameters()}
    transformers["compile"] = copy.deepcopy(transformer, shared)
    transformers["compile"].compile_repeated_blocks()

    scheduler = StochasticInterpolantScheduler(path_type=recipe.path_type)
    models = {name: TransformerWithLoss(recipe, transformers[name], scheduler, None) for name in transformers}
    optimizer = build_optimizer(recipe, models["eager"].parameters(), recipe.learning_rate)
    models["eager"], optimizer = prepare_model(accelerator, models["eager"], optimizer)
    models["compile"] = accelerator.prepare(models["compile"])
    ema, state = build_ema(recipe, transformer), TrainerState()
    latents = torch.randn(batch_size, *LATENT_SHAPE, device=device)
    class_labels = torch.arange(batch_size, device=device) % NUM_CLASSES
    image_ids = list(range(batch_size))

    def update(model: torch.nn.Module) -> dict[str, float]:
        generators = batch_generators(recipe.seed, state.step + 1, 0, 0, batch_size)
        with accelerator.accumulate(model):
            losses = model(latents, class_labels, generators)
            backward(accelerator, model, losses["loss"])
            trained = {"grad_norm": (model, optimizer)}
            values, _ = end_batch(accelerator, recipe, state, trained, losses, True, image_ids)
        state.step += 1
        ema.step(transformer.parameters())
        return values

    generators = {name: batch_generators(recipe.seed, 0, 0, 0, batch_size) for name in models}
    losses = {name: models[name](latents, class_labels, generators[name])["loss"].item() for name in models}
    tolerance = TOLERANCES["bfloat16" if accelerator.mixed_precision == "bf16" else "float32"]
    if not abs(losses["compile"] - losses["eager"]) <= tolerance * losses["eager"]:
        raise ValueError(f"The losses are {losses}, allowed: a difference of {tolerance:g} of each other.")
    return {name: partial(update, model) for name, model in models.items()}


def count_flops(name: str, update: Update) -> int:
    """
    Floating-point operations of an update.

    Raises:
        ValueError: If it is one that would be left out.
    """
    with FlopCounterMode(display=False) as counter:
        values = update()
    if not all(map(math.isfinite, values.values())):
        raise ValueError(f"The update {name} gives {values}, allowed: finite losses and gradients.")
    return counter.get_total_flops()


def main(args: TrainingBenchmarkArguments) -> None:
    check_output_dir(args.output_dir)
    if torch.device(args.device).type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    recipes = {SOFTVQ_RECIPE.stem: softvq_recipe(args), SIT_RECIPE.stem: sit_recipe(args)}
    accelerator = build_accelerator(recipes[SOFTVQ_RECIPE.stem])
    device = accelerator.device
    wanted = torch.device(args.device)
    index = 0 if device.type == "cpu" else torch.accelerator.current_device_index()
    if device.type != wanted.type or wanted.index not in (None, index):
        raise ValueError(f"`--device` is {args.device}, allowed: cpu, or where accelerate runs, here {device}.")

    # One recipe after the other: the weights, averages and moments of both may be too much for the device
    ratios: dict[str, Spread] = {}
    losses: dict[str, Spread] = {}
    measurements: dict[str, Any] = {}
    rows = []
    for name, recipe in recipes.items():
        if name == SOFTVQ_RECIPE.stem:
            updates = softvq_updates(recipe, accelerator, args.short)
        else:
            updates = sit_updates(recipe, accelerator)
        flops = {kind: count_flops(f"{name}.{kind}", update) for kind, update in updates.items() if kind != "compile"}
        if "compile" in updates:  # a compiled region hides its operations; they are the same
            flops["compile"] = flops["eager"]
        contestants = {kind: Contestant(update, flops[kind]) for kind, update in updates.items()}
        contestants["matmul"] = square_product(args.matmul_size, device, getattr(torch, args.dtype))
        timings = time_in_turn(contestants, args.rounds, device)
        images = Timings(dict.fromkeys(contestants, recipe.train_batch_size), timings.seconds)

        peak = timings.rate("matmul")
        measurements[name] = {"matmul_flops_per_second": asdict(peak)}
        for kind in updates:
            share, rate, seconds = timings.ratio(kind, "matmul"), images.rate(kind), Spread.of(timings.seconds[kind])
            memory = working_memory(contestants[kind].call, device)
            measurements[name][kind] = {
                "seconds": timings.seconds[kind],
                "images_per_second": asdict(rate),
                "gflops_per_image": flops[kind] / recipe.train_batch_size / 1e9,
                "flops_per_second": asdict(timings.rate(kind)),
                "peak_share": asdict(share),
                "working_memory_bytes": memory,
            }
            gflops = f"{flops[kind] / recipe.train_batch_size / 1e9:.0f}"
            rows.append([f"{name}, {kind}", seconds, rate, gflops, share, f"{memory / 2**30:.2f}"])
        rows.append(
            [f"matmul, {args.matmul_size} x {args.matmul_size}", "", "", "", f"{peak.median / 1e12:.3g} TFLOP/s", ""]
        )
        baseline, *others = updates
        compared = {f"{name}.{kind}.vs_{baseline}": images.ratio(kind, baseline) for kind in others}
        if name == SOFTVQ_RECIPE.stem:
            losses |= compared
        else:
            ratios |= compared
        del updates, contestants, timings
        accelerator.free_memory()

    header = ["update", "seconds", "images/s", "GFLOPs per image", "share of the matmul peak", "working memory, GiB"]
    settings = asdict(args) | {"recipes": {name: recipe.to_dict() for name, recipe in recipes.items()}}
    table = markdown_table(header, rows) + "\n"
    table += markdown_table(
        ["times as many images per second", "median (smallest to largest)"],
        list((losses | ratios).items()),
    )
    measurements["losses"] = {name: asdict(ratio) for name, ratio in losses.items()}
    write_report(args.output_dir, "training", table, ratios, settings, measurements)


if __name__ == "__main__":
    sys.exit(main(parse_args(TrainingBenchmarkArguments)))
