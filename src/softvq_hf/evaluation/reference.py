"""What generated images are compared with: statistics and features of real ones, measured here or read from a file.

A file is an `.npz` with the names that the evaluator of ADM (arXiv 2105.05233) uses: `mu` and `sigma`, mean and
covariance of the features, and `mu_s` and `sigma_s` of the spatial features. [`save_reference`] adds `features`,
`num_images`, `notes` and `protocol`, the last two JSON strings; by the protocol [`load_reference`] refuses what cannot
be compared.
"""

import contextlib
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from softvq_hf.evaluation.accelerator import build_accelerator, merge_over_processes
from softvq_hf.evaluation.arguments import EvaluationDataArguments, FeatureArguments
from softvq_hf.evaluation.data import image_batches, to_8_bit, unreadable_notes
from softvq_hf.evaluation.result import check_output_file, differences
from softvq_hf.metrics.feature_sample import FeatureSample
from softvq_hf.metrics.features import FeatureExtractor
from softvq_hf.metrics.gaussian import GaussianAccumulator, GaussianStatistics
from softvq_hf.metrics.images import ImageRange


ADM_CENTER_CROP = "ADM centre crop"


@dataclass
class Reference:
    """
    Real images, as a network sees them.

    Args:
        statistics ([`GaussianStatistics`]): Mean and covariance of the features.
        spatial_statistics ([`GaussianStatistics`], *optional*): Those of the spatial features.
        features (`torch.Tensor` of shape `(N, D)`, *optional*):
            Features of some or all of the images, float32 on the CPU, for the kernel distance, precision and recall.
        num_images (`int`, *optional*): Images behind the statistics; `None` where a file does not say.
        protocol (`dict`, *optional*): `feature_extractor`, `resolution` and `crop`, which decide what can be compared,
            and `dataset` and, of a data set, `num_unreadable`, for the record; `None` where a file does not say.
        notes (`list[str]`, *optional*): What a reader of figures should know.
    """

    statistics: GaussianStatistics
    spatial_statistics: GaussianStatistics | None = None
    features: torch.Tensor | None = None
    num_images: int | None = None
    protocol: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ReferenceArguments(EvaluationDataArguments, FeatureArguments):
    """Arguments of [`make_reference`]. `__post_init__` raises `ValueError` for values that cannot work."""

    resolution: int = field(metadata={"help": "Side of the images in pixels, as those to compare with them have."})
    output_file: str = field(metadata={"help": "The .npz file."})
    batch_size: int = field(default=32, metadata={"help": "Images per process and forward pass."})
    num_features: int = field(
        default=10_000,
        metadata={
            "help": "Features to keep for the kernel distance, precision and recall, a uniform sample of the images:"
            " 82 MB for 10 000 of Inception. 0 keeps none."
        },
    )

    def __post_init__(self) -> None:
        EvaluationDataArguments.__post_init__(self)
        FeatureArguments.__post_init__(self)
        for name in ("resolution", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if self.num_features < 0:
            raise ValueError(f"`--num_features` is {self.num_features}, allowed: integers from 0 on.")
        if Path(self.output_file).suffix != ".npz":
            raise ValueError(f"`--output_file` is {self.output_file!r}, allowed: a file whose name ends in .npz.")
        if len(self.feature_extractor) > 1 or "none" in self.feature_extractor:
            raise ValueError(
                f"`--feature_extractor` is {' '.join(self.feature_extractor)}, allowed for a reference: one network."
            )


def make_reference(args: ReferenceArguments) -> Reference:
    """
    Measure a data set once, for the evaluation of generators. Collective: every process of `accelerate launch` calls
    it.

    Args:
        args ([`ReferenceArguments`]): The images, the network and the file to write.

    Returns:
        [`Reference`]: the same on every process, as it was written.

    Raises:
        ValueError: As [`build_dataset_reference`], or if the file cannot be written.
        OSError: If weights of the network cannot be found or downloaded.
    """
    check_output_file(args.output_file)
    accelerator = build_accelerator()
    with accelerator.main_process_first():  # which downloads
        (extractor,) = args.load_feature_extractors(accelerator.device)
    reference = build_dataset_reference(
        accelerator, args, extractor, args.resolution, batch_size=args.batch_size, num_features=args.num_features
    )
    if accelerator.is_main_process:
        save_reference(reference, args.output_file)
    accelerator.wait_for_everyone()
    return reference


def build_reference(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    extractor: FeatureExtractor,
    *,
    resolution: int,
    dataset: dict[str, Any] | None = None,
    num_features: int = 50_000,
) -> Reference:
    """
    Measure images. Collective: every process brings its own, and gets the reference of all.

    Memory does not grow with their number: 34 MB for each covariance of about 2048 features, and up to
    `num_features * D * 4` bytes for features, 410 MB for 50 000 times 2048; on every process.

    Args:
        batches (`Iterable`): Pairs of images, uint8 of shape `(B, 3, H, W)`, and their numbers in the whole set, int64
            of shape `(B,)`. B may be 0.
        extractor ([`FeatureExtractor`]): The network.
        resolution (`int`): Side of the images in pixels, for the record.
        dataset (`dict`, *optional*): Which images, for the record.
        num_features (`int`, *optional*, defaults to 50000): Features to keep, a uniform sample; 0 keeps none.

    Returns:
        [`Reference`]: the same for any number of processes and size of batches.

    Raises:
        ValueError: If there are fewer than two images, or none has a value above 1.
    """
    image_range = ImageRange("reference")
    gaussian, spatial_gaussian = GaussianAccumulator(), GaussianAccumulator()
    sample = FeatureSample(num_features) if num_features > 0 else None
    for images, indices in batches:
        if len(images) == 0:
            continue
        found = extractor(images)
        image_range.update(images)
        features = found.features.cpu()
        gaussian.update(features)
        if found.spatial_features is not None:
            spatial_gaussian.update(found.spatial_features.cpu())
        if sample is not None:
            sample.update(features, indices.numpy())
    gaussian, spatial_gaussian = merge_over_processes(gaussian), merge_over_processes(spatial_gaussian)
    num_images = gaussian.count
    if num_images < 2:
        raise ValueError(f"The reference has {num_images} image(s), allowed: 2 or more, to have a covariance.")
    merge_over_processes(image_range).check()
    return Reference(
        statistics=gaussian.statistics(),
        spatial_statistics=spatial_gaussian.statistics() if spatial_gaussian.count > 0 else None,
        features=None if sample is None else merge_over_processes(sample).features(),
        num_images=num_images,
        protocol={**_comparable_protocol(extractor, resolution), "dataset": dataset},
    )


def build_dataset_reference(
    accelerator: Accelerator,
    data: EvaluationDataArguments,
    extractor: FeatureExtractor,
    resolution: int,
    *,
    batch_size: int = 32,
    num_features: int = 50_000,
) -> Reference:
    """
    Measure the images of a data set after the ADM centre crop. Collective.

    Args:
        accelerator (`Accelerator`): Shares the images out.
        data ([`EvaluationDataArguments`]): The images.
        extractor ([`FeatureExtractor`]): The network.
        resolution (`int`): Side of the images in pixels.
        batch_size (`int`, *optional*, defaults to 32): Images per process and forward pass.
        num_features (`int`, *optional*, defaults to 50000): As in [`build_reference`].

    Returns:
        [`Reference`]: of the readable images; its protocol counts the others, and a note names them.

    Raises:
        ValueError: As [`softvq_hf.data.load_image_dataset`] and [`build_reference`].
        UnreadableImagesError: If too many images cannot be read.
    """
    with accelerator.main_process_first():
        dataset = data.load_dataset(resolution)
    unreadable = []

    def images(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in batches:
            unreadable.extend(batch.get("unreadable", []))
            yield to_8_bit(batch["pixel_values"], "round"), batch["indices"]

    with contextlib.closing(
        image_batches(
            accelerator,
            dataset,
            batch_size,
            num_workers=data.dataloader_num_workers,
            desc=f"reference, {extractor.label}",
        )
    ) as batches:
        reference = build_reference(
            images(batches), extractor, resolution=resolution, dataset=data.data_record(), num_features=num_features
        )
    unreadable = gather_object(unreadable)
    reference.protocol["num_unreadable"] = len(unreadable)
    reference.notes += [f"Reference: {note}" for note in unreadable_notes(unreadable)]
    return reference


def save_reference(reference: Reference, path: str | Path) -> None:
    """
    Write a reference, which [`load_reference`] reads, and, with spatial statistics, the evaluator of ADM too. Whoever
    reads `path` finds the old file or the new one.

    Args:
        reference ([`Reference`]): One that was measured here.
        path (`str` or `Path`): The `.npz` file; its folder is made if needed.
    """
    path = Path(path)
    arrays = {"mu": reference.statistics.mean.numpy(), "sigma": reference.statistics.covariance.numpy()}
    if reference.spatial_statistics is not None:
        arrays["mu_s"] = reference.spatial_statistics.mean.numpy()
        arrays["sigma_s"] = reference.spatial_statistics.covariance.numpy()
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            **arrays,
            num_images=reference.num_images,
            protocol=json.dumps(reference.protocol),
            notes=json.dumps(reference.notes),
        )
    os.replace(partial, path)


def load_reference(
    accelerator: Accelerator,
    path: str | Path,
    extractor: FeatureExtractor,
    resolution: int,
    *,
    batch_size: int = 32,
    num_features: int = 50_000,
) -> Reference:
    """
    Read a reference for images that `extractor` looks at. Collective.

    Args:
        accelerator (`Accelerator`): Shares the images of a file out.
        path (`str` or `Path`): An `.npz` file, nothing in which is executed, of one of these kinds:
            - written by [`save_reference`];
            - with `mu` and `sigma`, perhaps `mu_s` and `sigma_s`, by other software. Which network and which images
              they come from cannot be checked; a note of the reference says so;
            - with images, `arr_0` of shape `(N, H, W, 3)`, uint8, which are read and measured batch by batch, as ADM's
              evaluator does. Where there are `mu` and `sigma` as well, as in ADM's `VIRTUAL_*.npz`, they are the
              statistics for Inception, and the images, some of those behind them, give only the features.
        extractor ([`FeatureExtractor`]): The network that looks at the other images.
        resolution (`int`): Side of the other images in pixels.
        batch_size (`int`, *optional*, defaults to 32): Images of `arr_0` per process and forward pass.
        num_features (`int`, *optional*, defaults to 50000): As in [`build_reference`].

    Returns:
        [`Reference`]

    Raises:
        ValueError: If the file cannot be read, is of no such kind, or was made with another network, resolution or
            crop, which the error names.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`reference` is {str(path)!r}, allowed: an .npz file that exists.")
    if not zipfile.is_zipfile(path):  # such as an .npy of another name
        raise ValueError(f"`reference` {str(path)!r} cannot be read: it is no archive. Allowed: an .npz file.")
    with _naming_the_file(path), np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in _SMALL_ARRAYS if f"{name}.npy" in archive.zip.namelist()}
        has_images = "arr_0.npy" in archive.zip.namelist()
        found = ", ".join(archive.files)
        no_arrays = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if no_arrays:
            raise ValueError(f"{' and '.join(no_arrays)} is no array.")

    has_statistics = "mu" in arrays and "sigma" in arrays
    if not has_statistics and not has_images:
        raise ValueError(
            f"`reference` {str(path)!r} holds {found or 'nothing'}, allowed: mu and sigma, or images as arr_0."
        )
    if "protocol" in arrays:
        return _measured_here(path, arrays, extractor, resolution)

    statistics_win = has_statistics and (extractor.label == "Inception" or not has_images)
    statistics = _statistics(path, arrays, extractor, None) if statistics_win else {}
    notes = []
    if statistics_win:
        notes.append(
            f"{path.name} does not say how its mu and sigma were measured: network, crop and resolution could not be"
            " checked."
        )
    if not has_images:
        return Reference(**statistics, notes=notes)
    images = _npz_images(accelerator, path, resolution, batch_size)
    reference = build_reference(images, extractor, resolution=resolution, num_features=num_features)
    reference.notes = [*notes, f"The crop of the images in {path.name} could not be checked."]
    if statistics_win:
        reference.statistics = statistics["statistics"]
        reference.spatial_statistics = statistics["spatial_statistics"]
        reference.num_images = None
    return reference


# Everything in a file but its images, which may be far larger than the memory.
_SMALL_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "num_images", "protocol", "notes")


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turn what numpy and zipfile raise for damaged and strange archives into an error that names `path`."""
    try:
        yield
    except (
        EOFError,
        MemoryError,  # a header that promises too much
        OSError,
        RuntimeError,  # encrypted, or compressed in a way that Python does not know
        ValueError,
        lzma.LZMAError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"`reference` {str(path)!r} cannot be read: {error} Allowed: a whole .npz file.") from error


def _comparable_protocol(extractor: FeatureExtractor, resolution: int) -> dict[str, Any]:
    """What has to be the same on both sides of a comparison."""
    return {"feature_extractor": extractor.description(), "resolution": resolution, "crop": ADM_CENTER_CROP}


def _measured_here(
    path: Path, arrays: dict[str, np.ndarray], extractor: FeatureExtractor, resolution: int
) -> Reference:
    """The reference of a file that [`save_reference`] wrote, if its protocol is that of `extractor`."""
    missing = [name for name in ("mu", "sigma", "num_images") if name not in arrays]
    if missing:
        raise ValueError(f"`reference` {str(path)!r} has a protocol, but lacks {' and '.join(missing)}.")
    try:
        protocol = json.loads(str(arrays["protocol"]))
        notes = json.loads(str(arrays["notes"])) if "notes" in arrays else []
    except json.JSONDecodeError as error:
        raise ValueError(f"`reference` {str(path)!r} holds protocol or notes that are not JSON: {error}") from error
    expected = _comparable_protocol(extractor, resolution)
    if not isinstance(protocol, dict) or not isinstance(notes, list):
        raise ValueError(
            f"`reference` {str(path)!r} holds the protocol {protocol!r} and the notes {notes!r}, allowed: a JSON"
            f" object with {', '.join(expected)}, and a list."
        )
    if not isinstance(protocol.get("dataset"), (dict, type(None))):
        raise ValueError(
            f"`reference` {str(path)!r} holds a protocol whose dataset is {protocol['dataset']!r}, allowed: a JSON"
            " object, or null."
        )
    found = differences({name: protocol[name] for name in expected if name in protocol}, expected)
    if found:
        raise ValueError(
            f"`reference` {str(path)!r} was made with another protocol and cannot be compared: {'; '.join(found)}."
        )
    num_images = arrays["num_images"]
    if num_images.ndim != 0 or not np.issubdtype(num_images.dtype, np.integer) or num_images < 2:
        raise ValueError(f"`reference` {str(path)!r} holds num_images {num_images}, allowed: an integer from 2 on.")
    features = None
    if "features" in arrays:
        features = arrays["features"]
        shape = (min(len(features), num_images.item()) if features.ndim else 0, extractor.num_features)
        if features.dtype != np.float32 or features.shape != shape or not np.isfinite(features).all():
            raise ValueError(
                f"`reference` {str(path)!r} holds features of shape {features.shape} and dtype {features.dtype}, or"
                f" that are not finite, allowed for {extractor.label}: float32 of shape (up to {num_images},"
                f" {extractor.num_features}), finite."
            )
        features = torch.from_numpy(features)
    return Reference(
        **_statistics(path, arrays, extractor, num_images.item()),
        features=features,
        num_images=num_images.item(),
        protocol=protocol,
        notes=notes,
    )


def _statistics(
    path: Path, arrays: dict[str, np.ndarray], extractor: FeatureExtractor, count: int | None
) -> dict[str, GaussianStatistics | None]:
    """Those of a file, if they can be of the features of `extractor`."""
    statistics: dict[str, GaussianStatistics | None] = {"statistics": None, "spatial_statistics": None}
    names = {"statistics": ("mu", "sigma", extractor.num_features)}
    if "mu_s" in arrays and "sigma_s" in arrays and extractor.num_spatial_features is not None:
        names["spatial_statistics"] = ("mu_s", "sigma_s", extractor.num_spatial_features)
    for kind, (mean, covariance, num_features) in names.items():
        if arrays[mean].shape != (num_features,):
            raise ValueError(
                f"`reference` {str(path)!r} holds {mean} of shape {arrays[mean].shape}, allowed for the features of"
                f" {extractor.label}: ({num_features},). It comes from another network."
            )
        for name in (mean, covariance):
            if arrays[name].dtype not in (np.float32, np.float64):
                raise ValueError(
                    f"`reference` {str(path)!r} holds {name} of dtype {arrays[name].dtype}, allowed: float32 or"
                    " float64."
                )
        try:
            gaussian = GaussianStatistics(count=count, mean=arrays[mean], covariance=arrays[covariance])
            eigenvalues = torch.linalg.eigvalsh((gaussian.covariance + gaussian.covariance.T) / 2)
            if eigenvalues[0] < -1e-4 * eigenvalues[-1].abs():  # as in the Fréchet distance, but before all work
                raise ValueError(
                    f"the covariance has the eigenvalue {eigenvalues[0]:.4g} beside {eigenvalues[-1]:.4g}, allowed: 0"
                    " or more."
                )
            statistics[kind] = gaussian
        except ValueError as error:
            raise ValueError(
                f"`reference` {str(path)!r} holds {mean} and {covariance} that are not valid: {error}"
            ) from error
    return statistics


def _npz_images(
    accelerator: Accelerator, path: Path, resolution: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images of `arr_0` that belong to this process, batch by batch, and their numbers."""
    with contextlib.ExitStack() as opened:
        with _naming_the_file(path):
            file = opened.enter_context(opened.enter_context(zipfile.ZipFile(path)).open("arr_0.npy"))
            if np.lib.format.read_magic(file) == (1, 0):
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or is_fortran:
            raise ValueError(
                f"`reference` {str(path)!r} holds arr_0 of shape {shape} and dtype {dtype}, allowed: (N, H, W, 3) of"
                " uint8."
            )
        if shape[1:3] != (resolution, resolution):
            raise ValueError(
                f"`reference` {str(path)!r} holds images of {shape[1]} x {shape[2]} pixels, allowed: {resolution} x"
                f" {resolution} as the images that are compared with them."
            )
        image_bytes = resolution * resolution * 3
        for number, indices in enumerate(torch.arange(shape[0]).split(batch_size)):
            if number % accelerator.num_processes != accelerator.process_index:
                with _naming_the_file(path):
                    file.seek(len(indices) * image_bytes, os.SEEK_CUR)
                continue
            with _naming_the_file(path):
                data = file.read(len(indices) * image_bytes)
            if len(data) < len(indices) * image_bytes:
                raise ValueError(f"`reference` {str(path)!r} ends in the middle of arr_0, allowed: a whole file.")
            images = np.frombuffer(data, np.uint8).reshape(len(indices), *shape[1:])
            yield torch.from_numpy(images.copy()).permute(0, 3, 1, 2), indices
