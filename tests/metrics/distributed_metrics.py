"""Run by test_metrics_distributed.py in several processes: every process adds its part of the samples, as a loop over
a sharded data set does, and writes what it gets."""

import argparse
import json
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import PartialState

from softvq_hf import metrics


NUM_SAMPLES = 45
CONSTRUCTOR_ARGUMENTS = {
    "psnr": {},
    "ssim": {},
    "frechet_distance": {},
    "inception_score": {"num_splits": 3},
    "kernel_distance": {"num_subsets": 5, "subset_size": 10, "capacity": 20},
    "precision_recall": {"capacity": 20},
    "codebook_usage": {"codebook_size": 8, "num_codebooks": 2},
    "latent_statistics": {},
}
CLASSES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "frechet_distance": "FrechetDistance",
    "inception_score": "InceptionScore",
    "kernel_distance": "KernelDistance",
    "precision_recall": "PrecisionRecall",
    "codebook_usage": "CodebookUsage",
    "latent_statistics": "LatentStatistics",
}
# What each process gets of the samples, by the number of processes
PARTS = {
    "interleaved": lambda process, num_processes: range(process, NUM_SAMPLES, num_processes),
    "unequal": lambda process, num_processes: range(0, 31) if process == 0 else range(31, NUM_SAMPLES),
    "none": lambda process, num_processes: range(NUM_SAMPLES) if process == num_processes - 1 else range(0),
}


def make_samples() -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of each metric: the same in every process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_SAMPLES, 3, 12, 12), dtype=torch.uint8, generator=generator)
    noise = torch.randint(0, 30, images.shape, dtype=torch.uint8, generator=generator)
    pairs = {"predictions": images // 2 + noise, "references": images}
    features = {
        "predictions": torch.randn(NUM_SAMPLES, 5, generator=generator) + 0.5,
        "references": torch.randn(NUM_SAMPLES, 5, generator=generator),
        "indices": torch.arange(NUM_SAMPLES),
    }
    return {
        "psnr": pairs,
        "ssim": pairs,
        "frechet_distance": features,
        "inception_score": {"predictions": features["predictions"], "indices": features["indices"]},
        "kernel_distance": features,
        "precision_recall": features,
        "codebook_usage": {"predictions": torch.randint(0, 7, (NUM_SAMPLES, 2, 4), generator=generator)},
        "latent_statistics": {"predictions": torch.randn(NUM_SAMPLES, 4, 3, generator=generator) ** 3},
    }


def compute(part: str, folder: str | None = None, batch_size: int = 4) -> dict[str, dict[str, Any]]:
    """Results of all metrics: of the package, or of `folder` by `evaluate.load`."""
    state = PartialState()
    indices = PARTS[part](state.process_index, state.num_processes)
    results = {}
    for name, samples in make_samples().items():
        if folder is None:
            metric = getattr(metrics, CLASSES[name])(**CONSTRUCTOR_ARGUMENTS[name])
        else:
            metric = evaluate.load(f"{folder}/{name}.py", **CONSTRUCTOR_ARGUMENTS[name])
        for start in range(0, len(indices), batch_size):
            batch = torch.tensor(indices[start : start + batch_size])
            metric.add_batch(**{argument: values[batch] for argument, values in samples.items()})
        results[name] = metric.compute()
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder")
    parser.add_argument("--output_dir", type=Path)
    arguments = parser.parse_args()
    state = PartialState(cpu=True)
    results = {part: compute(part) for part in PARTS}
    results["by evaluate.load"] = compute("unequal", arguments.folder)
    (arguments.output_dir / f"{state.process_index}.json").write_text(json.dumps(results))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
