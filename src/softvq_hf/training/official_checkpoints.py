"""Official checkpoints as they are published and as training leaves them: weights and config, no code run.

The layouts are those of SoftVQ-VAE (arXiv 2412.10958): `config.json` and `model.safetensors` of a Hub repository, and
the `.pt` files of training.
"""

import argparse
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from softvq_hf.conversion import mar, sit, softvq
from softvq_hf.conversion.state_dict import strip_wrapper_prefixes


logger = logging.getLogger(__name__)

# What the configs of SiT models have, and those of DiT models have not.
SIT_CONFIG_KEYS = ("decoder_hidden_size", "path_type", "use_cfg", "z_dims")
# What the weights of MAR have, and those of other systems have not.
MAR_KEY = "diffloss.net.input_proj.weight"


def load_official_checkpoint(
    source: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read official weights and their config, as [`convert_checkpoint`] takes them. No code of a file is run.

    Of a training file the averaged weights (`ema`) are preferred to `model`; a file may also hold nothing but weights.
    Its config is `config`, otherwise the `config.json` beside the file, otherwise its entry `args` if that has all
    that the converter requires.

    Args:
        source (`str` or `Path`):
            A Hub id or a local folder with `config.json` and `model.safetensors`, or a local `.pt` or `.pth` file.
        config (`str`, `Path` or mapping, *optional*): The official config, a JSON file or a mapping.
        revision, token, cache_dir, local_files_only: As in [`convert_pretrained`].

    Returns:
        `tuple`: the weights under the official keys without the prefixes of wrappers, and the flat config.

    Raises:
        ValueError: If a file is missing, damaged or not of its format, a training file needs code to be run or comes
            without a config, or `source` is in the format of diffusers already.
        OSError: If the Hub does not have the files, or cannot be reached and the cache does not have them.
    """
    if config is not None and not isinstance(config, Mapping):
        config = read_json(Path(config).expanduser(), "`config`")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in (".pt", ".pth"):
            raise ValueError(
                f"`source` is the file {str(source)!r}, allowed: training files (.pt, .pth), folders, and Hub ids."
            )
        state_dict, args = _load_training_file(path)
        config_file = path.with_name("config.json")
        if config is None and config_file.is_file():
            config = read_json(config_file, "`source`")
        if config is None:
            config = _config_from_args(path, state_dict, args)
        _refuse_diffusers_config(source, config)
        return state_dict, dict(config)

    def locate(name: str) -> Path:
        if not path.is_dir():
            return download_file(source, name, revision, token, cache_dir, local_files_only)
        if not (path / name).is_file():
            raise ValueError(
                f"`source` is the folder {str(source)!r}, which has no {name}. Allowed: the official layout"
                " (config.json and model.safetensors), or a training file by its own name."
            )
        return path / name

    if config is None:
        config = read_json(locate("config.json"), "`source`")
    _refuse_diffusers_config(source, config)
    weights_file = locate("model.safetensors")
    try:
        state_dict = load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(
            f"{weights_file} cannot be read: {error}. The file is truncated or damaged: fetch it again."
        ) from error
    return strip_wrapper_prefixes(state_dict), dict(config)


def detect_system(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    """
    Tell the system of an official checkpoint by its keys and its config.

    Tokenizers have a `quant_conv` between `encoder` and `decoder`, MAR has a `diffloss`, other generators have an
    `x_embedder` and a `final_layer`. Such a one is a DiT if its final layer has twice as many outputs as its embedding
    has inputs, or if its config says whether the variance is learned (`learn_sigma`); otherwise it is a SiT.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Official weights, wrapper prefixes stripped.
        config (`Mapping[str, Any]`): The official flat config.

    Returns:
        `str`: "softvq", "sit", "dit" or "mar".

    Raises:
        ValueError: If the keys are those of no system, or keys and config point to different ones.
    """
    if is_tokenizer(state_dict):
        return "softvq"
    if MAR_KEY in state_dict:
        return "mar"
    embedding = state_dict.get("x_embedder.weight", state_dict.get("x_embedder.proj.weight"))
    projection = state_dict["final_layer.linear.weight"]
    for name, tensor in (("x_embedder", embedding), ("final_layer.linear", projection)):
        if tensor.ndim < 2:
            raise ValueError(f"`{name}` has a weight of shape {tuple(tensor.shape)}, allowed: a matrix or a kernel.")
    inputs, outputs = embedding[0].numel(), len(projection)
    if "learn_sigma" not in config and outputs != 2 * inputs:
        return "sit"
    sit_keys = [key for key in SIT_CONFIG_KEYS if key in config]
    if sit_keys:
        raise ValueError(
            f"`system` cannot be told: `config` holds {', '.join(sit_keys)}, as that of a SiT, but"
            f" `config['learn_sigma']` is {config.get('learn_sigma', 'absent')} and the final layer has {outputs}"
            f" outputs for {inputs} inputs. Allowed: 'sit' or 'dit' as `system`."
        )
    return "dit"


def read_json(path: Path, argument: str) -> dict[str, Any]:
    """
    Read a JSON object.

    Args:
        path (`Path`): The file.
        argument (`str`): Whose value it is, for errors.

    Returns:
        `dict`: the object.

    Raises:
        ValueError: If the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{argument} is the file {str(path)!r}, which cannot be read. {error}") from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{argument} is the file {str(path)!r}, which is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{argument} is the file {str(path)!r}, which holds a {type(content).__name__}, not an object."
        )
    return content


def _refuse_diffusers_config(source: str | Path, config: Mapping[str, Any]) -> None:
    if "_class_name" in config:
        raise ValueError(
            f"`source` is {str(source)!r}, in the format of diffusers already ({config['_class_name']}): there is"
            " nothing to convert."
        )


def download_file(
    repo_id: str | Path,
    filename: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """
    One file of a Hub repository, from the cache or the Hub.

    Args:
        repo_id (`str` or `Path`): The repository, "user/name".
        filename (`str`): The file.
        revision, token, cache_dir, local_files_only: As in [`convert_pretrained`].

    Returns:
        `Path`: the file in the cache.

    Raises:
        ValueError: If `repo_id` cannot be a repository.
        OSError: If there is no such file, or no way to it; the message says what to do.
    """
    name = str(repo_id)
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith((".pt", ".pth", ".safetensors")):
        raise ValueError(
            f"{name!r} does not exist. Allowed: a local folder or training file, or a Hub id 'user/name'."
        )
    try:
        return Path(
            hf_hub_download(
                name,
                filename,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a local folder or file nor a Hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{filename} of {name!r} is not in the cache, and the Hub is out of reach or not asked ({error}). {name!r}"
            f" is no local folder either. With a connection, `hf download {name} config.json model.safetensors` fills"
            " the cache; or copy these two files into a folder and give that."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"The Hub repository {name!r} has no revision {revision!r}.") from error
    except EntryNotFoundError as error:
        raise OSError(f"The Hub repository {name!r} has no file {filename}.") from error
    except GatedRepoError as error:
        raise OSError(f"The Hub repository {name!r} is gated: ask for access there, then log in.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name!r} is neither a local folder or file nor a repository on the Hub, or needs a token."
        ) from error
    except HTTPError as error:
        raise OSError(f"{filename} of {name!r} cannot be downloaded: {error}") from error


def _load_training_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a training file under clean keys, and the arguments of its run."""
    try:
        # official files carry the arguments of the run, a Namespace: plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {found[1]}, which is" if found else "it holds a pickle that is"
        raise ValueError(
            f"{path} is refused: {what} neither a tensor nor plain data. Reading it would run code from the file,"
            " which could do anything. Allowed: tensors and plain data. If you trust the file, save its weights alone"
            " where it was made: torch.save({'ema': checkpoint['ema']}, 'weights.pt')."
        ) from error
    except Exception as error:  # what torch raises on damaged files is not documented
        raise ValueError(
            f"{path} cannot be read as weights: it is truncated, damaged or of another kind than the files of"
            f" torch.save ({type(error).__name__})."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, allowed: a dictionary with 'ema', 'model_ema' or 'model'."
        )

    weights = next(
        (name for name in ("ema", "model_ema", "model") if isinstance(content.get(name), Mapping) and content[name]),
        None,
    )
    if weights is not None:
        logger.info(f"{path}: taking the weights of its entry {weights!r}")
        weights = content[weights]
    else:
        weights = content
    others = [
        name for name, value in weights.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if others or not weights:
        raise ValueError(
            f"{path} holds no weights where they are expected, under 'ema', 'model_ema' or 'model' or at the top: its"
            f" entries are {', '.join(map(str, content)) or 'none'}, and not tensors are"
            f" {', '.join(map(str, others)) or 'none'}."
        )
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return strip_wrapper_prefixes(weights), args if isinstance(args, Mapping) else {}


def _config_from_args(path: Path, state_dict: Mapping[str, torch.Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a training file that comes without one, if the arguments of its run hold it."""
    if is_tokenizer(state_dict):
        required, optional = softvq.REQUIRED_CONFIG_KEYS | softvq.VIT_CONFIG_KEYS, softvq.OPTIONAL_CONFIG_KEYS
    elif MAR_KEY in state_dict:
        required, optional = mar.REQUIRED_CONFIG_KEYS, mar.SIZE_CONFIG_KEYS | mar.OPTIONAL_CONFIG_KEYS
        args = {key: value for key, value in args.items() if key != "model" or value is not None}
        if "model" not in args:
            required = required | mar.SIZE_CONFIG_KEYS
    else:
        required, optional = sit.REQUIRED_CONFIG_KEYS, sit.OPTIONAL_CONFIG_KEYS
    missing = [key for key in required if key not in args]
    if missing:
        raise ValueError(
            f"The config of {path} is missing: there is no config.json beside it, and its `args` lack"
            f" {', '.join(missing)}. Give the official flat config as `config`, a JSON file; that of a published model"
            " of the same size is a start."
        )
    return {key: args[key] for key in required | optional if key in args}


def is_tokenizer(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """
    Tell tokenizers from generators by their keys.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Official weights, wrapper prefixes stripped.

    Returns:
        `bool`: `True` for a tokenizer, `False` for a generator.

    Raises:
        ValueError: If they are neither, or both.
    """
    parts = {key.partition(".")[0] for key in state_dict}
    has_tokenizer = {"encoder", "decoder", "quant_conv"} <= parts
    has_generator = MAR_KEY in state_dict or (
        "final_layer.linear.weight" in state_dict
        and bool({"x_embedder.weight", "x_embedder.proj.weight"} & state_dict.keys())
    )
    if has_tokenizer == has_generator:
        raise ValueError(
            f"`system` cannot be told from keys that start with {', '.join(sorted(parts))}. A tokenizer (softvq) has"
            " encoder, decoder and quant_conv, a generator (sit, dit) x_embedder and final_layer, or (mar) diffloss."
        )
    return has_tokenizer
