"""What every converter shares: stripping the wrappers off official keys, and loading all tensors or none."""

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import ModelMixin


def strip_wrapper_prefixes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Remove the `module.` of DDP and the `_orig_mod.` of `torch.compile` wherever they stand in a key.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Official weights.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors under clean keys.

    Raises:
        ValueError: If two keys become one and their tensors differ.
        TypeError: If a key is not text, or a value is not a tensor (a training file holds the weights one level
            deeper).
    """
    stripped = {}
    for key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"`state_dict[{key!r}]` is a {type(tensor).__name__}, allowed: tensors. A training file holds its"
                " weights under a key such as 'ema' or 'model': pass that entry."
            )
        if not isinstance(key, str):
            raise TypeError(f"`state_dict` has the key {key!r}, allowed: text, the official names.")
        clean_key = re.sub(r"(^|\.)(?:(?:module|_orig_mod)\.)+", r"\1", key)
        if clean_key in stripped and not tensor.is_meta and not torch.equal(stripped[clean_key], tensor):
            raise ValueError(f"`state_dict` holds two different tensors for {clean_key!r} (one of them as {key!r}).")
        stripped[clean_key] = tensor
    return stripped


def load_official_state_dict(
    model: ModelMixin,
    state_dict: Mapping[str, torch.Tensor],
    key_map: Mapping[str, tuple[str, ...]],
    ignored_keys: Iterable[str] = (),
) -> ModelMixin:
    """
    Fill `model` with official weights: every tensor finds its place, or nothing is loaded.

    Args:
        model (`ModelMixin`): The model to fill; changed in place.
        state_dict (`Mapping[str, torch.Tensor]`): Official weights under clean keys.
        key_map (`Mapping[str, tuple[str, ...]]`):
            For every official key the model's own keys. Where there are several, the official tensor is their
            concatenation along the first axis (a fused query-key-value projection).
        ignored_keys (`Iterable[str]`): Regular expressions of official keys that inference does not need.

    Returns:
        `ModelMixin`: `model` in float32 and eval mode.

    Raises:
        ValueError: Lists the missing, unexpected and mis-shaped official keys, and those without finite numbers.
    """
    own = model.state_dict()
    unmapped = own.keys() - {key for keys in key_map.values() for key in keys}
    if unmapped:
        raise KeyError(f"The key map of {type(model).__name__} has no entry for {sorted(unmapped)}.")

    if any(tensor.is_meta for tensor in state_dict.values()) and not any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            "`state_dict` holds tensors without values (on the meta device), allowed: tensors with values, or"
            " conversion inside of `with torch.device('meta')`."
        )
    ignored = [re.compile(pattern) for pattern in ignored_keys]
    missing = [key for key in key_map if key not in state_dict]
    unexpected = [
        key for key in state_dict if key not in key_map and not any(pattern.fullmatch(key) for pattern in ignored)
    ]
    mis_shaped, not_finite = [], []
    converted = {}
    for official_key, keys in key_map.items():
        if official_key not in state_dict:
            continue
        tensor = state_dict[official_key]
        lengths = [own[key].shape[0] for key in keys]
        expected_shape = (sum(lengths), *own[keys[0]].shape[1:])
        if tuple(tensor.shape) != expected_shape:
            mis_shaped.append(f"{official_key} (is {tuple(tensor.shape)}, should be {expected_shape})")
            continue
        if not tensor.is_floating_point():
            not_finite.append(f"{official_key} (of {tensor.dtype})")
        elif not tensor.is_meta and not torch.isfinite(tensor).all():
            not_finite.append(f"{official_key} (NaN or infinite)")
        for key, part in zip(keys, tensor.float().split(lengths), strict=True):
            converted[key] = part.contiguous()

    problems = [
        f"{len(keys)} {kind}: {', '.join(sorted(keys))}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", mis_shaped),
            ("not finite numbers", not_finite),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"`state_dict` does not fit the config of {type(model).__name__}. {'; '.join(problems)}.")

    model.load_state_dict(converted, strict=True)
    return model.float().eval()
