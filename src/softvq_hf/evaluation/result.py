"""The record of an evaluation: figures together with all that decides them, as JSON and in the model card."""

import importlib.metadata
import json
import math
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import EvalResult

from softvq_hf.training.hub import update_model_index
from softvq_hf.training.logging import hardware_record, library_versions, without_hub_token, write_atomically


METRIC_LIBRARIES = ("torch-fidelity", "lpips", "torchvision", "scikit-image", "scipy")


def build_result(
    accelerator: Accelerator,
    *,
    task: str,
    model: str,
    dataset: dict[str, Any],
    metrics: dict[str, float | None],
    protocol: dict[str, Any],
    notes: list[str],
    **details: Any,
) -> dict[str, Any]:
    """
    The record of an evaluation. Collective.

    Args:
        accelerator (`Accelerator`): Tells the hardware.
        task (`str`): Task in the terms of the Hub, such as "image-reconstruction".
        model (`str`): Folder or Hub id of what was evaluated. Of a folder, the record has the name.
        dataset (`dict`): Real images, from [`EvaluationDataArguments.data_record`]: `name`, `split` and so on.
        metrics (`dict`): Figures by name; `None` for one that cannot be had, which `notes` explain.
        protocol (`dict`): How they were measured: crop, resolution, rounding, feature networks, sampler and so on.
            `name` is one line that tells this protocol from others, `num_images` the number of images.
        notes (`list[str]`): What a reader of the figures should know.
        details: More tables, each under its own name.

    Returns:
        `dict`: the above, and

        - `versions`: of libraries, Python, and the CUDA that torch was built with.
        - `hardware`: see [`~softvq_hf.training.logging.hardware_record`].
        - `command`: the words of the command line, without tokens, and with `~` for the home folder.
        - `date`: UTC, ISO 8601.

        Numbers of numpy are Python's. Those that are not finite, which JSON does not know, are `None`; a note says so.

    Raises:
        ValueError: If `protocol` lacks `name` or `num_images`.
    """
    missing = [name for name in ("name", "num_images") if name not in protocol]
    if missing:
        raise ValueError(f"`protocol` lacks {' and '.join(missing)}.")
    notes = list(notes)
    tables = {"metrics": metrics, **details}
    return {
        "task": task,
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "dataset": dataset,
        **{name: _finite(table, name, notes) for name, table in tables.items()},
        "protocol": _finite(protocol, "protocol", notes),
        "notes": notes,
        "versions": library_versions() | {name: importlib.metadata.version(name) for name in METRIC_LIBRARIES},
        "hardware": hardware_record(accelerator),
        "command": [word.replace(f"{Path.home()}{os.sep}", f"~{os.sep}") for word in without_hub_token(sys.argv)],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(result: dict[str, Any], path: str | Path) -> None:
    """
    Write a record as JSON. Whoever reads `path` finds the old text or the new one, also after a crash.

    Args:
        result (`dict`): From [`build_result`].
        path (`str` or `Path`): The file; its folder is made if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_output_file(output_file: str | None) -> None:
    """
    Make the folder of `output_file` and try to write there, before any work is done that could be lost.

    Raises:
        ValueError: If the file cannot be written.
    """
    if output_file is None:
        return
    path = Path(output_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("It is a folder.")
        partial = path.with_name(f"{path.name}.partial")
        partial.touch()
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"`--output_file` is {output_file!r}, allowed: a file that can be written. {error}"
        ) from error


def update_model_card(folder: str | Path, result: dict[str, Any], model: ModelMixin | DiffusionPipeline) -> None:
    """
    Write the figures of a record into the model-index of a model card, in place of earlier ones of the same name,
    task, data set, split and protocol. The rest of the card stays. See [`~softvq_hf.training.hub.update_model_index`].

    Args:
        folder (`str` or `Path`): Local folder of the model, with or without a `README.md`.
        result (`dict`): From [`build_result`]. Figures that are `None` are left out.
        model ([`~diffusers.ModelMixin`] or [`~diffusers.DiffusionPipeline`]): For a card, where there is none.

    Raises:
        ValueError: As [`~softvq_hf.training.hub.update_model_index`].
    """
    dataset, protocol = result["dataset"], result["protocol"]
    metric_args = {"protocol": protocol["name"], "num_images": protocol["num_images"]}
    eval_results = [
        EvalResult(
            task_type=result["task"],
            dataset_type=dataset["name"],
            dataset_name=dataset["name"],
            dataset_config=dataset["config_name"],
            dataset_split=dataset["split"],
            dataset_revision=dataset["revision"],
            metric_type=name,
            metric_name=name,
            metric_value=value,
            metric_args=metric_args,
        )
        for name, value in result["metrics"].items()
        if value is not None
    ]
    update_model_index(folder, eval_results, model)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """
    Where two records differ, nested ones included.

    Args:
        found (`dict`): What a file says.
        wanted (`dict`): What it should say. Both are compared as JSON has them.

    Returns:
        `list[str]`: in words, one for each value that differs; empty for equal records.
    """
    found, wanted = (_by_dotted_names(json.loads(json.dumps(record))) for record in (found, wanted))
    return [
        f"`{name}` is {found.get(name, 'not given')} there and {wanted.get(name, 'not given')} here"
        for name in {**found, **wanted}
        if found.get(name) != wanted.get(name)
    ]


def _by_dotted_names(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values = {}
    for name, value in record.items():
        nested = isinstance(value, dict)
        values |= _by_dotted_names(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return values


def _finite(value: Any, name: str, notes: list[str]) -> Any:
    """`value` as JSON has it: numbers of numpy as Python's, and `None` for those not finite, which `notes` name."""
    if isinstance(value, dict):
        return {key: _finite(entry, key, notes) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry, f"{name}[{i}]", notes) for i, entry in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        notes.append(f"{name} is {'not a number' if math.isnan(value) else 'infinite'}, which JSON has as null.")
        return None
    return value
