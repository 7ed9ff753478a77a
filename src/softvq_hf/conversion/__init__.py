"""Official checkpoints to the models of this library; one file per system."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin

from softvq_hf.conversion.mar import convert_mar
from softvq_hf.conversion.sit import convert_dit, convert_sit
from softvq_hf.conversion.softvq import convert_softvq


CONVERTERS = {"softvq": convert_softvq, "sit": convert_sit, "dit": convert_dit, "mar": convert_mar}


def convert_checkpoint(system: str, state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> ModelMixin:
    """
    Convert official weights into a model of this library. Nothing is downloaded.

    Args:
        system (`str`):
            `"softvq"` (SoftVQ and MAETok tokenizers, and their KL, VQ and plain-autoencoder twins), `"sit"`
            (flow-matching transformers on 1-D or 2-D latents), `"dit"` (DDPM transformers) or `"mar"` (MAR).
        state_dict (`Mapping[str, torch.Tensor]`):
            Weights under the official keys; wrapper prefixes such as `module.` and `_orig_mod.` are stripped. For
            `"mar"` also a training file, whose `model_ema` is taken.
        config (`Mapping[str, Any]`): The official config as a flat dictionary.

    Returns:
        `ModelMixin`: [`AutoencoderSoftVQ`] (a [`~diffusers.VQModel`] for the convolutional VQ tokenizer) or
            [`DiTTransformer1DModel`] or [`MARTransformer1DModel`], float32, eval mode.

    Raises:
        ValueError: If `system` is unknown, a config key is missing or its value unsupported, or keys of the weights
            are missing, unexpected or mis-shaped; the message lists all of them.
        TypeError: If `state_dict` or `config` is no mapping, or a value of `state_dict` not a tensor.
    """
    if system not in CONVERTERS:
        raise ValueError(f"`system` is {system!r}, allowed: {', '.join(map(repr, CONVERTERS))}.")
    for name, value in {"state_dict": state_dict, "config": config}.items():
        if not isinstance(value, Mapping):
            raise TypeError(
                f"`{name}` is a {type(value).__name__}, allowed: a mapping (of a namespace, `vars` of it)."
            )
    return CONVERTERS[system](state_dict, config)
