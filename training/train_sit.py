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

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from softvq_hf.data import collate_images, load_cached_latents, load_image_dataset
from softvq_hf.data.latents import read_metadata
from softvq_hf.losses import diffusion_loss, flow_matching_loss, sample_flow_times
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.accelerator import build_accelerator
from softvq_hf.training.arguments import TrainingArguments, check_model_config, check_output_dir, parse_args
from softvq_hf.training.checkpointing import find_checkpoint, load_checkpoint, save_checkpoint
from softvq_hf.training.generator import build_ddpm_scheduler, encode_latents, get_latent_shape, load_tokenizer
from softvq_hf.training.hub import export_pipeline, pipeline_card, push_folder, training_command
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

# Arguments that belong to one objective, or depend on it, with their values; the first is taken if none is given.
OBJECTIVES = {
    "flow_matching": {
        "path_type": ("linear", "cosine"),
        "weighting": ("uniform", "lognormal"),
        "sampler": ("ode", "sde"),
    },
    "ddpm": {"beta_schedule": ("squaredcos_cap_v2", "linear"), "sampler": ("ddpm", "ddim")},
}


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

    # objective
    objective: str = field(
        default="flow_matching",
        metadata={
            "help": "Velocity of a flow (SiT), or noise of a DDPM chain (DiT).",
            "choices": [*OBJECTIVES],
        },
    )
    path_type: str | None = field(
        default=None, metadata={"help": "Flow matching: path between data and noise, linear (default) or cosine."}
    )
    weighting: str | None = field(
        default=None, metadata={"help": "Flow matching: density of the times, uniform (default) or lognormal."}
    )
    beta_schedule: str | None = field(
        default=None, metadata={"help": "DDPM: noise schedule, squaredcos_cap_v2 (cosine, default) or linear."}
    )

    # samples: a grid with one row per class every --validation_steps
    sampler: str | None = field(
        default=None,
        metadata={
            "help": "Scheduler of the pipeline. Flow matching: ode (Euler, default) or sde (Euler-Maruyama)."
            " DDPM: ddpm (ancestral, default) or ddim (deterministic)."
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
        for name in ("path_type", "weighting", "beta_schedule", "sampler"):
            allowed = OBJECTIVES[self.objective].get(name, ())
            if getattr(self, name) is None:
                setattr(self, name, allowed[0] if allowed else None)
            elif getattr(self, name) not in allowed:
                raise ValueError(
                    f"`--{name}` is {getattr(self, name)!r}, allowed with `--objective {self.objective}`:"
                    f" {', '.join(allowed) or 'none'}."
                )
        for name in ("num_inference_steps", "num_sample_classes", "num_samples_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if not self.guidance_scale >= 1:
            raise ValueError(f"`--guidance_scale` is {self.guidance_scale}, allowed: numbers from 1 on.")


def build_transformer(
    args: SiTTrainingArguments, latent_shape: tuple[int, ...], num_classes: int
) -> DiTTransformer1DModel:
    """A new transformer for latents of `latent_shape`, or a trained one that fits them."""
    if args.pretrained_model_name_or_path is not None:
        transformer = DiTTransformer1DModel.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="transformer"
        )
    else:
        check_model_config(DiTTransformer1DModel, args.model)
        from_latents = {"num_classes": num_classes}
        if len(latent_shape) == 2:
            from_latents["num_tokens"], in_channels = latent_shape
        else:
            in_channels, sample_size, _ = latent_shape
            patch_size = args.model.get("patch_size", 2)
            from_latents |= {"sample_size": sample_size, "patch_size": patch_size}
            from_latents["num_tokens"] = (sample_size // patch_size) ** 2
        if args.objective == "ddpm":
            from_latents |= {"out_channels": 2 * in_channels, "timestep_scale": 1.0}
        transformer = DiTTransformer1DModel(**{"in_channels": in_channels, **from_latents, **args.model})
        transformer.initialize_weights()

    config = transformer.config
    names = ("in_channels", "sample_size", "sample_size") if transformer.is_2d else ("num_tokens", "in_channels")
    expected_shape = tuple(config[name] for name in names)
    if expected_shape != latent_shape:
        raise ValueError(
            f"The transformer takes latents of shape {expected_shape} ({', '.join(names)}), allowed: {latent_shape},"
            " as the tokenizer makes them."
        )
    if args.objective == "flow_matching" and transformer.out_channels != config.in_channels:
        raise ValueError(
            f"`out_channels` is {transformer.out_channels}, allowed for a velocity: {config.in_channels}."
        )
    if args.objective == "ddpm" and config.timestep_scale != 1.0:
        raise ValueError(
            f"`timestep_scale` is {config.timestep_scale}, allowed with `--objective ddpm`: 1.0. A transformer that"
            " predicts a velocity has another one."
        )
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


def compute_losses(
    args: SiTTrainingArguments,
    transformer: torch.nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    class_dropout_prob: float,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """The loss and its terms by name, averaged over the batch. All draws come from `generator`, on the CPU."""
    batch_size, device = len(latents), latents.device
    if args.objective == "flow_matching":
        times = sample_flow_times(batch_size, args.weighting, args.path_type, generator, device)
    else:
        num_timesteps = scheduler.config.num_train_timesteps
        timesteps = torch.randint(num_timesteps, (batch_size,), generator=generator).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    dropout = {}
    if class_dropout_prob > 0:
        dropped = torch.rand(batch_size, generator=generator) < class_dropout_prob
        dropout["force_drop_ids"] = dropped.to(device)

    if args.objective == "flow_matching":
        losses = flow_matching_loss(transformer, scheduler, latents, class_labels, times, noise, **dropout)
        return {"loss": losses.mean()}
    losses = diffusion_loss(transformer, scheduler, latents, class_labels, timesteps, noise, **dropout)
    return {name: value.mean() for name, value in losses.items()}


def main(args: SiTTrainingArguments) -> None:
    check_output_dir(args.output_dir)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    accelerator = build_accelerator(args)
    device = accelerator.device
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
                label_column=args.label_column,
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
    train_dataloader = DataLoader(
        train_dataset,
        batch_size=args.train_batch_size,
        shuffle=not isinstance(train_dataset, IterableDataset),
        drop_last=True,
        collate_fn=None if args.latents_dir is not None else collate_images,
        num_workers=args.dataloader_num_workers,
    )
    train_dataloader = prepare_dataloader(accelerator, train_dataloader)

    # 2. Transformer, scheduler, optimizer. The learning rate's schedule is not prepared: it advances once per update.
    transformer = build_transformer(args, get_latent_shape(vae, args.resolution), train_dataset.num_classes)
    scheduler = build_scheduler(args, transformer.out_channels > transformer.config.in_channels)
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

    pipeline = build_pipeline(args, vae, plain_transformer, scheduler, train_dataset.id2label)
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
            latents = vae.scale_latent(batch["latents"].float())
        else:
            with torch.no_grad(), accelerator.autocast():
                latents = encode_latents(vae, batch["pixel_values"], generator)

        with accelerator.accumulate(transformer):
            losses = compute_losses(args, transformer, scheduler, latents, class_labels, class_dropout_prob, generator)
            values = reduce_losses(accelerator, losses, step)

            accelerator.backward(losses["loss"])
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
            repo_id=repo_id,
            dataset_name=args.data_source or read_metadata(args.latents_dir)["dataset"]["source"],
            training_command=training_command(accelerator.num_processes, accelerator.mixed_precision),
            training_settings=args.to_dict(),
            base_model=args.pretrained_model_name_or_path,
        )
        with averaged_weights(ema, plain_transformer):
            export_pipeline(pipeline, args.output_dir, card)
        if args.push_to_hub:
            url = push_folder(repo_id, args.output_dir, token=args.hub_token)
            logger.info(f"Uploaded to {url}")
    metrics.close()


if __name__ == "__main__":
    main(parse_args(SiTTrainingArguments))
