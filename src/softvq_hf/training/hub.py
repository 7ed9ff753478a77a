"""Folders for the Hugging Face Hub: export with sources, model cards, upload.

diffusers loads a pipeline whose classes it does not know only if their source lies in the repository: a `.py` file
beside the weights of each component, and the pipeline file at the top. [`export_pipeline`] writes such a folder.
"""

import importlib.metadata
import inspect
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, upload_folder


CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def export_pipeline(pipeline: DiffusionPipeline, output_dir: str | Path, model_card: ModelCard | None = None) -> None:
    """
    Write a pipeline with the source of its classes, so that plain diffusers loads it, from disk or from the Hub:
    `DiffusionPipeline.from_pretrained(output_dir, trust_remote_code=True)`.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline of this library, also one that was loaded from an exported folder.
        output_dir (`str` or `Path`): The folder; it is made if needed.
        model_card (`ModelCard`, *optional*): Saved as `README.md`; by default [`pipeline_card`] of the pipeline.
    """
    output_dir = Path(output_dir)
    pipeline.save_pretrained(output_dir)

    index_file = output_dir / pipeline.config_name
    index = json.loads(index_file.read_text())
    for name in pipeline.components:
        library, class_name = index[name]
        if library == "diffusers":
            continue
        source = Path(sys.modules[library].__file__)
        shutil.copyfile(source, output_dir / name / source.name)
        index[name] = [source.stem, class_name]

    pipeline_file = Path(inspect.getsourcefile(type(pipeline)))
    shutil.copyfile(pipeline_file, output_dir / pipeline_file.name)
    index["_class_name"] = [pipeline_file.stem, type(pipeline).__name__]
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    if model_card is None:
        model_card = pipeline_card(pipeline, repo_id=str(output_dir))
    model_card.save(output_dir / "README.md")


def export_tokenizer(tokenizer: ModelMixin, output_dir: str | Path, model_card: ModelCard | None = None) -> None:
    """
    Write a tokenizer alone: weights, config and card. `AutoencoderSoftVQ.from_pretrained(output_dir)` loads it.

    Args:
        tokenizer ([`AutoencoderSoftVQ`]): The tokenizer.
        output_dir (`str` or `Path`): The folder; it is made if needed.
        model_card (`ModelCard`, *optional*): Saved as `README.md`; by default [`tokenizer_card`] of the tokenizer.
    """
    tokenizer.save_pretrained(output_dir)
    if model_card is None:
        model_card = tokenizer_card(tokenizer, repo_id=str(output_dir))
    model_card.save(Path(output_dir) / "README.md")


def tokenizer_card(
    tokenizer: ModelMixin,
    *,
    repo_id: str,
    dataset_name: str | None = None,
    evaluation_dataset: str | None = None,
    training_settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """
    The model card of a tokenizer.

    Args:
        tokenizer ([`AutoencoderSoftVQ`]): The tokenizer.
        repo_id (`str`): Hub repository or folder that the card's code example loads.
        dataset_name (`str`, *optional*): The training data.
        evaluation_dataset (`str`, *optional*):
            What `metrics` were measured on, such as "the 500 images of its validation split"; by default
            `dataset_name`.
        training_settings (`Mapping`, *optional*):
            Settings of the run by name. `None` values and `hub_token` are left out.
        metrics (`Mapping` of `str` to `float`, *optional*): Measured values by metric.
        base_model (`str`, *optional*): Hub repository of the model that training started from.

    Returns:
        `ModelCard`: with metadata (licence apache-2.0, `metrics` as model-index).

    Raises:
        ValueError: If `metrics` come without a data set.
    """
    sample_size = tokenizer.config.sample_size
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return _model_card(
        ModelCardData(
            license="apache-2.0",
            library_name="diffusers",
            pipeline_tag="image-feature-extraction",
            tags=["softvq-hf", "image-tokenizer", "autoencoder"],
            base_model=base_model,
        ),
        task_type="image-reconstruction",
        repo_id=repo_id,
        dataset_name=dataset_name,
        evaluation_dataset=evaluation_dataset,
        training_settings=training_settings,
        metrics=metrics,
        base_model=base_model,
        is_pipeline=False,
        quantizer=tokenizer.config.quantizer,
        height=height,
        width=width,
        in_channels=tokenizer.config.in_channels,
        num_tokens=tokenizer.config.num_latent_tokens,
        num_channels=tokenizer.config.latent_channels,
        num_parameters=tokenizer.num_parameters(),
    )


def pipeline_card(
    pipeline: DiffusionPipeline,
    *,
    repo_id: str,
    dataset_name: str | None = None,
    evaluation_dataset: str | None = None,
    training_settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """
    The model card of a generator with its tokenizer, as [`export_pipeline`] writes it.

    Args:
        pipeline ([`SoftVQPipeline`]): The pipeline; its tokenizer is an [`AutoencoderSoftVQ`].
        repo_id (`str`): Hub repository or folder that the card's code example loads.
        dataset_name (`str`, *optional*): The training data.
        evaluation_dataset (`str`, *optional*): What `metrics` were measured on; by default `dataset_name`.
        training_settings (`Mapping`, *optional*):
            Settings of the run by name. `None` values and `hub_token` are left out.
        metrics (`Mapping` of `str` to `float`, *optional*): Measured values by metric.
        base_model (`str`, *optional*): Hub repository of the model that training started from.

    Returns:
        `ModelCard`: with metadata (licence apache-2.0, `metrics` as model-index).

    Raises:
        ValueError: If `metrics` come without a data set.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    sample_size = vae.config.sample_size
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return _model_card(
        ModelCardData(
            license="apache-2.0",
            library_name="diffusers",
            pipeline_tag="unconditional-image-generation",
            tags=["softvq-hf", "class-conditional-image-generation"],
            base_model=base_model,
        ),
        task_type="class-conditional-image-generation",
        repo_id=repo_id,
        dataset_name=dataset_name,
        evaluation_dataset=evaluation_dataset,
        training_settings=training_settings,
        metrics=metrics,
        base_model=base_model,
        is_pipeline=True,
        predicts_variance=pipeline.predicts_variance,
        height=height,
        width=width,
        num_tokens=transformer.config.num_tokens,
        num_channels=transformer.config.in_channels,
        num_classes=transformer.config.num_classes,
        num_parameters=transformer.num_parameters() + vae.num_parameters(),
        num_tokenizer_parameters=vae.num_parameters(),
    )


def _model_card(
    card_data: ModelCardData,
    task_type: str,
    repo_id: str,
    dataset_name: str | None,
    evaluation_dataset: str | None,
    training_settings: Mapping[str, Any] | None,
    metrics: Mapping[str, float] | None,
    **template_values: Any,
) -> ModelCard:
    """Fill the template, and put the metrics into the metadata as well."""
    evaluation_dataset = evaluation_dataset or dataset_name
    if metrics:
        if evaluation_dataset is None:
            raise ValueError(
                "`evaluation_dataset` and `dataset_name` are None, allowed with `metrics`: a name of the data they "
                "were measured on, in one of the two."
            )
        card_data.model_name = repo_id
        card_data.eval_results = [
            EvalResult(
                task_type=task_type,
                dataset_type=re.sub(r"[^\w./-]+", "-", evaluation_dataset),
                dataset_name=evaluation_dataset,
                metric_type=name,
                metric_value=float(value),
            )
            for name, value in metrics.items()
        ]

    settings = {
        name: str(value).replace("|", r"\|")
        for name, value in (training_settings or {}).items()
        if value is not None and name != "hub_token"
    }
    libraries = ("softvq-hf", "diffusers", "torch", "accelerate", "datasets", "transformers")
    return ModelCard.from_template(
        card_data,
        template_path=str(CARD_TEMPLATE),
        repo_id=repo_id,
        dataset_name=dataset_name,
        evaluation_dataset=evaluation_dataset,
        training_settings=settings,
        metrics={name: f"{value:.4g}" for name, value in (metrics or {}).items()},
        versions={library: importlib.metadata.version(library) for library in libraries},
        **template_values,
    )


def push_folder(
    repo_id: str,
    folder: str | Path,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
) -> str:
    """
    Upload a folder to a model repository on the Hub, which is made if needed. Training checkpoints (`checkpoint-*`),
    tracker files (`logs`) and hidden files stay behind.

    Args:
        repo_id (`str`): The repository, `"user/name"`; without a user, one's own.
        folder (`str` or `Path`): The folder, such as one that [`export_pipeline`] has written.
        token (`str`, *optional*): A token with write access; by default that of `hf auth login`.
        private (`bool`, *optional*): Whether a new repository is private; by default as one's account is set.
        commit_message (`str`, *optional*, defaults to `"Upload model"`): The first line of the commit.

    Returns:
        `str`: the address of the repository.

    Raises:
        ValueError: If `folder` is not a folder, or has no `README.md`. Nothing has been sent then.
    """
    folder = Path(folder)
    if not (folder / "README.md").is_file():
        raise ValueError(
            f"`folder` is {str(folder)!r}, allowed: an existing folder with a model card README.md, as "
            "`export_pipeline` and `export_tokenizer` write it."
        )
    repo = create_repo(repo_id, token=token, private=private, exist_ok=True)
    upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        token=token,
        commit_message=commit_message,
        ignore_patterns=["checkpoint-*/**", "logs/**", ".*", "**/.*"],
    )
    return str(repo)
