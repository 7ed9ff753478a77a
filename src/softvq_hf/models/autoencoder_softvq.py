"""SoftVQ-VAE: an autoencoder that turns an image into a short 1-D sequence of continuous tokens (arXiv 2412.10958).

A ViT encoder carries learnable latent tokens beside the image patches; a quantizer mixes codewords into each of them;
a ViT decoder rebuilds the pixels from mask tokens that attend to the latents. The same file holds the siblings which
share encoder and decoder and differ in the bottleneck: hard vector quantization, a Gaussian posterior, and none. The
last of them, with rotary positions, a MoVQ decoder and masked patches in training, is MAETok (arXiv 2502.03444).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor


# of the entropy loss, whatever `tau` is
ENTROPY_TEMPERATURE = 0.01


class TokenGaussianDistribution:
    """
    Diagonal Gaussian posterior over a sequence of latent tokens.

    Args:
        moments (`torch.Tensor` of shape `(B, L, 2C)`):
            Mean (first half of the last axis) and log-variance (second half, clamped to [-30, 20]).
    """

    def __init__(self, moments: torch.Tensor):
        self.mean, logvar = moments.chunk(2, dim=-1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """A draw of shape `(B, L, C)` by the reparametrisation `mean + std * noise`."""
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> torch.Tensor:
        """The mean, of shape `(B, L, C)`."""
        return self.mean

    def kl(self) -> torch.Tensor:
        """Divergence from the standard normal in nats, summed over tokens and channels: float32 of shape `(B,)`."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2))


@dataclass
class SoftVQEncoderOutput(BaseOutput):
    """
    Output of [`AutoencoderSoftVQ.encode`].

    Args:
        latent (`torch.Tensor` of shape `(B, L, C)`):
            Latents as the decoder takes them, not normalised (see [`AutoencoderSoftVQ.scale_latent`]). The mean of the
            posterior for the "kl" quantizer.
        indices (`torch.LongTensor` of shape `(B, num_codebooks, L / num_codebooks)`, *optional*):
            Most probable ("softvq") or nearest ("vq") codeword of each token. Entry `[b, k, j]` belongs to token
            `k * L / num_codebooks + j` of image `b` and is a row of codebook `k`.
        max_probability (`torch.Tensor`, *optional*):
            Scalar in (0, 1] without gradient: probability of the most probable codeword, averaged over all tokens.
            "softvq" only.
        latent_dist (`TokenGaussianDistribution`, *optional*): Posterior, "kl" only.
        entropy_loss (`torch.Tensor`, *optional*): Scalar, unweighted. "softvq" and "vq" in train mode.
        vq_loss (`torch.Tensor`, *optional*):
            Scalar mean squared distance that moves the codewords. "vq" in train mode.
        commit_loss (`torch.Tensor`, *optional*): Scalar mean squared distance that moves the encoder, unweighted. "vq"
            in train mode.
        kl_loss (`torch.Tensor`, *optional*): Scalar divergence in nats per image, unweighted. "kl" in train mode.
    """

    latent: torch.Tensor
    indices: torch.Tensor | None = None
    max_probability: torch.Tensor | None = None
    latent_dist: TokenGaussianDistribution | None = None
    entropy_loss: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    commit_loss: torch.Tensor | None = None
    kl_loss: torch.Tensor | None = None


@dataclass
class SoftVQOutput(BaseOutput):
    """
    Output of [`AutoencoderSoftVQ.forward`]: the reconstruction and everything a training loss needs.

    Args:
        sample (`torch.Tensor` of shape `(B, in_channels, H, W)`): Reconstruction, nominally in [-1, 1], not clamped.
        latent (`torch.Tensor` of shape `(B, L, C)`): The latents that were decoded.
        indices, max_probability, entropy_loss, vq_loss, commit_loss, kl_loss: As in [`SoftVQEncoderOutput`].
    """

    sample: torch.Tensor
    # optional, as everything after the first field: accelerate rebuilds outputs from a dict under mixed precision
    latent: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    max_probability: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    commit_loss: torch.Tensor | None = None
    kl_loss: torch.Tensor | None = None


def resample_position_embedding(
    position_embedding: torch.Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]
) -> torch.Tensor:
    """
    Resize the learned positions of a patch grid: bicubic with antialiasing, in float32.

    Args:
        position_embedding (`torch.Tensor` of shape `(1, rows * columns, C)`): Positions in raster order.
        grid_size (`tuple[int, int]`): Rows and columns of their grid.
        new_grid_size (`tuple[int, int]`): Rows and columns of the new grid.

    Returns:
        `torch.Tensor`: float32 of shape `(1, new rows * new columns, C)`.
    """
    grid = position_embedding.float().unflatten(1, grid_size).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid_size, mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


class SoftVQRotaryEmbedding(nn.Module):
    """
    Two-dimensional rotary positions (arXiv 2403.13298) for the patches of an image, one table per layer and head.

    A patch in column x and row y turns pair j of a head's channels by the angle `x * f_x[j] + y * f_y[j]`; x and y
    count patches. Prefix and latent tokens are not turned.

    Args:
        num_layers (`int`): Number of transformer blocks.
        num_attention_heads (`int`): Heads of a block.
        head_dim (`int`): Channels of a head, a multiple of 4.
        theta (`float`): Base of the frequencies `theta ** (-4 j / head_dim)`.
        mixed (`bool`):
            Whether the frequencies of x and y are learned for each layer and head, from randomly turned axes.
            Otherwise the first half of the pairs is for x and the second for y, and nothing is learned.
    """

    def __init__(self, num_layers: int, num_attention_heads: int, head_dim: int, theta: float, mixed: bool):
        super().__init__()
        self.num_layers = num_layers
        self.head_dim = head_dim
        self.theta = theta
        if mixed:
            magnitude = self.frequency_magnitudes()
            angle = 2.0 * math.pi * torch.rand(num_layers, num_attention_heads, 1)
            x = torch.cat([magnitude * angle.cos(), magnitude * (angle + math.pi / 2).cos()], dim=-1)
            y = torch.cat([magnitude * angle.sin(), magnitude * (angle + math.pi / 2).sin()], dim=-1)
            self.frequencies = nn.Parameter(torch.stack([x, y]).flatten(2))  # (2, layers, heads * head_dim / 2)
        else:
            self.frequencies = None

    def frequency_magnitudes(self, device: torch.device | None = None) -> torch.Tensor:
        """The `head_dim / 4` frequencies of one axis, from 1 downwards; float32."""
        exponents = torch.arange(0, self.head_dim, 4, dtype=torch.float32, device=device) / self.head_dim
        return self.theta**-exponents

    def forward(
        self, grid_size: tuple[int, int], num_prefix_tokens: int, num_latent_tokens: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            grid_size (`tuple[int, int]`): Patches per column and per row.
            num_prefix_tokens (`int`): Tokens before the patches.
            num_latent_tokens (`int`): Tokens after the patches.
            device (`torch.device`): Where the result is needed.

        Returns:
            `tuple`: cosines and sines of the angles, float32 of shape `(num_layers, S, heads, head_dim / 2)` for the
            whole sequence of S tokens; one head stands for all where nothing is learned.
        """
        if self.frequencies is None:
            magnitude = self.frequency_magnitudes(device)
            zeros = torch.zeros_like(magnitude)
            frequencies = torch.stack([torch.cat([magnitude, zeros]), torch.cat([zeros, magnitude])])[:, None, None]
            frequencies = frequencies.expand(-1, self.num_layers, -1, -1)
        else:
            frequencies = self.frequencies.float().unflatten(2, (-1, self.head_dim // 2))
        rows = torch.arange(grid_size[0], dtype=torch.float32, device=device)
        columns = torch.arange(grid_size[1], dtype=torch.float32, device=device)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        angles = x.reshape(1, -1, 1, 1) * frequencies[0][:, None] + y.reshape(1, -1, 1, 1) * frequencies[1][:, None]
        angles = F.pad(angles, (0, 0, 0, 0, num_prefix_tokens, num_latent_tokens))
        return angles.cos(), angles.sin()


def apply_rotary_embedding(
    hidden_states: torch.Tensor, rotary_embedding: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """
    Turn neighbouring channels, (0, 1), (2, 3) and so on, in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, heads, head_dim)`): Queries or keys.
        rotary_embedding (`tuple` of two `torch.Tensor` of shape `(S, heads or 1, head_dim / 2)`): Cosines and sines.

    Returns:
        `torch.Tensor`: as `hidden_states`.
    """
    cos, sin = rotary_embedding
    even, odd = hidden_states.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(hidden_states.dtype)


class SoftVQAttnProcessor:
    """Bidirectional self-attention over all tokens through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "SoftVQAttention",
        hidden_states: torch.Tensor,
        rotary_embedding: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        query = query.unflatten(-1, (attn.heads, -1))
        key = key.unflatten(-1, (attn.heads, -1))
        value = value.unflatten(-1, (attn.heads, -1))

        if rotary_embedding is not None:
            query = apply_rotary_embedding(query, rotary_embedding)
            key = apply_rotary_embedding(key, rotary_embedding)

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)

        hidden_states = attn.to_out[0](hidden_states)
        return attn.to_out[1](hidden_states)


class SoftVQAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases on all projections; `(B, N, hidden_size)` in and out."""

    _default_processor_cls = SoftVQAttnProcessor
    _available_processors = [SoftVQAttnProcessor]

    def __init__(self, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.heads = num_attention_heads
        self.use_bias = True
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size), nn.Dropout(0.0)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self, hidden_states: torch.Tensor, rotary_embedding: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary_embedding)


class SoftVQFeedForward(nn.Module):
    """
    Linear, exact GELU, linear; or SwiGLU (arXiv 2002.05202), whose first linear layer computes gate and value together
    and which is narrower by a third, as in DINOv2's largest model. `(B, N, hidden_size)` in and out.
    """

    def __init__(self, hidden_size: int, mlp_ratio: float, activation_fn: str):
        super().__init__()
        self.is_gated = activation_fn == "swiglu"
        inner_size = int(hidden_size * mlp_ratio * 2 / 3) if self.is_gated else int(hidden_size * mlp_ratio)
        self.linear_1 = nn.Linear(hidden_size, 2 * inner_size if self.is_gated else inner_size)
        self.act = nn.SiLU() if self.is_gated else nn.GELU()
        self.linear_2 = nn.Linear(inner_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear_1(hidden_states)
        if self.is_gated:
            gate, hidden_states = hidden_states.chunk(2, dim=-1)
            return self.linear_2(self.act(gate) * hidden_states)
        return self.linear_2(self.act(hidden_states))


class SoftVQLayerScale(nn.Module):
    """Learned gain per channel on a residual branch, as in DINOv2."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), float(init_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


class SoftVQTransformerBlock(nn.Module):
    """Pre-norm ViT block with LayerScale on both branches (the DINOv2 block)."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        mlp_ratio: float,
        activation_fn: str,
        layer_scale_init_value: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = SoftVQAttention(hidden_size, num_attention_heads)
        self.layer_scale1 = SoftVQLayerScale(hidden_size, layer_scale_init_value)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ff = SoftVQFeedForward(hidden_size, mlp_ratio, activation_fn)
        self.layer_scale2 = SoftVQLayerScale(hidden_size, layer_scale_init_value)

    def forward(
        self, hidden_states: torch.Tensor, rotary_embedding: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.layer_scale1(self.attn(self.norm1(hidden_states), rotary_embedding))
        return hidden_states + self.layer_scale2(self.ff(self.norm2(hidden_states)))


class SoftVQDecoderBlock(SoftVQTransformerBlock):
    """
    The same block in the decoder. Encoder and decoder may differ in width and length, and regional compilation counts
    graphs per `forward`, so each side has its own.
    """

    def forward(
        self, hidden_states: torch.Tensor, rotary_embedding: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        return super().forward(hidden_states, rotary_embedding)


def modulate_latent_tokens(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x * scale + shift` (not `1 + scale`) on the last L of `(B, S, C)` tokens; `shift`, `scale` are `(B, L, C)`."""
    image_tokens, latent_tokens = hidden_states.split([hidden_states.shape[1] - shift.shape[1], shift.shape[1]], dim=1)
    return torch.cat([image_tokens, latent_tokens * scale + shift], dim=1)


class SoftVQMoVQNorm(nn.Module):
    """
    The last LayerNorm of a MoVQ decoder: without weights of its own; the latents shift and scale their own tokens.
    """

    def __init__(self, hidden_size: int, latent_channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(latent_channels, 2 * hidden_size)

    def forward(self, hidden_states: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(F.silu(latent)).chunk(2, dim=-1)
        return modulate_latent_tokens(self.norm(hidden_states), shift, scale)


class SoftVQMoVQBlock(nn.Module):
    """
    Decoder block of MAETok (arXiv 2502.03444) after MoVQ's modulated normalisation (arXiv 2209.09002): in front of
    attention and MLP the latents, as they were before their projection, shift and scale their own tokens.
    """

    def __init__(
        self, hidden_size: int, num_attention_heads: int, mlp_ratio: float, activation_fn: str, latent_channels: int
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = SoftVQAttention(hidden_size, num_attention_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.ff = SoftVQFeedForward(hidden_size, mlp_ratio, activation_fn)
        self.modulation = nn.Linear(latent_channels, 4 * hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_embedding: tuple[torch.Tensor, torch.Tensor] | None,
        latent: torch.Tensor,
    ) -> torch.Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(latent)).chunk(4, dim=-1)
        norm_hidden_states = modulate_latent_tokens(self.norm1(hidden_states), shift1, scale1)
        hidden_states = hidden_states + self.attn(norm_hidden_states, rotary_embedding)
        norm_hidden_states = modulate_latent_tokens(self.norm2(hidden_states), shift2, scale2)
        return hidden_states + self.ff(norm_hidden_states)


class SoftVQTokenPositions(nn.Module):
    """
    Prefix tokens (class token, registers) and the learned absolute positions of the image tokens.

    Without registers the position table covers the class token too; with registers it covers the image tokens alone
    (the two DINOv2 layouts).

    Args:
        hidden_size (`int`): Width of the tokens.
        grid_size (`tuple[int, int]`): Patches per column and per row that the position table is made for.
        num_register_tokens (`int`): Number of register tokens.
        cls_token (`bool`): Whether the sequence starts with a class token.
        absolute_positions (`bool`): Whether there is a position table.
    """

    def __init__(
        self,
        hidden_size: int,
        grid_size: tuple[int, int],
        num_register_tokens: int,
        cls_token: bool = True,
        absolute_positions: bool = True,
    ):
        super().__init__()
        self.grid_size = grid_size
        self.num_prefix_tokens = int(cls_token) + num_register_tokens
        self.cls_token = nn.Parameter(torch.randn(1, 1, hidden_size) * 1e-6) if cls_token else None
        if num_register_tokens > 0:
            self.register_tokens = nn.Parameter(torch.randn(1, num_register_tokens, hidden_size) * 1e-6)
        else:
            self.register_tokens = None
        self.embeds_cls_token = cls_token and num_register_tokens == 0
        if absolute_positions:
            num_positions = int(self.embeds_cls_token) + grid_size[0] * grid_size[1]
            self.position_embedding = nn.Parameter(torch.zeros(1, num_positions, hidden_size))
        else:
            self.position_embedding = None

    def forward(self, image_tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`(B, N, hidden_size)` image tokens of a grid to `(B, num_prefix_tokens + N, hidden_size)`."""
        prefix = [
            tokens.expand(image_tokens.shape[0], -1, -1)
            for tokens in (self.cls_token, self.register_tokens)
            if tokens is not None
        ]
        if self.position_embedding is None:
            return torch.cat([*prefix, image_tokens], dim=1)

        position_embedding = self.position_embedding
        if grid_size != self.grid_size:
            first = int(self.embeds_cls_token)
            resampled = resample_position_embedding(position_embedding[:, first:], self.grid_size, grid_size)
            position_embedding = torch.cat(
                [position_embedding[:, :first], resampled.to(position_embedding.dtype)], dim=1
            )
        if self.embeds_cls_token:
            return torch.cat([*prefix, image_tokens], dim=1) + position_embedding
        return torch.cat([*prefix, image_tokens + position_embedding], dim=1)


class SoftVQEncoderTokens(SoftVQTokenPositions):
    """[prefix, image tokens, learnable latent tokens], all with their positions: what the encoder's blocks see."""

    def __init__(
        self,
        hidden_size: int,
        grid_size: tuple[int, int],
        num_latent_tokens: int,
        num_register_tokens: int,
        mask_token: bool,
    ):
        super().__init__(hidden_size, grid_size, num_register_tokens)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if mask_token else None
        self.latent_tokens = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))
        self.latent_position_embedding = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))

    def forward(
        self, image_tokens: torch.Tensor, grid_size: tuple[int, int], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        `(B, N, hidden_size)` image tokens to `(B, num_prefix_tokens + N + L, hidden_size)`; those that `mask`
        `(B, N)` marks are replaced by the mask token first.
        """
        if mask is not None:
            image_tokens = torch.where(mask[:, :, None], self.mask_token.to(image_tokens.dtype), image_tokens)
        latent_tokens = (self.latent_tokens + self.latent_position_embedding).expand(image_tokens.shape[0], -1, -1)
        return torch.cat([super().forward(image_tokens, grid_size), latent_tokens], dim=1)


class SoftVQDecoderTokens(SoftVQTokenPositions):
    """[prefix, mask tokens, latent tokens], all with their positions: what the decoder's blocks see."""

    def __init__(
        self,
        hidden_size: int,
        grid_size: tuple[int, int],
        num_latent_tokens: int,
        num_register_tokens: int,
        cls_token: bool,
        absolute_positions: bool,
    ):
        super().__init__(hidden_size, grid_size, num_register_tokens, cls_token, absolute_positions)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.latent_position_embedding = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))

    def forward(self, latent_tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`(B, L, hidden_size)` latent tokens to `(B, num_prefix_tokens + N + L, hidden_size)`."""
        mask_tokens = self.mask_token.expand(latent_tokens.shape[0], grid_size[0] * grid_size[1], -1)
        image_tokens = super().forward(mask_tokens, grid_size)
        return torch.cat([image_tokens, latent_tokens + self.latent_position_embedding], dim=1)


class SoftVQEncoder(nn.Module):
    """
    ViT over the sequence [prefix, image patches, learnable latent tokens]; the latent tokens are the result.

    Args:
        grid_size (`tuple[int, int]`): Patches per column and per row of an image of the configured size.
        num_latent_tokens (`int`): Number of latent tokens L.
        rope (`SoftVQRotaryEmbedding` or `None`): Rotary positions, which here come on top of the absolute ones.
        mask_token (`bool`): Whether there is a token that replaces masked patches.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        grid_size: tuple[int, int],
        num_latent_tokens: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: float,
        activation_fn: str,
        num_register_tokens: int,
        layer_scale_init_value: float,
        rope: SoftVQRotaryEmbedding | None,
        mask_token: bool,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.num_latent_tokens = num_latent_tokens
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.positions = SoftVQEncoderTokens(
            hidden_size, grid_size, num_latent_tokens, num_register_tokens, mask_token
        )
        self.rope = rope
        self.blocks = nn.ModuleList(
            [
                SoftVQTransformerBlock(
                    hidden_size, num_attention_heads, mlp_ratio, activation_fn, layer_scale_init_value
                )
                for _ in range(num_layers)
            ]
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, in_channels, H, W)` images, with `(B, N)` masked patches, to `(B, L, hidden_size)` latent tokens."""
        height, width = pixel_values.shape[-2:]
        grid_size = (height // self.patch_size, width // self.patch_size)
        image_tokens = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        hidden_states = self.positions(image_tokens, grid_size, mask)

        rotary_embedding = [None] * len(self.blocks)
        if self.rope is not None:
            tables = self.rope(
                grid_size, self.positions.num_prefix_tokens, self.num_latent_tokens, hidden_states.device
            )
            rotary_embedding = list(zip(*tables, strict=True))

        for block, block_rotary_embedding in zip(self.blocks, rotary_embedding, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, block_rotary_embedding)
            else:
                hidden_states = block(hidden_states, block_rotary_embedding)

        return self.norm(hidden_states)[:, -self.num_latent_tokens :]


class SoftVQLinearPixelHead(nn.Module):
    """One linear layer from an image token to its patch of pixels (row in patch, column in patch, channel)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.out_channels = out_channels
        self.proj = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.proj.weight

    def forward(self, image_tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`(B, N, hidden_size)` image tokens in raster order to `(B, out_channels, H, W)` pixels."""
        rows, columns = grid_size
        pixels = self.proj(image_tokens).reshape(
            -1, rows, columns, self.patch_size, self.patch_size, self.out_channels
        )
        pixels = pixels.permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(-1, self.out_channels, rows * self.patch_size, columns * self.patch_size)


class SoftVQConvPixelHead(nn.Module):
    """A 1 x 1 convolution, then four times nearest-neighbour upsampling and a 3 x 3 convolution: patches of 16."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.proj = nn.Conv2d(hidden_size, 128, kernel_size=1)
        widths = (128, 64, 32, 16, out_channels)
        self.convs = nn.ModuleList(
            [nn.Conv2d(widths[i], widths[i + 1], kernel_size=3, padding=1) for i in range(len(widths) - 1)]
        )

    @property
    def last_layer(self) -> nn.Parameter:
        return self.convs[-1].weight

    def forward(self, image_tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`(B, N, hidden_size)` image tokens in raster order to `(B, out_channels, H, W)` pixels."""
        hidden_states = self.proj(image_tokens.transpose(1, 2).unflatten(2, grid_size))
        for conv in self.convs:
            hidden_states = F.interpolate(F.relu(hidden_states), scale_factor=2.0, mode="nearest")
            hidden_states = conv(hidden_states)
        return hidden_states


class SoftVQSirenPixelHead(nn.Module):
    """
    Two linear layers, each followed by `sin(30 x)` (SIREN, arXiv 2006.09661).

    The features of all tokens in a row are read as the pixels of the image, not patch by patch: token n, of as many
    tokens as the image has rows, makes rows of pixels. Images are thus square with a side of `patch_size ** 2`.
    """

    frequency = 30.0

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.out_channels = out_channels
        self.linear_1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear_2 = nn.Linear(2 * hidden_size, out_channels * patch_size**2)
        nn.init.uniform_(self.linear_1.weight, -1.0 / hidden_size, 1.0 / hidden_size)
        bound = math.sqrt(6.0 / (2 * hidden_size)) / self.frequency
        nn.init.uniform_(self.linear_2.weight, -bound, bound)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.linear_2.weight

    def forward(self, image_tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`(B, N, hidden_size)` image tokens to `(B, out_channels, H, W)` pixels in [-1, 1]."""
        rows, columns = grid_size
        hidden_states = torch.sin(self.frequency * self.linear_1(image_tokens))
        hidden_states = torch.sin(self.frequency * self.linear_2(hidden_states))
        return hidden_states.reshape(-1, self.out_channels, rows * self.patch_size, columns * self.patch_size)


class SoftVQDecoder(nn.Module):
    """
    ViT over the sequence [prefix, mask tokens, latents]; the mask tokens become the image.

    Args:
        grid_size (`tuple[int, int]`): Patches per column and per row of an image of the configured size.
        latent_channels (`int`): Width of the latents that modulate a MoVQ decoder.
        rope (`SoftVQRotaryEmbedding` or `None`): Rotary positions, which here stand in for the absolute ones.
    """

    def __init__(
        self,
        out_channels: int,
        patch_size: int,
        grid_size: tuple[int, int],
        num_latent_tokens: int,
        latent_channels: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: float,
        activation_fn: str,
        num_register_tokens: int,
        layer_scale_init_value: float,
        rope: SoftVQRotaryEmbedding | None,
        decoder_type: str,
        cls_token: bool,
        pixel_head: str,
    ):
        super().__init__()
        self.is_movq = decoder_type == "movq"
        self.positions = SoftVQDecoderTokens(
            hidden_size, grid_size, num_latent_tokens, num_register_tokens, cls_token, absolute_positions=rope is None
        )
        self.rope = rope
        if self.is_movq:
            blocks = [
                SoftVQMoVQBlock(hidden_size, num_attention_heads, mlp_ratio, activation_fn, latent_channels)
                for _ in range(num_layers)
            ]
            self.norm = SoftVQMoVQNorm(hidden_size, latent_channels)
        else:
            blocks = [
                SoftVQDecoderBlock(hidden_size, num_attention_heads, mlp_ratio, activation_fn, layer_scale_init_value)
                for _ in range(num_layers)
            ]
            self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.blocks = nn.ModuleList(blocks)
        if pixel_head == "linear":
            self.pixel_head = SoftVQLinearPixelHead(hidden_size, patch_size, out_channels)
        elif pixel_head == "conv":
            self.pixel_head = SoftVQConvPixelHead(hidden_size, out_channels)
        else:
            self.pixel_head = SoftVQSirenPixelHead(hidden_size, patch_size, out_channels)
        self.gradient_checkpointing = False

    @property
    def last_layer(self) -> nn.Parameter:
        """The last weight before the pixels: where the adaptive adversarial weight measures gradients."""
        return self.pixel_head.last_layer

    def forward(self, latent_tokens: torch.Tensor, latent: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """
        `(B, L, hidden_size)` projected latents, and `(B, L, latent_channels)` latents as they were before, to
        `(B, out_channels, H, W)` pixels on a grid of patches.
        """
        hidden_states = self.positions(latent_tokens, grid_size)
        modulation = (latent,) if self.is_movq else ()

        first = self.positions.num_prefix_tokens
        rotary_embedding = [None] * len(self.blocks)
        if self.rope is not None:
            tables = self.rope(grid_size, first, latent_tokens.shape[1], hidden_states.device)
            rotary_embedding = list(zip(*tables, strict=True))

        for block, block_rotary_embedding in zip(self.blocks, rotary_embedding, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, block_rotary_embedding, *modulation
                )
            else:
                hidden_states = block(hidden_states, block_rotary_embedding, *modulation)

        hidden_states = self.norm(hidden_states, *modulation)
        return self.pixel_head(hidden_states[:, first : first + grid_size[0] * grid_size[1]], grid_size)


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes of a distributed run; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


def codebook_entropy_loss(affinity: torch.Tensor, epsilon: float, synchronized: bool = False) -> torch.Tensor:
    """
    Mean entropy of the assignments minus the entropy of the mean assignment, at a fixed temperature of 0.01.

    Low when every token decides for one codeword while all codewords are in use (arXiv 2310.05737, section 3.3; the
    official SoftVQ-VAE code applies it to the tokens of all codebooks together).

    Args:
        affinity (`torch.Tensor` of shape `(..., K)`): Similarity of tokens to the K codewords, larger is closer.
        epsilon (`float`): Added inside the logarithm of the mean assignment.
        synchronized (`bool`, *optional*, defaults to `False`):
            Whether the mean assignment is that of all processes, which then have to call this together. The mean of
            the result over the processes is then the loss of the global batch, and so is its gradient.

    Returns:
        `torch.Tensor`: Scalar.
    """
    logits = affinity.flatten(0, -2) / ENTROPY_TEMPERATURE
    probs = logits.softmax(dim=-1)
    sample_entropy = -(probs * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    mean_probs = probs.mean(dim=0)
    if synchronized:
        mean_probs = SumOverProcesses.apply(mean_probs) / torch.distributed.get_world_size()
    return sample_entropy + (mean_probs * torch.log(mean_probs + epsilon)).sum()


def _without_autocast(tensor: torch.Tensor) -> torch.autocast | nullcontext:
    """Similarities at these temperatures need float32, also where the transformers run in half precision."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class SoftVectorQuantizer(nn.Module):
    """
    Soft categorical posterior over a product of codebooks (arXiv 2412.10958, section 3.2).

    Every token becomes the mix of all codewords of its codebook, weighted by `softmax(similarity / tau)`:
    differentiable throughout, no straight-through estimator. The token axis is cut into `num_codebooks` runs of
    neighbouring tokens, and run k uses codebook k. The codebook learns through the mix only; its gradient through the
    similarities is stopped.

    Args:
        codebook_size (`int`): Codewords per codebook, K.
        latent_channels (`int`): Width of a codeword, C.
        num_codebooks (`int`): Number of codebooks n; it must divide the number of tokens.
        tau (`float`): Temperature of the softmax, > 0.
        codebook_l2_norm (`bool`): Whether tokens and codewords are normalised to unit length first.
    """

    def __init__(
        self, codebook_size: int, latent_channels: int, num_codebooks: int, tau: float, codebook_l2_norm: bool
    ):
        super().__init__()
        self.num_codebooks = num_codebooks
        self.tau = tau
        self.codebook_l2_norm = codebook_l2_norm
        self.synchronized_entropy = False
        embedding = (torch.rand(num_codebooks, codebook_size, latent_channels) * 2.0 - 1.0) / codebook_size
        self.embedding = nn.Parameter(F.normalize(embedding, dim=-1) if codebook_l2_norm else embedding)

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            latent (`torch.Tensor` of shape `(B, L, C)`): Latents before quantization.

        Returns:
            `tuple`: quantized latents `(B, L, C)`, assignment probabilities `(B, n, L / n, K)` in float32, and the
            similarities `(B, n, L / n, K)` in float32 from which [`codebook_entropy_loss`] is computed.
        """
        tokens = latent.float().unflatten(1, (self.num_codebooks, -1))
        codebook = self.embedding.float()
        if self.codebook_l2_norm:
            tokens = F.normalize(tokens, dim=-1)
            codebook = F.normalize(codebook, dim=-1)

        with _without_autocast(latent):
            affinity = tokens @ codebook.detach().transpose(-1, -2)
            probs = (affinity / self.tau).softmax(dim=-1)
            quantized = probs @ codebook
        return quantized.flatten(1, 2).to(latent.dtype), probs, affinity

    def entropy_loss(self, affinity: torch.Tensor) -> torch.Tensor:
        """Scalar, unweighted, over all tokens of the batch and all codebooks together."""
        return codebook_entropy_loss(affinity, epsilon=1e-6, synchronized=self.synchronized_entropy)

    def get_codebook_entry(self, indices: torch.Tensor) -> torch.Tensor:
        """Codewords `(B, L, C)` of `indices` `(B, n, L / n)`: the latents of a one-hot posterior."""
        codebook = F.normalize(self.embedding, dim=-1) if self.codebook_l2_norm else self.embedding
        entries = [codebook[k][indices[:, k]] for k in range(self.num_codebooks)]
        return torch.cat(entries, dim=1)


class VectorQuantizer(nn.Module):
    """
    Nearest-codeword quantization with a straight-through gradient (arXiv 1711.00937), one codebook.

    Args:
        codebook_size (`int`): Number of codewords, K.
        latent_channels (`int`): Width of a codeword, C.
        codebook_l2_norm (`bool`): Whether tokens and codewords are normalised to unit length first.
    """

    def __init__(self, codebook_size: int, latent_channels: int, codebook_l2_norm: bool):
        super().__init__()
        self.codebook_l2_norm = codebook_l2_norm
        self.synchronized_entropy = False
        embedding = (torch.rand(codebook_size, latent_channels) * 2.0 - 1.0) / codebook_size
        self.embedding = nn.Parameter(F.normalize(embedding, dim=-1) if codebook_l2_norm else embedding)

    def forward(
        self, latent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            latent (`torch.Tensor` of shape `(B, L, C)`): Latents before quantization.

        Returns:
            `tuple`: quantized latents `(B, L, C)`, indices `(B, 1, L)`, squared distances to all codewords `(B, L, K)`
            in float32, and the scalars that move the codewords and the encoder (unweighted).
        """
        tokens, codebook = latent.float(), self.embedding.float()
        if self.codebook_l2_norm:
            tokens = F.normalize(tokens, dim=-1)
            codebook = F.normalize(codebook, dim=-1)

        with _without_autocast(latent):
            distances = (
                tokens.square().sum(dim=-1, keepdim=True)
                + codebook.square().sum(dim=-1)
                - 2.0 * tokens @ codebook.transpose(0, 1)
            )
        indices = distances.argmin(dim=-1)
        codewords = codebook[indices]
        vq_loss = F.mse_loss(codewords, tokens.detach())
        commit_loss = F.mse_loss(tokens, codewords.detach())
        quantized = tokens + (codewords - tokens).detach()
        return quantized.to(latent.dtype), indices.unsqueeze(1), distances, vq_loss, commit_loss

    def entropy_loss(self, distances: torch.Tensor) -> torch.Tensor:
        """Scalar, unweighted, on minus the squared distances."""
        return codebook_entropy_loss(-distances, epsilon=1e-5, synchronized=self.synchronized_entropy)

    def get_codebook_entry(self, indices: torch.Tensor) -> torch.Tensor:
        """Codewords `(B, L, C)` of `indices` `(B, 1, L)`."""
        codebook = F.normalize(self.embedding, dim=-1) if self.codebook_l2_norm else self.embedding
        return codebook[indices[:, 0]]


class AutoencoderSoftVQ(ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    Image tokenizer with 1-D continuous latents: SoftVQ-VAE (arXiv 2412.10958) and its VQ, KL and plain siblings.

    The model inherits saving, loading, device placement and adapters from diffusers: see [`~diffusers.ModelMixin`]. An
    image `(B, in_channels, H, W)` in [-1, 1] becomes latents `(B, num_latent_tokens, latent_channels)`.

    Args:
        sample_size (`int` or `(int, int)`, *optional*, defaults to 256):
            Height and width of the images in pixels. With absolute positions other sizes are an error; with rotary
            ones they are allowed, and the encoder resamples its position table.
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        encoder_patch_size (`int`, *optional*, defaults to 16): Side of the encoder's patches in pixels.
        decoder_patch_size (`int`, *optional*, defaults to 16): Side of the decoder's patches in pixels.
        num_latent_tokens (`int`, *optional*, defaults to 64): Number of latent tokens L.
        latent_channels (`int`, *optional*, defaults to 32): Channels C of a latent token.
        quantizer (`str`, *optional*, defaults to `"softvq"`):
            Bottleneck: `"softvq"` (mix of codewords), `"vq"` (nearest codeword), `"kl"` (Gaussian posterior) or
            `"none"`.
        codebook_size (`int`, *optional*, defaults to 8192): Codewords per codebook ("softvq" and "vq").
        num_codebooks (`int`, *optional*, defaults to 4):
            Codebooks of "softvq"; it must divide `num_latent_tokens`. The other quantizers ignore it.
        codebook_l2_norm (`bool`, *optional*, defaults to `True`): Whether tokens and codewords get unit length.
        tau (`float`, *optional*, defaults to 0.07): Temperature of the soft assignment ("softvq").
        encoder_hidden_size (`int`, *optional*, defaults to 768): Width of the encoder.
        encoder_num_layers (`int`, *optional*, defaults to 12): Blocks of the encoder.
        encoder_num_attention_heads (`int`, *optional*, defaults to 12): Heads of the encoder; must divide its width.
        decoder_hidden_size (`int`, *optional*, defaults to 768): Width of the decoder.
        decoder_num_layers (`int`, *optional*, defaults to 12): Blocks of the decoder.
        decoder_num_attention_heads (`int`, *optional*, defaults to 12): Heads of the decoder; must divide its width.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Width of the feed-forward layers relative to the tokens.
        encoder_activation_fn (`str`, *optional*, defaults to `"gelu"`):
            Feed-forward layers of the encoder: `"gelu"`, or `"swiglu"` (those of DINOv2-giant; narrower by a third).
        decoder_activation_fn (`str`, *optional*, defaults to `"gelu"`): The same in the decoder.
        num_register_tokens (`int`, *optional*, defaults to 0):
            Register tokens of encoder and decoder (arXiv 2309.16588).
        decoder_num_register_tokens (`int`, *optional*):
            Register tokens of the decoder where they differ from the encoder's.
        layer_scale_init_value (`float`, *optional*, defaults to 1.0):
            Initial gain of the residual branches; the published models are trained from 1e-5.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial linear weights of the blocks. Narrow models learn faster from about
            `hidden_size ** -0.5`.
        token_initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial position embeddings, latent tokens and mask token. From 1.0 on, short
            trainings find out sooner which token belongs to which place.
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`):
            Position code of the patches: `"absolute"` (learned table), `"rope_mixed"` (two-dimensional rotary code
            with learned frequencies, MAETok) or `"rope_axial"` (with fixed ones). With a rotary code the encoder keeps
            its table as well, and the decoder has none.
        rope_theta (`float`, *optional*, defaults to 10.0): Base of the rotary frequencies, with "rope_mixed" at
            initialisation.
        encoder_mask_token (`bool`, *optional*, defaults to `False`):
            Whether the encoder has a token that replaces masked patches (MAETok). Needed for `mask` in
            [`AutoencoderSoftVQ.forward`].
        decoder_type (`str`, *optional*, defaults to `"vit"`):
            Decoder: `"vit"` (DINOv2 blocks) or `"movq"` (blocks whose normalisation the latents modulate, MAETok).
        decoder_cls_token (`bool`, *optional*, defaults to `True`): Whether the decoder has a class token.
        pixel_head (`str`, *optional*, defaults to `"linear"`):
            From tokens to pixels: `"linear"`, `"conv"` (upsampling convolutions, `decoder_patch_size` 16 only) or
            `"siren"` (sine layers, square images with a side of `decoder_patch_size ** 2` only).
        scaling_factor (`float`, *optional*, defaults to 1.0):
            One over the standard deviation of the latents over a data set. Generators work on
            `(latent - shift_factor) * scaling_factor`.
        shift_factor (`float`, *optional*, defaults to 0.0): Mean of the latents over a data set.

    Raises:
        ValueError: If an argument is outside of what is listed here, or sizes do not fit together.
    """

    main_input_name = "pixel_values"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SoftVQTransformerBlock", "SoftVQDecoderBlock", "SoftVQMoVQBlock"]
    _repeated_blocks = ["SoftVQTransformerBlock", "SoftVQDecoderBlock", "SoftVQMoVQBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "positions", "rope", "layer_scale", "quantize"]
    # `encode` and `decode` do not pass through `forward`, so every module that they call has to load itself
    _group_offload_block_modules = ["encoder", "decoder", "quant_conv", "post_quant_conv", "quantize"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        num_latent_tokens: int = 64,
        latent_channels: int = 32,
        quantizer: str = "softvq",
        codebook_size: int = 8192,
        num_codebooks: int = 4,
        codebook_l2_norm: bool = True,
        tau: float = 0.07,
        encoder_hidden_size: int = 768,
        encoder_num_layers: int = 12,
        encoder_num_attention_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        encoder_activation_fn: str = "gelu",
        decoder_activation_fn: str = "gelu",
        num_register_tokens: int = 0,
        decoder_num_register_tokens: int | None = None,
        layer_scale_init_value: float = 1.0,
        initializer_range: float = 0.02,
        token_initializer_range: float = 0.02,
        position_embedding_type: str = "absolute",
        rope_theta: float = 10.0,
        encoder_mask_token: bool = False,
        decoder_type: str = "vit",
        decoder_cls_token: bool = True,
        pixel_head: str = "linear",
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        self._check_config()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size

        encoder_rope = decoder_rope = None
        if position_embedding_type != "absolute":
            encoder_rope = SoftVQRotaryEmbedding(
                encoder_num_layers,
                encoder_num_attention_heads,
                encoder_hidden_size // encoder_num_attention_heads,
                theta=rope_theta,
                mixed=position_embedding_type == "rope_mixed",
            )
            decoder_rope = SoftVQRotaryEmbedding(
                decoder_num_layers,
                decoder_num_attention_heads,
                decoder_hidden_size // decoder_num_attention_heads,
                theta=rope_theta,
                mixed=position_embedding_type == "rope_mixed",
            )
        self.encoder = SoftVQEncoder(
            in_channels=in_channels,
            patch_size=encoder_patch_size,
            grid_size=(height // encoder_patch_size, width // encoder_patch_size),
            num_latent_tokens=num_latent_tokens,
            hidden_size=encoder_hidden_size,
            num_layers=encoder_num_layers,
            num_attention_heads=encoder_num_attention_heads,
            mlp_ratio=mlp_ratio,
            activation_fn=encoder_activation_fn,
            num_register_tokens=num_register_tokens,
            layer_scale_init_value=layer_scale_init_value,
            rope=encoder_rope,
            mask_token=encoder_mask_token,
        )
        self.decoder = SoftVQDecoder(
            out_channels=in_channels,
            patch_size=decoder_patch_size,
            grid_size=(height // decoder_patch_size, width // decoder_patch_size),
            num_latent_tokens=num_latent_tokens,
            latent_channels=latent_channels,
            hidden_size=decoder_hidden_size,
            num_layers=decoder_num_layers,
            num_attention_heads=decoder_num_attention_heads,
            mlp_ratio=mlp_ratio,
            activation_fn=decoder_activation_fn,
            num_register_tokens=num_register_tokens
            if decoder_num_register_tokens is None
            else decoder_num_register_tokens,
            layer_scale_init_value=layer_scale_init_value,
            rope=decoder_rope,
            decoder_type=decoder_type,
            cls_token=decoder_cls_token,
            pixel_head=pixel_head,
        )
        # the transformers start from these widths; the projections below and the pixel head keep torch's default
        for module in (*self.encoder.blocks.modules(), *self.decoder.blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=initializer_range)
                nn.init.zeros_(module.bias)
        for name, tokens in (*self.encoder.positions.named_parameters(), *self.decoder.positions.named_parameters()):
            if name in ("position_embedding", "latent_position_embedding"):
                nn.init.trunc_normal_(tokens, std=token_initializer_range)
            elif name in ("latent_tokens", "mask_token"):
                nn.init.normal_(tokens, std=token_initializer_range)
        # MoVQ: the latents start to modulate during training
        for name, module in self.decoder.named_modules():
            if name.endswith("modulation"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

        self.quant_conv = nn.Linear(encoder_hidden_size, 2 * latent_channels if quantizer == "kl" else latent_channels)
        self.post_quant_conv = nn.Linear(latent_channels, decoder_hidden_size)
        if quantizer == "softvq":
            self.quantize = SoftVectorQuantizer(codebook_size, latent_channels, num_codebooks, tau, codebook_l2_norm)
        elif quantizer == "vq":
            self.quantize = VectorQuantizer(codebook_size, latent_channels, codebook_l2_norm)
        else:
            self.quantize = None

        self.use_slicing = False
        self.gradient_checkpointing = False

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict[str, Any], ...]:
        # `auto_map` tells `diffusers.AutoModel` where an exported folder has this file; it is no argument of the model
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def _check_config(self) -> None:
        """Raises a `ValueError` that names the first argument which is not allowed or does not fit the others."""
        config = self.config
        allowed = {
            "quantizer": ("softvq", "vq", "kl", "none"),
            "encoder_activation_fn": ("gelu", "swiglu"),
            "decoder_activation_fn": ("gelu", "swiglu"),
            "position_embedding_type": ("absolute", "rope_axial", "rope_mixed"),
            "encoder_mask_token": (False, True),
            "decoder_type": ("vit", "movq"),
            "decoder_cls_token": (False, True),
            "pixel_head": ("linear", "conv", "siren"),
        }
        for name, values in allowed.items():
            if config[name] not in values:
                raise ValueError(f"`{name}` is {config[name]!r}, allowed: {', '.join(map(repr, values))}.")

        sizes = config.sample_size if isinstance(config.sample_size, (list, tuple)) else 2 * (config.sample_size,)
        if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(
                f"`sample_size` is {config.sample_size!r}, allowed: a positive integer or [height, width]."
            )
        positive = ("in_channels", "num_latent_tokens", "latent_channels", "codebook_size", "num_codebooks")
        for side in ("encoder", "decoder"):
            positive += tuple(
                f"{side}_{x}" for x in ("patch_size", "hidden_size", "num_layers", "num_attention_heads")
            )
        for name in positive:
            if isinstance(config[name], bool) or not isinstance(config[name], int) or config[name] < 1:
                raise ValueError(f"`{name}` is {config[name]!r}, allowed: integers from 1 on.")
        for name in ("num_register_tokens", "decoder_num_register_tokens"):
            if config[name] is not None and (not isinstance(config[name], int) or config[name] < 0):
                raise ValueError(f"`{name}` is {config[name]}, allowed: integers from 0 on.")
        finite_positive = ("tau", "mlp_ratio", "rope_theta", "scaling_factor", "initializer_range")
        for name in (*finite_positive, "token_initializer_range"):
            if not isinstance(config[name], (int, float)) or not 0 < config[name] < math.inf:
                raise ValueError(f"`{name}` is {config[name]!r}, allowed: finite numbers above 0.")
        for name in ("shift_factor", "layer_scale_init_value"):
            if not isinstance(config[name], (int, float)) or not math.isfinite(config[name]):
                raise ValueError(f"`{name}` is {config[name]!r}, allowed: finite numbers.")

        for side in ("encoder", "decoder"):
            patch_size = config[f"{side}_patch_size"]
            if any(size % patch_size for size in sizes):
                raise ValueError(
                    f"`sample_size` is {config.sample_size}, allowed: multiples of `{side}_patch_size` {patch_size}."
                )
            hidden_size, heads = config[f"{side}_hidden_size"], config[f"{side}_num_attention_heads"]
            if hidden_size % heads:
                raise ValueError(
                    f"`{side}_hidden_size` is {hidden_size}, allowed: multiples of"
                    f" `{side}_num_attention_heads` {heads}."
                )
            if config.position_embedding_type != "absolute" and hidden_size // heads % 4:
                raise ValueError(
                    f"`{side}_hidden_size` is {hidden_size} with {heads} heads of {hidden_size // heads} channels,"
                    f" allowed for `position_embedding_type` {config.position_embedding_type!r}: heads of a multiple"
                    " of 4 channels."
                )
        patch_size = config.decoder_patch_size
        if config.pixel_head == "conv" and patch_size != 16:
            raise ValueError(f"`decoder_patch_size` is {patch_size}, allowed for `pixel_head` 'conv': 16.")
        if config.pixel_head == "siren" and any(size != patch_size**2 for size in sizes):
            raise ValueError(
                f"`sample_size` is {config.sample_size}, allowed for `pixel_head` 'siren': the square of"
                f" `decoder_patch_size`, {patch_size**2}."
            )
        if config.quantizer == "softvq" and config.num_latent_tokens % config.num_codebooks:
            raise ValueError(
                f"`num_latent_tokens` is {config.num_latent_tokens}, allowed: multiples of `num_codebooks`"
                f" {config.num_codebooks} (each codebook serves an equal run of tokens)."
            )

    @property
    def _sample_size(self) -> tuple[int, int]:
        """Configured height and width."""
        sample_size = self.config.sample_size
        return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)

    def _allows_sample_size(self, sample_size: tuple[int, ...]) -> bool:
        """Whether position codes and pixel head admit images of this height and width."""
        if tuple(sample_size) == self._sample_size:
            return True
        if self.config.position_embedding_type == "absolute" or self.config.pixel_head == "siren":
            return False
        multiple = math.lcm(self.config.encoder_patch_size, self.config.decoder_patch_size)
        return len(sample_size) == 2 and all(size >= multiple and size % multiple == 0 for size in sample_size)

    def _allowed_sample_sizes(self) -> str:
        """What to tell those who bring another height and width."""
        height, width = self._sample_size
        if self.config.pixel_head == "siren":
            return f"{height} x {width} pixels, which the 'siren' pixel head is made for"
        if self.config.position_embedding_type == "absolute":
            return f"{height} x {width} pixels, which the absolute positions are made for"
        multiple = math.lcm(self.config.encoder_patch_size, self.config.decoder_patch_size)
        return f"multiples of {multiple} pixels, the patches of encoder and decoder"

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        channels = self.config.in_channels
        if (
            pixel_values.ndim != 4
            or pixel_values.shape[1] != channels
            or not self._allows_sample_size(pixel_values.shape[2:])
        ):
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, allowed: (batch, {channels}, height, width)"
                f" with {self._allowed_sample_sizes()}."
            )
        self._check_values("pixel_values", pixel_values, self.encoder.positions.latent_tokens.dtype)

    def _check_mask(self, mask: torch.Tensor, pixel_values: torch.Tensor) -> None:
        if not self.config.encoder_mask_token:
            raise ValueError("`mask` is given, allowed: None for a model without `encoder_mask_token`.")
        patch_size = self.config.encoder_patch_size
        height, width = pixel_values.shape[2:]
        expected = (pixel_values.shape[0], (height // patch_size) * (width // patch_size))
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"`mask` has dtype {mask.dtype} and shape {tuple(mask.shape)}, allowed: torch.bool and {expected}, an"
                " entry for each patch."
            )

    def _check_latent(self, latent: torch.Tensor) -> None:
        expected = (self.config.num_latent_tokens, self.config.latent_channels)
        if latent.ndim != 3 or tuple(latent.shape[1:]) != expected:
            raise ValueError(
                f"`latent` has shape {tuple(latent.shape)}, allowed: (batch, {', '.join(map(str, expected))})."
            )
        self._check_values("latent", latent, self.decoder.positions.mask_token.dtype)

    def _check_values(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` has dtype {tensor.dtype}, allowed: floating-point dtypes.")
        if tensor.dtype != dtype and not (
            tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)
        ):
            raise ValueError(f"`{name}` has dtype {tensor.dtype}, allowed: {dtype}, the dtype of the model.")
        # Reading the verdict back would break a compiled graph, and would stall an accelerator in every training step.
        if torch.compiler.is_compiling() or (self.training and tensor.device.type != "cpu"):
            return
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` holds NaN or infinite values, allowed: finite numbers.")

    @apply_forward_hook
    def encode(
        self, pixel_values: torch.Tensor, return_dict: bool = True, mask: torch.Tensor | None = None
    ) -> SoftVQEncoderOutput | tuple[torch.Tensor]:
        """
        Encode images into latent tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                Images in [-1, 1] of `sample_size`; with rotary positions of any multiple of the patch sizes.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            mask (`torch.BoolTensor` of shape `(B, N)`, *optional*):
                The patches, in raster order, that the mask token replaces (MAETok, arXiv 2502.03444, section 3).

        Returns:
            [`SoftVQEncoderOutput`] or, with `return_dict=False`, the tuple `(latent,)`. Latents are raw: normalise
            them by [`AutoencoderSoftVQ.scale_latent`] before a generator sees them.

        Raises:
            ValueError: If `pixel_values` has another shape, an integer dtype, or values that are not finite; if `mask`
                has another shape or dtype, or the model no mask token.
        """
        self._check_pixel_values(pixel_values)
        if mask is not None:
            self._check_mask(mask, pixel_values)

        if self.use_slicing and pixel_values.shape[0] > 1:
            masks = [None] * len(pixel_values) if mask is None else mask.split(1)
            slices = zip(pixel_values.split(1), masks, strict=True)
            moments = torch.cat([self.quant_conv(self.encoder(*one)) for one in slices])
        else:
            moments = self.quant_conv(self.encoder(pixel_values, mask))

        if self.config.quantizer == "softvq":
            latent, probs, affinity = self.quantize(moments)
            output = SoftVQEncoderOutput(
                latent=latent,
                indices=probs.argmax(dim=-1),
                max_probability=probs.detach().amax(dim=-1).mean(),
                entropy_loss=self.quantize.entropy_loss(affinity) if self.training else None,
            )
        elif self.config.quantizer == "vq":
            latent, indices, distances, vq_loss, commit_loss = self.quantize(moments)
            output = SoftVQEncoderOutput(
                latent=latent,
                indices=indices,
                entropy_loss=self.quantize.entropy_loss(distances) if self.training else None,
                vq_loss=vq_loss if self.training else None,
                commit_loss=commit_loss if self.training else None,
            )
        elif self.config.quantizer == "kl":
            latent_dist = TokenGaussianDistribution(moments)
            output = SoftVQEncoderOutput(
                latent=latent_dist.mode(),
                latent_dist=latent_dist,
                kl_loss=latent_dist.kl().mean() if self.training else None,
            )
        else:
            output = SoftVQEncoderOutput(latent=moments)

        if not return_dict:
            return (output.latent,)
        return output

    @apply_forward_hook
    def decode(
        self, latent: torch.Tensor, return_dict: bool = True, sample_size: int | tuple[int, int] | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode latent tokens into images.

        Args:
            latent (`torch.Tensor` of shape `(B, num_latent_tokens, latent_channels)`):
                Raw latents, as [`AutoencoderSoftVQ.encode`] or [`AutoencoderSoftVQ.unscale_latent`] return them.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            sample_size (`int` or `(int, int)`, *optional*):
                Height and width of the images; by default those of the configuration. Others need rotary positions.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or, with `return_dict=False`, the tuple `(sample,)`;
            `sample` is `(B, in_channels, H, W)`, nominally in [-1, 1], not clamped.

        Raises:
            ValueError: If `latent` has another shape, an integer dtype, or values that are not finite; if the model
                cannot decode to `sample_size`.
        """
        self._check_latent(latent)
        if sample_size is None:
            sample_size = self._sample_size
        elif isinstance(sample_size, int):
            sample_size = (sample_size, sample_size)
        if not self._allows_sample_size(sample_size):
            raise ValueError(f"`sample_size` is {tuple(sample_size)}, allowed: {self._allowed_sample_sizes()}.")
        sample = self._decode(latent, sample_size)

        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    def _decode(self, latent: torch.Tensor, sample_size: tuple[int, int]) -> torch.Tensor:
        patch_size = self.config.decoder_patch_size
        grid_size = (sample_size[0] // patch_size, sample_size[1] // patch_size)
        if self.use_slicing and latent.shape[0] > 1:
            slices = latent.split(1)
            return torch.cat([self.decoder(self.post_quant_conv(one), one, grid_size) for one in slices])
        return self.decoder(self.post_quant_conv(latent), latent, grid_size)

    def forward(
        self,
        pixel_values: torch.Tensor,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        mask: torch.Tensor | None = None,
    ) -> SoftVQOutput | tuple[torch.Tensor]:
        """
        Encode and decode in one call. Training goes through here, so that wrappers such as DDP see it.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, in_channels, H, W)`): Images, as [`AutoencoderSoftVQ.encode`]
                takes them; the reconstruction has the same size.
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether the "kl" quantizer decodes a draw from the posterior instead of its mean.
            generator (`torch.Generator` or a list of them, *optional*): Source of that draw.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): Patches that the mask token replaces.

        Returns:
            [`SoftVQOutput`] or, with `return_dict=False`, the tuple `(sample,)`.

        Raises:
            ValueError: As [`AutoencoderSoftVQ.encode`].
        """
        encoded = self.encode(pixel_values, mask=mask)
        latent = encoded.latent
        if sample_posterior and encoded.latent_dist is not None:
            latent = encoded.latent_dist.sample(generator)
        # unchecked: what becomes of latents that overflowed in training is the loop's to decide
        sample = self._decode(latent, tuple(pixel_values.shape[2:]))

        if not return_dict:
            return (sample,)
        return SoftVQOutput(
            sample=sample,
            latent=latent,
            indices=encoded.indices,
            max_probability=encoded.max_probability,
            entropy_loss=encoded.entropy_loss,
            vq_loss=encoded.vq_loss,
            commit_loss=encoded.commit_loss,
            kl_loss=encoded.kl_loss,
        )

    def enable_synchronized_entropy(self) -> None:
        """
        In distributed training, compute the entropy loss ("softvq" and "vq", train mode) over the global batch: all
        processes must then call the model together. Without it every process has the loss of its own images.
        """
        if self.quantize is not None:
            self.quantize.synchronized_entropy = True

    def scale_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Raw latents to the normalised latents that generators are trained on; any shape."""
        return (latent - self.config.shift_factor) * self.config.scaling_factor

    def unscale_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse of [`AutoencoderSoftVQ.scale_latent`]: normalised latents to raw ones; any shape."""
        return latent / self.config.scaling_factor + self.config.shift_factor
