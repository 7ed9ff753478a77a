"""DINO discriminator: the official logits, what is trained and saved, how images reach 224 pixels, the backbone."""

import re

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

from softvq_hf.losses.discriminator_dino import DINODiscriminator
from softvq_hf.losses.discriminators import build_discriminator


BACKBONE_NAMES = [
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("blocks.", "layers."),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.o_proj"),
    ("norm.", "layernorm."),
]
HEAD_NAMES = {"0.0": "conv_in", "0.1": "norm_in", "1.fn.0": "conv_mid", "1.fn.1": "norm_mid", "2": "conv_out"}
SPECTRAL_NAMES = {"weight_orig": "original", "weight_u": "0._u", "weight_v": "0._v"}


def tiny_backbone(**changes):
    config = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96}
    return ViTModel(ViTConfig(**{**config, **changes}), add_pooling_layer=False)


def official_backbone(tensors):
    prefix, state_dict = "weights.dino_backbone.", {}
    for name, value in tensors.items():
        if not name.startswith(prefix) or name.endswith(("x_scale", "x_shift")):
            continue
        name = name.removeprefix(prefix)
        for official, ours in BACKBONE_NAMES:
            name = name.replace(official, ours)
        if "attn.qkv" in name:
            for part, rows in zip(("q", "k", "v"), value.chunk(3), strict=True):
                state_dict[name.replace("attn.qkv", f"attention.{part}_proj")] = rows.clone()
        else:
            state_dict[name] = value
    backbone = tiny_backbone()
    backbone.load_state_dict(state_dict)
    return backbone


def official_heads(tensors):
    prefix, state_dict = "weights.dino.heads.", {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            head, layer, parameter = re.fullmatch(
                r"(\d)\.(0\.0|0\.1|1\.fn\.0|1\.fn\.1|2)\.(\w+)", name[len(prefix) :]
            ).groups()
            if parameter in SPECTRAL_NAMES:
                parameter = f"parametrizations.weight.{SPECTRAL_NAMES[parameter]}"
            state_dict[f"heads.{head}.{HEAD_NAMES[layer]}.{parameter}"] = value
    return state_dict


@pytest.fixture
def official(golden):
    description, tensors = golden("softvq_discriminators")
    config = {"depths": description["config"]["key_depths"], "kernel_size": description["config"]["ks"]}
    discriminator = build_discriminator("dino", backbone=official_backbone(tensors), **config)
    discriminator.load_state_dict(official_heads(tensors))
    return discriminator, tensors


@pytest.fixture
def discriminator():
    return DINODiscriminator(tiny_backbone(), depths=(3,))


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


def test_official_logits(official):
    discriminator, tensors = official
    with torch.no_grad():
        assert_close(discriminator.eval()(tensors["input.image"]), tensors["output.dino_eval_logits"])


def test_official_logits_of_large_images(official):
    discriminator, tensors = official
    row, column = torch.arange(240, dtype=torch.float64)[:, None], torch.arange(240, dtype=torch.float64)
    channel = torch.arange(3, dtype=torch.float64)[:, None, None]
    image = (torch.sin(0.05 * (row + 1) * (channel + 1)) * torch.cos(0.03 * column))[None].float()
    with torch.no_grad():
        assert_close(discriminator.eval()(image), tensors["output.dino_eval_logits_area"])


def test_official_training_pass(official):
    discriminator, tensors = official
    logits = discriminator.train()(tensors["input.image"])
    assert_close(logits.detach(), tensors["output.dino_train_logits"])
    vector = discriminator.heads[0].conv_in.parametrizations.weight[0]._u
    assert_close(vector, tensors["output.dino_train_head0_weight_u"])


def test_published_size():
    with torch.device("meta"):
        backbone = ViTModel(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536))
        discriminator = DINODiscriminator(backbone)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 7_386_245
    assert len(discriminator.heads) == 5


def test_only_the_heads_are_trained_and_saved(discriminator):
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    before = {key: value.clone() for key, value in discriminator.backbone.state_dict().items()}
    discriminator.train()(images).sum().backward()
    assert not discriminator.backbone.training
    assert all(parameter.grad is None for parameter in discriminator.backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in discriminator.backbone.state_dict().items())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    assert images.grad.abs().sum() > 0


def test_backbone_differs_from_its_configuration_as_in_the_official_code():
    backbone = tiny_backbone(hidden_act="gelu", layer_norm_eps=1e-12)
    torch.nn.init.normal_(backbone.layers[1].attention.k_proj.bias)
    discriminator = DINODiscriminator(backbone, depths=(3,))
    layer = discriminator.backbone.layers[1]
    hidden_states = torch.randn(5)
    torch.testing.assert_close(layer.mlp.activation_fn(hidden_states), F.gelu(hidden_states, approximate="tanh"))
    assert layer.layernorm_before.eps == layer.layernorm_after.eps == 1e-6
    assert layer.attention.k_proj.bias.abs().sum() == 0


def test_crops_of_large_images_follow_the_generator(discriminator):
    images = torch.rand(2, 3, 230, 300)

    def brought_to_size(seed):
        return discriminator.crop_or_resize(images, torch.Generator().manual_seed(seed))

    resized = F.interpolate(images, size=(224, 224), mode="area")
    corners = images.unfold(2, 224, 1).unfold(3, 224, 1)[0, 0, ..., 0, 0]  # value of every possible top left pixel
    crops = 0
    for seed in range(40):
        result = brought_to_size(seed)
        assert torch.equal(result, brought_to_size(seed))
        if torch.equal(result, resized):
            continue
        crops += 1
        (top, left), *_ = (corners == result[0, 0, 0, 0]).nonzero().tolist()
        assert torch.equal(result, images[:, :, top : top + 224, left : left + 224])
    assert 10 <= crops <= 30

    discriminator.eval()
    assert all(torch.equal(brought_to_size(seed), resized) for seed in range(8))
    discriminator.train()
    narrow = torch.rand(1, 3, 300, 224)  # not both sides are larger
    for seed in range(8):
        result = discriminator.crop_or_resize(narrow, torch.Generator().manual_seed(seed))
        assert torch.equal(result, F.interpolate(narrow, size=(224, 224), mode="area"))
    low = torch.rand(1, 3, 100, 300)
    assert torch.equal(discriminator.crop_or_resize(low), F.interpolate(low, size=(224, 224), mode="bicubic"))


def test_float32_under_autocast(discriminator):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    discriminator.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminator(images.bfloat16())
    assert logits.dtype == torch.float32
    assert torch.equal(logits, discriminator(images.bfloat16().float()))


def test_backbone_from_a_folder(tmp_path):
    backbone = tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    config = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96}
    classifier = ViTForImageClassification(ViTConfig(**config))
    classifier.vit.load_state_dict(backbone.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    images = torch.rand(1, 3, 32, 32)
    given = DINODiscriminator(backbone, depths=(3,)).eval()
    for name in ("backbone", "classifier"):
        loaded = DINODiscriminator(tmp_path / name, depths=(3,)).eval()
        loaded.load_state_dict(given.state_dict())
        assert torch.equal(loaded(images), given(images))


def test_backbones_that_cannot_be_used(tmp_path):
    with pytest.raises(
        ValueError, match="`backbone` has patch size 8 and 785 positions, allowed: patch size 16 and 197"
    ):
        DINODiscriminator(tiny_backbone(patch_size=8))
    with pytest.raises(ValueError, match="patch size 16 and 257 positions"):
        DINODiscriminator(tiny_backbone(image_size=256))
    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "dinov2"
    )
    with pytest.raises(ValueError, match="model type 'dinov2', allowed: 'vit'"):
        DINODiscriminator(str(tmp_path / "dinov2"))
    incomplete = tiny_backbone()
    state_dict = incomplete.state_dict()
    del state_dict["layers.2.mlp.fc1.weight"]
    incomplete.save_pretrained(tmp_path / "incomplete", state_dict=state_dict)
    with pytest.raises(ValueError, match=r"lacks weights of a ViT: layers\.2\.mlp\.fc1\.weight"):
        DINODiscriminator(str(tmp_path / "incomplete"))
    with pytest.raises(OSError, match="`backbone` is '.*nowhere', which could not be loaded .* Hub id .* cache, /"):
        DINODiscriminator(str(tmp_path / "nowhere"))


def test_bad_input(discriminator):
    with pytest.raises(ValueError, match=r"`depths` is \(2, 5, 8, 11\), allowed: .* 0 to 3"):
        DINODiscriminator(tiny_backbone())
    with pytest.raises(ValueError, match=r"`depths` is \(\)"):
        DINODiscriminator(tiny_backbone(), depths=())
    with pytest.raises(ValueError, match="`kernel_size` is 8, allowed: odd"):
        DINODiscriminator(tiny_backbone(), depths=(3,), kernel_size=8)
    with pytest.raises(ValueError, match=r"`images` has shape \(1, 1, 32, 32\), allowed: \(B, 3, H, W\)"):
        discriminator(torch.zeros(1, 1, 32, 32))
