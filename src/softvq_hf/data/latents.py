"""Cached latents: the latents of every image and of its mirror image, in arrow shards that `datasets` reads, with the
statistics that normalise them and the fingerprint of the tokenizer that made them.

    latents/
        latents.json                        what was encoded, by which tokenizer, and the statistics
        data/train-00000-of-00020.arrow     columns latent, latent_flip, label, image_id
        vae/                                the tokenizer, with `shift_factor` and `scaling_factor` set

`datasets.load_dataset("latents")` reads the same files.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from diffusers import ModelMixin
from torch.utils.data import Dataset

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


METADATA_FILE = "latents.json"
TOKENIZER_FOLDER = "vae"
SHARD_METADATA = b"softvq_hf"


@dataclass
class LatentMoments:
    """
    Mean and variance of numbers that come in parts, in float64. Parts are merged by the formula of Chan et al. (1979),
    which does not lose digits where the mean is large beside the deviation.

    Args:
        count (`int`): How many numbers.
        mean (`float`): Their mean.
        squares (`float`): Sum of their squared differences from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, latents: np.ndarray) -> "LatentMoments":
        """Statistics of all entries of an array."""
        values = latents.astype(np.float64)
        mean = float(values.mean())
        return cls(values.size, mean, float(((values - mean) ** 2).sum()))

    def merge(self, other: "LatentMoments") -> "LatentMoments":
        """Statistics of the numbers of both."""
        count = self.count + other.count
        if count == 0:
            return LatentMoments()
        difference = other.mean - self.mean
        mean = self.mean + difference * other.count / count
        return LatentMoments(
            count, mean, self.squares + other.squares + difference**2 * self.count * other.count / count
        )

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return (self.squares / self.count) ** 0.5


def tokenizer_fingerprint(tokenizer: ModelMixin) -> str:
    """
    SHA-256 over the configuration and the weights of a tokenizer: equal for two tokenizers exactly if they encode
    alike. `scaling_factor` and `shift_factor`, which come after encoding, and where the tokenizer was loaded from do
    not count.

    Args:
        tokenizer ([`AutoencoderSoftVQ`]): In the dtype that it was saved in.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    config = {
        name: value
        for name, value in tokenizer.config.items()
        if not name.startswith("_") and name not in ("scaling_factor", "shift_factor")
    }
    digest = hashlib.sha256(json.dumps([type(tokenizer).__name__, config], sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def shard_path(latents_dir: str | Path, shard: int, num_shards: int) -> Path:
    """Where shard number `shard` lies; the form of the name tells `datasets` which files are data."""
    return Path(latents_dir, "data", f"train-{shard:05d}-of-{num_shards:05d}.arrow")


def write_latent_shard(
    path: Path,
    latent: np.ndarray,
    latent_flip: np.ndarray,
    label: list[int],
    image_id: list[str],
    id2label: dict[int, str],
    unreadable: list[str],
) -> None:
    """
    Write one shard, at once or not at all: under a temporary name first, then renamed. Its statistics are in its
    schema.

    Args:
        path (`Path`): Where to, see [`shard_path`].
        latent (`np.ndarray` of shape `(N, L, C)`), latent_flip (same shape): Raw latents, float32 or float16.
        label (`list[int]`), image_id (`list[str]`): Of each image.
        id2label (`dict[int, str]`): Names of the classes.
        unreadable (`list[str]`): Images of this shard that could not be read and are left out.

    Raises:
        ValueError: If a latent is not finite.
    """
    for latents in (latent, latent_flip):
        finite = np.isfinite(latents).all(axis=(1, 2))
        if not finite.all():
            raise ValueError(
                f"The latent of image {image_id[int(finite.argmin())]} is not finite as {latents.dtype}, allowed:"
                " finite numbers. bf16 or no mixed precision, and latents in float32, reach further."
            )
    array = datasets.Array2D(shape=latent.shape[1:], dtype=str(latent.dtype))
    features = datasets.Features(
        latent=array,
        latent_flip=array,
        label=datasets.ClassLabel(names=[id2label[i] for i in range(len(id2label))]),
        image_id=datasets.Value("string"),
    )
    statistics = LatentMoments.of(latent).merge(LatentMoments.of(latent_flip)) if len(latent) else LatentMoments()
    metadata = json.dumps({"statistics": asdict(statistics), "unreadable": unreadable}).encode()
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, SHARD_METADATA: metadata})
    table = pa.table(
        [
            _to_arrow(latent, features.arrow_schema.field("latent").type),
            _to_arrow(latent_flip, features.arrow_schema.field("latent_flip").type),
            pa.array(label, pa.int64()),
            pa.array(image_id, pa.string()),
        ],
        schema=schema,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(table)
    os.replace(unfinished, path)


def _to_arrow(latent: np.ndarray, extension_type: pa.ExtensionType) -> pa.ExtensionArray:
    images, tokens, channels = latent.shape
    rows = pa.ListArray.from_arrays(
        np.arange(0, images * tokens * channels + 1, channels, dtype=np.int32), pa.array(latent.reshape(-1))
    )
    nested = pa.ListArray.from_arrays(np.arange(0, images * tokens + 1, tokens, dtype=np.int32), rows)
    return pa.ExtensionArray.from_storage(extension_type, nested.cast(extension_type.storage_type))


def read_shard_metadata(path: Path) -> tuple[LatentMoments, list[str]]:
    """The statistics of a shard, and the images that it left out."""
    with pa.memory_map(str(path)) as file:
        metadata = json.loads(pa.ipc.open_stream(file).schema.metadata[SHARD_METADATA])
    return LatentMoments(**metadata["statistics"]), metadata["unreadable"]


def read_metadata(latents_dir: str | Path) -> dict[str, Any]:
    """
    Read `latents.json`.

    Raises:
        ValueError: If the folder has none.
    """
    path = Path(latents_dir, METADATA_FILE)
    if not path.is_file():
        raise ValueError(
            f"`latents_dir` is {str(latents_dir)!r}, which has no {METADATA_FILE}; allowed: a folder written by"
            " training/cache_latents.py."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def write_metadata(latents_dir: str | Path, metadata: dict[str, Any]) -> None:
    """Write `latents.json`, at once or not at all."""
    path = Path(latents_dir, METADATA_FILE)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def load_cached_latents(latents_dir: str | Path, *, seed: int = 0, train: bool = True) -> "LatentDataset":
    """
    Load what `training/cache_latents.py` has written. The shards stay on disk, mapped into memory.

    Args:
        latents_dir (`str` or `Path`): The folder.
        seed (`int`, *optional*, defaults to 0): Seed of the choice between image and mirror image.
        train (`bool`, *optional*, defaults to `True`): Take the mirror image with probability 1/2, or never.

    Returns:
        [`LatentDataset`]

    Raises:
        ValueError: If `latents_dir` holds no cached latents, caching was not finished (the missing shards are listed),
            or the tokenizer in `vae/` is not the one that made them, or has other statistics.
    """
    if seed < 0:
        raise ValueError(f"`seed` is {seed}, allowed: integers from 0 on.")
    metadata = read_metadata(latents_dir)
    num_shards = metadata["num_shards"]
    paths = [shard_path(latents_dir, shard, num_shards) for shard in range(num_shards)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or "statistics" not in metadata:
        listed = f": {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} missing" if missing else ""
        raise ValueError(
            f"`latents_dir` is {str(latents_dir)!r}, where caching was not finished ({num_shards - len(missing)} of"
            f" {num_shards} shards{listed}). Run training/cache_latents.py again with the same arguments: it goes on."
        )
    tokenizer_dir = Path(latents_dir, TOKENIZER_FOLDER)
    tokenizer = AutoencoderSoftVQ.from_pretrained(tokenizer_dir)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != metadata["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"`latents_dir` is {str(latents_dir)!r}, whose latents were made by the tokenizer"
            f" {metadata['tokenizer']['name_or_path']!r} ({metadata['tokenizer']['fingerprint'][:12]}), but"
            f" {tokenizer_dir} is another one ({fingerprint[:12]}): its decoder would not fit."
        )
    for name in ("shift_factor", "scaling_factor"):
        value, cached = tokenizer.config[name], metadata["statistics"].get(name)  # earlier folders do not tell
        if cached is not None and value != cached:
            raise ValueError(
                f"`latents_dir` is {str(latents_dir)!r}, whose latents were cached with the `{name}` {cached}, but"
                f" {tokenizer_dir} has {value}, allowed: the same. Run training/cache_latents.py again with the same"
                " arguments: it keeps the latents, and writes their tokenizer anew."
            )
    dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
    return LatentDataset(
        dataset,
        id2label={int(label): name for label, name in metadata["id2label"].items()},
        shift_factor=tokenizer.config.shift_factor,
        scaling_factor=tokenizer.config.scaling_factor,
        tokenizer_dir=str(tokenizer_dir),
        seed=seed,
        train=train,
    )


class LatentDataset(Dataset):
    """
    Cached latents. Made by [`load_cached_latents`].

    Items are dictionaries of `latents` (`torch.Tensor` of shape `(L, C)`, float32, raw: normalise them by
    [`AutoencoderSoftVQ.scale_latent`]), `class_labels` (`int`) and `image_id` (`str`). With `train=True` the latent is
    that of the mirror image with probability 1/2, keyed by (seed, epoch, index).

    Args:
        dataset (`datasets.Dataset`): Columns `latent`, `latent_flip`, `label` and `image_id`.
        id2label (`dict[int, str]`): Names of the classes.
        shift_factor (`float`), scaling_factor (`float`): Normalisation, as in the configuration of the tokenizer.
        tokenizer_dir (`str`): Folder of the tokenizer.
        seed (`int`), train (`bool`): As in [`load_cached_latents`].

    Attributes:
        id2label (`dict[int, str]`): Names of the classes.
        num_classes (`int`): Number of classes.
        shift_factor (`float`): Mean of all latents.
        scaling_factor (`float`): One over their standard deviation.
        tokenizer_dir (`str`): Folder of the tokenizer.
        latent_shape (`tuple[int, int]`): Tokens and channels (L, C) of a latent.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        id2label: dict[int, str],
        shift_factor: float,
        scaling_factor: float,
        tokenizer_dir: str,
        seed: int,
        train: bool,
    ):
        self.latent_shape = tuple(dataset.features["latent"].shape)
        self.dataset = dataset
        self.id2label = id2label
        self.num_classes = len(id2label)
        self.shift_factor = shift_factor
        self.scaling_factor = scaling_factor
        self.tokenizer_dir = tokenizer_dir
        self.seed = seed
        self.train = train
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by persistent workers

    def set_epoch(self, epoch: int) -> None:
        """Choose between images and mirror images anew."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` is {index}, allowed: 0 to {len(self) - 1}.")
        column = "latent"
        if self.train and np.random.default_rng([self.seed, int(self._epoch), index]).random() < 0.5:
            column = "latent_flip"
        table = self.dataset.data  # of one column, without decoding, only the bytes of this row are read
        values = table.column(column).slice(index, 1).chunk(0).storage.flatten().flatten().to_numpy()
        latents = torch.from_numpy(values.astype(np.float32)).reshape(self.latent_shape)
        class_labels, image_id = (table.column(name)[index].as_py() for name in ("label", "image_id"))
        return {"latents": latents, "class_labels": class_labels, "image_id": image_id}
