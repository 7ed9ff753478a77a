"""`--encoder_init` of training/train_softvq.py: a new tokenizer starts from DINOv2."""

import json

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from softvq_hf.conversion.dinov2 import export_dinov2_encoder
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


# patches of 14 pixels and a grid of 5 x 5, as they are resampled to 8 pixels and 4 x 4
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
def test_encoder_starts_from_dinov2(registers, run_main, tokenizer_args, tokenizer_config, tmp_path):
    if registers:
        dinov2 = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=registers))
    else:
        dinov2 = Dinov2Model(Dinov2Config(**SIZES))
    dinov2.save_pretrained(tmp_path / "dinov2")
    config = json.dumps({**tokenizer_config, "num_register_tokens": registers})
    run_main(
        "train_softvq",
        *tokenizer_args,
        f"--model={config}",
        f"--encoder_init={tmp_path / 'dinov2'}",
        f"--output_dir={tmp_path / 'tokenizer'}",
        "--max_train_steps=1",
        "--learning_rate=1e-9",
        "--validation_steps=0",
        "--report_to=none",
    )
    model = AutoencoderSoftVQ.from_pretrained(tmp_path / "tokenizer")
    trained = export_dinov2_encoder(model, patch_size=8, image_size=32)
    for name in ("encoder.layer.0.attention.q_proj.weight", "encoder.layer.0.mlp.fc2.weight", "layernorm.bias"):
        torch.testing.assert_close(trained.get_parameter(name), dinov2.get_parameter(name), atol=1e-6, rtol=0)
    assert "Training started from dinov2." in (tmp_path / "tokenizer" / "README.md").read_text()


def test_other_architectures_are_refused(run_main, tokenizer_args, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    arguments = [*tokenizer_args, f"--output_dir={tmp_path / 'tokenizer'}"]
    with pytest.raises(ValueError, match=r"vit' with a model of type 'vit', allowed: a folder or Hub repository of a"):
        run_main("train_softvq", *arguments, f"--encoder_init={tmp_path / 'vit'}")
    with pytest.raises(ValueError, match="missing', which could not be read, allowed: .* without a connection"):
        run_main("train_softvq", *arguments, f"--encoder_init={tmp_path / 'missing'}")
