"""What `training/train_softvq.py` trains: a tokenizer, the heads that only its losses need, and a discriminator; and
the losses of one batch."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from softvq_hf.conversion.dinov2 import load_dinov2, load_dinov2_encoder
from softvq_hf.losses import (
    ADVERSARIAL_LOSSES,
    AUXILIARY_LOSSES,
    HOG_CHANNELS,
    STRONG_AUGMENTATION,
    WEAK_AUGMENTATION,
    AlignmentLoss,
    AuxiliaryDecoder,
    FrozenTeacher,
    LeCAMRegularizer,
    PerceptualLoss,
    adaptive_weight,
    consistency_loss,
    differentiable_augmentation,
    frozen_discriminator,
    hog_targets,
    load_teacher,
    warmup_weight,
)
from softvq_hf.losses.draws import to_device
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ, SoftVQOutput
from softvq_hf.training.arguments import check_model_config
from softvq_hf.training.fine_tuning import resize_tokenizer, set_tuning
from softvq_hf.training.masking import sample_patch_mask
from softvq_hf.training.randomness import BatchGenerators
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments


logger = get_logger(__name__)


def build_tokenizer(args: SoftVQTrainingArguments) -> AutoencoderSoftVQ:
    """
    A new tokenizer, with DINOv2 weights in its encoder if asked for, or a trained one, at the size of the images; with
    the parts frozen or adapted that `args` says. A trained one whose encoder goes on learning loses its latent
    statistics (`scaling_factor`, `shift_factor`): they will not be those of the new latents.

    Raises:
        ValueError: If `args` do not fit the tokenizer.
    """
    if args.pretrained_model_name_or_path is not None:
        tokenizer = AutoencoderSoftVQ.from_pretrained(args.pretrained_model_name_or_path)
        if tokenizer.config.sample_size not in _same_sizes(args.resolution):
            logger.info(f"Positions are resampled from {tokenizer.config.sample_size} to {args.resolution} pixels")
            tokenizer = resize_tokenizer(tokenizer, args.resolution)
        if args.encoder_tuning != "frozen":  # other latents, whose statistics training/cache_latents.py measures
            tokenizer.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    else:
        check_model_config(AutoencoderSoftVQ, args.model)
        tokenizer = AutoencoderSoftVQ(**{"sample_size": args.resolution, **args.model})
        if tokenizer.config.sample_size not in _same_sizes(args.resolution):
            raise ValueError(
                f"`--resolution` is {args.resolution}, the tokenizer takes {tokenizer.config.sample_size}."
            )
    if args.encoder_init is not None:
        load_dinov2_encoder(tokenizer, load_dinov2(args.encoder_init))
    if args.mask_ratio_max > 0 and not tokenizer.config.encoder_mask_token:
        raise ValueError(
            f"`--mask_ratio_max` is {args.mask_ratio_max}, allowed: 0 for a tokenizer without `encoder_mask_token`."
        )
    if args.mask_ratio_max == 0 and tokenizer.config.encoder_mask_token:
        tokenizer.encoder.positions.mask_token.requires_grad_(False)  # DDP waits for the gradient of what is not used
    set_tuning(tokenizer, args.encoder_tuning, args.decoder_tuning, args.lora_rank)
    if args.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    if args.compile:
        tokenizer.compile_repeated_blocks()
    return tokenizer


def _same_sizes(resolution: int) -> tuple[int | list[int] | tuple[int, int], ...]:
    return resolution, [resolution, resolution], (resolution, resolution)


def load_teachers(args: SoftVQTrainingArguments, tokenizer: AutoencoderSoftVQ) -> dict[str, FrozenTeacher]:
    """
    The frozen vision models that the losses in `args` compare with: "alignment", "dinov2" and "clip", those with a
    weight. They stay outside of what is trained, averaged and saved.

    The auxiliary ones give a token for each patch of the tokenizer's encoder.
    """
    teachers = {}
    if args.alignment_weight > 0:
        teachers["alignment"] = load_teacher(args.alignment_teacher, args.resolution, args.alignment_patch_size)
    patch_size = tokenizer.config.encoder_patch_size
    if args.auxiliary_dinov2_weight > 0:
        teachers["dinov2"] = load_teacher(args.auxiliary_dinov2_teacher, args.resolution, patch_size)
    if args.auxiliary_clip_weight > 0:
        teachers["clip"] = load_teacher(args.auxiliary_clip_teacher, args.resolution, patch_size)
    return teachers


class TokenizerWithHeads(nn.Module):
    """
    A tokenizer and the trainable heads of its losses, as one module: an optimizer belongs to one module, in sharded
    training too. Only `tokenizer` is averaged and saved as the result.

    Args:
        args (`SoftVQTrainingArguments`): Which heads there are, and their sizes.
        tokenizer ([`AutoencoderSoftVQ`]): The tokenizer.
        teachers (`dict[str, FrozenTeacher]`): What [`load_teachers`] gives; only their widths are used here.
    """

    def __init__(
        self, args: SoftVQTrainingArguments, tokenizer: AutoencoderSoftVQ, teachers: dict[str, FrozenTeacher]
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        config = tokenizer.config
        self.alignment = None
        if "alignment" in teachers:
            num_tokens, num_latent_tokens = teachers["alignment"].num_tokens, config.num_latent_tokens
            if args.alignment_mode == "repeat" and num_tokens % num_latent_tokens != 0:
                raise ValueError(
                    f"`--alignment_mode` is repeat with {num_tokens} tokens of the teacher and {num_latent_tokens}"
                    " latents, allowed: multiples of the latents. `--alignment_patch_size` changes the teacher's."
                )
            self.alignment = AlignmentLoss(
                config.latent_channels,
                teachers["alignment"].hidden_size,
                args.alignment_hidden_size,
                args.alignment_mode,
            )
        channels = {name: teachers[name].hidden_size for name in ("dinov2", "clip") if name in teachers}
        if args.auxiliary_hog_weight > 0:
            channels["hog"] = HOG_CHANNELS
        side = args.resolution // config.encoder_patch_size
        self.auxiliary = nn.ModuleDict(
            {
                name: AuxiliaryDecoder(
                    config.latent_channels,
                    config.num_latent_tokens,
                    (side, side),
                    target_channels,
                    args.auxiliary_hidden_size,
                    args.auxiliary_num_layers,
                )
                for name, target_channels in sorted(channels.items())
            }
        )
        self.auxiliary_masked_only = args.auxiliary_masked_only

    def forward(
        self,
        pixel_values: torch.Tensor,
        generators: BatchGenerators,
        mask: torch.Tensor | None = None,
        teacher_tokens: dict[str, torch.Tensor] | None = None,
    ) -> tuple[SoftVQOutput, dict[str, torch.Tensor]]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
            generators ([`BatchGenerators`]): Sources of all draws.
            mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): Patches that the mask token replaces.
            teacher_tokens (`dict[str, torch.Tensor]`, *optional*): Tokens `(B, N, D)` of each teacher.

        Returns:
            `tuple`: the tokenizer's output, and the unweighted losses of the heads by name: "alignment",
            "auxiliary_hog", "auxiliary_dinov2", "auxiliary_clip".
        """
        output = self.tokenizer(pixel_values, sample_posterior=True, generator=generators.samples, mask=mask)
        losses = {}
        if self.alignment is not None:
            losses["alignment"] = self.alignment(output.latent, teacher_tokens["alignment"], generators.shared)
        for name, decoder in self.auxiliary.items():
            if name == "hog":
                target = hog_targets(pixel_values, self.tokenizer.config.encoder_patch_size)
            else:
                target = teacher_tokens[name]
            averaged_over = mask if self.auxiliary_masked_only else None
            losses[f"auxiliary_{name}"] = AUXILIARY_LOSSES[name](decoder(output.latent), target, averaged_over)
        return output, losses


def tokenizer_losses(
    args: SoftVQTrainingArguments,
    accelerator: Accelerator,
    model: nn.Module,
    teachers: dict[str, FrozenTeacher],
    perceptual_loss: PerceptualLoss | None,
    discriminator: nn.Module | None,
    adversarial: float,
    pixel_values: torch.Tensor,
    generators: BatchGenerators,
    step: int,
) -> tuple[SoftVQOutput, dict[str, torch.Tensor]]:
    """
    Reconstruct the images of a batch, and add up what is wrong with them.

    Args:
        args (`SoftVQTrainingArguments`): Losses and their weights.
        accelerator (`Accelerator`): Autocast.
        model (`torch.nn.Module`): [`TokenizerWithHeads`], as prepared.
        teachers (`dict[str, FrozenTeacher]`): What [`load_teachers`] gives.
        perceptual_loss ([`PerceptualLoss`], *optional*): LPIPS; without it the loss has no such part.
        discriminator (`torch.nn.Module`, *optional*): As prepared. The pass leaves no trace in it.
        adversarial (`float`): Weight of the adversarial loss; at 0 the discriminator is not asked.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
        generators ([`BatchGenerators`]): Sources of all draws.
        step (`int`): Optimizer step, counted from 1.

    Returns:
        `tuple`: the tokenizer's output, and scalars by name: "loss", to be minimised, its parts without their weights,
        and figures to log.
    """
    plain_tokenizer = accelerator.unwrap_model(model).tokenizer
    mask = None
    if args.mask_ratio_max > 0:
        num_patches = (args.resolution // plain_tokenizer.config.encoder_patch_size) ** 2
        ratios = (args.mask_ratio_min, args.mask_ratio_max)
        mask = sample_patch_mask(len(pixel_values), num_patches, *ratios, generators.shared, generators.samples)
        mask = to_device(mask, pixel_values.device)
    with accelerator.autocast():
        teacher_tokens = {name: teacher(pixel_values) for name, teacher in teachers.items()}
    output, losses = model(pixel_values, generators, mask, teacher_tokens)
    distance = F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss
    losses["reconstruction"] = distance(output.sample, pixel_values)
    loss = args.reconstruction_weight * losses["reconstruction"]
    if perceptual_loss is not None:
        # not in fp16, which the squares of its features exceed
        is_bf16 = accelerator.mixed_precision == "bf16"
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=is_bf16):
            losses["perceptual"] = perceptual_loss(output.sample, pixel_values, generators.samples)
        weight = warmup_weight(step, args.perceptual_weight, args.perceptual_warmup_steps)
        loss = loss + weight * losses["perceptual"]
    if adversarial > 0:
        sample = output.sample
        if args.augment_discriminator:
            sources = {"generator": generators.shared, "sample_generators": generators.samples}
            sample = differentiable_augmentation(sample, **WEAK_AUGMENTATION, **sources)
        with frozen_discriminator(accelerator.unwrap_model(discriminator)) as judge:
            logits = judge(sample, generators.shared)
        losses["generator"] = ADVERSARIAL_LOSSES[args.adversarial_loss].generator(logits)
        weight = adversarial
        if args.adaptive_adversarial_weight:
            adaptive = adaptive_weight(loss, losses["generator"], plain_tokenizer.decoder.last_layer)
            weight = weight * adaptive
            losses["adaptive_weight"] = adaptive
        loss = loss + weight * losses["generator"]
    for name in ("entropy", "vq", "commit", "kl"):
        if output.get(f"{name}_loss") is not None:
            losses[name] = output[f"{name}_loss"]
            loss = loss + getattr(args, f"{name}_weight") * losses[name]
    for name in ("alignment", "auxiliary_hog", "auxiliary_dinov2", "auxiliary_clip"):
        if name in losses:
            loss = loss + getattr(args, f"{name}_weight") * losses[name]
    if output.get("max_probability") is not None:
        losses["max_probability"] = output.max_probability
    return output, {"loss": loss, **losses}


def discriminator_losses(
    args: SoftVQTrainingArguments,
    discriminator: nn.Module,
    lecam: LeCAMRegularizer | None,
    adversarial: float,
    real: torch.Tensor,
    fake: torch.Tensor,
    generators: BatchGenerators,
) -> dict[str, torch.Tensor]:
    """
    The loss of telling originals from reconstructions, and its parts by name. Both see weak augmentation, drawn for
    each; under strong augmentation the logits shall stay the same.

    Args:
        args (`SoftVQTrainingArguments`): Losses and their weights.
        discriminator (`torch.nn.Module`): As prepared.
        lecam ([`LeCAMRegularizer`], *optional*): Its averages are moved.
        adversarial (`float`): Weight of the adversarial loss and of LeCAM.
        real (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
        fake (`torch.Tensor` of the same shape):
            Their reconstructions; no gradient reaches them. Values that are not finite, which would break the
            discriminator's statistics, are replaced by those of `real`.
        generators ([`BatchGenerators`]): Sources of all draws.

    Returns:
        `dict[str, torch.Tensor]`: scalars: "discriminator_loss", to be minimised, and its parts without their weights.
    """
    fake = fake.detach()
    fake = torch.where(fake.isfinite(), fake, real)
    sources = {"generator": generators.shared, "sample_generators": generators.samples}
    weak_real, weak_fake = real, fake
    if args.augment_discriminator:
        weak_real = differentiable_augmentation(real, **WEAK_AUGMENTATION, **sources)
        weak_fake = differentiable_augmentation(fake, **WEAK_AUGMENTATION, **sources)
    real_logits = discriminator(weak_real, generators.shared)
    fake_logits = discriminator(weak_fake, generators.shared)
    losses = {"discriminator": ADVERSARIAL_LOSSES[args.adversarial_loss].discriminator(real_logits, fake_logits)}
    loss = losses["discriminator"]
    if lecam is not None:
        losses["lecam"] = lecam(real_logits, fake_logits)
        loss = loss + args.lecam_weight * losses["lecam"]
    loss = adversarial * loss
    if args.consistency_weight > 0:
        strong_real = differentiable_augmentation(real, **STRONG_AUGMENTATION, **sources)
        strong_fake = differentiable_augmentation(fake, **STRONG_AUGMENTATION, **sources)
        losses["consistency"] = consistency_loss(
            real_logits,
            fake_logits,
            discriminator(strong_real, generators.shared),
            discriminator(strong_fake, generators.shared),
        )
        loss = loss + args.consistency_weight * losses["consistency"]
    return {"discriminator_loss": loss, **losses}
