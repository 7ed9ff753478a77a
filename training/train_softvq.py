"""Train a SoftVQ-VAE tokenizer (arXiv 2412.10958), or one of its VQ, KL, plain and MAETok siblings, with accelerate.

    accelerate launch training/train_softvq.py --config training/configs/softvq_l_64.yaml

Every batch is seen twice: by the tokenizer (reconstruction, quantizer, perceptual, adversarial and alignment losses)
and, as detached reconstructions beside the originals, by the discriminator. `--output_dir` becomes a folder for
`AutoencoderSoftVQ.from_pretrained`, with checkpoints, metrics and pictures beside the weights.
"""

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from softvq_hf.data import ImageDataset, StreamingImageDataset, collate_images, load_image_dataset
from softvq_hf.losses import (
    LeCAMRegularizer,
    PerceptualLoss,
    adversarial_weight,
    build_discriminator,
)
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
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
from softvq_hf.training.fine_tuning import merged_tokenizer
from softvq_hf.training.hub import create_run_repo, export_model, push_folder, tokenizer_card
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
from softvq_hf.training.tokenizer import (
    TokenizerWithHeads,
    build_tokenizer,
    discriminator_losses,
    load_teachers,
    tokenizer_losses,
)
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments
from softvq_hf.training.validation import evaluate_reconstruction, reconstruction_grid


logger = get_logger(__name__)


def load_datasets(
    args: SoftVQTrainingArguments,
) -> tuple[ImageDataset | StreamingImageDataset, ImageDataset | StreamingImageDataset | None]:
    """The images to train on and, unless it is off, those to validate on. A tokenizer needs no labels."""
    options = {"label_column": None, **args.dataset_options()}
    train_dataset = load_image_dataset(
        args.data_source,
        split=args.train_split,
        train=True,
        max_samples=args.max_train_samples,
        jpeg_draft=args.jpeg_draft,
        fast_resize=args.fast_resize,
        **options,
    )
    if args.validation_steps == 0:
        return train_dataset, None
    try:
        validation_dataset = load_image_dataset(
            args.data_source,
            split=args.validation_split,
            train=False,
            max_samples=args.max_validation_samples,
            **options,
        )
    except ValueError as error:
        raise ValueError(
            f"No validation images: {error} `--validation_split` names another split, `--validation_steps 0` trains"
            " without."
        ) from error
    return train_dataset, validation_dataset


def save_result(
    args: SoftVQTrainingArguments,
    accelerator: Accelerator,
    tokenizer: AutoencoderSoftVQ,
    repo_id: str,
    metrics: MetricsLogger,
    validation_dataset: ImageDataset | StreamingImageDataset | None,
) -> None:
    """Write the tokenizer and its card to the output folder, adapters beside it, and upload them if asked for."""
    if "lora" in (args.encoder_tuning, args.decoder_tuning):
        tokenizer.save_lora_adapter(Path(args.output_dir, "lora"))
        tokenizer = merged_tokenizer(tokenizer)
    card = tokenizer_card(
        tokenizer,
        repo_id=repo_id,
        dataset_name=args.data_source,
        metrics={name: value for name, value in metrics.last_validation().items() if name == "psnr"},
        evaluation_dataset=f"the {args.validation_split} split of {args.data_source}",
        num_evaluation_images=None if args.streaming or validation_dataset is None else len(validation_dataset),
        evaluation_protocol=f"PSNR in dB, the mean over images of {args.resolution} x {args.resolution} pixels of"
        f" each one's own; pixels clamped to [0, 1], {'averaged' if args.use_ema else 'last'} weights, mixed"
        f" precision: {accelerator.mixed_precision}.",
        run_dir=args.output_dir,
        base_model=args.pretrained_model_name_or_path or args.encoder_init,
    )
    export_model(tokenizer, args.output_dir, card)
    if args.push_to_hub:
        url = push_folder(repo_id, args.output_dir, token=args.hub_token)
        logger.info(f"Uploaded to {url}")


def main(args: SoftVQTrainingArguments) -> None:
    check_output_dir(args.output_dir)
    accelerator = build_accelerator(args)
    device = accelerator.device
    checkpoint = open_output_dir(accelerator, args)
    if args.adaptive_adversarial_weight and accelerator.mixed_precision == "fp16":
        raise ValueError(
            "`--adaptive_adversarial_weight` compares gradients that are too small for fp16, allowed with it:"
            " `--mixed_precision bf16` or no."
        )
    repo_id = create_run_repo(accelerator, args)

    # 1. Data
    with accelerator.main_process_first():
        train_dataset, validation_dataset = load_datasets(args)
    check_dataset_size(train_dataset, args.train_batch_size, accelerator.num_processes)
    loader_options = {"collate_fn": collate_images, "num_workers": args.dataloader_num_workers}
    train_dataloader = build_dataloader(
        accelerator, train_dataset, args.train_batch_size, train=True, **loader_options
    )
    if validation_dataset is not None:
        validation_dataloader = build_dataloader(
            accelerator, validation_dataset, args.train_batch_size, train=False, **loader_options
        )
    accumulation_steps = accelerator.gradient_accumulation_steps
    max_train_steps = resolve_max_train_steps(
        train_dataloader, args.max_train_steps, args.num_train_epochs, accumulation_steps
    )
    args.check_length(max_train_steps)

    # 2. The tokenizer and what judges it: perceptual loss, discriminator, alignment to a teacher
    with accelerator.local_main_process_first():  # one process of a machine downloads
        plain_tokenizer = build_tokenizer(args)
        teachers = load_teachers(args, plain_tokenizer)
        perceptual_loss = discriminator = lecam = None
        if args.perceptual_weight > 0:
            perceptual_loss = PerceptualLoss(args.perceptual_trunk, dropout=args.perceptual_dropout).train()
        if args.discriminator != "none":
            backbone = {} if args.discriminator_backbone is None else {"backbone": args.discriminator_backbone}
            discriminator = build_discriminator(args.discriminator, **backbone)
            if args.resolution < getattr(discriminator, "min_image_size", 1):
                raise ValueError(
                    f"`--resolution` is {args.resolution}, allowed with `--discriminator {args.discriminator}`:"
                    f" {discriminator.min_image_size} or more."
                )
    for teacher in teachers.values():
        place_teacher(accelerator, teacher)
    if perceptual_loss is not None:
        perceptual_loss.to(device)
    if accelerator.num_processes > 1:
        plain_tokenizer.enable_synchronized_entropy()
    if discriminator is not None:
        if accelerator.num_processes > 1 and device.type == "cuda":
            discriminator = torch.nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        if args.lecam_weight > 0:
            lecam = LeCAMRegularizer().to(device)
    if args.channels_last:
        for convolutional in (perceptual_loss, discriminator):
            if convolutional is not None:
                convolutional.to(memory_format=torch.channels_last)

    # 3. Optimizers, each with its module. Schedules are not prepared: they advance by hand, once per update.
    model = TokenizerWithHeads(args, plain_tokenizer, teachers)
    learning_rate = scaled_learning_rate(args, args.learning_rate, accelerator.num_processes)
    optimizer = build_optimizer(args, model.parameters(), learning_rate)
    lr_schedulers = [build_lr_scheduler(args, optimizer, max_train_steps)]
    model, optimizer = prepare_model(accelerator, model, optimizer)
    models = [model]
    if discriminator is not None:
        discriminator_learning_rate = scaled_learning_rate(
            args, args.discr_learning_rate or args.learning_rate, accelerator.num_processes
        )
        discriminator_optimizer = build_optimizer(args, discriminator.parameters(), discriminator_learning_rate)
        lr_schedulers.append(build_lr_scheduler(args, discriminator_optimizer, max_train_steps))
        discriminator, discriminator_optimizer = prepare_model(accelerator, discriminator, discriminator_optimizer)
        models.append(discriminator)
    plain_tokenizer = accelerator.unwrap_model(model).tokenizer

    # 4. Averaged weights, and everything as it was at the checkpoint
    ema = build_ema(args, plain_tokenizer)
    state = TrainerState()
    parts = {"ema": ema, "lr_schedulers": lr_schedulers, "buffers": {} if lecam is None else {"lecam": lecam}}
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, args, state, **parts)
    write_run_record(accelerator, args, state)
    metrics = MetricsLogger(accelerator, args, state)
    logger.info(
        f"Training {plain_tokenizer.num_parameters(only_trainable=True) / 1e6:.1f}M of"
        f" {plain_tokenizer.num_parameters() / 1e6:.1f}M parameters from step {state.step} to {max_train_steps},"
        f" {args.train_batch_size} x {accelerator.num_processes} processes x {accumulation_steps} accumulated images"
        " per step"
    )

    # 5. Train
    progress = tqdm(
        total=max_train_steps, initial=state.step, desc="tokenizer", disable=not accelerator.is_local_main_process
    )
    model.train()
    values_of_step, update_is_finite, step_started = [], True, time.perf_counter()
    with preemption_handler() as preempted:
        for batch in training_batches(accelerator, train_dataloader, train_dataset, state, max_train_steps):
            step = state.step + 1
            pixel_values = batch["pixel_values"]
            position = (state.batch - 1) * accelerator.num_processes + accelerator.process_index
            generators = batch_generators(
                args.seed, step, state.epoch, position * args.train_batch_size, len(pixel_values)
            )
            adversarial = 0.0
            if discriminator is not None:
                adversarial = adversarial_weight(
                    step, args.adversarial_weight, args.adversarial_start, args.adversarial_warmup_steps
                )

            with accelerator.accumulate(*models):
                # Tokenizer: reconstruct, and add up what is wrong with it
                judges = (teachers, perceptual_loss, discriminator, adversarial)
                output, losses = tokenizer_losses(args, accelerator, model, *judges, pixel_values, generators, step)
                backward(accelerator, model, losses["loss"])
                trained = {"grad_norm": (model, optimizer)}

                # Discriminator: tell the same reconstructions, detached, from the originals
                if adversarial > 0:
                    losses |= discriminator_losses(
                        args, discriminator, lecam, adversarial, pixel_values, output.sample, generators
                    )
                    backward(accelerator, discriminator, losses["discriminator_loss"])
                    trained["discriminator_grad_norm"] = (discriminator, discriminator_optimizer)

                values, update_is_finite = end_batch(
                    accelerator, args, state, trained, losses, update_is_finite, batch["image_id"]
                )

            values_of_step.append(values)
            if not accelerator.sync_gradients:
                continue

            # An optimizer update is done
            state.step = step
            values = mean_over_batches(values_of_step)
            values["learning_rate"] = optimizer.param_groups[0]["lr"]
            for lr_scheduler in lr_schedulers:
                lr_scheduler.step()
            if ema is not None and update_is_finite:
                ema.step(plain_tokenizer.parameters())

            images = len(pixel_values) * accelerator.num_processes * len(values_of_step)
            values |= step_statistics(accelerator, state, images, time.perf_counter() - step_started)
            progress.update()
            progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.1f}")
            if step % args.logging_steps == 0:
                metrics.log(values)

            if args.validation_steps > 0 and (step % args.validation_steps == 0 or step == max_train_steps):
                with averaged_model(accelerator, plain_tokenizer, ema) as averaged_tokenizer:
                    quality, originals, reconstructions = evaluate_reconstruction(
                        accelerator, averaged_tokenizer, validation_dataloader, args.num_validation_images
                    )
                metrics.log({f"validation/{name}": value for name, value in quality.items()})
                if accelerator.is_main_process:
                    metrics.log_image("validation", reconstruction_grid(originals, reconstructions))
            is_preempted = preempted(accelerator)
            if step % args.checkpointing_steps == 0 or is_preempted:
                save_checkpoint(accelerator, args, state, **parts)
            if is_preempted:
                metrics.close()
                sys.exit(PREEMPTED_EXIT_CODE)
            values_of_step, update_is_finite, step_started = [], True, time.perf_counter()
    progress.close()

    # 6. The result: averaged weights, a model card, and both on the Hub
    write_unreadable_report(accelerator, args.output_dir, state)
    with averaged_model(accelerator, plain_tokenizer, ema) as averaged_tokenizer:
        if accelerator.is_main_process:
            save_result(args, accelerator, averaged_tokenizer, repo_id, metrics, validation_dataset)
    accelerator.wait_for_everyone()
    metrics.close()


if __name__ == "__main__":
    main(parse_args(SoftVQTrainingArguments))
