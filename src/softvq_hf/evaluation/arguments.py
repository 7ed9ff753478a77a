"""What the evaluations share of their arguments: images, feature networks, and how to run."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.data import Dataset

from softvq_hf.data import load_image_dataset
from softvq_hf.metrics.features import FeatureExtractor, FeatureWeightsUnavailable, load_feature_extractor
from softvq_hf.metrics.images import ROUNDINGS, check_rounding
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.generator import load_tokenizer


# Labels that belong to one network each, and its name.
RESERVED_LABELS = {"Inception": "inception", "DINOv2": "dinov2"}
MIXED_PRECISIONS = ("no", "fp16", "bf16")


@dataclass(kw_only=True)
class EvaluationDataArguments:
    """Real images to evaluate on. `__post_init__` raises `ValueError` for values that cannot work."""

    dataset: str = field(
        metadata={"help": "Images: a local folder, a dataset id on the Hub, or 'photographs' for the built-in set."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    split: str = field(default="validation", metadata={"help": "Split to take images from."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the Hub dataset."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where `datasets` keeps downloads."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Use only this many images, spread evenly over the data set."}
    )
    max_unreadable_fraction: float = field(
        default=0.01, metadata={"help": "Share of unreadable images that is left out; with more of them, stop."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Loader processes; 0 loads in the main one."})

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 2:
            raise ValueError(f"`--max_samples` is {self.max_samples}, allowed: integers from 2 on.")
        if not 0 <= self.max_unreadable_fraction <= 1:
            raise ValueError(f"`--max_unreadable_fraction` is {self.max_unreadable_fraction}, allowed: [0, 1].")
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"`--dataloader_num_workers` is {self.dataloader_num_workers}, allowed: integers from 0 on."
            )

    def load_dataset(self, resolution: int, label_column: str | None = None) -> Dataset:
        """
        The images after the ADM centre crop, as [`softvq_hf.data.load_image_dataset`] gives them.

        Args:
            resolution (`int`): Side of the square images in pixels.
            label_column (`str`, *optional*): Column of the class labels; `None` takes no labels.

        Raises:
            ValueError: As [`softvq_hf.data.load_image_dataset`].
        """
        return load_image_dataset(
            self.dataset,
            split=self.split,
            resolution=resolution,
            train=False,
            config_name=self.dataset_config_name,
            image_column=self.image_column,
            label_column=label_column,
            cache_dir=self.cache_dir,
            revision=self.revision,
            max_samples=self.max_samples,
            max_unreadable_fraction=self.max_unreadable_fraction,
        )

    def data_record(self) -> dict[str, str | int | None]:
        """Which images these are, for the record of a result. Of a local folder, the name."""
        is_folder = Path(self.dataset).is_dir()
        return {
            "name": Path(self.dataset).resolve().name if is_folder else self.dataset,
            "config_name": self.dataset_config_name,
            "split": self.split,
            "revision": self.revision,
            "max_samples": self.max_samples,
        }


@dataclass(kw_only=True)
class TokenizerArguments:
    """A tokenizer and the size of its images. `__post_init__` raises `ValueError` for values that cannot work."""

    model: str = field(
        metadata={"help": "Tokenizer, AutoencoderSoftVQ or diffusers' AutoencoderKL: a local folder or a Hub id."}
    )
    subfolder: str | None = field(
        default=None, metadata={"help": "Folder of the tokenizer inside of --model: 'vae' in a pipeline."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; by default what the tokenizer takes."}
    )

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"`--resolution` is {self.resolution}, allowed: integers from 1 on.")

    def load_tokenizer(self) -> AutoencoderSoftVQ | AutoencoderKL:
        """
        The tokenizer, in eval mode.

        Raises:
            ValueError: As [`~softvq_hf.training.generator.load_tokenizer`].
            OSError: If there is none.
        """
        try:
            return load_tokenizer(self.model, subfolder=self.subfolder)
        except OSError as error:
            is_pipeline = self.subfolder is None and Path(self.model, "model_index.json").is_file()
            hint = " It is a pipeline, whose tokenizer is at `--subfolder vae`." if is_pipeline else ""
            raise OSError(f"`--model` is {self.model!r}, which cannot be loaded.{hint} {error}") from error


@dataclass(kw_only=True)
class FeatureArguments:
    """Networks whose features are compared. `__post_init__` raises `ValueError` for values that cannot work."""

    feature_extractor: list[str] = field(
        default_factory=lambda: ["inception"],
        metadata={
            "help": "Networks for the Fréchet distance and what belongs to it, one or more: inception (FID, the"
            " published protocol), dinov2, a folder or Hub id of a transformers vision model; or none."
        },
    )
    inception_weights: str | None = field(
        default=None,
        metadata={"help": "File of the Inception weights; by default it is downloaded to torch's hub cache."},
    )

    def __post_init__(self) -> None:
        if len(set(self.feature_extractor)) < len(self.feature_extractor):
            raise ValueError(f"`--feature_extractor` is {' '.join(self.feature_extractor)}, allowed: each name once.")
        if "none" in self.feature_extractor and len(self.feature_extractor) > 1:
            raise ValueError(f"`--feature_extractor` is {' '.join(self.feature_extractor)}, allowed: none by itself.")
        if not self.feature_extractor:
            raise ValueError("`--feature_extractor` is empty, allowed: one name or more, or none.")
        if self.inception_weights is not None and "inception" not in self.feature_extractor:
            raise ValueError(
                f"`--inception_weights` is {self.inception_weights!r}, allowed with `--feature_extractor"
                f" {' '.join(self.feature_extractor)}`: none."
            )
        if self.inception_weights is not None and not Path(self.inception_weights).is_file():
            raise ValueError(f"`--inception_weights` is {self.inception_weights!r}, allowed: a file that exists.")

    def load_feature_extractors(self, device: torch.device) -> list[FeatureExtractor]:
        """
        The networks, in the order of their names; an empty list for "none".

        Args:
            device (`torch.device`): Where they go.

        Raises:
            ValueError: If one is no such network, or two would have the same label.
            OSError: If weights are missing and cannot be downloaded.
        """
        extractors = []
        for name in self.feature_extractor:
            if name == "none":
                continue
            weights_path = self.inception_weights if name == "inception" else None
            try:
                extractor = load_feature_extractor(name, weights_path=weights_path)
            except FeatureWeightsUnavailable as error:
                option = " For an evaluation that is `--inception_weights`." if name == "inception" else ""
                raise FeatureWeightsUnavailable(f"{error}{option} `--feature_extractor none` does without.") from error
            for label, owner in RESERVED_LABELS.items():
                if name != owner and extractor.label.lower() == label.lower():
                    raise ValueError(
                        f"`--feature_extractor` is {name!r}, allowed: a folder of another name. Figures are called"
                        f" after it, and those of {label} belong to one network."
                    )
            extractors.append(extractor.to(device))
        labels = [extractor.label for extractor in extractors]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"`--feature_extractor` is {' '.join(self.feature_extractor)}, whose figures would be called after"
                f" {', '.join(labels)}, allowed: networks of different names."
            )
        return extractors


@dataclass(kw_only=True)
class EvaluationArguments(FeatureArguments):
    """What every evaluation of a model takes. `__post_init__` raises `ValueError` for values that cannot work."""

    batch_size: int = field(default=32, metadata={"help": "Images per process and forward pass."})
    mixed_precision: str = field(
        default="no", metadata={"help": "Autocast dtype of the model.", "choices": list(MIXED_PRECISIONS)}
    )
    rounding: str = field(
        default="round",
        metadata={
            "help": "How the model's images become 8-bit ones: round, to the nearest value, or truncate.",
            "choices": list(ROUNDINGS),
        },
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the result."})
    update_model_card: bool = field(
        default=False, metadata={"help": "Write the figures into the model-index of the model's local README.md."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"`--batch_size` is {self.batch_size}, allowed: integers from 1 on.")
        if self.mixed_precision not in MIXED_PRECISIONS:
            raise ValueError(
                f"`--mixed_precision` is {self.mixed_precision!r}, allowed: {', '.join(MIXED_PRECISIONS)}."
            )
        check_rounding(self.rounding)

    def precision_in_words(self) -> str:
        """How the model computes and its images become 8-bit ones, for the name of a protocol."""
        rounding = {"round": "rounded", "truncate": "truncated"}[self.rounding]
        return f"{rounding} to 8 bits" + ("" if self.mixed_precision == "no" else f", {self.mixed_precision}")
