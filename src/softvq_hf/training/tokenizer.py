"""What `training/train_softvq.py` trains: a tokenizer, and the heads that only its losses need."""

import torch
from accelerate.logging import get_logger
from torch import nn

from softvq_hf.conversion.dinov2 import load_dinov2, load_dinov2_encoder
from softvq_hf.losses import (
    AUXILIARY_LOSSES,
    HOG_CHANNELS,
    AlignmentLoss,
    AuxiliaryDecoder,
    FrozenTeacher,
    hog_targets,
    load_teacher,
)
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ, SoftVQOutput
from softvq_hf.training.arguments import check_model_config
from softvq_hf.training.fine_tuning import resize_tokenizer, set_tuning
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
