"""Time class-conditional generation: SiT-XL on SoftVQ tokens beside what it replaces, at equal steps and guidance.

    python benchmarks/generation.py --output_dir outputs/benchmark_generation
    python benchmarks/generation.py --output_dir outputs/benchmark_generation_512 --resolution 512

| | |
|---|---|
| `sit_xl_32`, `sit_xl_64` | `SoftVQPipeline`, SiT-XL on the 32 or 64 tokens of a SoftVQ tokenizer |
| `sit_xl_2d` | `SoftVQPipeline`, SiT-XL/2 on the latents of Stable Diffusion's `AutoencoderKL`: 256 or 1024 tokens |
| `official_32`, `official_64` | the model of `sit_xl_*` in the official loop, see `official_loops.py` |
| `per_sample_32`, `per_sample_64` | `sit_xl_*`, but the transformer computes its modulation for each sample and step |
| `dit_xl_diffusers` | diffusers' `DiTPipeline`, DiT-XL/2 on 2-D latents, which guides at every step |
| `eager_32`, `eager_64`, `eager_2d` | with `--compile`: `sit_xl_*` as they are without `enable_fast_sampling` |
| `mar_b_64` | with `--mar`: `MARPipeline`, MAR-B on 64 tokens, `--num_mar_steps` steps, each with a chain of 100 |
| `eager_mar_b_64` | with `--mar` and `--compile`: `mar_b_64` as it is without `enable_fast_sampling` |
| `official_mar_b_64` | with `--mar`: the model of `mar_b_64` in the official loop, likewise |
| `sit_b_64` | with `--mar`: `SoftVQPipeline`, SiT-B on 64 tokens |

Weights are random, shapes are real, noise is the same. Systems that compute the same must give the same latents before
anything is timed. The protocol is `--sampler sde` in 250 steps (SiT's and REPA's), or `ode` in 50, guided between the
times 0 and 0.7. All steps cost the same but for guidance: `--measured_steps` of them are timed, and what they take is
scaled by the number of samples that pass the transformer. MAR is timed as a whole, guided linearly. Decoding is timed
by itself and added; systems with the same decoder share its time.

`--output_dir` gets `generation.json` and `generation.md`. Ratios are images per second with decoding, or without it
(`.latents`), each system at its own best batch of `--batch_sizes`, and at each of several (`.batch_8`). Those of MAR
and SiT, both of this library, are measurements that `make bench` does not compare. `peak_share` is what the
transformer multiplies and adds per second of latents, the modulation left out, over those of a product of two square
matrices. Memory is that of weights and a call of 32 steps at most; the table has that of the official loop at the same
batch beside it. Weights that a compiler keeps once more are in neither.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch._dynamo
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)
from official_loops import GUIDANCE_INTERVAL, sample_in_full_batches, sample_mar_in_full
from side_by_side import (
    Contestant,
    Spread,
    Timings,
    default_device,
    default_dtype,
    markdown_table,
    random_model,
    square_product,
    time_in_turn,
    weights_bytes,
    working_memory,
    write_report,
)
from torch.utils.flop_counter import FlopCounterMode

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.pipelines.pipeline_softvq import COMPILE_MODES, MODULATION_ROWS, SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.generator import build_token_scheduler
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments


CONFIGS = Path(__file__).parents[1] / "training" / "configs"
# Tokenizers by resolution and tokens: those with the smallest decoder of which generators were published.
TOKENIZERS = {256: {32: "softvq_b_32", 64: "softvq_b_64"}, 512: {32: "softvq_l_32_512", 64: "softvq_bl_64_512"}}
AUTOENCODER_KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
# Largest difference of latents that should be equal, as a share of the largest entry.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
# The chains of MAR's tokens multiply rounding errors, and so does each step of a network of random weights, which is
# compared in no more steps than these.
MAR_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2}
COMPARED_MAR_STEPS = 8
# Memory is measured in no more steps than these, which is how many of one image are modulated at once.
MEMORY_STEPS = MODULATION_ROWS // 2


@dataclass(kw_only=True)
class GenerationBenchmarkArguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder for generation.json and generation.md."})
    resolution: int = field(default=256, metadata={"help": "Side of the images in pixels.", "choices": [256, 512]})
    tokens: list[int] | None = field(default=None, metadata={"help": "Of 32 and 64; by default all there are."})
    sampler: str = field(default="ode", metadata={"help": "Of SiT.", "choices": ["ode", "sde"]})
    num_inference_steps: int | None = field(default=None, metadata={"help": "By default 50 for ode, 250 for sde."})
    measured_steps: int | None = field(default=None, metadata={"help": "Steps that are timed; by default all."})
    guidance_scale: float = field(default=1.75, metadata={"help": "Scale of classifier-free guidance, above 1."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Images at a time."})
    max_batch_tokens: int | None = field(
        default=None, metadata={"help": "Leave out batches of more tokens than this, of each system."}
    )
    mar: bool = field(default=False, metadata={"help": "Time MAR-B on 64 tokens, and SiT-B, too."})
    num_mar_steps: int = field(default=64, metadata={"help": "Autoregressive steps of MAR."})
    rounds: int = field(default=3, metadata={"help": "Timed calls of each."})
    matmul_size: int = field(default=4096, metadata={"help": "Side of the matrices whose product is the peak."})
    num_layers: int = field(default=28, metadata={"help": "Blocks of every transformer."})
    compile: bool = field(default=False, metadata={"help": "`enable_fast_sampling` for ours, but for `eager_*`."})
    compile_mode: str | None = field(
        default=None,
        metadata={
            "help": "With `--compile`: its mode; those with CUDA graphs are for SiT, MAR is compiled without.",
            "choices": [mode for mode in COMPILE_MODES if mode is not None],
        },
    )
    freeze_weights: bool = field(default=False, metadata={"help": "The same with `freeze_weights`, for CPUs."})
    skip: list[str] = field(
        default_factory=list,
        metadata={"help": "Systems to leave out, such as dit_xl_diffusers; not sit_xl_32 and _64."},
    )
    device: str | None = field(default=None, metadata={"help": "By default the accelerator, where there is one."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "By default bfloat16 where that is fast.", "choices": ["float32", "bfloat16"]},
    )
    short: bool = field(
        default=False,
        metadata={"help": "Two blocks, ten steps, batches of four, two rounds; flags for these count for nothing."},
    )

    def __post_init__(self) -> None:
        if self.short:
            self.num_layers, self.measured_steps, self.batch_sizes, self.rounds = 2, 10, [4], 2
            self.num_mar_steps = 2
            self.mar |= self.resolution == 256 and (self.tokens is None or 64 in self.tokens)
        self.compile |= self.freeze_weights
        if self.compile_mode is not None and not self.compile:
            raise ValueError(f"`--compile_mode` is {self.compile_mode}, allowed: with `--compile`.")
        if self.freeze_weights and COMPILE_MODES[self.compile_mode] != self.compile_mode:
            raise ValueError(
                f"`--compile_mode` is {self.compile_mode}, allowed with `--freeze_weights`: those without CUDA graphs."
            )
        self.tokens = list(TOKENIZERS[self.resolution]) if self.tokens is None else self.tokens
        if not self.tokens or not set(self.tokens) <= set(TOKENIZERS[self.resolution]):
            raise ValueError(
                f"`--tokens` is {self.tokens}, allowed at `--resolution` {self.resolution}:"
                f" {list(TOKENIZERS[self.resolution])}."
            )
        if self.num_inference_steps is None:
            self.num_inference_steps = {"ode": 50, "sde": 250}[self.sampler]
        for name in ("num_inference_steps", "num_layers", "rounds", "matmul_size", "num_mar_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if self.measured_steps is None:
            self.measured_steps = self.num_inference_steps
        elif self.short:
            self.measured_steps = min(self.measured_steps, self.num_inference_steps)
        if not 1 <= self.measured_steps <= self.num_inference_steps:
            raise ValueError(
                f"`--measured_steps` is {self.measured_steps}, allowed: 1 to `--num_inference_steps`,"
                f" {self.num_inference_steps}."
            )
        if self.mar and (self.resolution != 256 or 64 not in self.tokens):
            raise ValueError("`--mar` is true, allowed: with `--resolution` 256 and 64 in `--tokens`.")
        if not 1 < self.guidance_scale < math.inf:
            raise ValueError(f"`--guidance_scale` is {self.guidance_scale}, allowed: finite numbers above 1.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"`--batch_sizes` is {self.batch_sizes}, allowed: one or more integers from 1 on.")
        fewest = min(self.batch_sizes) * (self.resolution // 16) ** 2
        if self.max_batch_tokens is not None and self.max_batch_tokens < fewest:
            raise ValueError(
                f"`--max_batch_tokens` is {self.max_batch_tokens}, allowed: {fewest} or more, the tokens of"
                f" {min(self.batch_sizes)} 2-D latents."
            )
        own = ("per_sample", "official", *(("eager",) if self.compile else ()))
        allowed = {f"{name}_{tokens}" for name in own for tokens in self.tokens} | {"sit_xl_2d", "dit_xl_diffusers"}
        allowed |= {"eager_2d"} if self.compile else set()
        allowed |= {"mar_b_64", "official_mar_b_64", "sit_b_64"} if self.mar else set()
        allowed |= {"eager_mar_b_64"} if self.mar and self.compile else set()
        if not set(self.skip) <= allowed:
            raise ValueError(f"`--skip` is {self.skip}, allowed: some of {sorted(allowed)}.")
        self.device = default_device() if self.device is None else self.device
        self.dtype = default_dtype(self.device) if self.dtype is None else self.dtype


@dataclass
class System:
    """
    A way to generate.

    Attributes:
        pipeline (`DiffusionPipeline`): Its models.
        sample (`Callable`): Latents of class labels, by `labels`, `num_inference_steps` and `generator`.
        copies (`int`): How many times the batch is computed.
        num_guided_steps (`int`, *optional*): Steps, all of them guided, where they do not depend on the protocol.
    """

    pipeline: DiffusionPipeline
    sample: Callable[..., torch.Tensor]
    copies: int = 1
    num_guided_steps: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample."""
        config = self.pipeline.transformer.config
        return (config.sample_size // config.patch_size) ** 2 if config.sample_size else config.num_tokens

    @torch.no_grad()
    def decode(self, batch_size: int) -> torch.Tensor:
        """Images `(B, 3, R, R)` in [0, 1], of any latents."""
        vae, device = self.pipeline.vae, self.pipeline.device
        if isinstance(vae, AutoencoderKL):
            side = self.pipeline.transformer.config.sample_size
            latents = torch.zeros(batch_size, vae.config.latent_channels, side, side, device=device, dtype=vae.dtype)
        else:
            tokens, channels = vae.config.num_latent_tokens, vae.config.latent_channels
            latents = torch.zeros(batch_size, tokens, channels, device=device, dtype=vae.dtype)
        if isinstance(self.pipeline, DiTPipeline):
            images = vae.decode(latents, return_dict=False)[0]
        else:
            images = self.pipeline.decode_latents(latents)
        return (images / 2 + 0.5).clamp(0, 1)


def build_scheduler(sampler: str) -> SchedulerMixin:
    """SiT's samplers on the linear path."""
    return FlowMatchEulerDiscreteScheduler() if sampler == "ode" else StochasticInterpolantScheduler()


class PerSamplePipeline(SoftVQPipeline):
    """`SoftVQPipeline` as it would be if it left the modulation to the transformer."""

    precomputes_modulation = False


def in_pipeline(
    pipeline: SoftVQPipeline,
    guidance_scale: float,
    labels: list[int],
    num_inference_steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Latents by `SoftVQPipeline`."""
    return pipeline(
        labels,
        guidance_scale=guidance_scale,
        guidance_interval=GUIDANCE_INTERVAL,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type="latent",
    ).images


def in_mar_pipeline(
    pipeline: MARPipeline,
    guidance_scale: float,
    num_mar_steps: int,
    labels: list[int],
    num_inference_steps: int,
    generator: torch.Generator,
    **draws: torch.Tensor,
) -> torch.Tensor:
    """Latents by `MARPipeline`, in `num_mar_steps` whatever `num_inference_steps` is."""
    return pipeline(
        labels,
        guidance_scale=guidance_scale,
        num_inference_steps=num_mar_steps,
        generator=generator,
        output_type="latent",
        **draws,
    ).images


def in_dit_pipeline(
    pipeline: DiTPipeline,
    guidance_scale: float,
    labels: list[int],
    num_inference_steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Images by diffusers' `DiTPipeline`, decoding included, as an array."""
    return pipeline(
        labels,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type="np",
    ).images


def plain_copy(model: ModelMixin) -> ModelMixin:
    """The model with the same weights, not copied, that stays as it is where the other one is compiled."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def build_systems(args: GenerationBenchmarkArguments) -> dict[str, System]:
    """All systems that are to be timed, by name."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    systems, scheduler = {}, build_scheduler(args.sampler)

    def add(name: str, pipeline: SoftVQPipeline) -> None:
        systems[name] = System(pipeline, partial(in_pipeline, pipeline, args.guidance_scale))

    for tokens in args.tokens:
        recipe = CONFIGS / f"{TOKENIZERS[args.resolution][tokens]}.yaml"
        config = parse_args(SoftVQTrainingArguments, ["--config", str(recipe)]).model
        vae = random_model(AutoencoderSoftVQ, config, device, dtype)
        shape = {"num_tokens": config["num_latent_tokens"], "in_channels": config["latent_channels"]}
        transformer = random_model(DiTTransformer1DModel, {"num_layers": args.num_layers, **shape}, device, dtype)
        add(f"sit_xl_{tokens}", SoftVQPipeline(vae, transformer, scheduler))
        add(f"per_sample_{tokens}", PerSamplePipeline(vae, transformer, scheduler))
        plain_pipeline = SoftVQPipeline(plain_copy(vae), plain_copy(transformer), scheduler)
        sample = partial(sample_in_full_batches, plain_pipeline, args.guidance_scale)
        systems[f"official_{tokens}"] = System(plain_pipeline, sample, copies=2)
        if args.compile:
            add(f"eager_{tokens}", plain_pipeline)

    if args.mar:
        vae = systems["sit_xl_64"].pipeline.vae
        num_layers = min(args.num_layers, 12)
        config = {"num_layers": num_layers, "num_attention_heads": 12, "attention_head_dim": 64}
        add("sit_b_64", SoftVQPipeline(vae, random_model(DiTTransformer1DModel, config, device, dtype), scheduler))
        config = {"encoder_num_layers": num_layers, "decoder_num_layers": num_layers}
        transformer = random_model(MARTransformer1DModel, config, device, dtype)
        # a network of random weights predicts data out of all range, which is left out
        chain = build_token_scheduler(clip_sample_range=6.0)
        settings = {"guidance_scale": args.guidance_scale, "num_mar_steps": args.num_mar_steps}
        pipeline = MARPipeline(vae, transformer, chain)
        sample = partial(in_mar_pipeline, pipeline, **settings)
        systems["mar_b_64"] = System(pipeline, sample, 1, args.num_mar_steps)
        pipeline = MARPipeline(systems["official_64"].pipeline.vae, plain_copy(transformer), chain)
        if args.compile:
            sample = partial(in_mar_pipeline, pipeline, **settings)
            systems["eager_mar_b_64"] = System(pipeline, sample, 1, args.num_mar_steps)
        sample = partial(sample_mar_in_full, pipeline, **settings)
        systems["official_mar_b_64"] = System(pipeline, sample, 1, args.num_mar_steps)

    needs_2d = not {"sit_xl_2d", "dit_xl_diffusers"} <= set(args.skip)
    if needs_2d:
        autoencoder = random_model(AutoencoderKL, AUTOENCODER_KL, device, dtype)
        autoencoder.to(memory_format=torch.channels_last)
    if "sit_xl_2d" not in args.skip:
        config = {
            "num_layers": args.num_layers,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": args.resolution // 8,
        }
        transformer = random_model(DiTTransformer1DModel, config, device, dtype)
        add("sit_xl_2d", SoftVQPipeline(autoencoder, transformer, scheduler))
        if args.compile:
            add("eager_2d", SoftVQPipeline(plain_copy(autoencoder), plain_copy(transformer), scheduler))
    if "dit_xl_diffusers" not in args.skip:
        config = {
            "num_layers": args.num_layers,
            "sample_size": args.resolution // 8,
            "out_channels": 8,
            "num_embeds_ada_norm": 1000,
        }
        transformer = random_model(DiTTransformer2DModel, config, device, dtype)
        pipeline = DiTPipeline(transformer, autoencoder, DDIMScheduler())
        sample = partial(in_dit_pipeline, pipeline, args.guidance_scale)
        systems["dit_xl_diffusers"] = System(pipeline, sample)

    for name, system in systems.items():
        system.pipeline.set_progress_bar_config(disable=True)
        if args.compile and name.startswith(("sit_", "per_sample", "mar_")):
            mode = COMPILE_MODES[args.compile_mode] if name.startswith("mar_") else args.compile_mode
            system.pipeline.enable_fast_sampling(mode, args.freeze_weights)
    return {name: system for name, system in systems.items() if name not in args.skip}


def check_equal(args: GenerationBenchmarkArguments, systems: dict[str, System]) -> dict[str, float]:
    """
    Compare latents from the same noise, and images of the same latents. The official loop draws other noise in its
    SDE, so that the ODE is compared.

    Returns:
        `dict` of `str` to `float`: largest differences, as shares of the largest entry.

    Raises:
        ValueError: If systems that should agree do not.
    """
    differences = {}
    for kind in (*map(str, args.tokens), "2d"):
        names = [f"{name}_{kind}" for name in ("sit_xl", "per_sample", "official", "eager")]
        names = [name for name in names if name in systems]
        latents = {}
        for name in names:
            pipeline = systems[name].pipeline
            scheduler, pipeline.scheduler = pipeline.scheduler, FlowMatchEulerDiscreteScheduler()
            generator = torch.Generator(args.device).manual_seed(0)
            latents[name] = systems[name].sample(labels=[1, 2, 2], num_inference_steps=5, generator=generator)
            pipeline.scheduler = scheduler
        for name in names[1:]:
            differences[name] = largest_difference(latents, names[0], name, TOLERANCES[args.dtype])
        if {f"sit_xl_{kind}", f"eager_{kind}"} <= set(names):  # the others have a decoder of these
            with torch.no_grad():
                images = {
                    name: systems[name].pipeline.decode_latents(latents[names[0]])
                    for name in (f"sit_xl_{kind}", f"eager_{kind}")
                }
            differences[f"eager_{kind}.decode"] = largest_difference(images, *images, TOLERANCES[args.dtype])
    names = [name for name in ("mar_b_64", "official_mar_b_64", "eager_mar_b_64") if name in systems]
    if "mar_b_64" in names:
        latents = {}
        transformer = systems["mar_b_64"].pipeline.transformer
        generator = torch.Generator(args.device).manual_seed(0)
        shape = 101, 2, transformer.num_tokens, transformer.token_channels
        draws = {
            "orders": torch.rand(shape[1:3], generator=generator, device=args.device).argsort(dim=1),
            "token_noise": torch.randn(shape, generator=generator, device=args.device),
        }
        for name in names:
            system = systems[name]
            latents[name] = system.sample(
                labels=[1, 2],
                num_inference_steps=1,
                num_mar_steps=min(args.num_mar_steps, COMPARED_MAR_STEPS),
                generator=generator,
                **draws,
            )
        for name in names[1:]:
            differences[name] = largest_difference(latents, names[0], name, MAR_TOLERANCES[args.dtype])
    return differences


def largest_difference(latents: dict[str, torch.Tensor], name: str, other: str, tolerance: float) -> float:
    """
    Of two results, as a share of the largest entry.

    Raises:
        ValueError: If it is more than `tolerance`.
    """
    difference = ((latents[other] - latents[name]).abs().max() / latents[name].abs().max()).item()
    if not difference <= tolerance:
        raise ValueError(
            f"The latents of {other} and {name} differ by {difference:.3g} of the largest entry, allowed:"
            f" {tolerance:g}."
        )
    return difference


def num_samples(system: System, num_inference_steps: int) -> int:
    """How many samples pass the transformer for one image: two in each guided step."""
    if system.num_guided_steps is not None:
        return 2 * system.num_guided_steps
    if isinstance(system.pipeline, DiTPipeline):
        return 2 * num_inference_steps
    times = system.pipeline.prepare_timesteps(num_inference_steps, torch.device("cpu"))
    low, high = GUIDANCE_INTERVAL
    return system.copies * sum(2 if low <= time <= high else 1 for time in times)


def flops_of_sample(system: System) -> int:
    """Floating-point operations of a SiT transformer for one sample whose modulation is there."""
    transformer = system.pipeline.transformer
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents, label = torch.empty(1, *system.pipeline.latent_shape), torch.zeros(1, dtype=torch.long)
        modulation = torch.empty(1, 6 * transformer.config.num_layers + 2, transformer.inner_dim)
        type(transformer).from_config(transformer.config)(latents, 0.0, label, modulation=modulation)
    return counter.get_total_flops()


def batch_sizes(args: GenerationBenchmarkArguments, system: System) -> list[int]:
    """Those at which a system is timed."""
    largest = math.inf if args.max_batch_tokens is None else args.max_batch_tokens // system.num_tokens
    return [batch_size for batch_size in args.batch_sizes if batch_size <= largest]


def timed_decoders(systems: dict[str, System]) -> dict[str, str]:
    """By system, the first one that has the same decoder: decoding is timed there."""
    first = {id(systems[name].pipeline.vae): name for name in reversed(systems)}
    return {name: first[id(system.pipeline.vae)] for name, system in systems.items()}


def scale_to_protocol(args: GenerationBenchmarkArguments, systems: dict[str, System], timings: Timings) -> Timings:
    """
    Seconds for whole images from those of `--measured_steps` and of decoding, round by round: "<system>@<batch size>",
    and without decoding "<system>.latents@<batch size>".
    """
    whole, decoders = Timings({}), timed_decoders(systems)
    for name, system in systems.items():
        factor = num_samples(system, args.num_inference_steps) / num_samples(system, args.measured_steps)
        for batch_size in batch_sizes(args, system):
            sampling = timings.seconds[f"{name}.sample@{batch_size}"]
            decoding = timings.seconds[f"{decoders[name]}.decode@{batch_size}"]
            if isinstance(system.pipeline, DiTPipeline):  # has decoded as well
                sampling = [both - decode for both, decode in zip(sampling, decoding, strict=True)]
            latents = [factor * seconds for seconds in sampling]
            whole.seconds[f"{name}.latents@{batch_size}"] = latents
            whole.seconds[f"{name}@{batch_size}"] = [sum(parts) for parts in zip(latents, decoding, strict=True)]
            whole.items |= {f"{name}.latents@{batch_size}": batch_size, f"{name}@{batch_size}": batch_size}
    return whole


def compare(args: GenerationBenchmarkArguments, systems: dict[str, System], whole: Timings) -> dict[str, Spread]:
    """The ratios that the head of this file describes."""
    ratios = {}
    for tokens in args.tokens:
        name = f"sit_xl_{tokens}"
        others = [f"{other}_{tokens}" for other in ("per_sample", "official", "eager")]
        for other in (*others, "sit_xl_2d", "eager_2d", "dit_xl_diffusers"):
            if other in systems:
                ratios |= ratios_by_batch(args, systems, whole, name, other)
        for other in (f"official_{tokens}", "eager_2d"):
            if {f"eager_{tokens}", other} <= set(systems):
                own, baseline = best_batch(f"eager_{tokens}", whole), best_batch(other, whole)
                ratios[f"eager_{tokens}.vs_{other}"] = whole.ratio(own, baseline)
    for name in ("mar_b_64", "eager_mar_b_64"):
        if {name, "official_mar_b_64"} <= set(systems):
            ratios |= ratios_by_batch(args, systems, whole, name, "official_mar_b_64")
    return ratios


def compare_generators(
    args: GenerationBenchmarkArguments, systems: dict[str, System], whole: Timings
) -> dict[str, Spread]:
    """MAR beside SiT, both ours: no ratio for `make bench`, where one falls when the other becomes faster."""
    ratios = {}
    for other in ("sit_b_64", "sit_xl_64"):
        for name in ("mar_b_64", "eager_mar_b_64"):
            if {name, other} <= set(systems):
                ratios |= ratios_by_batch(args, systems, whole, name, other)
    return ratios


def ratios_by_batch(
    args: GenerationBenchmarkArguments, systems: dict[str, System], whole: Timings, name: str, other: str
) -> dict[str, Spread]:
    """Of a system and another one: at their best batches, and at each batch size of both where there are several."""
    ratios = {}
    # `DiTPipeline` does not give latents: taking its decoding off again would leave the noise of both
    for part in ("",) if isinstance(systems[other].pipeline, DiTPipeline) else ("", ".latents"):
        own, baseline = best_batch(f"{name}{part}", whole), best_batch(f"{other}{part}", whole)
        ratios[f"{name}.vs_{other}{part}"] = whole.ratio(own, baseline)
        for batch_size in batch_sizes(args, systems[name]):
            if len(args.batch_sizes) > 1 and batch_size in batch_sizes(args, systems[other]):
                own, baseline = f"{name}{part}@{batch_size}", f"{other}{part}@{batch_size}"
                ratios[f"{name}.vs_{other}{part}.batch_{batch_size}"] = whole.ratio(own, baseline)
    return ratios


def peak_shares(
    args: GenerationBenchmarkArguments, systems: dict[str, System], whole: Timings, timings: Timings
) -> dict[str, Spread]:
    """Share of the matmul peak of every `sit_*`, by name, at the batch at which it makes most latents per second."""
    shares = {}
    for name, system in systems.items():
        if name.startswith("sit_"):
            best = best_batch(f"{name}.latents", whole)
            flops = whole.items[best] * num_samples(system, args.num_inference_steps) * flops_of_sample(system)
            seconds = {name: whole.seconds[best], "matmul": timings.seconds["matmul"]}
            rates = Timings({name: flops, "matmul": timings.items["matmul"]}, seconds)
            shares[name] = rates.ratio(name, "matmul")
    return shares


def best_batch(name: str, whole: Timings) -> str:
    """`name` at the batch size at which it makes most images per second."""
    return max((key for key in whole.seconds if key.startswith(f"{name}@")), key=lambda key: whole.rate(key).median)


def main(args: GenerationBenchmarkArguments) -> None:
    """Build the systems, compare what they compute, time them in turn, and write the result."""
    check_output_dir(args.output_dir)
    # Many models are compiled here, for many batch sizes; beyond these limits calls would silently not be.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = 64, 4096
    device = torch.device(args.device)
    systems = build_systems(args)
    differences = check_equal(args, systems)

    def sampling(name: str, batch_size: int, num_inference_steps: int) -> Callable[[], torch.Tensor]:
        return partial(
            systems[name].sample,
            labels=[i % 1000 for i in range(batch_size)],
            num_inference_steps=num_inference_steps,
            generator=torch.Generator(device).manual_seed(0),
        )

    contestants, decoders = {}, timed_decoders(systems)
    for name, system in systems.items():
        for batch_size in batch_sizes(args, system):
            sample = sampling(name, batch_size, args.measured_steps)
            contestants[f"{name}.sample@{batch_size}"] = Contestant(sample, batch_size)
            if decoders[name] == name:
                decode = partial(system.decode, batch_size)
                contestants[f"{name}.decode@{batch_size}"] = Contestant(decode, batch_size)
    contestants["matmul"] = square_product(args.matmul_size, device, getattr(torch, args.dtype))
    timings = time_in_turn(contestants, args.rounds, device)
    whole = scale_to_protocol(args, systems, timings)
    ratios, generators = compare(args, systems, whole), compare_generators(args, systems, whole)
    shares = peak_shares(args, systems, whole, timings)

    def memory_bytes(name: str, batch_size: str) -> int:
        pipeline = systems[name].pipeline
        sample = sampling(name, int(batch_size), min(args.measured_steps, MEMORY_STEPS))
        decode = contestants[f"{decoders[name]}.decode@{batch_size}"].call
        working = max(working_memory(call, device) for call in (sample, decode))
        return working + weights_bytes(pipeline.transformer, pipeline.vae)

    measurements = {"differences": differences, "seconds": timings.seconds}
    measurements["generators"] = {name: asdict(ratio) for name, ratio in generators.items()}
    measurements["matmul_flops_per_second"] = asdict(timings.rate("matmul"))
    rows = []
    for name, system in systems.items():
        best = best_batch(name, whole)
        batch_size = best.partition("@")[2]
        memory = memory_bytes(name, batch_size)
        official = name.replace("sit_xl", "official")
        official_memory = memory_bytes(official, batch_size) if name != official and official in systems else None
        models = system.pipeline.transformer, system.pipeline.vae
        measurements[name] = {
            "images_per_second": {key: asdict(whole.rate(key)) for key in whole.seconds if key.startswith(name)},
            "best_batch_size": int(batch_size),
            "peak_share": asdict(shares[name]) if name in shares else None,
            "memory_bytes": memory,
            "official_memory_bytes": official_memory,
            "weights_bytes": weights_bytes(*models),
            "num_parameters": [model.num_parameters() for model in models],
            "samples_through_transformer": num_samples(system, args.num_inference_steps),
        }
        rows.append(
            [
                name,
                f"{sum(model.num_parameters() for model in models) / 1e6:.0f}",
                num_samples(system, args.num_inference_steps),
                batch_size,
                whole.rate(best),
                f"{memory / 2**30:.2f}",
                "" if official_memory is None else f"{official_memory / 2**30:.2f}",
                shares.get(name, ""),
            ]
        )
    header = ["system", "M parameters", "samples through the transformer", "best batch", "images/s", "memory, GiB"]
    header += ["official loop, GiB", "share of the matmul peak"]
    table = markdown_table(header, rows) + "\n"
    table += markdown_table(["ratio", "median (smallest to largest)"], list((ratios | generators).items()))
    write_report(args.output_dir, "generation", table, ratios, asdict(args), measurements)


if __name__ == "__main__":
    sys.exit(main(parse_args(GenerationBenchmarkArguments)))
