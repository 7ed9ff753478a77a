"""How generators are trained, whatever their loss: the loop of `training/train_sit.py` and `training/train_mar.py`."""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline, ModelMixin
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from softvq_hf.data import ImageDataset
from softvq_hf.data.latents import LatentDataset, read_metadata
from softvq_hf.training.checkpointing import load_checkpoint, save_checkpoint
from softvq_hf.training.dataloader import resolve_max_train_steps, training_batches, write_unreadable_report
from softvq_hf.training.distributed import averaged_model, backward, prepare_model
from softvq_hf.training.generator import describe_tokenizer
from softvq_hf.training.generator_arguments import GeneratorTrainingArguments
from softvq_hf.training.hub import export_pipeline, pipeline_card, push_folder
from softvq_hf.training.logging import MetricsLogger, mean_over_batches, step_statistics, write_run_record
from softvq_hf.training.optimization import (
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    end_batch,
    scaled_learning_rate,
)
from softvq_hf.training.preemption import PREEMPTED_EXIT_CODE, preemption_handler
from softvq_hf.training.randomness import BatchGenerators, batch_generators
from softvq_hf.training.state import TrainerState
from softvq_hf.training.validation import image_grid


logger = get_logger(__name__)


def check_length(accelerator: Accelerator, args: GeneratorTrainingArguments, train_dataloader: DataLoader) -> int:
    """Number of updates of the run, checked before anything large is built or downloaded for it."""
    max_train_steps = resolve_max_train_steps(
        train_dataloader, args.max_train_steps, args.num_train_epochs, accelerator.gradient_accumulation_steps
    )
    args.check_length(max_train_steps)
    return max_train_steps


def train_generator(
    accelerator: Accelerator,
    args: GeneratorTrainingArguments,
    checkpoint: Path | None,
    repo_id: str | None,
    *,
    model: torch.nn.Module,
    parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]],
    vae: ModelMixin,
    train_dataset: ImageDataset | LatentDataset,
    train_dataloader: DataLoader,
    max_train_steps: int,
    prepare_batch: Callable[[dict[str, Any], BatchGenerators], tuple[torch.Tensor, ...]],
    build_pipeline: Callable[[ModelMixin], DiffusionPipeline],
    sample_options: dict[str, Any],
) -> None:
    """
    Train, validate, write checkpoints, and leave a pipeline with averaged weights in `args.output_dir`.

    Args:
        accelerator (`Accelerator`): The accelerator; nothing but the loader has been prepared.
        args (`GeneratorTrainingArguments`): Everything that is the same for all generators.
        checkpoint (`Path`, *optional*): The checkpoint to resume from, as `open_output_dir` finds it.
        repo_id (`str`, *optional*): Hub repository of the result, from [`~softvq_hf.training.hub.create_run_repo`].
        model (`torch.nn.Module`):
            Called as `model(latents, class_labels, generators, *rest)`, gives "loss" and other scalars by name. Its
            `transformer` is averaged and saved.
        parameters: Those of `model`, or groups of them, as optimizers of torch take them.
        vae (`ModelMixin`): The tokenizer of the latents. A checkpoint of another one is not resumed.
        train_dataset ([`ImageDataset`] or [`LatentDataset`]): What is trained on.
        train_dataloader (`DataLoader`): Its batches, with "class_labels" and "image_id".
        max_train_steps (`int`): From [`check_length`].
        prepare_batch (`Callable`): Makes latents of a batch, and `rest`.
        build_pipeline (`Callable`): Makes the pipeline that is sampled from and saved, of the averaged transformer.
        sample_options (`dict`): Arguments of the pipeline for grids of samples, besides labels and generator.
    """
    accumulation_steps = accelerator.gradient_accumulation_steps

    # 1. Optimizer. The learning rate's schedule is not prepared: it advances once per update.
    learning_rate = scaled_learning_rate(args, args.learning_rate, accelerator.num_processes)
    optimizer = build_optimizer(args, parameters, learning_rate)
    lr_scheduler = build_lr_scheduler(args, optimizer, max_train_steps)
    model, optimizer = prepare_model(accelerator, model, optimizer)
    plain_transformer = accelerator.unwrap_model(model).transformer

    # 2. Averaged weights, and everything as it was at the checkpoint
    ema = build_ema(args, plain_transformer)
    state = TrainerState()
    parts = {"ema": ema, "lr_schedulers": [lr_scheduler], "tokenizer": describe_tokenizer(vae)}
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

    # 3. Train
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
            latents, *rest = prepare_batch(batch, generators)

            with accelerator.accumulate(model):
                losses = model(latents, class_labels, generators, *rest)
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
                        pipeline = build_pipeline(averaged_transformer)
                        pipeline.set_progress_bar_config(desc="samples", leave=False)
                        with accelerator.autocast():
                            images = pipeline(
                                sample_classes.repeat_interleave(args.num_samples_per_class),
                                generator=torch.Generator().manual_seed(args.seed),  # the same noise at every step
                                output_type="pt",
                                **sample_options,
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

    # 4. The result: a pipeline with averaged weights, a model card, and both on the Hub
    write_unreadable_report(accelerator, args.output_dir, state)
    with averaged_model(accelerator, plain_transformer, ema) as averaged_transformer:
        if accelerator.is_main_process:
            pipeline = build_pipeline(averaged_transformer)
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
