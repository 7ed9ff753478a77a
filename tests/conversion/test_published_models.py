"""The published models at their real sizes, on the meta device: keys, shapes, parameter counts, and the documents."""

import math
import re
from pathlib import Path

import pytest
import torch

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.conversion.published_models import (
    load_published_models,
    published_models_table,
    update_published_models,
)


ROOT = Path(__file__).parents[2]
MODELS = {model.name: model for model in load_published_models()}
TOKENIZERS = [model for model in MODELS.values() if model.kind == "tokenizer"]
BY_NAME = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))

# Millions of parameters as published: encoder, decoder, codebook, all.
PUBLISHED_MILLIONS = {
    "SoftVQ-L-64": (303.54, 304.27, 1.05, 608.92),
    "SoftVQ-BL-64": (85.96, 304.27, 1.05, 391.33),
    "SoftVQ-B-64": (85.96, 86.50, 1.05, 173.56),
    "SoftVQ-L-32": (303.48, 304.23, 2.10, 609.94),
    "SoftVQ-BL-32": (85.91, 304.23, 2.10, 392.36),
    "SoftVQ-B-32": (85.91, 86.48, 2.10, 174.59),
    "SoftVQ-BL-64-512": (86.55, 305.05, 1.05, 392.71),
    "SoftVQ-L-32-512": (304.26, 305.02, 2.10, 611.51),
    "MAETok-B-128": (86.07, 87.77, 0.0, 173.89),
    "MAETok-B-128-512": (86.66, 88.36, 0.0, 175.07),
}
# Tokens, channels, and parameters to the unit.
GENERATORS = {
    ("sit", 64, 32): 674_926_880,
    ("sit", 32, 64): 674_963_776,
    ("sit", 128, 32): 675_000_608,
    ("dit", 64, 32): 674_963_776,
    ("dit", 32, 64): 675_037_568,
}
BACKBONES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}
BUFFERS = r"quantize\.codebook_used|(encoder|decoder)\.freqs_t_[xy]"
UNUSED = (
    r"decoder\.model\.patch_embed\.proj\.(weight|bias)"  # and the decoder's position table beside rotary positions
)


def tokenizer_layout(config: dict, decoder_patch_embed: bool = True) -> dict[str, tuple[int, ...]]:
    """
    Keys and shapes of an official SoftVQ or MAETok tokenizer, buffers included. Recent files carry the patch embedding
    of the decoder, old ones do not.
    """
    tokens, channels = config["num_latent_tokens"], config["codebook_embed_dim"]
    rope, widths, layout = config.get("use_rope", False), {}, {}

    def linear(key: str, rows: int, columns: int) -> None:
        layout[f"{key}.weight"], layout[f"{key}.bias"] = (rows, columns), (rows,)

    for side in ("encoder", "decoder"):
        name = config[f"{side}_model"]
        width, depth = BACKBONES[name.split("_")[1]]
        if override := config.get(f"{side}_override"):
            width, depth = override["embed_dim"], override["depth"]
        widths[side] = width
        registers, movq = "_reg4_" in name, "_movq" in name
        patch = config.get(f"{side[:3]}_patch_size", 16)
        num_patches = (config["image_size"] // patch) ** 2

        layout[f"{side}.latent_pos_embed"] = (1, tokens, width)
        if side == "encoder":
            layout["encoder.latent_tokens"] = (1, tokens, width)
        if side == "decoder" or config.get("enc_token_drop", 0.0) > 0:
            layout[f"{side}.mask_token"] = (1, 1, width)
        if rope:
            layout[f"{side}.freqs"] = (2, depth, width // 2)
            layout[f"{side}.freqs_t_x"] = layout[f"{side}.freqs_t_y"] = (num_patches,)

        if side == "encoder" or config.get("dec_cls_token", True):
            layout[f"{side}.model.cls_token"] = (1, 1, width)
        if registers:
            layout[f"{side}.model.reg_token"] = (1, 4, width)
        layout[f"{side}.model.pos_embed"] = (1, num_patches + (not registers), width)
        if side == "encoder" or decoder_patch_embed:
            layout[f"{side}.model.patch_embed.proj.weight"] = (width, 3, patch, patch)
            layout[f"{side}.model.patch_embed.proj.bias"] = (width,)
        for i in range(depth):
            block = f"{side}.model.blocks.{i}"
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            gated = "_giant_" in name
            linear(f"{block}.mlp.fc1", 8192 if gated else 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4096 if gated else 4 * width)
            if movq:
                linear(f"{block}.adaLN_modulation.1", 4 * width, channels)
                continue
            for j in (1, 2):
                layout[f"{block}.norm{j}.weight"] = layout[f"{block}.norm{j}.bias"] = (width,)
                layout[f"{block}.ls{j}.gamma"] = (width,)
        if movq:
            linear(f"{side}.model.norm.adaLN_modulation.1", 2 * width, channels)
        else:
            layout[f"{side}.model.norm.weight"] = layout[f"{side}.model.norm.bias"] = (width,)
        if side == "decoder":
            linear("decoder.to_pixel.model", 3 * patch**2, width)

    linear("quant_conv", channels, widths["encoder"])
    linear("post_quant_conv", widths["decoder"], channels)
    if "num_codebooks" in config:
        layout["quantize.embedding"] = (config["num_codebooks"], config["codebook_size"], channels)
        layout["quantize.codebook_used"] = (config["num_codebooks"], 65536)
    return layout


def generator_layout(config: dict) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an official SiT or DiT, 1-D or 2-D."""
    width, channels, patch = config["hidden_size"], config["in_channels"], config["patch_size"]
    out_channels = 2 * channels if config.get("learn_sigma", False) else channels
    layout = {"y_embedder.embedding_table.weight": (config["num_classes"] + 1, width)}

    def linear(key: str, rows: int, columns: int) -> None:
        layout[f"{key}.weight"], layout[f"{key}.bias"] = (rows, columns), (rows,)

    if config["vae_1d"]:
        layout["pos_embed"] = (1, config["input_size"], width)
        linear("x_embedder", width, channels)
    else:
        layout["pos_embed"] = (1, (config["input_size"] // patch) ** 2, width)
        layout["x_embedder.proj.weight"] = (width, channels, patch, patch)
        layout["x_embedder.proj.bias"] = (width,)
    linear("t_embedder.mlp.0", width, 256)
    linear("t_embedder.mlp.2", width, width)
    for i in range(config["depth"]):
        linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        linear(f"blocks.{i}.attn.proj", width, width)
        linear(f"blocks.{i}.mlp.fc1", 4 * width, width)
        linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
        if config.get("qk_norm", False):
            for norm in ("q_norm", "k_norm"):
                layout[f"blocks.{i}.attn.{norm}.weight"] = (width // config["num_heads"],)
                layout[f"blocks.{i}.attn.{norm}.bias"] = (width // config["num_heads"],)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    linear("final_layer.linear", patch**2 * out_channels, width)
    return layout


def layout_of(model) -> dict[str, tuple[int, ...]]:
    return tokenizer_layout(model.config) if model.kind == "tokenizer" else generator_layout(model.config)


def count(layout: dict[str, tuple[int, ...]], pattern: str = ".*", but: str = BUFFERS) -> int:
    return sum(math.prod(layout[key]) for key in layout if re.fullmatch(pattern, key) and not re.fullmatch(but, key))


def convert(system: str, layout: dict[str, tuple[int, ...]], config: dict):
    """Convert a checkpoint that has shapes but no values."""
    with torch.device("meta"):
        return convert_checkpoint(system, {key: torch.empty(shape) for key, shape in layout.items()}, config)


# The layouts above


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("softvq_tokenizer", ""),
        ("softvq_tokenizer_ae", ""),
        ("maetok", ""),
        ("sit", ""),
        ("sit", "_2d"),
        ("dit", ""),
        ("dit", "_2d"),
    ],
)
def test_layouts_are_those_of_the_official_implementation(golden, name, suffix):
    description, tensors = golden(name)
    prefix = f"weights{suffix}."
    official = {
        key.removeprefix(prefix): tuple(value.shape) for key, value in tensors.items() if key.startswith(prefix)
    }
    config = description[f"config{suffix}"]
    if name in ("sit", "dit"):
        assert generator_layout(config) == official
    else:
        config |= {side: description[side] for side in ("encoder_override", "decoder_override")}
        assert tokenizer_layout(config) == official


def test_tensors_of_a_published_file():
    config = MODELS["SoftVQ-B-64"].config
    assert len(tokenizer_layout(config)) == 360
    assert len(tokenizer_layout(config, decoder_patch_embed=False)) == 358


# The table


def test_table_is_complete():
    assert len(TOKENIZERS) == 10 and len(MODELS) == 22 == len({model.repo_id for model in MODELS.values()})
    assert set(PUBLISHED_MILLIONS) == {model.name for model in TOKENIZERS}
    tokenizers = {model.repo_id: model for model in TOKENIZERS}
    for model in MODELS.values():
        organisation, repository = model.repo_id.split("/")
        assert organisation == ("MAETok" if "MAETok" in model.name else "SoftVQVAE")
        assert set(model.sources) == {"figures", "paper"}
        assert all(source.startswith("https://") for source in model.sources.values())
        if model.kind == "tokenizer":
            assert model.name.lower() == repository and model.system == "softvq"
            assert model.config["image_size"] == model.resolution
            assert set(model.published) == {"rfid"}
            assert model.latent_shape[0] == int(model.name.split("-")[2])
            assert ("vq_mean" in model.config) == ("vq_std" in model.config) == ("SoftVQ" in model.name)
        else:
            tokenizer = tokenizers[model.tokenizer]
            assert repository == f"{model.system}-xl_{tokenizer.repo_id.split('/')[1]}"
            assert (model.resolution, model.latent_shape) == (tokenizer.resolution, tokenizer.latent_shape)
            assert set(model.published) == {"gfid", "gfid_guided"}
            assert model.published["gfid"] > model.published["gfid_guided"] > 1


@pytest.mark.parametrize("model", TOKENIZERS, ids=lambda model: model.name)
def test_tokenizer_counts_are_the_published_ones(model):
    layout = tokenizer_layout(model.config)
    assert model.num_encoder_parameters == count(layout, r"encoder\..*")
    assert model.num_decoder_parameters == count(layout, r"decoder\..*")
    assert model.num_parameters == count(layout)
    parts = (model.num_encoder_parameters, model.num_decoder_parameters, count(layout, r"quantize\..*"), count(layout))
    assert tuple(round(part / 1e6, 2) for part in parts) == PUBLISHED_MILLIONS[model.name]


# Conversion


@BY_NAME
def test_every_published_model_converts_at_its_real_size(model):
    layout = layout_of(model)
    converted = convert(model.system, layout, model.config)
    assert {parameter.device.type for parameter in converted.parameters()} == {"meta"}
    assert not converted.training and converted.dtype == torch.float32
    assert count(layout) == model.num_parameters
    assert converted.num_parameters() == model.num_parameters - model.num_unused_parameters

    config = converted.config
    if model.kind == "generator":
        assert model.num_parameters == GENERATORS[model.system, *model.latent_shape]
        assert (config.num_tokens, config.in_channels) == model.latent_shape
        assert converted.out_channels == (2 if model.system == "dit" else 1) * config.in_channels
        assert config.timestep_scale == (1.0 if model.system == "dit" else 1e-3)
        return

    unused = UNUSED + (r"|decoder\.model\.pos_embed" if model.config.get("use_rope") else "")
    assert model.num_unused_parameters == count(layout, unused)
    encoder = sum(parameter.numel() for parameter in converted.encoder.parameters())
    decoder = sum(parameter.numel() for parameter in converted.decoder.parameters())
    assert encoder == model.num_encoder_parameters
    assert decoder == model.num_decoder_parameters - model.num_unused_parameters
    assert (config.num_latent_tokens, config.latent_channels) == model.latent_shape
    assert config.sample_size == model.resolution
    if "MAETok" in model.name:
        assert (config.quantizer, config.decoder_type, config.decoder_cls_token) == ("none", "movq", False)
        assert (config.position_embedding_type, config.encoder_mask_token) == ("rope_mixed", True)
        assert (config.scaling_factor, config.shift_factor) == (1.0, 0.0)
    else:
        assert (config.quantizer, config.decoder_type, config.decoder_cls_token) == ("softvq", "vit", True)
        assert (config.num_codebooks, config.codebook_size, config.tau) == (4, 8192, 0.07)
        assert config.position_embedding_type == "absolute"
        assert config.scaling_factor == pytest.approx(1 / model.config["vq_std"])
        assert config.shift_factor == model.config["vq_mean"]


@BY_NAME
def test_every_key_at_fault_is_listed_at_the_real_size(model):
    layout = layout_of(model)
    first = "encoder.model." if model.kind == "tokenizer" else ""
    last = "decoder.model." if model.kind == "tokenizer" else ""
    *_, depth = (int(match[1]) for key in layout if (match := re.match(rf"{last}blocks\.(\d+)\.", key)))
    del layout[f"{last}blocks.{depth}.mlp.fc2.bias"]
    layout[f"{last}blocks.{depth + 1}.mlp.fc2.bias"] = (7,)
    rows, columns = layout[f"{first}blocks.0.attn.qkv.weight"]
    layout[f"{first}blocks.0.attn.qkv.weight"] = (rows, columns + 1)
    with pytest.raises(ValueError) as error:
        convert(model.system, layout, model.config)
    for text in (
        f"1 missing: {last}blocks.{depth}.mlp.fc2.bias;",
        f"1 unexpected: {last}blocks.{depth + 1}.mlp.fc2.bias;",
        f"1 mis-shaped: {first}blocks.0.attn.qkv.weight (is ({rows}, {columns + 1}), should be ({rows}, {columns})).",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize("model", TOKENIZERS, ids=lambda model: model.name)
def test_old_files_without_the_unused_patch_embedding_convert(model):
    layout = tokenizer_layout(model.config, decoder_patch_embed=False)
    converted = convert("softvq", layout, model.config)
    assert converted.num_parameters() == model.num_parameters - model.num_unused_parameters


@pytest.mark.parametrize(
    ("sides", "total"),
    [(("base", "large"), 392_947_264), (("large", "base"), 392_955_200), (("large", "large"), 610_725_696)],
)
def test_sizes_come_from_the_config_and_not_from_the_name(sides, total):
    config = dict(MODELS["SoftVQ-L-32-512"].config)
    for side, size in zip(("encoder", "decoder"), sides, strict=True):
        config[f"{side}_model"] = f"vit_{size}_patch14_dinov2.lvd142m"
    assert convert("softvq", tokenizer_layout(config), config).num_parameters() == total


@pytest.mark.parametrize("size", BACKBONES)
@pytest.mark.parametrize("registers", ["", "reg4_"])
def test_every_backbone_converts(size, registers):
    name = f"vit_{size}_patch14_{registers}dinov2.lvd142m"
    config = MODELS["SoftVQ-B-64"].config | {"encoder_model": name, "decoder_model": name}
    layout = tokenizer_layout(config)
    converted = convert("softvq", layout, config)
    assert converted.num_parameters() == count(layout) - count(layout, UNUSED)
    assert converted.config.num_register_tokens == (4 if registers else 0)


def test_giant_backbone_is_gated():
    name = "vit_giant_patch14_dinov2.lvd142m"
    config = MODELS["SoftVQ-B-64"].config | {"encoder_model": name}
    converted = convert("softvq", tokenizer_layout(config), config)
    assert converted.encoder.blocks[39].ff.linear_1.weight.shape == (8192, 1536)
    assert converted.encoder.blocks[39].ff.linear_2.weight.shape == (1536, 4096)
    assert converted.decoder.blocks[11].ff.linear_1.weight.shape == (3072, 768)
    with pytest.raises(ValueError, match=r"mis-shaped: .*encoder\.model\.blocks\.0\.mlp\.fc1\.weight"):
        plain = {"encoder.model.blocks.0.mlp.fc1.weight": (6144, 1536)}
        convert("softvq", tokenizer_layout(config) | plain, config)


@pytest.mark.parametrize("size", ["small", "base"])
def test_movq_decoder_without_mask_token(size):
    config = MODELS["MAETok-B-128"].config | {"decoder_model": f"vit_{size}_patch14_dinov2_movqv2"}
    for key in ("enc_token_drop", "enc_token_drop_max"):
        del config[key]
    layout = tokenizer_layout(config)
    assert "encoder.mask_token" not in layout
    converted = convert("softvq", layout, config)
    assert not converted.config.encoder_mask_token
    assert converted.num_parameters() == count(layout) - count(layout, UNUSED + r"|decoder\.model\.pos_embed")


@pytest.mark.parametrize(
    ("system", "change", "total"),
    [
        pytest.param("sit", {}, 674_926_880, id="SiT-XL/1"),
        pytest.param("dit", {}, 674_963_776, id="DiT-XL/1"),
        pytest.param("sit", {"depth": 24, "hidden_size": 1024}, 457_922_592, id="SiT-L/1"),
        pytest.param("dit", {"depth": 24, "hidden_size": 1024}, 457_955_392, id="DiT-L/1"),
        pytest.param("sit", {"depth": 12, "hidden_size": 768, "num_heads": 12}, 130_377_248, id="SiT-B/1"),
        pytest.param("dit", {"depth": 16, "hidden_size": 1024}, 306_837_568, id="DiT-SL/1"),
        pytest.param(
            "sit", {"vae_1d": False, "input_size": 32, "in_channels": 4, "patch_size": 2}, 675_111_184, id="SiT-XL/2"
        ),
        pytest.param(
            "dit", {"vae_1d": False, "input_size": 32, "in_channels": 4, "patch_size": 2}, 675_129_632, id="DiT-XL/2"
        ),
    ],
)
def test_generator_sizes(system, change, total):
    name = {"sit": "SiT-XL on SoftVQ-L-64", "dit": "DiT-XL on SoftVQ-L-64"}[system]
    config = MODELS[name].config | change
    layout = generator_layout(config)
    assert count(layout) == total == convert(system, layout, config).num_parameters()


# The documents


@pytest.mark.parametrize(("document", "kind"), [("README.md", "tokenizer"), ("docs/models.md", None)])
def test_documents_hold_the_table(document, kind):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert (
        f"\n\n{published_models_table(kind)}\n\n<!-- published " in text and update_published_models(text) == text
    ), f"{document} is not up to date. Run: python -m softvq_hf.conversion.published_models {document}"


def test_update_of_a_document():
    text = "Before.\n\n<!-- published {0}: start -->\n\nold\n\n<!-- published {0}: end -->\n\nAfter.\n"
    for name, kind in (("models", None), ("tokenizers", "tokenizer")):
        updated = update_published_models(text.format(name))
        assert updated == text.format(name).replace("old", published_models_table(kind))
        assert update_published_models(updated) == updated
    assert update_published_models(text.format("papers")) == text.format("papers")


def test_table_shows_every_model():
    table = published_models_table()
    for model in MODELS.values():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {model.name} ")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:4] == [
            f"`{model.repo_id}`",
            str(model.resolution),
            f"{model.latent_shape[0]} × {model.latent_shape[1]}",
        ]
        assert f"{model.num_parameters / 1e6:.2f}M" in cells[4]
        assert {f"{figure:.2f}" for figure in model.published.values()} <= set(cells[5:])
    assert "| 0.88 | 5.98        | 1.78   |" in table
    with pytest.raises(ValueError, match="`kind` is 'vae'"):
        published_models_table("vae")
