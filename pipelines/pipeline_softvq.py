"""Class-conditional image generation on the latents of SoftVQ-VAE (arXiv 2412.10958): SiT and DiT in one pipeline.

The scheduler decides what is run: `FlowMatchEulerDiscreteScheduler` and `FlowMatchHeunDiscreteScheduler` solve the
ODE of SiT (arXiv 2401.08740), `StochasticInterpolantScheduler` its SDE, `DDPMScheduler` and `DDIMScheduler` run the
chain of DiT (arXiv 2212.09748). Guidance can be limited to an interval of times (arXiv 2404.07724).
"""

import difflib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCard, snapshot_download
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


# diffusers loads a component from a module that is imported already, or from a source file beside the weights. The
# imports serve the first case; in the second (an exported folder) this package need not be installed.
try:
    import softvq_hf.schedulers.scheduling_stochastic_interpolant  # noqa: F401
    from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
    from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
except ModuleNotFoundError:
    AutoencoderSoftVQ = DiTTransformer1DModel = ModelMixin


logger = logging.get_logger(__name__)

# Modes of torch.compile, and what each is for single blocks: the CUDA graph of one would overwrite what the one before
# has left, so that a graph holds the transformer as a whole.
COMPILE_MODES = {
    None: None,
    "default": "default",
    "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs",
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
# Pairs of time and class whose modulation is computed at once: 393 kB each for SiT-XL in bfloat16.
MODULATION_ROWS = 64


class SoftVQPipeline(DiffusionPipeline):
    r"""
    Pipeline that turns class labels into images: a transformer and a scheduler make normalised latents, a tokenizer
    decodes them.

    This pipeline inherits from [`~diffusers.DiffusionPipeline`]: saving, loading, devices, dtypes, offloading and the
    progress bar are documented there.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]):
            Decodes latents. The latter belongs to transformers on 2-D latents.
        transformer ([`DiTTransformer1DModel`]):
            Predicts the velocity (flow matching), or the noise with or without a learned variance (DDPM).
        scheduler ([`~diffusers.SchedulerMixin`]):
            [`StochasticInterpolantScheduler`], or a flow-matching or DDPM-type scheduler of diffusers.
        id2label (`dict` of `int` to `str`, *optional*):
            Names of the classes. A name may hold synonyms, separated by commas: `"tench, Tinca tinca"`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]
    # By transformer, since pipelines may share one: the mode and the weights with which it was compiled
    _frozen: WeakKeyDictionary[torch.nn.Module, tuple[str | None, list]] = WeakKeyDictionary()

    # `from_pipe` takes over a model whose exact type stands here; `ModelMixin` admits classes from an exported folder.
    def __init__(
        self,
        vae: AutoencoderSoftVQ | AutoencoderKL | ModelMixin,
        transformer: DiTTransformer1DModel | ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)

        if id2label is not None:
            id2label = {int(class_id): name for class_id, name in id2label.items()}  # JSON has string keys only
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> dict[str, Any] | tuple[dict[str, Any], ...]:
        r"""
        Read the index of a saved pipeline; [`~DiffusionPipeline.from_pretrained`] calls this.

        An exported folder names the source files that it carries. Here the installed modules of the same names take
        their place: this class runs no code from the folder, and needs no `trust_remote_code=True`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or a repository id.
            kwargs: As in [`~diffusers.ConfigMixin.load_config`].

        Returns:
            `dict`, or a `tuple` that starts with it: what [`~diffusers.ConfigMixin.load_config`] returns.
        """
        result = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = result[0] if isinstance(result, tuple) else result
        index["_class_name"] = cls.__name__
        for name in cls._get_signature_keys(cls)[0]:
            library, class_name = index.get(name) or (None, None)  # a component that is not there is given by hand
            for package in ("softvq_hf.models", "softvq_hf.schedulers"):
                module = f"{package}.{str(library).split('.')[-1]}"
                if module in sys.modules:
                    index[name] = [module, class_name]
        return result

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str | os.PathLike:
        r"""
        Download a repository from the Hub, or find it in the cache; [`~DiffusionPipeline.from_pretrained`] calls this.

        Unlike [`~DiffusionPipeline.download`] it fetches no code, unless `custom_pipeline` is given: this class and
        its components are installed. The repository may thus hold weights and configs only.

        Args:
            pretrained_model_name (`str`): A repository id such as `"user/repo"`.
            kwargs: As in [`~DiffusionPipeline.download`]: `revision`, `variant`, `cache_dir`, `token`,
                `force_download`, `local_files_only`, `custom_pipeline` and components by name.

        Returns:
            `str`: The folder of the snapshot.
        """
        if kwargs.get("custom_pipeline") is not None:
            return super().download(pretrained_model_name, **kwargs)

        folders = [name for name in cls._get_signature_keys(cls)[0] if kwargs.get(name) is None]
        variant = kwargs.get("variant")
        download_kwargs = {
            name: kwargs[name]
            for name in ("revision", "cache_dir", "token", "force_download", "local_files_only")
            if kwargs.get(name) is not None
        }

        weights = "diffusion_pytorch_model{}.safetensors", "diffusion_pytorch_model{}-?????-of-?????.safetensors"
        suffix = "" if variant is None else f".{variant}"
        allow_patterns = [cls.config_name, "README.md"]
        allow_patterns += [f"{folder}/{name.format(suffix)}" for folder in folders for name in ("*.json", *weights)]
        snapshot = snapshot_download(pretrained_model_name, allow_patterns=allow_patterns, **download_kwargs)

        if variant is not None:
            # as everywhere in diffusers, a component without the variant comes with its usual weights
            without = [name for name in folders if not list(Path(snapshot, name).glob(f"*.{variant}*.safetensors"))]
            allow_patterns = [f"{folder}/{name.format('')}" for folder in without for name in weights]
            download_kwargs["revision"] = Path(snapshot).name  # the same commit
            snapshot_download(pretrained_model_name, allow_patterns=allow_patterns, **download_kwargs)
        return snapshot

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        r"""
        Save weights and configs to a folder, as [`~DiffusionPipeline.save_pretrained`] does. What `push_to_hub=True`
        uploads is what [`SoftVQPipeline.push_to_hub`] makes of the pipeline.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; it is made if needed.
            safe_serialization (`bool`, *optional*, defaults to `True`): Whether weights are safetensors.
            variant (`str`, *optional*): Written into the names of the files of the weights.
            max_shard_size (`int` or `str`, *optional*): Size from which weights are split, such as `"5GB"`.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload the pipeline as well.
            kwargs: As in [`~DiffusionPipeline.save_pretrained`]; with `push_to_hub` `repo_id`, by default the name of
                the folder, and the arguments of [`SoftVQPipeline.push_to_hub`].
        """
        if push_to_hub:
            hub_kwargs = {
                name: kwargs.pop(name)
                for name in ("commit_message", "private", "token", "create_pr")
                if name in kwargs
            }
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if push_to_hub:
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, variant=variant, **hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        model_card: ModelCard | None = None,
    ) -> str:
        r"""
        Upload the pipeline with the source of its classes, so that plain diffusers loads it from the Hub:
        [`softvq_hf.training.hub.push_to_hub`]. This package must be installed.

        Args:
            repo_id (`str`): The repository, `"user/name"`, which is made if needed; without a user, one's own.
            commit_message (`str`, *optional*): The first line of the commit.
            private (`bool`, *optional*): Whether a new repository is private; by default as one's account is set.
            token (`str`, *optional*): A token with write access; by default that of `hf auth login`.
            create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead of a commit.
            safe_serialization (`bool`, *optional*, defaults to `True`): Only `True` is allowed.
            variant (`str`, *optional*): Only `None` is allowed: the repository is loaded without one.
            subfolder (`str`, *optional*): Only `None` is allowed: diffusers looks for a pipeline at the top.
            model_card (`ModelCard`, *optional*): By default the one that is there, or [`pipeline_card`].

        Returns:
            `str`: the address of the repository, or of the pull request.

        Raises:
            ValueError: If an argument has a value that is not allowed. Nothing has been sent then.
            ModuleNotFoundError: If the package is not installed.
        """
        for name, value, allowed in (
            ("safe_serialization", safe_serialization, True),
            ("variant", variant, None),
            ("subfolder", subfolder, None),
        ):
            if value != allowed:
                raise ValueError(
                    f"`{name}` is {value!r}, allowed: {allowed}. A folder of `save_pretrained` can be uploaded as it "
                    "is by `huggingface_hub.upload_folder`."
                )
        try:
            # on call: the export stands above the pipelines, and is not there where only an exported folder is
            from softvq_hf.training.hub import push_to_hub
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`push_to_hub` writes the source of the pipeline beside its weights, for which the package softvq-hf "
                "must be installed.",
                name=error.name,
            ) from error
        return push_to_hub(
            self,
            repo_id,
            model_card=model_card,
            token=token,
            private=private,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def enable_fast_sampling(self, mode: str | None = None, freeze_weights: bool = False) -> None:
        r"""
        Compile what is run again and again: the blocks of the transformer and of the tokenizer, one block of each kind
        (regional compilation); convolutional tokenizers get the `channels_last` memory format as well. The first calls
        compile, which takes from seconds to a minute. Images are the same up to the rounding of the dtype.

        Args:
            mode (`str`, *optional*):
                As in `torch.compile`: `"default"`, `"max-autotune-no-cudagraphs"`, which searches for faster kernels
                on GPUs, or `"reduce-overhead"` and `"max-autotune"`, with CUDA graphs. The transformer is then
                compiled as a whole, and a GPU runs each call without waiting for the processor to start its kernels:
                for few images at a time. A graph and its memory are kept for each batch size.
            freeze_weights (`bool`, *optional*, defaults to `False`):
                Whether the transformer is compiled as a whole with its weights of now, in the order in which the
                processor multiplies them: for CPUs. It takes the memory of the weights once more, and a minute of
                compilation for XL, again at the second batch size. Where weights have changed (`load_state_dict`, a
                LoRA that is fused, a step of an optimizer, averages that are copied), the next call of any pipeline of
                this class with the transformer freezes them anew, and says so; that drops all other compiled programs
                of the process, which are compiled anew when they are called. A change of few entries through `.data`,
                or within quantized weights, may go unseen: call this again then. Nothing looks for changes where the
                transformer is called by itself, or by a pipeline of another class, such as one that `custom_pipeline`
                has loaded: the weights of then compute there. torch keeps `torch._dynamo.config.recompile_limit`
                programs, 8, for all transformers of a process, and calls further ones as they are, with a warning.

        Raises:
            ValueError: If `mode` is not allowed, or one with CUDA graphs and `freeze_weights` is true.
        """
        if mode not in list(COMPILE_MODES):
            raise ValueError(f"`mode` is {mode!r}, allowed: {', '.join(map(repr, COMPILE_MODES))}.")
        has_graphs = COMPILE_MODES[mode] != mode
        if has_graphs and freeze_weights:
            without = [name for name, of_blocks in COMPILE_MODES.items() if name == of_blocks]
            raise ValueError(
                f"`mode` is {mode!r}, allowed with `freeze_weights`, which is for CPUs: "
                f"{', '.join(map(repr, without))}."
            )
        for module in (*self.plain_transformer.modules(), *self.vae.modules()):
            module._compiled_call_impl = None  # of an earlier call
        if self._frozen.pop(self.plain_transformer, None) is not None and not freeze_weights:
            torch.compiler.reset()  # its programs, with the weights of then, would be found again
        if freeze_weights:
            self.freeze_transformer(mode)
        elif has_graphs:
            self.plain_transformer.compile(mode=mode)
        else:
            self.plain_transformer.compile_repeated_blocks(mode=mode)
        if getattr(self.vae, "_repeated_blocks", None):
            self.vae.compile_repeated_blocks(mode=COMPILE_MODES[mode])
        self.vae.to(memory_format=torch.channels_last)

    def freeze_transformer(self, mode: str | None) -> None:
        """
        Compile the transformer as a whole with its weights of now.

        Args:
            mode (`str`, *optional*): As in [`~SoftVQPipeline.enable_fast_sampling`].
        """
        torch.compiler.reset()  # programs of an earlier call, with the weights of then, would be found again
        self.plain_transformer.compile(mode=mode)
        self._frozen[self.plain_transformer] = mode, self.get_weight_versions()

    def get_weight_versions(self) -> list[tuple[int, int, bytes]]:
        """
        What changes when a weight of the transformer is replaced or changed: its place, the number of changes in place
        and, since changes through `.data` are not counted, as peft's and those of `EMAModel`, 256 bytes of it.

        Returns:
            `list` of `tuple`: the three for every parameter, in their order; no bytes of one on the meta device, or of
            a subclass of tensors (torchao).
        """
        golden_ratio = (5**0.5 - 1) / 2  # whose multiples are spread over the columns of matrices of usual sizes
        places = torch.arange(256, dtype=torch.float64) * golden_ratio % 1
        versions = []
        for weight in self.transformer.parameters():
            version = 0 if weight.is_inference() else weight._version  # such tensors count nothing
            sample = b""
            if not (weight.is_meta or is_traceable_wrapper_subclass(weight)):  # neither has bytes of its own
                memory = weight.detach().flatten().view(torch.uint8)
                indices = (places[: len(memory)] * len(memory)).long().to(memory.device)
                sample = memory[indices].cpu().numpy().tobytes()
            versions.append((id(weight), version, sample))
        return versions

    @property
    def plain_transformer(self) -> torch.nn.Module:
        """The transformer without what `torch.compile` has wrapped around it."""
        # `is_compiled_module` of diffusers would import the compiler
        return getattr(self.transformer, "_orig_mod", self.transformer)

    def compile_options(self) -> AbstractContextManager:
        """What holds while the transformer is called, and therefore while it is compiled."""
        if self.plain_transformer not in self._frozen:
            return nullcontext()
        import torch._inductor.config  # takes time, and is not there where torch has no compiler

        return torch._inductor.config.patch(freezing=True)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of denoising steps of the current call; for Heun's method the number of its half steps."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback may set `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample's latents: (tokens, channels), or (channels, height, width) for 2-D latents."""
        config = self.transformer.config
        if config.sample_size is not None:
            return config.in_channels, config.sample_size, config.sample_size
        return config.num_tokens, config.in_channels

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        r"""
        Look up class ids by name.

        Args:
            label (`str` or a sequence of them):
                Names from `id2label`: whole, or one of the synonyms in it, in the same spelling.

        Returns:
            `list` of `int`: the class ids.

        Raises:
            ValueError: If the pipeline knows no names, or a name is unknown or belongs to several classes.
        """
        id2label = self.config.id2label
        if id2label is None:
            raise ValueError(
                f"`class_labels` holds the name {label!r}, but this pipeline has no `id2label`; allowed: class ids."
            )
        whole_names, synonyms = {}, {}
        for class_id, name in id2label.items():
            whole_names.setdefault(name, []).append(class_id)
            for synonym in {part.strip() for part in name.split(",")}:
                synonyms.setdefault(synonym, []).append(class_id)

        label_ids = []
        for name in [label] if isinstance(label, str) else label:
            class_ids = whole_names.get(name) or synonyms.get(name)
            if class_ids is None:
                close_names = difflib.get_close_matches(name, {**whole_names, **synonyms}, n=3)
                hint = f"; did you mean {' or '.join(map(repr, close_names))}?" if close_names else ""
                raise ValueError(
                    f"`class_labels` holds the unknown name {name!r}, allowed: the {len(id2label)} names in "
                    f"`pipeline.config.id2label`{hint}"
                )
            if len(class_ids) > 1:
                raise ValueError(
                    f"`class_labels` holds the name {name!r}, which belongs to several classes; allowed: one of their "
                    f"ids {class_ids}."
                )
            label_ids += class_ids
        return label_ids

    def prepare_class_labels(self, class_labels: Any) -> list[int]:
        """Class ids from ids, names, `None` (the null class), a tensor, an array, or (nested) lists of them."""
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.reshape(-1).tolist()
        if isinstance(class_labels, (list, tuple, range)):
            return [class_id for label in class_labels for class_id in self.prepare_class_labels(label)]
        if isinstance(class_labels, str):
            return self.prepare_class_labels(self.get_label_ids(class_labels))
        num_classes = self.transformer.config.num_classes
        if class_labels is None:
            if self.transformer.config.class_dropout_prob == 0:
                raise ValueError(
                    "`class_labels` holds None, allowed: class ids and class names, for this transformer was trained "
                    "without label dropout (`class_dropout_prob` is 0) and so has no null class."
                )
            return [num_classes]
        if isinstance(class_labels, bool) or not isinstance(class_labels, (int, np.integer)):
            raise TypeError(
                f"`class_labels` holds {class_labels!r} of type {type(class_labels).__name__}, allowed: integer class "
                "ids, class names and None."
            )
        if not 0 <= class_labels < num_classes:
            raise ValueError(f"`class_labels` holds the id {class_labels}, allowed: 0 to {num_classes - 1}.")
        return [int(class_labels)]

    def check_inputs(
        self,
        batch_size: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a `ValueError` or `TypeError` which says what [`~SoftVQPipeline.__call__`] accepts."""
        if self.predicts_variance and self.is_flow_matching:
            raise ValueError(
                f"`scheduler` is a {self.scheduler.__class__.__name__}, allowed: `DDPMScheduler` and the like, since "
                "the transformer predicts a noise and its variance (`out_channels` is twice `in_channels`)."
            )
        vae_config = self.vae.config
        if "num_latent_tokens" in vae_config and output_type != "latent":
            decoded_shape = (vae_config.num_latent_tokens, vae_config.latent_channels)
            if self.latent_shape != decoded_shape:
                raise ValueError(
                    f"`transformer` makes latents of shape {self.latent_shape}, allowed: {decoded_shape}, which `vae` "
                    "decodes."
                )
        if batch_size == 0:
            raise ValueError("`class_labels` is empty, allowed: at least one label.")

        if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, numbers.Real):
            raise TypeError(f"`guidance_scale` is {guidance_scale!r}, allowed: numbers.")
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, allowed: finite numbers from 0 on (guidance is off up to 1)."
            )
        if guidance_scale > 1 and self.transformer.config.class_dropout_prob == 0:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, allowed: at most 1 for this transformer, which was trained "
                "without label dropout (`class_dropout_prob` is 0) and so has no null class."
            )
        if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
            raise ValueError(f"`guidance_interval` is {guidance_interval!r}, allowed: two numbers (low, high).")
        if not all(isinstance(limit, numbers.Real) and not isinstance(limit, bool) for limit in guidance_interval):
            raise TypeError(f"`guidance_interval` is {guidance_interval!r}, allowed: two numbers (low, high).")
        if not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {guidance_interval}, allowed: (low, high) with 0 <= low <= high <= 1, where "
                "1 is noise."
            )

        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, (int, np.integer)):
            raise TypeError(f"`num_inference_steps` is {num_inference_steps!r}, allowed: integers.")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, allowed: integers from 1 on.")

        if generator is not None:
            generators = generator if isinstance(generator, list) else [generator]
            if not all(isinstance(entry, torch.Generator) for entry in generators):
                raise TypeError(f"`generator` is {generator!r}, allowed: a `torch.Generator` or a list of them.")
            if isinstance(generator, list) and len(generator) != batch_size:
                raise ValueError(
                    f"`generator` is a list of {len(generator)}, allowed: one generator for each of the {batch_size} "
                    "labels, or a single one."
                )

        if latents is not None:
            if not torch.is_tensor(latents) or not latents.is_floating_point():
                dtype = latents.dtype if torch.is_tensor(latents) else type(latents).__name__
                raise TypeError(f"`latents` is of type {dtype}, allowed: a floating-point tensor.")
            if tuple(latents.shape) != (batch_size, *self.latent_shape):
                raise ValueError(
                    f"`latents` has shape {tuple(latents.shape)}, allowed: {(batch_size, *self.latent_shape)} for "
                    f"{batch_size} labels."
                )
            if not torch.isfinite(latents).all():
                raise ValueError("`latents` holds NaN or infinite values, allowed: finite numbers.")

        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, allowed: 'pil', 'np', 'pt', 'latent'.")

        if not isinstance(callback_on_step_end_tensor_inputs, (list, tuple)):
            raise TypeError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs!r}, allowed: a list of "
                "names."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` holds {unknown}, allowed: {self._callback_tensor_inputs}."
            )

    def prepare_timesteps(self, num_inference_steps: int, device: torch.device) -> list[float]:
        """
        Set the scheduler's grid.

        Args:
            num_inference_steps (`int`): The number of steps.
            device (`torch.device`): Where the scheduler's timesteps go.

        Returns:
            `list` of `float`: for every model call the time in [0, 1] at which its step starts, in double precision.
            Only exact values meet the limits of a guidance interval as they should: 0.3 in float32 is above 0.3.

        Raises:
            ValueError: If the scheduler has settings with which it does not solve the ODE of a flow.
        """
        scheduler = self.scheduler
        if hasattr(scheduler, "times"):  # StochasticInterpolantScheduler
            scheduler.set_timesteps(num_inference_steps, device=device)
            return scheduler.times[:-1].tolist()

        if not self.is_flow_matching:
            if self.transformer.config.timestep_scale != 1:
                logger.warning(
                    f"`scheduler` is a {scheduler.__class__.__name__} for the noise of a DDPM chain, but "
                    f"`timestep_scale` of `transformer` is {self.transformer.config.timestep_scale}, as for flows. "
                    "Multistep schedulers take one with `use_flow_sigmas=True, prediction_type='flow_prediction'`."
                )
            scheduler.set_timesteps(num_inference_steps, device=device)
            return (scheduler.timesteps.double().cpu() / scheduler.config.num_train_timesteps).tolist()

        # The default grids of the flow-matching schedulers end in one tiny step: give them the even one of SiT.
        times = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            # It takes no grid. Inner points appear twice, for a corrector and the next predictor; a corrector call
            # belongs to the step that its predictor started.
            scheduler.set_timesteps(num_inference_steps, device=device)
            times = scheduler.config.shift * times / (1 + (scheduler.config.shift - 1) * times)
            scheduler.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]]).to(torch.float32)
            scheduler.timesteps = (scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps).to(device)
            return times[:-1].repeat_interleave(2)[:-1].tolist()

        if "use_flow_sigmas" in inspect.signature(scheduler.__class__).parameters:
            # Their own grids have integer timesteps, and one starts at 0.999: errors that no number of steps removes.
            # At time 1 the log of the signal-to-noise ratio, in which they count, is infinite: start 1e-6 before.
            self.check_flow_solver()
            scheduler.set_timesteps(num_inference_steps, device=device)
            times = scheduler.config.flow_shift * times / (1 + (scheduler.config.flow_shift - 1) * times)
            scheduler.sigmas = torch.cat([times[:1] - 1e-6, times[1:]]).to(torch.float32)
            scheduler.timesteps = (times[:-1] * scheduler.config.num_train_timesteps).to(torch.float32).to(device)
            return times[:-1].tolist()

        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=times[:-1].numpy().copy(), device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        scheduler_times = scheduler.timesteps.double().cpu() / scheduler.config.num_train_timesteps
        if len(scheduler_times) == num_inference_steps and torch.allclose(
            scheduler_times, times[:-1], rtol=0, atol=1e-6
        ):
            return times[:-1].tolist()  # what the scheduler rounded to float32
        return scheduler_times.tolist()

    def check_flow_solver(self) -> None:
        """Raise a `ValueError` which says what settings of diffusers' multistep solvers solve the ODE of a flow."""
        scheduler = self.scheduler
        if not isinstance(scheduler, (UniPCMultistepScheduler, DPMSolverMultistepScheduler)):
            raise ValueError(
                f"`scheduler` is a {scheduler.__class__.__name__} with `use_flow_sigmas=True`, allowed: "
                "`UniPCMultistepScheduler` and `DPMSolverMultistepScheduler`."
            )
        allowed = {
            "prediction_type": ("flow_prediction",),
            "final_sigmas_type": ("zero",),
            "use_karras_sigmas": (False,),
            "use_exponential_sigmas": (False,),
            "use_beta_sigmas": (False,),
            "use_dynamic_shifting": (False,),
            "thresholding": (False,),
        }
        if isinstance(scheduler, UniPCMultistepScheduler):
            # the last step, to a signal-to-noise ratio that is infinite, must be the one of first order, by "bh2"
            allowed |= {"solver_type": ("bh2",), "lower_order_final": (True,), "predict_x0": (True,)}
            allowed |= {"solver_p": (None,), "shift_terminal": (None,)}
        else:
            allowed |= {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++"), "use_lu_lambdas": (False,)}
            if scheduler.config.get("path_type") == "cosine":  # of the scheduler whose config this one was made from
                allowed["algorithm_type"] = ("dpmsolver++",)
        for name, values in allowed.items():
            if scheduler.config[name] not in values:
                raise ValueError(
                    f"`{name}` of the {scheduler.__class__.__name__} is {scheduler.config[name]!r}, allowed for flow "
                    f"matching: {' or '.join(map(repr, values))}."
                )

    def restart_solver(self) -> None:
        """
        Make a multistep scheduler forget the predictions of earlier steps. Where guidance is switched the prediction
        jumps, and to extrapolate over that would cost such a scheduler its order.
        """
        if hasattr(self.scheduler, "lower_order_nums"):
            self.scheduler.lower_order_nums = 0
        if hasattr(self.scheduler, "last_sample"):
            self.scheduler.last_sample = None

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Initial noise, float32, of shape `(batch_size, *latent_shape)`."""
        shape = (batch_size, *self.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        # The flow-matching schedulers of diffusers have no `init_noise_sigma`: it is 1.
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @property
    def precomputes_modulation(self) -> bool:
        """
        Whether the transformer's modulation is computed apart from its other layers: not where it takes none, or where
        hooks on blocks or layers move or cast their weights (offloading within the model), which act when a block is
        called.
        """
        if "modulation" not in inspect.signature(self.plain_transformer.forward).parameters:
            return False
        return not any(
            hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
            for module in self.transformer.transformer_blocks.modules()
        )

    def modulate(
        self, timesteps: torch.Tensor, class_ids: list[int], guided: list[bool]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
        """
        Compute the transformer's modulation once for each pair of step and class, for several steps at a time: a third
        of its weights is then read once for all of them.

        Args:
            timesteps (`torch.Tensor` of shape `(N,)`): The timesteps of all steps, on the device of the computation.
            class_ids (`list` of `int`): The classes of the batch.
            guided (`list` of `bool`): For every step, whether the null class is needed too.

        Yields:
            `tuple` of two `torch.Tensor`: for every step K classes in ascending order and, `(K, ...)`, their rows of
            [`~DiTTransformer1DModel.compute_modulation`]. `None` where the transformer has to compute them by itself.
        """
        if not self.precomputes_modulation:
            yield from [None] * len(timesteps)
            return
        null_id = self.transformer.config.num_classes
        class_ids = sorted(set(class_ids))
        # copied to the device once: a copy makes the processor wait until the device has done what it was asked to
        all_classes = torch.tensor([*class_ids, null_id] if any(guided) else class_ids, device=timesteps.device)
        steps_at_once = max(1, MODULATION_ROWS // (len(class_ids) + 1))
        for start in range(0, len(timesteps), steps_at_once):
            steps = slice(start, start + steps_at_once)
            classes = all_classes if any(guided[steps]) else all_classes[: len(class_ids)]
            modulation = self.transformer.compute_modulation(
                timesteps[steps].repeat_interleave(len(classes)), classes.repeat(len(timesteps[steps]))
            )
            yield from ((classes, rows) for rows in modulation.unflatten(0, (-1, len(classes))))

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        guided: bool,
        modulation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Call the transformer once, with classifier-free guidance if `guided`.

        Args:
            latents (`torch.Tensor`): The scheduler's sample, `(batch_size, *latent_shape)`.
            timestep (`torch.Tensor`): The scheduler's timestep, a scalar on the device of `latents`.
            class_labels (`torch.Tensor` of shape `(batch_size,)`): Class ids.
            guided (`bool`): Whether the null class is computed too, which doubles the batch.
            modulation (`tuple` of two `torch.Tensor`, *optional*): What [`~SoftVQPipeline.modulate`] yields.

        Returns:
            `torch.Tensor`: the prediction in float32. Guidance concerns the velocity or noise; variance channels stay
            those of the conditional prediction.
        """
        if guided:
            null_labels = torch.full_like(class_labels, self.transformer.config.num_classes)
            class_labels = torch.cat([class_labels, null_labels])
            latents = torch.cat([latents, latents])
        model_kwargs = {}
        if modulation is not None:
            classes, rows = modulation
            model_kwargs["modulation"] = rows[torch.searchsorted(classes, class_labels)]
        with self.compile_options():
            prediction = self.transformer(
                latents.to(self.transformer.dtype),
                timestep=timestep.expand(len(latents)),
                class_labels=class_labels,
                return_dict=False,
                **model_kwargs,
            )[0]
        prediction = prediction.to(torch.float32, copy=True)  # the next call of a CUDA graph overwrites what it gave
        if not guided:
            return prediction

        conditional, unconditional = prediction.chunk(2)
        if not self.predicts_variance:
            return unconditional + self.guidance_scale * (conditional - unconditional)
        conditional, variance = conditional.chunk(2, dim=self.channel_dim)
        unconditional, _ = unconditional.chunk(2, dim=self.channel_dim)
        noise = unconditional + self.guidance_scale * (conditional - unconditional)
        return torch.cat([noise, variance], dim=self.channel_dim)

    @property
    def is_flow_matching(self) -> bool:
        """Whether the scheduler takes a velocity, and not the noise of a DDPM chain."""
        # Not by its config: there `from_config` keeps entries of the scheduler that it was made from.
        parameters = inspect.signature(self.scheduler.__class__).parameters
        if "use_flow_sigmas" in parameters:
            return self.scheduler.config.use_flow_sigmas
        return "beta_schedule" not in parameters

    @property
    def predicts_variance(self) -> bool:
        """Whether the transformer predicts variance channels after those of the noise (DiT)."""
        config = self.transformer.config
        return config.out_channels == 2 * config.in_channels

    @property
    def channel_dim(self) -> int:
        """The channel axis of the latents: the last of 1-D tokens, the second of 2-D latents."""
        return -1 if len(self.latent_shape) == 2 else 1

    def denoise(
        self, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, step_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """One step of the scheduler, from `latents` at `timestep` to the next."""
        if not self.predicts_variance:
            return self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]

        # DDPMScheduler takes noise and variance together and splits them on axis 1; the others take the noise.
        if self.scheduler.config.get("variance_type") not in ("learned", "learned_range"):
            prediction, _ = prediction.chunk(2, dim=self.channel_dim)
        prediction, latents = prediction.transpose(1, self.channel_dim), latents.transpose(1, self.channel_dim)
        latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]
        return latents.transpose(1, self.channel_dim)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(batch_size, 3, height, width)`, nominally in [-1, 1], from normalised latents."""
        if hasattr(self.vae, "unscale_latent"):
            latents = self.vae.unscale_latent(latents)
        else:  # AutoencoderKL
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | torch.Tensor | None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, torch.Tensor]], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate one image for each class label.

        Args:
            class_labels (`int`, `str`, `None`, a sequence of them, or `torch.Tensor`):
                Class ids from 0 to `transformer.config.num_classes - 1`, or names from `id2label` (whole, or one of
                the synonyms in it). `None` stands for the null class: an image of any class. Their number is the batch
                size.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Scale w of classifier-free guidance, null + w (conditional - null), from 0 on. Values up to 1 turn
                guidance off.
            guidance_interval (`tuple` of two `float`, *optional*, defaults to `(0.0, 1.0)`):
                The times, both included, between which a step is guided if it starts there: 1 is noise, 0 is data.
                Steps outside cost half. For DDPM schedulers the time is the timestep over `num_train_timesteps`.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of steps, from 1 on.
            generator (`torch.Generator` or a list of one per label, *optional*):
                Source of all noise.
            latents (`torch.Tensor`, *optional*):
                Initial noise of shape `(batch_size, num_tokens, in_channels)`, or `(batch_size, in_channels,
                sample_size, sample_size)` for 2-D latents, instead of drawing it. It is used in float32.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`PIL.Image.Image`), `"np"` (`(batch_size, height, width, 3)` in [0, 1]), `"pt"`
                (`(batch_size, 3, height, width)` in [0, 1]) or `"latent"` (normalised latents, float32, not decoded).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~diffusers.ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called after every step as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)`; the
                dictionary it returns may replace the tensors in `callback_kwargs`.
            callback_on_step_end_tensor_inputs (`list` of `str`, *optional*, defaults to `["latents"]`):
                The tensors in `callback_kwargs`, out of `pipeline._callback_tensor_inputs`.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images, as `images` or as the only entry.

        Raises:
            ValueError: If a value is not allowed: a label or name, `guidance_scale` (also: above 1 for a transformer
                without a null class), `guidance_interval`, `num_inference_steps`, the length of a list of generators,
                the shape or values of `latents`, `output_type` or a callback input. Raised before any computation.
            TypeError: If labels, numbers, generators, latents or names of callback inputs are of a wrong type.

        Examples:

        ```py
        >>> import torch
        >>> from softvq_hf import SoftVQPipeline

        >>> pipeline = SoftVQPipeline.from_pretrained("outputs/quickstart/generator")
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = pipeline([0, 1], guidance_scale=1.75, guidance_interval=(0.0, 0.7), generator=generator).images
        ```
        """
        # 1. Check the inputs
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        class_ids = self.prepare_class_labels(class_labels)
        batch_size = len(class_ids)
        self.check_inputs(
            batch_size,
            guidance_scale,
            guidance_interval,
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        if self.plain_transformer in self._frozen:
            mode, versions = self._frozen[self.plain_transformer]
            if versions != self.get_weight_versions():
                logger.warning("The transformer's weights have changed since they were frozen: they are frozen anew.")
                self.freeze_transformer(mode)
        device = self._execution_device

        # 2. Labels, grid and noise. The scheduler counts on the CPU: nothing in the loop waits for the device.
        class_labels = torch.tensor(class_ids, device=device)
        times = self.prepare_timesteps(num_inference_steps, torch.device("cpu"))
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        device_timesteps = (timesteps.float() if timesteps.is_floating_point() else timesteps).to(device)
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(batch_size, generator, latents, device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        # 3. Modulations of the transformer
        low, high = guidance_interval
        in_interval = [low <= time <= high for time in times]
        has_null_rows = [self.guidance_scale > 1 and inside for inside in in_interval]
        modulations = self.modulate(device_timesteps, class_ids, has_null_rows)

        # 4. Denoise
        was_guided = has_null_rows[0]
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, (t, modulation) in enumerate(zip(timesteps, modulations, strict=True)):
                if self.interrupt:
                    break

                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, t)
                guided = self.guidance_scale > 1 and in_interval[i]
                if guided and not has_null_rows[i]:  # a callback has turned guidance on
                    modulation = None
                if guided != was_guided:
                    self.restart_solver()
                was_guided = guided
                # a copy: for a view a compiler would make another program, since it lies elsewhere in each step
                timestep = device_timesteps[i].clone()
                prediction = self.predict(model_input, timestep, class_labels, guided, modulation)
                latents = self.denoise(prediction, t, latents, step_kwargs)

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)

                progress_bar.update()

        # 5. Decode
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
