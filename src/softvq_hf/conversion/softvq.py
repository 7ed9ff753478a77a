"""Official SoftVQ-VAE tokenizers (arXiv 2412.10958) and their KL, VQ and AE twins to `AutoencoderSoftVQ`."""

from collections.abc import Mapping
from typing import Any

import torch

from softvq_hf.conversion.state_dict import load_official_state_dict, strip_wrapper_prefixes
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


# official backbone name without its tag: hidden size, layers, heads, register tokens
BACKBONES = {
    "vit_small_patch14_dinov2": (384, 12, 6, 0),
    "vit_base_patch14_dinov2": (768, 12, 12, 0),
    "vit_large_patch14_dinov2": (1024, 24, 16, 0),
    "vit_small_patch14_reg4_dinov2": (384, 12, 6, 4),
    "vit_base_patch14_reg4_dinov2": (768, 12, 12, 4),
    "vit_large_patch14_reg4_dinov2": (1024, 24, 16, 4),
}

REQUIRED_CONFIG_KEYS = (
    "enc_type",
    "dec_type",
    "encoder_model",
    "decoder_model",
    "image_size",
    "num_latent_tokens",
    "codebook_embed_dim",
)

# parts of the official model that only its training used, and buffers
IGNORED_KEYS = (
    r"decoder\.model\.patch_embed\..*",
    r"quantize\.codebook_used",
    r"projection\..*",
    r"(repa|clip)_model\..*",
)


def convert_softvq(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> AutoencoderSoftVQ:
    """
    Convert an official tokenizer. Its class is told by the weights: a 3-D `quantize.embedding` is SoftVQ,
    `quantize.embedding.weight` is VQ, a `quant_conv` of twice the latent width is KL, and neither is the plain
    autoencoder.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the official keys.
        config (`Mapping[str, Any]`):
            The official flat config. Keys that only training used are ignored, optional keys take the official
            defaults. `encoder_override` and `decoder_override` may give `embed_dim`, `depth` and `num_heads`.

    Returns:
        [`AutoencoderSoftVQ`]: float32, eval mode.

    Raises:
        ValueError: If a required config key is missing, the config asks for an architecture that is not supported, or
            keys of the weights are missing, unexpected or mis-shaped (all are listed).
    """
    state_dict = strip_wrapper_prefixes(state_dict)
    missing = [key for key in REQUIRED_CONFIG_KEYS if key not in config]
    if missing:
        raise ValueError(f"`config` lacks {', '.join(missing)}: a tokenizer cannot be built without.")
    for key, default, allowed in (
        ("enc_type", None, "vit"),
        ("dec_type", None, "vit"),
        ("to_pixel", "linear", "linear"),
        ("use_ape", True, True),
        ("use_rope", False, False),
        ("dec_cls_token", True, True),
    ):
        value = config.get(key, default)
        if value != allowed:
            raise ValueError(f"`config[{key!r}]` is {value!r}, allowed: {allowed!r}.")

    latent_channels = config["codebook_embed_dim"]
    if "quantize.embedding" in state_dict:
        quantizer = "softvq"
    elif "quantize.embedding.weight" in state_dict:
        quantizer = "vq"
    elif "quant_conv.bias" in state_dict and state_dict["quant_conv.bias"].shape[0] == 2 * latent_channels:
        quantizer = "kl"
    else:
        quantizer = "none"
    if quantizer in ("kl", "none") and any(key.startswith("quantize.") for key in state_dict):
        raise ValueError("`state_dict` fits no tokenizer: 1 missing: quantize.embedding, whose buffers are there.")

    encoder_size, num_register_tokens = _backbone_size(config, "encoder")
    decoder_size, decoder_num_register_tokens = _backbone_size(config, "decoder")
    vq_std = config.get("vq_std", 1.0)
    if not vq_std > 0:
        raise ValueError(f"`config['vq_std']` is {vq_std!r}, allowed: numbers above 0.")
    model = AutoencoderSoftVQ(
        sample_size=config["image_size"],
        encoder_patch_size=config.get("enc_patch_size", 16),
        decoder_patch_size=config.get("dec_patch_size", 16),
        num_latent_tokens=config["num_latent_tokens"],
        latent_channels=latent_channels,
        quantizer=quantizer,
        codebook_size=config.get("codebook_size", 16384),
        num_codebooks=config.get("num_codebooks", 1),
        codebook_l2_norm=config.get("codebook_l2_norm", True),
        tau=config.get("tau", 0.1),
        **encoder_size,
        **decoder_size,
        num_register_tokens=num_register_tokens,
        decoder_num_register_tokens=decoder_num_register_tokens,
        shift_factor=config.get("vq_mean", 0.0),
        scaling_factor=1.0 / vq_std,
    )
    return load_official_state_dict(model, state_dict, _key_map(model), IGNORED_KEYS)


def _backbone_size(config: Mapping[str, Any], side: str) -> tuple[dict[str, int], int]:
    """Model arguments of one backbone, prefixed by `side`, and its number of register tokens."""
    name = config[f"{side}_model"]
    backbone = name.split(".")[0]
    if backbone not in BACKBONES:
        raise ValueError(f"`config['{side}_model']` is {name!r}, allowed: {', '.join(BACKBONES)}.")
    hidden_size, num_layers, num_attention_heads, num_register_tokens = BACKBONES[backbone]
    override = config.get(f"{side}_override") or {}
    size = {
        f"{side}_hidden_size": override.get("embed_dim", hidden_size),
        f"{side}_num_layers": override.get("depth", num_layers),
        f"{side}_num_attention_heads": override.get("num_heads", num_attention_heads),
    }
    return size, num_register_tokens


def _key_map(model: AutoencoderSoftVQ) -> dict[str, tuple[str, ...]]:
    """Official keys to the keys of `model`; a fused official tensor lists all of its parts."""
    pairs = {
        "encoder.latent_tokens": "encoder.positions.latent_tokens",
        "encoder.latent_pos_embed": "encoder.positions.latent_position_embedding",
        "decoder.mask_token": "decoder.positions.mask_token",
        "decoder.latent_pos_embed": "decoder.positions.latent_position_embedding",
    }
    modules = {
        "encoder.model.patch_embed.proj": "encoder.patch_embed",
        "decoder.to_pixel.model": "decoder.pixel_head.proj",
        "quant_conv": "quant_conv",
        "post_quant_conv": "post_quant_conv",
    }
    fused = {}
    for side, transformer in (("encoder", model.encoder), ("decoder", model.decoder)):
        pairs[f"{side}.model.cls_token"] = f"{side}.positions.cls_token"
        pairs[f"{side}.model.pos_embed"] = f"{side}.positions.position_embedding"
        if transformer.positions.register_tokens is not None:
            pairs[f"{side}.model.reg_token"] = f"{side}.positions.register_tokens"
        modules[f"{side}.model.norm"] = f"{side}.norm"
        for i in range(len(transformer.blocks)):
            official, own = f"{side}.model.blocks.{i}", f"{side}.blocks.{i}"
            pairs[f"{official}.ls1.gamma"] = f"{own}.layer_scale1.weight"
            pairs[f"{official}.ls2.gamma"] = f"{own}.layer_scale2.weight"
            modules[f"{official}.norm1"] = f"{own}.norm1"
            modules[f"{official}.norm2"] = f"{own}.norm2"
            modules[f"{official}.attn.proj"] = f"{own}.attn.to_out.0"
            modules[f"{official}.mlp.fc1"] = f"{own}.ff.linear_1"
            modules[f"{official}.mlp.fc2"] = f"{own}.ff.linear_2"
            for kind in ("weight", "bias"):
                fused[f"{official}.attn.qkv.{kind}"] = tuple(f"{own}.attn.to_{x}.{kind}" for x in "qkv")
    if model.config.quantizer == "softvq":
        pairs["quantize.embedding"] = "quantize.embedding"
    elif model.config.quantizer == "vq":
        pairs["quantize.embedding.weight"] = "quantize.embedding"

    pairs |= {f"{key}.{kind}": f"{own}.{kind}" for key, own in modules.items() for kind in ("weight", "bias")}
    return {key: (own,) for key, own in pairs.items()} | fused
