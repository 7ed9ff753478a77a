"""The `Accelerator` of a training run."""

import logging
import os

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from softvq_hf.training.arguments import TrainingArguments


def build_accelerator(args: TrainingArguments) -> Accelerator:
    """
    An `Accelerator` whose data order can be resumed and which repeats no sample, with logging and seeds set up.

    How the processes share the work is said by `accelerate launch`, through the environment: alone, data parallel,
    FSDP2 or DeepSpeed ZeRO-2; see `training/accelerate`. FSDP2 runs on processors, too.

    Raises:
        ValueError: If the tracker in `args.report_to` is unknown or not installed, or the kind of sharding is not one
            of the above.
    """
    available = [str(name) for name in get_available_trackers()]
    trackers = [] if args.report_to == "none" else args.report_to.split(",")
    if set(trackers) - {"all", *available}:
        raise ValueError(
            f"`--report_to` is {args.report_to!r}, allowed: none, all, or trackers that are installed"
            f" ({', '.join(available) or 'no one is'}), separated by commas."
        )
    fsdp_plugin = build_fsdp_plugin() if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    deepspeed_plugin = build_deepspeed_plugin(args) if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None
    accelerator = Accelerator(
        # without this accelerate takes each of several CPU processes for the only one
        cpu=not torch.accelerator.is_available(),
        # every update has the same number of batches, also across the end of a pass over the data
        gradient_accumulation_plugin=GradientAccumulationPlugin(sync_with_dataloader=False),
        mixed_precision=args.mixed_precision if deepspeed_plugin is None else "no",  # the plugin says it
        fsdp_plugin=fsdp_plugin,
        deepspeed_plugin=deepspeed_plugin,
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=f"{args.output_dir}/{args.logging_dir}"
        ),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True,
            data_seed=args.seed,
            even_batches=False,
            non_blocking=torch.cuda.is_available(),  # batches are pinned there
        ),
        # Batch statistics are never copied between processes in the middle of a step, where the discriminator's second
        # forward would find them changed under the first one's graph. Gradients have no second copy to be sent from.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if fsdp_plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # torch shards on processors as well, accelerate leaves them out
        accelerator.state.fsdp_plugin = fsdp_plugin
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.gradient_accumulation_steps = args.resolve_accumulation(accelerator.num_processes)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    get_logger(__name__).info(accelerator.state, main_process_only=False)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    for library in (datasets, transformers, diffusers):
        if accelerator.is_local_main_process:
            library.utils.logging.set_verbosity_warning()
        else:
            library.utils.logging.set_verbosity_error()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    set_seed(args.seed)
    return accelerator


def build_fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """
    FSDP2 by the settings of `accelerate launch`. Weights, their gradients and the sums over processes stay in float32:
    mixed precision is autocast's, as without sharding, for FSDP2's own would round the inputs (time steps) as well.

    Raises:
        ValueError: If the settings are those of FSDP1.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"`fsdp_version` of accelerate's configuration is {version}, allowed: 2.")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def build_deepspeed_plugin(args: TrainingArguments) -> DeepSpeedPlugin:
    """
    DeepSpeed ZeRO-1 or ZeRO-2 by the settings of `accelerate launch`, for every model of the run. Weights stay in
    float32 for the averages' sake, bf16 is torch's autocast inside of the engine, and the engine clips the gradients.

    Raises:
        ValueError: If the settings are those of ZeRO-3, or the precision is fp16.
    """
    plugin = DeepSpeedPlugin(gradient_accumulation_steps="auto", gradient_clipping=args.max_grad_norm)
    if plugin.zero_stage not in (1, 2):
        raise ValueError(f"`zero_stage` of accelerate's configuration is {plugin.zero_stage}, allowed: 1 and 2.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision not in ("no", "bf16"):
        raise ValueError(f"`--mixed_precision` is {mixed_precision!r}, allowed with DeepSpeed: no, bf16.")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    plugin.deepspeed_config["torch_autocast"] = {"enabled": mixed_precision == "bf16", "dtype": "bfloat16"}
    return plugin
