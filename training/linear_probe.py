"""Linear probing of cached latents: how much of the class of an image a linear classifier finds in its tokens.

    accelerate launch training/linear_probe.py --latents_dir outputs/softvq_l_64_latents \\
        --validation_latents_dir outputs/softvq_l_64_latents_validation --output_dir outputs/softvq_l_64_probe

Both folders are written by training/cache_latents.py, with the same tokenizer, from the training and the validation
split. The protocol is that of MAE (arXiv 2111.06377, appendix A.1) on frozen latents, averaged over the tokens or
flattened: standardised features, a linear layer, no weight decay, a cosine schedule with warm-up, 90 epochs. Three
things are different. MAE's optimizer is LARS; here it is SGD with momentum. MAE standardises by a BatchNorm without
affine parameters; here mean and standard deviation are those of the whole training set, which do not depend on the
number of processes, and to which a BatchNorm's running ones converge. MAE crops at random; cached latents are those of
the image and of its mirror image.

`--method knn` trains nothing: it is the weighted k-nearest-neighbours classifier of DINO (arXiv 2104.14294, appendix
F.1) on the same features, normalised to unit length. Either way `--output_dir`/result.json has the accuracies with all
that decides them.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from softvq_hf.data import LatentDataset, load_cached_latents
from softvq_hf.data.latents import read_metadata
from softvq_hf.evaluation.accelerator import build_accelerator, merge_over_processes
from softvq_hf.evaluation.result import build_result, write_result
from softvq_hf.metrics.latent_statistics import Moments
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.dataloader import build_dataloader


logger = get_logger(__name__)

# What only one of the methods takes, in the order of the record.
METHOD_ARGUMENTS = {
    "linear": ("num_train_epochs", "lr_warmup_epochs", "learning_rate", "momentum", "seed"),
    "knn": ("num_neighbors", "temperature"),
}


@dataclass(kw_only=True)
class LinearProbeArguments:
    """Arguments of this script."""

    latents_dir: str = field(metadata={"help": "Cached latents of the training images."})
    validation_latents_dir: str = field(metadata={"help": "Cached latents of the validation images."})
    output_dir: str = field(metadata={"help": "Folder for result.json."})
    method: str = field(
        default="linear",
        metadata={"help": "A linear classifier, or nearest neighbours.", "choices": ["linear", "knn"]},
    )
    pooling: str = field(
        default="mean",
        metadata={"help": "Features: the mean over tokens, or all tokens flattened.", "choices": ["mean", "flatten"]},
    )
    global_batch_size: int = field(
        default=1024, metadata={"help": "Latents per update, those of all processes together."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Loader processes; 0 loads in the main one."})

    # linear
    num_train_epochs: int = field(default=90, metadata={"help": "Passes over the training latents."})
    lr_warmup_epochs: int = field(default=10, metadata={"help": "Passes of linear warm-up."})
    learning_rate: float = field(
        default=0.1, metadata={"help": "Peak learning rate for 256 latents; times --global_batch_size / 256."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    seed: int = field(default=0, metadata={"help": "Seed of the data order and of the choice of mirror images."})

    # knn
    num_neighbors: int = field(default=20, metadata={"help": "Neighbours that vote."})
    temperature: float = field(default=0.07, metadata={"help": "A vote counts exp(cosine similarity / temperature)."})

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "num_train_epochs", "num_neighbors"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        for name in ("dataloader_num_workers", "seed", "lr_warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 0 on.")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: finite numbers above 0.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`--momentum` is {self.momentum}, allowed: [0, 1).")
        if self.lr_warmup_epochs > self.num_train_epochs:
            raise ValueError(
                f"`--lr_warmup_epochs` is {self.lr_warmup_epochs}, allowed: up to `--num_train_epochs`,"
                f" {self.num_train_epochs}."
            )
        other = "knn" if self.method == "linear" else "linear"
        defaults = {argument.name: argument.default for argument in fields(self)}
        unused = [f"`--{name}`" for name in METHOD_ARGUMENTS[other] if getattr(self, name) != defaults[name]]
        if unused:
            raise ValueError(
                f"`--method` is {self.method!r}, which takes no {' and no '.join(unused)}; `--method {other}` does."
            )


def check_latents(args: LinearProbeArguments, train: dict[str, Any], validation: dict[str, Any]) -> None:
    """Refuse folders that do not belong together, by their metadata."""
    if train["tokenizer"]["fingerprint"] != validation["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"`--validation_latents_dir` is {args.validation_latents_dir!r}, with latents of the tokenizer"
            f" {validation['tokenizer']['name_or_path']!r} ({validation['tokenizer']['fingerprint'][:12]}), allowed:"
            f" those of the tokenizer of `--latents_dir`, {train['tokenizer']['name_or_path']!r}"
            f" ({train['tokenizer']['fingerprint'][:12]})."
        )
    classes, validation_classes = train["id2label"], validation["id2label"]
    if classes != validation_classes:
        raise ValueError(
            f"`--validation_latents_dir` has {len(validation_classes)} classes, allowed:"
            f" the {len(classes)} of `--latents_dir`, by the same names in the same order."
        )
    if len(classes) < 2:
        raise ValueError(f"`--latents_dir` has {len(classes)} class(es), allowed: 2 or more.")


def build_features(
    accelerator: Accelerator, dataloader: DataLoader, pooling: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The function from `(B, L, C)` latents to `(B, C)` or, flattened, `(B, L * C)` features: standardised by mean and
    standard deviation of the latents in `dataloader`, those of all processes. A feature that never varies is 0.
    """

    def pool(latents: torch.Tensor) -> torch.Tensor:
        return latents.mean(1) if pooling == "mean" else latents.flatten(1)

    moments = Moments()
    for batch in dataloader:
        moments.merge(Moments.of(pool(batch["latents"].cpu().double())))
    moments = merge_over_processes(moments)
    std = (moments.squares / moments.count).sqrt()
    mean = moments.mean.float().to(accelerator.device)
    std = torch.where(std > 0, std, 1.0).float().to(accelerator.device)
    return lambda latents: (pool(latents) - mean) / std


def train_classifier(
    args: LinearProbeArguments,
    accelerator: Accelerator,
    dataloader: DataLoader,
    features: Callable[[torch.Tensor], torch.Tensor],
    num_features: int,
) -> nn.Linear:
    """The linear layer, trained. It starts from 0, for the loss is convex."""
    classifier = nn.Linear(num_features, dataloader.dataset.num_classes)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    learning_rate = args.learning_rate * args.global_batch_size / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr=learning_rate, momentum=args.momentum)
    num_updates, num_warmup_updates = args.num_train_epochs * len(dataloader), args.lr_warmup_epochs * len(dataloader)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=num_warmup_updates, num_training_steps=num_updates
    )
    model, optimizer = accelerator.prepare(classifier, optimizer)
    progress = tqdm(total=num_updates, desc="linear probe", unit="update", disable=not accelerator.is_main_process)
    for epoch in range(args.num_train_epochs):
        dataloader.dataset.set_epoch(epoch)  # other mirror images
        dataloader.set_epoch(epoch)  # another order
        losses = []
        for batch in dataloader:
            loss = F.cross_entropy(model(features(batch["latents"])), batch["class_labels"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            losses.append(loss.detach())
            progress.update()
        mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(mean_loss):
            raise ValueError(
                f"`--learning_rate` is {args.learning_rate}, with which the loss is {mean_loss} in epoch {epoch + 1}:"
                " lower it."
            )
        progress.set_postfix(epoch=epoch + 1, loss=f"{mean_loss:.4f}")
    progress.close()
    return classifier.requires_grad_(False)


@torch.no_grad()
def count_votes(
    args: LinearProbeArguments,
    accelerator: Accelerator,
    dataset: LatentDataset,
    features: Callable[[torch.Tensor], torch.Tensor],
    queries: torch.Tensor,
) -> torch.Tensor:
    """
    Scores `(Q, num_classes)` of `(Q, D)` queries: the share of each class in the votes of the nearest training
    latents. These pass by in batches and are not kept.
    """
    queries = F.normalize(queries)
    similarities = torch.empty(len(queries), 0, device=accelerator.device)
    class_labels = torch.empty(len(queries), 0, dtype=torch.int64, device=accelerator.device)
    # every process looks at all of them, for its own queries: the loader is not prepared
    dataloader = DataLoader(dataset, args.global_batch_size, num_workers=args.dataloader_num_workers)
    for batch in tqdm(dataloader, desc="neighbours", unit="batch", disable=not accelerator.is_main_process):
        keys = F.normalize(features(batch["latents"].to(accelerator.device)))
        similarities = torch.cat([similarities, queries @ keys.T], dim=1)
        key_labels = batch["class_labels"].to(accelerator.device).expand(len(queries), -1)
        similarities, nearest = similarities.topk(min(args.num_neighbors, similarities.shape[1]), dim=1)
        class_labels = torch.cat([class_labels, key_labels], dim=1).gather(1, nearest)
    distances = similarities - similarities.amax(1, keepdim=True)  # else a low temperature would give infinite ones
    votes = (distances / args.temperature).softmax(1)
    return torch.zeros(len(queries), dataset.num_classes, device=votes.device).scatter_add(1, class_labels, votes)


def main(args: LinearProbeArguments) -> None:
    check_output_dir(args.output_dir)
    accelerator = build_accelerator()
    accelerator.dataloader_config = DataLoaderConfiguration(
        use_seedable_sampler=True, data_seed=args.seed, even_batches=False
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if args.global_batch_size % accelerator.num_processes != 0:
        raise ValueError(
            f"`--global_batch_size` is {args.global_batch_size}, allowed: multiples of the number of processes,"
            f" {accelerator.num_processes}."
        )

    # 1. The latents
    metadata, validation_metadata = read_metadata(args.latents_dir), read_metadata(args.validation_latents_dir)
    check_latents(args, metadata, validation_metadata)
    dataset = load_cached_latents(args.latents_dir, train=False)
    validation_dataset = load_cached_latents(args.validation_latents_dir, train=False)
    limited = "global_batch_size" if args.method == "linear" else "num_neighbors"
    if getattr(args, limited) > len(dataset):
        raise ValueError(
            f"`--{limited}` is {getattr(args, limited)}, allowed: up to the {len(dataset)} latents of `--latents_dir`."
        )
    source, data = metadata["dataset"], validation_metadata["dataset"]
    notes = []
    if all(source[name] == data[name] for name in ("source", "config_name", "split")):
        notes.append("Training and validation images are of the same split: the accuracy is not that on new images.")
        logger.warning(notes[-1])

    # 2. Their features
    batch_size = args.global_batch_size // accelerator.num_processes
    options = {"collate_fn": None, "num_workers": args.dataloader_num_workers}
    dataloader = build_dataloader(accelerator, dataset, batch_size, train=False, **options)
    features = build_features(accelerator, dataloader, args.pooling)
    queries = [features(torch.empty(0, *dataset.latent_shape, device=accelerator.device))]  # maybe there is no batch
    class_labels = [torch.empty(0, dtype=torch.int64, device=accelerator.device)]
    for batch in build_dataloader(accelerator, validation_dataset, batch_size, train=False, **options):
        queries.append(features(batch["latents"]))
        class_labels.append(batch["class_labels"])
    queries, class_labels = torch.cat(queries), torch.cat(class_labels)

    # 3. The score of each class, and whether the right one is among the best. Of equal scores the right one counts as
    # the worst, so that a class without votes is no hit.
    if args.method == "linear":
        mirrored = load_cached_latents(args.latents_dir, seed=args.seed, train=True)
        dataloader = build_dataloader(accelerator, mirrored, batch_size, train=True, **options)
        scores = train_classifier(args, accelerator, dataloader, features, queries.shape[1])(queries)
    else:
        scores = count_votes(args, accelerator, dataset, features, queries)
    if not accelerator.gather(scores.isfinite().all()).all():
        raise ValueError("Scores are not finite: the latents hold NaN or infinite numbers, or numbers too large.")
    rank = (scores >= scores.gather(1, class_labels[:, None])).sum(1)
    counts = torch.stack([(rank <= 1).sum(), (rank <= 5).sum(), torch.tensor(len(rank), device=rank.device)])
    top1, top5, num_images = accelerator.reduce(counts, "sum").tolist()
    metrics = {"top1_accuracy": top1 / num_images}
    if dataset.num_classes > 5:
        metrics["top5_accuracy"] = top5 / num_images

    # 4. The record
    if args.method == "linear":
        name = f"linear probe of latents, pooling {args.pooling}"
        settings = (*METHOD_ARGUMENTS["linear"], "global_batch_size")
    else:
        name = f"{args.num_neighbors} nearest neighbours of latents, pooling {args.pooling}"
        settings = METHOD_ARGUMENTS["knn"]
    result = build_result(
        accelerator,
        task="image-classification",
        model=metadata["tokenizer"]["name_or_path"],
        dataset={
            "name": Path(data["source"]).name if Path(data["source"]).is_absolute() else data["source"],
            **{key: data[key] for key in ("config_name", "split", "revision", "max_samples")},
        },
        metrics=metrics,
        protocol={
            "name": name,
            "num_images": num_images,
            "num_train_images": len(dataset),
            "num_classes": dataset.num_classes,
            "num_features": queries.shape[1],
            "tokenizer_fingerprint": metadata["tokenizer"]["fingerprint"],
            **{setting: getattr(args, setting) for setting in ("method", "pooling", *settings)},
        },
        notes=notes,
    )
    if accelerator.is_main_process:
        write_result(result, Path(args.output_dir, "result.json"))
        logger.info(", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items()))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args(LinearProbeArguments))
