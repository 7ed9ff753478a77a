"""Measure transformers with weights of 8 bits (torchao, through diffusers): memory, error of what they predict, time.

    pip install "softvq-hf[quantization]"
    python benchmarks/quantization.py --output_dir outputs/benchmark_quantization
    python benchmarks/quantization.py --pipeline outputs/quickstart/generator \\
        --output_dir outputs/benchmark_quantization_quickstart

The transformer of a pipeline is loaded several times. Only weights are of 8 bits: products are those of bfloat16.

| | |
|---|---|
| `float32`, `bfloat16` | as it is |
| `int8` | int8 weights, a scale for each output channel; the layers of input, output and time stay in bfloat16 |
| `int8_without_modulation` | the same, but the modulations (adaLN), a third of all weights, stay in bfloat16 too |
| `int8_all` | int8 weights in all linear layers |
| `float8`, `float8_all` | as `int8` and `int8_all`, with weights in float8_e4m3 |

Errors are root mean squares of the difference to `float32`, over that of `float32`: of the velocity, the mean over
`TIMES`, and of the latents that 20 steps of UniPC without guidance make of the same noise.

Without `--pipeline` the transformer is SiT-XL with 64 tokens and random weights: bytes and time are those of a trained
one, its errors are not.

`--output_dir` gets `quantization.json` and `quantization.md`. Ratios are `<variant>.weights_vs_bfloat16`, how many
times fewer bytes the weights take, and `<variant>.speed_vs_bfloat16`, calls per second.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, TorchAoConfig, UniPCMultistepScheduler
from side_by_side import Contestant, Spread, Timings, default_device, markdown_table, time_in_turn, write_report
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.training.arguments import check_output_dir, parse_args


try:
    import torchao
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
except ModuleNotFoundError as error:
    sys.exit(f'{error}. This script needs torchao: pip install "softvq-hf[quantization]"')


ENDS = ["proj_in", "timestep_embedder", "norm_out", "proj_out"]  # 0.6% of the weights of SiT-XL
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {},
    "int8": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=ENDS)},
    "int8_without_modulation": {
        "quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[*ENDS, "norm1"])
    },
    "int8_all": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
    "float8": {"quantization_config": TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=ENDS)},
    "float8_all": {"quantization_config": TorchAoConfig(Float8WeightOnlyConfig())},
}
TIMES = (1.0, 0.75, 0.5, 0.25, 0.05)
NUM_STEPS = 20


@dataclass(kw_only=True)
class QuantizationArguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder for quantization.json and quantization.md."})
    pipeline: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a SoftVQPipeline; by default SiT-XL with random weights."}
    )
    batch_size: int = field(default=2, metadata={"help": "Samples at a time."})
    rounds: int = field(default=5, metadata={"help": "Timed calls of each."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    device: str | None = field(default=None, metadata={"help": "By default the accelerator, where there is one."})
    short: bool = field(
        default=False,
        metadata={"help": "SiT-XL of four layers, two rounds; flags for these count for nothing."},
    )

    def __post_init__(self) -> None:
        if self.short:
            self.rounds = 2
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if self.device is None:
            self.device = default_device()


def save_random_pipeline(folder: str, num_layers: int) -> None:
    """A pipeline of SiT-XL on 64 tokens, and of a small tokenizer of such tokens, both with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 2}
    vae = AutoencoderSoftVQ(
        sample_size=64,
        encoder_patch_size=16,
        decoder_patch_size=16,
        codebook_size=16,
        **{f"encoder_{name}": size for name, size in sizes.items()},
        **{f"decoder_{name}": size for name, size in sizes.items()},
    )
    transformer = DiTTransformer1DModel(num_layers=num_layers)
    SoftVQPipeline(vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(
        folder
    )


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; a quantized one reports those of the dtype that it stands for."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


@torch.no_grad()
def predict_velocities(
    transformer: DiTTransformer1DModel, latents: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    """Velocities in float32 `(T, B, L, C)` of the same latents at all `TIMES`."""
    latents = latents.to(transformer.dtype)
    return torch.stack(
        [transformer(latents, time / transformer.config.timestep_scale, class_labels).sample.float() for time in TIMES]
    )


def relative_error(values: torch.Tensor, reference: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """Root mean square over `dim` of the difference, over that of `reference`."""
    return ((values - reference).square().mean(dim) / reference.square().mean(dim)).sqrt()


def build_contestant(
    transformer: DiTTransformer1DModel, noise: torch.Tensor, class_labels: torch.Tensor
) -> Contestant:
    """One call of a transformer."""
    latents, timestep = noise.to(transformer.dtype), 0.5 / transformer.config.timestep_scale

    @torch.no_grad()
    def call() -> torch.Tensor:
        return transformer(latents, timestep, class_labels).sample

    return Contestant(call)


def measure(folder: str, args: QuantizationArguments) -> tuple[dict[str, dict[str, Any]], Timings]:
    """
    Load, run and time all variants.

    Returns:
        `tuple` of a `dict`, by variant: `bytes` of the weights, `velocity_error` and `latent_error`; and of the
        [`Timings`] of one call.
    """
    device = torch.device(args.device)
    pipeline = SoftVQPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    class_ids = [i % pipeline.transformer.config.num_classes for i in range(args.batch_size)]
    class_labels = torch.tensor(class_ids, device=device)
    generator = torch.Generator().manual_seed(args.seed)  # the same noise on every device
    noise = torch.randn(args.batch_size, *pipeline.latent_shape, generator=generator).to(device)

    results, contestants, velocities, latents = {}, {}, {}, {}
    for name, settings in VARIANTS.items():
        pipeline.transformer = DiTTransformer1DModel.from_pretrained(
            folder, subfolder="transformer", **{"dtype": torch.bfloat16, **settings}
        ).to(device)
        velocities[name] = predict_velocities(pipeline.transformer, noise, class_labels)
        latents[name] = pipeline(class_ids, num_inference_steps=NUM_STEPS, latents=noise, output_type="latent").images
        contestants[name] = build_contestant(pipeline.transformer, noise, class_labels)
        results[name] = {
            "bytes": sum(map(stored_bytes, pipeline.transformer.parameters())),
            "velocity_error": relative_error(velocities[name], velocities["float32"], (1, 2, 3)).mean().item(),
            "latent_error": relative_error(latents[name], latents["float32"], (0, 1, 2)).item(),
        }
    return results, time_in_turn(contestants, args.rounds, device)


def to_table(results: dict[str, dict[str, Any]], timings: Timings) -> str:
    """Markdown: one line per variant."""
    header = ["variant", "weights (MB)", "velocity error", "latent error", "ms per call"]
    rows = []
    for name, result in results.items():
        milliseconds = Spread.of([1000 * seconds for seconds in timings.seconds[name]])
        rows.append(
            [
                name,
                f"{result['bytes'] / 1e6:.1f}",
                f"{result['velocity_error']:.2g}",
                f"{result['latent_error']:.2g}",
                milliseconds,
            ]
        )
    return markdown_table(header, rows)


def main(args: QuantizationArguments) -> None:
    """Measure and write the result."""
    check_output_dir(args.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        if args.pipeline is None:
            save_random_pipeline(folder, num_layers=4 if args.short else 28)
        results, timings = measure(args.pipeline or folder, args)

    ratios = {}
    for name, result in results.items():
        if name not in ("float32", "bfloat16"):
            ratios[f"{name}.weights_vs_bfloat16"] = Spread.of([results["bfloat16"]["bytes"] / result["bytes"]])
            ratios[f"{name}.speed_vs_bfloat16"] = timings.ratio(name, "bfloat16")
    write_report(
        args.output_dir,
        "quantization",
        to_table(results, timings),
        ratios,
        settings=asdict(args) | {"torchao": torchao.__version__},
        measurements={"variants": results, "seconds": timings.seconds},
    )


if __name__ == "__main__":
    sys.exit(main(parse_args(QuantizationArguments)))
