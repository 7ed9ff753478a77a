"""Official SoftVQ-VAE (arXiv 2412.10958) and MAETok (arXiv 2502.03444) tokenizers, and their KL, VQ and AE twins, to
`AutoencoderSoftVQ`; the twin with convolutional encoder and decoder to diffusers' own `VQModel`."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel

from softvq_hf.conversion.config import check_official_config
from softvq_hf.conversion.state_dict import load_official_state_dict, strip_wrapper_prefixes
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


# official backbone name without its tag: hidden size, layers, heads, register tokens, activation
BACKBONES = {
    "vit_small_patch14_dinov2": (384, 12, 6, 0, "gelu"),
    "vit_base_patch14_dinov2": (768, 12, 12, 0, "gelu"),
    "vit_large_patch14_dinov2": (1024, 24, 16, 0, "gelu"),
    "vit_giant_patch14_dinov2": (1536, 40, 24, 0, "swiglu"),
    "vit_small_patch14_reg4_dinov2": (384, 12, 6, 4, "gelu"),
    "vit_base_patch14_reg4_dinov2": (768, 12, 12, 4, "gelu"),
    "vit_large_patch14_reg4_dinov2": (1024, 24, 16, 4, "gelu"),
    "vit_giant_patch14_reg4_dinov2": (1536, 40, 24, 4, "swiglu"),
}
MOVQ_BACKBONES = {
    "vit_small_patch14_dinov2_movqv2": (384, 12, 6, 0, "gelu"),
    "vit_base_patch14_dinov2_movqv2": (768, 12, 12, 0, "gelu"),
}

REQUIRED_CONFIG_KEYS = {"enc_type": str, "dec_type": str}
VIT_CONFIG_KEYS = {"encoder_model": str, "decoder_model": str}
# where they are absent, the official code takes its defaults
OPTIONAL_CONFIG_KEYS = {
    "codebook_embed_dim": int,
    "codebook_l2_norm": bool,
    "codebook_size": int,
    "dec_cls_token": bool,
    "dec_patch_size": int,
    "decoder_ch_mult": list,
    "decoder_override": dict,
    "enc_patch_size": int,
    "enc_token_drop": float,
    "encoder_ch_mult": list,
    "encoder_override": dict,
    "image_size": int,
    "num_codebooks": int,
    "num_latent_tokens": int,
    "rope_mixed": bool,
    "rope_theta": float,
    "tau": float,
    "to_pixel": str,
    "use_ape": bool,
    "use_rope": bool,
    "vq_mean": float,
    "vq_std": float,
    "z_channels": int,
}
# These say nothing about the network: training settings, pretrained parts, hub metadata.
IGNORED_CONFIG_KEYS = (
    "base_image_size",
    "codebook_show_usage",
    "commit_loss_beta",
    "dec_drop_path_rate",
    "dec_pretrained",
    "dec_tuning_method",
    "dropout_p",
    "enc_drop_path_rate",
    "enc_pretrained",
    "enc_token_drop_max",
    "enc_tuning_method",
    "entropy_loss_ratio",
    "kl_loss_weight",
    "library_name",
    "license",
    "pipeline_tag",
    "repa",
    "repa_align",
    "repa_layer_indices",
    "repa_loss_weight",
    "repa_model",
    "repa_patch_size",
    "repa_proj_dim",
    "repo_url",
    "tags",
    "vq_loss_ratio",
)

# parts of the official model that only its training used, and buffers
IGNORED_KEYS = (
    r"decoder\.model\.patch_embed\..*",
    r"quantize\.codebook_used",
    r"(encoder|decoder)\.freqs_t_[xy]",
    r"projection\..*",
    r"(repa|clip)_model\..*",
    r"(decoder|post_quant_conv|to_pixel)_(hog|dino|clip)\..*",
    r"hog_generator\..*",
)


def convert_softvq(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> AutoencoderSoftVQ | VQModel:
    """
    Convert an official tokenizer. Its class is told by the weights: a 3-D `quantize.embedding` is SoftVQ,
    `quantize.embedding.weight` is VQ, a `quant_conv` of twice the latent width is KL, and neither is the plain
    autoencoder, which MAETok is.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the official keys.
        config (`Mapping[str, Any]`):
            The official flat config. Keys that only training used are ignored, optional keys take the official
            defaults. `encoder_override` and `decoder_override` may give `embed_dim`, `depth` and `num_heads`, or `ch`
            and `num_res_blocks` for a convolutional encoder and decoder.

    Returns:
        [`AutoencoderSoftVQ`], or a [`~diffusers.VQModel`] for a convolutional VQ tokenizer: float32, eval mode.

    Raises:
        ValueError: If a required config key is missing, the config asks for an architecture that is not supported, or
            keys of the weights are missing, unexpected or mis-shaped (all are listed).
    """
    state_dict = strip_wrapper_prefixes(state_dict)
    is_cnn = config.get("enc_type") == config.get("dec_type") == "cnn"
    if is_cnn:
        config = check_official_config(
            config, REQUIRED_CONFIG_KEYS, OPTIONAL_CONFIG_KEYS, (*VIT_CONFIG_KEYS, *IGNORED_CONFIG_KEYS)
        )
        return _convert_cnn(state_dict, config)
    config = check_official_config(
        config, REQUIRED_CONFIG_KEYS | VIT_CONFIG_KEYS, OPTIONAL_CONFIG_KEYS, IGNORED_CONFIG_KEYS
    )
    if (config["enc_type"], config["dec_type"]) != ("vit", "vit"):
        raise ValueError(
            f"`config` holds `enc_type` {config['enc_type']!r} and `dec_type` {config['dec_type']!r}, allowed: 'vit'"
            " or 'cnn' for both."
        )

    use_rope = config.get("use_rope", False)
    if not use_rope and not config.get("use_ape", True):
        raise ValueError(
            "`config['use_ape']` and `config['use_rope']` are False, allowed: at least one of them, since the decoder"
            " has no positions otherwise."
        )
    pixel_head = config.get("to_pixel", "linear")
    if pixel_head not in ("linear", "conv", "siren"):
        raise ValueError(f"`config['to_pixel']` is {pixel_head!r}, allowed: 'linear', 'conv', 'siren'.")
    decoder_cls_token = config.get("dec_cls_token", True)

    latent_channels = config.get("codebook_embed_dim", 8)
    if "quantize.embedding" in state_dict:
        quantizer = "softvq"
    elif "quantize.embedding.weight" in state_dict:
        quantizer = "vq"
    elif "quant_conv.bias" in state_dict and state_dict["quant_conv.bias"].shape == (2 * latent_channels,):
        quantizer = "kl"
    else:
        quantizer = "none"
    if quantizer in ("kl", "none") and any(key.startswith("quantize.") for key in state_dict):
        raise ValueError("`state_dict` fits no tokenizer: 1 missing: quantize.embedding, whose buffers are there.")

    encoder, num_register_tokens = _backbone(config, "encoder", BACKBONES)
    decoder, decoder_num_register_tokens = _backbone(config, "decoder", BACKBONES | MOVQ_BACKBONES)
    is_movq = config["decoder_model"].split(".")[0] in MOVQ_BACKBONES
    if not use_rope and not decoder_cls_token and decoder_num_register_tokens == 0:
        raise ValueError(
            "`config['dec_cls_token']` is False, allowed: True for a decoder with absolute positions, since the"
            " official position table has a row for the class token."
        )
    model = AutoencoderSoftVQ(
        sample_size=config.get("image_size", 256),
        encoder_patch_size=config.get("enc_patch_size", 16),
        decoder_patch_size=config.get("dec_patch_size", 16),
        num_latent_tokens=config.get("num_latent_tokens", 256),
        latent_channels=latent_channels,
        quantizer=quantizer,
        codebook_size=config.get("codebook_size", 16384),
        num_codebooks=config.get("num_codebooks", 1),
        codebook_l2_norm=config.get("codebook_l2_norm", True),
        tau=config.get("tau", 0.1),
        **encoder,
        **decoder,
        num_register_tokens=num_register_tokens,
        decoder_num_register_tokens=decoder_num_register_tokens,
        position_embedding_type=("rope_mixed" if config.get("rope_mixed", False) else "rope_axial")
        if use_rope
        else "absolute",
        rope_theta=config.get("rope_theta", 10.0),
        encoder_mask_token=config.get("enc_token_drop", 0.0) > 0 or "encoder.mask_token" in state_dict,
        decoder_type="movq" if is_movq else "vit",
        decoder_cls_token=decoder_cls_token,
        pixel_head=pixel_head,
        **_latent_statistics(config),
    )
    # a decoder with rotary positions carries a table that is not in use
    ignored_keys = (*IGNORED_KEYS, r"decoder\.model\.pos_embed") if use_rope else IGNORED_KEYS
    return load_official_state_dict(model, state_dict, _key_map(model), ignored_keys)


def _latent_statistics(config: Mapping[str, Any]) -> dict[str, float]:
    """Model arguments for the mean and standard deviation of the latents."""
    vq_std = config.get("vq_std", 1.0)
    if not vq_std > 0:
        raise ValueError(f"`config['vq_std']` is {vq_std!r}, allowed: numbers above 0.")
    return {"shift_factor": config.get("vq_mean", 0.0), "scaling_factor": 1.0 / vq_std}


def _backbone(
    config: Mapping[str, Any], side: str, backbones: Mapping[str, tuple[int, int, int, int, str]]
) -> tuple[dict[str, Any], int]:
    """Model arguments of one backbone, prefixed by `side`, and its number of register tokens."""
    name = config[f"{side}_model"]
    if name.split(".")[0] not in backbones:
        raise ValueError(f"`config['{side}_model']` is {name!r}, allowed: {', '.join(backbones)}.")
    hidden_size, num_layers, num_attention_heads, num_register_tokens, activation_fn = backbones[name.split(".")[0]]
    override = check_official_config(
        config.get(f"{side}_override", {}), {}, {"embed_dim": int, "depth": int, "num_heads": int}
    )
    arguments = {
        f"{side}_hidden_size": override.get("embed_dim", hidden_size),
        f"{side}_num_layers": override.get("depth", num_layers),
        f"{side}_num_attention_heads": override.get("num_heads", num_attention_heads),
        f"{side}_activation_fn": activation_fn,
    }
    return arguments, num_register_tokens


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
        "quant_conv": "quant_conv",
        "post_quant_conv": "post_quant_conv",
    }
    fused = {}
    if model.config.encoder_mask_token:
        pairs["encoder.mask_token"] = "encoder.positions.mask_token"
    for side, transformer in (("encoder", model.encoder), ("decoder", model.decoder)):
        if transformer.positions.cls_token is not None:
            pairs[f"{side}.model.cls_token"] = f"{side}.positions.cls_token"
        if transformer.positions.register_tokens is not None:
            pairs[f"{side}.model.reg_token"] = f"{side}.positions.register_tokens"
        if transformer.positions.position_embedding is not None:
            pairs[f"{side}.model.pos_embed"] = f"{side}.positions.position_embedding"
        if transformer.rope is not None and transformer.rope.frequencies is not None:
            pairs[f"{side}.freqs"] = f"{side}.rope.frequencies"
        is_movq = side == "decoder" and transformer.is_movq
        if is_movq:
            modules[f"{side}.model.norm.adaLN_modulation.1"] = f"{side}.norm.modulation"
        else:
            modules[f"{side}.model.norm"] = f"{side}.norm"
        for i in range(len(transformer.blocks)):
            official, own = f"{side}.model.blocks.{i}", f"{side}.blocks.{i}"
            if is_movq:
                modules[f"{official}.adaLN_modulation.1"] = f"{own}.modulation"
            else:
                pairs[f"{official}.ls1.gamma"] = f"{own}.layer_scale1.weight"
                pairs[f"{official}.ls2.gamma"] = f"{own}.layer_scale2.weight"
                modules[f"{official}.norm1"] = f"{own}.norm1"
                modules[f"{official}.norm2"] = f"{own}.norm2"
            modules[f"{official}.attn.proj"] = f"{own}.attn.to_out.0"
            modules[f"{official}.mlp.fc1"] = f"{own}.ff.linear_1"
            modules[f"{official}.mlp.fc2"] = f"{own}.ff.linear_2"
            for kind in ("weight", "bias"):
                fused[f"{official}.attn.qkv.{kind}"] = tuple(f"{own}.attn.to_{x}.{kind}" for x in "qkv")
    if model.config.pixel_head == "linear":
        modules["decoder.to_pixel.model"] = "decoder.pixel_head.proj"
    elif model.config.pixel_head == "conv":
        modules["decoder.to_pixel.model.1"] = "decoder.pixel_head.proj"
        for i in range(4):
            modules[f"decoder.to_pixel.model.{4 + 3 * i}"] = f"decoder.pixel_head.convs.{i}"
    else:
        for i in (0, 1):
            modules[f"decoder.to_pixel.model.{i}.linear"] = f"decoder.pixel_head.linear_{i + 1}"
    if model.config.quantizer == "softvq":
        pairs["quantize.embedding"] = "quantize.embedding"
    elif model.config.quantizer == "vq":
        pairs["quantize.embedding.weight"] = "quantize.embedding"

    pairs |= {f"{key}.{kind}": f"{own}.{kind}" for key, own in modules.items() for kind in ("weight", "bias")}
    return {key: (own,) for key, own in pairs.items()} | fused


def _convert_cnn(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> VQModel:
    """
    The tokenizer with convolutional encoder and decoder, a VQ of feature maps.

    The official quantizer gives tokens and codewords unit length. Codewords are stored so; the nearest of them does
    not depend on the length of a token, so `VQModel` finds the same ones.
    """
    if "quantize.embedding.weight" not in state_dict:
        raise ValueError(
            "`state_dict` has no `quantize.embedding.weight`, allowed: VQ for a convolutional encoder and decoder"
            " (`enc_type` 'cnn'); its twins were never released."
        )
    channels = {"encoder": 128, "decoder": 128}
    num_res_blocks = {"encoder": 2, "decoder": 2}
    for side in channels:
        override = check_official_config(config.get(f"{side}_override", {}), {}, {"ch": int, "num_res_blocks": int})
        channels[side] = override.get("ch", channels[side])
        num_res_blocks[side] = override.get("num_res_blocks", num_res_blocks[side])
    multipliers = {
        "encoder": config.get("encoder_ch_mult", [1, 1, 2, 2, 4]),
        "decoder": config.get("decoder_ch_mult", [1, 1, 2, 2, 4]),
    }
    for name, values in (("ch", channels), ("num_res_blocks", num_res_blocks), ("ch_mult", multipliers)):
        if values["encoder"] != values["decoder"]:
            raise ValueError(
                f"`config` gives `{name}` {values['encoder']} to the encoder and {values['decoder']} to the decoder,"
                " allowed for a convolutional tokenizer: the same for both."
            )

    if config.get("vq_mean", 0.0) != 0.0:
        raise ValueError(
            f"`config['vq_mean']` is {config['vq_mean']}, allowed: 0 for a convolutional tokenizer (`VQModel` has a"
            " `scaling_factor` only)."
        )

    num_levels = len(multipliers["encoder"])
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * (num_levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (num_levels - 1),
        block_out_channels=[channels["encoder"] * multiplier for multiplier in multipliers["encoder"]],
        layers_per_block=num_res_blocks["encoder"],
        latent_channels=config.get("z_channels", 256),
        vq_embed_dim=config.get("codebook_embed_dim", 8),
        num_vq_embeddings=config.get("codebook_size", 16384),
        sample_size=config.get("image_size", 256),
        scaling_factor=_latent_statistics(config)["scaling_factor"],
    )
    # attention projections are 1 x 1 convolutions officially, linear layers in diffusers
    projection = re.compile(r".*\.(q|k|v|proj_out)\.weight")
    state_dict = {
        key: tensor.flatten(1) if projection.fullmatch(key) and tensor.shape[2:] == (1, 1) else tensor
        for key, tensor in state_dict.items()
    }
    key_map = {_official_cnn_key(key): (key,) for key in model.state_dict()}
    load_official_state_dict(model, state_dict, key_map, IGNORED_KEYS)
    if config.get("codebook_l2_norm", True):
        with torch.no_grad():
            model.quantize.embedding.weight.copy_(F.normalize(model.quantize.embedding.weight, dim=-1))
    return model


def _official_cnn_key(key: str) -> str:
    """The official name of a key of `VQModel`."""
    for pattern, official in (
        (r"mid_block\.resnets\.0", "mid.0"),
        (r"mid_block\.attentions\.0", "mid.1"),
        (r"mid_block\.resnets\.1", "mid.2"),
        (r"(down|up)_blocks", "conv_blocks"),
        (r"resnets", "res"),
        (r"attentions", "attn"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"group_norm", "norm"),
        (r"to_([qkv])", r"\1"),
        (r"to_out\.0", "proj_out"),
    ):
        key = re.sub(rf"(?<=\.){pattern}(?=\.)", official, key)
    return key
