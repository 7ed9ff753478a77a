"""Start a tokenizer's encoder from DINOv2 (arXiv 2304.07193), as the published SoftVQ-VAE recipe does; and back again.

[`load_dinov2`] reads the backbone, [`load_dinov2_encoder`] copies it into an encoder, and [`export_dinov2_encoder`]
makes a `Dinov2Model` of an encoder again.
"""

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ, resample_position_embedding


MODEL_TYPES = ("dinov2", "dinov2_with_registers")


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
    kernel = weight.cpu().double().flatten(2) @ torch.linalg.pinv(_resize_matrix(old, patch_size))
    return kernel.unflatten(-1, (patch_size, patch_size)).to(weight.device, torch.float32)


def _resize_matrix(old: int, new: int) -> torch.Tensor:
    """The linear map of a bicubic, antialiased resize of a square patch: float64 of shape `(new * new, old * old)`."""
    basis = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    return F.interpolate(basis, size=(new, new), mode="bicubic", antialias=True).flatten(1).T


def load_dinov2(name_or_path: str) -> Dinov2Model | Dinov2WithRegistersModel:
    """
    Load a DINOv2 backbone for [`load_dinov2_encoder`].

    Args:
        name_or_path (`str`):
            A folder or a Hub repository of transformers, such as `"facebook/dinov2-large"` or
            `"facebook/dinov2-with-registers-large"`. Heads of another task are left out.

    Returns:
        `Dinov2Model` or `Dinov2WithRegistersModel`: as its config says; float32, on the CPU, in eval mode.

    Raises:
        ValueError: If its config cannot be read or downloaded, it is of another architecture, or weights are missing.
        OSError: If the file of its weights cannot be read or downloaded.
    """
    allowed = "a folder or Hub repository of a DINOv2 model of transformers, with or without registers"
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:  # also that the Hub cannot be reached
        raise ValueError(
            f"`name_or_path` is {name_or_path!r}, which could not be read, allowed: {allowed}; without a connection, a"
            f" folder or what is in the cache. {error}"
        ) from error
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"`name_or_path` is {name_or_path!r} with a model of type {config.model_type!r}, allowed: {allowed} (types"
            f" {', '.join(map(repr, MODEL_TYPES))})."
        )
    model, report = AutoModel.from_pretrained(
        name_or_path, config=config, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(set(report["missing_keys"]) - {"embeddings.mask_token"})
    if missing:
        raise ValueError(f"`name_or_path` is {name_or_path!r}, whose weights lack {', '.join(missing)}.")
    return model


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
        ValueError: If sizes, channels, activation or number of register tokens differ, or the backbone is built in a
            way that the encoder is not (other activation or epsilon, no biases). All differences are listed.
    """
    _check_fit(model, dinov2)

    encoder, embeddings = model.encoder, dinov2.embeddings
    projection = embeddings.patch_embeddings.projection
    grid_size = tuple(
        size // patch
        for size, patch in zip(embeddings.patch_embeddings.image_size, projection.kernel_size, strict=True)
    )
    cls_position, patch_positions = embeddings.position_embeddings.split([1, grid_size[0] * grid_size[1]], dim=1)
    patch_positions = resample_position_embedding(patch_positions, grid_size, encoder.positions.grid_size)
    if encoder.positions.register_tokens is None:
        encoder.positions.cls_token.copy_(embeddings.cls_token)
        encoder.positions.position_embedding.copy_(torch.cat([cls_position, patch_positions], dim=1))
    else:
        encoder.positions.cls_token.copy_(embeddings.cls_token + cls_position)
        encoder.positions.register_tokens.copy_(embeddings.register_tokens)
        encoder.positions.position_embedding.copy_(patch_positions)
    encoder.patch_embed.weight.copy_(resample_patch_embedding(projection.weight, model.config.encoder_patch_size))
    encoder.patch_embed.bias.copy_(projection.bias)

    for block, layer in zip(encoder.blocks, dinov2.encoder.layer, strict=True):
        for ours, theirs in _module_pairs(block, layer):
            ours.load_state_dict(theirs.state_dict())
        block.layer_scale1.weight.copy_(layer.layer_scale1.lambda1)
        block.layer_scale2.weight.copy_(layer.layer_scale2.lambda1)
        if block.ff.is_gated:
            block.ff.linear_1.weight.copy_(torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]))
            block.ff.linear_1.bias.copy_(torch.cat([layer.mlp.gate_proj.bias, layer.mlp.up_proj.bias]))
    encoder.norm.load_state_dict(dinov2.layernorm.state_dict())


@torch.no_grad()
def export_dinov2_encoder(
    model: AutoencoderSoftVQ, patch_size: int | None = None, image_size: int | None = None
) -> Dinov2Model | Dinov2WithRegistersModel:
    """
    Turn the encoder of a tokenizer back into a DINOv2 backbone of transformers, for features of image patches: what
    [`load_dinov2_encoder`] does, the other way round. Latent tokens are left out, and with them their influence on the
    patches. Without resampling, loading the result into an encoder restores it to the bit.

    Args:
        model ([`AutoencoderSoftVQ`]): The tokenizer. Its patch grid is square.
        patch_size (`int`, *optional*):
            Side of the patches in pixels, by default that of the encoder. With smaller ones the result sees a patch as
            the encoder sees it enlarged, which undoes the resampling of [`load_dinov2_encoder`]; for larger ones the
            projection is resampled by [`resample_patch_embedding`].
        image_size (`int`, *optional*):
            Side of the images in pixels, by default such that the patch grid stays; for another grid the positions are
            resampled.

    Returns:
        `Dinov2Model`, or `Dinov2WithRegistersModel` if the encoder has registers: float32, on the CPU, in eval mode.

    Raises:
        ValueError: If the encoder is none of a DINOv2 model: rotary positions, a patch grid that is not square, or a
            feed-forward width that a whole `mlp_ratio` does not give; or if `image_size` is not a multiple of
            `patch_size`.
    """
    config, encoder = model.config, model.encoder
    rows, columns = encoder.positions.grid_size
    patch_size = config.encoder_patch_size if patch_size is None else patch_size
    image_size = rows * patch_size if image_size is None else image_size
    if config.position_embedding_type != "absolute":
        raise ValueError(
            f"`position_embedding_type` is {config.position_embedding_type!r}, allowed: 'absolute', as in DINOv2."
        )
    if rows != columns:
        raise ValueError(
            f"`sample_size` is {config.sample_size}, a grid of {rows} x {columns} patches, allowed: square grids, as"
            " in DINOv2."
        )
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise ValueError(f"`image_size` is {image_size}, allowed: multiples of `patch_size` {patch_size}.")

    is_gated = config.encoder_activation_fn == "swiglu"
    settings = {
        "hidden_size": config.encoder_hidden_size,
        "num_hidden_layers": config.encoder_num_layers,
        "num_attention_heads": config.encoder_num_attention_heads,
        "mlp_ratio": round(config.mlp_ratio),
        "use_swiglu_ffn": is_gated,
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": config.in_channels,
    }
    if config.num_register_tokens > 0:
        dinov2 = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**settings, num_register_tokens=config.num_register_tokens)
        )
        dinov2.embeddings.mask_token.zero_()
    else:
        dinov2 = Dinov2Model(Dinov2Config(**settings, use_mask_token=False))
    inner_size, dinov2_inner_size = encoder.blocks[0].ff.linear_2.in_features, _inner_size(dinov2)
    if inner_size != dinov2_inner_size:
        raise ValueError(
            f"`mlp_ratio` is {config.mlp_ratio}, a feed-forward width of {inner_size}, allowed: whole numbers, and the"
            f" widths that DINOv2 has for them (the nearest is {dinov2_inner_size})."
        )

    embeddings, positions = dinov2.embeddings, encoder.positions
    grid_size = (image_size // patch_size, image_size // patch_size)
    embeddings.cls_token.copy_(positions.cls_token)
    if positions.register_tokens is None:
        cls_position, patch_positions = positions.position_embedding.split([1, rows * columns], dim=1)
    else:
        embeddings.register_tokens.copy_(positions.register_tokens)
        cls_position, patch_positions = torch.zeros_like(positions.cls_token), positions.position_embedding
    patch_positions = resample_position_embedding(patch_positions, (rows, columns), grid_size)
    embeddings.position_embeddings.copy_(torch.cat([cls_position.float(), patch_positions], dim=1))
    projection = embeddings.patch_embeddings.projection
    weight = encoder.patch_embed.weight
    if patch_size < config.encoder_patch_size:
        weight = weight.cpu().double().flatten(2) @ _resize_matrix(patch_size, config.encoder_patch_size)
        weight = weight.unflatten(-1, (patch_size, patch_size))
    projection.weight.copy_(resample_patch_embedding(weight, patch_size))
    projection.bias.copy_(encoder.patch_embed.bias)

    for block, layer in zip(encoder.blocks, dinov2.encoder.layer, strict=True):
        for ours, theirs in _module_pairs(block, layer):
            theirs.load_state_dict(ours.state_dict())
        layer.layer_scale1.lambda1.copy_(block.layer_scale1.weight)
        layer.layer_scale2.lambda1.copy_(block.layer_scale2.weight)
        if is_gated:
            for parameter in ("weight", "bias"):
                gate, up = getattr(block.ff.linear_1, parameter).chunk(2)
                getattr(layer.mlp.gate_proj, parameter).copy_(gate)
                getattr(layer.mlp.up_proj, parameter).copy_(up)
    dinov2.layernorm.load_state_dict(encoder.norm.state_dict())
    return dinov2.eval()


def _module_pairs(block: torch.nn.Module, layer: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Modules with the same parameters in a block of the encoder and in a layer of DINOv2."""
    pairs = [
        (block.norm1, layer.norm1),
        (block.attn.to_q, layer.attention.q_proj),
        (block.attn.to_k, layer.attention.k_proj),
        (block.attn.to_v, layer.attention.v_proj),
        (block.attn.to_out[0], layer.attention.o_proj),
        (block.norm2, layer.norm2),
    ]
    if block.ff.is_gated:  # its first layer holds two of DINOv2's
        return [*pairs, (block.ff.linear_2, layer.mlp.down_proj)]
    return [*pairs, (block.ff.linear_1, layer.mlp.fc1), (block.ff.linear_2, layer.mlp.fc2)]


def _inner_size(dinov2: Dinov2Model | Dinov2WithRegistersModel) -> int:
    """Channels between the feed-forward layers."""
    mlp = dinov2.encoder.layer[0].mlp
    return mlp.down_proj.in_features if dinov2.config.use_swiglu_ffn else mlp.fc2.in_features


def _check_fit(model: AutoencoderSoftVQ, dinov2: Dinov2Model | Dinov2WithRegistersModel) -> None:
    """Raises a `ValueError` that lists what keeps the backbone out of the encoder of `model`."""
    config, backbone = model.config, dinov2.config
    activation_fn = "swiglu" if backbone.use_swiglu_ffn else "gelu"
    pairs = {
        "encoder_hidden_size": (config.encoder_hidden_size, backbone.hidden_size),
        "encoder_num_layers": (config.encoder_num_layers, backbone.num_hidden_layers),
        "encoder_num_attention_heads": (config.encoder_num_attention_heads, backbone.num_attention_heads),
        "encoder_activation_fn": (config.encoder_activation_fn, activation_fn),
        "num_register_tokens": (config.num_register_tokens, getattr(backbone, "num_register_tokens", 0)),
        "in_channels": (config.in_channels, backbone.num_channels),
    }
    different = [
        f"{name} (is {is_!r}, should be {should!r})" for name, (is_, should) in pairs.items() if is_ != should
    ]

    # DINOv2 rounds the width of SwiGLU to a multiple of 8, so the same ratio may be another width
    inner_size = _inner_size(dinov2)
    gain = 2 / 3 if activation_fn == "swiglu" else 1
    if int(backbone.hidden_size * config.mlp_ratio * gain) != inner_size:
        fitting = inner_size / (backbone.hidden_size * gain)
        if int(backbone.hidden_size * fitting * gain) != inner_size:
            fitting = (inner_size + 0.5) / (backbone.hidden_size * gain)
        different.append(f"mlp_ratio (is {config.mlp_ratio}, should be {fitting})")

    for name, value in (("qkv_bias", True), ("layer_norm_eps", 1e-6), ("hidden_act", "gelu")):
        if getattr(backbone, name) != value and not (name == "hidden_act" and backbone.use_swiglu_ffn):
            different.append(f"{name} of the backbone (is {getattr(backbone, name)!r}, should be {value!r})")
    if different:
        raise ValueError(f"The encoder of `model` does not fit {backbone.name_or_path!r}: {', '.join(different)}.")
