"""From "where the images are" to torch datasets of `pixel_values`: Hub data sets, image folders, shards (parquet,
webdataset), saved `datasets` and the built-in photographs, read through `datasets`. Unreadable images are skipped,
counted and named."""

import io
import logging
import math
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets.utils.file_utils import xopen
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from softvq_hf.data.photographs import PhotographDataset
from softvq_hf.data.transforms import (
    adm_center_crop,
    adm_random_crop,
    convert_to_rgb,
    largest_short_side,
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
# Never too many in a small data set: so many if they are at most half of it, or an eighth of it up to MANY_UNREADABLE.
FEW_UNREADABLE, MANY_UNREADABLE = 4, 16
UNSEEN, READABLE, UNREAD = 0, 1, 2

OPEN_SHARDS = 10  # shards that a training stream mixes at a time, as many as `datasets.IterableDataset.shuffle`


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
    num_classes: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    revision: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    max_unreadable_fraction: float = 0.01,
    shuffle_buffer_size: int = 1000,
    center_crop: bool = False,
    jpeg_draft: bool = False,
    fast_resize: bool = False,
) -> "ImageDataset | StreamingImageDataset | PhotographDataset":
    """
    Load images as a torch dataset.

    Args:
        source (`str`): Where the images are:
            - a local folder: images in class subfolders (below `train` and `val` folders if there are splits) or with
              a `metadata.csv` or `metadata.jsonl`, parquet files, webdataset tar files, or what
              `datasets.save_to_disk` has written;
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
        num_classes (`int`, *optional*): Number of classes, where labels are integers without names, e.g. the `cls`
            files of webdataset. By default the largest label tells, which a stream does not know: with
            `streaming=True` such labels need `num_classes`.
        streaming (`bool`, *optional*, defaults to `False`): Read the data set on the way, see
            [`StreamingImageDataset`].
        cache_dir (`str`, *optional*): Where `datasets` keeps what it downloads and prepares.
        revision (`str`, *optional*): Revision of a Hub data set.
        max_samples (`int`, *optional*): Use at most this many images, spread evenly over the data set (a folder sorted
            by class keeps all its classes); of a stream the first ones.
        seed (`int`, *optional*, defaults to 0): Seed of crops, flips and the order of a stream.
        max_unreadable_fraction (`float`, *optional*, defaults to 0.01): Share of unreadable images, in [0, 1], that is
            skipped with a warning; see [`ImageDataset`] for when it counts as exceeded.
        shuffle_buffer_size (`int`, *optional*, defaults to 1000): Images of a training stream that are shuffled at a
            time, in every worker process; so many encoded images are held in memory.
        center_crop (`bool`, *optional*, defaults to `False`): With `train=True`, the ADM centre crop in place of the
            random one, flips stay: how generators are trained on images. 'photographs' are crops already.
        jpeg_draft (`bool`, *optional*, defaults to `False`): Let the decoder halve JPEG files with even sides, up to
            three times, where ADM's crops begin with halving. Faster for a short side of at least twice the
            resolution, and their pixels differ a little; all other images stay as they are.
        fast_resize (`bool`, *optional*, defaults to `False`): Do the last step of ADM's crops, the bicubic resize,
            with the 8-bit kernels of torch. Faster for all images, and pixels differ by a few grey levels at most. The
            guide to data has measured speed and errors of both. 'photographs' ignore both.

    Returns:
        [`ImageDataset`], [`StreamingImageDataset`] or [`PhotographDataset`]. Items are dictionaries of `pixel_values`
        (`torch.Tensor` of shape `(3, R, R)`, float32 in [-1, 1]), `class_labels` (`int`; not there with
        `label_column=None`), `image_id` (file name or index) and, rarely, `unreadable` (ids of images that were left
        out before this one). All have `id2label`, `num_classes` (0 without labels), `resolution` and
        `set_epoch(epoch)`. [`collate_images`] makes batches of them.

    Raises:
        ValueError: If an argument is out of range; `source` cannot be found or is empty; the split does not exist (the
            existing ones are listed); the columns do not exist, are ambiguous or have another type (all are listed);
            labels are missing; or there is another number of classes than `num_classes`.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"`resolution` is {resolution!r}, allowed: integers from 1 on.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` is {max_samples}, allowed: integers from 1 on, or None for all.")
    if seed < 0:
        raise ValueError(f"`seed` is {seed}, allowed: integers from 0 on.")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"`num_classes` is {num_classes}, allowed: integers from 1 on, or None.")
    if shuffle_buffer_size < 1:
        raise ValueError(f"`shuffle_buffer_size` is {shuffle_buffer_size}, allowed: integers from 1 on.")
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
    id2label, label_ids = _read_labels(dataset, label_column, num_classes, source)

    options = {
        "resolution": resolution,
        "train": train,
        "center_crop": center_crop,
        "jpeg_draft": jpeg_draft,
        "fast_resize": fast_resize,
        "image_column": image_column,
        "label_column": label_column,
        "id2label": id2label,
        "label_ids": label_ids,
        "seed": seed,
        "max_unreadable_fraction": max_unreadable_fraction,
    }
    if streaming:
        return StreamingImageDataset(
            dataset, max_samples=max_samples, shuffle_buffer_size=shuffle_buffer_size, **options
        )
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
    [`collate_images`] drops it. Either way the item's `unreadable` lists its id, every time it is met.
    [`UnreadableImagesError`] is raised as soon as

    - more than `max_unreadable_fraction` of the data set is known to be unreadable (up to four images, if they are at
      most half of it, and up to sixteen, if they are at most an eighth, are never too many unless the fraction is 0);
      or
    - from 100 images seen on, their unreadable share exceeds `max_unreadable_fraction` by more than three standard
      deviations of what chance would give; or
    - no image of the data set can be read.

    Every process counts for itself, its workers together.

    Args:
        dataset (`datasets.Dataset`): With an undecoded image column.
        resolution (`int`): Side R of the images in pixels.
        train (`bool`): Random crops and flips, or the centre crop.
        center_crop (`bool`): With `train`, flips only.
        jpeg_draft (`bool`), fast_resize (`bool`): As in [`load_image_dataset`].
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
        jpeg_draft: bool,
        fast_resize: bool,
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
        self.jpeg_draft = jpeg_draft
        self.fast_resize = fast_resize
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
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Items of a batch, which `DataLoader` asks for: rows cost less all at once."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"`index` is {index}, allowed: 0 to {len(self) - 1}.")
        rows = self.dataset.__getitems__(indices)
        return [self._item(index, row) for index, row in zip(indices, rows, strict=True)]

    def _item(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        if not self.train:
            image = self._read(index, row)
            image_id = _image_id(row[self.image_column], index)
            item = {**_label(row, image_id, self), "image_id": image_id}
            if image is None:
                item["pixel_values"] = torch.empty(0, 3, self.resolution, self.resolution)
                item["unreadable"] = [image_id]
            else:
                item["pixel_values"] = _pixel_values(image, self, None)
            return item

        unreadable = []
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if offset > 0:
                row = self.dataset[candidate]
            image = self._read(candidate, row)
            image_id = _image_id(row[self.image_column], candidate)
            if image is None:
                unreadable.append(image_id)
                continue
            generator = np.random.default_rng([self.seed, int(self._epoch), index])
            item = {"pixel_values": _pixel_values(image, self, generator)}
            item |= {**_label(row, image_id, self), "image_id": image_id}
            if unreadable:
                item["unreadable"] = unreadable
            return item
        raise UnreadableImagesError(f"None of the {len(self)} images can be read.")

    def _read(self, index: int, row: dict[str, Any]) -> PIL.Image.Image | None:
        """The RGB image of row number `index`, or `None` where it is unreadable."""
        status = self._status.numpy()  # the same memory, an element of which is read and written at a lower cost
        if status[index] == UNREAD:
            return None
        try:
            image = decode_image(row[self.image_column], _draft_side(self))
        except UNREADABLE as error:
            if status[index] != UNREAD:
                status[index] = UNREAD
                seen = int((status != UNSEEN).sum())
                warn_unreadable(_image_id(row[self.image_column], index), self.num_unreadable, error)
                check_unreadable(self.num_unreadable, seen, len(self), self.max_unreadable_fraction)
            return None
        status[index] = READABLE
        return image


class StreamingImageDataset(IterableDataset):
    """
    Images of a `datasets.IterableDataset`, read on the way. Made by [`load_image_dataset`] with `streaming=True`.

    The length is not known, so training needs `--max_train_steps`. With `train=True` the order is a function of seed
    and epoch: the shards are shuffled, up to ten of them are read in turn, and every `shuffle_buffer_size` images in a
    row are shuffled. Crops and flips are drawn as in [`ImageDataset`], keyed by (seed, epoch, shard, row): the same
    for any number of processes and workers. With `train=False` nothing is shuffled. Unreadable images are left out,
    their ids are in `unreadable` of the item that comes next (of an item without pixels if none does); the second and
    third rule of [`ImageDataset`] apply, in every worker process for itself.

    Sharing: the worker processes of the loaders of all processes get equal parts of the shards. Where the shards do
    not divide among them, a shard is shared by row, so every image comes once per epoch whatever the numbers of
    processes, workers and shards. Workers share the cost of reading only where there are at least as many shards.
    Create the dataset after the `Accelerator`, and do not let `accelerator.prepare` share out its loader once more;
    [`~softvq_hf.training.dataloader.build_dataloader`] makes such a loader.

    Resuming: `state_dict` tells the position after the last item, exactly and in few bytes, and `load_state_dict`
    makes the next iteration go on from there with the items of the uninterrupted one; at most `shuffle_buffer_size`
    rows, and the rows before them in the open shards where their format knows no other way (tar), are read again, none
    is decoded again. `torchdata.stateful_dataloader.StatefulDataLoader` calls both, in its worker processes too.

    Args:
        dataset (`datasets.IterableDataset`): With an undecoded image column.
        max_samples (`int`, *optional*): Use the first images only. Their shards are then read in order, by all.
        shuffle_buffer_size (`int`): Images that are shuffled at a time.
        resolution, train, center_crop, jpeg_draft, fast_resize: As in [`ImageDataset`].
        image_column, label_column: As in [`ImageDataset`].
        id2label, label_ids, seed, max_unreadable_fraction: As in [`ImageDataset`].

    Attributes:
        id2label (`dict[int, str]`): Names of the classes.
        num_classes (`int`): Number of classes.
        resolution (`int`): Side of the images in pixels.
        num_shards (`int`): Shards that are shuffled and shared.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        *,
        max_samples: int | None,
        shuffle_buffer_size: int,
        resolution: int,
        train: bool,
        center_crop: bool,
        jpeg_draft: bool,
        fast_resize: bool,
        image_column: str,
        label_column: str | None,
        id2label: dict[int, str],
        label_ids: dict[str, int] | None,
        seed: int,
        max_unreadable_fraction: float,
    ):
        self.dataset = dataset if max_samples is None else dataset.take(max_samples)
        self.num_shards = dataset.num_shards if max_samples is None else 1
        self.rank, self.world_size = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.shuffle_buffer_size = shuffle_buffer_size
        self.resolution = resolution
        self.train = train
        self.center_crop = center_crop
        self.jpeg_draft = jpeg_draft
        self.fast_resize = fast_resize
        self.image_column = image_column
        self.label_column = label_column
        self.id2label = id2label
        self.label_ids = label_ids
        self.num_classes = len(id2label)
        self.seed = seed
        self.max_unreadable_fraction = max_unreadable_fraction
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by persistent workers
        self._position = self._start()
        self._resumes = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, the crops and the flips of epoch `epoch`."""
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration of this process (or worker process) stands."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Make the next iteration go on from a position, in the epoch it belongs to.

        Args:
            state_dict (`dict`): What `state_dict` gave for the same data, arguments, process and worker, and the same
                numbers of them.

        Raises:
            ValueError: If there are other numbers of processes, workers or shards than there were.
        """
        for name, value in self._readers().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"The position in the stream has `{name}` {state_dict[name]}, this run has {value}: a stream goes"
                    " on with the same data and as many processes and loader workers as before."
                )
        self._position, self._resumes = dict(state_dict), True
        self._epoch.fill_(state_dict["epoch"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not a generator: the position has to be the right one before the first item is asked for.
        if not self._resumes:
            self._position = self._start()
        self._resumes = False
        return self._items()

    def _readers(self) -> dict[str, int]:
        """Which of how many readers this process (or worker process) is."""
        worker_info = get_worker_info()
        worker, num_workers = (0, 1) if worker_info is None else (worker_info.id, worker_info.num_workers)
        return {
            "reader": self.rank * num_workers + worker,
            "num_readers": self.world_size * num_workers,
            "num_shards": self.num_shards,
        }

    def _start(self) -> dict[str, Any]:
        return {
            **self._readers(),
            "epoch": int(self._epoch),
            "block": 0,  # blocks of `shuffle_buffer_size` rows that are done
            "offset": 0,  # rows of the block that are done
            "rows": ShardRows.START,  # where the rows of the block begin
            "seen": 0,
            "unreadable": 0,
        }

    def _items(self) -> Iterator[dict[str, Any]]:
        position = self._position
        epoch, reader, num_readers = (position[name] for name in ("epoch", "reader", "num_readers"))
        offset, seen, unreadable = (position[name] for name in ("offset", "seen", "unreadable"))
        shards = np.arange(self.num_shards)
        if self.train:
            np.random.default_rng([self.seed, epoch]).shuffle(shards)
        block_size, open_shards = (self.shuffle_buffer_size, OPEN_SHARDS) if self.train else (1, 1)
        rows = ShardRows(self.dataset, shards.tolist(), reader, num_readers, open_shards, position["rows"])

        skipped, block = [], list(islice(rows, block_size))
        while block:
            next_block, next_rows = [], rows.state_dict()
            order = np.arange(len(block))
            if self.train:
                np.random.default_rng([self.seed, epoch, reader, position["block"]]).shuffle(order)
            for place in order[offset:]:
                shard, row_index, row = block[place]
                block[place] = None
                next_block += islice(rows, 1)  # little by little, so that workers read and decode at the same pace
                offset, seen = offset + 1, seen + 1
                image_id = _image_id(row[self.image_column], f"shard-{shard}/row-{row_index}")
                try:
                    image = decode_image(row[self.image_column], _draft_side(self))
                except UNREADABLE as error:
                    unreadable += 1
                    skipped.append(image_id)
                    warn_unreadable(image_id, unreadable, error)
                    check_unreadable(unreadable, seen, None, self.max_unreadable_fraction)
                    continue
                generator = np.random.default_rng([self.seed, epoch, shard, row_index])
                pixel_values = _pixel_values(image, self, generator)
                item = {"pixel_values": pixel_values, **_label(row, image_id, self), "image_id": image_id}
                if skipped:
                    item["unreadable"], skipped = skipped, []
                self._position = {**position, "offset": offset, "seen": seen, "unreadable": unreadable}
                yield item
            block = next_block + list(islice(rows, block_size - len(next_block)))
            position = {**position, "block": position["block"] + 1, "rows": next_rows}
            offset = 0
        if seen > 0 and unreadable == seen and (num_readers == 1 or seen > FEW_UNREADABLE):
            raise UnreadableImagesError(f"None of the {seen} images of the stream can be read.")
        if skipped:
            pixel_values = torch.empty(0, 3, self.resolution, self.resolution)
            item = {"pixel_values": pixel_values, **_label(row, image_id, self), "image_id": image_id}
            yield {**item, "unreadable": skipped}


class ShardRows:
    """
    The rows that belong to one of several readers, who share the shards of a `datasets.IterableDataset` equally.

    With S shards and N readers every shard has N slots, which its rows take in turn, and of all S * N slots, in the
    order of the shards, reader n has number n * S to (n + 1) * S - 1. Where N divides S these are whole shards.

    Args:
        dataset (`datasets.IterableDataset`): Divisible into `len(shards)` shards.
        shards (`list[int]`): Numbers of all shards, in the order in which to read them.
        reader (`int`), num_readers (`int`): Which one of how many readers this one is.
        num_open (`int`): Shards from which rows are taken in turn.
        state_dict (`dict`): Where to begin: `START`, or what `state_dict()` gave.

    Yields:
        `tuple[int, int, dict]`: Number of the shard, number of the row in it, and the row.
    """

    START = {"next_shard": 0, "turn": 0, "open": []}  # next_shard counts from the first shard of this reader

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        shards: list[int],
        reader: int,
        num_readers: int,
        num_open: int,
        state_dict: dict[str, Any],
    ):
        self.dataset = dataset
        self.num_shards = len(shards)
        self.num_readers = num_readers
        self.num_open = num_open
        start, stop = reader * len(shards), (reader + 1) * len(shards)
        self.shards = []  # number, first slot, last slot + 1
        for place in range(start // num_readers, -(-stop // num_readers)):
            first, last = start - place * num_readers, stop - place * num_readers
            self.shards.append((shards[place], max(first, 0), min(last, num_readers)))
        self.next_shard, self.turn = state_dict["next_shard"], state_dict["turn"]
        self.open = [self._open(**shard) for shard in state_dict["open"]]

    def _open(self, shard: int, row: int = 0, position: dict[str, Any] | None = None) -> dict[str, Any]:
        """Shard number `shard` of this reader, from row `row` on, where `datasets` stands at `position`."""
        dataset = self.dataset.shard(num_shards=self.num_shards, index=self.shards[shard][0])
        if position is not None:
            dataset.load_state_dict(position)
        # `iter` does not share the rows out among worker processes once more, as `__iter__` does
        rows = dataset.iter(batch_size=1)
        return {"shard": shard, "row": row, "position": position, "dataset": dataset, "rows": rows}

    def state_dict(self) -> dict[str, Any]:
        """Where the next row comes from."""
        names = ("shard", "row", "position")
        opened = [{name: shard[name] for name in names} for shard in self.open]
        return {"next_shard": self.next_shard, "turn": self.turn, "open": opened}

    def __iter__(self) -> "ShardRows":
        return self

    def __next__(self) -> tuple[int, int, dict[str, Any]]:
        while self.open or self.next_shard < len(self.shards):
            while len(self.open) < self.num_open and self.next_shard < len(self.shards):
                self.open.append(self._open(self.next_shard))
                self.next_shard += 1
            self.turn %= len(self.open)
            shard = self.open[self.turn]
            number, first_slot, last_slot = self.shards[shard["shard"]]
            for row in shard["rows"]:
                index, shard["row"] = shard["row"], shard["row"] + 1
                if first_slot <= index % self.num_readers < last_slot:
                    shard["position"] = shard["dataset"].state_dict()
                    self.turn += 1
                    return number, index, {name: values[0] for name, values in row.items()}
            del self.open[self.turn]
        raise StopIteration


def collate_images(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Make a batch of items; for `DataLoader(..., collate_fn=collate_images)`.

    Args:
        batch (`list[dict]`): Items of the datasets of this module. Unreadable ones are left out.

    Returns:
        `dict`: `pixel_values` (`torch.Tensor` of shape `(B, 3, R, R)`, float32), `class_labels` (`torch.Tensor` of
        shape `(B,)`, int64; not there without labels), `image_id` (`list` of length B) and, only if there are any,
        `unreadable` (`list[str]`, ids of the images that could not be read while the batch was made). B is the number
        of readable images, 0 if there is none.
    """
    readable = [item for item in batch if item["pixel_values"].ndim == 3]
    collated: dict[str, Any] = {"pixel_values": batch[0]["pixel_values"]}
    if readable:
        # as torch.stack, and in a worker process into shared memory at once
        collated["pixel_values"] = default_collate([item["pixel_values"] for item in readable])
    if "class_labels" in batch[0]:
        collated["class_labels"] = torch.tensor([item["class_labels"] for item in readable], dtype=torch.int64)
    collated["image_id"] = [item["image_id"] for item in readable]
    unreadable = [str(image_id) for item in batch for image_id in item.get("unreadable", ())]
    if unreadable:
        collated["unreadable"] = unreadable
    return collated


def decode_image(value: dict[str, Any], draft_side: int | None = None) -> PIL.Image.Image:
    """
    Decode one undecoded value of a `datasets.Image` column, with its EXIF orientation applied, to RGB.

    Args:
        value (`dict`): `bytes` and `path`, one of which may be `None`.
        draft_side (`int`, *optional*): Decode JPEG files at the smallest of 1/1, 1/2, 1/4 and 1/8 of their size that
            makes whole numbers of both sides, the short one at least so many pixels. The decoder then inverts the
            cosine transform of 8 x 8 pixels to 4 x 4, 2 x 2 or a single one.

    Raises:
        One of `UNREADABLE`, if the file is missing, broken, or of a kind that PIL does not know.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError("there is no image (None).")
    with xopen(value["path"], "rb") if value["bytes"] is None else io.BytesIO(value["bytes"]) as file:
        image = PIL.Image.open(file)
        if draft_side is not None:
            width, height = image.size
            scales = [s for s in (2, 4, 8) if width % s == height % s == 0 and min(width, height) // s >= draft_side]
            if scales:
                image.draft(None, (width // scales[-1], height // scales[-1]))  # leaves files alone that are not JPEG
        PIL.ImageOps.exif_transpose(image, in_place=True)
        return convert_to_rgb(image)


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
            few = max(min(FEW_UNREADABLE, total // 2), min(MANY_UNREADABLE, total // 8))
            too_many |= unreadable > max(max_unreadable_fraction * total, few)
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
            " folder of images, of parquet or webdataset tar files or of a saved `datasets` data set, a Hub id, or"
            " 'photographs'."
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
    dataset: datasets.Dataset | datasets.IterableDataset,
    label_column: str | None,
    num_classes: int | None,
    source: str,
) -> tuple[dict[int, str], dict[str, int] | None]:
    """Names of the classes and, for string labels, their ids."""
    id2label, label_ids = {}, None
    if label_column is not None:
        feature = dataset.features[label_column]
        if isinstance(dataset, datasets.IterableDataset):
            integers = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
            if isinstance(feature, datasets.ClassLabel):
                id2label = dict(enumerate(feature.names))
            elif integers and num_classes is not None:
                id2label = {label: str(label) for label in range(num_classes)}
            else:
                needed = "`num_classes` is needed" if integers else "string labels need `streaming=False`"
                raise ValueError(
                    f"`label_column` is {label_column!r}, whose classes {source!r} does not list: with `streaming` it"
                    f" has to be a ClassLabel column, or {needed}. Images without labels: `label_column=None`."
                )
        else:
            values = dataset.unique(label_column)
            if any(value is None or (isinstance(value, int) and value < 0) for value in values):
                raise ValueError(
                    f"`label_column` is {label_column!r}, where images of {source!r} have no label (None, or -1)."
                )
            if isinstance(feature, datasets.ClassLabel):
                id2label = dict(enumerate(feature.names))
            elif isinstance(values[0], str):
                id2label = dict(enumerate(sorted(values)))
                label_ids = {name: label for label, name in id2label.items()}
            else:
                id2label = {label: str(label) for label in range(max(max(values) + 1, num_classes or 0))}
    if num_classes is not None and len(id2label) != num_classes:
        raise ValueError(
            f"`num_classes` is {num_classes}, allowed: {len(id2label)}, as in {source!r} (`label_column` is"
            f" {label_column!r}), or None."
        )
    return id2label, label_ids


def _image_id(value: dict[str, Any] | None, index: int) -> str | int:
    path = None if value is None else value["path"]
    if not path:
        return index
    # class folder and file name tell which image it is, wherever the data set lies
    return "/".join(Path(path).parts[-2:])


def _draft_side(dataset: ImageDataset | StreamingImageDataset) -> int | None:
    """The short side down to which ADM's crop would halve an image whatever it draws; `None` without `jpeg_draft`."""
    if not dataset.jpeg_draft:
        return None
    if dataset.train and not dataset.center_crop:
        return largest_short_side(dataset.resolution)
    return dataset.resolution


def _pixel_values(
    image: PIL.Image.Image, dataset: ImageDataset | StreamingImageDataset, generator: np.random.Generator | None
) -> torch.Tensor:
    """`pixel_values` of a decoded image: its crop, in training mirrored with probability 1/2."""
    if dataset.train and not dataset.center_crop:
        crop = adm_random_crop(image, dataset.resolution, generator, fast=dataset.fast_resize)
    else:
        crop = adm_center_crop(image, dataset.resolution, fast=dataset.fast_resize)
    if dataset.train:
        crop = random_horizontal_flip(crop, generator)
    return to_pixel_values(crop)


def _label(row: dict[str, Any], image_id: str | int, dataset: ImageDataset | StreamingImageDataset) -> dict[str, int]:
    """`class_labels` of an item, where the data set has them."""
    if dataset.label_column is None:
        return {}
    label = row[dataset.label_column]
    if label is None or label == -1:
        raise ValueError(f"Image {image_id} has no label (None, or -1).")
    if dataset.label_ids is not None:
        label = dataset.label_ids[label]
    if not 0 <= label < dataset.num_classes:
        raise ValueError(f"Image {image_id} has the label {label}, allowed: 0 to {dataset.num_classes - 1}.")
    return {"class_labels": label}
