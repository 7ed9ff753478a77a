"""Encode a data set once: latents of every image and of its mirror image, for the training of generators.

    accelerate launch training/cache_latents.py --pretrained_model_name_or_path outputs/softvq_l_64 \\
        --dataset_name ILSVRC/imagenet-1k --output_dir outputs/softvq_l_64_latents

The data set is divided into shards by index, whatever the number of processes; processes take turns at the shards that
are missing. A shard appears in `--output_dir` when it is finished, so an interrupted run goes on by the same command,
with as many processes as you like. At the end, mean and standard deviation of all latents become `shift_factor` and
`scaling_factor` of the tokenizer's copy in `--output_dir`/vae. Read the result by
`softvq_hf.data.load_cached_latents`.
"""

import logging
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from softvq_hf.data import collate_images, load_image_dataset
from softvq_hf.data.latents import (
    METADATA_FILE,
    TOKENIZER_FOLDER,
    LatentMoments,
    read_metadata,
    read_shard_metadata,
    shard_path,
    tokenizer_fingerprint,
    write_latent_shard,
    write_metadata,
)
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.arguments import DataArguments, check_output_dir, parse_args


logger = get_logger(__name__)


@dataclass(kw_only=True)
class CacheLatentsArguments(DataArguments):
    """Arguments of this script besides those on where the images are."""

    pretrained_model_name_or_path: str = field(metadata={"help": "Tokenizer: a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "Folder for the latents."})
    subfolder: str | None = field(default=None, metadata={"help": "Folder of the tokenizer inside its repository."})
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; by default what the tokenizer takes."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images per forward pass."})
    mixed_precision: str = field(
        default="no", metadata={"help": "Autocast dtype of the encoder.", "choices": ["no", "fp16", "bf16"]}
    )
    latent_dtype: str = field(
        default="float32", metadata={"help": "Dtype on disk.", "choices": ["float32", "float16"]}
    )
    shard_size: int = field(default=4096, metadata={"help": "Images per shard."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_source is None:
            raise ValueError("Neither `--dataset_name` nor `--train_data_dir` is given, one of them is needed.")
        if self.batch_size < 1:
            raise ValueError(f"`--batch_size` is {self.batch_size}, allowed: integers from 1 on.")
        if not 1 <= self.shard_size <= 65536:
            raise ValueError(f"`--shard_size` is {self.shard_size}, allowed: 1 to 65536.")


def check_continues(output_dir: str, plan: dict[str, Any]) -> None:
    """Refuse to mix: what `output_dir` holds already must have been made the same way."""
    if not Path(output_dir, METADATA_FILE).is_file():
        if any(Path(output_dir).glob("data/*.arrow")):
            raise ValueError(
                f"`--output_dir` is {output_dir!r}, which has data but no {METADATA_FILE}: use another one."
            )
        return
    found = read_metadata(output_dir)
    if found["tokenizer"]["fingerprint"] != plan["tokenizer"]["fingerprint"]:
        old, new = found["tokenizer"], plan["tokenizer"]
        raise ValueError(
            f"`--output_dir` is {output_dir!r}, which holds latents of the tokenizer {old['name_or_path']!r}"
            f" ({old['fingerprint'][:12]}); they cannot be mixed with those of {new['name_or_path']!r}"
            f" ({new['fingerprint'][:12]}). Use another folder."
        )
    for name, value in plan.items():
        if name != "tokenizer" and found.get(name) != value:
            raise ValueError(
                f"`--output_dir` is {output_dir!r}, which holds latents with {name} {found.get(name)}; they cannot be"
                f" mixed with {name} {value}. Use the same arguments, or another folder."
            )


def collate_with_unreadable(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the readable images, and the ids of the others."""
    return {**collate_images(batch), "unreadable": [i["image_id"] for i in batch if len(i["pixel_values"]) == 0]}


@torch.no_grad()
def main(args: CacheLatentsArguments) -> None:
    check_output_dir(args.output_dir)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO, force=True)

    # 1. The tokenizer, the images, and the plan: which images go into which shard
    tokenizer = AutoencoderSoftVQ.from_pretrained(args.pretrained_model_name_or_path, subfolder=args.subfolder)
    fingerprint = tokenizer_fingerprint(tokenizer)
    sample_size = tokenizer.config.sample_size
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    resolution = height if args.resolution is None else args.resolution
    if (height, width) != (resolution, resolution):
        raise ValueError(
            f"`--resolution` is {resolution} (images are square), the tokenizer takes {height} x {width}."
        )
    with accelerator.main_process_first():
        dataset = load_image_dataset(
            args.data_source,
            split=args.train_split,
            resolution=resolution,
            train=False,
            config_name=args.dataset_config_name,
            image_column=args.image_column,
            label_column=args.label_column,
            cache_dir=args.cache_dir,
            revision=args.revision,
            max_samples=args.max_train_samples,
            max_unreadable_fraction=args.max_unreadable_fraction,
            jpeg_draft=args.jpeg_draft,
            fast_resize=args.fast_resize,
        )
    num_shards = -(-len(dataset) // args.shard_size)
    plan = {
        "tokenizer": {"name_or_path": args.pretrained_model_name_or_path, "fingerprint": fingerprint},
        "dataset": {
            "source": args.dataset_name or os.path.abspath(args.train_data_dir),
            "config_name": args.dataset_config_name,
            "revision": args.revision,
            "split": args.train_split,
            "image_column": args.image_column,
            "label_column": args.label_column,
            "max_samples": args.max_train_samples,
        },
        "resolution": resolution,
        "jpeg_draft": args.jpeg_draft,
        "fast_resize": args.fast_resize,
        "mixed_precision": args.mixed_precision,
        "latent_dtype": args.latent_dtype,
        "num_images": len(dataset),
        "shard_size": args.shard_size,
        "num_shards": num_shards,
        "id2label": {str(label): name for label, name in dataset.id2label.items()},
    }
    check_continues(args.output_dir, plan)
    paths = [shard_path(args.output_dir, shard, num_shards) for shard in range(num_shards)]
    missing = [shard for shard in range(num_shards) if not paths[shard].is_file()]
    accelerator.wait_for_everyone()  # everyone has seen the same state of the folder
    if accelerator.is_main_process and not Path(args.output_dir, METADATA_FILE).is_file():
        write_metadata(args.output_dir, plan)
    accelerator.wait_for_everyone()  # no shard without it
    own_shards = missing[accelerator.process_index :: accelerator.num_processes]
    logger.info(f"{len(dataset)} images in {num_shards} shards, {num_shards - len(missing)} of them are there already")

    # 2. Encode. One loader runs through all shards of this process; no batch crosses the border of a shard.
    batches = []
    for shard in own_shards:
        indices = range(len(dataset))[shard * args.shard_size : (shard + 1) * args.shard_size]
        batches += [(shard, indices[i : i + args.batch_size]) for i in range(0, len(indices), args.batch_size)]
    dataloader = DataLoader(
        dataset,
        batch_sampler=[list(indices) for _, indices in batches],
        collate_fn=collate_with_unreadable,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    tokenizer.to(accelerator.device).eval()
    started = time.perf_counter()
    no_latent = np.empty((0, tokenizer.config.num_latent_tokens, tokenizer.config.latent_channels), np.float32)
    progress = tqdm(
        total=sum(len(indices) for _, indices in batches),
        desc=f"latents (process 1 of {accelerator.num_processes})",
        unit="image",
        disable=not accelerator.is_main_process,
    )
    latent, latent_flip, label, image_id, unreadable = [], [], [], [], []
    for (shard, indices), batch in zip(batches, dataloader, strict=True):
        if batch["image_id"]:
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                encoded = tokenizer.encode(pixel_values).latent
                encoded_flip = tokenizer.encode(pixel_values.flip(-1)).latent
            latent.append(encoded.float().cpu().numpy())
            latent_flip.append(encoded_flip.float().cpu().numpy())
            label += batch["class_labels"].tolist()
            image_id += map(str, batch["image_id"])
        unreadable += map(str, batch["unreadable"])
        progress.update(len(indices))
        if indices.stop == min((shard + 1) * args.shard_size, len(dataset)):
            write_latent_shard(
                paths[shard],
                np.concatenate([no_latent, *latent]).astype(args.latent_dtype),
                np.concatenate([no_latent, *latent_flip]).astype(args.latent_dtype),
                label,
                image_id,
                dataset.id2label,
                unreadable,
            )
            latent, latent_flip, label, image_id, unreadable = [], [], [], [], []
    progress.close()
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started

    # 3. The statistics, and the tokenizer that carries them
    if accelerator.is_main_process:
        statistics, unreadable = LatentMoments(), []
        for path in paths:
            shard_statistics, shard_unreadable = read_shard_metadata(path)
            statistics = statistics.merge(shard_statistics)
            unreadable += shard_unreadable
        if statistics.count == 0 or statistics.std == 0:
            raise ValueError(
                f"The latents of {args.pretrained_model_name_or_path!r} are all the same, or there are none: no"
                " generator can be trained on them."
            )
        shift_factor, scaling_factor = statistics.mean, 1.0 / statistics.std
        logger.info(
            f"Mean {statistics.mean:.6g} and standard deviation {statistics.std:.6g} of {statistics.count} numbers"
        )
        if (tokenizer.config.shift_factor, tokenizer.config.scaling_factor) == (0.0, 1.0):
            tokenizer.register_to_config(shift_factor=shift_factor, scaling_factor=scaling_factor)
        else:
            logger.info(
                f"The tokenizer keeps its shift_factor {tokenizer.config.shift_factor} and scaling_factor"
                f" {tokenizer.config.scaling_factor}; measured here: {shift_factor} and {scaling_factor}"
            )
        tokenizer.save_pretrained(Path(args.output_dir, TOKENIZER_FOLDER))
        measured = {**asdict(statistics), "std": statistics.std}
        used = {name: tokenizer.config[name] for name in ("shift_factor", "scaling_factor")}
        if not missing:  # everything was there: keep the time it took
            seconds = read_metadata(args.output_dir).get("seconds", seconds)
        write_metadata(
            args.output_dir, {**plan, "statistics": measured | used, "unreadable": unreadable, "seconds": seconds}
        )
        logger.info(
            f"{len(dataset) - len(unreadable)} images and their mirror images are in {args.output_dir},"
            f" {len(unreadable)} could not be read"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args(CacheLatentsArguments))
