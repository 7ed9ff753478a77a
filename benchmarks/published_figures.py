"""Measure a published figure again: the authors' weights, their protocol, one command.

    accelerate launch benchmarks/published_figures.py --model SoftVQ-L-64
    accelerate launch benchmarks/published_figures.py --model "SiT-XL on SoftVQ-L-64" --guided \\
        --reference VIRTUAL_imagenet256_labeled.npz

`softvq-hf info` lists the names. The weights are downloaded and converted to `--output_dir`/NAME/model once; a run
that was interrupted goes on. The command ends with the published and the measured figure, which are also in
`--output_dir`/NAME/comparison.json, beside the full record.

- Tokenizers: rFID of the 50,000 validation images of ImageNet, ADM centre crop, rounded to 8 bits.
- Generators: gFID of 50,000 images with labels drawn uniformly, truncated to 8 bits, 250 steps: Euler-Maruyama for
  SiT, the chain of DDPM for DiT. `--guided` takes the authors' example, a guidance scale of 1.75 for times up to 0.7;
  which scale belongs to which figure is not published, nor is the path of the SiT models: the example samples with
  the cosine one. Both are arguments.
"""

import json
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from softvq_hf.conversion.published_models import load_published_models
from softvq_hf.evaluation.generation import GenerationArguments, evaluate_generation
from softvq_hf.evaluation.reconstruction import ReconstructionArguments, evaluate_reconstruction
from softvq_hf.training.arguments import parse_args
from softvq_hf.training.convert import convert_pretrained


PUBLISHED = {published.name: published for published in load_published_models()}


@dataclass(kw_only=True)
class PublishedFiguresArguments:
    """Arguments of this script. `__post_init__` raises `ValueError` for values that cannot work."""

    model: str = field(metadata={"help": "Name of a published model, as `softvq-hf info` lists it."})
    output_dir: str = field(default="outputs/published", metadata={"help": "Folder for models, images and results."})
    source: str | None = field(
        default=None, metadata={"help": "A copy of the model's repository, in place of the one on the Hub."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "A copy of the repository of a generator's tokenizer, likewise."}
    )
    dataset: str = field(default="ILSVRC/imagenet-1k", metadata={"help": "Validation images for a tokenizer."})
    num_images: int = field(default=50_000, metadata={"help": "Images; the figures are those of 50,000."})
    reference: str | None = field(
        default=None, metadata={"help": "For a generator: ADM's VIRTUAL_imagenet256_labeled.npz, or that of 512 px."}
    )
    guided: bool = field(default=False, metadata={"help": "For a generator: with classifier-free guidance."})
    guidance_scale: float = field(default=1.75, metadata={"help": "Its scale, with --guided."})
    guidance_high: float = field(default=0.7, metadata={"help": "Latest time that is guided, of a SiT (1 is noise)."})
    num_inference_steps: int = field(default=250, metadata={"help": "Steps of the sampler."})
    path_type: str = field(default="cosine", metadata={"help": "Path of a SiT.", "choices": ["linear", "cosine"]})
    feature_extractor: list[str] = field(
        default_factory=lambda: ["inception"], metadata={"help": "As in `softvq-hf evaluate`."}
    )
    lpips: str = field(default="none", metadata={"help": "As in `softvq-hf evaluate reconstruction`."})
    batch_size: int = field(default=64, metadata={"help": "Images per process and forward pass."})
    mixed_precision: str = field(default="no", metadata={"help": "As in `softvq-hf evaluate`."})

    def __post_init__(self) -> None:
        if self.model not in PUBLISHED:
            raise ValueError(f"`--model` is {self.model!r}, allowed: {', '.join(PUBLISHED)}.")
        if PUBLISHED[self.model].kind == "generator" and self.reference is None:
            raise ValueError("`--reference` is None, allowed for a generator: an .npz file, or a data set.")


def main(args: PublishedFiguresArguments) -> None:
    published = PUBLISHED[args.model]
    folder = Path(args.output_dir, args.model.replace(" ", "_"))
    model_folder = folder / "model"

    # 1. The authors' weights
    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))  # for the slowest
    with processes.main_process_first():
        if not model_folder.exists():
            options = {}
            if published.kind == "generator":
                options["tokenizer"] = args.tokenizer or published.tokenizer
            if published.system == "sit":
                options["path_type"] = args.path_type
            convert_pretrained(args.source or published.repo_id, model_folder, **options)

    # 2. Their protocol
    shared = {
        "feature_extractor": args.feature_extractor,
        "batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        "output_file": str(folder / ("guided.json" if args.guided else "result.json")),
    }
    if published.kind == "tokenizer":
        arguments = ReconstructionArguments(
            model=str(model_folder), dataset=args.dataset, max_samples=args.num_images, lpips=args.lpips, **shared
        )
        result = evaluate_reconstruction(arguments)
        figures = {"rfid": published.published["rfid"]}
    else:
        guidance = {"guidance_scale": args.guidance_scale} if args.guided else {}
        if args.guided and published.system == "sit":
            guidance["guidance_interval"] = [0.0, args.guidance_high]
        arguments = GenerationArguments(
            pipeline=str(model_folder),
            output_dir=str(folder / ("samples_guided" if args.guided else "samples")),
            num_images=args.num_images,
            num_inference_steps=args.num_inference_steps,
            rounding="truncate",
            reference=args.reference,
            **guidance,
            **shared,
        )
        result = evaluate_generation(arguments)
        figures = {"gfid": published.published["gfid_guided" if args.guided else "gfid"]}

    # 3. Side by side
    if processes.is_main_process:
        comparison = {
            name: {"published": value, "measured": result["metrics"].get(name)} for name, value in figures.items()
        }
        record = {"model": args.model, "figures": comparison, "protocol": result["protocol"]["name"]}
        (folder / "comparison.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{args.model}: {result['protocol']['name']}")
        for name, values in comparison.items():
            print(f"{name}: published {values['published']}, measured {values['measured']}")
        others = {name: value for name, value in result["metrics"].items() if name not in figures}
        print(json.dumps(others, indent=2))


if __name__ == "__main__":
    main(parse_args(PublishedFiguresArguments))
