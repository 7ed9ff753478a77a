"""What `training/train_mar.py` trains: a MAR with the loss of its masked tokens."""

import torch
from diffusers import SchedulerMixin
from torch import nn

from softvq_hf.losses import token_diffusion_loss
from softvq_hf.losses.draws import to_device
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.training.arguments import check_model_config
from softvq_hf.training.generator import load_transformer
from softvq_hf.training.generator_arguments import MARTrainingArguments
from softvq_hf.training.masking import sample_patch_mask
from softvq_hf.training.randomness import BatchGenerators


def build_mar(args: MARTrainingArguments, latent_shape: tuple[int, int], num_classes: int) -> MARTransformer1DModel:
    """
    A new MAR for tokens of `latent_shape`, or a trained one that fits them.

    Args:
        args (`MARTrainingArguments`): Model configuration or weights to go on from.
        latent_shape (`tuple[int, int]`): Tokens and channels.
        num_classes (`int`): Classes of the data.

    Raises:
        ValueError: If the transformer fits neither the latents nor the classes.
    """
    if args.pretrained_model_name_or_path is not None:
        transformer = load_transformer(MARTransformer1DModel, args.pretrained_model_name_or_path)
    else:
        check_model_config(MARTransformer1DModel, args.model)
        num_tokens, in_channels = latent_shape
        from_latents = {"num_tokens": num_tokens, "in_channels": in_channels, "num_classes": num_classes}
        transformer = MARTransformer1DModel(**from_latents | args.model)
        transformer.initialize_weights()

    expected_shape = (transformer.num_tokens, transformer.token_channels)
    if transformer.is_2d or expected_shape != tuple(latent_shape):
        raise ValueError(
            f"The transformer takes {'patches of 2-D latents, ' if transformer.is_2d else ''}tokens of shape"
            f" {expected_shape}, allowed: {tuple(latent_shape)}, as the tokenizer makes them."
        )
    if transformer.config.num_classes < num_classes:
        raise ValueError(
            f"`num_classes` is {transformer.config.num_classes}, allowed: {num_classes}, as in the data, or more."
        )
    if args.guidance_scale > 1 and transformer.config.class_dropout_prob == 0:
        raise ValueError(
            f"`--guidance_scale` is {args.guidance_scale}, allowed: 1 for a transformer that is trained without label"
            " dropout (`class_dropout_prob` is 0)."
        )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    return transformer


def parameter_groups(model: nn.Module) -> list[dict]:
    """
    Parameters as the published recipe decays them: not vectors (norms and biases), and nothing of the denoiser;
    tables, the null class and the mask token are decayed like the other weights.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim == 1 or ".denoiser." in f".{name}" else decayed).append(parameter)
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


class MARWithLoss(nn.Module):
    """
    A MAR and its loss as one module, which an optimizer and the wrappers of distributed training take.

    Args:
        args (`MARTrainingArguments`): Masks and loss.
        transformer ([`MARTransformer1DModel`]): The transformer.
        scheduler (`SchedulerMixin`): The chain of single tokens.
    """

    def __init__(
        self, args: MARTrainingArguments, transformer: MARTransformer1DModel, scheduler: SchedulerMixin
    ) -> None:
        super().__init__()
        self.args = args
        self.transformer = transformer
        self.scheduler = scheduler

    def forward(
        self, latents: torch.Tensor, class_labels: torch.Tensor, generators: BatchGenerators
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, L, C)`): Normalised tokens.
            class_labels (`torch.Tensor` of shape `(B,)`): int64 class ids.
            generators ([`BatchGenerators`]): Sources of all draws: masks, dropped labels, timesteps, noise.

        Returns:
            `dict[str, torch.Tensor]`: "loss", its terms "mse" and "vb", means over the masked tokens, and
            "mask_ratio"; float32 scalars.
        """
        args, device = self.args, latents.device
        batch_size, num_tokens, channels = latents.shape
        repeats = args.diffusion_batch_mul

        # 1. All draws. The share of masked tokens is that of the global batch, so that shapes are the same everywhere.
        mask = sample_patch_mask(
            batch_size, num_tokens, args.mask_ratio_min, 1.0, generators.shared, generators.samples
        )
        masked = mask.nonzero()[:, 1].view(batch_size, -1)
        visible = (~mask).nonzero()[:, 1].view(batch_size, -1)
        num_masked = masked.shape[1]
        dropped = generators.rand() < self.transformer.config.class_dropout_prob
        timesteps = generators.randint(self.scheduler.config.num_train_timesteps, repeats, num_masked)
        noise = to_device(generators.randn(repeats, num_masked, channels), device)
        masked = to_device(masked, device)

        # 2. Conditions of the masked tokens
        conditions = self.transformer(
            latents,
            class_labels,
            visible_positions=to_device(visible, device),
            predicted_positions=masked,
            force_drop_ids=to_device(dropped, device),
        ).conditions

        # 3. Loss of the tokens, each `repeats` times
        tokens = latents.gather(1, masked[:, :, None].expand(-1, -1, channels))
        rows = (values[:, None].expand(-1, repeats, -1, -1).flatten(0, 2) for values in (tokens, conditions))
        losses = token_diffusion_loss(
            self.transformer, self.scheduler, *rows, timesteps.flatten(), noise.flatten(0, 2)
        )
        losses = {name: value.mean() for name, value in losses.items()}
        losses["mask_ratio"] = torch.full((), num_masked / num_tokens, device=device)
        return losses
