"""Official MAR checkpoints: their numbers, training files, and what must not convert."""

from argparse import Namespace

import pytest
import torch

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.conversion.mar import NAMED_SIZES, _key_map
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel


@pytest.fixture
def mar(golden):
    description, tensors = golden("mar")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, description["config"]


def state(model):
    return dict(model.state_dict())


def test_every_weight_is_there(mar):
    weights, config = mar
    model = convert_checkpoint("mar", weights, config)
    assert not model.training and model.dtype == torch.float32
    assert model.num_parameters() == sum(weight.numel() for weight in weights.values())
    assert model.config.sample_size == 4 and model.num_tokens == 16 and model.config.num_classes == 10
    assert torch.equal(model.class_embedder.weight[10:], weights["fake_latent"])
    query, key, value = weights["encoder_blocks.1.attn.qkv.weight"].chunk(3)
    attention = model.encoder_blocks[1].attn
    for layer, expected in zip((attention.to_q, attention.to_k, attention.to_v), (query, key, value), strict=True):
        assert torch.equal(layer.weight, expected)


def test_training_files_and_wrappers(mar):
    weights, config = mar
    expected = state(convert_checkpoint("mar", weights, config))
    others = {name: weight + 1 for name, weight in weights.items()}
    wrapped = {f"module._orig_mod.{name}": weight for name, weight in weights.items()}
    for state_dict in (
        {"model": others, "model_ema": weights, "optimizer": {}, "epoch": 3},
        {"model": weights, "epoch": 3},
        wrapped,
    ):
        converted = state(convert_checkpoint("mar", state_dict, config))
        assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_sizes_by_name():
    sizes = {name: tuple(size.values()) for name, size in NAMED_SIZES.items()}
    assert sizes == {
        "mar_base": (768, 12, 12, 768, 12, 12),
        "mar_large": (1024, 16, 16, 1024, 16, 16),
        "mar_huge": (1280, 20, 16, 1280, 20, 16),
    }


def official_config(name, denoiser_width, denoiser_depth):
    return {
        "model": name,
        "img_size": 256,
        "vae_stride": 16,
        "patch_size": 1,
        "vae_embed_dim": 16,
        "buffer_size": 64,
        "diffloss_d": denoiser_depth,
        "diffloss_w": denoiser_width,
    }


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (official_config("mar_base", 1024, 6), 207_924_768),
        (official_config("mar_large", 1280, 8), 478_326_304),
        (official_config("mar_huge", 1536, 12), 942_403_104),
    ],
)
def test_published_sizes(config, num_parameters):
    """Checkpoints with the official keys and shapes, but without values."""
    with torch.device("meta"):
        sizes = NAMED_SIZES[config["model"]]
        model = MARTransformer1DModel(
            in_channels=16,
            sample_size=16,
            denoiser_hidden_size=config["diffloss_w"],
            denoiser_num_layers=config["diffloss_d"],
            encoder_hidden_size=sizes["encoder_embed_dim"],
            encoder_num_layers=sizes["encoder_depth"],
            encoder_num_attention_heads=sizes["encoder_num_heads"],
            decoder_hidden_size=sizes["decoder_embed_dim"],
            decoder_num_layers=sizes["decoder_depth"],
            decoder_num_attention_heads=sizes["decoder_num_heads"],
        )
        own = model.state_dict()
        official = {
            key: torch.cat([own[name] for name in names]) if len(names) > 1 else own[names[0]]
            for key, names in _key_map(model).items()
        }
        official["fake_latent"] = official["class_emb.weight"][:1]
        official["class_emb.weight"] = official["class_emb.weight"][1:]
        converted = convert_checkpoint("mar", official, config)
    assert converted.num_parameters() == num_parameters
    assert {name: weight.shape for name, weight in converted.state_dict().items()} == {
        name: weight.shape for name, weight in own.items()
    }


def test_encoder_and_decoder_of_their_own_sizes():
    """Patches of 2 x 2, other widths, heads and depths in each half; the official script has a namespace."""
    config = {
        "img_size": 32,
        "vae_stride": 4,
        "patch_size": 2,
        "vae_embed_dim": 3,
        "buffer_size": 5,
        "diffloss_d": 2,
        "diffloss_w": 20,
        "encoder_embed_dim": 24,
        "encoder_depth": 2,
        "encoder_num_heads": 3,
        "decoder_embed_dim": 32,
        "decoder_depth": 3,
        "decoder_num_heads": 2,
        "mlp_ratio": 2.5,
        "class_num": 4,
    }
    torch.manual_seed(0)
    expected = MARTransformer1DModel(
        in_channels=3,
        buffer_size=5,
        encoder_hidden_size=24,
        encoder_num_layers=2,
        encoder_num_attention_heads=3,
        decoder_hidden_size=32,
        decoder_num_layers=3,
        decoder_num_attention_heads=2,
        mlp_ratio=2.5,
        denoiser_hidden_size=20,
        denoiser_num_layers=2,
        num_classes=4,
        patch_size=2,
        sample_size=8,
    ).eval()
    own = expected.state_dict()
    official = {key: torch.cat([own[name] for name in names]) for key, names in _key_map(expected).items()}
    official["fake_latent"] = official["class_emb.weight"][-1:]
    official["class_emb.weight"] = official["class_emb.weight"][:-1]
    with pytest.raises(TypeError, match="`config` is a Namespace, allowed: a mapping"):
        convert_checkpoint("mar", official, Namespace(**config))
    converted = convert_checkpoint("mar", official, vars(Namespace(**config)))
    inputs = torch.randn(2, 16, 12), torch.tensor([1, 4]), torch.tensor([[0, 3], [15, 7]])
    with torch.no_grad():
        conditions = expected(*inputs).conditions
        assert torch.equal(converted(*inputs).conditions, conditions)
        tokens, timesteps = torch.randn(16, 12), torch.arange(16)
        denoised = expected.denoise(tokens, timesteps, conditions[0])
        assert torch.equal(converted.denoise(tokens, timesteps, conditions[0]), denoised)


def test_names_of_the_official_scripts():
    config = official_config("mar_base", 1024, 6)
    with pytest.raises(ValueError, match="missing: class_emb.weight, .*fake_latent, mask_token"):
        with torch.device("meta"):
            convert_checkpoint("mar", {}, config)
    with pytest.raises(ValueError, match="`config\\['model'\\]` is 'mar_base', allowed with `encoder_depth` 10"):
        convert_checkpoint("mar", {}, config | {"encoder_depth": 10})
    with pytest.raises(
        ValueError, match="`config\\['model'\\]` is 'mar_tiny', allowed: mar_base, mar_large, mar_huge"
    ):
        convert_checkpoint("mar", {}, config | {"model": "mar_tiny"})
    with pytest.raises(ValueError, match="`config` lacks encoder_embed_dim, encoder_depth"):
        convert_checkpoint("mar", {}, {key: value for key, value in config.items() if key != "model"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 18}, r"`config\['img_size'\]` is 18, allowed: multiples of `vae_stride` \* `patch_size` = 4"),
        ({"buffer_size": 0}, r"`config\['buffer_size'\]` is 0, allowed: positive integers"),
        ({"encoder_num_heads": 5}, "`encoder_hidden_size` must be a multiple of `encoder_num_attention_heads` = 5"),
        ({"buffer_size": 7}, "mis-shaped: decoder_pos_embed_learned .*, encoder_pos_embed_learned"),
        ({"encoder_depth": 3}, "missing: encoder_blocks.2"),
        ({"diffloss_d": 1}, "unexpected: diffloss.net.res_blocks.1"),
        ({"class_num": 11}, "`state_dict` has class_emb.weight of shape \\(10, 48\\), allowed: \\(11, 48\\)"),
    ],
)
def test_configs_that_do_not_fit(mar, change, message):
    weights, config = mar
    with pytest.raises(ValueError, match=message):
        convert_checkpoint("mar", weights, config | change)


def test_weights_that_do_not_fit(mar):
    weights, config = mar
    rest = {key: value for key, value in weights.items() if key not in ("fake_latent", "mask_token")}
    with pytest.raises(ValueError, match="2 missing: fake_latent, mask_token"):
        convert_checkpoint("mar", rest, config)
    for name in ("fake_latent", "class_emb.weight", "mask_token"):
        with pytest.raises(ValueError, match=name):
            convert_checkpoint("mar", {key: value for key, value in weights.items() if key != name}, config)
    with pytest.raises(ValueError, match="1 unexpected: surplus"):
        convert_checkpoint("mar", weights | {"surplus": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="not finite numbers: mask_token"):
        convert_checkpoint("mar", weights | {"mask_token": torch.full((1, 1, 48), torch.nan)}, config)
