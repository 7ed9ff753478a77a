"""Files with the weights of the networks that metrics look through: found, downloaded or asked for, and read without
executing anything."""

import os
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file


class FeatureWeightsUnavailable(OSError):
    """The weights of a network are neither on this machine nor downloadable from it."""


def locate_weights(url: str, weights_path: str | os.PathLike | None, argument: str, needed_for: str) -> Path:
    """
    The file of a network's weights: the given one, or that in torch's hub cache, which is downloaded if need be.

    Args:
        url (`str`):
            Where the file is published. Its name ends in the first digits of its SHA-256, as torch's hub wants it,
            which are checked after a download.
        weights_path (`str` or `os.PathLike`, *optional*): The file, if the user has named one.
        argument (`str`): What the caller calls `weights_path`, for the errors.
        needed_for (`str`): What needs the weights, for the errors; the beginning of a sentence.

    Returns:
        `Path`: an existing file.

    Raises:
        FileNotFoundError: If `weights_path` does not exist.
        FeatureWeightsUnavailable: If the file is not in the cache and cannot be downloaded, or not as published.
    """
    if weights_path is not None:
        if not os.path.isfile(weights_path):
            raise FileNotFoundError(f"`{argument}` is {os.fspath(weights_path)!r}, allowed: an existing file.")
        return Path(weights_path)

    filename = url.rsplit("/", 1)[1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / filename
    if cached.exists():
        return cached
    try:
        # torch's download has no time limit of its own, so ask for the headers first
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
        cached.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = Path(filename).stem.rsplit("-", 1)[1]
        torch.hub.download_url_to_file(url, os.fspath(cached), hash_prefix=hash_prefix)
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash than that of the name
        raise FeatureWeightsUnavailable(
            f"{needed_for} needs {filename}, which is not available ({error}). Download {url} on a machine with "
            f"network and put it at {cached}, or pass the file as `{argument}`."
        ) from error
    return cached


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The tensors of a file.

    Args:
        path (`str` or `os.PathLike`): A state dict as `.safetensors`, or as torch saves it (anything else).

    Returns:
        `dict[str, torch.Tensor]`: by name, on the CPU.

    Raises:
        ValueError: If the file cannot be read or holds anything but tensors by name. Nothing in it is executed.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # of the disk, not of what is in the file
    except Exception as error:  # junk leads the unpickler to errors of any kind, such as struct.error and KeyError
        raise ValueError(
            f"The weights in {os.fspath(path)!r} cannot be read ({error}), allowed: a whole `.pth` or `.safetensors` "
            "file with tensors only."
        ) from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    ):
        raise ValueError(f"{os.fspath(path)!r} holds no state dict, allowed: a dictionary of tensors by name.")
    return state_dict
