"""Time encoders and decoders: SoftVQ tokenizers beside the autoencoders of diffusers, all at their real sizes.

    python benchmarks/tokenizer.py --output_dir outputs/benchmark_tokenizer
    python benchmarks/tokenizer.py --output_dir outputs/benchmark_tokenizer_512 --resolution 512

Weights are random, images too. Every model encodes and decodes the same images in the same dtype, eagerly, at each of
`--batch_sizes`; its best batch counts. Convolutional ones get the memory format in which they are faster here: both
are timed before, and must give the same images.

| | |
|---|---|
| `b_64`, `l_64`; `bl_64_512` | SoftVQ-B-64 and SoftVQ-L-64 at 256 pixels, SoftVQ-BL-64 at 512: `training/configs` |
| `autoencoder_kl` | `AutoencoderKL` as in Stable Diffusion 1 and 2, and below SiT-XL/2 and DiT-XL/2 |
| `autoencoder_dc` | `AutoencoderDC`, DC-AE f32c32 as in SANA |
| `autoencoder_rae` | `AutoencoderRAE`, DINOv2-B encoder and ViT-XL decoder, as published |
| `autoencoder_rae_default` | the same with the smaller decoder that is the default of the class |

`--output_dir` gets `tokenizer.json` and `tokenizer.md`. Ratios are `<tokenizer>.<encode|decode>.vs_<autoencoder>`:
images per second, each at its own best batch.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE, ModelMixin
from side_by_side import (
    Contestant,
    Spread,
    Timings,
    default_device,
    default_dtype,
    markdown_table,
    random_model,
    time_in_turn,
    weights_bytes,
    working_memory,
    write_report,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments


CONFIGS = Path(__file__).parents[1] / "training" / "configs"

# SoftVQ tokenizers by resolution and name: the recipe of each.
TOKENIZERS = {
    256: {"b_64": CONFIGS / "softvq_b_64.yaml", "l_64": CONFIGS / "softvq_l_64.yaml"},
    512: {"bl_64_512": CONFIGS / "softvq_bl_64_512.yaml"},
}
SHORT_TOKENIZERS = {256: ("b_64",), 512: ("bl_64_512",)}

DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
AUTOENCODERS: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
    "autoencoder_kl": (
        AutoencoderKL,
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    ),
    "autoencoder_dc": (
        AutoencoderDC,
        {
            "encoder_block_types": DC_BLOCKS,
            "decoder_block_types": DC_BLOCKS,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
    ),
    "autoencoder_rae": (
        AutoencoderRAE,
        {
            "decoder_hidden_size": 1152,
            "decoder_num_hidden_layers": 28,
            "decoder_num_attention_heads": 16,
            "decoder_intermediate_size": 4096,
        },
    ),
    "autoencoder_rae_default": (AutoencoderRAE, {}),
}
SHORT_AUTOENCODERS = ("autoencoder_kl", "autoencoder_rae_default")

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Largest difference of two memory formats, as a share of the largest entry.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(kw_only=True)
class TokenizerBenchmarkArguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder for tokenizer.json and tokenizer.md."})
    resolution: int = field(default=256, metadata={"help": "Side of the images in pixels.", "choices": [256, 512]})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "Images at a time; the best number counts."}
    )
    rounds: int = field(default=5, metadata={"help": "Timed calls of each."})
    device: str | None = field(default=None, metadata={"help": "By default the accelerator, where there is one."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "By default bfloat16 where that is fast.", "choices": ["float32", "bfloat16"]},
    )
    short: bool = field(
        default=False,
        metadata={"help": "Fewer models, four images at a time, two rounds; flags for these count for nothing."},
    )

    def __post_init__(self) -> None:
        if self.short:
            self.batch_sizes, self.rounds = [4], 2
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"`--batch_sizes` is {self.batch_sizes}, allowed: one or more integers from 1 on.")
        if self.rounds < 1:
            raise ValueError(f"`--rounds` is {self.rounds}, allowed: integers from 1 on.")
        self.device = default_device() if self.device is None else self.device
        self.dtype = default_dtype(self.device) if self.dtype is None else self.dtype


@dataclass
class Subject:
    """
    One model to time.

    Attributes:
        model (`ModelMixin`): The model, in eval mode.
        memory_format (`str`): That of weights and images, a key of `MEMORY_FORMATS`.
        gflops (`dict[str, float]`): For one image, by "encode" and "decode"; a product and its sum count as two.
    """

    model: ModelMixin
    memory_format: str = "contiguous"
    gflops: dict[str, float] = field(default_factory=dict)

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of images, as the model's decoder takes them."""
        output = self.model.encode(images)
        return output.latent_dist.mode() if isinstance(self.model, AutoencoderKL) else output.latent

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, R, R)` of latents."""
        return self.model.decode(latents).sample


def model_configs(args: TokenizerBenchmarkArguments) -> dict[str, tuple[type[ModelMixin], dict[str, Any]]]:
    """Class and configuration of every model, by name."""
    configs = {}
    for name, recipe in TOKENIZERS[args.resolution].items():
        if not args.short or name in SHORT_TOKENIZERS[args.resolution]:
            configs[name] = AutoencoderSoftVQ, parse_args(SoftVQTrainingArguments, ["--config", str(recipe)]).model
    for name, (model_class, config) in AUTOENCODERS.items():
        if args.short and name not in SHORT_AUTOENCODERS:
            continue
        if model_class is AutoencoderRAE:  # its encoder has patches of 14 pixels, its decoder of 16
            config = config | {"encoder_input_size": args.resolution // 16 * 14}
        configs[name] = model_class, config
    return configs


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of a call."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def check_same(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
    """
    Raises:
        ValueError: If two outputs that should be the same differ, or are not finite.
    """
    largest = one.float().abs().max().item()
    difference = (one.float() - other.float()).abs().max().item()
    if not difference <= TOLERANCES[one.dtype] * largest:
        raise ValueError(
            f"{name} differs by {difference:.3g} between the memory formats, allowed: {TOLERANCES[one.dtype]:g} of"
            f" the largest entry, {largest:.3g}."
        )


def choose_memory_format(name: str, subject: Subject, images: torch.Tensor) -> dict[str, float]:
    """
    Leave a convolutional model in the memory format in which encoding and decoding together are faster.

    Returns:
        `dict[str, float]`: seconds for `images` in each format.
    """
    outputs, seconds = {}, {}
    for memory_format in ("channels_last", "contiguous"):
        subject.memory_format = memory_format
        subject.model.to(memory_format=MEMORY_FORMATS[memory_format])
        formatted = images.contiguous(memory_format=MEMORY_FORMATS[memory_format])

        def reconstruct(formatted: torch.Tensor = formatted) -> torch.Tensor:
            return subject.decode(subject.encode(formatted))

        outputs[memory_format] = reconstruct()
        timings = time_in_turn({"": Contestant(reconstruct)}, 2, images.device, warmup=0)
        seconds[memory_format] = min(timings.seconds[""])
    check_same(f"The reconstruction of {name}", outputs["contiguous"], outputs["channels_last"])
    subject.memory_format = min(seconds, key=seconds.get)
    subject.model.to(memory_format=MEMORY_FORMATS[subject.memory_format])
    return seconds


def best_batch(timings: Timings, name: str, batch_sizes: list[int]) -> int:
    """The batch size at which `name` has the highest median of images per second."""
    return max(batch_sizes, key=lambda batch_size: timings.rate(f"{name}.{batch_size}").median)


def main(args: TokenizerBenchmarkArguments) -> None:
    check_output_dir(args.output_dir)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    all_images = torch.rand(max(args.batch_sizes), 3, args.resolution, args.resolution, device=device, dtype=dtype)
    all_images = all_images * 2 - 1

    # 1. The models, what a call of each costs, and the memory format
    subjects, format_seconds = {}, {}
    for name, (model_class, config) in model_configs(args).items():
        if model_class is AutoencoderRAE:  # it divides by some of its buffers, so they are to be the real ones
            with torch.device(device):
                model = model_class(**config).to(dtype).eval().requires_grad_(False)
        else:
            model = random_model(model_class, config, device, dtype)
        subject = subjects[name] = Subject(model)
        with torch.device("meta"):  # where counting computes nothing
            on_meta, image = Subject(model_class(**config).eval()), torch.empty(all_images[:1].shape)
            latents = on_meta.encode(image)
            if on_meta.decode(latents).shape != image.shape:
                raise ValueError(f"{name} decodes images of another size, allowed: that of `--resolution`.")
            calls = {"encode": partial(on_meta.encode, image), "decode": partial(on_meta.decode, latents)}
            subject.gflops = {call: count_flops(calls[call]) / 1e9 for call in calls}
        if model_class in (AutoencoderKL, AutoencoderDC):
            format_seconds[name] = choose_memory_format(name, subject, all_images[:1])

    # 2. Time them in turn
    contestants = {}
    for name, subject in subjects.items():
        for batch_size in args.batch_sizes:
            images = all_images[:batch_size].contiguous(memory_format=MEMORY_FORMATS[subject.memory_format])
            latents = subject.encode(images)
            contestants[f"{name}.encode.{batch_size}"] = Contestant(partial(subject.encode, images), batch_size)
            contestants[f"{name}.decode.{batch_size}"] = Contestant(partial(subject.decode, latents), batch_size)
    timings = time_in_turn(contestants, args.rounds, device)

    # 3. What came out
    tokenizers = [name for name in subjects if isinstance(subjects[name].model, AutoencoderSoftVQ)]
    ratios: dict[str, Spread] = {}
    measurements: dict[str, Any] = {}
    rows = []
    for name, subject in subjects.items():
        row = [name, subject.memory_format]
        measurements[name] = {
            "memory_format": subject.memory_format,
            "seconds_by_memory_format": format_seconds.get(name),
            "num_parameters": subject.model.num_parameters(),
            "weights_bytes": weights_bytes(subject.model),
        }
        for call, part in (("encode", subject.model.encoder), ("decode", subject.model.decoder)):
            batch_size = best_batch(timings, f"{name}.{call}", args.batch_sizes)
            contestant = f"{name}.{call}.{batch_size}"
            rate, memory = timings.rate(contestant), working_memory(contestants[contestant].call, device)
            num_parameters = sum(p.numel() for p in part.parameters())
            measurements[name][call] = {
                "num_parameters": num_parameters,
                "gflops_per_image": subject.gflops[call],
                "best_batch_size": batch_size,
                "images_per_second": asdict(rate),
                "gflops_per_second": rate.median * subject.gflops[call],
                "working_memory_bytes": memory,
                "seconds_by_batch_size": {
                    batch_size: timings.seconds[f"{name}.{call}.{batch_size}"] for batch_size in args.batch_sizes
                },
            }
            row += [f"{num_parameters / 1e6:.1f}", f"{subject.gflops[call]:.1f}", batch_size, rate]
            row += [f"{memory / 2**20:.0f}"]
        rows.append(row)
    for tokenizer in tokenizers:
        for other in subjects:
            if other in tokenizers:
                continue
            for call in ("encode", "decode"):
                own, baseline = (
                    f"{name}.{call}.{best_batch(timings, f'{name}.{call}', args.batch_sizes)}"
                    for name in (tokenizer, other)
                )
                ratios[f"{tokenizer}.{call}.vs_{other}"] = timings.ratio(own, baseline)

    header = ["model", "memory format"]
    for call in ("encoder", "decoder"):
        header += [f"{call}: M parameters", "GFLOPs per image", "batch", "images/s", "working memory, MiB"]
    table = markdown_table(header, rows) + "\n"
    table += markdown_table(
        ["times as many images per second", "median (smallest to largest)"], [list(item) for item in ratios.items()]
    )
    settings = asdict(args) | {"eager": True, "seed": 0}
    write_report(args.output_dir, "tokenizer", table, ratios, settings, measurements)


if __name__ == "__main__":
    sys.exit(main(parse_args(TokenizerBenchmarkArguments)))
