"""Arguments of the training scripts: dataclasses filled from `--config file.yaml` and the command line.

A YAML file holds the arguments of one run under the names of the flags; flags given on the command line win. Its key
`base` names another YAML file, relative to it, whose arguments are the defaults of this one. The `model` argument of
a training script, the configuration of the model to train, is a mapping in YAML and a JSON object on the command line;
it is merged over the mapping it replaces, key by key.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from diffusers import ModelMixin
from transformers import HfArgumentParser


T = TypeVar("T")


@dataclass(kw_only=True)
class DataArguments:
    """Where the images are: what all scripts that read images take. `__post_init__` checks the values."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset id on the Hub (e.g. ILSVRC/imagenet-1k), or 'photographs' for the built-in set."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Local folder: images, parquet files, or a saved `datasets` dataset."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the Hub dataset."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where `datasets` keeps downloads."})
    train_split: str = field(default="train", metadata={"help": "Split to take images from."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only this many images, spread evenly over the data set."}
    )
    max_unreadable_fraction: float = field(
        default=0.01, metadata={"help": "Share of unreadable images that is skipped; with more of them, stop."}
    )
    jpeg_draft: bool = field(
        default=False,
        metadata={"help": "Halve large JPEG files while they are decoded: faster, the pixels differ a little."},
    )
    fast_resize: bool = field(
        default=False,
        metadata={"help": "Resize images with torch's 8-bit kernels: faster, off by a few grey levels at most."},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Loader processes; 0 loads in the main one."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError(
                f"`--dataset_name` is {self.dataset_name!r} and `--train_data_dir` is {self.train_data_dir!r},"
                " allowed: one of them."
            )
        if self.train_data_dir is not None and not Path(self.train_data_dir).is_dir():
            raise ValueError(f"`--train_data_dir` is {self.train_data_dir!r}, allowed: a folder that exists.")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(f"`--max_train_samples` is {self.max_train_samples}, allowed: integers from 1 on.")
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"`--dataloader_num_workers` is {self.dataloader_num_workers}, allowed: integers from 0 on."
            )

    @property
    def data_source(self) -> str | None:
        """Where the images are, as [`softvq_hf.data.load_image_dataset`] takes it."""
        return self.dataset_name if self.dataset_name is not None else self.train_data_dir


@dataclass(kw_only=True)
class TrainingArguments(DataArguments):
    """
    What all training scripts take. `__post_init__` raises `ValueError` for values that cannot work.

    A "step" is one optimizer update everywhere: in `max_train_steps`, in the names of checkpoints and in logs.
    """

    output_dir: str = field(metadata={"help": "Folder for the result, checkpoints, metrics and pictures."})

    # batches
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset. Needs --max_train_steps."})
    resolution: int = field(default=256, metadata={"help": "Side of the square training images in pixels."})
    train_batch_size: int = field(default=32, metadata={"help": "Images per process and forward pass."})

    # optimization
    max_train_steps: int | None = field(default=None, metadata={"help": "Optimizer updates in all."})
    num_train_epochs: int | None = field(
        default=None, metadata={"help": "Passes over the data; --max_train_steps wins where both are given."}
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Batches per optimizer update; 1 unless --global_batch_size says otherwise."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images per update over all processes, which decides --gradient_accumulation_steps."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for activation memory."})
    compile: bool = field(default=False, metadata={"help": "torch.compile of the repeated transformer blocks."})
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "Optimizer by name: torch's fused kernels (adam_fused and adamw_fused are the same as adam and"
            " adamw), or 8-bit states (package bitsandbytes).",
            "choices": ["adam", "adamw", "adam_fused", "adamw_fused", "adam_8bit", "adamw_8bit"],
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_base_batch_size: int | None = field(
        default=None,
        metadata={"help": "If given, learning rates are multiplied by the global batch size over this number."},
    )
    lr_scheduler: str = field(
        default="constant",
        metadata={
            "help": "Schedule of diffusers' get_scheduler, or cosine_with_min_lr (cosine over the whole run down to"
            " --min_lr, its first --lr_warmup_steps replaced by a linear warm-up from --lr_warmup_start).",
            "choices": [
                "constant",
                "constant_with_warmup",
                "linear",
                "cosine",
                "cosine_with_restarts",
                "polynomial",
                "cosine_with_min_lr",
            ],
        },
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Updates of linear warm-up."})
    lr_warmup_start: float = field(default=0.0, metadata={"help": "First learning rate of cosine_with_min_lr."})
    min_lr: float = field(default=0.0, metadata={"help": "Last learning rate of cosine_with_min_lr."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of the first moment."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay of the second moment."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of adamw."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Added to the root of the second moment."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Global norm gradients are clipped to; 0 = off."})
    use_ema: bool = field(default=True, metadata={"help": "Average the weights; the average is what is saved."})
    ema_decay: float = field(default=0.9999, metadata={"help": "Constant decay of the average per update."})
    max_nonfinite_batches: int = field(
        default=10,
        metadata={"help": "Batches with a loss or gradient that is not finite are left out, up to so many."},
    )

    # machine
    seed: int = field(default=42, metadata={"help": "Seed of initial weights, data order and all random draws."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Autocast dtype; by default what accelerate is configured to.",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    allow_tf32: bool = field(default=False, metadata={"help": "TF32 matrix products on Ampere GPUs and newer."})

    # checkpoints, logs, pictures
    checkpointing_steps: int = field(default=500, metadata={"help": "Updates between checkpoints."})
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints kept; the oldest go."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'latest' in --output_dir (a fresh start if none)."}
    )
    logging_steps: int = field(default=1, metadata={"help": "Updates between lines of metrics.jsonl."})
    logging_dir: str = field(default="logs", metadata={"help": "Tracker files, relative to --output_dir."})
    report_to: str = field(
        default="tensorboard", metadata={"help": "Trackers of accelerate, separated by commas, 'all' or 'none'."}
    )
    tracker_project_name: str | None = field(default=None, metadata={"help": "Project name in the tracker."})
    validation_steps: int = field(default=500, metadata={"help": "Updates between validations; 0 = never."})

    # Hub
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository; by default named as --output_dir."})
    hub_token: str | None = field(default=None, metadata={"help": "Write token; better: log in before."})
    hub_private: bool = field(default=False, metadata={"help": "Create the repository as a private one."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            *("resolution", "train_batch_size", "max_train_steps", "num_train_epochs", "gradient_accumulation_steps"),
            *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "lr_base_batch_size"),
            "global_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` is {value}, allowed: integers from 1 on.")
        for name in ("lr_warmup_steps", "validation_steps", "seed", "max_nonfinite_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 0 on.")
        if self.seed >= 2**32:
            raise ValueError(f"`--seed` is {self.seed}, allowed: up to {2**32 - 1}.")
        for name in ("lr_warmup_start", "min_lr", "adam_weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: finite numbers from 0 on.")
        for name in ("learning_rate", "adam_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: finite numbers above 0.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: [0, 1).")
        if self.max_train_steps is None and self.num_train_epochs is None:
            raise ValueError("Neither `--max_train_steps` nor `--num_train_epochs` is given, one of them is needed.")
        if not self.optimizer.startswith("adamw") and self.adam_weight_decay > 0:
            raise ValueError(
                f"`--adam_weight_decay` is {self.adam_weight_decay}, allowed with `--optimizer {self.optimizer}`: 0."
                " Decoupled decay is what the optimizers named adamw have."
            )
        if self.streaming and self.max_train_steps is None:
            raise ValueError("`--streaming` needs `--max_train_steps`: the length of a stream is not known.")
        if self.max_train_steps is not None:
            self.check_length(self.max_train_steps)
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            raise ValueError(
                f"`--lr_warmup_steps` is {self.lr_warmup_steps}, allowed with `--lr_scheduler constant`: 0;"
                " constant_with_warmup has a warm-up."
            )
        if self.lr_scheduler != "cosine_with_min_lr" and (self.min_lr or self.lr_warmup_start):
            raise ValueError(
                f"`--min_lr` is {self.min_lr} and `--lr_warmup_start` is {self.lr_warmup_start}, which only"
                f" `--lr_scheduler cosine_with_min_lr` honours; `--lr_scheduler` is {self.lr_scheduler!r}."
            )
        for name in ("min_lr", "lr_warmup_start"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(
                    f"`--{name}` is {getattr(self, name)}, allowed: up to `--learning_rate` {self.learning_rate}."
                )
        if self.hub_token is not None and set(self.report_to.split(",")) - {"none", "tensorboard"}:
            raise ValueError(
                f"`--hub_token` together with `--report_to {self.report_to}` would show the token in the tracker,"
                " which records the command line: log in with `hf auth login` instead."
            )

    def check_length(self, max_train_steps: int) -> None:
        """
        Check the arguments that count updates against the length of the run, which may follow from the data.

        Raises:
            ValueError: If something would begin or last beyond the last update.
        """
        if self.lr_warmup_steps > max_train_steps:
            raise ValueError(
                f"`--lr_warmup_steps` is {self.lr_warmup_steps}, allowed: up to the number of updates,"
                f" {max_train_steps}."
            )

    def resolve_accumulation(self, num_processes: int) -> int:
        """
        Batches per update, from `global_batch_size` where that is given.

        Raises:
            ValueError: If `global_batch_size` cannot be made of whole batches, or contradicts
                `gradient_accumulation_steps`.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps or 1
        batch_size = self.train_batch_size * num_processes
        if self.global_batch_size % batch_size != 0:
            raise ValueError(
                f"`--global_batch_size` is {self.global_batch_size}, allowed: multiples of {batch_size}, which are"
                f" `--train_batch_size` {self.train_batch_size} on {num_processes} process(es)."
            )
        steps = self.global_batch_size // batch_size
        if self.gradient_accumulation_steps not in (None, steps):
            raise ValueError(
                f"`--gradient_accumulation_steps` is {self.gradient_accumulation_steps}, allowed with"
                f" `--global_batch_size` {self.global_batch_size}, `--train_batch_size` {self.train_batch_size} and"
                f" {num_processes} process(es): {steps}, or leave it out."
            )
        return steps

    @property
    def repo_id(self) -> str:
        """The repository on the Hub, or the folder where nothing is uploaded: what the model card tells to load."""
        if not self.push_to_hub:
            return self.output_dir
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def dataset_options(self) -> dict[str, Any]:
        """The arguments of [`softvq_hf.data.load_image_dataset`] that training and validation images share."""
        return {
            "resolution": self.resolution,
            "config_name": self.dataset_config_name,
            "image_column": self.image_column,
            "streaming": self.streaming,
            "cache_dir": self.cache_dir,
            "revision": self.revision,
            "seed": self.seed,
            "max_unreadable_fraction": self.max_unreadable_fraction,
        }

    def to_dict(self) -> dict[str, Any]:
        """All arguments except the Hub token: what is written to `args.yaml` and can be read again by `--config`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"}


def parse_args(dataclass_type: type[T], argv: list[str] | None = None, prog: str | None = None) -> T:
    """
    Fill a dataclass of arguments from `--config file.yaml` and the command line, which wins.

    Args:
        dataclass_type (`type`): Dataclass whose fields are the arguments. A field named `model` of the type
            `dict | str | None` is given as a mapping in YAML and as a JSON object on the command line; the object is
            merged over the mapping.
        argv (`list[str]`, *optional*): Arguments, by default those of the process.
        prog (`str`, *optional*): The command in its help and usage errors, by default the name of the script.

    Returns:
        An instance of `dataclass_type`.

    Raises:
        ValueError: If the file is missing or no mapping, a key or flag is unknown, or the dataclass refuses a value.
        SystemExit: As argparse does, if a value cannot be converted to the type of its argument.
    """
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_namespace, command_line = config_parser.parse_known_args(argv)
    config_path = config_namespace.config

    parser = HfArgumentParser(dataclass_type, prog=prog, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of arguments; flags on the command line win.")
    config = {} if config_path is None else _read_yaml(config_path)

    known = {item.name for item in dataclasses.fields(dataclass_type)}
    types = get_type_hints(dataclass_type)
    model_is_mapping = dict in get_args(types.get("model"))
    from_file, empty = [], {}
    for name, value in config.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`--config` {config_path} has the key {name!r}, which this script does not know.{hint}")
        if value is None:
            if type(None) not in get_args(types[name]):
                raise ValueError(f"`--config` {config_path} leaves `{name}` empty, it needs a value.")
            empty[name] = None
        elif isinstance(value, dict):
            if not (name == "model" and model_is_mapping):
                raise ValueError(f"`--config` {config_path} gives a mapping for `{name}`, it needs a single value.")
        elif isinstance(value, list):
            from_file += [f"--{name}", *map(str, value)]
        else:
            # one token, so that negative numbers are no flags
            from_file.append(f"--{name}={value}")

    # values of the file come first on the line: they are converted as flags are, and later flags win
    parser.set_defaults(**empty)
    namespace, unknown = parser.parse_known_args(from_file + command_line)
    if unknown:
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}. `--help` lists the known ones.")
    values = vars(namespace)
    values.pop("config")
    if model_is_mapping:
        values["model"] = _merge_model(config.get("model"), values["model"])
    return dataclass_type(**values)


def _read_yaml(path: str, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file, over that of its `base`; `derived` are the files that name this one as theirs."""
    if not Path(path).is_file():
        named_by = f"`base` of {derived[-1]}" if derived else "`--config`"
        raise ValueError(f"{named_by} is {str(path)!r}, allowed: a YAML file that exists.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` {path} is no valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"`--config` {path} holds {type(config).__name__}, allowed: a mapping of arguments.")
    if "base" not in config:
        return config

    base_path = Path(path).parent / str(config.pop("base"))
    derived = (*derived, Path(path).resolve())
    if base_path.resolve() in derived:
        raise ValueError(f"`base` of {path} is {base_path}, which is based on {path} itself.")
    base = _read_yaml(base_path, derived)
    if isinstance(base.get("model"), dict) and isinstance(config.get("model"), dict):
        config["model"] = {**base["model"], **config["model"]}
    return {**base, **config}


def _merge_model(from_file: Any, from_command_line: str | None) -> dict[str, Any] | None:
    if from_file is not None and not isinstance(from_file, dict):
        raise ValueError(f"`model` is {from_file!r} in the configuration file, allowed: a mapping.")
    # a string that comes from the file would have been refused above, so this one is from the command line
    if from_command_line is None or isinstance(from_command_line, dict):
        return from_file if from_command_line is None else from_command_line
    try:
        overrides = json.loads(from_command_line)
    except json.JSONDecodeError as error:
        raise ValueError(f"`--model` is {from_command_line!r}, allowed: a JSON object. {error}") from error
    if overrides is None:
        return None
    if not isinstance(overrides, dict):
        raise ValueError(f"`--model` is {from_command_line!r}, allowed: a JSON object, or null for none.")
    return {**(from_file or {}), **overrides}


def check_model_config(model_class: type[ModelMixin], config: dict[str, Any]) -> None:
    """
    Check the names in a model configuration against the arguments of the model class.

    Raises:
        ValueError: If `config` has a key that `model_class` does not take; the values are checked by the class itself.
    """
    allowed = [name for name in inspect.signature(model_class.__init__).parameters if name != "self"]
    unknown = sorted(set(config) - set(allowed))
    if unknown:
        raise ValueError(
            f"`model` has {', '.join(map(repr, unknown))}, allowed for {model_class.__name__}: {', '.join(allowed)}."
        )


def check_output_dir(output_dir: str) -> None:
    """
    Create `output_dir` where it is missing and try to write there, before any work is done that could be lost.

    Raises:
        ValueError: If the folder cannot be created or written.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"`--output_dir` is {output_dir!r}, allowed: a folder that can be written. {error}"
        ) from error
