"""Show how many network calls the solvers of diffusers need: the error of their latents and images against the calls.

    python benchmarks/solvers.py --pipeline outputs/quickstart/generator --output_dir outputs/benchmark_solvers

A pipeline of a flow model (SiT) generates the same images from the same noise with each solver and each number of
network calls. The reference is the solution of the same ODE by Heun's method in `--reference_steps` steps, latents in
float64; half as many of them tell how exact it is itself. Three settings are measured:

| | |
|---|---|
| `conditional` | no guidance |
| `guided` | guidance at all times |
| `interval` | guidance in `--guidance_interval` |

| | |
|---|---|
| `latent error` | root mean square of the difference to the reference's latents, over that of those |
| `PSNR` | of the decoded images to the reference's, images in [0, 1], the mean over the images |

A step of Heun's method takes two calls: it gets half as many steps. Where a limit of the guidance interval is no point
of a grid, other times are guided than in the reference, and the difference is not the solver's: with a limit of 0.7
the numbers of steps should be multiples of 10.

Without `--pipeline` a small transformer with random weights takes its place, whose images show nothing.

`--output_dir` gets `solvers.json`, `solvers.md` (a table) and `solvers.png`. Ratios are `<solver>.<setting>.vs_euler`:
how many times smaller than Euler's the latent error of an image is at 20 calls.
"""

import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from matplotlib.figure import Figure
from side_by_side import Spread, default_device, markdown_table, write_report
from tqdm.auto import tqdm

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.training.arguments import check_output_dir, parse_args


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS: dict[str, Callable[[], SchedulerMixin]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "unipc_2": lambda: UniPCMultistepScheduler(solver_order=2, **FLOW),
    "unipc_3": lambda: UniPCMultistepScheduler(solver_order=3, **FLOW),
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(solver_order=2, **FLOW),
    "dpmpp_3m": lambda: DPMSolverMultistepScheduler(solver_order=3, **FLOW),
}
TITLES = {
    "euler": "Euler",
    "heun": "Heun",
    "unipc_2": "UniPC, order 2",
    "unipc_3": "UniPC, order 3",
    "dpmpp_2m": "DPM-Solver++ 2M",
    "dpmpp_3m": "DPM-Solver++ 3M",
}
RATIO_CALLS = 20
MAX_PSNR = 200.0  # of images that are equal


@dataclass(kw_only=True)
class SolversArguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder for solvers.json, solvers.md and solvers.png."})
    pipeline: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a SoftVQPipeline; by default a small one, random weights."},
    )
    num_calls: list[int] = field(
        default_factory=lambda: [5, 10, 20, 40, 60, 100], metadata={"help": "Network calls of a solver."}
    )
    reference_steps: int = field(default=1000, metadata={"help": "Steps of the reference."})
    num_images: int = field(default=8, metadata={"help": "Images, of all classes in turn."})
    guidance_scale: float = field(default=1.75, metadata={"help": "Guidance scale, above 1."})
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 0.7], metadata={"help": "Times between which `interval` is guided; 1 is noise."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    device: str | None = field(default=None, metadata={"help": "By default the accelerator, where there is one."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the network under the solvers.", "choices": ["float32", "bfloat16"]},
    )
    short: bool = field(
        default=False,
        metadata={"help": "Fewer images and steps; flags for these count for nothing."},
    )

    def __post_init__(self) -> None:
        if self.short:
            self.num_calls, self.reference_steps, self.num_images = [10, RATIO_CALLS], 100, 4
        if RATIO_CALLS not in self.num_calls or min(self.num_calls) < 1:
            raise ValueError(
                f"`--num_calls` is {self.num_calls}, allowed: integers from 1 on, {RATIO_CALLS} among them."
            )
        if self.reference_steps < 2 * max(self.num_calls):
            raise ValueError(
                f"`--reference_steps` is {self.reference_steps}, allowed: integers from {2 * max(self.num_calls)} on,"
                " twice the largest of `--num_calls`."
            )
        if self.num_images < 1:
            raise ValueError(f"`--num_images` is {self.num_images}, allowed: integers from 1 on.")
        if not 1 < self.guidance_scale < math.inf:
            raise ValueError(f"`--guidance_scale` is {self.guidance_scale}, allowed: finite numbers above 1.")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"`--guidance_interval` is {interval}, allowed: two numbers, low and high, with 0 <= low <= high <= 1."
            )
        if self.device is None:
            self.device = default_device()


@dataclass
class Setting:
    """How guidance is applied: arguments of [`SoftVQPipeline`]."""

    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)


def build_random_pipeline() -> SoftVQPipeline:
    """A transformer of the size of the quickstart's and the smallest tokenizer that fits it, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 2}
    vae = AutoencoderSoftVQ(
        sample_size=64,
        encoder_patch_size=16,
        decoder_patch_size=16,
        num_latent_tokens=16,
        latent_channels=16,
        codebook_size=16,
        **{f"encoder_{name}": size for name, size in sizes.items()},
        **{f"decoder_{name}": size for name, size in sizes.items()},
    )
    transformer = DiTTransformer1DModel(
        num_tokens=16, in_channels=16, num_layers=4, num_attention_heads=4, attention_head_dim=48, num_classes=8
    )
    return SoftVQPipeline(vae=vae.eval(), transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler())


@torch.no_grad()
def solve_reference(
    transformer: DiTTransformer1DModel,
    noise: torch.Tensor,
    class_labels: torch.Tensor,
    setting: Setting,
    num_steps: int,
) -> torch.Tensor:
    """
    Solve the ODE from noise to latents by Heun's method in float64, with the same limits of the guidance as
    [`SoftVQPipeline`]: a step is guided if it starts in the interval.

    Args:
        transformer ([`DiTTransformer1DModel`]): In float32 or float64.
        noise (`torch.Tensor` of shape `(B, L, C)`): Where it starts.
        class_labels (`torch.Tensor` of shape `(B,)`): Class ids.
        setting ([`Setting`]): The guidance.
        num_steps (`int`): Steps, of two network calls each.

    Returns:
        `torch.Tensor` of shape `(B, L, C)`: latents in float64.
    """
    null_labels = torch.full_like(class_labels, transformer.config.num_classes)
    low, high = setting.guidance_interval

    def velocity(states: torch.Tensor, time: float, guided: bool) -> torch.Tensor:
        timestep = time / transformer.config.timestep_scale
        model_input = states.to(transformer.dtype)
        conditional = transformer(model_input, timestep, class_labels).sample.double()
        if not guided:
            return conditional
        unconditional = transformer(model_input, timestep, null_labels).sample.double()
        return unconditional + setting.guidance_scale * (conditional - unconditional)

    states = noise.double()
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for start, end in zip(tqdm(times[:-1], desc="reference", leave=False), times[1:], strict=True):
        guided = setting.guidance_scale > 1 and low <= start <= high
        slope = velocity(states, start, guided)
        end_slope = velocity(states + (end - start) * slope, end, guided)
        states = states + (end - start) / 2 * (slope + end_slope)
    return states


def latent_errors(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The error of each image's latents, relative to the root mean square of all latents of the reference."""
    squares = (latents.double() - reference).square().mean(dim=tuple(range(1, reference.ndim)))
    return (squares / reference.square().mean()).sqrt().cpu()


@torch.no_grad()
def decode(pipeline: SoftVQPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Images `(B, 3, H, W)` in [0, 1]."""
    return pipeline.image_processor.postprocess(pipeline.decode_latents(latents.float()), output_type="pt")


def measure(
    pipeline: SoftVQPipeline, noise: torch.Tensor, class_ids: list[int], args: SolversArguments
) -> dict[str, dict[str, Any]]:
    """
    Run all solvers in all settings.

    Returns:
        `dict`: by setting: `reference_error`, and `solvers`, by solver a list with an entry for each of `num_calls`:
        `calls`, `steps`, `latent_error`, `latent_errors` (of each image) and `psnr`.
    """
    reference_transformer = copy.deepcopy(pipeline.transformer)
    pipeline.transformer.to(getattr(torch, args.dtype))
    class_labels = torch.tensor(class_ids, device=noise.device)
    settings = {
        "conditional": Setting(),
        "guided": Setting(args.guidance_scale),
        "interval": Setting(args.guidance_scale, tuple(args.guidance_interval)),
    }
    results = {}
    for name, setting in settings.items():
        reference, coarse = (
            solve_reference(reference_transformer, noise, class_labels, setting, num_steps)
            for num_steps in (args.reference_steps, args.reference_steps // 2)
        )
        reference_images = decode(pipeline, reference)
        results[name] = {"reference_error": root_mean_square(latent_errors(coarse, reference)), "solvers": {}}
        for solver, build_scheduler in SOLVERS.items():
            pipeline.scheduler = build_scheduler()
            results[name]["solvers"][solver] = []
            for num_calls in tqdm(args.num_calls, desc=f"{name}, {solver}", leave=False):
                num_steps = (num_calls + 1) // 2 if solver == "heun" else num_calls
                latents = pipeline(
                    class_ids, num_inference_steps=num_steps, latents=noise, output_type="latent", **asdict(setting)
                ).images
                errors = latent_errors(latents, reference)
                if solver == "euler" and not errors.all():
                    raise ValueError(
                        f"`--pipeline` is {args.pipeline!r}, whose ODE Euler's method solves exactly ({name},"
                        f" {num_calls} calls), allowed: pipelines whose velocity changes with time, such as trained"
                        " ones."
                    )
                squares = (decode(pipeline, latents) - reference_images).double().square().mean(dim=(1, 2, 3))
                results[name]["solvers"][solver].append(
                    {
                        "calls": pipeline.num_timesteps,
                        "steps": num_steps,
                        "latent_error": root_mean_square(errors),
                        "latent_errors": errors.tolist(),
                        "psnr": (-10 * squares.clamp(min=10 ** (-MAX_PSNR / 10)).log10()).mean().item(),
                    }
                )
    return results


def root_mean_square(errors: torch.Tensor) -> float:
    """Of the errors of all images."""
    return errors.square().mean().sqrt().item()


def ratios_to_euler(results: Mapping[str, dict[str, Any]], num_calls: list[int]) -> dict[str, Spread]:
    """How many times smaller than Euler's errors are, image by image, at `RATIO_CALLS` calls."""
    index, ratios = num_calls.index(RATIO_CALLS), {}
    for setting, result in results.items():
        euler = result["solvers"]["euler"][index]["latent_errors"]
        for solver, runs in result["solvers"].items():
            if solver != "euler":
                own = runs[index]["latent_errors"]
                ratios[f"{solver}.{setting}.vs_euler"] = Spread.of([a / b for a, b in zip(euler, own, strict=True)])
    return ratios


def to_table(results: Mapping[str, dict[str, Any]], num_calls: list[int]) -> str:
    """Markdown: one line per setting and solver; latent error and PSNR for each number of calls."""
    header = ["setting", "solver", *(f"{calls} calls" for calls in num_calls)]
    rows = []
    for setting, result in results.items():
        for solver, runs in result["solvers"].items():
            rows.append(
                [setting, TITLES[solver], *(f"{run['latent_error']:.2g}, {run['psnr']:.1f} dB" for run in runs)]
            )
    return markdown_table(header, rows)


def plot(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """A column per setting: latent error above, PSNR below; both against the network calls."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, len(results), sharex=True, sharey="row")
    for (setting, result), (upper, lower) in zip(results.items(), axes.T, strict=True):
        for (solver, runs), marker in zip(result["solvers"].items(), "osD^vP", strict=True):
            calls = [run["calls"] for run in runs]
            upper.plot(calls, [run["latent_error"] for run in runs], marker=marker, label=TITLES[solver])
            lower.plot(calls, [run["psnr"] for run in runs], marker=marker)
        upper.set(title=setting, xscale="log", yscale="log")
        lower.set(xlabel="network calls")
        ticks = [run["calls"] for run in result["solvers"]["euler"]]
        lower.set_xticks(ticks, list(map(str, ticks)))
        lower.minorticks_off()
        for axis in (upper, lower):
            axis.grid(which="major", alpha=0.3)
    axes[0, 0].set_ylabel("latent error")
    axes[1, 0].set_ylabel("PSNR to the reference's images (dB)")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(args: SolversArguments) -> None:
    """Measure and write the result."""
    check_output_dir(args.output_dir)
    pipeline = build_random_pipeline() if args.pipeline is None else SoftVQPipeline.from_pretrained(args.pipeline)
    if not pipeline.is_flow_matching:
        raise ValueError(
            f"`--pipeline` is {args.pipeline!r}, whose scheduler is a {pipeline.scheduler.__class__.__name__},"
            " allowed: pipelines of flow models."
        )
    pipeline.to(args.device).set_progress_bar_config(disable=True)

    class_ids = [i % pipeline.transformer.config.num_classes for i in range(args.num_images)]
    generator = torch.Generator().manual_seed(args.seed)  # the same noise on every device
    noise = torch.randn(args.num_images, *pipeline.latent_shape, generator=generator).to(args.device)
    results = measure(pipeline, noise, class_ids, args)

    output_dir = Path(args.output_dir)
    write_report(
        output_dir,
        "solvers",
        to_table(results, args.num_calls),
        ratios_to_euler(results, args.num_calls),
        settings=asdict(args) | {"num_parameters": pipeline.transformer.num_parameters()},
        measurements=results,
    )
    plot(results, output_dir / "solvers.png")


if __name__ == "__main__":
    sys.exit(main(parse_args(SolversArguments)))
