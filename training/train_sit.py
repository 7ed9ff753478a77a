"""Train SiT, a class-conditional flow-matching transformer (arXiv 2401.08740), on the latents of a tokenizer.

    accelerate launch training/cache_latents.py ...
    accelerate launch training/train_sit.py --config training/configs/sit_xl.yaml --latents_dir latents

The latents are read from a folder of `training/cache_latents.py`, or made on the fly from images by `--vae`. Either
way they are normalised by `AutoencoderSoftVQ.scale_latent`. `--output_dir` becomes a complete pipeline folder
(transformer with averaged weights, tokenizer, scheduler), with checkpoints, metrics and sample grids beside it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate.logging import get_logger
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from softvq_hf.data import collate_images, load_cached_latents, load_image_dataset
from softvq_hf.data.latents import read_metadata
from softvq_hf.losses import flow_matching_loss, sample_flow_times
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.accelerator import build_accelerator
from softvq_hf.training.arguments import TrainingArguments, check_model_config, check_output_dir, parse_args
from softvq_hf.training.checkpointing import find_checkpoint, load_checkpoint, save_checkpoint
from softvq_hf.training.hub import export_pipeline, pipeline_card, push_folder
from softvq_hf.training.logging import MetricsLogger, mean_over_batches, reduce_losses
from softvq_hf.training.optimization import (
    build_lr_scheduler,
    build_optimizer,
    clip_gradients,
    scaled_learning_rate,
    step_generator,
)
from softvq_hf.training.state import (
    TrainerState,
    check_dataset_size,
    prepare_dataloader,
    resolve_max_train_steps,
    training_batches,
)
from softvq_hf.training.validation import averaged_weights, image_grid


logger = get_logger(__name__)


@dataclass(kw_only=True)
class SiTTrainingArguments(TrainingArguments):
    """Arguments of this script besides the common ones: the transformer, its latents and its samples."""

    # latents: cached, or made from the images of --dataset_name or --train_data_dir
    latents_dir: str | None = field(default=None, metadata={"help": "Folder written by training/cache_latents.py."})
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    vae: str | None = field(
        default=None, metadata={"help": "Tokenizer (a folder or a Hub id) that encodes the images; it stays frozen."}
    )

    # transformer
    model: dict | str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a new DiTTransformer1DModel: a mapping in YAML, JSON here. Tokens, channels and"
            " classes come from the latents where they are not given."
        },
    )
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pipeline (a folder or a Hub id) whose transformer to go on from."}
    )

    # flow matching
    path_type: str = field(
        default="linear", metadata={"help": "Path between data and noise.", "choices": ["linear", "cosine"]}
    )
    weighting: str = field(
        default="uniform", metadata={"help": "Density of the times.", "choices": ["uniform", "lognormal"]}
    )

    # samples: a grid with one row per class every --validation_steps
    sampler: str = field(
        default="ode",
        metadata={
            "help": "Scheduler of the pipeline: Euler (ode) or Euler-Maruyama (sde).",
            "choices": ["ode", "sde"],
        },
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the sampler in sample grids."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance in sample grids; 1 = off."})
    num_sample_classes: int = field(default=8, metadata={"help": "Classes in a sample grid, spread over all of them."})
    num_samples_per_class: int = field(default=4, metadata={"help": "Samples of each class in a grid."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents_dir is not None and (self.data_source is not None or self.vae is not None):
            raise ValueError(
                f"`--latents_dir` is {self.latents_dir!r}, which brings images and tokenizer along: leave out"
                " `--dataset_name`, `--train_data_dir` and `--vae`."
            )
        if self.latents_dir is None and (self.data_source is None or self.vae is None):
            raise ValueError(
                "Latents are missing: give `--latents_dir`, or images (`--dataset_name` or `--train_data_dir`) and the"
                " tokenizer (`--vae`) that encodes them."
            )
        if (self.model is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                f"`--model` is {self.model!r} and `--pretrained_model_name_or_path` is"
                f" {self.pretrained_model_name_or_path!r}, allowed: exactly one of them."
            )
        for name in ("num_inference_steps", "num_sample_classes", "num_samples_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if not self.guidance_scale >= 1:
            raise ValueError(f"`--guidance_scale` is {self.guidance_scale}, allowed: numbers from 1 on.")


def build_transformer(
    args: SiTTrainingArguments, latent_shape: tuple[int, int], num_classes: int
) -> DiTTransformer1DModel:
    """A new transformer for latents of `latent_shape` (tokens, channels), or a trained one that fits them."""
    num_tokens, in_channels = latent_shape
    if args.pretrained_model_name_or_path is not None:
        transformer = DiTTransformer1DModel.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="transformer"
        )
    else:
        check_model_config(DiTTransformer1DModel, args.model)
        from_latents = {"num_tokens": num_tokens, "in_channels": in_channels, "num_classes": num_classes}
        transformer = DiTTransformer1DModel(**{**from_latents, **args.model})
        transformer.initialize_weights()

    config = transformer.config
    if (config.num_tokens, config.in_channels) != (num_tokens, in_channels):
        raise ValueError(
            f"The transformer takes `num_tokens` {config.num_tokens} of `in_channels` {config.in_channels}, the"
            f" latents have {num_tokens} tokens of {in_channels} channels."
        )
    if transformer.out_channels != in_channels:
        raise ValueError(f"`out_channels` is {transformer.out_channels}, allowed for a velocity: {in_channels}.")
    if config.num_classes < num_classes:
        raise ValueError(f"`num_classes` is {config.num_classes}, allowed: {num_classes}, as in the data, or more.")
    if args.guidance_scale > 1 and config.class_dropout_prob == 0:
        raise ValueError(
            f"`--guidance_scale` is {args.guidance_scale}, allowed: 1 for a transformer without label dropout"
            " (`class_dropout_prob` is 0)."
        )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def build_pipeline(
    args: SiTTrainingArguments, vae: AutoencoderSoftVQ, transformer: DiTTransformer1DModel, id2label: dict[int, str]
) -> SoftVQPipeline:
    """The pipeline that is sampled from and saved."""
    if args.sampler == "sde":
        scheduler = StochasticInterpolantScheduler(path_type=args.path_type)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()  # the ODE is the same for both paths
    return SoftVQPipeline(vae=vae, transformer=transformer, scheduler=scheduler, id2label=id2label)


def main(args: SiTTrainingArguments) -> None:
    check_output_dir(args.output_dir)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    accelerator = build_accelerator(args)
    device = accelerator.device

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
                label_column=args.label_column,
                **args.dataset_options(),
            )
            vae = AutoencoderSoftVQ.from_pretrained(args.vae)
            if (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0):
                logger.warning(
                    f"The tokenizer {args.vae} has no latent statistics (`scaling_factor` 1, `shift_factor` 0), so"
                    " latents are NOT normalised. training/cache_latents.py measures them and saves a tokenizer that"
                    " has them."
                )
            if vae.config.sample_size not in (args.resolution, [args.resolution] * 2):
                raise ValueError(f"`--resolution` is {args.resolution}, the tokenizer takes {vae.config.sample_size}.")
    vae.requires_grad_(False).eval().to(device)
    check_dataset_size(train_dataset, args.train_batch_size, accelerator.num_processes)
    train_dataloader = DataLoader(
        train_dataset,
        batch_size=args.train_batch_size,
        shuffle=not isinstance(train_dataset, IterableDataset),
        drop_last=True,
        collate_fn=None if args.latents_dir is not None else collate_images,
        num_workers=args.dataloader_num_workers,
    )
    train_dataloader = prepare_dataloader(accelerator, train_dataloader)

    # 2. Transformer, path, optimizer. The schedule is not prepared: it advances by hand, once per update.
    latent_shape = (vae.config.num_latent_tokens, vae.config.latent_channels)
    transformer = build_transformer(args, latent_shape, train_dataset.num_classes)
    path = StochasticInterpolantScheduler(path_type=args.path_type)
    max_train_steps = resolve_max_train_steps(
        train_dataloader, args.max_train_steps, args.num_train_epochs, args.gradient_accumulation_steps
    )
    learning_rate = scaled_learning_rate(args, args.learning_rate, accelerator.num_processes)
    optimizer = build_optimizer(args, transformer.parameters(), learning_rate)
    lr_scheduler = build_lr_scheduler(args, optimizer, max_train_steps)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    plain_transformer = accelerator.unwrap_model(transformer)
    class_dropout_prob = plain_transformer.config.class_dropout_prob

    # 3. Averaged weights, and everything as it was at the checkpoint
    ema = None
    if args.use_ema:
        ema = EMAModel(plain_transformer.parameters(), decay=args.ema_decay, min_decay=args.ema_decay, foreach=True)
        ema.optimization_step = 1  # with min_decay: the constant decay from the first update on
    state = TrainerState()
    parts = {"ema": ema, "lr_schedulers": [lr_scheduler]}
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, state, **parts)
    metrics = MetricsLogger(accelerator, args, state)
    if accelerator.is_main_process:
        Path(args.output_dir, "args.yaml").write_text(yaml.safe_dump(args.to_dict(), sort_keys=False))

    pipeline = build_pipeline(args, vae, plain_transformer, train_dataset.id2label)
    pipeline.set_progress_bar_config(desc="samples", leave=False)
    num_classes = train_dataset.num_classes
    sample_classes = torch.linspace(0, num_classes - 1, min(args.num_sample_classes, num_classes)).round().long()
    logger.info(
        f"Training {plain_transformer.num_parameters() / 1e6:.1f}M parameters from step {state.step} to"
        f" {max_train_steps}, {args.train_batch_size} x {accelerator.num_processes} processes x"
        f" {args.gradient_accumulation_steps} accumulated samples per step"
    )

    # 4. Train
    progress = tqdm(
        total=max_train_steps, initial=state.step, desc="generator", disable=not accelerator.is_local_main_process
    )
    transformer.train()
    values_of_step, step_started = [], time.perf_counter()
    for batch in training_batches(accelerator, train_dataloader, train_dataset, state, max_train_steps):
        generator = step_generator(args.seed, state.epoch, state.batch, accelerator.process_index)
        step = state.step + 1
        class_labels = batch["class_labels"]
        if args.latents_dir is not None:
            latents = batch["latents"]
        else:
            with torch.no_grad(), accelerator.autocast():
                latents = vae.encode(batch["pixel_values"]).latent
        latents = vae.scale_latent(latents.float())

        with accelerator.accumulate(transformer):
            times = sample_flow_times(len(latents), args.weighting, args.path_type, generator, device)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            dropout = {}
            if class_dropout_prob > 0:
                dropped = torch.rand(len(latents), generator=generator) < class_dropout_prob
                dropout["force_drop_ids"] = dropped.to(device)
            loss = flow_matching_loss(transformer, path, latents, class_labels, times, noise, **dropout).mean()
            values = reduce_losses(accelerator, {"loss": loss}, step)

            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = clip_gradients(accelerator, optimizer, transformer.parameters(), args.max_grad_norm)
                values["grad_norm"] = norm.item()
            optimizer.step()
            optimizer.zero_grad()

        values_of_step.append(values)
        if not accelerator.sync_gradients:
            continue

        # An optimizer update is done
        state.step = step
        values = mean_over_batches(values_of_step)
        values["learning_rate"] = optimizer.param_groups[0]["lr"]
        lr_scheduler.step()
        if ema is not None:
            ema.step(plain_transformer.parameters())

        samples = len(latents) * accelerator.num_processes * len(values_of_step)
        values["images_per_second"] = samples / (time.perf_counter() - step_started)
        progress.update()
        progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.1f}")
        if step % args.logging_steps == 0:
            metrics.log(values)

        if args.validation_steps > 0 and (step % args.validation_steps == 0 or step == max_train_steps):
            if accelerator.is_main_process:
                with averaged_weights(ema, plain_transformer), accelerator.autocast():
                    images = pipeline(
                        sample_classes.repeat_interleave(args.num_samples_per_class),
                        guidance_scale=args.guidance_scale,
                        num_inference_steps=args.num_inference_steps,
                        generator=torch.Generator().manual_seed(args.seed),  # the same noise at every step
                        output_type="pt",
                    ).images
                metrics.log_image("samples", image_grid(images.float().cpu() * 2 - 1, args.num_samples_per_class))
            accelerator.wait_for_everyone()
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, state, args.checkpoints_total_limit, **parts)
        values_of_step, step_started = [], time.perf_counter()
    progress.close()

    # 5. The result: a pipeline with averaged weights, a model card, and both on the Hub
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        card = pipeline_card(
            pipeline,
            repo_id=args.repo_id,
            dataset_name=args.data_source or read_metadata(args.latents_dir)["dataset"]["source"],
            training_settings=args.to_dict(),
            base_model=args.pretrained_model_name_or_path,
        )
        with averaged_weights(ema, plain_transformer):
            export_pipeline(pipeline, args.output_dir, card)
        if args.push_to_hub:
            url = push_folder(args.repo_id, args.output_dir, token=args.hub_token, private=args.hub_private)
            logger.info(f"Uploaded to {url}")
    metrics.close()


if __name__ == "__main__":
    main(parse_args(SiTTrainingArguments))
