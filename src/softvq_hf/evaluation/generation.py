"""How good a generator is: `softvq-hf evaluate generation`.

    accelerate launch -m softvq_hf.cli evaluate generation --pipeline outputs/sit_xl_softvq_l_64 --num_images 50000 \\
        --guidance_scale 1.75 --num_inference_steps 250 --reference VIRTUAL_imagenet256_labeled.npz \\
        --output_dir outputs/sit_xl_softvq_l_64_samples
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from softvq_hf.evaluation.accelerator import build_accelerator
from softvq_hf.evaluation.arguments import EvaluationArguments, EvaluationDataArguments
from softvq_hf.evaluation.distribution import DistributionMetrics, name_figures
from softvq_hf.evaluation.reference import Reference, build_dataset_reference, load_reference
from softvq_hf.evaluation.result import build_result, check_output_file, update_model_card, write_result
from softvq_hf.evaluation.samples import (
    LABELS,
    NPZ_FILE,
    SAMPLING_ARGUMENTS,
    generate_samples,
    plan_samples,
    sampling_arguments,
)
from softvq_hf.metrics.features import FeatureExtractor
from softvq_hf.metrics.images import ROUNDINGS
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.training.arguments import check_output_dir
from softvq_hf.training.generator import get_image_size
from softvq_hf.training.hub import read_model_card


RESULT_FILE = "result.json"
TASK = "class-conditional-image-generation"


@dataclass(kw_only=True)
class GenerationArguments(EvaluationArguments):
    """Arguments of [`evaluate_generation`]. `__post_init__` raises `ValueError` for values that cannot work."""

    pipeline: str = field(metadata={"help": "Generator with its tokenizer: a folder or Hub id of a pipeline."})
    output_dir: str = field(
        metadata={"help": "Folder for the images and the result. A run that was interrupted goes on there."}
    )

    # images
    num_images: int = field(default=50_000, metadata={"help": "Images to generate."})
    labels: str = field(
        default="iid",
        metadata={
            "help": "Class labels: iid (each drawn uniformly, as in the official figures) or balanced (every class"
            " equally often).",
            "choices": list(LABELS),
        },
    )
    seed: int = field(default=0, metadata={"help": "Image i depends on the seed and i alone."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; up to 1 there is none."})
    guidance_interval: list[float] | None = field(
        default=None,
        metadata={
            "help": "SiT and DiT: two times between which steps are guided, by default 0 and 1; 1 is noise, 0 is data."
        },
    )
    num_inference_steps: int = field(
        default=250, metadata={"help": "Steps of the sampler; MAR makes at least one token in each."}
    )
    guidance_schedule: str | None = field(
        default=None,
        metadata={
            "help": "MAR: linear, from 1 to --guidance_scale as tokens become known (the default), or constant.",
            "choices": ["linear", "constant"],
        },
    )
    num_diffusion_steps: int | None = field(
        default=None, metadata={"help": "MAR: steps of the chain of every token, by default 100."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "MAR: factor of the noise that the chain's steps add, by default 1."}
    )
    rounding: str = field(
        default="truncate",
        metadata={
            "help": "How the images become 8-bit ones: truncate, as the official sampling scripts of SiT and DiT do,"
            " or round, to the nearest value.",
            "choices": list(ROUNDINGS),
        },
    )
    shard_size: int = field(default=256, metadata={"help": "Images per file; an interrupted process loses one file."})
    save_npz: bool = field(
        default=True, metadata={"help": f"Write {NPZ_FILE} with all images, for the evaluation scripts of ADM."}
    )

    # real images
    reference: str | None = field(
        default=None,
        metadata={
            "help": "What the images are compared with: an .npz file of `softvq-hf evaluate reference`, of images"
            " (arr_0) or of (mu, sigma), or images as --dataset of the other evaluations takes them. Without it the"
            " Inception Score is all."
        },
    )
    reference_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub dataset --reference."}
    )
    reference_split: str = field(default="train", metadata={"help": "Split of the data set --reference."})
    reference_revision: str | None = field(default=None, metadata={"help": "Revision of the Hub dataset --reference."})
    reference_image_column: str = field(
        default="image", metadata={"help": "Column of the images of the data set --reference."}
    )
    reference_max_samples: int | None = field(
        default=None,
        metadata={"help": "Use only this many images of the data set --reference, spread evenly over it."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where `datasets` keeps downloads."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Loader processes; 0 loads in the main one."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, lowest in (("num_images", 2), ("seed", 0), ("num_inference_steps", 1), ("shard_size", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from {lowest} on.")
        if self.labels not in LABELS:
            raise ValueError(f"`--labels` is {self.labels!r}, allowed: {', '.join(LABELS)}.")
        interval = self.guidance_interval
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(
                f"`--guidance_interval` is {' '.join(map(str, interval))}, allowed: two numbers, low and high, with"
                " 0 <= low <= high <= 1."
            )
        if self.reference_max_samples is not None and self.reference_max_samples < 2:
            raise ValueError(
                f"`--reference_max_samples` is {self.reference_max_samples}, allowed: integers from 2 on."
            )
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"`--dataloader_num_workers` is {self.dataloader_num_workers}, allowed: integers from 0 on."
            )
        if self.reference_is_file and not Path(self.reference).is_file():
            raise ValueError(f"`--reference` is {self.reference!r}, allowed: an .npz file that exists, or a data set.")
        if self.feature_extractor == ["none"] and (self.reference is not None or self.update_model_card):
            raise ValueError(
                "`--feature_extractor` is none, allowed without `--reference` and `--update_model_card` only: there"
                " are no figures then."
            )
        if self.update_model_card and self.reference is None:
            raise ValueError(
                "`--reference` is None, allowed with `--update_model_card`: real images, which the figures of a card"
                " name."
            )
        if self.update_model_card and not Path(self.pipeline).is_dir():
            raise ValueError(
                f"`--pipeline` is {self.pipeline!r}, allowed with `--update_model_card`: a local folder that exists."
            )

    @property
    def reference_is_file(self) -> bool:
        """Whether `reference` is an `.npz` file, and not a data set."""
        return self.reference is not None and self.reference.endswith(".npz")

    def reference_data(self) -> EvaluationDataArguments:
        """The data set `reference` as the other evaluations take it."""
        return EvaluationDataArguments(
            dataset=self.reference,
            dataset_config_name=self.reference_config_name,
            split=self.reference_split,
            revision=self.reference_revision,
            image_column=self.reference_image_column,
            cache_dir=self.cache_dir,
            max_samples=self.reference_max_samples,
            dataloader_num_workers=self.dataloader_num_workers,
        )


def evaluate_generation(args: GenerationArguments) -> dict[str, Any]:
    """
    Generate images and measure how far they are from real ones. Collective: several processes share the work.

    What is wrong with the arguments, the pipeline or the folder is an error at once; then the reference is read or
    measured, so that what is wrong with it is an error before anything is generated. Then
    [`~softvq_hf.evaluation.samples.generate_samples`] fills `args.output_dir`, or what is missing there, and the
    figures are taken from its files. With another feature network or reference, the same command takes new figures of
    the same images.

    Args:
        args ([`GenerationArguments`]): The arguments.

    Returns:
        `dict`: the record, see [`~softvq_hf.evaluation.result.build_result`], the same on all processes. The main
        process has written it to `args.output_file`, by default `result.json` in `args.output_dir`.

    Raises:
        ValueError: If an argument is not allowed, the reference was made by another protocol, `args.output_dir` holds
            images of another plan, or the pipeline makes images that are not finite.
        OSError: If the pipeline or the weights of a feature network are not there.
    """
    check_output_dir(args.output_dir)
    output_file = args.output_file or str(Path(args.output_dir, RESULT_FILE))
    check_output_file(output_file)
    accelerator = build_accelerator(args.mixed_precision)

    # 1. The pipeline, the feature networks, and the plan of the images
    with accelerator.main_process_first():  # which downloads
        try:
            class_name = DiffusionPipeline.load_config(args.pipeline)["_class_name"]  # of an export also its file
            pipeline_class = MARPipeline if "MARPipeline" in class_name else SoftVQPipeline
            pipeline = pipeline_class.from_pretrained(args.pipeline, use_safetensors=True)
        except OSError as error:
            raise OSError(f"`--pipeline` is {args.pipeline!r}, which cannot be loaded: {error}") from error
        extractors = args.load_feature_extractors(accelerator.device)
    for extractor in extractors:
        if args.reference is None and extractor.num_classes is None:
            raise ValueError(
                f"`--reference` is None, allowed with {extractor.label}, which gives no logits: real images, or"
                " `--feature_extractor none` to generate only."
            )
    if args.update_model_card:
        read_model_card(args.pipeline, pipeline)
    height, width = get_image_size(pipeline.vae, pipeline.transformer)
    if height != width:
        raise ValueError(f"`--pipeline` makes images of {height} x {width} pixels, allowed: square ones.")
    samples = plan_samples(
        pipeline,
        args.output_dir,
        accelerator,
        num_images=args.num_images,
        labels=args.labels,
        seed=args.seed,
        rounding=args.rounding,
        shard_size=args.shard_size,
        **sampling_settings(args, pipeline),
    )

    # 2. What the networks see in real images, and the images
    references = []
    if args.reference is not None:
        references = [read_reference(args, accelerator, extractor, resolution=height) for extractor in extractors]
    generate_samples(pipeline, samples, accelerator, batch_size=args.batch_size)
    pipeline.to("cpu")  # leaves the device to the feature networks
    if args.save_npz and accelerator.is_main_process:
        samples.write_npz()

    # 3. The figures
    distributions = [
        DistributionMetrics(extractor, reference=reference, has_references=reference is not None)
        for extractor, reference in zip(extractors, references or [None] * len(extractors), strict=True)
    ]
    if distributions:
        own_shards = range(samples.num_shards)[accelerator.process_index :: accelerator.num_processes]
        with tqdm(
            total=sum(len(samples.indices(shard)) for shard in own_shards),
            desc=f"figures (process 1 of {accelerator.num_processes})",
            unit="image",
            disable=not accelerator.is_main_process,
        ) as progress:
            for indices, images in samples.batches(own_shards, args.batch_size):
                for distribution in distributions:
                    distribution.add(predictions=images, indices=indices)
                progress.update(len(images))
    results = [distribution.compute() for distribution in distributions]

    # 4. The record
    result = build_result(
        accelerator,
        task=TASK,
        model=args.pipeline,
        dataset=describe_real_images(args, references),
        metrics=name_figures(results, prefix="g"),
        protocol={
            "name": protocol_in_words(args, pipeline, samples.plan, references),
            **samples.plan,
            "batch_size": args.batch_size,
            "feature_extractors": {extractor.label: extractor.description() for extractor in extractors},
            "num_references": {result["label"]: result["num_references"] for result in results},
        },
        notes=[
            *(note for result in results for note in result["notes"]),
            *(note for reference in references for note in reference.notes),
        ],
    )
    if accelerator.is_main_process:
        write_result(result, output_file)
        if args.update_model_card:
            update_model_card(args.pipeline, result, pipeline)
    accelerator.wait_for_everyone()
    return result


def sampling_settings(args: GenerationArguments, pipeline: SoftVQPipeline | MARPipeline) -> dict[str, Any]:
    """
    The arguments of the pipeline's call that were given.

    Raises:
        ValueError: If one was given that this pipeline does not have.
    """
    names = {name for kind in SAMPLING_ARGUMENTS.values() for name in kind}
    settings = {name: getattr(args, name) for name in sorted(names) if getattr(args, name) is not None}
    for name, value in settings.items():
        if name not in sampling_arguments(pipeline):
            owner = next(kind.__name__ for kind, names in SAMPLING_ARGUMENTS.items() if name in names)
            raise ValueError(
                f"`--{name}` is {value}, allowed with a {owner}; `--pipeline` is a {type(pipeline).__name__}."
            )
    return settings


def read_reference(
    args: GenerationArguments, accelerator: Accelerator, extractor: FeatureExtractor, resolution: int
) -> Reference:
    """The real images of `args` as one network sees them: read from an .npz file, or measured. Collective."""
    if args.reference_is_file:
        return load_reference(accelerator, args.reference, extractor, resolution, batch_size=args.batch_size)
    try:
        return build_dataset_reference(
            accelerator, args.reference_data(), extractor, resolution, batch_size=args.batch_size
        )
    except ValueError as error:
        raise ValueError(
            f"`--reference` is {args.reference!r} with `--reference_split` {args.reference_split!r}: {error}"
        ) from error


def describe_real_images(args: GenerationArguments, references: Sequence[Reference]) -> dict[str, Any]:
    """Which real images these are, for the record: of a file what it says, or its name."""
    unknown = {"name": None, "config_name": None, "split": None, "revision": None, "max_samples": None}
    if not references:
        return unknown
    if not args.reference_is_file:
        return args.reference_data().data_record()
    protocol = references[0].protocol or {}
    return {**unknown, "name": Path(args.reference).name, **(protocol.get("dataset") or {})}


def protocol_in_words(
    args: GenerationArguments,
    pipeline: SoftVQPipeline | MARPipeline,
    plan: dict[str, Any],
    references: Sequence[Reference],
) -> str:
    """One line that tells this protocol from others: figures by other real images do not replace each other."""
    steps = f"{plan['num_inference_steps']} steps of {type(pipeline.scheduler).__name__}"
    guidance = "no guidance"
    if plan["guidance_scale"] > 1:
        guidance = f"guidance {plan['guidance_scale']:g}"
    if isinstance(pipeline, MARPipeline):
        if plan["guidance_scale"] > 1:
            guidance = f"{plan['guidance_schedule']} {guidance}"
        steps = f"{min(plan['num_inference_steps'], pipeline.transformer.num_tokens)} autoregressive steps"
        steps += f" of {plan['num_diffusion_steps']} at temperature {plan['temperature']:g}"
    elif plan["guidance_scale"] > 1 and plan["guidance_interval"] != [0, 1]:
        low, high = plan["guidance_interval"]
        guidance += f" from {low:g} to {high:g}"
    real_images = ""
    if references:
        named = Path(args.reference).name if args.reference_is_file else f"{references[0].num_images} real images"
        real_images = f", against {named}"
    precision = args.precision_in_words()
    return f"{args.num_images} images, {args.labels} labels, {guidance}, {steps}, {precision}{real_images}"
