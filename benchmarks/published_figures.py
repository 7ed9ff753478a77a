"""Measure a published figure again: the authors' weights, their protocol, one command.

    accelerate launch benchmarks/published_figures.py --model SoftVQ-L-64
    accelerate launch benchmarks/published_figures.py --model "SiT-XL on SoftVQ-L-64" --guided \\
        --reference VIRTUAL_imagenet256_labeled.npz

`softvq-hf info` lists the names. The weights are downloaded and converted to `--output_dir`/NAME/model once, and
conversion.json beside it tells from what; a run that was interrupted goes on. The command ends with the published and
the measured figure, which are also in `--output_dir`/NAME/comparison.json (comparison_guided.json with `--guided`),
beside the full record, result.json or result_guided.json.

- Tokenizers: rFID of the 50,000 validation images of ImageNet, ADM centre crop, rounded to 8 bits.
- Generators: gFID of 50,000 images with labels drawn uniformly, truncated to 8 bits, 250 steps: Euler-Maruyama for
  SiT, the chain of DDPM for DiT. `--guided` takes the authors' example, a guidance scale of 1.75 for times up to 0.7;
  which scale belongs to which figure is not published, nor is the path of the SiT models: the example samples with
  the cosine one. Both are arguments.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from softvq_hf.conversion.published_models import load_published_models
from softvq_hf.evaluation.accelerator import build_accelerator
from softvq_hf.evaluation.arguments import MIXED_PRECISIONS
from softvq_hf.evaluation.generation import GenerationArguments, evaluate_generation
from softvq_hf.evaluation.reconstruction import LPIPS_NETWORKS, ReconstructionArguments, evaluate_reconstruction
from softvq_hf.evaluation.result import differences
from softvq_hf.training.arguments import parse_args
from softvq_hf.training.convert import convert_pretrained
from softvq_hf.training.logging import write_atomically


PUBLISHED = {published.name: published for published in load_published_models()}
CONVERSION_FILE = "conversion.json"
DEFAULT_GUIDANCE_SCALE, DEFAULT_GUIDANCE_HIGH = 1.75, 0.7

# What has no effect on the others.
TOKENIZER_ARGUMENTS = ("dataset", "lpips")
GENERATOR_ARGUMENTS = ("tokenizer", "reference", "guided", "num_inference_steps")
SIT_ARGUMENTS = ("path_type", "guidance_high")


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
    guidance_scale: float | None = field(
        default=None, metadata={"help": f"Its scale, above 1, with --guided; by default {DEFAULT_GUIDANCE_SCALE}."}
    )
    guidance_high: float | None = field(
        default=None,
        metadata={
            "help": "Latest time that is guided, of a SiT (1 is noise), with --guided; by default"
            f" {DEFAULT_GUIDANCE_HIGH}."
        },
    )
    num_inference_steps: int = field(default=250, metadata={"help": "Steps of the sampler."})
    path_type: str = field(default="cosine", metadata={"help": "Path of a SiT.", "choices": ["linear", "cosine"]})
    feature_extractor: list[str] = field(
        default_factory=lambda: ["inception"], metadata={"help": "As in `softvq-hf evaluate`."}
    )
    lpips: str = field(
        default="none",
        metadata={"help": "As in `softvq-hf evaluate reconstruction`.", "choices": list(LPIPS_NETWORKS)},
    )
    batch_size: int = field(default=64, metadata={"help": "Images per process and forward pass."})
    mixed_precision: str = field(
        default="no", metadata={"help": "As in `softvq-hf evaluate`.", "choices": list(MIXED_PRECISIONS)}
    )

    def __post_init__(self) -> None:
        if self.model not in PUBLISHED:
            raise ValueError(f"`--model` is {self.model!r}, allowed: {', '.join(PUBLISHED)}.")
        published = PUBLISHED[self.model]
        unused = GENERATOR_ARGUMENTS if published.kind == "tokenizer" else TOKENIZER_ARGUMENTS
        if published.system != "sit":
            unused += SIT_ARGUMENTS
        defaults = {argument.name: argument.default for argument in fields(self)}
        given = [f"`--{name}`" for name in unused if getattr(self, name) != defaults[name]]
        if given:
            raise ValueError(f"`--model` is {self.model!r}, which does not take {' and '.join(given)}.")
        if not self.guided and (self.guidance_scale is not None or self.guidance_high is not None):
            raise ValueError("`--guidance_scale` and `--guidance_high` are allowed with `--guided` only.")
        if published.kind == "generator" and self.reference is None:
            raise ValueError("`--reference` is None, allowed for a generator: an .npz file, or a data set.")
        if self.guided and self.guidance_scale is None:
            self.guidance_scale = DEFAULT_GUIDANCE_SCALE
        if self.guided and self.guidance_high is None:
            self.guidance_high = DEFAULT_GUIDANCE_HIGH
        if self.guided and not self.guidance_scale > 1:
            raise ValueError(f"`--guidance_scale` is {self.guidance_scale}, allowed with `--guided`: numbers above 1.")

    @property
    def folder(self) -> Path:
        """Where everything on the model lies."""
        return Path(self.output_dir, self.model.replace(" ", "_"))

    @property
    def suffix(self) -> str:
        """Of the names of files that differ with guidance."""
        return "_guided" if self.guided else ""


def evaluation_arguments(args: PublishedFiguresArguments) -> ReconstructionArguments | GenerationArguments:
    """The authors' protocol, as `softvq-hf evaluate` takes it."""
    published = PUBLISHED[args.model]
    folder = args.folder
    shared = {
        "feature_extractor": args.feature_extractor,
        "batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        "output_file": str(folder / f"result{args.suffix}.json"),
    }
    if published.kind == "tokenizer":
        return ReconstructionArguments(
            model=str(folder / "model"),
            dataset=args.dataset,
            max_samples=args.num_images,
            lpips=args.lpips,
            **shared,
        )
    if args.guided:
        shared["guidance_scale"] = args.guidance_scale
        if published.system == "sit":
            shared["guidance_interval"] = [0.0, args.guidance_high]
    return GenerationArguments(
        pipeline=str(folder / "model"),
        output_dir=str(folder / f"samples{args.suffix}"),
        num_images=args.num_images,
        num_inference_steps=args.num_inference_steps,
        reference=args.reference,
        **shared,
    )


def convert(args: PublishedFiguresArguments) -> None:
    """The authors' weights in `args.folder`/model. They may be there already, but by the same conversion only."""
    published = PUBLISHED[args.model]
    model_folder, record_file = args.folder / "model", args.folder / CONVERSION_FILE
    conversion = {"source": args.source or published.repo_id}
    if published.kind == "generator":
        conversion["tokenizer"] = args.tokenizer or published.tokenizer
    if published.system == "sit":
        conversion["path_type"] = args.path_type
    if model_folder.exists():
        earlier = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else {}
        different = differences(earlier, conversion)
        if different:
            raise ValueError(
                f"{str(model_folder)!r} holds another conversion: {'; '.join(different)}. Give another"
                " `--output_dir`, or remove the folder."
            )
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record_file, json.dumps(conversion, indent=2) + "\n")
    convert_pretrained(output_dir=model_folder, **conversion)


def main(args: PublishedFiguresArguments) -> None:
    published = PUBLISHED[args.model]
    arguments = evaluation_arguments(args)  # checks them before anything is downloaded
    accelerator = build_accelerator(args.mixed_precision)

    # 1. The authors' weights
    with accelerator.main_process_first():
        convert(args)

    # 2. Their protocol
    if published.kind == "tokenizer":
        result = evaluate_reconstruction(arguments)
        figures = {"rfid": published.published["rfid"]}
    else:
        result = evaluate_generation(arguments)
        figures = {"gfid": published.published["gfid_guided" if args.guided else "gfid"]}

    # 3. Side by side
    if accelerator.is_main_process:
        comparison = {
            name: {"published": value, "measured": result["metrics"].get(name)} for name, value in figures.items()
        }
        record = {"model": args.model, "figures": comparison, "protocol": result["protocol"]["name"]}
        write_atomically(args.folder / f"comparison{args.suffix}.json", json.dumps(record, indent=2) + "\n")
        print(f"{args.model}: {result['protocol']['name']}")
        for name, values in comparison.items():
            print(f"{name}: published {values['published']}, measured {values['measured']}")
        others = {name: value for name, value in result["metrics"].items() if name not in figures}
        print(json.dumps(others, indent=2))


if __name__ == "__main__":
    main(parse_args(PublishedFiguresArguments))
