"""Start a tokenizer's encoder from DINOv2 (arXiv 2304.07193), as the published SoftVQ-VAE recipe does."""

import torch
import torch.nn.functional as F
from transformers import Dinov2Model, Dinov2WithRegistersModel

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


def resample_position_embedding(position_embedding: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """
    Resize the learned positions of a square patch grid: bicubic with antialiasing, in float32.

    Args:
        position_embedding (`torch.Tensor` of shape `(1, n * n, C)`): Positions in raster order.
        grid_size (`tuple[int, int]`): Rows and columns of the new grid.

    Returns:
        `torch.Tensor`: float32 of shape `(1, rows * columns, C)`.
    """
    side = round(position_embedding.shape[1] ** 0.5)
    if side * side != position_embedding.shape[1]:
        raise ValueError(f"`position_embedding` has {position_embedding.shape[1]} positions, allowed: square numbers.")
    grid = position_embedding.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=grid_size, mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def resample_patch_embedding(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Resize a patch projection by the pseudo-inverse (FlexiViT, arXiv 2212.08013, section 3.4), so that a resized patch
    has the same inner product with the new kernel as the original patch had with the old one.

    Args:
        weight (`torch.Tensor` of shape `(C, in_channels, p, p)`): The projection.
        patch_size (`int`): The new side in pixels.

    Returns:
        `torch.Tensor`: float32 of shape `(C, in_channels, patch_size, patch_size)`.
    """
    old = weight.shape[-1]
    if old == patch_size:
        return weight.float()
    basis = torch.eye(old * old, dtype=torch.float32).reshape(old * old, 1, old, old)
    resize = F.interpolate(basis, size=(patch_size, patch_size), mode="bicubic", antialias=True).flatten(1)
    kernel = weight.float().flatten(2) @ torch.linalg.pinv(resize).T
    return kernel.unflatten(-1, (patch_size, patch_size))


@torch.no_grad()
def load_dinov2_encoder(model: AutoencoderSoftVQ, dinov2: Dinov2Model | Dinov2WithRegistersModel) -> None:
    """
    Copy a DINOv2 backbone into the encoder of `model`; the latent tokens keep their initialisation.

    Positions and patch projection are resampled to the encoder's grid and patch size; the mask token is dropped. With
    registers, the position of the class token is added to the class token, which has none in the encoder.

    Args:
        model ([`AutoencoderSoftVQ`]): The tokenizer; its encoder is changed in place.
        dinov2 (`Dinov2Model` or `Dinov2WithRegistersModel`): The backbone.

    Raises:
        ValueError: If width, depth, heads, feed-forward width or number of register tokens differ.
    """
    config = model.config
    ours = {
        "encoder_hidden_size": config.encoder_hidden_size,
        "encoder_num_layers": config.encoder_num_layers,
        "encoder_num_attention_heads": config.encoder_num_attention_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_register_tokens": config.num_register_tokens,
    }
    theirs = {
        "encoder_hidden_size": dinov2.config.hidden_size,
        "encoder_num_layers": dinov2.config.num_hidden_layers,
        "encoder_num_attention_heads": dinov2.config.num_attention_heads,
        "mlp_ratio": dinov2.config.mlp_ratio,
        "num_register_tokens": getattr(dinov2.config, "num_register_tokens", 0),
    }
    different = [f"{key} (is {ours[key]}, should be {theirs[key]})" for key in ours if ours[key] != theirs[key]]
    if dinov2.config.use_swiglu_ffn:
        different.append("feed-forward layers (this DINOv2 has SwiGLU ones)")
    if different:
        name = dinov2.config.name_or_path
        raise ValueError(f"The encoder of `model` does not fit {name!r}: {', '.join(different)}.")

    encoder, embeddings = model.encoder, dinov2.embeddings
    sample_size = config.sample_size
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    grid_size = (height // config.encoder_patch_size, width // config.encoder_patch_size)
    cls_position, patch_positions = embeddings.position_embeddings.float().split(
        [1, embeddings.position_embeddings.shape[1] - 1], dim=1
    )
    patch_positions = resample_position_embedding(patch_positions, grid_size)
    if encoder.positions.register_tokens is None:
        encoder.positions.cls_token.copy_(embeddings.cls_token)
        encoder.positions.position_embedding.copy_(torch.cat([cls_position, patch_positions], dim=1))
    else:
        encoder.positions.cls_token.copy_(embeddings.cls_token + cls_position)
        encoder.positions.register_tokens.copy_(embeddings.register_tokens)
        encoder.positions.position_embedding.copy_(patch_positions)
    projection = embeddings.patch_embeddings.projection
    encoder.patch_embed.weight.copy_(resample_patch_embedding(projection.weight, config.encoder_patch_size))
    encoder.patch_embed.bias.copy_(projection.bias)

    for block, layer in zip(encoder.blocks, dinov2.encoder.layer, strict=True):
        block.norm1.load_state_dict(layer.norm1.state_dict())
        block.attn.to_q.load_state_dict(layer.attention.q_proj.state_dict())
        block.attn.to_k.load_state_dict(layer.attention.k_proj.state_dict())
        block.attn.to_v.load_state_dict(layer.attention.v_proj.state_dict())
        block.attn.to_out[0].load_state_dict(layer.attention.o_proj.state_dict())
        block.layer_scale1.weight.copy_(layer.layer_scale1.lambda1)
        block.norm2.load_state_dict(layer.norm2.state_dict())
        block.ff.linear_1.load_state_dict(layer.mlp.fc1.state_dict())
        block.ff.linear_2.load_state_dict(layer.mlp.fc2.state_dict())
        block.layer_scale2.weight.copy_(layer.layer_scale2.lambda1)
    encoder.norm.load_state_dict(dinov2.layernorm.state_dict())
