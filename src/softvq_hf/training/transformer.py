"""What `training/train_sit.py` trains: a transformer, with its objective and the head that REPA needs."""

import torch
from diffusers import SchedulerMixin
from torch import nn

from softvq_hf.losses import AlignmentLoss, diffusion_loss, flow_matching_loss, sample_flow_times
from softvq_hf.losses.draws import to_device
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel, Transformer1DModelOutput
from softvq_hf.training.arguments import check_model_config
from softvq_hf.training.generator import load_transformer
from softvq_hf.training.generator_arguments import SiTTrainingArguments
from softvq_hf.training.randomness import BatchGenerators


def build_transformer(
    args: SiTTrainingArguments, latent_shape: tuple[int, ...], num_classes: int
) -> DiTTransformer1DModel:
    """
    A new transformer for latents of `latent_shape`, or a trained one that fits them.

    Args:
        args (`SiTTrainingArguments`): Model configuration or weights to go on from, and the objective.
        latent_shape (`tuple[int, ...]`): As [`~softvq_hf.training.generator.get_latent_shape`] gives it.
        num_classes (`int`): Classes of the data.

    Raises:
        ValueError: If the transformer fits neither the latents, the classes nor the objective.
    """
    if args.pretrained_model_name_or_path is not None:
        transformer = load_transformer(DiTTransformer1DModel, args.pretrained_model_name_or_path)
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
    if args.repa_teacher is not None and args.repa_layer > config.num_layers:
        raise ValueError(
            f"`--repa_layer` is {args.repa_layer}, allowed: 1 to {config.num_layers}, the blocks there are."
        )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    return transformer


class TransformerWithLoss(nn.Module):
    """
    A transformer, its objective and, for REPA (arXiv 2410.06940), the projection of its hidden states, as one module:
    an optimizer belongs to one module, in sharded training too. Only `transformer` is averaged and saved as the
    result.

    Args:
        args (`SiTTrainingArguments`): The objective.
        transformer ([`DiTTransformer1DModel`]): The transformer.
        scheduler (`SchedulerMixin`): How noise is mixed into the latents.
        teacher_hidden_size (`int`, *optional*): Channels of the teacher's tokens, with REPA.
    """

    def __init__(
        self,
        args: SiTTrainingArguments,
        transformer: DiTTransformer1DModel,
        scheduler: SchedulerMixin,
        teacher_hidden_size: int | None,
    ) -> None:
        super().__init__()
        self.args = args
        self.transformer = transformer
        self.scheduler = scheduler
        self.alignment = None
        self.hidden_states = None  # of the block to align, between prediction and alignment
        if teacher_hidden_size is not None:
            hidden_size = transformer.config.num_attention_heads * transformer.config.attention_head_dim
            self.alignment = AlignmentLoss(hidden_size, teacher_hidden_size, args.repa_hidden_size, args.repa_mode)

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        generators: BatchGenerators,
        teacher_tokens: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            latents (`torch.Tensor`): Normalised latents of shape `(B, L, C)`, or `(B, C, H, W)` for 2-D ones.
            class_labels (`torch.Tensor` of shape `(B,)`): int64 class ids.
            generators ([`BatchGenerators`]): Sources of all draws: noise, dropped labels, times.
            teacher_tokens (`torch.Tensor` of shape `(B, N, D)`, *optional*): Tokens of the teacher, with REPA.

        Returns:
            `dict[str, torch.Tensor]`: "loss" and its terms, float32 scalars, means over the batch.
        """
        args, device = self.args, latents.device
        noise = to_device(generators.randn(*latents.shape[1:]), device)
        options = {}
        if self.transformer.config.class_dropout_prob > 0:
            dropped = generators.rand() < self.transformer.config.class_dropout_prob
            options["force_drop_ids"] = to_device(dropped, device)
        if self.alignment is not None:
            options["hidden_states_layer"] = args.repa_layer
        if args.objective == "flow_matching":
            times = sample_flow_times(len(latents), args.weighting, args.path_type, generators.samples, device)
            losses = {
                "loss": flow_matching_loss(
                    self.predict, self.scheduler, latents, class_labels, times, noise, **options
                )
            }
        else:
            timesteps = generators.randint(self.scheduler.config.num_train_timesteps)
            losses = diffusion_loss(self.predict, self.scheduler, latents, class_labels, timesteps, noise, **options)
        losses = {name: value.mean() for name, value in losses.items()}
        if self.alignment is not None:
            losses["alignment"] = self.alignment(self.hidden_states, teacher_tokens, generators.shared)
            self.hidden_states = None
            losses["loss"] = losses["loss"] + args.repa_weight * losses["alignment"]
        return losses

    def predict(self, *inputs, **conditions) -> Transformer1DModelOutput:
        """The transformer, as the losses call it; its hidden states are kept for the alignment."""
        output = self.transformer(*inputs, **conditions)
        self.hidden_states = output.hidden_states
        return output
