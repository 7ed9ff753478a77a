"""Train a small image classifier: features for Fréchet distances where Inception is not at hand.

    python benchmarks/tiny_classifier.py --dataset path/to/tiny-imagenet --output_dir outputs/tiny_classifier

A ResNet (arXiv 1512.03385) of four blocks with two convolutions each, from 32 to 256 channels, learns the classes of
the training split at 64 px; `result.json` has its top-1 accuracy on the validation split. `--output_dir` holds the
model and its image processor as transformers saves them, so that
`softvq_hf.metrics.features.TransformersFeatureExtractor` takes the folder: 256 features.

Distances of its features order the degradations of one data set (benchmarks/metric_behaviour.py shows it). They are no
FID, and two classifiers give two scales: compare numbers of one file of weights only.

Each image is decoded once and kept as 8 bits in memory: 12.3 kB at 64 px, 0.61 GB for 50,000.
"""

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from softvq_hf.data import collate_images
from softvq_hf.evaluation.accelerator import build_accelerator
from softvq_hf.evaluation.arguments import EvaluationDataArguments
from softvq_hf.evaluation.data import to_8_bit
from softvq_hf.training.arguments import check_output_dir, parse_args
from softvq_hf.training.logging import library_versions


logger = logging.getLogger("tiny_classifier")


@dataclass(kw_only=True)
class TinyClassifierArguments(EvaluationDataArguments):
    """Arguments of this script besides those on where the images are."""

    output_dir: str = field(metadata={"help": "Folder for the model, its image processor and result.json."})
    split: str = field(default="train", metadata={"help": "Split to learn from."})
    validation_split: str = field(default="validation", metadata={"help": "Split that tells the accuracy."})
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    max_validation_samples: int | None = field(
        default=None, metadata={"help": "Use only this many validation images, spread evenly over the data set."}
    )
    resolution: int = field(default=64, metadata={"help": "Side of the square images in pixels."})
    num_train_epochs: int = field(default=7, metadata={"help": "Passes over the training split."})
    batch_size: int = field(default=128, metadata={"help": "Images per update."})
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of the one-cycle schedule."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of SGD."})
    mixed_precision: str = field(
        default="bf16", metadata={"help": "Autocast dtype of the training.", "choices": ["no", "bf16"]}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, order, crops and flips."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_validation_samples is not None and self.max_validation_samples < 1:
            raise ValueError(
                f"`--max_validation_samples` is {self.max_validation_samples}, allowed: integers from 1 on."
            )
        if self.resolution < 32:
            raise ValueError(f"`--resolution` is {self.resolution}, allowed: integers from 32 on.")
        for name in ("num_train_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if not self.learning_rate > 0:
            raise ValueError(f"`--learning_rate` is {self.learning_rate}, allowed: numbers above 0.")


def load_images(args: TinyClassifierArguments) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
    """Centre crops of `args.split`, `(N, 3, R, R)` uint8, their labels, `(N,)` int64, and the names of the classes."""
    dataset = args.load_dataset(args.resolution, label_column=args.label_column)
    dataloader = DataLoader(
        dataset, batch_size=256, collate_fn=collate_images, num_workers=args.dataloader_num_workers
    )
    images, labels = [], []
    for batch in tqdm(dataloader, desc=args.split, unit="batch"):
        images.append(to_8_bit(batch["pixel_values"], "round"))
        labels.append(batch["class_labels"])
    return torch.cat(images), torch.cat(labels), dataset.id2label


def to_pixel_values(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """8-bit images as the model takes them: float32 in [-1, 1]; the image processor that is saved does the same."""
    return images.to(device, memory_format=torch.channels_last).float() / 127.5 - 1


@torch.no_grad()
def top1_accuracy(
    model: ResNetForImageClassification, images: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> float:
    """Share of the images whose highest logit is that of their label, in float32."""
    model.eval()
    num_correct = 0
    for start in range(0, len(images), batch_size):
        logits = model(to_pixel_values(images[start : start + batch_size], model.device)).logits
        num_correct += (logits.argmax(1).cpu() == labels[start : start + batch_size]).sum().item()
    return num_correct / len(images)


def main(args: TinyClassifierArguments) -> dict[str, object]:
    """Train, measure, save; returns what is in result.json."""
    check_output_dir(args.output_dir)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, force=True)
    accelerator = build_accelerator(args.mixed_precision)
    set_seed(args.seed)

    # 1. The images, and the model with its processor
    images, labels, id2label = load_images(args)
    validation_images, validation_labels, validation_id2label = load_images(
        replace(args, split=args.validation_split, max_samples=args.max_validation_samples)
    )
    if validation_id2label != id2label:
        raise ValueError(
            f"`--validation_split` is {args.validation_split!r}, whose classes are not those of `--split`"
            f" {args.split!r}."
        )
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            id2label=id2label,
            label2id={name: label for label, name in id2label.items()},
        )
    ).to(accelerator.device, memory_format=torch.channels_last)
    image_processor = ViTImageProcessor(
        size={"height": args.resolution, "width": args.resolution},
        resample=3,  # bicubic
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )

    # 2. SGD with a one-cycle schedule (arXiv 1708.07120); images are shifted by up to an eighth and mirrored
    augment = v2.Compose(
        [
            v2.RandomCrop(args.resolution, padding=args.resolution // 8, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
        ]
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    steps_per_epoch = -(-len(images) // args.batch_size)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.num_train_epochs * steps_per_epoch
    )
    started = time.perf_counter()
    for epoch in range(args.num_train_epochs):
        model.train()
        losses = []
        progress = tqdm(
            torch.randperm(len(images)).split(args.batch_size),
            desc=f"epoch {epoch + 1} of {args.num_train_epochs}",
            unit="batch",
        )
        for indices in progress:
            batch = torch.stack([augment(image) for image in images[indices]])
            with accelerator.autocast():
                logits = model(to_pixel_values(batch, accelerator.device)).logits
            loss = F.cross_entropy(logits.float(), labels[indices].to(accelerator.device))
            if not loss.isfinite():
                raise RuntimeError(f"The loss is {loss.item()} in epoch {epoch + 1}: lower `--learning_rate`.")
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{loss.item():.3f}")
        top1 = top1_accuracy(model, validation_images, validation_labels, args.batch_size)
        logger.info(f"Epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, validation top-1 {top1:.4f}")

    # 3. The result, as transformers saves it
    model.save_pretrained(args.output_dir)
    image_processor.save_pretrained(args.output_dir)
    result = {
        "validation_top1": top1,
        "num_train_images": len(images),
        "num_validation_images": len(validation_images),
        "num_classes": len(id2label),
        "num_parameters": model.num_parameters(),
        "seconds": time.perf_counter() - started,
        "device": str(accelerator.device),
        "cpus": os.cpu_count(),
        "arguments": asdict(args),
        "versions": library_versions(),
        "command": sys.argv,
    }
    Path(args.output_dir, "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main(parse_args(TinyClassifierArguments))
