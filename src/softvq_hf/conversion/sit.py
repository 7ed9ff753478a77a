"""Official SiT and DiT checkpoints -> [`DiTTransformer1DModel`].

The layout is that of SoftVQ-VAE (arXiv 2412.10958) and MAETok (arXiv 2502.03444), which REPA (arXiv 2410.06940) and
DiT (arXiv 2212.09748) share for 2-D latents. Flow matching and DDPM models differ in their config only.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from softvq_hf.conversion.config import check_official_config
from softvq_hf.conversion.state_dict import load_official_state_dict, strip_wrapper_prefixes
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel


REQUIRED_CONFIG_KEYS = {
    "input_size": int,
    "in_channels": int,
    "hidden_size": int,
    "depth": int,
    "num_heads": int,
    "mlp_ratio": float,
    "num_classes": int,
    "class_dropout_prob": float,
    "patch_size": int,
    "vae_1d": bool,
}
# `learn_sigma` is DiT's, and `qk_norm` is absent where it is off
OPTIONAL_CONFIG_KEYS = {"qk_norm": bool, "learn_sigma": bool}
# These say nothing about the network: training settings, attention kernels, constructor leftovers, hub metadata.
IGNORED_CONFIG_KEYS = (
    "decoder_hidden_size",
    "encoder_depth",
    "flash_attn",
    "fused_attn",
    "library_name",
    "license",
    "path_type",
    "pipeline_tag",
    "projector_dim",
    "repo_url",
    "tags",
    "use_cfg",
    "z_dims",
)


def convert_sit(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> DiTTransformer1DModel:
    """
    Convert an official SiT (flow matching, time in [0, 1] with 1 = noise) to [`DiTTransformer1DModel`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Weights by their official names. `module.` and `_orig_mod.` are stripped, REPA's `projectors.*` are
            dropped, and the `decoder_blocks.j` of old REPA checkpoints become `blocks.(j + 8)`.
        config (`Mapping[str, Any]`): The official config as a flat mapping.

    Returns:
        [`DiTTransformer1DModel`]: The model in float32 and eval mode, with `timestep_scale` 1e-3.

    Raises:
        ValueError: If a config key is missing or not convertible, if keys of the state dict are missing, unexpected
            or mis-shaped (all are listed), or if the stored position table is not the sine/cosine table.
    """
    if config.get("learn_sigma", False):
        raise ValueError(
            "`config['learn_sigma']` is True, allowed: False, because a SiT of this layout predicts a velocity only. "
            "The original SiT release, which has it, runs its time the other way round and cannot be converted; a DiT "
            "converts as system 'dit'."
        )
    return _convert(state_dict, config, learn_sigma=False, timestep_scale=1e-3)


def convert_dit(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> DiTTransformer1DModel:
    """
    Convert an official DiT (DDPM, integer timesteps 0..999) to [`DiTTransformer1DModel`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Weights by their official names, wrappers as in [`convert_sit`].
        config (`Mapping[str, Any]`):
            The official config as a flat mapping. With `learn_sigma` the model has `2 * in_channels` output channels.

    Returns:
        [`DiTTransformer1DModel`]: The model in float32 and eval mode, with `timestep_scale` 1.0.

    Raises:
        ValueError: As [`convert_sit`], and if `learn_sigma` is missing from the config.
    """
    if config.get("learn_sigma") is None:
        raise ValueError("`config` lacks learn_sigma: the number of output channels depends on it.")
    return _convert(state_dict, config, learn_sigma=config["learn_sigma"], timestep_scale=1.0)


def _convert(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], learn_sigma: bool, timestep_scale: float
) -> DiTTransformer1DModel:
    config = check_official_config(config, REQUIRED_CONFIG_KEYS, OPTIONAL_CONFIG_KEYS, IGNORED_CONFIG_KEYS)
    model = DiTTransformer1DModel(
        **_convert_config(config),
        out_channels=2 * config["in_channels"] if learn_sigma else None,
        timestep_scale=timestep_scale,
    )

    official = {}
    for key, tensor in strip_wrapper_prefixes(state_dict).items():
        key = re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + 8}.", key)
        if key in official:
            raise ValueError(f"`state_dict` holds {key!r} twice, once of them below `decoder_blocks`.")
        official[key] = tensor

    position_table = model.pos_embed.clone()
    load_official_state_dict(model, official, _key_map(model), ignored_keys=(r"projectors\..*",))

    # Rounding of an average over many steps (1.7e-4) and half precision (4e-3) move the stored table, which is the one
    # in use. The meta device has shapes, but no positions to compare.
    if not position_table.is_meta:
        difference = (model.pos_embed - position_table).abs().max().item()
        if not difference <= 1e-2:
            raise ValueError(
                f"`pos_embed` differs by {difference:.3g} from the sine/cosine table of this config, allowed: 0.01. "
                "The checkpoint was trained with other positions."
            )

    # The official final layer computes (shift, scale), that of diffusers (scale, shift).
    with torch.no_grad():
        for parameter in model.norm_out.linear.parameters():
            parameter.copy_(torch.cat(parameter.chunk(2)[::-1]))
    return model


def _convert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the backbone in the vocabulary of [`DiTTransformer1DModel`]."""
    if config["hidden_size"] % config["num_heads"] != 0:
        raise ValueError(
            f"`config['hidden_size']` is {config['hidden_size']}, allowed: multiples of `num_heads` = "
            f"{config['num_heads']}."
        )

    input_size, patch_size = config["input_size"], config["patch_size"]
    converted = {
        "num_tokens": input_size,
        "in_channels": config["in_channels"],
        "num_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "num_classes": config["num_classes"],
        "class_dropout_prob": config["class_dropout_prob"],
        "qk_norm": config.get("qk_norm", False),
    }
    if not config["vae_1d"]:
        return {
            **converted,
            "num_tokens": (input_size // patch_size) ** 2,
            "sample_size": input_size,
            "patch_size": patch_size,
        }
    if patch_size != 1:
        raise ValueError(f"`config['patch_size']` is {patch_size}, allowed: 1 for 1-D latents (`vae_1d` is True).")
    return converted


def _key_map(model: DiTTransformer1DModel) -> dict[str, tuple[str, ...]]:
    """For every official key the keys of the model which it holds, concatenated along the first axis."""
    modules = {
        "x_embedder.proj" if model.is_2d else "x_embedder": ["proj_in"],
        "t_embedder.mlp.0": ["timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["timestep_embedder.linear_2"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
        "final_layer.linear": ["proj_out"],
    }
    for i in range(model.config.num_layers):
        official, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        modules[f"{official}.attn.qkv"] = [f"{ours}.attn.to_q", f"{ours}.attn.to_k", f"{ours}.attn.to_v"]
        modules[f"{official}.attn.proj"] = [f"{ours}.attn.to_out.0"]
        modules[f"{official}.mlp.fc1"] = [f"{ours}.ff.net.0.proj"]
        modules[f"{official}.mlp.fc2"] = [f"{ours}.ff.net.2"]
        modules[f"{official}.adaLN_modulation.1"] = [f"{ours}.norm1.linear"]
        if model.config.qk_norm:
            modules[f"{official}.attn.q_norm"] = [f"{ours}.attn.norm_q"]
            modules[f"{official}.attn.k_norm"] = [f"{ours}.attn.norm_k"]

    key_map = {"pos_embed": ("pos_embed",), "y_embedder.embedding_table.weight": ("class_embedder.weight",)}
    for official, ours in modules.items():
        for parameter in ("weight", "bias"):
            key_map[f"{official}.{parameter}"] = tuple(f"{name}.{parameter}" for name in ours)
    return key_map
