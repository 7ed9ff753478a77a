"""Where pixels and latents come from: image data sets, the built-in photographs, cached latents."""

from softvq_hf.data.images import (
    ImageDataset,
    StreamingImageDataset,
    UnreadableImagesError,
    collate_images,
    load_image_dataset,
)
from softvq_hf.data.latents import LatentDataset, load_cached_latents
from softvq_hf.data.photographs import PhotographDataset


__all__ = [
    "ImageDataset",
    "LatentDataset",
    "PhotographDataset",
    "StreamingImageDataset",
    "UnreadableImagesError",
    "collate_images",
    "load_cached_latents",
    "load_image_dataset",
]
