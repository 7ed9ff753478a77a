"""Optimizers by name, learning-rate schedules, averaged weights, and the end of a batch: clipping, losses, steps."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.logging import reduce_losses
from softvq_hf.training.nonfinite import check_finite
from softvq_hf.training.state import TrainerState


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
BITSANDBYTES_OPTIMIZERS = {"adam": "Adam8bit", "adamw": "AdamW8bit"}


def build_optimizer(
    args: TrainingArguments,
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    learning_rate: float,
) -> torch.optim.Optimizer:
    """
    The optimizer named `args.optimizer`: "adam" or "adamw", by torch's fused kernels ("_fused" says so), or with
    "_8bit" (states of eight bits, of bitsandbytes). `parameters` may be groups of torch (mappings with "params" and
    settings of their own). Frozen parameters are left out. Weight decay reaches "adamw" only: Adam's would be another
    algorithm.

    Raises:
        ValueError: If every parameter is frozen, or bitsandbytes is needed and not installed.
    """
    parameters = list(parameters)
    groups = parameters if parameters and isinstance(parameters[0], dict) else [{"params": parameters}]
    groups = [
        group | {"params": [parameter for parameter in group["params"] if parameter.requires_grad]} for group in groups
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("Nothing is left to train: all parameters are frozen.")
    algorithm, _, variant = args.optimizer.partition("_")
    settings = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if algorithm == "adamw":
        settings["weight_decay"] = args.adam_weight_decay
    if variant != "8bit":
        return OPTIMIZERS[algorithm](groups, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"`--optimizer` is {args.optimizer!r}, which needs bitsandbytes: `pip install bitsandbytes`. ({error})"
        ) from error
    return getattr(bitsandbytes.optim, BITSANDBYTES_OPTIMIZERS[algorithm])(groups, **settings)


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


class OnePassEMA(EMAModel):
    """
    diffusers' average of weights, to the same values, in one pass over the memory instead of two with room for the
    differences. Frozen weights are left as they are, for they do not change.
    """

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Move the averages towards `parameters`, those that the average was built with."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        trained = [pair for pair in zip(self.shadow_params, parameters, strict=True) if pair[1].requires_grad]
        averages, weights = (list(tensors) for tensors in zip(*trained, strict=True))
        get_ema_multi_avg_fn(self.cur_decay_value)(averages, weights, None)


def build_ema(args: TrainingArguments, model: torch.nn.Module) -> OnePassEMA | None:
    """The average of a model's parameters with the constant decay `args.ema_decay`; `None` where it is off."""
    if not args.use_ema:
        return None
    ema = OnePassEMA(model.parameters(), decay=args.ema_decay, min_decay=args.ema_decay)
    ema.optimization_step = 1  # with min_decay: the constant decay from the first update on
    return ema


def scaled_learning_rate(args: TrainingArguments, learning_rate: float, num_processes: int) -> float:
    """`learning_rate` times the global batch size over `args.lr_base_batch_size`, where that is given."""
    if args.lr_base_batch_size is None:
        return learning_rate
    global_batch_size = args.train_batch_size * num_processes * args.resolve_accumulation(num_processes)
    return learning_rate * global_batch_size / args.lr_base_batch_size


def end_batch(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: TrainerState,
    trained: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]],
    losses: dict[str, torch.Tensor],
    is_finite: bool,
    image_ids: list[str | int],
) -> tuple[dict[str, float], bool]:
    """
    Read the losses of a batch; after the last batch of an update clip the gradients of every model before, and step
    every optimizer and clear the gradients afterwards. Collective, after the backward passes, inside of
    `accelerator.accumulate`.

    All numbers of a batch are read at once, here: the processor waits for the device once a batch, when there is
    nothing left to prepare.

    All optimizers step, or none: where a loss or a gradient is not finite the update is left out, and the batch with
    the gradient counted and named ([`~softvq_hf.training.nonfinite.check_finite`]). Under fp16 gradients are left to
    the loss scale, which is adapted once, after all steps. (DeepSpeed's engines have stepped in their backward
    passes.)

    Args:
        accelerator (`Accelerator`): The accelerator.
        args (`TrainingArguments`): `max_grad_norm`, and what `check_finite` needs.
        state (`TrainerState`): Counts the updates left out.
        trained (`dict`): Model and optimizer, as prepared together, by the name of their norm.
        losses (`dict[str, torch.Tensor]`): Scalars of this process by name.
        is_finite (`bool`): Whether all losses of the update's batches before this one were finite.
        image_ids (`list`): Images of this process's batch.

    Returns:
        `tuple`: the losses, averaged over all processes, and after the last batch of an update the norms before
        clipping, by name; and whether everything was finite so far, so that the last batch's says whether the update
        was made.

    Raises:
        FloatingPointError: As `check_finite`.
    """
    norms = {}
    if accelerator.sync_gradients:
        norms = {
            name: clip_gradients(accelerator, model, optimizer, args.max_grad_norm)
            for name, (model, optimizer) in trained.items()
        }
    values = reduce_losses(accelerator, {**losses, **norms})
    for names in (losses, norms if accelerator.scaler is None else {}):
        if is_finite:
            checked = {name: values[name] for name in names}
            is_finite = check_finite(accelerator, args, state, checked, image_ids)
    if not accelerator.sync_gradients:
        return values, is_finite

    optimizers = [optimizer for _, optimizer in trained.values()]
    if accelerator.scaler is not None:
        for optimizer in optimizers:
            accelerator.scaler.step(optimizer.optimizer)
        accelerator.scaler.update()
    elif is_finite:
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return values, is_finite


def clip_gradients(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> torch.Tensor:
    """
    Clip the global gradient norm of one of several models; `max_grad_norm=0` only measures it. Collective.

    `Accelerator.clip_grad_norm_` would undo the fp16 loss scale of every optimizer at once, and so twice for the
    second of a GAN's two. DeepSpeed has clipped by then, when the last batch of the update ran backward.

    Args:
        accelerator (`Accelerator`): The accelerator.
        model (`torch.nn.Module`): The model as prepared.
        optimizer (`torch.optim.Optimizer`): Its optimizer as prepared.
        max_grad_norm (`float`): Norm to clip to. With DeepSpeed it was given to the engine before.

    Returns:
        `torch.Tensor`: The norm before clipping, a scalar, the same on all processes.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return torch.as_tensor(model.get_global_grad_norm(), device=accelerator.device)
    accelerator.unscale_gradients(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm if max_grad_norm > 0 else math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
