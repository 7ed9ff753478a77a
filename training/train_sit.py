"""Train a class-conditional transformer on the latents of a tokenizer: SiT (flow matching, arXiv 2401.08740) or, with
`--objective ddpm`, DiT (noise prediction with learned variance, arXiv 2212.09748).

    accelerate launch training/cache_latents.py ...
    accelerate launch training/train_sit.py --config training/configs/sit_xl.yaml --latents_dir latents
    accelerate launch training/train_sit.py --config training/configs/dit_xl.yaml --latents_dir latents

The latents are read from a folder of `training/cache_latents.py`, or made on the fly from images by `--vae`. Either
way they are normalised by the tokenizer's statistics. `--output_dir` becomes a complete pipeline folder (transformer
with averaged weights, tokenizer, scheduler), with checkpoints, metrics and sample grids beside it. `--vae` also takes
diffusers' `AutoencoderKL`: its 2-D latents are cut into patches, as in the baselines SiT-XL/2 and DiT-XL/2.
"""

from functools import partial

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from softvq_hf.data import collate_images, load_cached_latents, load_image_dataset
from softvq_hf.losses import load_teacher
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.accelerator import build_accelerator
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.checkpointing import open_output_dir
from softvq_hf.training.dataloader import build_dataloader, check_dataset_size
from softvq_hf.training.distributed import place_teacher
from softvq_hf.training.generator import (
    build_ddpm_scheduler,
    check_pretrained_latents,
    encode_latents,
    get_latent_shape,
    load_tokenizer,
)
from softvq_hf.training.generator_arguments import SiTTrainingArguments
from softvq_hf.training.generator_loop import check_length, train_generator
from softvq_hf.training.hub import create_run_repo
from softvq_hf.training.randomness import BatchGenerators
from softvq_hf.training.transformer import TransformerWithLoss, build_transformer


logger = get_logger(__name__)


def build_scheduler(args: SiTTrainingArguments, learned_variance: bool) -> SchedulerMixin:
    """How noise is mixed into the latents: the path of SiT, or the chain of DiT as its authors sample it."""
    if args.objective == "flow_matching":
        return StochasticInterpolantScheduler(path_type=args.path_type)
    return build_ddpm_scheduler(args.beta_schedule, learned_variance)


def build_pipeline(
    args: SiTTrainingArguments,
    vae: AutoencoderSoftVQ | AutoencoderKL,
    scheduler: SchedulerMixin,
    id2label: dict[int, str],
    transformer: DiTTransformer1DModel,
) -> SoftVQPipeline:
    """The pipeline that is sampled from and saved. Samplers `sde` and `ddpm` are the scheduler of the training."""
    if args.sampler == "ode":
        scheduler = FlowMatchEulerDiscreteScheduler()  # the same for both paths
    elif args.sampler == "ddim":
        scheduler = DDIMScheduler(beta_schedule=args.beta_schedule, clip_sample=False)
    return SoftVQPipeline(vae=vae, transformer=transformer, scheduler=scheduler, id2label=id2label)


def main(args: SiTTrainingArguments) -> None:
    check_output_dir(args.output_dir)
    accelerator = build_accelerator(args)
    device = accelerator.device
    checkpoint = open_output_dir(accelerator, args)
    repo_id = create_run_repo(accelerator, args)

    # 1. Data: latents, or images and the tokenizer that encodes them
    with accelerator.main_process_first():
        if args.latents_dir is not None:
            train_dataset = load_cached_latents(args.latents_dir, seed=args.seed, train=True)
            vae = AutoencoderSoftVQ.from_pretrained(train_dataset.tokenizer_dir)
        else:
            train_dataset = load_image_dataset(
                args.data_source,
                split=args.train_split,
                train=True,
                center_crop=True,
                max_samples=args.max_train_samples,
                jpeg_draft=args.jpeg_draft,
                fast_resize=args.fast_resize,
                label_column=args.label_column,
                num_classes=args.num_classes,
                **args.dataset_options(),
            )
            vae = load_tokenizer(args.vae)
            if (vae.config.scaling_factor, vae.config.shift_factor or 0.0) == (1.0, 0.0):
                logger.warning(
                    f"The tokenizer {args.vae} has no latent statistics (`scaling_factor` 1, `shift_factor` 0), so"
                    " latents are NOT normalised. training/cache_latents.py measures them and saves a tokenizer that"
                    " has them."
                )
            sizes = (args.resolution, [args.resolution] * 2)
            if not isinstance(vae, AutoencoderKL) and vae.config.sample_size not in sizes:
                raise ValueError(f"`--resolution` is {args.resolution}, the tokenizer takes {vae.config.sample_size}.")
    vae.requires_grad_(False).eval().to(device)
    check_dataset_size(train_dataset, args.train_batch_size, accelerator.num_processes)
    train_dataloader = build_dataloader(
        accelerator,
        train_dataset,
        args.train_batch_size,
        collate_fn=None if args.latents_dir is not None else collate_images,
        num_workers=args.dataloader_num_workers,
        train=True,
    )
    max_train_steps = check_length(accelerator, args, train_dataloader)

    # 2. Transformer and loss
    if args.pretrained_model_name_or_path is not None:
        check_pretrained_latents(args.pretrained_model_name_or_path, vae)
    transformer = build_transformer(args, get_latent_shape(vae, args.resolution), train_dataset.num_classes)
    scheduler = build_scheduler(args, transformer.out_channels > transformer.config.in_channels)
    teacher = None
    if args.repa_teacher is not None:
        with accelerator.local_main_process_first():  # one process of a machine downloads
            teacher = load_teacher(args.repa_teacher, args.resolution, args.repa_patch_size)
        place_teacher(accelerator, teacher)
    model = TransformerWithLoss(args, transformer, scheduler, None if teacher is None else teacher.hidden_size)

    def prepare_batch(batch: dict, generators: BatchGenerators) -> tuple[torch.Tensor, ...]:
        """Normalised latents and, with REPA, the tokens of the teacher."""
        if args.latents_dir is not None:
            return (vae.scale_latent(batch["latents"].float()),)
        with torch.no_grad(), accelerator.autocast():
            latents = encode_latents(vae, batch["pixel_values"], generators.samples)
            return (latents,) if teacher is None else (latents, teacher(batch["pixel_values"]))

    # 3. Train, validate, save
    train_generator(
        accelerator,
        args,
        checkpoint,
        repo_id,
        model=model,
        parameters=model.parameters(),
        vae=vae,
        train_dataset=train_dataset,
        train_dataloader=train_dataloader,
        max_train_steps=max_train_steps,
        prepare_batch=prepare_batch,
        build_pipeline=partial(build_pipeline, args, vae, scheduler, train_dataset.id2label),
        sample_options={"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps},
    )


if __name__ == "__main__":
    main(parse_args(SiTTrainingArguments))
