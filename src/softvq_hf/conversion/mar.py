"""Official MAR checkpoints (arXiv 2406.11838) -> [`MARTransformer1DModel`]."""

from collections.abc import Mapping
from typing import Any

import torch

from softvq_hf.conversion.config import check_official_config
from softvq_hf.conversion.state_dict import load_official_state_dict, strip_wrapper_prefixes
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel


# Widths, depths and heads by the name under which the official scripts build a model.
NAMED_SIZES = {
    name: {
        f"{part}_{size}": value
        for part in ("encoder", "decoder")
        for size, value in zip(("embed_dim", "depth", "num_heads"), sizes, strict=True)
    }
    for name, sizes in {"mar_base": (768, 12, 12), "mar_large": (1024, 16, 16), "mar_huge": (1280, 20, 16)}.items()
}
REQUIRED_CONFIG_KEYS = {
    "img_size": int,
    "vae_stride": int,
    "patch_size": int,
    "vae_embed_dim": int,
    "buffer_size": int,
    "diffloss_d": int,
    "diffloss_w": int,
}
# A config without a name holds the sizes itself. Where the others are missing, the official defaults count.
SIZE_CONFIG_KEYS = dict.fromkeys(NAMED_SIZES["mar_base"], int)
OPTIONAL_CONFIG_KEYS = {
    "model": str,
    "mlp_ratio": float,
    "class_num": int,
    "attn_dropout": float,
    "proj_dropout": float,
    "label_drop_prob": float,
}
DEFAULTS = {"mlp_ratio": 4.0, "class_num": 1000, "attn_dropout": 0.1, "proj_dropout": 0.1, "label_drop_prob": 0.1}
# These say nothing about the network: masking, loss and sampling.
IGNORED_CONFIG_KEYS = ("diffusion_batch_mul", "grad_checkpointing", "mask_ratio_min", "num_sampling_steps")


def convert_mar(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> MARTransformer1DModel:
    """
    Convert an official MAR, a generator of 2-D latents, to [`MARTransformer1DModel`].

    Args:
        state_dict (`Mapping`):
            Weights by their official names, or a training file, whose `model_ema` is taken, or its `model` where it
            has no average. `module.` and `_orig_mod.` are stripped.
        config (`Mapping[str, Any]`):
            The official config as a flat mapping: `img_size`, `vae_stride`, `patch_size`, `vae_embed_dim`,
            `buffer_size`, `diffloss_d` and `diffloss_w`, and either `model` ("mar_base", "mar_large" or "mar_huge") or
            `encoder_embed_dim`, `encoder_depth`, `encoder_num_heads` and the same three of the decoder.

    Returns:
        [`MARTransformer1DModel`]: The model in float32 and eval mode.

    Raises:
        ValueError: If a config key is missing or has an unsupported value, or keys of the weights are missing,
            unexpected or mis-shaped; the message lists all of them.
        TypeError: If a value of `state_dict` is not a tensor.
    """
    for name in ("model_ema", "model"):
        if isinstance(state_dict.get(name), Mapping):
            state_dict = state_dict[name]
            break
    if config.get("model") is not None:
        if config["model"] not in NAMED_SIZES:
            raise ValueError(f"`config['model']` is {config['model']!r}, allowed: {', '.join(NAMED_SIZES)}.")
        sizes = NAMED_SIZES[config["model"]]
        others = [f"`{name}` {config[name]}" for name in sizes if config.get(name, sizes[name]) != sizes[name]]
        if others:
            raise ValueError(
                f"`config['model']` is {config['model']!r}, allowed with {', '.join(others)}: no name, or the sizes of"
                f" that model, {sizes}."
            )
        config = sizes | dict(config)
    config = DEFAULTS | check_official_config(
        config, REQUIRED_CONFIG_KEYS | SIZE_CONFIG_KEYS, OPTIONAL_CONFIG_KEYS, IGNORED_CONFIG_KEYS
    )
    if config["img_size"] % (config["vae_stride"] * config["patch_size"]) != 0:
        raise ValueError(
            f"`config['img_size']` is {config['img_size']}, allowed: multiples of `vae_stride` * `patch_size` ="
            f" {config['vae_stride'] * config['patch_size']}."
        )

    sample_size = config["img_size"] // config["vae_stride"]
    model = MARTransformer1DModel(
        num_tokens=(sample_size // config["patch_size"]) ** 2,
        in_channels=config["vae_embed_dim"],
        buffer_size=config["buffer_size"],
        encoder_hidden_size=config["encoder_embed_dim"],
        encoder_num_layers=config["encoder_depth"],
        encoder_num_attention_heads=config["encoder_num_heads"],
        decoder_hidden_size=config["decoder_embed_dim"],
        decoder_num_layers=config["decoder_depth"],
        decoder_num_attention_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"],
        attention_dropout=config["attn_dropout"],
        dropout=config["proj_dropout"],
        denoiser_hidden_size=config["diffloss_w"],
        denoiser_num_layers=config["diffloss_d"],
        num_classes=config["class_num"],
        class_dropout_prob=config["label_drop_prob"],
        patch_size=config["patch_size"],
        sample_size=sample_size,
    )

    official = strip_wrapper_prefixes(state_dict)
    # The official table of classes has no row for the null class, whose vector stands by itself
    width = model.config.encoder_hidden_size
    for key, rows in {"class_emb.weight": model.config.num_classes, "fake_latent": 1}.items():
        if key in official and tuple(official[key].shape) != (rows, width):
            raise ValueError(
                f"`state_dict` has {key} of shape {tuple(official[key].shape)}, allowed: {(rows, width)}."
            )
    key_map = _key_map(model)
    if "fake_latent" not in official:
        key_map["fake_latent"] = ("class_embedder.weight",)  # is reported as missing, with all others
    null_class = official.pop("fake_latent", torch.zeros(1, width))
    if "class_emb.weight" in official:
        table = official["class_emb.weight"]
        official["class_emb.weight"] = torch.cat([table, null_class.to(table)])
    return load_official_state_dict(model, official, key_map)


def _key_map(model: MARTransformer1DModel) -> dict[str, tuple[str, ...]]:
    """For every official key the keys of the model which it holds, concatenated along the first axis."""
    modules = {
        "z_proj": ["proj_in"],
        "z_proj_ln": ["norm_in"],
        "encoder_norm": ["encoder_norm"],
        "decoder_embed": ["decoder_embedder"],
        "decoder_norm": ["decoder_norm"],
        "diffloss.net.time_embed.mlp.0": ["denoiser.timestep_embedder.linear_1"],
        "diffloss.net.time_embed.mlp.2": ["denoiser.timestep_embedder.linear_2"],
        "diffloss.net.cond_embed": ["denoiser.condition_embedder"],
        "diffloss.net.input_proj": ["denoiser.proj_in"],
        "diffloss.net.final_layer.adaLN_modulation.1": ["denoiser.modulation_out"],
        "diffloss.net.final_layer.linear": ["denoiser.proj_out"],
    }
    for part, num_layers in (
        ("encoder", model.config.encoder_num_layers),
        ("decoder", model.config.decoder_num_layers),
    ):
        for i in range(num_layers):
            block = f"{part}_blocks.{i}"  # official and ours
            modules[f"{block}.norm1"] = [f"{block}.norm1"]
            modules[f"{block}.norm2"] = [f"{block}.norm2"]
            modules[f"{block}.attn.qkv"] = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v"]
            modules[f"{block}.attn.proj"] = [f"{block}.attn.to_out.0"]
            modules[f"{block}.mlp.fc1"] = [f"{block}.ff.net.0.proj"]
            modules[f"{block}.mlp.fc2"] = [f"{block}.ff.net.2"]
    for i in range(model.config.denoiser_num_layers):
        official, ours = f"diffloss.net.res_blocks.{i}", f"denoiser.blocks.{i}"
        modules[f"{official}.in_ln"] = [f"{ours}.norm"]
        modules[f"{official}.mlp.0"] = [f"{ours}.linear_1"]
        modules[f"{official}.mlp.2"] = [f"{ours}.linear_2"]
        modules[f"{official}.adaLN_modulation.1"] = [f"{ours}.modulation"]

    key_map = {
        "class_emb.weight": ("class_embedder.weight",),
        "encoder_pos_embed_learned": ("encoder_pos_embed",),
        "mask_token": ("mask_token",),
        "decoder_pos_embed_learned": ("decoder_pos_embed",),
        "diffusion_pos_embed_learned": ("condition_pos_embed",),
    }
    for official, ours in modules.items():
        for parameter in ("weight", "bias"):
            key_map[f"{official}.{parameter}"] = tuple(f"{name}.{parameter}" for name in ours)
    return key_map
