"""Optimizers by name, learning-rate schedules, gradient clipping and the random draws of one training step."""

import math
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from softvq_hf.training.arguments import TrainingArguments


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(
    args: TrainingArguments, parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer named `args.optimizer`. Weight decay reaches "adamw" only: Adam's would be another algorithm."""
    settings = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw":
        settings["weight_decay"] = args.adam_weight_decay
    return OPTIMIZERS[args.optimizer]([p for p in parameters if p.requires_grad], **settings)


def build_lr_scheduler(args: TrainingArguments, optimizer: torch.optim.Optimizer, max_train_steps: int) -> LambdaLR:
    """
    The schedule named `args.lr_scheduler`, to be stepped once per optimizer update (do not `prepare` it).

    "cosine_with_min_lr" is the published schedule of SoftVQ-VAE, which diffusers lacks: a cosine from the peak to
    `min_lr` over all of `max_train_steps`, whose first `lr_warmup_steps` are replaced by a line from `lr_warmup_start`
    to the peak. All other names are those of [`~diffusers.optimization.get_scheduler`]. `min_lr` and `lr_warmup_start`
    belong to `args.learning_rate` and scale with the rate the optimizer really has.
    """
    # A discriminator's schedule runs from the start, its optimizer from `adversarial_start` on; and an optimizer
    # leaves out updates that overflow in fp16. torch warns of both.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
    if args.lr_scheduler != "cosine_with_min_lr":
        return get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=max_train_steps,
        )

    floor = args.min_lr / args.learning_rate
    start = args.lr_warmup_start / args.learning_rate

    def factor(step: int) -> float:
        if step < args.lr_warmup_steps:
            return start + (1.0 - start) * step / args.lr_warmup_steps
        progress = min(step / max_train_steps, 1.0)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def scaled_learning_rate(args: TrainingArguments, learning_rate: float, num_processes: int) -> float:
    """`learning_rate` times the global batch size over `args.lr_base_batch_size`, where that is given."""
    if args.lr_base_batch_size is None:
        return learning_rate
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return learning_rate * global_batch_size / args.lr_base_batch_size


def clip_gradients(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    max_grad_norm: float,
) -> torch.Tensor:
    """
    Clip the global gradient norm of one optimizer's parameters; `max_grad_norm=0` only measures it.

    `Accelerator.clip_grad_norm_` would undo the fp16 loss scale of every optimizer at once, and so twice for the
    second of a GAN's two.

    Returns:
        `torch.Tensor`: The norm before clipping, a scalar.
    """
    accelerator.unscale_gradients(optimizer)
    return torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else math.inf)


def step_generator(seed: int, epoch: int, batch_index: int, rank: int) -> torch.Generator:
    """
    The source of all random draws for one batch: a function of its arguments, so that a resumed run draws the same.

    It draws on the CPU, so that the draws do not depend on the device either. The global generators, which dropout
    inside of library modules uses, are seeded along with it.

    Args:
        seed (`int`): Seed of the run.
        epoch (`int`): Pass over the data.
        batch_index (`int`): Position of the batch in the pass.
        rank (`int`): Index of the process.
    """
    key = int(np.random.SeedSequence([seed, epoch, batch_index, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(key)
    return torch.Generator().manual_seed(key)
