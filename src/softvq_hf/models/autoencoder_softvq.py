"""SoftVQ-VAE: an autoencoder that turns an image into a short 1-D sequence of continuous tokens (arXiv 2412.10958).

A ViT encoder carries learnable latent tokens beside the image patches; a quantizer mixes codewords into each of them;
a ViT decoder rebuilds the pixels from mask tokens that attend to the latents. The same file holds the siblings which
share encoder and decoder and differ in the bottleneck only: hard vector quantization, a Gaussian posterior, and none.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

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
        indices, entropy_loss, vq_loss, commit_loss, kl_loss: As in [`SoftVQEncoderOutput`].
    """

    sample: torch.Tensor
    # optional, as everything after the first field: accelerate rebuilds outputs from a dict under mixed precision
    latent: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    commit_loss: torch.Tensor | None = None
    kl_loss: torch.Tensor | None = None


class SoftVQAttnProcessor:
    """Bidirectional self-attention over all tokens through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SoftVQAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        query = query.unflatten(-1, (attn.heads, -1))
        key = key.unflatten(-1, (attn.heads, -1))
        value = value.unflatten(-1, (attn.heads, -1))

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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class SoftVQFeedForward(nn.Module):
    """Linear, exact GELU, linear; `(B, N, hidden_size)` in and out."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.linear_1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(hidden_states)))


class SoftVQLayerScale(nn.Module):
    """Learned gain per channel on a residual branch, as in DINOv2."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), float(init_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


class SoftVQTransformerBlock(nn.Module):
    """Pre-norm ViT block with LayerScale on both branches (the DINOv2 block)."""

    def __init__(self, hidden_size: int, num_attention_heads: int, mlp_ratio: float, layer_scale_init_value: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = SoftVQAttention(hidden_size, num_attention_heads)
        self.layer_scale1 = SoftVQLayerScale(hidden_size, layer_scale_init_value)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ff = SoftVQFeedForward(hidden_size, mlp_ratio)
        self.layer_scale2 = SoftVQLayerScale(hidden_size, layer_scale_init_value)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.layer_scale1(self.attn(self.norm1(hidden_states)))
        return hidden_states + self.layer_scale2(self.ff(self.norm2(hidden_states)))


class SoftVQDecoderBlock(SoftVQTransformerBlock):
    """
    The same block in the decoder. Encoder and decoder may differ in width and length, and regional compilation counts
    graphs per `forward`, so each side has its own.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)


class SoftVQTokenPositions(nn.Module):
    """
    Prefix tokens (class token, registers) and the learned absolute positions of the image tokens.

    Without registers the position table covers the class token too; with registers it covers the image tokens alone
    (the two DINOv2 layouts).

    Args:
        hidden_size (`int`): Width of the tokens.
        num_image_tokens (`int`): Number of patches N.
        num_register_tokens (`int`): Number of registers R; the prefix has 1 + R tokens.
    """

    def __init__(self, hidden_size: int, num_image_tokens: int, num_register_tokens: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, hidden_size) * 1e-6)
        if num_register_tokens > 0:
            self.register_tokens = nn.Parameter(torch.randn(1, num_register_tokens, hidden_size) * 1e-6)
        else:
            self.register_tokens = None
        num_positions = num_image_tokens if num_register_tokens > 0 else 1 + num_image_tokens
        self.position_embedding = nn.Parameter(torch.zeros(1, num_positions, hidden_size))
        self.num_prefix_tokens = 1 + num_register_tokens

    def forward(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """`(B, N, hidden_size)` image tokens to `(B, num_prefix_tokens + N, hidden_size)`."""
        batch_size = image_tokens.shape[0]
        cls_token = self.cls_token.expand(batch_size, -1, -1)
        if self.register_tokens is None:
            return torch.cat([cls_token, image_tokens], dim=1) + self.position_embedding
        register_tokens = self.register_tokens.expand(batch_size, -1, -1)
        return torch.cat([cls_token, register_tokens, image_tokens + self.position_embedding], dim=1)


class SoftVQEncoderTokens(SoftVQTokenPositions):
    """[prefix, image tokens, learnable latent tokens], all with their positions: what the encoder's blocks see."""

    def __init__(self, hidden_size: int, num_image_tokens: int, num_latent_tokens: int, num_register_tokens: int):
        super().__init__(hidden_size, num_image_tokens, num_register_tokens)
        self.latent_tokens = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))
        self.latent_position_embedding = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))

    def forward(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """`(B, N, hidden_size)` image tokens to `(B, num_prefix_tokens + N + L, hidden_size)`."""
        latent_tokens = (self.latent_tokens + self.latent_position_embedding).expand(image_tokens.shape[0], -1, -1)
        return torch.cat([super().forward(image_tokens), latent_tokens], dim=1)


class SoftVQDecoderTokens(SoftVQTokenPositions):
    """[prefix, mask tokens, latent tokens], all with their positions: what the decoder's blocks see."""

    def __init__(self, hidden_size: int, num_image_tokens: int, num_latent_tokens: int, num_register_tokens: int):
        super().__init__(hidden_size, num_image_tokens, num_register_tokens)
        self.num_image_tokens = num_image_tokens
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.latent_position_embedding = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))

    def forward(self, latent_tokens: torch.Tensor) -> torch.Tensor:
        """`(B, L, hidden_size)` latent tokens to `(B, num_prefix_tokens + N + L, hidden_size)`."""
        mask_tokens = self.mask_token.expand(latent_tokens.shape[0], self.num_image_tokens, -1)
        return torch.cat([super().forward(mask_tokens), latent_tokens + self.latent_position_embedding], dim=1)


class SoftVQEncoder(nn.Module):
    """
    ViT over the sequence [prefix, image patches, learnable latent tokens]; the latent tokens are the result.

    Args:
        grid_size (`tuple[int, int]`): Patches per column and per row.
        num_latent_tokens (`int`): Number of latent tokens L.
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
        num_register_tokens: int,
        layer_scale_init_value: float,
    ):
        super().__init__()
        self.num_latent_tokens = num_latent_tokens
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.positions = SoftVQEncoderTokens(
            hidden_size, grid_size[0] * grid_size[1], num_latent_tokens, num_register_tokens
        )
        self.blocks = nn.ModuleList(
            [
                SoftVQTransformerBlock(hidden_size, num_attention_heads, mlp_ratio, layer_scale_init_value)
                for _ in range(num_layers)
            ]
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, in_channels, H, W)` images to `(B, L, hidden_size)` latent tokens."""
        image_tokens = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        hidden_states = self.positions(image_tokens)

        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)

        return self.norm(hidden_states)[:, -self.num_latent_tokens :]


class SoftVQLinearPixelHead(nn.Module):
    """One linear layer from an image token to its patch of pixels (row in patch, column in patch, channel)."""

    def __init__(self, hidden_size: int, patch_size: int, grid_size: tuple[int, int], out_channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.out_channels = out_channels
        self.proj = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.proj.weight

    def forward(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """`(B, N, hidden_size)` image tokens in raster order to `(B, out_channels, H, W)` pixels."""
        rows, columns = self.grid_size
        pixels = self.proj(image_tokens).reshape(
            -1, rows, columns, self.patch_size, self.patch_size, self.out_channels
        )
        pixels = pixels.permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(-1, self.out_channels, rows * self.patch_size, columns * self.patch_size)


class SoftVQDecoder(nn.Module):
    """
    ViT over the sequence [prefix, mask tokens, latents]; the mask tokens become the image.

    Args:
        grid_size (`tuple[int, int]`): Patches per column and per row.
    """

    def __init__(
        self,
        out_channels: int,
        patch_size: int,
        grid_size: tuple[int, int],
        num_latent_tokens: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: float,
        num_register_tokens: int,
        layer_scale_init_value: float,
    ):
        super().__init__()
        self.num_image_tokens = grid_size[0] * grid_size[1]
        self.positions = SoftVQDecoderTokens(
            hidden_size, self.num_image_tokens, num_latent_tokens, num_register_tokens
        )
        self.blocks = nn.ModuleList(
            [
                SoftVQDecoderBlock(hidden_size, num_attention_heads, mlp_ratio, layer_scale_init_value)
                for _ in range(num_layers)
            ]
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.pixel_head = SoftVQLinearPixelHead(hidden_size, patch_size, grid_size, out_channels)
        self.gradient_checkpointing = False

    @property
    def last_layer(self) -> nn.Parameter:
        """The last weight before the pixels: where the adaptive adversarial weight measures gradients."""
        return self.pixel_head.last_layer

    def forward(self, latent_tokens: torch.Tensor) -> torch.Tensor:
        """`(B, L, hidden_size)` projected latents to `(B, out_channels, H, W)` pixels."""
        hidden_states = self.positions(latent_tokens)

        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)

        first = self.positions.num_prefix_tokens
        return self.pixel_head(self.norm(hidden_states)[:, first : first + self.num_image_tokens])


def codebook_entropy_loss(affinity: torch.Tensor, epsilon: float) -> torch.Tensor:
    """
    Mean entropy of the assignments minus the entropy of the mean assignment, at a fixed temperature of 0.01.

    Low when every token decides for one codeword while all codewords are in use (arXiv 2310.05737, section 3.3; the
    official SoftVQ-VAE code applies it to the tokens of all codebooks together).

    Args:
        affinity (`torch.Tensor` of shape `(..., K)`): Similarity of tokens to the K codewords, larger is closer.
        epsilon (`float`): Added inside the logarithm of the mean assignment.

    Returns:
        `torch.Tensor`: Scalar.
    """
    logits = affinity.flatten(0, -2) / ENTROPY_TEMPERATURE
    probs = logits.softmax(dim=-1)
    sample_entropy = -(probs * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    mean_probs = probs.mean(dim=0)
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
        return codebook_entropy_loss(affinity, epsilon=1e-6)

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
        return codebook_entropy_loss(-distances, epsilon=1e-5)

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
            Height and width of the images in pixels. Fixed by the absolute position embedding.
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
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`): Position code; `"absolute"`.
        decoder_type (`str`, *optional*, defaults to `"vit"`): Decoder; `"vit"`.
        decoder_cls_token (`bool`, *optional*, defaults to `True`): Class token in the decoder; `True`.
        pixel_head (`str`, *optional*, defaults to `"linear"`): From tokens to pixels; `"linear"`.
        scaling_factor (`float`, *optional*, defaults to 1.0):
            One over the standard deviation of the latents over a data set. Generators work on
            `(latent - shift_factor) * scaling_factor`.
        shift_factor (`float`, *optional*, defaults to 0.0): Mean of the latents over a data set.

    Raises:
        ValueError: If an argument is outside of what is listed here, or sizes do not fit together.
    """

    main_input_name = "pixel_values"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SoftVQTransformerBlock", "SoftVQDecoderBlock"]
    _repeated_blocks = ["SoftVQTransformerBlock", "SoftVQDecoderBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "positions", "layer_scale", "quantize"]
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
        num_register_tokens: int = 0,
        decoder_num_register_tokens: int | None = None,
        layer_scale_init_value: float = 1.0,
        initializer_range: float = 0.02,
        token_initializer_range: float = 0.02,
        position_embedding_type: str = "absolute",
        decoder_type: str = "vit",
        decoder_cls_token: bool = True,
        pixel_head: str = "linear",
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        self._check_config()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size

        self.encoder = SoftVQEncoder(
            in_channels=in_channels,
            patch_size=encoder_patch_size,
            grid_size=(height // encoder_patch_size, width // encoder_patch_size),
            num_latent_tokens=num_latent_tokens,
            hidden_size=encoder_hidden_size,
            num_layers=encoder_num_layers,
            num_attention_heads=encoder_num_attention_heads,
            mlp_ratio=mlp_ratio,
            num_register_tokens=num_register_tokens,
            layer_scale_init_value=layer_scale_init_value,
        )
        self.decoder = SoftVQDecoder(
            out_channels=in_channels,
            patch_size=decoder_patch_size,
            grid_size=(height // decoder_patch_size, width // decoder_patch_size),
            num_latent_tokens=num_latent_tokens,
            hidden_size=decoder_hidden_size,
            num_layers=decoder_num_layers,
            num_attention_heads=decoder_num_attention_heads,
            mlp_ratio=mlp_ratio,
            num_register_tokens=num_register_tokens
            if decoder_num_register_tokens is None
            else decoder_num_register_tokens,
            layer_scale_init_value=layer_scale_init_value,
        )
        # the transformers start from these widths; the projections below and the pixel head keep torch's default
        for module in (*self.encoder.blocks.modules(), *self.decoder.blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=initializer_range)
                nn.init.zeros_(module.bias)
        for tokens in (self.encoder.positions, self.decoder.positions):
            nn.init.trunc_normal_(tokens.position_embedding, std=token_initializer_range)
            nn.init.trunc_normal_(tokens.latent_position_embedding, std=token_initializer_range)
        nn.init.normal_(self.encoder.positions.latent_tokens, std=token_initializer_range)
        nn.init.normal_(self.decoder.positions.mask_token, std=token_initializer_range)

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

    def _check_config(self) -> None:
        """Raises a `ValueError` that names the first argument which is not allowed or does not fit the others."""
        config = self.config
        allowed = {
            "quantizer": ("softvq", "vq", "kl", "none"),
            "position_embedding_type": ("absolute",),
            "decoder_type": ("vit",),
            "decoder_cls_token": (True,),
            "pixel_head": ("linear",),
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
        for name in ("tau", "mlp_ratio", "scaling_factor", "initializer_range", "token_initializer_range"):
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
        if config.quantizer == "softvq" and config.num_latent_tokens % config.num_codebooks:
            raise ValueError(
                f"`num_latent_tokens` is {config.num_latent_tokens}, allowed: multiples of `num_codebooks`"
                f" {config.num_codebooks} (each codebook serves an equal run of tokens)."
            )

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        sample_size = self.config.sample_size
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        expected = (self.config.in_channels, height, width)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, allowed:"
                f" (batch, {', '.join(map(str, expected))})."
            )
        self._check_values("pixel_values", pixel_values, self.encoder.positions.latent_tokens.dtype)

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
        self, pixel_values: torch.Tensor, return_dict: bool = True
    ) -> SoftVQEncoderOutput | tuple[torch.Tensor]:
        """
        Encode images into latent tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, in_channels, H, W)`): Images in [-1, 1] of `sample_size`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`SoftVQEncoderOutput`] or, with `return_dict=False`, the tuple `(latent,)`. Latents are raw: normalise
            them by [`AutoencoderSoftVQ.scale_latent`] before a generator sees them.

        Raises:
            ValueError: If `pixel_values` has another shape, an integer dtype, or values that are not finite.
        """
        self._check_pixel_values(pixel_values)

        if self.use_slicing and pixel_values.shape[0] > 1:
            moments = torch.cat([self.quant_conv(self.encoder(image)) for image in pixel_values.split(1)])
        else:
            moments = self.quant_conv(self.encoder(pixel_values))

        if self.config.quantizer == "softvq":
            latent, probs, affinity = self.quantize(moments)
            output = SoftVQEncoderOutput(
                latent=latent,
                indices=probs.argmax(dim=-1),
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
    def decode(self, latent: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode latent tokens into images.

        Args:
            latent (`torch.Tensor` of shape `(B, num_latent_tokens, latent_channels)`):
                Raw latents, as [`AutoencoderSoftVQ.encode`] or [`AutoencoderSoftVQ.unscale_latent`] return them.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or, with `return_dict=False`, the tuple `(sample,)`;
            `sample` is `(B, in_channels, H, W)`, nominally in [-1, 1], not clamped.

        Raises:
            ValueError: If `latent` has another shape, an integer dtype, or values that are not finite.
        """
        self._check_latent(latent)

        if self.use_slicing and latent.shape[0] > 1:
            sample = torch.cat([self.decoder(self.post_quant_conv(tokens)) for tokens in latent.split(1)])
        else:
            sample = self.decoder(self.post_quant_conv(latent))

        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    def forward(
        self,
        pixel_values: torch.Tensor,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SoftVQOutput | tuple[torch.Tensor]:
        """
        Encode and decode in one call. Training goes through here, so that wrappers such as DDP see it.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, in_channels, H, W)`): Images in [-1, 1] of `sample_size`.
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether the "kl" quantizer decodes a draw from the posterior instead of its mean.
            generator (`torch.Generator` or a list of them, *optional*): Source of that draw.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`SoftVQOutput`] or, with `return_dict=False`, the tuple `(sample,)`.

        Raises:
            ValueError: As [`AutoencoderSoftVQ.encode`].
        """
        encoded = self.encode(pixel_values)
        latent = encoded.latent
        if sample_posterior and encoded.latent_dist is not None:
            latent = encoded.latent_dist.sample(generator)
        sample = self.decode(latent).sample

        if not return_dict:
            return (sample,)
        return SoftVQOutput(
            sample=sample,
            latent=latent,
            indices=encoded.indices,
            entropy_loss=encoded.entropy_loss,
            vq_loss=encoded.vq_loss,
            commit_loss=encoded.commit_loss,
            kl_loss=encoded.kl_loss,
        )

    def scale_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Raw latents to the normalised latents that generators are trained on; any shape."""
        return (latent - self.config.shift_factor) * self.config.scaling_factor

    def unscale_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse of [`AutoencoderSoftVQ.scale_latent`]: normalised latents to raw ones; any shape."""
        return latent / self.config.scaling_factor + self.config.shift_factor
