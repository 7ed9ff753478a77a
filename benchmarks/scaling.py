"""How the cost of generation and of tokenizers grows, and a model that predicts it for other machines.

    python benchmarks/scaling.py --output_dir outputs/benchmark_scaling

One quantity is varied at a time, at the width of SiT-XL and of SoftVQ-B; seconds are fitted by a power of it.

| | |
|---|---|
| `tokens` | one call of the transformer, `--batch_size` samples of 16 to 1024 tokens |
| `batch` | one call of the transformer, 64 tokens, 1 to 32 samples |
| `steps` | sampling by the ODE without guidance, 64 tokens, 4 to 32 steps |
| `resolution` | decoding 64 tokens to images of 128 to 512 pixels |
| `codebook` | encoding with codebooks of 512 to 65536 codewords in all |

The model is `seconds = a * operations / P + b * bytes / W`: floating-point operations and bytes that kernels read and
write are counted, P (operations per second of a large product of matrices) and W (bytes per second of copying a large
tensor) are measured in the same run, a and b are fitted. `--operations_per_second` and `--bytes_per_second` are those
of another machine, for which images per second are predicted as well. The error that is stated is that of predicting
each point from a and b fitted to all others. Of all rounds the smallest times count here, and the largest P and W.

`--output_dir` gets `scaling.json`, `scaling.md` and `scaling.png`.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from scipy.optimize import nnls
from side_by_side import (
    Contestant,
    Spread,
    default_device,
    default_dtype,
    markdown_table,
    random_model,
    time_in_turn,
    write_report,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.training.arguments import check_output_dir, parse_args


# SoftVQ-B-64
TOKENIZER = {
    "sample_size": 256,
    "num_latent_tokens": 64,
    "latent_channels": 32,
    "codebook_size": 8192,
    "num_codebooks": 4,
    "encoder_hidden_size": 768,
    "encoder_num_attention_heads": 12,
    "decoder_hidden_size": 768,
    "decoder_num_attention_heads": 12,
}


@dataclass(kw_only=True)
class ScalingArguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder for scaling.json, scaling.md and scaling.png."})
    num_layers: int = field(default=4, metadata={"help": "Blocks of the transformer, the encoder and the decoder."})
    batch_size: int = field(default=4, metadata={"help": "Samples, where their number is not varied."})
    rounds: int = field(default=5, metadata={"help": "Timed calls of each."})
    device: str | None = field(default=None, metadata={"help": "By default the accelerator, where there is one."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "By default bfloat16 where that is fast.", "choices": ["float32", "bfloat16"]},
    )
    operations_per_second: float | None = field(
        default=None, metadata={"help": "P of another machine, as of a large product of matrices, such as 7e14."}
    )
    bytes_per_second: float | None = field(
        default=None, metadata={"help": "W of that machine, as of copying: bytes read and written, such as 4e12."}
    )
    short: bool = field(
        default=False,
        metadata={
            "help": "One block, 16 samples, two rounds, three values of each; flags for these count for nothing."
        },
    )

    def __post_init__(self) -> None:
        if self.short:
            # as many samples as hide the reading of the weights, whose speed is that of the whole host
            self.num_layers, self.rounds, self.batch_size = 1, 2, 16
        for name in ("num_layers", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        other_machine = {name: getattr(self, name) for name in ("operations_per_second", "bytes_per_second")}
        for name, value in other_machine.items():
            if value is None and any(other_machine.values()):
                raise ValueError(f"`--{name}` is None, allowed: both of {' and '.join(other_machine)}, or none.")
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`--{name}` is {value}, allowed: finite numbers above 0.")
        self.device = default_device() if self.device is None else self.device
        self.dtype = default_dtype(self.device) if self.dtype is None else self.dtype


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of all kernels; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
        return result


@dataclass
class Workload:
    """
    A call to time, and the same on the meta device, to count what it does.

    Attributes:
        make (`Callable`): Returns the call, for a device.
        items (`int`): Images of a call.
    """

    make: Callable[[torch.device], Callable[[], object]]
    items: int

    def count(self) -> tuple[int, int]:
        """Floating-point operations and bytes."""
        call = self.make(torch.device("meta"))
        with FlopCounterMode(display=False) as flops:
            call()
        with ByteCounter() as bytes_moved:
            call()
        return flops.get_total_flops(), bytes_moved.total


def call_transformer(
    args: ScalingArguments, num_tokens: int, batch_size: int, device: torch.device
) -> Callable[[], object]:
    """One call of a transformer of SiT-XL's width."""
    dtype = getattr(torch, args.dtype)
    config = {"num_layers": args.num_layers, "num_tokens": num_tokens}
    transformer = random_model(DiTTransformer1DModel, config, device, dtype)
    hidden_states = torch.zeros(batch_size, num_tokens, 32, device=device, dtype=dtype)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    return torch.no_grad()(partial(transformer, hidden_states, 500.0, labels))


def sample(args: ScalingArguments, num_inference_steps: int, device: torch.device) -> Callable[[], object]:
    """Latents of 64 tokens by `SoftVQPipeline`."""
    dtype = getattr(torch, args.dtype)
    vae = random_model(AutoencoderSoftVQ, {**TOKENIZER, **num_blocks(args)}, device, dtype)
    transformer = random_model(DiTTransformer1DModel, {"num_layers": args.num_layers}, device, dtype)
    pipeline = SoftVQPipeline(vae, transformer, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    labels = list(range(args.batch_size))
    return partial(pipeline, labels, num_inference_steps=num_inference_steps, output_type="latent")


def decode(args: ScalingArguments, resolution: int, device: torch.device) -> Callable[[], object]:
    """Images from 64 tokens."""
    dtype = getattr(torch, args.dtype)
    config = {**TOKENIZER, **num_blocks(args), "sample_size": resolution}
    vae = random_model(AutoencoderSoftVQ, config, device, dtype)
    return torch.no_grad()(partial(vae.decode, torch.zeros(args.batch_size, 64, 32, device=device, dtype=dtype)))


def encode(args: ScalingArguments, codebook_size: int, device: torch.device) -> Callable[[], object]:
    """64 tokens from images; the codewords are divided among four codebooks."""
    dtype = getattr(torch, args.dtype)
    config = {**TOKENIZER, **num_blocks(args), "codebook_size": codebook_size // TOKENIZER["num_codebooks"]}
    vae = random_model(AutoencoderSoftVQ, config, device, dtype)
    return torch.no_grad()(partial(vae.encode, torch.zeros(args.batch_size, 3, 256, 256, device=device, dtype=dtype)))


def num_blocks(args: ScalingArguments) -> dict[str, int]:
    """Blocks of encoder and decoder."""
    return {"encoder_num_layers": args.num_layers, "decoder_num_layers": args.num_layers}


def build_series(args: ScalingArguments) -> dict[str, dict[int, Workload]]:
    """Workloads by quantity and its value."""
    size = args.batch_size
    series = {
        "tokens": {
            tokens: Workload(partial(call_transformer, args, tokens, size), size)
            for tokens in (16, 32, 64, 128, 256, 512, 1024)
        },
        "batch": {
            batch: Workload(partial(call_transformer, args, 64, batch), batch) for batch in (1, 2, 4, 8, 16, 32)
        },
        "steps": {steps: Workload(partial(sample, args, steps), size) for steps in (4, 8, 16, 32)},
        "resolution": {pixels: Workload(partial(decode, args, pixels), size) for pixels in (128, 256, 384, 512)},
        "codebook": {size_: Workload(partial(encode, args, size_), size) for size_ in (512, 2048, 8192, 32768, 65536)},
    }
    if args.short:
        series = {name: dict(list(workloads.items())[::2][:3]) for name, workloads in series.items()}
    return series


def measure_machine(args: ScalingArguments, rounds: int) -> dict[str, float]:
    """Operations per second of a product of 4096 x 4096 matrices, bytes per second of a copy of 256 MiB."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    side = 4096 if device.type != "cpu" else 2048
    one = torch.randn(side, side, device=device).to(dtype)
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    contestants = {
        "operations_per_second": Contestant(partial(torch.matmul, one, one), 2 * side**3),
        "bytes_per_second": Contestant(partial(target.copy_, source), 2 * source.nbytes),
    }
    timings = time_in_turn(contestants, rounds, device, warmup=2)
    return {name: timings.rate(name).max for name in contestants}


def fit_exponent(seconds_by_value: dict[int, float]) -> float:
    """Slope of seconds against the quantity, both as logarithms, by least squares."""
    values, seconds = zip(*seconds_by_value.items(), strict=True)
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def fit_model(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The factors a and b, not negative, with the least squares of relative errors."""
    return nnls(features / seconds[:, None], np.ones(len(seconds)))[0]


def plot(series: dict[str, dict[int, float]], predicted: dict[str, dict[int, float]], path: Path) -> None:
    """A panel for each quantity: measured seconds, and those of the model."""
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    for axis, (name, measured) in zip(figure.subplots(1, len(series)), series.items(), strict=True):
        axis.loglog(list(measured), list(measured.values()), "o", label="measured")
        axis.loglog(list(measured), list(predicted[name].values()), "-", label="model")
        axis.set(title=f"{name}: exponent {fit_exponent(measured):.2f}", xlabel=name, ylabel="seconds, largest = 1")
        axis.set_xticks(list(measured), labels=list(map(str, measured)), rotation=45)
        axis.set_xticks([], minor=True)
        axis.grid(which="both", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main(args: ScalingArguments) -> None:
    """Count, time, fit, write."""
    check_output_dir(args.output_dir)
    device = torch.device(args.device)
    machine = measure_machine(args, rounds=args.rounds)
    series = build_series(args)

    counts, seconds, spreads, ratios = {}, {}, {}, {}
    for name, workloads in series.items():
        contestants = {str(value): Contestant(workload.make(device)) for value, workload in workloads.items()}
        timings = time_in_turn(contestants, args.rounds, device)
        if name == "tokens":
            ratios["tokens_64.vs_tokens_256"] = timings.ratio("64", "256")
        for value, workload in workloads.items():
            counts[name, value] = workload.count()
            spreads[name, value] = Spread.of(timings.seconds[str(value)])
            seconds[name, value] = spreads[name, value].min  # least disturbed

    # The model, and how well each point is predicted from all others
    work = np.array([[flops, moved] for flops, moved in counts.values()], dtype=float)
    features = work / [machine["operations_per_second"], machine["bytes_per_second"]]
    targets = np.array(list(seconds.values()))
    errors = {}
    for i, point in enumerate(counts):
        others = np.arange(len(targets)) != i
        prediction = features[i] @ fit_model(features[others], targets[others])
        errors[point] = abs(prediction / targets[i] - 1)
    a, b = fit_model(features, targets)
    predictions = dict(zip(counts, features @ [a, b], strict=True))
    elsewhere = {}
    if args.operations_per_second is not None:
        other_features = work / [args.operations_per_second, args.bytes_per_second]
        elsewhere = dict(zip(counts, other_features @ [a, b], strict=True))

    by_series: dict[str, dict[int, float]] = {name: {} for name in series}
    predicted: dict[str, dict[int, float]] = {name: {} for name in series}
    rows = []
    measurements: dict[str, Any] = {"machine": machine, "model": {"a": a, "b": b}}
    for name, workloads in series.items():
        largest = max(seconds[name, value] for value in workloads)
        for value in workloads:
            by_series[name][value] = seconds[name, value] / largest
            predicted[name][value] = predictions[name, value] / largest
        exponent = fit_exponent(by_series[name])
        growth = ", ".join(f"{value}: {share:.3f}" for value, share in by_series[name].items())
        worst = max(errors[name, value] for value in workloads)
        rows.append([name, f"{exponent:.2f}", growth, f"{worst:.0%}"])
        measurements[name] = {
            "exponent": exponent,
            "points": {
                str(value): {
                    "seconds": asdict(spreads[name, value]),
                    "images_per_second": workload.items / seconds[name, value],
                    "predicted_images_per_second": workload.items / predictions[name, value],
                    "operations": counts[name, value][0],
                    "bytes": counts[name, value][1],
                    "error": errors[name, value],
                    "images_per_second_elsewhere": (workload.items / elsewhere[name, value] if elsewhere else None),
                }
                for value, workload in workloads.items()
            },
        }
    measurements["model"]["median_error"] = statistics.median(errors.values())
    measurements["model"]["largest_error"] = max(errors.values())
    table = markdown_table(["quantity", "exponent", "seconds, largest = 1", "largest error of the model"], rows)
    table += (
        f"\nseconds = {a:.2f} operations / P + {b:.2f} bytes / W; a point predicted from all others is off by"
        f" {statistics.median(errors.values()):.0%} in the median, by {max(errors.values()):.0%} at most.\n"
    )
    if elsewhere:
        points = [
            [name, value, f"{workload.items / elsewhere[name, value]:.3g}"]
            for name, workloads in series.items()
            for value, workload in workloads.items()
        ]
        table += "\nAt the given P and W:\n\n" + markdown_table(["quantity", "value", "images/s, predicted"], points)
    plot(by_series, predicted, Path(args.output_dir) / "scaling.png")
    write_report(args.output_dir, "scaling", table, ratios, asdict(args), measurements)


if __name__ == "__main__":
    sys.exit(main(parse_args(ScalingArguments)))
