"""What every converter asks of an official config: all that is needed, of the right kind, and no key passed over."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.utils import logging


logger = logging.get_logger(__name__)

KINDS = {
    int: "positive integers",
    float: "finite numbers",
    bool: "true or false",
    str: "text",
    list: "lists of positive integers",
    dict: "mappings",
}


def check_official_config(
    config: Mapping[str, Any],
    required: Mapping[str, type],
    optional: Mapping[str, type],
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """
    Check a flat official config before anything is computed from it.

    Args:
        config (`Mapping[str, Any]`): The official config.
        required (`Mapping[str, type]`): Keys that must be there, with their kinds: the keys of `KINDS`.
        optional (`Mapping[str, type]`): Keys that may be there; `None` means that one is not.
        ignored (`Iterable[str]`): Keys that a converter knows, and that say nothing about the model.

    Returns:
        `dict[str, Any]`: The entries of required and optional keys that are there.

    Raises:
        ValueError: If required keys are missing, or values are not of their kind; the message lists all of them.
    """
    missing = [key for key in required if config.get(key) is None]
    if missing:
        raise ValueError(f"`config` lacks {', '.join(missing)}: the model cannot be built without.")
    kinds = {**required, **optional}
    checked = {key: config[key] for key in kinds if config.get(key) is not None}
    wrong = [
        f"`config[{key!r}]` is {value!r}, allowed: {KINDS[kinds[key]]}"
        for key, value in checked.items()
        if not _is_of_kind(value, kinds[key])
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")
    unknown = sorted(str(key) for key in set(config) - set(kinds) - set(ignored))
    if unknown:
        logger.warning(f"`config` holds {', '.join(unknown)}, which no conversion rule knows: ignored.")
    return checked


def _is_of_kind(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is list:
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_of_kind(entry, int) for entry in value)
    return isinstance(value, Mapping if kind is dict else kind)
