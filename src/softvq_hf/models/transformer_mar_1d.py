"""MAR on 1-D latent tokens, and on the 2-D latents of the original, in one file.

MAR (Li et al., "Autoregressive Image Generation without Vector Quantization", arXiv 2406.11838) is a masked
autoencoder over continuous tokens: it looks at the tokens known so far and gives one conditioning vector for each
unknown one, and a small MLP, trained as a DDPM noise predictor on single tokens, turns that vector into a token.
SoftVQ-VAE (arXiv 2412.10958) trains it on the 32 or 64 1-D tokens of its tokenizers.
"""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


@dataclass
class MARTransformer1DModelOutput(BaseOutput):
    """
    The output of [`MARTransformer1DModel`].

    Args:
        conditions (`torch.Tensor` of shape `(batch_size, K, decoder_hidden_size)`):
            One vector for each predicted position, that the denoiser turns into a token.
    """

    conditions: torch.Tensor


class MARAttnProcessor:
    """Self-attention without a mask, through the attention backend that diffusers dispatches to."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "MARAttention", hidden_states: torch.Tensor, query_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        if attn.fused_projections and query_states is None:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states if query_states is None else query_states)
            key = attn.to_k(hidden_states)
            value = attn.to_v(hidden_states)

        query = query.unflatten(-1, (-1, attn.head_dim))
        key = key.unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            dropout_p=attn.dropout if attn.training else 0.0,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)

        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        return hidden_states


class MARAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head self-attention with separate query, key and value projections.

    Args:
        dim (`int`): Width of the tokens.
        heads (`int`): Number of heads, a divisor of `dim`.
        attention_dropout (`float`): Probability with which an attention weight is dropped in train mode.
        dropout (`float`): Probability with which an output is dropped in train mode.
    """

    _default_processor_cls = MARAttnProcessor
    _available_processors = [MARAttnProcessor]

    def __init__(self, dim: int, heads: int, attention_dropout: float = 0.0, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.use_bias = True
        self.dropout = attention_dropout

        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])

        self.set_processor(self._default_processor_cls())

    def forward(
        self, hidden_states: torch.Tensor, query_states: torch.Tensor | None = None, **attention_kwargs: Any
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, query_states, **attention_kwargs)


class MARTransformerBlock(nn.Module):
    """
    One pre-norm ViT block: attention, then an MLP with the exact GELU, each beside a residual connection.

    Args:
        dim (`int`): Width of the tokens.
        num_attention_heads (`int`): Number of heads.
        mlp_ratio (`float`): Hidden width of the MLP as a multiple of `dim`.
        attention_dropout (`float`): Dropout of attention weights.
        dropout (`float`): Dropout after the attention, and after each layer of the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        mlp_ratio: float = 4.0,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MARAttention(dim, num_attention_heads, attention_dropout, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(
            dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu", dropout=dropout, final_dropout=True
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        norm_hidden_states = self.norm1(hidden_states)
        query_states = None
        if positions is not None:  # only what these positions become is needed; all others are looked at
            index = positions[:, :, None].expand(-1, -1, hidden_states.shape[-1])
            hidden_states = hidden_states.gather(1, index)
            query_states = norm_hidden_states.gather(1, index)
        hidden_states = hidden_states + self.attn(norm_hidden_states, query_states, **(attention_kwargs or {}))
        hidden_states = hidden_states + self.ff(self.norm2(hidden_states))
        return hidden_states


class MARDenoiserBlock(nn.Module):
    """
    One residual block of the denoiser: a modulated LayerNorm and a SiLU MLP, gated.

    Args:
        dim (`int`): Width.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.silu = nn.SiLU()
        self.modulation = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear_1 = nn.Linear(dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(self.silu(conditioning)).chunk(3, dim=-1)
        norm_hidden_states = self.norm(hidden_states) * (1 + scale) + shift
        return hidden_states + gate * self.linear_2(self.silu(self.linear_1(norm_hidden_states)))


class MARDenoiser(nn.Module):
    """
    The MLP behind the diffusion loss (MAR, section 3.2): it predicts the noise, and the variance of a step, of single
    noisy tokens.

    Args:
        in_channels (`int`): Channels C of a token.
        condition_dim (`int`): Width of the conditions.
        dim (`int`): Width of the MLP.
        num_layers (`int`): Residual blocks.
    """

    def __init__(self, in_channels: int, condition_dim: int, dim: int, num_layers: int):
        super().__init__()
        self.silu = nn.SiLU()
        # The official time features use 10000^(-k/128), hence a shift of 0.
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.condition_embedder = nn.Linear(condition_dim, dim)
        self.proj_in = nn.Linear(in_channels, dim)
        self.blocks = nn.ModuleList([MARDenoiserBlock(dim) for _ in range(num_layers)])
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, 2 * in_channels)
        self.gradient_checkpointing = False

    def embed_timesteps(self, timestep: torch.Tensor) -> torch.Tensor:
        """Vectors `(N, dim)` of timesteps `(N,)` from 0 to 999."""
        return self.timestep_embedder(self.time_proj(timestep).to(self.proj_out.weight.dtype))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction for noisy tokens: see [`~MARTransformer1DModel.denoise`]."""
        if conditioning is None:
            conditioning = self.embed_timesteps(timestep) + self.condition_embedder(conditions)
        hidden_states = self.proj_in(sample)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)
        shift, scale = self.modulation_out(self.silu(conditioning)).chunk(2, dim=-1)
        return self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)


class MARTransformer1DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The class-conditional generator MAR. Tokens `(batch_size, num_tokens, token_channels)` are 1-D latents as they are,
    or, when `sample_size` is given, the patches of 2-D latents `(batch_size, in_channels, sample_size, sample_size)`,
    row by row, as [`~MARTransformer1DModel.patchify`] cuts them.

    MAR-B on 64 SoftVQ tokens of 32 channels is `MARTransformer1DModel()`. A new model has PyTorch's default weights;
    before training it from scratch call [`~MARTransformer1DModel.initialize_weights`].

    Args:
        num_tokens (`int`, defaults to 64):
            Number of 1-D latent tokens. Not used with 2-D latents, whose tokens are the
            `(sample_size // patch_size) ** 2` patches.
        in_channels (`int`, defaults to 32):
            Channels of the latents.
        buffer_size (`int`, defaults to 64):
            Positions before the tokens that hold the class. The original has 64 for 256 tokens.
        encoder_hidden_size (`int`, defaults to 768):
            Width of the encoder.
        encoder_num_layers (`int`, defaults to 12):
            Blocks of the encoder.
        encoder_num_attention_heads (`int`, defaults to 12):
            Heads of the encoder, a divisor of its width.
        decoder_hidden_size (`int`, defaults to 768):
            Width of the decoder.
        decoder_num_layers (`int`, defaults to 12):
            Blocks of the decoder.
        decoder_num_attention_heads (`int`, defaults to 12):
            Heads of the decoder, a divisor of its width.
        mlp_ratio (`float`, defaults to 4.0):
            Hidden width of the blocks' MLPs as a multiple of their width.
        attention_dropout (`float`, defaults to 0.1):
            Dropout of attention weights in train mode.
        dropout (`float`, defaults to 0.1):
            Dropout after each attention and each layer of the blocks' MLPs in train mode.
        denoiser_hidden_size (`int`, defaults to 1024):
            Width of the MLP that makes tokens of conditions.
        denoiser_num_layers (`int`, defaults to 6):
            Its residual blocks.
        num_classes (`int`, defaults to 1000):
            Number of classes. The null class of classifier-free guidance has the index `num_classes`.
        class_dropout_prob (`float`, defaults to 0.1):
            Probability with which a label is replaced by the null class in train mode.
        patch_size (`int`, defaults to 1):
            Side of a patch of a 2-D latent.
        sample_size (`int`, *optional*):
            Side of a 2-D latent.

    Raises:
        ValueError: If a size is not positive, a probability lies outside of [0, 1], a width is not a multiple of its
            heads, or `patch_size` does not divide `sample_size`, or is given without it.
        TypeError: If a size is not an integer, or a ratio or probability not a number.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MARTransformerBlock", "MARDenoiserBlock"]
    _group_offload_block_modules = ["denoiser"]
    _repeated_blocks = ["MARTransformerBlock", "MARDenoiserBlock"]
    _skip_layerwise_casting_patterns = ["proj_in", "embedder", "pos_embed", "mask_token", "norm", "proj_out"]

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 64,
        in_channels: int = 32,
        buffer_size: int = 64,
        encoder_hidden_size: int = 768,
        encoder_num_layers: int = 12,
        encoder_num_attention_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        attention_dropout: float = 0.1,
        dropout: float = 0.1,
        denoiser_hidden_size: int = 1024,
        denoiser_num_layers: int = 6,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        patch_size: int = 1,
        sample_size: int | None = None,
    ):
        super().__init__()

        sizes = {
            "num_tokens": num_tokens,
            "in_channels": in_channels,
            "buffer_size": buffer_size,
            "encoder_hidden_size": encoder_hidden_size,
            "encoder_num_layers": encoder_num_layers,
            "encoder_num_attention_heads": encoder_num_attention_heads,
            "decoder_hidden_size": decoder_hidden_size,
            "decoder_num_layers": decoder_num_layers,
            "decoder_num_attention_heads": decoder_num_attention_heads,
            "denoiser_hidden_size": denoiser_hidden_size,
            "denoiser_num_layers": denoiser_num_layers,
            "num_classes": num_classes,
            "patch_size": patch_size,
        }
        if sample_size is not None:
            sizes["sample_size"] = sample_size
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer, but is {value!r}.")
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, but is {value}.")
        probabilities = {
            "attention_dropout": attention_dropout,
            "dropout": dropout,
            "class_dropout_prob": class_dropout_prob,
        }
        for name, value in {"mlp_ratio": mlp_ratio, **probabilities}.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"`{name}` must be a number, but is {value!r}.")
        if not math.isfinite(mlp_ratio) or int(min(encoder_hidden_size, decoder_hidden_size) * mlp_ratio) < 1:
            raise ValueError(f"`mlp_ratio` must give MLPs a width of 1 or more, but is {mlp_ratio}.")
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], but is {value}.")
        for part in ("encoder", "decoder"):
            width, heads = sizes[f"{part}_hidden_size"], sizes[f"{part}_num_attention_heads"]
            if width % heads != 0:
                raise ValueError(
                    f"`{part}_hidden_size` must be a multiple of `{part}_num_attention_heads` = {heads}, but is "
                    f"{width}."
                )
        if sample_size is None and patch_size != 1:
            raise ValueError(f"`patch_size` must be 1 without `sample_size`, but is {patch_size}.")
        if sample_size is not None and sample_size % patch_size != 0:
            raise ValueError(f"`sample_size` must be a multiple of `patch_size` = {patch_size}, but is {sample_size}.")

        self.is_2d = sample_size is not None
        self.num_tokens = (sample_size // patch_size) ** 2 if self.is_2d else num_tokens
        self.token_channels = in_channels * patch_size**2
        self.gradient_checkpointing = False

        # 1. Class: rows 0..num_classes - 1, then the null class
        self.class_embedder = nn.Embedding(num_classes + 1, encoder_hidden_size)

        # 2. Encoder of the buffer and the tokens known so far
        sequence_length = buffer_size + self.num_tokens
        self.proj_in = nn.Linear(self.token_channels, encoder_hidden_size)
        self.encoder_pos_embed = nn.Parameter(torch.randn(1, sequence_length, encoder_hidden_size) * 0.02)
        self.norm_in = nn.LayerNorm(encoder_hidden_size, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(
            [
                MARTransformerBlock(
                    encoder_hidden_size, encoder_num_attention_heads, mlp_ratio, attention_dropout, dropout
                )
                for _ in range(encoder_num_layers)
            ]
        )
        self.encoder_norm = nn.LayerNorm(encoder_hidden_size, eps=1e-6)

        # 3. Decoder of all positions
        self.decoder_embedder = nn.Linear(encoder_hidden_size, decoder_hidden_size)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_hidden_size) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, sequence_length, decoder_hidden_size) * 0.02)
        self.decoder_blocks = nn.ModuleList(
            [
                MARTransformerBlock(
                    decoder_hidden_size, decoder_num_attention_heads, mlp_ratio, attention_dropout, dropout
                )
                for _ in range(decoder_num_layers)
            ]
        )
        self.decoder_norm = nn.LayerNorm(decoder_hidden_size, eps=1e-6)
        self.condition_pos_embed = nn.Parameter(torch.randn(1, self.num_tokens, decoder_hidden_size) * 0.02)

        # 4. Denoiser of single tokens
        self.denoiser = MARDenoiser(
            self.token_channels, decoder_hidden_size, denoiser_hidden_size, denoiser_num_layers
        )

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict[str, Any], ...]:
        # `auto_map` tells `diffusers.AutoModel` where an exported folder has this file; it is no argument of the model
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def initialize_weights(self) -> None:
        """
        Draw the weights that training from scratch starts from: Xavier-uniform projections with zero biases, where
        queries, keys and values count as one projection; N(0, 0.02) for the tables, the mask token and the time MLP;
        zeros for the denoiser's modulations and output, which then predicts zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # fan in and fan out are D and 3 D together

        tables = (self.encoder_pos_embed, self.decoder_pos_embed, self.condition_pos_embed, self.mask_token)
        time_mlp = self.denoiser.timestep_embedder
        for weight in (*tables, self.class_embedder.weight, time_mlp.linear_1.weight, time_mlp.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        modulations = [block.modulation for block in self.denoiser.blocks]
        for layer in (*modulations, self.denoiser.modulation_out, self.denoiser.proj_out):
            nn.init.zeros_(layer.weight)

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Tokens `(B, L, token_channels)` of latents: 1-D latents are tokens already; of 2-D latents they are the
        patches, row by row, each with its channels as the slowest axis.

        Args:
            latents (`torch.Tensor`): `(B, num_tokens, in_channels)`, or `(B, in_channels, sample_size, sample_size)`.

        Raises:
            ValueError: If their shape is another one.
        """
        channels, side = self.config.in_channels, self.config.sample_size
        expected_shape = (channels, side, side) if self.is_2d else (self.num_tokens, channels)
        if tuple(latents.shape[1:]) != expected_shape:
            raise ValueError(
                f"`latents` must have the shape (batch_size, {', '.join(map(str, expected_shape))}), but has "
                f"{tuple(latents.shape)}."
            )
        if not self.is_2d:
            return latents
        patch_size = self.config.patch_size
        patches = latents.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))  # B, C, rows, p, columns, p
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Latents of tokens: the inverse of [`~MARTransformer1DModel.patchify`]."""
        if not self.is_2d:
            return tokens
        patch_size, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        patches = tokens.unflatten(1, (side, side)).unflatten(3, (-1, patch_size, patch_size))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def check_inputs(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor,
        visible_positions: torch.Tensor,
        predicted_positions: torch.Tensor | None,
        force_drop_ids: torch.Tensor | None,
    ) -> None:
        """Raise a `ValueError` or `TypeError` which says what [`~MARTransformer1DModel.forward`] accepts."""
        batch_size = hidden_states.shape[0]
        expected_shape = (batch_size, self.num_tokens, self.token_channels)
        if tuple(hidden_states.shape) != expected_shape:
            raise ValueError(
                f"`hidden_states` must have the shape (batch_size, {self.num_tokens}, {self.token_channels}), but has "
                f"{tuple(hidden_states.shape)}."
            )
        device_type = hidden_states.device.type
        autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
        if hidden_states.dtype != self.mask_token.dtype and not autocast:
            raise TypeError(
                f"`hidden_states` must be of the model's dtype {self.mask_token.dtype}, but is {hidden_states.dtype}."
            )
        if not torch.is_tensor(class_labels) or class_labels.dtype not in (torch.int64, torch.int32):
            dtype = class_labels.dtype if torch.is_tensor(class_labels) else type(class_labels).__name__
            raise TypeError(f"`class_labels` must be a tensor of dtype int64 or int32, but is {dtype}.")
        if force_drop_ids is not None and not torch.is_tensor(force_drop_ids):
            raise TypeError(f"`force_drop_ids` must be a tensor, but is {type(force_drop_ids).__name__}.")
        for name, drops in {"class_labels": class_labels, "force_drop_ids": force_drop_ids}.items():
            if drops is not None and tuple(drops.shape) != (batch_size,):
                raise ValueError(
                    f"`{name}` must have the shape (batch_size,) = ({batch_size},), but has {tuple(drops.shape)}."
                )
        ranges = {"class_labels": (class_labels, self.config.num_classes)}
        for name, positions in {
            "visible_positions": visible_positions,
            "predicted_positions": predicted_positions,
        }.items():
            if name == "predicted_positions" and positions is None:
                continue
            if not torch.is_tensor(positions) or positions.dtype != torch.int64:
                dtype = positions.dtype if torch.is_tensor(positions) else type(positions).__name__
                raise TypeError(f"`{name}` must be a tensor of dtype int64, but is {dtype}.")
            if positions.ndim != 2 or positions.shape[0] != batch_size or positions.shape[1] > self.num_tokens:
                raise ValueError(
                    f"`{name}` must have the shape (batch_size, K) = ({batch_size}, K) with K up to "
                    f"{self.num_tokens}, but has {tuple(positions.shape)}."
                )
            ranges[name] = positions, self.num_tokens - 1
        # The values are looked at on the CPU only: on an accelerator that would wait for the device at every call, and
        # under torch.compile it would break the graph.
        for name, (values, highest) in ranges.items():
            if values.device.type == "cpu" and not torch.compiler.is_compiling() and values.numel() > 0:
                if values.min() < 0 or values.max() > highest:
                    raise ValueError(
                        f"`{name}` must lie in 0..{highest}, but reach from {values.min()} to {values.max()}."
                    )
                if values.ndim == 2 and (values.sort(dim=1).values.diff(dim=1) == 0).any():
                    raise ValueError(f"`{name}` must not hold a position twice for a sample.")

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor,
        visible_positions: torch.Tensor,
        predicted_positions: torch.Tensor | None = None,
        force_drop_ids: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> MARTransformer1DModelOutput | tuple[torch.Tensor]:
        r"""
        Look at the visible tokens, and give a condition for others (MAR, section 3.3).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, token_channels)`):
                Normalised tokens in the dtype of the model. Only those at `visible_positions` matter.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, int64 or int32):
                Classes in 0..`num_classes`, where `num_classes` is the null class. Values out of range are reported on
                the CPU; on an accelerator they are the caller's to check, as are those of positions.
            visible_positions (`torch.Tensor` of shape `(batch_size, V)`, int64):
                Where the known tokens of each sample are, from 0, without repetitions; V may be 0. Of a mask, `True`
                where a token is unknown, equally often in each row: `(~mask).nonzero()[:, 1].view(batch_size, -1)`.
            predicted_positions (`torch.Tensor` of shape `(batch_size, K)`, int64, *optional*):
                Where conditions are wanted, without repetitions, by default everywhere in order. The last block then
                computes these alone.
            force_drop_ids (`torch.Tensor` of shape `(batch_size,)`, bool or integer, *optional*):
                Labels to replace by the null class (1 or `True` = replace), in train and eval mode. Without it labels
                are dropped in train mode only, with `class_dropout_prob`, from the global random state.
            attention_kwargs (`dict`, *optional*):
                Passed on to the attention processors. The entry `"scale"` is taken out: it scales the LoRA weights.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`MARTransformer1DModelOutput`] instead of a plain tuple.

        Returns:
            [`MARTransformer1DModelOutput`] or `tuple`: `conditions` of shape `(batch_size, K, decoder_hidden_size)`.

        Raises:
            ValueError: If a shape does not fit the config or the other arguments, or a value is out of range (CPU).
            TypeError: If `hidden_states` is not of the model's dtype, or labels or positions are not integers.
        """
        self.check_inputs(hidden_states, class_labels, visible_positions, predicted_positions, force_drop_ids)
        batch_size, buffer_size = len(hidden_states), self.config.buffer_size

        # 1. Class
        if force_drop_ids is None and self.training and self.config.class_dropout_prob > 0:
            force_drop_ids = torch.rand(batch_size, device=class_labels.device) < self.config.class_dropout_prob
        if force_drop_ids is not None:
            class_labels = torch.where(force_drop_ids == 1, self.config.num_classes, class_labels)
        buffer = self.class_embedder(class_labels)[:, None].expand(-1, buffer_size, -1)

        # 2. Encoder
        buffer_pos_embed, token_pos_embed = self.encoder_pos_embed[0].split([buffer_size, self.num_tokens])
        index = visible_positions[:, :, None].expand(-1, -1, hidden_states.shape[-1])
        visible = self.proj_in(hidden_states.gather(1, index)) + token_pos_embed[visible_positions]
        hidden_states = self.norm_in(torch.cat([buffer + buffer_pos_embed, visible], dim=1))
        for block in self.encoder_blocks:
            hidden_states = self.call_block(block, hidden_states, attention_kwargs)
        hidden_states = self.decoder_embedder(self.encoder_norm(hidden_states))

        # 3. Decoder
        buffer, visible = hidden_states.split([buffer_size, visible_positions.shape[1]], dim=1)
        index = visible_positions[:, :, None].expand(-1, -1, hidden_states.shape[-1])
        tokens = self.mask_token.to(hidden_states.dtype).expand(batch_size, self.num_tokens, -1)
        hidden_states = torch.cat([buffer, tokens.scatter(1, index, visible)], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks[:-1]:
            hidden_states = self.call_block(block, hidden_states, attention_kwargs)
        positions = None if predicted_positions is None else predicted_positions + buffer_size
        hidden_states = self.call_block(self.decoder_blocks[-1], hidden_states, attention_kwargs, positions)
        if predicted_positions is None:
            hidden_states = hidden_states[:, buffer_size:]
            pos_embed = self.condition_pos_embed
        else:
            pos_embed = self.condition_pos_embed[0][predicted_positions]
        conditions = self.decoder_norm(hidden_states) + pos_embed

        if not return_dict:
            return (conditions,)
        return MARTransformer1DModelOutput(conditions=conditions)

    def call_block(self, block: MARTransformerBlock, *inputs: Any) -> torch.Tensor:
        """A block's output, with checkpointed gradients where they are on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    @apply_forward_hook
    def embed_timesteps(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the denoiser makes of timesteps `(N,)`, 0 (data) to 999: vectors `(N, denoiser_hidden_size)`."""
        return self.denoiser.embed_timesteps(timestep)

    @apply_forward_hook
    def embed_conditions(self, conditions: torch.Tensor) -> torch.Tensor:
        """What the denoiser makes of conditions `(..., decoder_hidden_size)`: `(..., denoiser_hidden_size)`."""
        return self.denoiser.condition_embedder(conditions)

    @apply_forward_hook
    def denoise(
        self,
        noisy_tokens: torch.Tensor,
        timestep: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Predict the noise in single tokens, and the variance of a step (MAR, section 3.2). LoRA weights count in full
        here, whatever the `scale` that `forward` was given.

        Args:
            noisy_tokens (`torch.Tensor` of shape `(N, token_channels)`):
                Tokens of one timestep each, in the dtype of the model.
            timestep (`torch.Tensor` of shape `(N,)`, *optional*):
                Timesteps from 0 (data) to 999.
            conditions (`torch.Tensor` of shape `(N, decoder_hidden_size)`, *optional*):
                What `forward` gives.
            conditioning (`torch.Tensor` of shape `(N, denoiser_hidden_size)`, *optional*):
                In place of the two: the sum of [`~MARTransformer1DModel.embed_timesteps`] and
                [`~MARTransformer1DModel.embed_conditions`], which do not change in all steps of a chain. There must be
                no hooks on the denoiser's layers that move their weights (offloading within the model).

        Returns:
            `torch.Tensor` of shape `(N, 2 * token_channels)`: the noise, then where the logarithm of the variance lies
            between its bounds, -1 the smaller and 1 the larger one.

        Raises:
            ValueError: If neither `conditioning` nor both of the others are given, or shapes do not fit each other.
        """
        if conditioning is None and (timestep is None or conditions is None):
            raise ValueError("`conditioning` is None, allowed: a tensor, or `timestep` and `conditions`.")
        num_tokens = len(noisy_tokens)
        shapes = {
            "noisy_tokens": (noisy_tokens, (num_tokens, self.token_channels)),
            "timestep": (timestep, (num_tokens,)),
            "conditions": (conditions, (num_tokens, self.config.decoder_hidden_size)),
            "conditioning": (conditioning, (num_tokens, self.config.denoiser_hidden_size)),
        }
        for name, (tensor, expected_shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != expected_shape:
                raise ValueError(f"`{name}` must have the shape {expected_shape}, but has {tuple(tensor.shape)}.")
        return self.denoiser(noisy_tokens, timestep, conditions, conditioning)
