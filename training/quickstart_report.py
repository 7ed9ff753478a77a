"""The last part of `make quickstart`: load what was trained, look at it, and write the numbers down.

    python training/quickstart_report.py

Reads the quickstart configs and the folders that they name, and writes `reconstructions.png`, `samples.png`,
`training.png` and `report.md` beside those folders. The tokenizer's PSNR stands beside that of the plainest compressor
with as many numbers per image: a thumbnail, made and enlarged by bicubic interpolation.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers import __version__ as diffusers_version
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from softvq_hf.data import collate_images, load_image_dataset
from softvq_hf.data.latents import read_metadata
from softvq_hf.training.logging import METRICS_FILE
from softvq_hf.training.validation import evaluate_reconstruction, image_grid, reconstruction_grid


REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "training/configs/quickstart"
SAMPLES_PER_CLASS = 8


class BicubicThumbnail(torch.nn.Module):
    """An image through a thumbnail of `size` (height, width): bicubic down, with antialiasing, and bicubic up."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, pixel_values: torch.Tensor) -> DecoderOutput:
        thumbnail = F.interpolate(pixel_values, size=self.size, mode="bicubic", antialias=True)
        return DecoderOutput(sample=F.interpolate(thumbnail, size=pixel_values.shape[-2:], mode="bicubic"))


def thumbnail_size(num_values: int) -> tuple[int, int]:
    """Height and width of the (nearly) square RGB thumbnail whose number of values is closest to `num_values`."""
    sizes = [(side, width) for side in range(1, math.isqrt(num_values) + 1) for width in (side, side + 1)]
    return min(sizes, key=lambda size: abs(3 * size[0] * size[1] - num_values))


def read_metrics(output_dir: str) -> list[dict]:
    """The lines of a training run's metrics file."""
    return [json.loads(line) for line in Path(output_dir, METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def plot_training(tokenizer_metrics: list[dict], generator_metrics: list[dict], path: Path) -> None:
    """Loss curves of both models, and the tokenizer's PSNR on held-out crops."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
    for axis, lines, name, title in (
        (axes[0], tokenizer_metrics, "reconstruction", "Tokenizer: mean squared error of pixels"),
        (axes[1], tokenizer_metrics, "validation/psnr", "Tokenizer: PSNR on held-out crops (dB)"),
        (axes[2], generator_metrics, "loss", "Generator: flow-matching loss"),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, markersize=3)
        if len(points) >= 20:
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_samples(rows: list[Image.Image], names: list[str], path: Path) -> None:
    """One row of samples per class, the name of the class before it."""
    width, height = rows[0].size
    figure, axes = plt.subplots(len(rows), 1, squeeze=False, figsize=(width / 100 + 1.2, len(rows) * height / 100))
    for axis, row, name in zip(axes[:, 0], rows, names, strict=True):
        axis.imshow(row)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.subplots_adjust(hspace=0.03)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def describe_hardware(device: torch.device) -> str:
    """What this runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpu_info.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores ({names[0] if names else platform.processor() or platform.machine()})"


def main(configs: Path) -> None:
    tokenizer_args = yaml.safe_load((configs / "softvq.yaml").read_text(encoding="utf-8"))
    generator_args = yaml.safe_load((configs / "sit.yaml").read_text(encoding="utf-8"))
    output_dir = Path(generator_args["output_dir"]).parent
    accelerator = Accelerator()

    # 1. The pipeline, loaded as its users load it
    pipeline = DiffusionPipeline.from_pretrained(
        generator_args["output_dir"],
        custom_pipeline=str(REPOSITORY / "pipelines/pipeline_softvq.py"),
        trust_remote_code=True,
    ).to(accelerator.device)
    vae, transformer = pipeline.vae.eval(), pipeline.transformer

    # 2. Held-out crops through the tokenizer, and through a thumbnail of about as many numbers
    dataset = load_image_dataset(
        tokenizer_args["dataset_name"], split="validation", resolution=tokenizer_args["resolution"], train=False
    )
    dataloader = accelerator.prepare(DataLoader(dataset, batch_size=32, collate_fn=collate_images))
    started = time.perf_counter()
    quality, originals, reconstructions = evaluate_reconstruction(
        accelerator, vae, tqdm(dataloader, desc="reconstructions"), num_images=16
    )
    reconstruction_seconds = time.perf_counter() - started
    reconstruction_grid(originals, reconstructions).save(output_dir / "reconstructions.png")

    num_tokens, num_channels = vae.config.num_latent_tokens, vae.config.latent_channels
    height, width = thumbnail_size(num_tokens * num_channels)
    baseline, _, _ = evaluate_reconstruction(
        accelerator, BicubicThumbnail((height, width)), tqdm(dataloader, desc="thumbnails"), num_images=1
    )

    # 3. Samples of every class
    class_labels = torch.arange(dataset.num_classes).repeat_interleave(SAMPLES_PER_CLASS)
    started = time.perf_counter()
    images = pipeline(
        class_labels,
        guidance_scale=generator_args["guidance_scale"],
        num_inference_steps=generator_args["num_inference_steps"],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images.cpu()
    sampling_seconds = time.perf_counter() - started
    rows = [image_grid(samples * 2 - 1, SAMPLES_PER_CLASS) for samples in images.split(SAMPLES_PER_CLASS)]
    plot_samples(rows, list(dataset.id2label.values()), output_dir / "samples.png")

    # 4. Curves, and the report
    tokenizer_metrics = read_metrics(tokenizer_args["output_dir"])
    generator_metrics = read_metrics(generator_args["output_dir"])
    plot_training(tokenizer_metrics, generator_metrics, output_dir / "training.png")

    num_latent_values, num_pixel_values = num_tokens * num_channels, originals[0].numel()
    tokenizer_steps, tokenizer_seconds = tokenizer_metrics[-1]["step"], tokenizer_metrics[-1]["time"]
    generator_steps, generator_seconds = generator_metrics[-1]["step"], generator_metrics[-1]["time"]
    latents = read_metadata(generator_args["latents_dir"])
    report = f"""# Quickstart report

Images of {vae.config.sample_size} pixels, tokenizer of {vae.num_parameters() / 1e6:.1f}M parameters, generator of
{transformer.num_parameters() / 1e6:.1f}M. On {describe_hardware(accelerator.device)};
torch {torch.__version__}, diffusers {diffusers_version}. Made by `make quickstart`.

## Reconstruction of {len(dataset)} held-out crops

| | numbers per image | PSNR, mean over images |
|---|---|---|
| SoftVQ tokenizer: {num_tokens} tokens of {num_channels} channels | {num_latent_values} | {quality["psnr"]:.2f} dB |
| bicubic thumbnail: {height} x {width} pixels of 3 channels | {3 * height * width} | {baseline["psnr"]:.2f} dB |

An image is {num_pixel_values} numbers, so the tokenizer keeps one in {num_pixel_values / num_latent_values:.0f}. The
thumbnail (bicubic down, bicubic up) is what the same amount of numbers gives without any training.

![Held-out crops above, their reconstructions below](reconstructions.png)

## Samples

{generator_args["num_inference_steps"]} Euler steps, guidance scale {generator_args["guidance_scale"]}.

![Samples, one class per row](samples.png)

## Time

| stage | | seconds |
|---|---|---|
| train the tokenizer | {tokenizer_steps} steps | {tokenizer_seconds:.0f} |
| cache the latents | {latents["num_images"]} images and their mirror images | {latents["seconds"]:.0f} |
| train the generator | {generator_steps} steps | {generator_seconds:.0f} |
| encode and decode | {len(dataset)} images | {reconstruction_seconds:.1f} |
| generate | {len(images)} images | {sampling_seconds:.1f} |

![Losses and PSNR during training](training.png)
"""
    (output_dir / "report.md").write_text(report, encoding="utf-8")
    print(report)
    print(
        f"The pictures are in {output_dir}: reconstructions.png, samples.png, training.png.\n\n"
        "What to run next, on GPUs and ImageNet (or your own images: --dataset_name path/to/images):\n\n"
        "  . .venv/bin/activate\n"
        "  accelerate launch training/train_softvq.py --config training/configs/softvq_l_64.yaml\n"
        "  accelerate launch training/cache_latents.py --pretrained_model_name_or_path outputs/softvq_l_64 \\\n"
        "      --dataset_name ILSVRC/imagenet-1k --output_dir outputs/softvq_l_64_latents\n"
        "  accelerate launch training/train_sit.py --config training/configs/generators/sit_xl_softvq_l_64.yaml\n\n"
        "docs/training.md says more."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="Folder of the quickstart configs.")
    main(parser.parse_args().configs)
