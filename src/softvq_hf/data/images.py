"""From "where the images are" to torch datasets of `pixel_values`: Hub data sets, image folders, parquet folders,
saved `datasets` and the built-in photographs, read through `datasets`. Unreadable images are skipped, counted and
named."""

import logging
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from softvq_hf.data.photographs import PhotographDataset
from softvq_hf.data.transforms import (
    adm_center_crop,
    adm_random_crop,
    convert_to_rgb,
    random_horizontal_flip,
    to_pixel_values,
)


logger = logging.getLogger(__name__)

# Taken in this order where the default column names are not there.
IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "class_label", "target")

# What PIL's decoders raise on broken files.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
FEW_UNREADABLE = 4  # never too many in a small data set
UNSEEN, READABLE, UNREAD = 0, 1, 2


class UnreadableImagesError(RuntimeError):
    """More images than `max_unreadable_fraction` allows, or all of them, cannot be read."""


def load_image_dataset(
    source: str,
    *,
    split: str = "train",
    resolution: int,
    train: bool,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    streaming: bool = False,
    cache_dir: str | None = None,
    revision: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    max_unreadable_fraction: float = 0.01,
    shuffle_buffer_size: int = 1000,
    center_crop: bool = False,
) -> "ImageDataset | StreamingImageDataset | PhotographDataset":
    """
    Load images as a torch dataset.

    Args:
        source (`str`): Where the images are:
            - a local folder: images in class subfolders (below `train` and `val` folders if there are splits) or with
              a `metadata.csv` or `metadata.jsonl`, parquet files, or what `datasets.save_to_disk` has written;
            - "photographs": the built-in set, see [`PhotographDataset`];
            - otherwise a data set on the Hub, e.g. "ILSVRC/imagenet-1k".
        split (`str`, *optional*, defaults to `"train"`): Split, as the data set names it. `datasets` calls the split
            of a folder `val` "validation".
        resolution (`int`): Side R of the square images in pixels.
        train (`bool`): Random ADM crops and horizontal flips if true, the ADM centre crop otherwise.
        config_name (`str`, *optional*): Configuration of a data set that has several.
        image_column (`str`, *optional*, defaults to `"image"`): Column of the images. Where the default does not
            exist, a column with another usual name, or the only image column, is taken.
        label_column (`str`, *optional*, defaults to `"label"`): Column of the class labels: class labels, integers
            from 0 on, or strings, which become the ids of their sorted order. Where the default does not exist, a
            column with another usual name, or the only `ClassLabel` column, is taken. `None`: the items have no
            labels.
        streaming (`bool`, *optional*, defaults to `False`): Read the data set on the way, see
            [`StreamingImageDataset`].
        cache_dir (`str`, *optional*): Where `datasets` keeps what it downloads and prepares.
        revision (`str`, *optional*): Revision of a Hub data set.
        max_samples (`int`, *optional*): Use at most this many images, spread evenly over the data set (a folder sorted
            by class keeps all its classes); of a stream the first ones.
        seed (`int`, *optional*, defaults to 0): Seed of crops, flips and the order of a stream.
        max_unreadable_fraction (`float`, *optional*, defaults to 0.01): Share of unreadable images, in [0, 1], that is
            skipped with a warning; see [`ImageDataset`] for when it counts as exceeded.
        shuffle_buffer_size (`int`, *optional*, defaults to 1000): Images from which a training stream draws the next.
        center_crop (`bool`, *optional*, defaults to `False`): With `train=True`, the ADM centre crop in place of the
            random one, flips stay: how generators are trained on images. 'photographs' are crops already.

    Returns:
        [`ImageDataset`], [`StreamingImageDataset`] or [`PhotographDataset`]. Items are dictionaries of `pixel_values`
        (`torch.Tensor` of shape `(3, R, R)`, float32 in [-1, 1]), `class_labels` (`int`; not there with
        `label_column=None`) and `image_id` (file name or index). All have `id2label`, `num_classes` (0 without
        labels), `resolution` and `set_epoch(epoch)`. [`collate_images`] makes batches of them.

    Raises:
        ValueError: If an argument is out of range; `source` cannot be found or is empty; the split does not exist (the
            existing ones are listed); the columns do not exist, are ambiguous or have another type (all are listed);
            or labels are missing.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"`resolution` is {resolution!r}, allowed: integers from 1 on.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` is {max_samples}, allowed: integers from 1 on, or None for all.")
    if seed < 0:
        raise ValueError(f"`seed` is {seed}, allowed: integers from 0 on.")
    if not 0 <= max_unreadable_fraction <= 1:
        raise ValueError(f"`max_unreadable_fraction` is {max_unreadable_fraction}, allowed: [0, 1].")

    if source == "photographs":
        if streaming:
            raise ValueError("`streaming` is True, 'photographs' is in memory: allowed is False.")
        return PhotographDataset(split, resolution=resolution, train=train, seed=seed, max_samples=max_samples)

    dataset = _load(source, split, config_name, revision, cache_dir, streaming)
    if not streaming and len(dataset) == 0:
        raise ValueError(f"The split {split!r} of {source!r} is empty.")
    if dataset.features is None:
        raise ValueError(f"`streaming` is True, but {source!r} does not say which columns it has: allowed is False.")
    image_column = _find_image_column(dataset.features, image_column, source)
    if label_column is not None:
        label_column = _find_label_column(dataset.features, label_column, source)
    dataset = dataset.select_columns([image_column] if label_column is None else [image_column, label_column])
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))  # decoded here: a bad file is no crash
    id2label, label_ids = _read_labels(dataset, label_column, source)

    options = {
        "resolution": resolution,
        "train": train,
        "center_crop": center_crop,
        "image_column": image_column,
        "label_column": label_column,
        "id2label": id2label,
        "label_ids": label_ids,
        "seed": seed,
        "max_unreadable_fraction": max_unreadable_fraction,
    }
    if streaming:
        if max_samples is not None:
            dataset = dataset.take(max_samples)
        return StreamingImageDataset(dataset, shuffle_buffer_size=shuffle_buffer_size, **options)
    if max_samples is not None and max_samples < len(dataset):
        dataset = dataset.select([i * len(dataset) // max_samples for i in range(max_samples)])
    return ImageDataset(dataset, **options)


class ImageDataset(Dataset):
    """
    Images of a `datasets.Dataset`, decoded, cropped and flipped. Made by [`load_image_dataset`].

    Random crops and flips are keyed by (seed, epoch, index): the same for any number of workers and processes, and
    again after a resume. The epoch reaches running worker processes too. (A loader prepared by accelerate does not
    always pass `set_epoch` on to the dataset; call it here.)

    An image that cannot be decoded is named in a warning, once, and counted in `num_unreadable`. With `train=True` the
    next readable image takes its place. With `train=False` its item has `pixel_values` of shape `(0, 3, R, R)`, and
    [`collate_images`] drops it. [`UnreadableImagesError`] is raised as soon as

    - more than `max_unreadable_fraction` of the data set is known to be unreadable (up to four images, if they are at
      most half of it, are never too many unless the fraction is 0); or
    - from 100 images seen on, their unreadable share exceeds `max_unreadable_fraction` by more than three standard
      deviations of what chance would give; or
    - no image of the data set can be read.

    Every process counts for itself, its workers together.

    Args:
        dataset (`datasets.Dataset`): With an undecoded image column.
        resolution (`int`): Side R of the images in pixels.
        train (`bool`): Random crops and flips, or the centre crop.
        center_crop (`bool`): With `train`, flips only.
        image_column (`str`), label_column (`str`, *optional*): Columns.
        id2label (`dict[int, str]`): Names of the classes.
        label_ids (`dict[str, int]`, *optional*): Ids of string labels.
        seed (`int`), max_unreadable_fraction (`float`): As in [`load_image_dataset`].

    Attributes:
        id2label (`dict[int, str]`): Names of the classes.
        num_classes (`int`): Number of classes.
        resolution (`int`): Side of the images in pixels.
        num_unreadable (`int`): Images found unreadable so far.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        resolution: int,
        train: bool,
        center_crop: bool,
        image_column: str,
        label_column: str | None,
        id2label: dict[int, str],
        label_ids: dict[str, int] | None,
        seed: int,
        max_unreadable_fraction: float,
    ):
        self.dataset = dataset
        self.resolution = resolution
        self.train = train
        self.center_crop = center_crop
        self.image_column = image_column
        self.label_column = label_column
        self.id2label = id2label
        self.label_ids = label_ids
        self.num_classes = len(id2label)
        self.seed = seed
        self.max_unreadable_fraction = max_unreadable_fraction
        # in shared memory: one truth for all worker processes
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._status = torch.full((len(dataset),), UNSEEN, dtype=torch.uint8).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops and flips of epoch `epoch`."""
        self._epoch.fill_(epoch)

    @property
    def num_unreadable(self) -> int:
        """Images found unreadable so far."""
        return int((self._status == UNREAD).sum())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` is {index}, allowed: 0 to {len(self) - 1}.")
        if not self.train:
            image, row = self._read(index)
            if image is None:
                pixel_values = torch.empty(0, 3, self.resolution, self.resolution)
            else:
                pixel_values = to_pixel_values(adm_center_crop(image, self.resolution))
            return {"pixel_values": pixel_values, **_label_and_id(row, index, self)}

        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if self._status[candidate] == UNREAD:
                continue
            image, row = self._read(candidate)
            if image is not None:
                generator = np.random.default_rng([self.seed, int(self._epoch), index])
                pixel_values = to_pixel_values(_augment(image, self, generator))
                return {"pixel_values": pixel_values, **_label_and_id(row, candidate, self)}
        raise UnreadableImagesError(f"None of the {len(self)} images can be read.")

    def _read(self, index: int) -> tuple[PIL.Image.Image | None, dict[str, Any]]:
        """The RGB image, or `None` where it is unreadable, and its row."""
        row = self.dataset[index]
        try:
            image = decode_image(row[self.image_column])
        except UNREADABLE as error:
            if self._status[index] != UNREAD:
                self._status[index] = UNREAD
                seen = int((self._status != UNSEEN).sum())
                warn_unreadable(_image_id(row[self.image_column], index), self.num_unreadable, error)
                check_unreadable(self.num_unreadable, seen, len(self), self.max_unreadable_fraction)
            return None, row
        self._status[index] = READABLE
        return image, row


class StreamingImageDataset(IterableDataset):
    """
    Images of a `datasets.IterableDataset`, read on the way. Made by [`load_image_dataset`] with `streaming=True`.

    The length is not known, so training needs `--max_train_steps`. With `train=True` shards and a buffer of images are
    shuffled, keyed by (seed, epoch), and crops and flips are drawn as in [`ImageDataset`], keyed by the place in the
    stream. Unreadable images are left out; the second and third rule of [`ImageDataset`] apply, in every worker
    process for itself.

    Sharding: the dataset holds the part of the stream that belongs to this process (whole shards, if the number of
    processes divides theirs, otherwise every n-th image) and divides that among the loader's workers, of which no more
    than there are shards find work. So create it after the `Accelerator`, and do not let `accelerator.prepare` share
    out its loader once more; `accelerate.data_loader.prepare_data_loader(loader, accelerator.device, num_processes=1,
    process_index=0, put_on_device=True, dispatch_batches=False)` does the rest of what `prepare` does. A resumed run
    reads the stream again up to where it was (`accelerator.skip_first_batches`).

    Args:
        dataset (`datasets.IterableDataset`): With an undecoded image column.
        shuffle_buffer_size (`int`): Images in the buffer.
        resolution, train, center_crop, image_column, label_column: As in [`ImageDataset`].
        id2label, label_ids, seed, max_unreadable_fraction: As in [`ImageDataset`].

    Attributes:
        id2label (`dict[int, str]`): Names of the classes.
        num_classes (`int`): Number of classes.
        resolution (`int`): Side of the images in pixels.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        *,
        shuffle_buffer_size: int,
        resolution: int,
        train: bool,
        center_crop: bool,
        image_column: str,
        label_column: str | None,
        id2label: dict[int, str],
        label_ids: dict[str, int] | None,
        seed: int,
        max_unreadable_fraction: float,
    ):
        if train:
            dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
        self.rank = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            dataset = split_dataset_by_node(dataset, rank=self.rank, world_size=world_size)
        self.dataset = dataset
        self.resolution = resolution
        self.train = train
        self.center_crop = center_crop
        self.image_column = image_column
        self.label_column = label_column
        self.id2label = id2label
        self.label_ids = label_ids
        self.num_classes = len(id2label)
        self.seed = seed
        self.max_unreadable_fraction = max_unreadable_fraction
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, the crops and the flips of epoch `epoch`."""
        self._epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)  # shared with the workers by `datasets`

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker_info = get_worker_info()
        worker = 0 if worker_info is None else worker_info.id
        epoch = int(self._epoch)
        unreadable = seen = 0
        for seen, row in enumerate(self.dataset, start=1):
            try:
                image = decode_image(row[self.image_column])
            except UNREADABLE as error:
                unreadable += 1
                warn_unreadable(_image_id(row[self.image_column], seen - 1), unreadable, error)
                check_unreadable(unreadable, seen, None, self.max_unreadable_fraction)
                continue
            if self.train:
                generator = np.random.default_rng([self.seed, epoch, self.rank, worker, seen])
                image = _augment(image, self, generator)
            else:
                image = adm_center_crop(image, self.resolution)
            yield {"pixel_values": to_pixel_values(image), **_label_and_id(row, seen - 1, self)}
        if seen and unreadable == seen:
            raise UnreadableImagesError(f"None of the {seen} images of the stream can be read.")


def collate_images(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Make a batch of items; for `DataLoader(..., collate_fn=collate_images)`.

    Args:
        batch (`list[dict]`): Items of the datasets of this module. Unreadable ones are left out.

    Returns:
        `dict`: `pixel_values` (`torch.Tensor` of shape `(B, 3, R, R)`, float32), `class_labels` (`torch.Tensor` of
        shape `(B,)`, int64; not there without labels) and `image_id` (`list` of length B). B is the number of readable
        images, 0 if there is none.
    """
    readable = [item for item in batch if item["pixel_values"].ndim == 3]
    collated: dict[str, Any] = {"pixel_values": batch[0]["pixel_values"]}
    if readable:
        collated["pixel_values"] = torch.stack([item["pixel_values"] for item in readable])
    if "class_labels" in batch[0]:
        collated["class_labels"] = torch.tensor([item["class_labels"] for item in readable], dtype=torch.int64)
    collated["image_id"] = [item["image_id"] for item in readable]
    return collated


def decode_image(value: dict[str, Any]) -> PIL.Image.Image:
    """
    Decode one undecoded value of a `datasets.Image` column, with its EXIF orientation applied, to RGB.

    Args:
        value (`dict`): `bytes` and `path`, one of which may be `None`.

    Raises:
        One of `UNREADABLE`, if the file is missing, broken, or of a kind that PIL does not know.
    """
    if value is None:
        raise ValueError("there is no image (None).")
    return convert_to_rgb(datasets.Image().decode_example(value))  # decode_example transposes by EXIF


def warn_unreadable(image_id: str | int, count: int, error: BaseException) -> None:
    """Name an unreadable image in the log, the `count`-th."""
    logger.warning(f"Skipping unreadable image {image_id} (number {count}): {type(error).__name__}: {error}")


def check_unreadable(unreadable: int, seen: int, total: int | None, max_unreadable_fraction: float) -> None:
    """
    Raise [`UnreadableImagesError`] by the rules told in [`ImageDataset`].

    Args:
        unreadable (`int`), seen (`int`): Different images found unreadable, and looked at.
        total (`int`, *optional*): Images in the data set, if known.
        max_unreadable_fraction (`float`): Allowed share.
    """
    if max_unreadable_fraction == 0 or unreadable == total:
        too_many = unreadable > 0
    else:
        expected = max_unreadable_fraction * seen
        too_many = seen >= 100 and unreadable > expected + 3 * math.sqrt(expected)
        if total is not None:
            too_many |= unreadable > max(max_unreadable_fraction * total, min(FEW_UNREADABLE, total // 2))
    if too_many:
        of_total = "" if total is None else f", of {total} in the data set"
        raise UnreadableImagesError(
            f"{unreadable} of the {seen} images seen so far{of_total} cannot be read, `max_unreadable_fraction` is"
            f" {max_unreadable_fraction}. The warnings above name them."
        )


def _load(
    source: str, split: str, config_name: str | None, revision: str | None, cache_dir: str | None, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(source)
        except (IndexError, OSError) as error:  # IndexError: a split without rows, which has no files
            raise ValueError(
                f"The saved data set in {source!r} is incomplete, or one of its splits is empty:"
                f" {type(error).__name__}: {error}"
            ) from error
        if isinstance(saved, datasets.Dataset):
            saved = {str(saved.split or "train"): saved}
        if split not in saved:
            raise ValueError(f"`split` is {split!r}, the data set in {source!r} has: {', '.join(saved)}.")
        dataset = saved[split]
        return dataset.to_iterable_dataset(num_shards=min(16, max(1, len(dataset)))) if streaming else dataset

    try:
        return datasets.load_dataset(
            source, config_name, split=split, revision=revision, cache_dir=cache_dir, streaming=streaming
        )
    except ValueError as error:
        raise ValueError(
            f"The data set {source!r} cannot be loaded with `split` {split!r} and `config_name` {config_name!r}:"
            f" {error}"
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        kind = "the local folder" if folder.is_dir() else f"{source!r} is no local folder, and the Hub data set"
        raise ValueError(
            f"The data set {source!r} cannot be loaded: {kind} gives {type(error).__name__}: {error}. Allowed: a"
            " folder of images, of parquet files or of a saved `datasets` data set, a Hub id, or 'photographs'."
        ) from error


def _describe(features: datasets.Features) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def _find_image_column(features: datasets.Features, image_column: str, source: str) -> str:
    if image_column not in features:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        usual = [name for name in IMAGE_COLUMNS if name in images]
        if image_column != "image" or not (usual or len(images) == 1):
            raise ValueError(
                f"`image_column` is {image_column!r}, which {source!r} does not have. Its columns:"
                f" {_describe(features)}."
            )
        return usual[0] if usual else images[0]
    feature = features[image_column]
    encoded = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "string")
    struct_ = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (isinstance(feature, datasets.Image) or encoded or struct_):
        raise ValueError(
            f"`image_column` is {image_column!r}, which holds no images in {source!r}. Its columns:"
            f" {_describe(features)}."
        )
    return image_column


def _find_label_column(features: datasets.Features, label_column: str, source: str) -> str:
    if label_column not in features:
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = [name for name in LABEL_COLUMNS if name in features and _is_label(features[name])]
        if label_column != "label" or not (usual or len(labels) == 1):
            raise ValueError(
                f"`label_column` is {label_column!r}, which {source!r} does not have. Its columns:"
                f" {_describe(features)}. Images without labels: `label_column=None`. A folder of images gives labels"
                " by two or more class subfolders."
            )
        return usual[0] if usual else labels[0]
    if not _is_label(features[label_column]):
        raise ValueError(
            f"`label_column` is {label_column!r}, which holds no class labels, integers or strings in {source!r}. Its"
            f" columns: {_describe(features)}."
        )
    return label_column


def _is_label(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))


def _read_labels(
    dataset: datasets.Dataset | datasets.IterableDataset, label_column: str | None, source: str
) -> tuple[dict[int, str], dict[str, int] | None]:
    """Names of the classes and, for string labels, their ids."""
    if label_column is None:
        return {}, None
    feature = dataset.features[label_column]
    if isinstance(dataset, datasets.IterableDataset):
        if not isinstance(feature, datasets.ClassLabel):
            raise ValueError(
                f"`label_column` is {label_column!r}, whose classes {source!r} does not list: with `streaming` it has"
                " to be a ClassLabel column. Allowed: `streaming=False`, or `label_column=None`."
            )
        return dict(enumerate(feature.names)), None

    values = dataset.unique(label_column)
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        raise ValueError(
            f"`label_column` is {label_column!r}, where images of {source!r} have no label (None, or -1)."
        )
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names)), None
    if isinstance(values[0], str):
        names = sorted(values)
        return dict(enumerate(names)), {name: label for label, name in enumerate(names)}
    return {label: str(label) for label in range(max(values) + 1)}, None


def _image_id(value: dict[str, Any] | None, index: int) -> str | int:
    path = None if value is None else value["path"]
    if not path:
        return index
    # class folder and file name tell which image it is, wherever the data set lies
    return "/".join(Path(path).parts[-2:])


def _augment(
    image: PIL.Image.Image, dataset: ImageDataset | StreamingImageDataset, generator: np.random.Generator
) -> PIL.Image.Image:
    """The crop of a training image, mirrored with probability 1/2."""
    if dataset.center_crop:
        image = adm_center_crop(image, dataset.resolution)
    else:
        image = adm_random_crop(image, dataset.resolution, generator)
    return random_horizontal_flip(image, generator)


def _label_and_id(row: dict[str, Any], index: int, dataset: ImageDataset | StreamingImageDataset) -> dict[str, Any]:
    item: dict[str, Any] = {}
    if dataset.label_column is not None:
        label = row[dataset.label_column]
        if label is None or label == -1:
            raise ValueError(f"Image {_image_id(row[dataset.image_column], index)} has no label (None, or -1).")
        item["class_labels"] = label if dataset.label_ids is None else dataset.label_ids[label]
    item["image_id"] = _image_id(row[dataset.image_column], index)
    return item
