"""Images of a data set in batches, shared out over the processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from softvq_hf.data import collate_images
from softvq_hf.metrics.images import to_uint8


def image_batches(
    accelerator: Accelerator, dataset: Dataset, batch_size: int, *, num_workers: int = 0, desc: str = "images"
) -> Iterator[dict[str, Any]]:
    """
    Batches of this process, with a progress bar in images per second. No image is repeated or lost. Where
    the iterator has a name, `contextlib.closing` lets an error of the loop come below the bar, not behind it.

    Batch number b holds the images b * `batch_size` and following, whatever the number of processes, and process p of
    n takes the batches p, p + n, p + 2n and so on: a model sees the same batches with any number of processes, which
    may get different numbers of them.

    Args:
        accelerator (`Accelerator`): Names the device and this process.
        dataset (`Dataset`): From [`softvq_hf.data.load_image_dataset`] with `train=False`.
        batch_size (`int`): Images per batch.
        num_workers (`int`, *optional*, defaults to 0): Loader processes; 0 loads in this one.
        desc (`str`, *optional*, defaults to `"images"`): Title of the progress bar.

    Yields:
        `dict`: as [`softvq_hf.data.collate_images`], with `pixel_values` on the device, and
        `indices` (`torch.Tensor` of shape `(B,)`, int64, on the CPU), the numbers of the images in the data set.
        Images that cannot be read are left out of all but `unreadable`; B may be 0.
    """
    batches = torch.arange(len(dataset)).split(batch_size)[accelerator.process_index :: accelerator.num_processes]
    dataloader = DataLoader(
        dataset,
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    progress = tqdm(
        total=sum(map(len, batches)),
        desc=desc if accelerator.num_processes == 1 else f"{desc} (process 1 of {accelerator.num_processes})",
        unit="image",
        disable=not accelerator.is_main_process,
    )
    with progress:
        for indices, batch in zip(batches, dataloader, strict=True):
            batch["pixel_values"] = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            batch["indices"] = indices[batch.pop("readable")]
            yield batch
            progress.update(len(indices))


def unreadable_notes(image_ids: Sequence[str]) -> list[str]:
    """
    What the notes of a record say about images that could not be read.

    Args:
        image_ids (`Sequence[str]`): Those images of all processes, from `unreadable` of [`image_batches`].

    Returns:
        `list[str]`: one note, or none where all images could be read.
    """
    if not image_ids:
        return []
    return [f"{len(image_ids)} images could not be read and are left out: {', '.join(sorted(image_ids))}."]


def to_8_bit(pixel_values: torch.Tensor, rounding: str) -> torch.Tensor:
    """
    Images of a data set or a model as metrics take them.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Nominally in [-1, 1]; clamped. Finite.
        rounding (`str`): As in [`~softvq_hf.metrics.images.to_uint8`]. Images of a data set, which were 8-bit once,
            come back exactly with "round" only.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: uint8.
    """
    return to_uint8(pixel_values.float() / 2 + 0.5, rounding)


def _collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the readable images, and which ones those are."""
    readable = torch.tensor([item["pixel_values"].ndim == 3 for item in batch])
    return {**collate_images(batch), "readable": readable}
