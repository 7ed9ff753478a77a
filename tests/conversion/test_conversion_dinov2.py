"""The encoder starts from DINOv2: the same function of the image, at another patch size and resolution; and back."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from softvq_hf.conversion.dinov2 import (
    export_dinov2_encoder,
    load_dinov2,
    load_dinov2_encoder,
    resample_patch_embedding,
)
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ, resample_position_embedding


SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def backbone(registers: int = 0, **changes) -> Dinov2Model | Dinov2WithRegistersModel:
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE | changes, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**SIZE | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tokenizer(**changes) -> AutoencoderSoftVQ:
    config = {
        "sample_size": 32,
        "encoder_patch_size": 8,
        "decoder_patch_size": 8,
        "num_latent_tokens": 4,
        "num_codebooks": 1,
        "codebook_size": 8,
        "encoder_hidden_size": 24,
        "encoder_num_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_hidden_size": 24,
        "decoder_num_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    return AutoencoderSoftVQ(**config | changes).eval()


@torch.no_grad()
def features(model: AutoencoderSoftVQ, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the encoder computes without its latent tokens: prefix and patches, after the last norm."""
    encoder = model.encoder
    hidden_states = encoder.patch_embed(pixel_values).flatten(2).transpose(1, 2)
    grid_size = tuple(size // model.config.encoder_patch_size for size in pixel_values.shape[2:])
    hidden_states = encoder.positions(hidden_states, grid_size)[:, : -model.config.num_latent_tokens]
    for block in encoder.blocks:
        hidden_states = block(hidden_states)
    return encoder.norm(hidden_states)


# feed-forward width of SwiGLU: 2/3 of 96 is 64; of 120 it is 80
KINDS = pytest.mark.parametrize(
    ("registers", "dinov2_changes", "changes"),
    [
        (0, {}, {}),
        (4, {}, {}),
        (0, {"use_swiglu_ffn": True}, {"encoder_activation_fn": "swiglu"}),
        (4, {"use_swiglu_ffn": True, "mlp_ratio": 5}, {"encoder_activation_fn": "swiglu", "mlp_ratio": 5.0}),
    ],
    ids=["plain", "registers", "swiglu", "swiglu and registers"],
)


@KINDS
def test_encoder_computes_what_dinov2_computes(registers, dinov2_changes, changes):
    dinov2 = backbone(registers, **dinov2_changes)
    model = tokenizer(num_register_tokens=registers, **changes)
    load_dinov2_encoder(model, dinov2)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = dinov2(pixel_values).last_hidden_state
    torch.testing.assert_close(features(model, pixel_values), expected, atol=1e-5, rtol=1e-5)


# Resampling


@pytest.mark.parametrize(
    "case", ["dinov2_518_to_256", "smaller_grid", "larger_grid_and_registers", "oblong_grid", "smaller_patches"]
)
def test_resampling_gives_the_reference_numbers(case, golden):
    description, tensors = golden("dinov2_resampling")
    case_config = description["cases"][case]
    tensors = {key.removeprefix(f"{case}."): value for key, value in tensors.items() if key.startswith(f"{case}.")}
    size = {name: case_config[name] for name in ("image_size", "patch_size")} | {"hidden_size": 8}
    dinov2 = backbone(case_config["num_register_tokens"], **size)
    weights = {key.removeprefix("input."): value for key, value in tensors.items() if key.startswith("input.")}
    report = dinov2.load_state_dict(weights, strict=False)
    assert len(weights) >= 5 and not report.unexpected_keys
    assert not [key for key in report.missing_keys if key.startswith("embeddings.")]

    model = tokenizer(
        sample_size=case_config["sample_size"],
        encoder_patch_size=case_config["encoder_patch_size"],
        decoder_patch_size=case_config["encoder_patch_size"],
        num_register_tokens=case_config["num_register_tokens"],
        encoder_hidden_size=8,
    )
    load_dinov2_encoder(model, dinov2)
    encoder = model.encoder
    close = {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(encoder.patch_embed.weight.detach(), tensors["output.patch_embed"], **close)
    torch.testing.assert_close(encoder.positions.cls_token.detach(), tensors["output.cls_token"], **close)
    torch.testing.assert_close(
        encoder.positions.position_embedding.detach(), tensors["output.position_embedding"], **close
    )


def test_patch_projection_sees_resized_patches_alike():
    weight = torch.randn(5, 3, 14, 14)
    resized = resample_patch_embedding(weight, 16)
    patch = torch.randn(1, 3, 14, 14)
    bigger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    actual, expected = (bigger * resized).sum((1, 2, 3)), (patch * weight).sum((1, 2, 3))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(resample_patch_embedding(weight, 14), weight)


def test_positions_are_resampled():
    table = torch.randn(1, 37 * 37, 6)
    assert torch.equal(resample_position_embedding(table, (37, 37), (37, 37)), table)
    smooth = torch.linspace(-1, 1, 37)[None, :, None].expand(1, 37, 37).reshape(1, 37 * 37, 1)
    resampled = resample_position_embedding(smooth, (37, 37), (16, 12)).reshape(16, 12)
    # it was raster order before, with a value per row: there are 12 columns of equal values now
    assert (resampled.diff(dim=0) > 0).all() and resampled.diff(dim=1).abs().max() < 1e-6


def test_images_and_backbones_need_not_be_square():
    # the table of the backbone is 2 x 8, which is no square, and not to be taken for 4 x 4
    dinov2 = backbone(image_size=[16, 64])
    rows = torch.tensor([-1.0, 1.0]).repeat_interleave(8)
    with torch.no_grad():
        dinov2.embeddings.position_embeddings[0, 1:] = rows[:, None]
    model = tokenizer(sample_size=[32, 64], encoder_patch_size=16, decoder_patch_size=16)
    load_dinov2_encoder(model, dinov2)
    expected = torch.tensor([-1.0, 1.0]).repeat_interleave(4)[:, None].expand(8, 24)
    torch.testing.assert_close(model.encoder.positions.position_embedding[0, 1:].detach(), expected)
    assert torch.isfinite(model(torch.randn(1, 3, 32, 64)).sample).all()


# What does not fit


@pytest.mark.parametrize(
    ("changes", "registers", "dinov2_changes", "message"),
    [
        ({"encoder_num_layers": 3}, 0, {}, r"encoder_num_layers \(is 3, should be 2\)"),
        ({}, 4, {}, r"num_register_tokens \(is 0, should be 4\)"),
        ({"in_channels": 1}, 0, {}, r"in_channels \(is 1, should be 3\)"),
        ({}, 0, {"mlp_ratio": 2}, r"mlp_ratio \(is 4.0, should be 2.0\)"),
        ({}, 0, {"use_swiglu_ffn": True}, r"encoder_activation_fn \(is 'gelu', should be 'swiglu'\)"),
        ({}, 0, {"hidden_act": "relu"}, r"hidden_act of the backbone \(is 'relu', should be 'gelu'\)"),
        ({}, 0, {"qkv_bias": False}, "qkv_bias of the backbone"),
        ({}, 0, {"layer_norm_eps": 1e-5}, "layer_norm_eps of the backbone"),
        ({"encoder_num_layers": 3, "mlp_ratio": 3.0}, 0, {}, r"encoder_num_layers \(.*\), mlp_ratio \("),
    ],
)
def test_backbone_of_another_kind_is_refused(changes, registers, dinov2_changes, message):
    model = tokenizer(**changes)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_dinov2_encoder(model, backbone(registers, **dinov2_changes))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.state_dict().items())


def test_rounded_swiglu_width_names_the_ratio_that_fits():
    # 20 * 4 * 2/3 = 53, which DINOv2 rounds up to 56
    sizes = {"encoder_hidden_size": 20, "encoder_activation_fn": "swiglu"}
    dinov2 = backbone(hidden_size=20, use_swiglu_ffn=True)
    with pytest.raises(ValueError, match=r"mlp_ratio \(is 4.0, should be 4\.\d+\)") as error:
        load_dinov2_encoder(tokenizer(**sizes), dinov2)
    ratio = float(str(error.value).split("should be ")[1].split(")")[0])
    model = tokenizer(**sizes, mlp_ratio=ratio, decoder_hidden_size=20)
    load_dinov2_encoder(model, dinov2)
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = dinov2(pixel_values).last_hidden_state
    torch.testing.assert_close(features(model, pixel_values), expected, atol=1e-5, rtol=1e-5)


# Loading


def test_load_dinov2(tmp_path):
    for name, registers in (("plain", 0), ("registers", 4)):
        saved = backbone(registers)
        saved.half().save_pretrained(tmp_path / name)
        loaded = load_dinov2(str(tmp_path / name))
        assert type(loaded) is type(saved) and not loaded.training
        assert all(
            parameter.dtype == torch.float32 and torch.equal(parameter, other.float())
            for parameter, other in zip(loaded.parameters(), saved.parameters(), strict=True)
        )

    classifier = Dinov2ForImageClassification(Dinov2Config(**SIZE))
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = load_dinov2(str(tmp_path / "classifier"))
    assert type(loaded) is Dinov2Model
    assert torch.equal(loaded.layernorm.weight, classifier.dinov2.layernorm.weight)
    with pytest.raises(ValueError, match="does not fit '.*classifier'"):
        load_dinov2_encoder(tokenizer(encoder_num_layers=3), loaded)


def test_load_dinov2_refuses_what_is_none(tmp_path, monkeypatch):
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"vit' with a model of type 'vit', allowed: .*'dinov2_with_registers'"):
        load_dinov2(str(tmp_path / "vit"))

    incomplete = backbone()
    state_dict = {key: value for key, value in incomplete.state_dict().items() if "layernorm" not in key}
    incomplete.save_pretrained(tmp_path / "incomplete", state_dict=state_dict)
    with pytest.raises(ValueError, match="whose weights lack layernorm.bias, layernorm.weight"):
        load_dinov2(str(tmp_path / "incomplete"))

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "empty"), "facebook/a-dinov2-that-is-not-in-the-cache"):
        with pytest.raises(ValueError, match=f"`name_or_path` is '{name}', which could not be read, allowed: "):
            load_dinov2(name)


# And back


@KINDS
def test_exported_encoder_is_dinov2(registers, dinov2_changes, changes, tmp_path):
    model = tokenizer(num_register_tokens=registers, **changes)
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dinov2 = export_dinov2_encoder(model)
    assert type(dinov2) is (Dinov2WithRegistersModel if registers else Dinov2Model) and not dinov2.training
    assert (dinov2.config.image_size, dinov2.config.patch_size) == (32, 8)
    dinov2.save_pretrained(tmp_path)
    dinov2 = load_dinov2(str(tmp_path))
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        actual = dinov2(pixel_values).last_hidden_state
    torch.testing.assert_close(actual, features(model, pixel_values), atol=1e-5, rtol=1e-5)

    again = tokenizer(num_register_tokens=registers, **changes)
    load_dinov2_encoder(again, dinov2)
    latent_parameters = {"positions.latent_tokens", "positions.latent_position_embedding"}
    for name, parameter in again.encoder.state_dict().items():
        assert (name in latent_parameters) != torch.equal(parameter, model.encoder.state_dict()[name]), name


@pytest.mark.parametrize("registers", [0, 4])
def test_backbone_survives_the_way_there_and_back(registers):
    # patches 14 -> 16 -> 14; the grid of 4 x 4 becomes 6 x 6 and 4 x 4 again
    dinov2 = backbone(registers, image_size=56, patch_size=14)
    table = dinov2.embeddings.position_embeddings
    with torch.no_grad():
        # a smooth table, as trained ones are
        table[0, 1:] = F.interpolate(torch.randn(1, 24, 2, 2), 4, mode="bicubic", antialias=True)[0].flatten(1).T
    model = tokenizer(sample_size=96, encoder_patch_size=16, decoder_patch_size=16, num_register_tokens=registers)
    load_dinov2_encoder(model, dinov2)
    back = export_dinov2_encoder(model, patch_size=14, image_size=56)
    assert (back.config.image_size, back.config.patch_size) == (56, 14)

    weight, kernel = (m.embeddings.patch_embeddings.projection.weight for m in (dinov2, back))
    torch.testing.assert_close(kernel, weight, atol=1e-6, rtol=1e-5)
    # measured: 1.6% of the norm of the smooth table, and 0.5% of the norm of the features
    table_back = back.embeddings.position_embeddings
    assert (table_back - table)[:, 1:].norm() < 0.03 * table[:, 1:].norm()
    pixel_values = torch.rand(2, 3, 56, 56) * 2 - 1
    with torch.no_grad():
        expected, actual = dinov2(pixel_values).last_hidden_state, back(pixel_values).last_hidden_state
    assert (actual - expected).norm() < 0.01 * expected.norm()


def test_smaller_patches_are_seen_as_the_encoder_sees_them_enlarged():
    model = tokenizer(sample_size=64, encoder_patch_size=16, decoder_patch_size=16)
    patch = torch.randn(1, 3, 14, 14)
    larger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    projection = export_dinov2_encoder(model, patch_size=14).embeddings.patch_embeddings.projection
    torch.testing.assert_close(projection(patch), model.encoder.patch_embed(larger))

    larger = export_dinov2_encoder(model, patch_size=18).embeddings.patch_embeddings.projection.weight
    assert torch.equal(larger, resample_patch_embedding(model.encoder.patch_embed.weight, 18))


def test_what_dinov2_cannot_hold_is_not_exported():
    for changes, message in (
        ({"sample_size": [32, 64]}, "a grid of 4 x 8 patches, allowed: square grids"),
        ({"mlp_ratio": 2.5}, "`mlp_ratio` is 2.5, a feed-forward width of 60, allowed: whole numbers"),
        ({"position_embedding_type": "rope_mixed"}, "`position_embedding_type` is 'rope_mixed', allowed: 'absolute'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_dinov2_encoder(tokenizer(**changes))
    with pytest.raises(ValueError, match="`image_size` is 50, allowed: multiples of `patch_size` 8"):
        export_dinov2_encoder(tokenizer(), image_size=50)
