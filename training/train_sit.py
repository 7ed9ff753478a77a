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

import sys
import time

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from huggingface_hub import create_repo
from tqdm.auto import tqdm

from softvq_hf.data import collate_images, load_cached_latents, load_image_dataset
from softvq_hf.data.latents import read_metadata
from softvq_hf.losses import load_teacher
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.accelerator import build_accelerator
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.checkpointing import load_checkpoint, open_output_dir, save_checkpoint
from softvq_hf.training.dataloader import (
    build_dataloader,
    check_dataset_size,
    resolve_max_train_steps,
    training_batches,
    write_unreadable_report,
)
from softvq_hf.training.distributed import averaged_model, backward, place_teacher, prepare_model
from softvq_hf.training.generator import build_ddpm_scheduler, encode_latents, get_latent_shape, load_tokenizer
from softvq_hf.training.generator_arguments import SiTTrainingArguments
from softvq_hf.training.hub import export_pipeline, pipeline_card, push_folder
from softvq_hf.training.logging import (
    MetricsLogger,
    mean_over_batches,
    step_statistics,
    write_run_record,
)
from softvq_hf.training.optimization import (
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    end_batch,
    scaled_learning_rate,
)
from softvq_hf.training.preemption import PREEMPTED_EXIT_CODE, preemption_handler
from softvq_hf.training.randomness import batch_generators
from softvq_hf.training.state import TrainerState
from softvq_hf.training.transformer import TransformerWithLoss, build_transformer
from softvq_hf.training.validation import image_grid


logger = get_logger(__name__)


def build_scheduler(args: SiTTrainingArguments, learned_variance: bool) -> SchedulerMixin:
    """How noise is mixed into the latents: the path of SiT, or the chain of DiT as its authors sample it."""
    if args.objective == "flow_matching":
        return StochasticInterpolantScheduler(path_type=args.path_type)
    return build_ddpm_scheduler(args.beta_schedule, learned_variance)


def build_pipeline(
    args: SiTTrainingArguments,
    vae: AutoencoderSoftVQ | AutoencoderKL,
    transformer: DiTTransformer1DModel,
    scheduler: SchedulerMixin,
    id2label: dict[int, str],
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
    repo_id = args.repo_id
    if args.push_to_hub and accelerator.is_main_process:  # before the work: a token that cannot write is an error now
        repo_id = create_repo(repo_id, token=args.hub_token, private=args.hub_private or None, exist_ok=True).repo_id

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
    accumulation_steps = accelerator.gradient_accumulation_steps
    max_train_steps = resolve_max_train_steps(
        train_dataloader, args.max_train_steps, args.num_train_epochs, accumulation_steps
    )
    args.check_length(max_train_steps)

    # 2. Transformer, scheduler, optimizer. The learning rate's schedule is not prepared: it advances once per update.
    transformer = build_transformer(args, get_latent_shape(vae, args.resolution), train_dataset.num_classes)
    scheduler = build_scheduler(args, transformer.out_channels > transformer.config.in_channels)
    teacher = None
    if args.repa_teacher is not None:
        with accelerator.local_main_process_first():  # one process of a machine downloads
            teacher = load_teacher(args.repa_teacher, args.resolution, args.repa_patch_size)
        place_teacher(accelerator, teacher)
    model = TransformerWithLoss(args, transformer, scheduler, None if teacher is None else teacher.hidden_size)
    learning_rate = scaled_learning_rate(args, args.learning_rate, accelerator.num_processes)
    optimizer = build_optimizer(args, model.parameters(), learning_rate)
    lr_scheduler = build_lr_scheduler(args, optimizer, max_train_steps)
    model, optimizer = prepare_model(accelerator, model, optimizer)
    plain_transformer = accelerator.unwrap_model(model).transformer

    # 3. Averaged weights, and everything as it was at the checkpoint
    ema = build_ema(args, plain_transformer)
    state = TrainerState()
    parts = {"ema": ema, "lr_schedulers": [lr_scheduler]}
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, args, state, **parts)
    write_run_record(accelerator, args, state)
    metrics = MetricsLogger(accelerator, args, state)

    num_classes = train_dataset.num_classes
    sample_classes = torch.linspace(0, num_classes - 1, min(args.num_sample_classes, num_classes)).round().long()
    logger.info(
        f"Training {plain_transformer.num_parameters() / 1e6:.1f}M parameters from step {state.step} to"
        f" {max_train_steps}, {args.train_batch_size} x {accelerator.num_processes} processes x"
        f" {accumulation_steps} accumulated samples per step"
    )

    # 4. Train
    progress = tqdm(
        total=max_train_steps, initial=state.step, desc="generator", disable=not accelerator.is_local_main_process
    )
    model.train()
    values_of_step, update_is_finite, step_started = [], True, time.perf_counter()
    with preemption_handler() as preempted:
        for batch in training_batches(accelerator, train_dataloader, train_dataset, state, max_train_steps):
            step = state.step + 1
            class_labels = batch["class_labels"]
            position = (state.batch - 1) * accelerator.num_processes + accelerator.process_index
            generators = batch_generators(
                args.seed, step, state.epoch, position * args.train_batch_size, len(class_labels)
            )
            teacher_tokens = None
            if args.latents_dir is not None:
                latents = vae.scale_latent(batch["latents"].float())
            else:
                with torch.no_grad(), accelerator.autocast():
                    latents = encode_latents(vae, batch["pixel_values"], generators.samples)
                    if teacher is not None:
                        teacher_tokens = teacher(batch["pixel_values"])

            with accelerator.accumulate(model):
                losses = model(latents, class_labels, generators, teacher_tokens)
                backward(accelerator, model, losses["loss"])
                values, update_is_finite = end_batch(
                    accelerator,
                    args,
                    state,
                    {"grad_norm": (model, optimizer)},
                    losses,
                    update_is_finite,
                    batch["image_id"],
                )

            values_of_step.append(values)
            if not accelerator.sync_gradients:
                continue

            # An optimizer update is done
            state.step = step
            values = mean_over_batches(values_of_step)
            values["learning_rate"] = optimizer.param_groups[0]["lr"]
            lr_scheduler.step()
            if ema is not None and update_is_finite:
                ema.step(plain_transformer.parameters())

            samples = len(latents) * accelerator.num_processes * len(values_of_step)
            values |= step_statistics(accelerator, state, samples, time.perf_counter() - step_started)
            progress.update()
            progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.1f}")
            if step % args.logging_steps == 0:
                metrics.log(values)

            if args.validation_steps > 0 and (step % args.validation_steps == 0 or step == max_train_steps):
                with averaged_model(accelerator, plain_transformer, ema) as averaged_transformer:
                    if accelerator.is_main_process:
                        pipeline = build_pipeline(args, vae, averaged_transformer, scheduler, train_dataset.id2label)
                        pipeline.set_progress_bar_config(desc="samples", leave=False)
                        with accelerator.autocast():
                            images = pipeline(
                                sample_classes.repeat_interleave(args.num_samples_per_class),
                                guidance_scale=args.guidance_scale,
                                num_inference_steps=args.num_inference_steps,
                                generator=torch.Generator().manual_seed(args.seed),  # the same noise at every step
                                output_type="pt",
                            ).images
                        grid = image_grid(images.float().cpu() * 2 - 1, args.num_samples_per_class)
                        metrics.log_image("samples", grid)
                accelerator.wait_for_everyone()
            is_preempted = preempted(accelerator)
            if step % args.checkpointing_steps == 0 or is_preempted:
                save_checkpoint(accelerator, args, state, **parts)
            if is_preempted:
                metrics.close()
                sys.exit(PREEMPTED_EXIT_CODE)
            values_of_step, update_is_finite, step_started = [], True, time.perf_counter()
    progress.close()

    # 5. The result: a pipeline with averaged weights, a model card, and both on the Hub
    write_unreadable_report(accelerator, args.output_dir, state)
    with averaged_model(accelerator, plain_transformer, ema) as averaged_transformer:
        if accelerator.is_main_process:
            pipeline = build_pipeline(args, vae, averaged_transformer, scheduler, train_dataset.id2label)
            card = pipeline_card(
                pipeline,
                repo_id=repo_id,
                dataset_name=args.data_source or read_metadata(args.latents_dir)["dataset"]["source"],
                run_dir=args.output_dir,
                base_model=args.pretrained_model_name_or_path,
            )
            export_pipeline(pipeline, args.output_dir, card)
            if args.push_to_hub:
                url = push_folder(repo_id, args.output_dir, token=args.hub_token)
                logger.info(f"Uploaded to {url}")
    accelerator.wait_for_everyone()
    metrics.close()


if __name__ == "__main__":
    main(parse_args(SiTTrainingArguments))
