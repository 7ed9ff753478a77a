"""Official checkpoints to folders that diffusers loads: tokenizers, generators, and complete pipelines of both.

[`convert_pretrained`] does all of it, and is what `softvq-hf convert` runs. Weights are read, never executed, and a
folder appears when it is complete, or not at all.
"""

import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from huggingface_hub import ModelCard, ModelCardData
from torchvision.models import ResNet50_Weights

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.conversion.published_models import load_published_models
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.generator import (
    build_ddpm_scheduler,
    build_token_scheduler,
    get_image_size,
    load_tokenizer,
)
from softvq_hf.training.hub import export_model, export_pipeline, generator_card, pipeline_card, tokenizer_card
from softvq_hf.training.official_checkpoints import (
    detect_system,
    download_file,
    is_tokenizer,
    load_official_checkpoint,
    read_json,
)
from softvq_hf.training.path_detection import FEWEST_IMAGES, PATH_TYPES, detect_path_type, encode_images


logger = logging.getLogger(__name__)

TOKENIZERS, GENERATORS = ("softvq",), ("sit", "dit", "mar")  # systems, by the folder that is made of them
BETA_SCHEDULES = ("linear", "squaredcos_cap_v2")


def convert_pretrained(
    source: str | Path,
    output_dir: str | Path,
    *,
    system: str | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    path_type: str | None = None,
    detect_path: bool = False,
    images: str | Path | None = None,
    num_images: int = 256,
    beta_schedule: str | None = None,
    id2label: str | Path | Mapping[int, str] | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> ModelMixin | SoftVQPipeline | MARPipeline:
    """
    Convert an official checkpoint into a folder that diffusers loads.

    | `source` is | `output_dir` holds |
    |---|---|
    | a tokenizer | the model, for `AutoencoderSoftVQ.from_pretrained(output_dir)` |
    | a generator | `transformer/` and `scheduler/`, for `from_pretrained(output_dir, subfolder="transformer")` |
    | a generator, with `tokenizer` | a pipeline, for `SoftVQPipeline.from_pretrained(output_dir)` or `MARPipeline` |

    Everything is checked and converted before the first file is written. The folder is written under another name
    beside `output_dir` and renamed when it is complete; after an error nothing is left. Only the weights of `source`
    and `tokenizer` are downloaded, whatever pretrained parts their configs name.

    Args:
        source (`str` or `Path`):
            A Hub id or a local folder with the official `config.json` and `model.safetensors`, or a training file
            (`.pt`, `.pth`), see [`load_official_checkpoint`].
        output_dir (`str` or `Path`): The folder to make: one that does not exist, or is empty.
        system (`str`, *optional*): One of the systems of [`convert_checkpoint`]; by default [`detect_system`].
        tokenizer (`str` or `Path`, *optional*):
            The tokenizer of a generator: an official one, as `source`, or a Hub id or folder of an
            [`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`] in the format of diffusers.
        config (`str`, `Path` or mapping, *optional*):
            The official config of `source`, as a JSON file or a mapping, in place of its own.
        path_type (`str`, *optional*):
            The path a SiT was trained on, "linear" or "cosine": its scheduler becomes a
            [`StochasticInterpolantScheduler`], the SDE. Without it the scheduler is
            [`~diffusers.FlowMatchEulerDiscreteScheduler`], the ODE, which is the same for both paths.
        detect_path (`bool`, *optional*, defaults to `False`):
            Find `path_type` by [`detect_path_type`]; needs `tokenizer` and `images`.
        images (`str` or `Path`, *optional*):
            Folder of images for `detect_path`, or "photographs"; see [`load_image_dataset`]. Labels are used if there
            are as many classes as the generator has, otherwise the null class is.
        num_images (`int`, *optional*, defaults to 256): At most so many of `images` are used, spread over all of them.
        beta_schedule (`str`, *optional*):
            Of a DiT, "linear" or "squaredcos_cap_v2". By default the latter for 1-D latents, the former for 2-D.
        id2label (`str`, `Path` or mapping, *optional*):
            Names of the classes for a pipeline: "imagenet", a JSON file (an object from ids to names), or a mapping.
            By default "imagenet" if `source` is the Hub id of a published model with 1000 classes.
        device (`str` or `torch.device`, *optional*):
            Where `detect_path` computes; by default CUDA where there is such a device.
        revision (`str`, *optional*): Revision of `source` on the Hub.
        token (`str`, *optional*): Access token of the Hub; by default that of `hf auth login`.
        cache_dir (`str` or `Path`, *optional*): The cache of downloads.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether to read the cache only.

    Returns:
        [`AutoencoderSoftVQ`] (or the model that [`convert_checkpoint`] gives for the tokenizer),
        [`DiTTransformer1DModel`], [`MARTransformer1DModel`], [`SoftVQPipeline`] or [`MARPipeline`]: what was written,
        float32, eval mode.

    Raises:
        ValueError: If an argument is not allowed or does not fit the others, `output_dir` is not empty or cannot be
            written, a file is damaged or would run code, weights and config disagree, the system or the path cannot
            be told, or the latents of generator and tokenizer differ.
        OSError: If files are missing on the Hub, or it cannot be reached and the cache does not have them.
    """
    hub_options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    _check_arguments(system, tokenizer, path_type, detect_path, images, num_images, beta_schedule, id2label)
    check_new_folder(output_dir)
    device = _find_device(device)
    id2label = _read_id2label(id2label)

    # 1. The model
    state_dict, config = load_official_checkpoint(source, config, revision=revision, **hub_options)
    if system is None:
        system = detect_system(state_dict, config)
        logger.info(f"{source}: detected the system {system!r}")
    _check_arguments_of_system(system, tokenizer, path_type, detect_path, beta_schedule)
    model = convert_checkpoint(system, state_dict, config)
    record = {"source": _public_name(source), "system": system}
    if revision is not None:
        record["revision"] = revision
    facts = {"repo_id": str(output_dir), "license": config.get("license")}

    if system in TOKENIZERS:
        card = tokenizer_card(model, **facts) if isinstance(model, AutoencoderSoftVQ) else _plain_card(model, **facts)
        _add_conversion(card, record)
        with new_folder(output_dir) as folder:
            export_model(model, folder, card)
        return model

    # 2. Its tokenizer
    published = {entry.repo_id: entry for entry in load_published_models()}
    published_tokenizer = published[str(source)].tokenizer if str(source) in published else None
    vae = None
    if tokenizer is not None:
        vae = _load_tokenizer(tokenizer, hub_options)
        _check_latents(model, vae)
        record["tokenizer"] = _public_name(tokenizer)
        if published_tokenizer is not None and str(tokenizer) in published and str(tokenizer) != published_tokenizer:
            logger.warning(
                f"{source} was trained on the latents of {published_tokenizer}, `tokenizer` is {tokenizer}: their"
                " latents have the same shape, but the images will be wrong."
            )
    elif published_tokenizer is not None:
        record["tokenizer"] = f"{published_tokenizer}, not included"
        logger.info(f"The tokenizer of {source} is {published_tokenizer}: `tokenizer` makes a pipeline of both.")

    if vae is not None:
        if id2label is None and str(source) in published and model.config.num_classes == 1000:
            id2label = _read_id2label("imagenet")
        if id2label is not None and set(id2label) != set(range(model.config.num_classes)):
            raise ValueError(
                f"`id2label` names {len(id2label)} classes, allowed: the ids 0 to {model.config.num_classes - 1}, each"
                " with one name."
            )

    # 3. Its scheduler
    if detect_path:
        height, width = get_image_size(vae, model)
        if height != width:
            raise ValueError(
                f"`tokenizer` takes images of {height} x {width} pixels, allowed to detect the path: squares."
            )
        latents, class_labels = encode_images(vae.to(device), images, num_images, model.config.num_classes, height)
        detection = detect_path_type(model.to(device), latents, class_labels)
        for component in (model, vae):
            component.to("cpu")
        path_type = detection.path_type
        record |= {"path": f"{path_type}, detected on {len(latents)} images", **detection.table()}
        logger.info(f"Detected the {path_type} path: {detection}")
    elif path_type is not None:
        record["path"] = f"{path_type}, as given"
    elif system == "sit":
        record["path"] = "unknown; the ODE of the scheduler does not depend on it"
        logger.warning(
            "The path that this SiT was trained on is not known. The scheduler written is that of the ODE, which does"
            " not depend on it; the SDE (StochasticInterpolantScheduler) does: give `path_type` or use `detect_path`."
        )
    scheduler = build_scheduler(system, model, path_type, beta_schedule)

    # 4. The folder
    if vae is None:
        card = generator_card(model, scheduler=scheduler, subfolder="transformer", **facts)
        _add_conversion(card, record)
        with new_folder(output_dir) as folder:
            export_model(model, folder / "transformer", card)
            os.rename(folder / "transformer" / "README.md", folder / "README.md")
            scheduler.save_pretrained(folder / "scheduler")
        return model

    pipeline_class = MARPipeline if system == "mar" else SoftVQPipeline
    pipeline = pipeline_class(vae=vae, transformer=model, scheduler=scheduler, id2label=id2label)
    card = pipeline_card(pipeline, **facts)
    _add_conversion(card, record)
    with new_folder(output_dir) as folder:
        export_pipeline(pipeline, folder, card)
    return pipeline


def build_scheduler(
    system: str,
    transformer: DiTTransformer1DModel | MARTransformer1DModel,
    path_type: str | None = None,
    beta_schedule: str | None = None,
) -> SchedulerMixin:
    """
    The scheduler of a converted generator.

    Args:
        system (`str`): "sit", "dit" or "mar".
        transformer ([`DiTTransformer1DModel`] or [`MARTransformer1DModel`]): The generator.
        path_type (`str`, *optional*): The path of a SiT: the SDE; without it the ODE.
        beta_schedule (`str`, *optional*): Of a DiT; by default that of the published models.

    Returns:
        [`~diffusers.SchedulerMixin`]: [`StochasticInterpolantScheduler`],
        [`~diffusers.FlowMatchEulerDiscreteScheduler`], [`~diffusers.DDPMScheduler`] or
        [`TemperatureDDPMScheduler`].
    """
    if system == "mar":
        return build_token_scheduler()
    if system == "sit":
        if path_type is None:
            return FlowMatchEulerDiscreteScheduler()
        return StochasticInterpolantScheduler(path_type=path_type)
    is_2d = transformer.config.sample_size is not None
    return build_ddpm_scheduler(
        beta_schedule or ("linear" if is_2d else "squaredcos_cap_v2"),
        learned_variance=transformer.out_channels == 2 * transformer.config.in_channels,
    )


def check_new_folder(output_dir: str | Path) -> None:
    """
    Check that [`new_folder`] can make `output_dir`, before any work is done that could be lost.

    Args:
        output_dir (`str` or `Path`): The folder to make.

    Raises:
        ValueError: If it is a file or a mount point, is not empty, or nothing can be written where it should stand.
    """
    path = Path(output_dir).resolve()
    try:
        if path.is_mount():
            raise ValueError(f"`output_dir` is {str(output_dir)!r}, a mount point, allowed: a folder inside of it.")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"`output_dir` is {str(output_dir)!r}, allowed: a folder that does not exist, or is empty."
            )
        nearest = next(parent for parent in path.parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, allowed: a folder that can be written. {error}"
        ) from error


@contextmanager
def new_folder(output_dir: str | Path) -> Iterator[Path]:
    """
    A folder that appears complete or not at all: it is filled under another name beside `output_dir`, and renamed.

    Args:
        output_dir (`str` or `Path`): The folder to make; it may exist if it is empty.

    Yields:
        `Path`: the folder to fill. If that fails, it is removed, and so are parents that were made for it.
    """
    path = Path(output_dir).resolve()
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rmdir()
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _check_arguments(
    system: str | None,
    tokenizer: str | Path | None,
    path_type: str | None,
    detect_path: bool,
    images: str | Path | None,
    num_images: int,
    beta_schedule: str | None,
    id2label: Any,
) -> None:
    """What is wrong whatever `source` is."""
    systems = (*TOKENIZERS, *GENERATORS)
    if system is not None and system not in systems:
        raise ValueError(f"`system` is {system!r}, allowed: {', '.join(map(repr, systems))}.")
    if path_type is not None and path_type not in PATH_TYPES:
        raise ValueError(f"`path_type` is {path_type!r}, allowed: {', '.join(map(repr, PATH_TYPES))}.")
    if beta_schedule is not None and beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"`beta_schedule` is {beta_schedule!r}, allowed: {', '.join(map(repr, BETA_SCHEDULES))}.")
    if detect_path and path_type is not None:
        raise ValueError(f"`path_type` is {path_type!r} and `detect_path` is True, allowed: one of them.")
    if detect_path and (images is None or tokenizer is None):
        missing = [name for name, value in (("images", images), ("tokenizer", tokenizer)) if value is None]
        raise ValueError(f"`detect_path` is True, which needs {' and '.join(f'`{name}`' for name in missing)} too.")
    if images is not None:
        if not detect_path:
            raise ValueError(f"`images` is {str(images)!r}, allowed: None without `detect_path`.")
        if str(images) != "photographs" and not Path(images).is_dir():
            raise ValueError(f"`images` is {str(images)!r}, allowed: a folder that exists, or 'photographs'.")
    if num_images < FEWEST_IMAGES:
        raise ValueError(f"`num_images` is {num_images}, allowed: integers from {FEWEST_IMAGES} on.")
    if id2label is not None and tokenizer is None:
        raise ValueError("`id2label` is given, allowed: None without `tokenizer`, since a pipeline records it.")


def _check_arguments_of_system(
    system: str, tokenizer: str | Path | None, path_type: str | None, detect_path: bool, beta_schedule: str | None
) -> None:
    """What is wrong for this system."""
    given = {
        "tokenizer": (tokenizer is not None, GENERATORS),
        "path_type": (path_type is not None, ("sit",)),
        "detect_path": (detect_path, ("sit",)),
        "beta_schedule": (beta_schedule is not None, ("dit",)),
    }
    for name, (is_given, systems) in given.items():
        if is_given and system not in systems:
            raise ValueError(
                f"`{name}` is given, but the system of `source` is {system!r}: allowed for"
                f" {' and '.join(map(repr, systems))} only."
            )


def _find_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on, tried out."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # the former where torch was built without that kind of device
        raise ValueError(f"`device` is {str(device)!r}, which cannot be used here: {error}") from error


def _load_tokenizer(source: str | Path, hub_options: Mapping[str, Any]) -> AutoencoderSoftVQ | AutoencoderKL:
    """A tokenizer for a pipeline, official or in the format of diffusers."""
    path = Path(source).expanduser()
    config = {}
    if not path.exists():
        config = read_json(download_file(source, "config.json", **hub_options), "`tokenizer`")
    elif (path / "config.json").is_file():
        config = read_json(path / "config.json", "`tokenizer`")
    if "_class_name" in config:
        return load_tokenizer(str(path) if path.exists() else str(source), **hub_options)

    state_dict, config = load_official_checkpoint(source, **hub_options)
    if not is_tokenizer(state_dict):
        raise ValueError(f"`tokenizer` is {str(source)!r}, which is a generator.")
    vae = convert_checkpoint("softvq", state_dict, config)
    if not isinstance(vae, AutoencoderSoftVQ):
        raise ValueError(
            f"`tokenizer` is {str(source)!r}, a {type(vae).__name__}, allowed in a pipeline: AutoencoderSoftVQ and"
            " AutoencoderKL."
        )
    if (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0):
        logger.warning(
            f"The config of the tokenizer {source} has no `vq_mean` and `vq_std`, so latents are not normalised; every"
            " published generator was trained on normalised ones."
        )
    return vae


def _check_latents(
    transformer: DiTTransformer1DModel | MARTransformer1DModel, vae: AutoencoderSoftVQ | AutoencoderKL
) -> None:
    """Generator and tokenizer must speak of the same latents; an `AutoencoderKL` serves every size."""
    config = transformer.config
    if config.sample_size is not None:
        makes = f"feature maps of {config.in_channels} channels"
    else:
        makes = f"{config.num_tokens} tokens of {config.in_channels} channels"
    if isinstance(vae, AutoencoderKL):
        takes = f"feature maps of {vae.config.latent_channels} channels"
    else:
        takes = f"{vae.config.num_latent_tokens} tokens of {vae.config.latent_channels} channels"
    if makes != takes:
        raise ValueError(f"`source` makes {makes}, but `tokenizer` decodes {takes}: they do not belong together.")


def _read_id2label(id2label: str | Path | Mapping[Any, str] | None) -> dict[int, str] | None:
    """Names by class id, from wherever they are."""
    if id2label is None:
        return None
    if id2label == "imagenet":
        return dict(enumerate(ResNet50_Weights.IMAGENET1K_V1.meta["categories"]))
    if not isinstance(id2label, Mapping):
        id2label = read_json(Path(id2label).expanduser(), "`id2label`")
    try:
        return {int(class_id): str(name) for class_id, name in id2label.items()}
    except ValueError as error:
        raise ValueError(f"`id2label` has keys that are no class ids: {error}") from error


def _public_name(source: str | Path) -> str:
    """What a card says of a source: of a file or folder here its name, not its path."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)


def _plain_card(model: ModelMixin, repo_id: str, license: str | None) -> ModelCard:
    """The card of a tokenizer whose class is one of diffusers."""
    name = type(model).__name__
    data = ModelCardData(license=license, library_name="diffusers", tags=["softvq-hf", "image-tokenizer"])
    code = f"from diffusers import {name}\n\nvae = {name}.from_pretrained({json.dumps(repo_id)})"
    config = json.dumps(json.loads(model.to_json_string()), indent=2)
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id}\n\nA convolutional image tokenizer, a `{name}` of diffusers.\n\n"
        f"## Use\n\n```python\n{code}\n```\n\n## Configuration\n\n```json\n{config}\n```\n"
    )


def _add_conversion(card: ModelCard, record: Mapping[str, str]) -> None:
    """Say in a card where the weights come from."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in record.items())
    section = (
        f"## Conversion\n\nConverted by softvq-hf from weights in the official format.\n\n| | |\n|---|---|\n{rows}\n\n"
    )
    before, heading, after = card.text.partition("## Configuration")
    card.text = f"{before}{section}{heading}{after}"
