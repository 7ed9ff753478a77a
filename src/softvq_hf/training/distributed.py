"""Several models with an optimizer each under every kind of training that accelerate has, and weights that are sharded
over the processes (FSDP2): gathered whole, cut again, and as a plain model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor

from softvq_hf.losses import FrozenTeacher


def prepare_model(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """
    `accelerator.prepare` for one model and its optimizer, of which there may be several pairs.

    - FSDP2 shards the blocks (`_no_split_modules`) of the diffusers models inside of `model` one by one, and what is
      left as one unit; accelerate has one list of blocks for all models.
    - DeepSpeed gets one engine for each pair, which [`backward`] serves.

    With both, mixed precision is as in data parallel training: weights in float32, the forward pass under autocast,
    its results in float32.

    Args:
        accelerator (`Accelerator`): The accelerator, from [`~softvq_hf.training.accelerator.build_accelerator`].
        model (`torch.nn.Module`): The model; nothing outside of it may have been prepared with its parameters.
        optimizer (`torch.optim.Optimizer`): Optimizer of its trainable parameters.

    Returns:
        `tuple`: the prepared model and optimizer.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        parts = list(model.modules())
        blocks = {name for part in parts if isinstance(part, ModelMixin) for name in part._no_split_modules or ()}
        present = {type(part).__name__ for part in parts}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(blocks & present)
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        module = model.module
        autocast = torch.autocast(
            accelerator.device.type, model.torch_autocast_dtype(), enabled=model.torch_autocast_enabled()
        )
        module.forward = convert_outputs_to_fp32(autocast(module.forward))
        # DeepSpeed takes every gradient that passes its engine's outputs for that of the loss, also those of
        # `torch.autograd.grad` at a single weight; up to ZeRO-2 nothing else needs the engine in the forward pass.
        model.forward = module.__call__
    return model, optimizer


def place_teacher(accelerator: Accelerator, teacher: FrozenTeacher) -> FrozenTeacher:
    """A teacher on the device of the accelerator, its weights as `accelerator.autocast` will want them."""
    with accelerator.autocast():
        if torch.is_autocast_enabled(accelerator.device.type):
            teacher.cast_linear_weights(torch.get_autocast_dtype(accelerator.device.type))
    return teacher.to(accelerator.device)


def backward(accelerator: Accelerator, model: torch.nn.Module, loss: torch.Tensor) -> None:
    """
    `accelerator.backward` for one of several models: DeepSpeed's engine of this `model` computes the gradients, and at
    the last batch of an update clips them and takes the step of its optimizer.

    Args:
        accelerator (`Accelerator`): The accelerator, inside of `accelerator.accumulate`.
        model (`torch.nn.Module`): From [`prepare_model`]; the one whose optimizer follows.
        loss (`torch.Tensor`): Scalar; its gradients are divided by the number of accumulated batches.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.set_gradient_accumulation_boundary(accelerator.sync_gradients)
        model.backward(loss)
        if accelerator.sync_gradients:
            model.step()
    else:
        accelerator.backward(loss)


def full_tensors(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """
    Copies of tensors on the CPU, those that are sharded over the processes put together.

    Collective: every process calls it with the same tensors in the same order, and every process gets all of them.
    """
    return [
        tensor.detach().full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.detach().cpu().clone()
        for tensor in tensors
    ]


def shard_like(full: Iterable[torch.Tensor], tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """
    The inverse of [`full_tensors`]: each whole tensor of `full` placed like its fellow in `tensors`.

    Collective. Those of `tensors` that are sharded give the device mesh and the placement, the others the device.
    """
    return [
        distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
        if isinstance(like, DTensor)
        else whole.to(like.device)
        for whole, like in zip(full, tensors, strict=True)
    ]


@contextmanager
def averaged_model(accelerator: Accelerator, model: ModelMixin, ema: EMAModel | None) -> Iterator[ModelMixin]:
    """
    A model of one process with the averaged weights, in eval mode: to validate with, to save, to show samples of.

    Collective on entry. It is `model` itself, which gets its own weights and mode back afterwards. But where `model`
    is sharded over the processes, which can use it together only, it is a copy filled with the gathered weights.

    Args:
        accelerator (`Accelerator`): Names the device of the copy.
        model (`ModelMixin`): The model as it is trained; a part of what was prepared, or unwrapped.
        ema (`EMAModel`, *optional*): The average of `model.parameters()`. Without it, the weights are the model's own.

    Yields:
        `ModelMixin`: The model to use inside.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        with torch.random.fork_rng(devices=[]):  # the draws of the run stay as they are
            copy = type(model).from_config(model.config)
            for name, adapter in getattr(model, "peft_config", {}).items():
                copy.add_adapter(adapter, name)
        averages = ema.shadow_params if ema is not None else model.parameters()
        with torch.no_grad():
            for parameter, whole in zip(copy.parameters(), full_tensors(averages), strict=True):
                parameter.copy_(whole)
            for buffer, whole in zip(copy.buffers(), full_tensors(model.buffers()), strict=True):
                buffer.copy_(whole)
        yield copy.to(accelerator.device).eval()
        return

    training = model.training
    model.eval()
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield model
    finally:
        if ema is not None:
            ema.restore(model.parameters())
        model.train(training)
