"""DiT and SiT transformers on 1-D latent tokens, and on the 2-D latents of their baselines, in one file.

The backbone is DiT (Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748); SiT
("Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", arXiv 2401.08740) is
the same network trained with flow matching; SoftVQ-VAE (arXiv 2412.10958) and MAETok (arXiv 2502.03444) train both on
the 1-D tokens of their tokenizers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import (
    SinusoidalPositionalEmbedding,
    TimestepEmbedding,
    Timesteps,
    get_2d_sincos_pos_embed,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


@dataclass
class Transformer1DModelOutput(BaseOutput):
    """
    The output of [`DiTTransformer1DModel`].

    Args:
        sample (`torch.Tensor`):
            The prediction, of shape `(batch_size, num_tokens, out_channels)`, or `(batch_size, out_channels,
            sample_size, sample_size)` for 2-D latents: a velocity for flow matching; for a model with learned variance
            the noise followed by the raw variance channels, on the channel axis.
        hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden size)`, *optional*):
            The tokens after the block that `hidden_states_layer` asked for.
    """

    sample: torch.Tensor
    hidden_states: torch.Tensor | None = None


class DiTAttnProcessor:
    """Self-attention over all tokens, no mask, through the attention backend that diffusers dispatches to."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "DiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            key = attn.to_k(hidden_states)
            value = attn.to_v(hidden_states)

        query = query.unflatten(-1, (-1, attn.head_dim))
        key = key.unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        if attn.norm_q is not None:
            query = attn.norm_q(query).to(value.dtype)
            key = attn.norm_k(key).to(value.dtype)

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)

        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        return hidden_states


class DiTAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head self-attention with separate query, key and value projections, optional LayerNorm on queries and keys.

    Args:
        dim (`int`): Width of the tokens.
        heads (`int`): Number of heads.
        head_dim (`int`): Width of one head.
        qk_norm (`bool`): Whether queries and keys pass a LayerNorm over the head width before the product.
    """

    _default_processor_cls = DiTAttnProcessor
    _available_processors = [DiTAttnProcessor]

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = True
        inner_dim = heads * head_dim

        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.norm_q = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else None
        self.norm_k = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(0.0)])

        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        return self.processor(self, hidden_states, **attention_kwargs)


class DiTTransformerBlock(nn.Module):
    """
    One adaLN-Zero block (DiT, section 3.2): attention, then a tanh-GELU MLP, each shifted, scaled and gated by
    functions of the conditioning vector.

    Args:
        dim (`int`): Width of the tokens and of the conditioning vector.
        num_attention_heads (`int`): Number of heads.
        attention_head_dim (`int`): Width of one head.
        mlp_ratio (`float`): Hidden width of the MLP as a multiple of `dim`.
        qk_norm (`bool`): Whether queries and keys are normalised.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = DiTAttention(dim, num_attention_heads, attention_head_dim, qk_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor | None,
        attention_kwargs: dict[str, Any] | None = None,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if modulation is None:
            modulation = self.norm1.linear(self.norm1.silu(conditioning)).unflatten(-1, (6, -1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[:, :, None].unbind(1)

        norm_hidden_states = self.norm1.norm(hidden_states) * (1 + scale_msa) + shift_msa
        attn_output = self.attn(norm_hidden_states, **(attention_kwargs or {}))
        hidden_states = hidden_states + gate_msa * attn_output

        norm_hidden_states = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        hidden_states = hidden_states + gate_mlp * self.ff(norm_hidden_states)
        return hidden_states


class DiTTransformer1DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The class-conditional transformer of DiT and SiT. It predicts a velocity (SiT, flow matching) or a noise with its
    variance (DiT, DDPM) from noisy latents: 1-D tokens `(batch_size, num_tokens, in_channels)`, or, when `patch_size`
    and `sample_size` are given, 2-D latents `(batch_size, in_channels, sample_size, sample_size)`.

    SiT-XL/1 on 64 SoftVQ tokens of 32 channels is `DiTTransformer1DModel()`: 28 layers of width 16 * 72 = 1152. A new
    model has PyTorch's default weights; before training it from scratch call
    [`~DiTTransformer1DModel.initialize_weights`].

    `pos_embed`, the sine/cosine position table, is a frozen parameter: it is counted by `num_parameters()`, not by
    `num_parameters(only_trainable=True)`, and it is stored with the weights.

    Args:
        num_tokens (`int`, defaults to 64):
            Number of 1-D latent tokens. Not used with 2-D latents, whose tokens are the
            `(sample_size // patch_size) ** 2` patches.
        in_channels (`int`, defaults to 32):
            Channels of the latents.
        out_channels (`int`, *optional*, defaults to `in_channels`):
            Channels of the prediction: `in_channels`, or `2 * in_channels` for a model with learned variance.
        num_layers (`int`, defaults to 28):
            Number of transformer blocks.
        num_attention_heads (`int`, defaults to 16):
            Number of attention heads.
        attention_head_dim (`int`, defaults to 72):
            Width of one head. The width of the model, `num_attention_heads * attention_head_dim`, must be even, and
            divisible by 4 for 2-D latents.
        mlp_ratio (`float`, defaults to 4.0):
            Hidden width of the MLPs as a multiple of the model's width.
        num_classes (`int`, defaults to 1000):
            Number of classes. The null class of classifier-free guidance has the index `num_classes`.
        class_dropout_prob (`float`, defaults to 0.1):
            Probability with which a label is replaced by the null class in train mode. With 0 there is no null class.
        qk_norm (`bool`, defaults to `False`):
            Whether queries and keys pass a LayerNorm.
        timestep_scale (`float`, defaults to 1e-3):
            Factor from the scheduler's timestep to the time that is embedded: 1e-3 for flow models, which are trained
            on times in [0, 1] while their schedulers count to 1000; 1.0 for DDPM models.
        patch_size (`int`, *optional*):
            Side of a patch of a 2-D latent.
        sample_size (`int`, *optional*):
            Side of a 2-D latent. `patch_size` and `sample_size` are given together, or not at all.

    Raises:
        ValueError: If a size is not positive, the width cannot carry the position table, `out_channels` is neither
            `in_channels` nor twice that, or `patch_size` and `sample_size` do not go together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTTransformerBlock"]
    _repeated_blocks = ["DiTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["proj_in", "timestep_embedder", "class_embedder", "norm", "proj_out"]

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 64,
        in_channels: int = 32,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        timestep_scale: float = 1e-3,
        patch_size: int | None = None,
        sample_size: int | None = None,
    ):
        super().__init__()

        sizes = {
            "num_tokens": num_tokens,
            "in_channels": in_channels,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "timestep_scale": timestep_scale,
        }
        for name, value in sizes.items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, but is {value}.")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` must lie in [0, 1], but is {class_dropout_prob}.")

        out_channels = in_channels if out_channels is None else out_channels
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"`out_channels` must be `in_channels` = {in_channels}, or {2 * in_channels} for a model with learned "
                f"variance, but is {out_channels}."
            )

        if (patch_size is None) != (sample_size is None):
            raise ValueError(
                "`patch_size` and `sample_size` must be given together (2-D latents) or not at all (1-D tokens), but "
                f"are {patch_size} and {sample_size}."
            )
        self.is_2d = patch_size is not None
        if self.is_2d and (patch_size <= 0 or sample_size <= 0 or sample_size % patch_size != 0):
            raise ValueError(
                "`sample_size` must be a positive multiple of a positive `patch_size`, but they are "
                f"{sample_size} and {patch_size}."
            )

        hidden_size = num_attention_heads * attention_head_dim
        divisor = 4 if self.is_2d else 2
        if hidden_size % divisor != 0:
            raise ValueError(
                f"`num_attention_heads * attention_head_dim` must be divisible by {divisor} for the "
                f"{'2-D' if self.is_2d else '1-D'} sine/cosine position table, but is {num_attention_heads} * "
                f"{attention_head_dim} = {hidden_size}."
            )

        self.out_channels = out_channels
        self.inner_dim = hidden_size
        self.gradient_checkpointing = False

        # 1. Tokens and their positions
        if self.is_2d:
            grid_size = sample_size // patch_size
            self.proj_in = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
            pos_embed = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size).unsqueeze(0)
        else:
            self.proj_in = nn.Linear(in_channels, hidden_size)
            pos_embed = SinusoidalPositionalEmbedding(hidden_size, num_tokens).pe
        self.pos_embed = nn.Parameter(pos_embed.to(torch.get_default_dtype()), requires_grad=False)

        # 2. Conditioning: time and class. The official time features use 10000^(-k/128), hence a shift of 0.
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, hidden_size)
        self.num_class_embeddings = num_classes + 1 if class_dropout_prob > 0 else num_classes
        self.class_embedder = nn.Embedding(self.num_class_embeddings, hidden_size)

        # 3. Blocks
        self.transformer_blocks = nn.ModuleList(
            [
                DiTTransformerBlock(hidden_size, num_attention_heads, attention_head_dim, mlp_ratio, qk_norm)
                for _ in range(num_layers)
            ]
        )

        # 4. Output
        self.norm_out = AdaLayerNormContinuous(hidden_size, hidden_size, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(hidden_size, (patch_size or 1) ** 2 * out_channels)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict[str, Any], ...]:
        # `auto_map` tells `diffusers.AutoModel` where an exported folder has this file; it is no argument of the model
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def initialize_weights(self) -> None:
        """
        Draw the weights that training from scratch starts from (DiT, section 3.2, adaLN-Zero): Xavier-uniform
        projections with zero biases, where queries, keys and values count as one projection; N(0, 0.02) label table
        and time MLP, and zeros for all modulations and the output projection. Every block is then the identity, and
        the prediction exactly zero.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)

        nn.init.normal_(self.class_embedder.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_2.weight, std=0.02)

        for block in self.transformer_blocks:
            for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # fan in and fan out are D and 3 D together
            nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(self.norm_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None,
        modulation: torch.Tensor | None,
        hidden_states_layer: int | None,
    ) -> None:
        """Raise a `ValueError` or `TypeError` which says what [`~DiTTransformer1DModel.forward`] accepts."""
        if self.is_2d:
            latent_shape = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        else:
            latent_shape = (self.config.num_tokens, self.config.in_channels)
        if tuple(hidden_states.shape[1:]) != latent_shape or hidden_states.ndim != len(latent_shape) + 1:
            raise ValueError(
                f"`hidden_states` must have the shape (batch_size, {', '.join(map(str, latent_shape))}), but has "
                f"{tuple(hidden_states.shape)}."
            )
        if not hidden_states.is_floating_point():
            raise TypeError(f"`hidden_states` must be of a floating point dtype, but is {hidden_states.dtype}.")
        device_type = hidden_states.device.type
        autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
        if hidden_states.dtype != self.pos_embed.dtype and not autocast:
            raise TypeError(
                f"`hidden_states` must be of the model's dtype {self.pos_embed.dtype}, but is {hidden_states.dtype}."
            )

        if hidden_states_layer is not None and not 1 <= hidden_states_layer <= self.config.num_layers:
            raise ValueError(
                f"`hidden_states_layer` is {hidden_states_layer}, allowed: 1 to {self.config.num_layers}, or None."
            )

        batch_size = hidden_states.shape[0]
        self.check_conditions(batch_size, timestep, class_labels, force_drop_ids)
        if modulation is not None:
            expected_shape = (batch_size, 6 * self.config.num_layers + 2, self.inner_dim)
            if tuple(modulation.shape) != expected_shape:
                raise ValueError(
                    f"`modulation` must have the shape {expected_shape}, but has {tuple(modulation.shape)}."
                )
            if force_drop_ids is not None:
                raise ValueError("`force_drop_ids` must be None where `modulation` decides which classes count.")

    def check_conditions(
        self,
        batch_size: int,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None,
    ) -> None:
        """Raise a `ValueError` or `TypeError` for timesteps and labels that do not fit the model or the batch."""
        if torch.is_tensor(timestep) and timestep.ndim != 0 and tuple(timestep.shape) != (batch_size,):
            raise ValueError(
                f"`timestep` must be a scalar or have the shape (batch_size,) = ({batch_size},), but has "
                f"{tuple(timestep.shape)}."
            )

        if not torch.is_tensor(class_labels) or class_labels.dtype not in (torch.int64, torch.int32):
            dtype = class_labels.dtype if torch.is_tensor(class_labels) else type(class_labels).__name__
            raise TypeError(f"`class_labels` must be a tensor of dtype int64 or int32, but is {dtype}.")
        if tuple(class_labels.shape) != (batch_size,):
            raise ValueError(
                f"`class_labels` must have the shape (batch_size,) = ({batch_size},), but has "
                f"{tuple(class_labels.shape)}."
            )
        # The values are looked at on the CPU only: on an accelerator that would wait for the device at every call, and
        # under torch.compile it would break the graph.
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and batch_size > 0:
            lowest, highest = class_labels.min().item(), class_labels.max().item()
            if lowest < 0 or highest >= self.num_class_embeddings:
                null_class = (
                    f"{self.config.num_classes} is the null class"
                    if self.config.class_dropout_prob > 0
                    else "there is no null class, because `class_dropout_prob` is 0"
                )
                raise ValueError(
                    f"`class_labels` must lie in 0..{self.num_class_embeddings - 1} ({null_class}), but reach from "
                    f"{lowest} to {highest}."
                )

        if force_drop_ids is not None:
            if tuple(force_drop_ids.shape) != (batch_size,):
                raise ValueError(
                    f"`force_drop_ids` must have the shape (batch_size,) = ({batch_size},), but has "
                    f"{tuple(force_drop_ids.shape)}."
                )
            if self.config.class_dropout_prob == 0:
                raise ValueError(
                    "`force_drop_ids` needs a null class, which this model lacks, because `class_dropout_prob` is 0."
                )

    def embed_conditions(
        self, timestep: torch.Tensor | float | int, class_labels: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The conditioning vectors `(batch_size, hidden size)` of timesteps and classes, as `forward` takes them."""
        if not torch.is_tensor(timestep):
            timestep = torch.full((), timestep, dtype=torch.float32, device=class_labels.device)
        timestep = timestep.to(device=class_labels.device, dtype=torch.float32).expand(len(class_labels))
        # 1000 * sigma / 1000 mostly gives sigma back to the last bit; 1000 * sigma * 1e-3 does not.
        time = timestep / (1 / self.config.timestep_scale)
        time_features = self.time_proj(time).to(dtype)
        return self.timestep_embedder(time_features) + self.class_embedder(class_labels)

    @apply_forward_hook
    def compute_modulation(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        r"""
        Compute what the conditioning does to the tokens: the shifts, scales and gates of all blocks and of the output.

        They depend on the time and the class only, and a third of the weights serves nothing else. Where samples share
        them, or all steps of a sampler are known, they are computed once for each pair of time and class, and rows of
        the result are given to `forward` as `modulation`. There must be no hooks on the blocks that move their weights
        (offloading within the model, sharding): those act when a block is called.

        Args:
            timestep (`torch.Tensor` of shape `(N,)` or `()`): Timesteps as in `forward`.
            class_labels (`torch.Tensor` of shape `(N,)`, int64 or int32): Classes as in `forward`. None is dropped.

        Returns:
            `torch.Tensor` of shape `(N, 6 * num_layers + 2, hidden size)`, in the dtype of the model: shift, scale and
            gate of the attention and of the MLP of each block (DiT, section 3.2), then scale and shift of the output.

        Raises:
            ValueError: If the shapes do not fit each other, or a label is out of range (CPU).
            TypeError: If `class_labels` is not an integer tensor.
        """
        self.check_conditions(len(class_labels), timestep, class_labels, None)
        conditioning = self.embed_conditions(timestep, class_labels, self.pos_embed.dtype)

        modulation = [block.norm1.linear(block.norm1.silu(conditioning)) for block in self.transformer_blocks]
        modulation.append(self.norm_out.linear(self.norm_out.silu(conditioning)))
        return torch.cat(modulation, dim=1).unflatten(1, (-1, self.inner_dim))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        hidden_states_layer: int | None = None,
        modulation: torch.Tensor | None = None,
    ) -> Transformer1DModelOutput | tuple[torch.Tensor]:
        r"""
        Predict the velocity (SiT) or the noise (DiT) of noisy latents.

        Args:
            hidden_states (`torch.Tensor`):
                Noisy, normalised latents in the dtype of the model, of shape `(batch_size, num_tokens, in_channels)`,
                or `(batch_size, in_channels, sample_size, sample_size)` for 2-D latents.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or a number):
                Timestep in the scheduler's units (0..1000, 0 is data). It is multiplied by `timestep_scale`; this and
                the sine/cosine features are computed in float32.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, int64 or int32):
                Classes in 0..`num_classes`, where `num_classes` is the null class (only if `class_dropout_prob` > 0).
                Values out of range are reported on the CPU; on an accelerator they are the caller's to check.
            force_drop_ids (`torch.Tensor` of shape `(batch_size,)`, bool or integer, *optional*):
                Labels to replace by the null class (1 or `True` = replace), in train and eval mode. Without it labels
                are dropped in train mode only, with `class_dropout_prob`, from the global random state. A training
                loop whose draws must not depend on that state draws them itself:
                `force_drop_ids = torch.rand(batch_size, generator=generator) < config.class_dropout_prob`.
            attention_kwargs (`dict`, *optional*):
                Passed on to the attention processors. The entry `"scale"` is taken out: it scales the LoRA weights.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`Transformer1DModelOutput`] instead of a plain tuple.
            hidden_states_layer (`int`, *optional*):
                Block, counted from 1, after which the tokens are returned too: what representation alignment (REPA,
                arXiv 2410.06940) compares with a vision model.
            modulation (`torch.Tensor` of shape `(batch_size, 6 * num_layers + 2, hidden size)`, *optional*):
                Rows of [`~DiTTransformer1DModel.compute_modulation`], which take the place of `timestep` and
                `class_labels`. No label is dropped then.

        Returns:
            [`Transformer1DModelOutput`] or `tuple`: the prediction, of the shape of `hidden_states` with
            `out_channels` channels; with `hidden_states_layer` the tokens after that block as well.

        Raises:
            ValueError: If a shape does not fit the config or the other arguments, a label is out of range (CPU),
                `force_drop_ids` is given to a model without a null class or beside `modulation`, or there is no block
                `hidden_states_layer`.
            TypeError: If `hidden_states` is not of the model's dtype or `class_labels` is not an integer tensor.
        """
        self.check_inputs(hidden_states, timestep, class_labels, force_drop_ids, modulation, hidden_states_layer)

        # 1. Conditioning vector
        conditioning = None
        if modulation is None:
            if force_drop_ids is not None:
                class_labels = torch.where(force_drop_ids == 1, self.config.num_classes, class_labels)
            elif self.training and self.config.class_dropout_prob > 0:
                drop_ids = torch.rand(len(class_labels), device=class_labels.device) < self.config.class_dropout_prob
                class_labels = torch.where(drop_ids, self.config.num_classes, class_labels)
            conditioning = self.embed_conditions(timestep, class_labels, hidden_states.dtype)

        # 2. Tokens
        hidden_states = self.proj_in(hidden_states)
        if self.is_2d:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        hidden_states = hidden_states + self.pos_embed

        # 3. Blocks
        layer_hidden_states = None
        for layer, block in enumerate(self.transformer_blocks, start=1):
            block_modulation = None if modulation is None else modulation[:, 6 * (layer - 1) : 6 * layer]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, conditioning, attention_kwargs, block_modulation
                )
            else:
                hidden_states = block(hidden_states, conditioning, attention_kwargs, block_modulation)
            if layer == hidden_states_layer:
                layer_hidden_states = hidden_states

        # 4. Output
        if modulation is None:
            hidden_states = self.norm_out(hidden_states, conditioning)
        else:
            scale, shift = modulation[:, -2:, None].unbind(1)
            hidden_states = self.norm_out.norm(hidden_states) * (1 + scale) + shift
        hidden_states = self.proj_out(hidden_states)
        if self.is_2d:
            # Each token holds its patch as (row, column, channel).
            patch_size = self.config.patch_size
            grid_size = self.config.sample_size // patch_size
            hidden_states = hidden_states.unflatten(1, (grid_size, grid_size))
            hidden_states = hidden_states.unflatten(-1, (patch_size, patch_size, self.out_channels))
            hidden_states = hidden_states.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

        if not return_dict:
            return (hidden_states,) if layer_hidden_states is None else (hidden_states, layer_hidden_states)
        return Transformer1DModelOutput(sample=hidden_states, hidden_states=layer_hidden_states)
