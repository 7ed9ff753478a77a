"""Train a SoftVQ-VAE tokenizer (arXiv 2412.10958), or one of its VQ, KL and plain siblings, with accelerate.

    accelerate launch training/train_softvq.py --config training/configs/softvq_l_64.yaml

Every batch is seen twice: by the tokenizer (reconstruction, quantizer, perceptual, adversarial and alignment losses)
and, as detached reconstructions beside the originals, by the discriminator. `--output_dir` becomes a folder for
`AutoencoderSoftVQ.from_pretrained`, with checkpoints, metrics and pictures beside the weights.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from softvq_hf.conversion.dinov2 import load_dinov2, load_dinov2_encoder
from softvq_hf.data import collate_images, load_image_dataset
from softvq_hf.losses import (
    ADVERSARIAL_LOSSES,
    ALIGNMENT_MODES,
    DISCRIMINATORS,
    AlignmentLoss,
    LeCAMRegularizer,
    PerceptualLoss,
    PerceptualWeightsUnavailable,
    adaptive_weight,
    adversarial_weight,
    build_discriminator,
    frozen_discriminator,
    load_teacher,
    warmup_weight,
)
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.accelerator import build_accelerator
from softvq_hf.training.arguments import TrainingArguments, check_model_config, check_output_dir, parse_args
from softvq_hf.training.checkpointing import find_checkpoint, load_checkpoint, save_checkpoint
from softvq_hf.training.hub import export_model, push_folder, tokenizer_card, training_command
from softvq_hf.training.logging import MetricsLogger, mean_over_batches, reduce_losses
from softvq_hf.training.masking import sample_patch_mask
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
from softvq_hf.training.validation import averaged_weights, evaluate_reconstruction, reconstruction_grid


logger = get_logger(__name__)


@dataclass(kw_only=True)
class SoftVQTrainingArguments(TrainingArguments):
    """Arguments of this script besides the common ones: the tokenizer and the weights of its losses."""

    # tokenizer
    model: dict | str | None = field(
        default=None, metadata={"help": "Configuration of a new AutoencoderSoftVQ: a mapping in YAML, JSON here."}
    )
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer to go on from, instead of --model: a folder or a Hub id."}
    )
    encoder_init: str | None = field(
        default=None, metadata={"help": "DINOv2 (a folder or a Hub id) whose weights a new encoder starts from."}
    )

    # masked patches (MAETok), for a tokenizer with `encoder_mask_token`
    mask_ratio_min: float = field(default=0.0, metadata={"help": "Smallest share of masked patches of an image."})
    mask_ratio_max: float = field(default=0.0, metadata={"help": "Largest and most likely share; 0 masks nothing."})

    # losses
    reconstruction_loss: str = field(default="l2", metadata={"help": "Distance of pixels.", "choices": ["l1", "l2"]})
    reconstruction_weight: float = field(default=1.0, metadata={"help": "Weight of the pixel distance."})
    entropy_weight: float = field(default=0.01, metadata={"help": "Weight of the codebook entropy (softvq, vq)."})
    vq_weight: float = field(default=1.0, metadata={"help": "Weight of the loss that moves codewords (vq)."})
    commit_weight: float = field(default=0.25, metadata={"help": "Weight of the commitment loss (vq)."})
    kl_weight: float = field(default=1e-6, metadata={"help": "Weight of the KL divergence (kl)."})
    perceptual_weight: float = field(default=0.0, metadata={"help": "Weight of LPIPS-VGG; 0 = off."})
    perceptual_warmup_steps: int = field(default=0, metadata={"help": "Updates in which it grows from 0."})
    perceptual_dropout: bool = field(default=False, metadata={"help": "Dropout inside LPIPS, as published."})
    perceptual_trunk: str | None = field(
        default=None, metadata={"help": "File of torchvision's VGG16 weights; by default its cache or a download."}
    )
    discriminator: str = field(default="none", metadata={"help": f"none, {', '.join(DISCRIMINATORS)}."})
    discr_learning_rate: float | None = field(default=None, metadata={"help": "By default --learning_rate."})
    adversarial_loss: str = field(
        default="hinge", metadata={"help": "GAN objective.", "choices": list(ADVERSARIAL_LOSSES)}
    )
    adversarial_weight: float = field(default=0.2, metadata={"help": "Weight of the adversarial losses."})
    adversarial_start: int = field(default=0, metadata={"help": "First update with adversarial losses."})
    adaptive_adversarial_weight: bool = field(
        default=False, metadata={"help": "Scale by the ratio of gradient norms at the last layer (VQGAN)."}
    )
    lecam_weight: float = field(default=0.0, metadata={"help": "Weight of LeCAM regularisation; 0 = off."})
    alignment_teacher: str | None = field(
        default=None, metadata={"help": "Frozen vision model of transformers the latents are aligned to."}
    )
    alignment_weight: float = field(default=0.1, metadata={"help": "Weight of the alignment loss."})
    alignment_mode: str = field(
        default="repeat",
        metadata={
            "help": "How latents meet teacher tokens.",
            "choices": list(ALIGNMENT_MODES),
        },
    )
    alignment_hidden_size: int = field(default=1024, metadata={"help": "Width of the projection to the teacher."})
    alignment_patch_size: int | None = field(
        default=None, metadata={"help": "Patch size the teacher is resampled to; by default its own."}
    )

    # validation
    validation_split: str = field(default="validation", metadata={"help": "Split that validation measures."})
    max_validation_samples: int | None = field(default=1000, metadata={"help": "Images PSNR is measured on."})
    num_validation_images: int = field(default=8, metadata={"help": "Images in the picture of reconstructions."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_source is None:
            raise ValueError("Neither `--dataset_name` nor `--train_data_dir` is given, one of them is needed.")
        if (self.model is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                f"`--model` is {self.model!r} and `--pretrained_model_name_or_path` is"
                f" {self.pretrained_model_name_or_path!r}, allowed: exactly one of them."
            )
        if self.encoder_init is not None and self.pretrained_model_name_or_path is not None:
            raise ValueError("`--encoder_init` starts a new tokenizer, `--pretrained_model_name_or_path` has weights.")
        for name in vars(self):
            if name.endswith("_weight") and not isinstance(getattr(self, name), bool) and not getattr(self, name) >= 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: numbers from 0 on.")
        if not 0 <= self.mask_ratio_min <= self.mask_ratio_max <= 1:
            raise ValueError(
                f"`--mask_ratio_min` is {self.mask_ratio_min} and `--mask_ratio_max` is {self.mask_ratio_max},"
                " allowed: 0 <= min <= max <= 1."
            )
        if self.discriminator not in ("none", *DISCRIMINATORS):
            raise ValueError(
                f"`--discriminator` is {self.discriminator!r}, allowed: none, {', '.join(DISCRIMINATORS)}."
            )
        if self.discriminator != "none" and self.max_train_steps is not None:
            if self.adversarial_start >= self.max_train_steps:
                raise ValueError(
                    f"`--adversarial_start` is {self.adversarial_start}, allowed: below `--max_train_steps`"
                    f" {self.max_train_steps}; `--discriminator none` trains without one."
                )


def build_tokenizer(args: SoftVQTrainingArguments) -> AutoencoderSoftVQ:
    """A new tokenizer, with DINOv2 weights in its encoder if asked for, or a trained one."""
    if args.pretrained_model_name_or_path is not None:
        model = AutoencoderSoftVQ.from_pretrained(args.pretrained_model_name_or_path)
    else:
        check_model_config(AutoencoderSoftVQ, args.model)
        model = AutoencoderSoftVQ(**{"sample_size": args.resolution, **args.model})
    if model.config.sample_size not in (args.resolution, [args.resolution] * 2, (args.resolution, args.resolution)):
        raise ValueError(f"`--resolution` is {args.resolution}, the tokenizer takes {model.config.sample_size}.")
    if args.encoder_init is not None:
        load_dinov2_encoder(model, load_dinov2(args.encoder_init))
    if args.mask_ratio_max > 0 and not model.config.encoder_mask_token:
        raise ValueError(
            f"`--mask_ratio_max` is {args.mask_ratio_max}, allowed: 0 for a tokenizer without `encoder_mask_token`."
        )
    if args.mask_ratio_max == 0 and model.config.encoder_mask_token:
        model.encoder.positions.mask_token.requires_grad_(False)  # DDP waits for the gradient of what is not used
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def load_perceptual_loss(args: SoftVQTrainingArguments) -> PerceptualLoss | None:
    """LPIPS, or `None` with a warning where its weights cannot be had."""
    if args.perceptual_weight == 0:
        return None
    try:
        return PerceptualLoss(args.perceptual_trunk, dropout=args.perceptual_dropout).train()
    except PerceptualWeightsUnavailable as error:
        logger.warning(f"Training goes on WITHOUT the perceptual loss. {error} (Here: `--perceptual_trunk`.)")
        return None


def main(args: SoftVQTrainingArguments) -> None:
    check_output_dir(args.output_dir)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    accelerator = build_accelerator(args)
    device = accelerator.device
    repo_id = args.repo_id
    if args.push_to_hub and accelerator.is_main_process:  # before the work: a token that cannot write is an error now
        repo_id = create_repo(repo_id, token=args.hub_token, private=args.hub_private or None, exist_ok=True).repo_id

    # 1. Data. A tokenizer needs no labels.
    options = {"label_column": None, **args.dataset_options()}
    validation_dataset = None
    with accelerator.main_process_first():
        train_dataset = load_image_dataset(
            args.data_source, split=args.train_split, train=True, max_samples=args.max_train_samples, **options
        )
        if args.validation_steps > 0:
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
                    f"No validation images: {error} `--validation_split` names another split, `--validation_steps 0`"
                    " trains without."
                ) from error
    check_dataset_size(train_dataset, args.train_batch_size, accelerator.num_processes)
    loader_options = {
        "batch_size": args.train_batch_size,
        "collate_fn": collate_images,
        "num_workers": args.dataloader_num_workers,
    }
    shuffle = not isinstance(train_dataset, IterableDataset)
    train_dataloader = DataLoader(train_dataset, shuffle=shuffle, drop_last=True, **loader_options)
    train_dataloader = prepare_dataloader(accelerator, train_dataloader)
    if validation_dataset is not None:
        validation_dataloader = prepare_dataloader(accelerator, DataLoader(validation_dataset, **loader_options))

    # 2. The tokenizer and what judges it: perceptual loss, discriminator, alignment to a teacher
    teacher = alignment_loss = None
    with accelerator.local_main_process_first():  # one process of a machine downloads
        tokenizer = build_tokenizer(args)
        perceptual_loss = load_perceptual_loss(args)
        if args.alignment_teacher is not None:
            teacher = load_teacher(args.alignment_teacher, args.resolution, args.alignment_patch_size).to(device)
    discriminator = None if args.discriminator == "none" else build_discriminator(args.discriminator)
    lecam = LeCAMRegularizer().to(device) if discriminator is not None and args.lecam_weight > 0 else None
    if teacher is not None:
        alignment_loss = AlignmentLoss(
            tokenizer.config.latent_channels, teacher.hidden_size, args.alignment_hidden_size, args.alignment_mode
        )

    # 3. Optimizers. Schedules are not prepared: they advance by hand, once per update.
    max_train_steps = resolve_max_train_steps(
        train_dataloader, args.max_train_steps, args.num_train_epochs, args.gradient_accumulation_steps
    )
    trained = torch.nn.ModuleList([tokenizer] if alignment_loss is None else [tokenizer, alignment_loss])
    learning_rate = scaled_learning_rate(args, args.learning_rate, accelerator.num_processes)
    optimizer = build_optimizer(args, trained.parameters(), learning_rate)
    lr_schedulers = [build_lr_scheduler(args, optimizer, max_train_steps)]
    tokenizer, optimizer = accelerator.prepare(tokenizer, optimizer)
    accumulated = [tokenizer]
    if alignment_loss is not None:
        alignment_loss = accelerator.prepare(alignment_loss)
        accumulated.append(alignment_loss)
    if discriminator is not None:
        discriminator_learning_rate = scaled_learning_rate(
            args, args.discr_learning_rate or args.learning_rate, accelerator.num_processes
        )
        if accelerator.num_processes > 1 and device.type == "cuda":
            discriminator = torch.nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        discriminator_optimizer = build_optimizer(args, discriminator.parameters(), discriminator_learning_rate)
        lr_schedulers.append(build_lr_scheduler(args, discriminator_optimizer, max_train_steps))
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        accumulated.append(discriminator)
    plain_tokenizer = accelerator.unwrap_model(tokenizer)
    if perceptual_loss is not None:
        perceptual_loss.to(device)

    # 4. Averaged weights, and everything as it was at the checkpoint
    ema = None
    if args.use_ema:
        ema = EMAModel(plain_tokenizer.parameters(), decay=args.ema_decay, min_decay=args.ema_decay, foreach=True)
        ema.optimization_step = 1  # with min_decay: the constant decay from the first update on
    state = TrainerState()
    parts = {"ema": ema, "lr_schedulers": lr_schedulers, "buffers": {} if lecam is None else {"lecam": lecam}}
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, state, **parts)
    metrics = MetricsLogger(accelerator, args, state)
    if accelerator.is_main_process:
        Path(args.output_dir, "args.yaml").write_text(yaml.safe_dump(args.to_dict(), sort_keys=False))

    logger.info(
        f"Training {plain_tokenizer.num_parameters() / 1e6:.1f}M parameters from step {state.step} to"
        f" {max_train_steps}, {args.train_batch_size} x {accelerator.num_processes} processes x"
        f" {args.gradient_accumulation_steps} accumulated images per step"
    )

    # 5. Train
    progress = tqdm(
        total=max_train_steps, initial=state.step, desc="tokenizer", disable=not accelerator.is_local_main_process
    )
    tokenizer.train()
    values_of_step, step_started = [], time.perf_counter()
    for batch in training_batches(accelerator, train_dataloader, train_dataset, state, max_train_steps):
        generator = step_generator(args.seed, state.epoch, state.batch, accelerator.process_index)
        step = state.step + 1
        pixel_values = batch["pixel_values"]
        adversarial = 0.0
        if discriminator is not None:
            adversarial = adversarial_weight(step, args.adversarial_weight, args.adversarial_start)

        with accelerator.accumulate(*accumulated):
            # Tokenizer: reconstruct, and add up what is wrong with it
            mask = None
            if args.mask_ratio_max > 0:
                num_patches = (args.resolution // plain_tokenizer.config.encoder_patch_size) ** 2
                ratios = (args.mask_ratio_min, args.mask_ratio_max)
                mask = sample_patch_mask(len(pixel_values), num_patches, *ratios, generator).to(device)
            output = tokenizer(pixel_values, sample_posterior=True, generator=generator, mask=mask)
            losses = {}
            distance = F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss
            losses["reconstruction"] = distance(output.sample, pixel_values)
            loss = args.reconstruction_weight * losses["reconstruction"]
            if perceptual_loss is not None:
                losses["perceptual"] = perceptual_loss(output.sample, pixel_values)
                weight = warmup_weight(step, args.perceptual_weight, args.perceptual_warmup_steps)
                loss = loss + weight * losses["perceptual"]
            if adversarial > 0:
                with frozen_discriminator(accelerator.unwrap_model(discriminator)) as judge:
                    losses["generator"] = ADVERSARIAL_LOSSES[args.adversarial_loss].generator(judge(output.sample))
                weight = adversarial
                if args.adaptive_adversarial_weight:
                    weight = weight * adaptive_weight(loss, losses["generator"], plain_tokenizer.decoder.last_layer)
                loss = loss + weight * losses["generator"]
            for name, weight in (
                ("entropy", args.entropy_weight),
                ("vq", args.vq_weight),
                ("commit", args.commit_weight),
                ("kl", args.kl_weight),
            ):
                if output.get(f"{name}_loss") is not None:
                    losses[name] = output[f"{name}_loss"]
                    loss = loss + weight * losses[name]
            if alignment_loss is not None:
                with accelerator.autocast():
                    teacher_tokens = teacher(pixel_values)
                losses["alignment"] = alignment_loss(output.latent, teacher_tokens, generator)
                loss = loss + args.alignment_weight * losses["alignment"]
            values = reduce_losses(accelerator, {"loss": loss, **losses}, step)

            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = clip_gradients(accelerator, optimizer, trained.parameters(), args.max_grad_norm)
                values["grad_norm"] = norm.item()
            optimizer.step()
            optimizer.zero_grad()

            # Discriminator: tell the same reconstructions, detached, from the originals
            if adversarial > 0:
                real_logits, fake_logits = discriminator(pixel_values), discriminator(output.sample.detach())
                discriminator_loss = adversarial * ADVERSARIAL_LOSSES[args.adversarial_loss].discriminator(
                    real_logits, fake_logits
                )
                if lecam is not None:
                    penalty = lecam(real_logits, fake_logits)
                    discriminator_loss = discriminator_loss + adversarial * args.lecam_weight * penalty
                values |= reduce_losses(accelerator, {"discriminator_loss": discriminator_loss}, step)
                accelerator.backward(discriminator_loss)
                if accelerator.sync_gradients:
                    norm = clip_gradients(
                        accelerator, discriminator_optimizer, discriminator.parameters(), args.max_grad_norm
                    )
                    values["discriminator_grad_norm"] = norm.item()
                discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()

        values_of_step.append(values)
        if not accelerator.sync_gradients:
            continue

        # An optimizer update is done
        state.step = step
        values = mean_over_batches(values_of_step)
        values["learning_rate"] = optimizer.param_groups[0]["lr"]
        for lr_scheduler in lr_schedulers:
            lr_scheduler.step()
        if ema is not None:
            ema.step(plain_tokenizer.parameters())

        images = len(pixel_values) * accelerator.num_processes * len(values_of_step)
        values["images_per_second"] = images / (time.perf_counter() - step_started)
        progress.update()
        progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.1f}")
        if step % args.logging_steps == 0:
            metrics.log(values)

        if args.validation_steps > 0 and (step % args.validation_steps == 0 or step == max_train_steps):
            with averaged_weights(ema, plain_tokenizer):
                quality, originals, reconstructions = evaluate_reconstruction(
                    accelerator, plain_tokenizer, validation_dataloader, args.num_validation_images
                )
            metrics.log({f"validation/{name}": value for name, value in quality.items()})
            metrics.log_image("validation", reconstruction_grid(originals, reconstructions))
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, state, args.checkpoints_total_limit, **parts)
        values_of_step, step_started = [], time.perf_counter()
    progress.close()

    # 6. The result: averaged weights, a model card, and both on the Hub
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        card = tokenizer_card(
            plain_tokenizer,
            repo_id=repo_id,
            dataset_name=args.data_source,
            metrics=metrics.last_validation(),
            evaluation_dataset=f"the {args.validation_split} split of {args.data_source}",
            num_evaluation_images=None if args.streaming or validation_dataset is None else len(validation_dataset),
            evaluation_protocol=f"PSNR in dB, the mean over images of {args.resolution} x {args.resolution} pixels of"
            f" each one's own; pixels clamped to [0, 1], {'averaged' if args.use_ema else 'last'} weights, mixed"
            f" precision: {accelerator.mixed_precision}.",
            training_command=training_command(accelerator.num_processes, accelerator.mixed_precision),
            training_settings=args.to_dict(),
            base_model=args.pretrained_model_name_or_path or args.encoder_init,
        )
        with averaged_weights(ema, plain_tokenizer):
            export_model(plain_tokenizer, args.output_dir, card)
        if args.push_to_hub:
            url = push_folder(repo_id, args.output_dir, token=args.hub_token)
            logger.info(f"Uploaded to {url}")
    metrics.close()


if __name__ == "__main__":
    main(parse_args(SoftVQTrainingArguments))
