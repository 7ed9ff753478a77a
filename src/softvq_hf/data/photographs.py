"""The built-in data set: random crops of the colour photographs that scikit-image carries inside its wheel. Nothing is
downloaded; enough to see a tokenizer and a class-conditional generator train."""

import functools
from importlib import resources
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset

from softvq_hf.data.transforms import adm_center_crop, random_horizontal_flip, to_pixel_values


# The colour photographs among the files of the wheel, by what they show. The right view of the motorcycle, a stereo
# pair, is left out: it would show the held-out region of the left one.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
CROPS_PER_PHOTOGRAPH = {"train": 512, "validation": 16}
TRAINING_SHARE = 0.7  # of the width of every photograph


@functools.cache
def load_photograph(name: str) -> PIL.Image.Image:
    """
    One of [`PHOTOGRAPHS`] in RGB, read from the installed wheel of scikit-image.

    Raises:
        RuntimeError: If the installed scikit-image does not carry the file.
    """
    path = resources.files("skimage") / "data" / PHOTOGRAPHS[name]
    if not path.is_file():
        raise RuntimeError(f"The installed scikit-image carries no {PHOTOGRAPHS[name]}, which 'photographs' needs.")
    with path.open("rb") as file, PIL.Image.open(file) as image:
        return image.convert("RGB")


class PhotographDataset(Dataset):
    """
    Crops of eight colour photographs; the photograph is the class.

    Geometry: a vertical line at 70 % of the width (rounded down) divides every photograph. Training crops lie wholly
    left of it, validation crops wholly right of it: no pixel is in both. A crop is a square at a random place, resized
    to `resolution` (box halving, then bicubic). With s the short side of the photograph, the side of the crop is a
    random integer from max(resolution, s / 8) to max(3 * resolution, 3 * s / 8), both at most the short side of the
    region. Crops are enlarged only where the region is smaller than `resolution`; the narrowest one, the validation
    region of the cat, is 136 pixels wide.

    Item `index` is of class `index % 8`, so every run of eight items holds all classes. With `train=True` crops and
    horizontal flips are drawn anew in every epoch, keyed by (seed, epoch, index). With `train=False` they are the same
    in every epoch and for every seed, and there are no flips.

    Args:
        split (`str`): "train" (4096 crops per epoch) or "validation" (128 crops).
        resolution (`int`): Side of the images in pixels.
        train (`bool`): Whether to draw new crops and flips in every epoch.
        seed (`int`, *optional*, defaults to 0): Seed of the training crops.
        max_samples (`int`, *optional*): Use only the first crops.

    Attributes:
        id2label (`dict[int, str]`): Names of the classes.
        num_classes (`int`): Number of classes.
        resolution (`int`): Side of the images in pixels.
    """

    def __init__(self, split: str, *, resolution: int, train: bool, seed: int = 0, max_samples: int | None = None):
        if split not in CROPS_PER_PHOTOGRAPH:
            raise ValueError(f"`split` is {split!r}, 'photographs' has: {', '.join(CROPS_PER_PHOTOGRAPH)}.")
        self.split = split
        self.resolution = resolution
        self.train = train
        self.seed = seed
        self.id2label = dict(enumerate(PHOTOGRAPHS))
        self.num_classes = len(self.id2label)
        self._length = len(PHOTOGRAPHS) * CROPS_PER_PHOTOGRAPH[split]
        if max_samples is not None:
            self._length = min(self._length, max_samples)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by persistent workers

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops of epoch `epoch`; with `train=False` they do not depend on it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self._length

    def region(self, class_label: int) -> tuple[int, int, int, int]:
        """The part of a photograph that belongs to this split: (left, top, right, bottom) in pixels."""
        photograph = load_photograph(self.id2label[class_label])
        border = int(TRAINING_SHARE * photograph.width)
        if self.split == "train":
            return 0, 0, border, photograph.height
        return border, 0, photograph.width, photograph.height

    def crop_box(self, index: int) -> tuple[int, int, int, int]:
        """Where the crop of item `index` lies in its photograph: (left, top, right, bottom) in pixels."""
        return self._draw_crop_box(index, self._generator(index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._length:
            raise IndexError(f"`index` is {index}, allowed: 0 to {self._length - 1}.")
        generator = self._generator(index)
        class_label = index % self.num_classes
        crop = load_photograph(self.id2label[class_label]).crop(self._draw_crop_box(index, generator))
        crop = adm_center_crop(crop, self.resolution)
        if self.train:
            crop = random_horizontal_flip(crop, generator)
        return {
            "pixel_values": to_pixel_values(crop),
            "class_labels": class_label,
            "image_id": f"{self.id2label[class_label]}-{self.split}-{index}",
        }

    def _generator(self, index: int) -> np.random.Generator:
        if self.train:
            return np.random.default_rng([self.seed, int(self._epoch), index])
        return np.random.default_rng(index)

    def _draw_crop_box(self, index: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        class_label = index % self.num_classes
        short_side = min(load_photograph(self.id2label[class_label]).size)
        left, top, right, bottom = self.region(class_label)
        limit = min(right - left, bottom - top)
        smallest = min(max(self.resolution, short_side // 8), limit)
        largest = min(max(3 * self.resolution, 3 * short_side // 8), limit)
        side = int(generator.integers(smallest, largest, endpoint=True))
        x = int(generator.integers(left, right - side, endpoint=True))
        y = int(generator.integers(top, bottom - side, endpoint=True))
        return x, y, x + side, y + side
