"""Train a MAR (arXiv 2406.11838) on the cached latents of a tokenizer.

    accelerate launch training/cache_latents.py ...
    accelerate launch training/train_mar.py --config training/configs/mar_b.yaml --latents_dir latents

Latents come from a folder of `training/cache_latents.py` and are normalised by the tokenizer's statistics.
`--output_dir` becomes a complete pipeline folder (transformer with averaged weights, tokenizer, scheduler), with
checkpoints, metrics and sample grids beside it, as `training/train_sit.py` leaves it.
"""

from functools import partial

import torch

from softvq_hf.data import load_cached_latents
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.schedulers.scheduling_ddpm_temperature import TemperatureDDPMScheduler
from softvq_hf.training.accelerator import build_accelerator
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.checkpointing import open_output_dir
from softvq_hf.training.dataloader import build_dataloader, check_dataset_size
from softvq_hf.training.generator import build_token_scheduler, check_pretrained_latents, get_latent_shape
from softvq_hf.training.generator_arguments import MARTrainingArguments
from softvq_hf.training.generator_loop import check_length, train_generator
from softvq_hf.training.hub import create_run_repo
from softvq_hf.training.mar import MARWithLoss, build_mar, parameter_groups
from softvq_hf.training.randomness import BatchGenerators


def build_pipeline(
    vae: AutoencoderSoftVQ,
    scheduler: TemperatureDDPMScheduler,
    id2label: dict[int, str],
    transformer: MARTransformer1DModel,
) -> MARPipeline:
    """The pipeline that is sampled from and saved."""
    return MARPipeline(vae=vae, transformer=transformer, scheduler=scheduler, id2label=id2label)


def main(args: MARTrainingArguments) -> None:
    check_output_dir(args.output_dir)
    accelerator = build_accelerator(args)
    checkpoint = open_output_dir(accelerator, args)
    repo_id = create_run_repo(accelerator, args)

    # 1. Data: cached latents, and the tokenizer they are of
    with accelerator.main_process_first():
        train_dataset = load_cached_latents(args.latents_dir, seed=args.seed, train=True)
        vae = AutoencoderSoftVQ.from_pretrained(train_dataset.tokenizer_dir)
    vae.requires_grad_(False).eval().to(accelerator.device)
    check_dataset_size(train_dataset, args.train_batch_size, accelerator.num_processes)
    train_dataloader = build_dataloader(
        accelerator,
        train_dataset,
        args.train_batch_size,
        collate_fn=None,
        num_workers=args.dataloader_num_workers,
        train=True,
    )
    max_train_steps = check_length(accelerator, args, train_dataloader)

    # 2. Transformer and loss
    if args.pretrained_model_name_or_path is not None:
        check_pretrained_latents(args.pretrained_model_name_or_path, vae)
    transformer = build_mar(args, get_latent_shape(vae, args.resolution), train_dataset.num_classes)
    scheduler = build_token_scheduler(args.clip_sample_range)
    model = MARWithLoss(args, transformer, scheduler)

    def prepare_batch(batch: dict, generators: BatchGenerators) -> tuple[torch.Tensor]:
        """Normalised latents."""
        return (vae.scale_latent(batch["latents"].float()),)

    # 3. Train, validate, save
    train_generator(
        accelerator,
        args,
        checkpoint,
        repo_id,
        model=model,
        parameters=parameter_groups(model),
        vae=vae,
        train_dataset=train_dataset,
        train_dataloader=train_dataloader,
        max_train_steps=max_train_steps,
        prepare_batch=prepare_batch,
        build_pipeline=partial(build_pipeline, vae, scheduler, train_dataset.id2label),
        sample_options={
            "guidance_scale": args.guidance_scale,
            "guidance_schedule": args.guidance_schedule,
            "num_inference_steps": args.num_inference_steps,
            "num_diffusion_steps": args.num_diffusion_steps,
            "temperature": args.temperature,
        },
    )


if __name__ == "__main__":
    main(parse_args(MARTrainingArguments))
