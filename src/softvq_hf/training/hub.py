"""Folders for the Hugging Face Hub: export with sources, model cards, upload.

diffusers loads a class which it does not know only if its source lies in the repository: for a pipeline a `.py` file
beside the weights of each component, and the pipeline file at the top; for a model alone its source beside the config,
which names it. [`export_pipeline`] and [`export_model`] write such folders, [`push_to_hub`] uploads them.
"""

import inspect
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, file_exists, upload_folder

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.generator import get_image_size
from softvq_hf.training.logging import ARGUMENTS_FILE, RUN_FILE, library_versions, without_hub_token, write_atomically


CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
# Kinds of generators as the cards name them
PAPERS = {
    "DiT": "[DiT](https://arxiv.org/abs/2212.09748)",
    "SiT": "[SiT](https://arxiv.org/abs/2401.08740)",
    "MAR": "[MAR](https://arxiv.org/abs/2406.11838)",
}


# Folders


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


def export_model(model: ModelMixin, output_dir: str | Path, model_card: ModelCard | None = None) -> None:
    """
    Write a tokenizer or a transformer alone, with its source, so that plain diffusers loads it, from disk or from the
    Hub: `diffusers.AutoModel.from_pretrained(output_dir, trust_remote_code=True)`. With this package,
    `AutoencoderSoftVQ.from_pretrained(output_dir)` needs no flag and leaves the source alone.

    Args:
        model ([`~diffusers.ModelMixin`]):
            A model of this library, also one that was loaded from an exported folder. A model of diffusers is written
            without a source; it needs a `model_card`.
        output_dir (`str` or `Path`): The folder; it is made if needed.
        model_card (`ModelCard`, *optional*):
            Saved as `README.md`; by default [`tokenizer_card`] or [`generator_card`] of the model.

    Raises:
        ValueError: If there is no `model_card` for a model of diffusers. Nothing has been written then.
    """
    output_dir = Path(output_dir)
    if model_card is None:
        model_card = _default_card(model, repo_id=str(output_dir))
    model.save_pretrained(output_dir)

    if not _is_of_diffusers(model):
        source = Path(sys.modules[type(model).__module__].__file__)
        shutil.copyfile(source, output_dir / source.name)
        config_file = output_dir / model.config_name
        config = json.loads(config_file.read_text())
        config["auto_map"] = {"AutoModel": f"{source.stem}.{type(model).__name__}"}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model_card.save(output_dir / "README.md")


# Upload


def push_to_hub(
    model: ModelMixin | DiffusionPipeline,
    repo_id: str,
    *,
    model_card: ModelCard | None = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Export a tokenizer, a transformer or a pipeline and upload it to the Hub, where plain diffusers can load it.

    Args:
        model ([`~diffusers.ModelMixin`] or [`~diffusers.DiffusionPipeline`]):
            What [`export_model`] or [`export_pipeline`] takes.
        repo_id (`str`): The repository, `"user/name"`, which is made if needed; without a user, one's own.
        model_card (`ModelCard`, *optional*):
            By default the card that the repository has, or that of [`export_model`] or [`export_pipeline`]. Give one
            to tell data, metrics and how it was trained: [`tokenizer_card`], [`generator_card`], [`pipeline_card`].
        token (`str`, *optional*): A token with write access; by default that of `hf auth login`.
        private (`bool`, *optional*): Whether a new repository is private; by default as one's account is set.
        commit_message (`str`, *optional*): The first line of the commit, by default "Upload" and the class.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead of a commit.

    Returns:
        `str`: the address of the repository, or of the pull request.

    Raises:
        ValueError: If there is no card for a model of diffusers.
    """
    if model_card is None:
        _default_card(model, repo_id)  # an error, if there is one, before the repository is made
    repo_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
    if model_card is None and file_exists(repo_id, "README.md", token=token):
        model_card = ModelCard.load(repo_id, token=token)
    export = export_pipeline if isinstance(model, DiffusionPipeline) else export_model
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder, model_card or _default_card(model, repo_id))
        return push_folder(
            repo_id,
            folder,
            token=token,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            create_pr=create_pr,
        )


def create_run_repo(accelerator: Accelerator, args: TrainingArguments) -> str | None:
    """
    Make the repository of a training run before its work, so that a token that cannot write is an error then.

    Args:
        accelerator (`Accelerator`): The main process makes it.
        args (`TrainingArguments`): `push_to_hub`, `repo_id`, `hub_token` and `hub_private`.

    Returns:
        `str` or `None`: the id of the repository, on the main process with its owner.
    """
    if not (args.push_to_hub and accelerator.is_main_process):
        return args.repo_id
    return create_repo(args.repo_id, token=args.hub_token, private=args.hub_private or None, exist_ok=True).repo_id


def push_folder(
    repo_id: str,
    folder: str | Path,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> str:
    """
    Upload a folder to a model repository on the Hub, which is made if needed. Training checkpoints (`checkpoint-*`),
    tracker files (`logs`), the record of the run (`run.json`, which names folders of this machine), the list of
    unreadable images and hidden files stay behind. A card that was written for a folder, with its path in the title
    and in the code, is changed to name the repository.

    Args:
        repo_id (`str`): The repository, `"user/name"`; without a user, one's own.
        folder (`str` or `Path`): The folder, such as one that [`export_pipeline`] has written.
        token (`str`, *optional*): A token with write access; by default that of `hf auth login`.
        private (`bool`, *optional*): Whether a new repository is private; by default as one's account is set.
        commit_message (`str`, *optional*, defaults to `"Upload model"`): The first line of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead of a commit.

    Returns:
        `str`: the address of the repository, or of the pull request.

    Raises:
        ValueError: If `folder` is not a folder, or has no `README.md`. Nothing has been sent then.
    """
    folder = Path(folder)
    if not (folder / "README.md").is_file():
        raise ValueError(
            f"`folder` is {str(folder)!r}, allowed: an existing folder with a model card README.md, as "
            "`export_pipeline` and `export_model` write it."
        )
    repo = create_repo(repo_id, token=token, private=private, exist_ok=True)
    _name_repository(folder / "README.md", repo.repo_id)
    commit = upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        token=token,
        commit_message=commit_message,
        create_pr=create_pr,
        ignore_patterns=["checkpoint-*/**", "logs/**", RUN_FILE, "unreadable_images.txt", ".*", "**/.*"],
    )
    return commit.pr_url or str(repo)


def _name_repository(card_file: Path, repo_id: str) -> None:
    """Let a card that names a folder of this machine, in its title and its code, name the repository."""
    card = ModelCard.load(card_file)
    title = re.search(r"^# (.+)$", card.text, flags=re.MULTILINE)
    if title is None or title[1] == repo_id or not Path(title[1]).expanduser().exists():
        return
    text = card.text.replace(title[0], f"# {repo_id}", 1)
    card.text = text.replace(f"from_pretrained({json.dumps(title[1])}", f"from_pretrained({json.dumps(repo_id)}")
    if card.data.model_name == title[1]:
        card.data.model_name = repo_id
    card.save(card_file)


# Cards


class CardFacts(TypedDict, total=False):
    """
    What a model card tells beyond the model itself. All are optional; nothing is claimed that is not given. Of an
    absolute path the card has the last part only.

    Args:
        dataset_name (`str`):
            The training data. A data set on the Hub (`"owner/name"`, and no folder of that name here) is linked and
            goes into the metadata.
        metrics (`Mapping` of `str` to `float`):
            Measured values by metric; they become the model-index. `evaluation_protocol` must come along.
        evaluation_dataset (`str`):
            What they were measured on, such as "the validation split of ILSVRC/imagenet-1k"; by default
            `dataset_name`.
        num_evaluation_images (`int`): The number of images they were measured on.
        evaluation_protocol (`str`):
            How they were measured, in words: crop and size of the images, range of the pixels, mean over what,
            features and reference set of an FID, steps and guidance of the samples.
        run_dir (`str` or `Path`):
            The folder of the training run. Its `run.json` tells command, versions, git revision and hardware, its
            `args.yaml` the settings (see [`~softvq_hf.training.logging.write_run_record`]).
        training_command (`str`):
            The command that trained the model, by default that of `run_dir`; see [`training_command`].
        training_settings (`Mapping`):
            Settings of the run by name, by default those of `run_dir`. `None` values and `hub_token` are left out.
        base_model (`str`):
            What training started from: a Hub repository, which goes into the metadata, or a folder, which is named.
        license (`str`): Licence of the weights by its id on the Hub, by default "apache-2.0"; `None` states none.
    """

    dataset_name: str | None
    metrics: Mapping[str, float] | None
    evaluation_dataset: str | None
    num_evaluation_images: int | None
    evaluation_protocol: str | None
    run_dir: str | Path | None
    training_command: str | None
    training_settings: Mapping[str, Any] | None
    base_model: str | None
    license: str | None


def tokenizer_card(
    tokenizer: ModelMixin, *, repo_id: str, has_source: bool = True, **facts: Unpack[CardFacts]
) -> ModelCard:
    """
    The model card of a tokenizer, as [`export_model`] writes it.

    Args:
        tokenizer ([`AutoencoderSoftVQ`]): The tokenizer.
        repo_id (`str`): Hub repository or folder that the card's code example loads.
        has_source (`bool`, *optional*, defaults to `True`):
            Whether the repository carries the source of the model, as exports do. Without, the example needs this
            package.
        facts: Data, metrics and training, see [`CardFacts`].

    Returns:
        `ModelCard`: with metadata (`metrics` as model-index).

    Raises:
        ValueError: If `metrics` come without a data set or without `evaluation_protocol`, or `run_dir` has no record.
    """
    config = tokenizer.config
    height, width = get_image_size(tokenizer)
    return _model_card(
        kind="tokenizer",
        pipeline_tag="image-feature-extraction",
        tags=["softvq-hf", "image-tokenizer", "autoencoder", config.quantizer],
        task_type="image-reconstruction",
        repo_id=repo_id,
        has_source=has_source,
        facts=facts,
        model_config=_public_config(tokenizer),
        system=_tokenizer_system(tokenizer),
        quantizer=config.quantizer,
        height=height,
        width=width,
        in_channels=config.in_channels,
        latents=_latents_in_words(config.num_latent_tokens, config.latent_channels),
        latent_shape=f"{config.num_latent_tokens}, {config.latent_channels}",
        class_name=type(tokenizer).__name__,
        num_parameters=tokenizer.num_parameters(),
    )


def generator_card(
    transformer: ModelMixin,
    *,
    repo_id: str,
    tokenizer: str | None = None,
    scheduler: SchedulerMixin | None = None,
    subfolder: str | None = None,
    has_source: bool = True,
    **facts: Unpack[CardFacts],
) -> ModelCard:
    """
    The model card of a class-conditional transformer without its tokenizer, as [`export_model`] writes it.

    Args:
        transformer ([`DiTTransformer1DModel`] or [`MARTransformer1DModel`]): The transformer.
        repo_id (`str`): Hub repository or folder that the card's code example loads.
        tokenizer (`str`, *optional*): Hub repository or folder of the tokenizer on whose latents it was trained.
        scheduler ([`~diffusers.SchedulerMixin`], *optional*):
            The scheduler of its samples, which tells the objective. Without one a DiT transformer with variance
            channels, or with a `timestep_scale` of 1, counts as trained by DDPM, the others by flow matching.
        subfolder (`str`, *optional*): Folder of the transformer inside the repository.
        has_source (`bool`, *optional*, defaults to `True`): As in [`tokenizer_card`].
        facts: Data, metrics and training, see [`CardFacts`].

    Returns:
        `ModelCard`: with metadata (`metrics` as model-index).

    Raises:
        ValueError: If `metrics` come without a data set or without `evaluation_protocol`, or `run_dir` has no record.
    """
    config = transformer.config
    latent_shape = _latent_shape(transformer)
    architecture = _architecture(transformer, scheduler)
    if scheduler is None and architecture == "SiT":
        scheduler = FlowMatchEulerDiscreteScheduler()
    return _model_card(
        kind="generator",
        pipeline_tag="unconditional-image-generation",
        tags=["softvq-hf", "class-conditional-image-generation", architecture.lower()],
        task_type="class-conditional-image-generation",
        repo_id=repo_id,
        has_source=has_source,
        facts=facts,
        model_config=_public_config(transformer),
        tokenizer=tokenizer,
        tokenizer_is_on_hub=_is_hub_id(tokenizer),
        scheduler=None if scheduler is None else _constructor(scheduler),
        scheduler_name=type(scheduler).__name__,
        scheduler_package="diffusers" if scheduler is None or _is_of_diffusers(scheduler) else "softvq_hf",
        subfolder=subfolder,
        architecture=architecture,
        paper=PAPERS[architecture],
        pipeline_name="MARPipeline" if architecture == "MAR" else "SoftVQPipeline",
        predicts_variance=_predicts_variance(transformer),
        latents=_latents_in_words(*latent_shape),
        latent_shape=", ".join(map(str, latent_shape)),
        num_classes=config.num_classes,
        class_name=type(transformer).__name__,
        num_parameters=transformer.num_parameters(),
    )


def pipeline_card(
    pipeline: DiffusionPipeline, *, repo_id: str, has_source: bool = True, **facts: Unpack[CardFacts]
) -> ModelCard:
    """
    The model card of a generator with its tokenizer, as [`export_pipeline`] writes it.

    Args:
        pipeline ([`SoftVQPipeline`] or [`MARPipeline`]): The pipeline.
        repo_id (`str`): Hub repository or folder that the card's code example loads.
        has_source (`bool`, *optional*, defaults to `True`): As in [`tokenizer_card`].
        facts: Data, metrics and training, see [`CardFacts`].

    Returns:
        `ModelCard`: with metadata (`metrics` as model-index).

    Raises:
        ValueError: If `metrics` come without a data set or without `evaluation_protocol`, or `run_dir` has no record.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    height, width = get_image_size(vae, transformer)
    architecture = _architecture(transformer, pipeline.scheduler)
    return _model_card(
        kind="pipeline",
        pipeline_tag="unconditional-image-generation",
        tags=["softvq-hf", "class-conditional-image-generation", architecture.lower()],
        task_type="class-conditional-image-generation",
        repo_id=repo_id,
        has_source=has_source,
        facts=facts,
        model_config={name: _public_config(component) for name, component in pipeline.components.items()},
        system=_tokenizer_system(vae),
        architecture=architecture,
        paper=PAPERS[architecture],
        predicts_variance=_predicts_variance(transformer),
        height=height,
        width=width,
        latents=_latents_in_words(*_latent_shape(transformer)),
        num_classes=transformer.config.num_classes,
        class_name=type(pipeline).__name__,
        num_parameters=transformer.num_parameters() + vae.num_parameters(),
        num_tokenizer_parameters=vae.num_parameters(),
    )


def read_model_card(folder: str | Path, model: ModelMixin | DiffusionPipeline | None = None) -> ModelCard:
    """
    The model card of a local folder, or a new one where it has none.

    Args:
        folder (`str` or `Path`): The folder of a model or a pipeline.
        model ([`~diffusers.ModelMixin`] or [`~diffusers.DiffusionPipeline`], *optional*): What the new card tells of.

    Returns:
        `ModelCard`: its `README.md`, or the card that [`export_model`] or [`export_pipeline`] would write; for a
        folder without the source of the model, as `save_pretrained` leaves it, with an example that needs none.

    Raises:
        ValueError: If `folder` is not a folder, or has no `README.md` and the model no card of its own, or has a
            `README.md` whose metadata cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, allowed for a model card: a local folder.")
    if (folder / "README.md").is_file():
        try:
            return ModelCard.load(folder / "README.md")
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"{folder / 'README.md'} has metadata that cannot be read: {error} Put right what is between its lines"
                " of ---."
            ) from error
    if model is None or _is_of_diffusers(model):
        raise ValueError(f"`folder` is {str(folder)!r}, which has no README.md. Write one first.")
    return _default_card(model, repo_id=str(folder), has_source=_carries_source(folder))


def update_model_index(
    folder: str | Path, eval_results: Sequence[EvalResult], model: ModelMixin | DiffusionPipeline | None = None
) -> None:
    """
    Put figures into the model-index of a folder's `README.md`. Each takes the place of an earlier one of the same
    name, task, data set, configuration, split, revision and protocol (`protocol` in `metric_args`); everything else in
    the card stays as it is. Whoever reads the card finds the old one or the new one.

    Args:
        folder (`str` or `Path`): The folder of a model or a pipeline.
        eval_results (`Sequence` of `EvalResult`): The figures.
        model ([`~diffusers.ModelMixin`] or [`~diffusers.DiffusionPipeline`], *optional*): As in [`read_model_card`].

    Raises:
        ValueError: As [`read_model_card`].
    """

    def measurement(result: EvalResult) -> tuple[Any, ...]:
        return *result.unique_identifier, result.metric_type, (result.metric_args or {}).get("protocol")

    card = read_model_card(folder, model)
    replaced = set(map(measurement, eval_results))
    kept = [result for result in card.data.eval_results or [] if measurement(result) not in replaced]
    card.data.eval_results = [*kept, *eval_results]
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    write_atomically(Path(folder, "README.md"), str(card))


def training_command(num_processes: int, mixed_precision: str, argv: Sequence[str] | None = None) -> str:
    """
    The `accelerate launch` line of this process for a model card, without the Hub token.

    Args:
        num_processes (`int`): Processes in all, `accelerator.num_processes`.
        mixed_precision (`str`): Autocast dtype, `accelerator.mixed_precision`.
        argv (`Sequence[str]`, *optional*): Script and arguments, by default those of the process.

    Returns:
        `str`: the command, one flag per line.
    """
    words = ["accelerate launch", f"--num_processes={num_processes}", f"--mixed_precision={mixed_precision}"]
    lines = [" ".join(words)]
    for word in without_hub_token(sys.argv if argv is None else argv):
        if word.startswith("--") or len(lines) == 1:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def _model_card(
    kind: str,
    pipeline_tag: str,
    tags: list[str],
    task_type: str,
    repo_id: str,
    has_source: bool,
    facts: CardFacts,
    model_config: Mapping[str, Any],
    **template_values: Any,
) -> ModelCard:
    """Fill the template, and put what the Hub can read into the metadata as well."""
    unknown = sorted(set(facts) - set(CardFacts.__annotations__))
    if unknown:
        raise TypeError(f"Unknown arguments {', '.join(unknown)}, allowed: {', '.join(CardFacts.__annotations__)}.")
    run = None
    if facts.get("run_dir") is not None:
        run_dir = Path(facts["run_dir"])
        for name in (RUN_FILE, ARGUMENTS_FILE):
            if not (run_dir / name).is_file():
                raise ValueError(f"`run_dir` is {str(run_dir)!r}, allowed: the folder of a training run, with {name}.")
        starts = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
        run = {**starts[-1], "num_resumes": len(starts) - 1}
        facts = {
            "training_command": training_command(run["num_processes"], run["mixed_precision"], run["command"]),
            "training_settings": yaml.safe_load((run_dir / ARGUMENTS_FILE).read_text(encoding="utf-8")),
            **facts,
        }
    facts = {name: _without_folders(value) if isinstance(value, str) else value for name, value in facts.items()}
    dataset_name, base_model = facts.get("dataset_name"), facts.get("base_model")
    evaluation_dataset = facts.get("evaluation_dataset") or dataset_name
    metrics = facts.get("metrics") or {}
    card_data = ModelCardData(
        license=facts.get("license", "apache-2.0"),
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        tags=tags,
        datasets=[dataset_name] if _is_hub_id(dataset_name) else None,
        base_model=base_model if _is_hub_id(base_model) else None,
    )
    if metrics:
        if evaluation_dataset is None:
            raise ValueError(
                "`evaluation_dataset` and `dataset_name` are None, allowed with `metrics`: a name of the data they "
                "were measured on, in one of the two."
            )
        if not facts.get("evaluation_protocol"):
            raise ValueError(
                f"`evaluation_protocol` is {facts.get('evaluation_protocol')!r}, allowed with `metrics`: words on how "
                "they were measured."
            )
        names = [
            name for name in (evaluation_dataset, dataset_name) if _is_hub_id(name) and name in evaluation_dataset
        ]
        num_images = facts.get("num_evaluation_images")
        card_data.model_name = repo_id
        card_data.eval_results = [
            EvalResult(
                task_type=task_type,
                dataset_type=names[0] if names else re.sub(r"[^\w.-]+", "-", evaluation_dataset),
                dataset_name=evaluation_dataset,
                dataset_args=None if num_images is None else {"num_images": num_images},
                metric_type=name,
                metric_name=name,
                metric_value=float(value),
                metric_args={"protocol": facts["evaluation_protocol"]},
            )
            for name, value in metrics.items()
        ]

    settings = {
        name: _without_folders(str(value)).replace("|", r"\|")
        for name, value in (facts.get("training_settings") or {}).items()
        if value is not None and name != "hub_token"
    }
    return ModelCard.from_template(
        card_data,
        template_path=str(CARD_TEMPLATE),
        kind=kind,
        repo_id=repo_id,
        has_source=has_source,
        dataset_name=dataset_name,
        dataset_is_on_hub=_is_hub_id(dataset_name),
        evaluation_dataset=evaluation_dataset,
        num_evaluation_images=facts.get("num_evaluation_images"),
        evaluation_protocol=facts.get("evaluation_protocol"),
        training_command=facts.get("training_command"),
        training_settings=settings,
        run=run,
        base_model=base_model,
        base_model_is_on_hub=_is_hub_id(base_model),
        metrics={name: f"{value:.4g}" for name, value in metrics.items()},
        model_config=json.dumps(model_config, indent=2),
        versions=library_versions() if run is None else run["versions"],
        **template_values,
    )


def _default_card(model: ModelMixin | DiffusionPipeline, repo_id: str, has_source: bool = True) -> ModelCard:
    """The card that tells nothing but the model itself."""
    if isinstance(model, DiffusionPipeline):
        return pipeline_card(model, repo_id=repo_id, has_source=has_source)
    if _is_of_diffusers(model):
        raise ValueError(f"`model_card` is None, allowed for a {type(model).__name__} of diffusers: a `ModelCard`.")
    card = generator_card if "num_classes" in model.config else tokenizer_card
    return card(model, repo_id=repo_id, has_source=has_source)


def _carries_source(folder: Path) -> bool:
    """Whether plain diffusers finds the class of a model or a pipeline in its folder."""
    module = None
    if (folder / "model_index.json").is_file():
        class_name = json.loads((folder / "model_index.json").read_text()).get("_class_name")
        if isinstance(class_name, list):
            module = class_name[0]
    elif (folder / "config.json").is_file():
        class_name = json.loads((folder / "config.json").read_text()).get("auto_map", {}).get("AutoModel", "")
        module = class_name.split(".")[0]
    return (folder / f"{module}.py").is_file()


def _is_of_diffusers(part: Any) -> bool:
    return type(part).__module__.split(".")[0] == "diffusers"


def _is_hub_id(name: str | None) -> bool:
    """Whether it has the form of a repository with its owner, and is not the path of something on this machine."""
    return name is not None and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def _without_folders(text: str) -> str:
    """Text in which absolute paths, which say how somebody's machine is laid out, have their last part only."""
    return re.sub(r"""(?<![\w:/.~-])~?/(?:[^/\s"']+/)*([^/\s"']+)/?""", r"\1", text)


def _architecture(transformer: ModelMixin, scheduler: SchedulerMixin | None) -> str:
    """The kind of a generator: "MAR", "DiT" (DDPM) or "SiT" (flow matching)."""
    if "buffer_size" in transformer.config:
        return "MAR"
    if scheduler is None:
        is_ddpm = _predicts_variance(transformer) or transformer.config.timestep_scale == 1
    else:
        is_ddpm = "beta_schedule" in scheduler.config and not scheduler.config.get("use_flow_sigmas", False)
    return "DiT" if is_ddpm else "SiT"


def _predicts_variance(transformer: ModelMixin) -> bool:
    """Whether variance channels follow those of the noise, for whole latents (DiT)."""
    config = transformer.config
    return config.get("out_channels") == 2 * config.in_channels


def _tokenizer_system(vae: ModelMixin) -> str:
    """Name and paper of a tokenizer, as a link."""
    config = vae.config
    if "num_latent_tokens" not in config:
        return type(vae).__name__
    if config.quantizer == "none" and (config.decoder_type == "movq" or config.encoder_mask_token):
        return "[MAETok](https://arxiv.org/abs/2502.03444)"
    return "[SoftVQ-VAE](https://arxiv.org/abs/2412.10958)"


def _latent_shape(transformer: ModelMixin) -> tuple[int, ...]:
    config = transformer.config
    if "buffer_size" in config:  # MAR, whose latents are tokens, of 2-D ones their patches
        return transformer.num_tokens, transformer.token_channels
    if config.sample_size is not None:
        return config.in_channels, config.sample_size, config.sample_size
    return config.num_tokens, config.in_channels


def _latents_in_words(*shape: int) -> str:
    if len(shape) == 2:
        return f"{shape[0]} tokens of {shape[1]} channels"
    return f"a map of {shape[0]} channels, {shape[1]} × {shape[2]}"


def _public_config(part: ModelMixin | SchedulerMixin) -> dict[str, Any]:
    """The class and its arguments, as JSON has them."""
    config = json.loads(part.to_json_string())
    arguments = {name: value for name, value in config.items() if not name.startswith("_") and name != "auto_map"}
    return {"_class_name": type(part).__name__, **arguments}


def _constructor(scheduler: SchedulerMixin) -> str:
    """Python that makes this scheduler: its class, and the arguments that are not the default ones."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    arguments = [
        f"{name}={value!r}"
        for name, value in scheduler.config.items()
        if name in parameters and value != parameters[name].default
    ]
    return f"{type(scheduler).__name__}({', '.join(arguments)})"
