"""The `Accelerator` of a training run."""

import logging

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from huggingface_hub import create_repo

from softvq_hf.training.arguments import TrainingArguments


def build_accelerator(args: TrainingArguments) -> Accelerator:
    """
    An `Accelerator` whose data order can be resumed and which repeats no sample, with logging and seeds set up.

    The repository on the Hub is made here, so that a missing token or right shows before training, not after it.

    Raises:
        ValueError: If the tracker in `args.report_to` is unknown or not installed.
    """
    available = [str(name) for name in get_available_trackers()]
    if args.report_to not in ("none", "all", *available):
        raise ValueError(
            f"`--report_to` is {args.report_to!r}, allowed: none, all, or a tracker that is installed"
            f" ({', '.join(available) or 'no one is'})."
        )
    accelerator = Accelerator(
        # without this accelerate takes each of several CPU processes for the only one
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=f"{args.output_dir}/{args.logging_dir}"
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, even_batches=False),
        # Batch statistics are never copied between processes in the middle of a step, where the discriminator's second
        # forward would find them changed under the first one's graph.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
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
    if args.push_to_hub and accelerator.is_main_process:
        create_repo(args.repo_id, token=args.hub_token, private=args.hub_private, exist_ok=True)
    return accelerator
