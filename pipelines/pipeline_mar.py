"""Class-conditional image generation by MAR (arXiv 2406.11838) on the latents of a tokenizer.

Tokens are made in random order, several at a time: a transformer looks at those that are there and gives a condition
for each of the next, and a diffusion chain of single tokens, whose network is a small MLP, makes tokens of conditions.
"""

import difflib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCard, snapshot_download
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


# diffusers loads a component from a module that is imported already, or from a source file beside the weights. The
# imports serve the first case; in the second (an exported folder) this package need not be installed.
try:
    import softvq_hf.schedulers.scheduling_ddpm_temperature  # noqa: F401
    from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
    from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
except ModuleNotFoundError:
    AutoencoderSoftVQ = MARTransformer1DModel = ModelMixin


logger = logging.get_logger(__name__)

COMPILE_MODES = (None, "default", "max-autotune-no-cudagraphs")


class MARPipeline(DiffusionPipeline):
    r"""
    Pipeline that turns class labels into images: MAR makes normalised latents, a tokenizer decodes them.

    This pipeline inherits from [`~diffusers.DiffusionPipeline`]: saving, loading, devices, dtypes, offloading and the
    progress bar are documented there.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]):
            Decodes latents, and holds their statistics: it must be the tokenizer that `transformer` was trained with,
            which knows nothing of them. [`~diffusers.AutoencoderKL`] belongs to transformers on 2-D latents.
        transformer ([`MARTransformer1DModel`]):
            Gives conditions for unknown tokens, and predicts the noise in single tokens.
        scheduler ([`TemperatureDDPMScheduler`]):
            The chain of single tokens.
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
        transformer: MARTransformer1DModel | ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)

        if id2label is not None:
            id2label = {int(class_id): name for class_id, name in id2label.items()}  # JSON has string keys only
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor()

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
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

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
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

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
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
        uploads is what [`MARPipeline.push_to_hub`] makes of the pipeline.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; it is made if needed.
            safe_serialization (`bool`, *optional*, defaults to `True`): Whether weights are safetensors.
            variant (`str`, *optional*): Written into the names of the files of the weights.
            max_shard_size (`int` or `str`, *optional*): Size from which weights are split, such as `"5GB"`.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload the pipeline as well.
            kwargs: As in [`~DiffusionPipeline.save_pretrained`]; with `push_to_hub` `repo_id`, by default the name of
                the folder, and the arguments of [`MARPipeline.push_to_hub`].
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

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
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

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
    @property
    def plain_transformer(self) -> torch.nn.Module:
        """The transformer without what `torch.compile` has wrapped around it."""
        # `is_compiled_module` of diffusers would import the compiler
        return getattr(self.transformer, "_orig_mod", self.transformer)

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
    def compile_options(self) -> AbstractContextManager:
        """What holds while the transformer is called, and therefore while it is compiled."""
        if self.plain_transformer not in self._frozen:
            return nullcontext()
        import torch._inductor.config  # takes time, and is not there where torch has no compiler

        return torch._inductor.config.patch(freezing=True)

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current call."""
        return self._guidance_scale

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback may set `pipeline._interrupt = True`."""
        return self._interrupt

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
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

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
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

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(batch_size, 3, height, width)`, nominally in [-1, 1], from normalised latents."""
        if hasattr(self.vae, "unscale_latent"):
            latents = self.vae.unscale_latent(latents)
        else:  # AutoencoderKL
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    @property
    def num_timesteps(self) -> int:
        """The number of autoregressive steps of the current call."""
        return self._num_timesteps

    def enable_fast_sampling(self, mode: str | None = None, freeze_weights: bool = False) -> None:
        r"""
        Compile what is run again and again: the blocks of the transformer, of its denoiser and of the tokenizer, one
        block of each kind (regional compilation); convolutional tokenizers get the `channels_last` memory format as
        well. The first calls compile, which takes from seconds to a minute. Images are the same up to the rounding of
        the dtype.

        Args:
            mode (`str`, *optional*):
                As in `torch.compile`: `"default"`, or `"max-autotune-no-cudagraphs"`, which searches for faster
                kernels on GPUs. Modes with CUDA graphs are refused: the steps have different numbers of tokens, and
                each number would be a graph.
            freeze_weights (`bool`, *optional*, defaults to `False`):
                Whether the denoiser is compiled as a whole with its weights of now, in the order in which the
                processor multiplies them: for CPUs. It takes the memory of the denoiser's weights once more. Where
                weights have changed (`load_state_dict`, a LoRA that is fused, a step of an optimizer, averages that
                are copied), the next call of any pipeline of this class with the transformer freezes them anew, and
                says so; that drops all other compiled programs of the process, which are compiled anew when they are
                called. A change of few entries through `.data`, or within quantized weights, may go unseen: call this
                again then. Nothing looks for changes where the denoiser is called by itself, or by a pipeline of
                another class, such as one that `custom_pipeline` has loaded: the weights of then compute there.

        Raises:
            ValueError: If `mode` is not allowed.
        """
        if mode not in COMPILE_MODES:
            raise ValueError(f"`mode` is {mode!r}, allowed: {', '.join(map(repr, COMPILE_MODES))}.")
        for module in (*self.plain_transformer.modules(), *self.vae.modules()):
            module._compiled_call_impl = None  # of an earlier call
        if self._frozen.pop(self.plain_transformer, None) is not None and not freeze_weights:
            torch.compiler.reset()  # its programs, with the weights of then, would be found again
        if freeze_weights:
            self.freeze_transformer(mode)
        else:
            self.plain_transformer.compile_repeated_blocks(mode=mode)
        if getattr(self.vae, "_repeated_blocks", None):
            self.vae.compile_repeated_blocks(mode=mode)
        self.vae.to(memory_format=torch.channels_last)

    def freeze_transformer(self, mode: str | None) -> None:
        """
        Compile the denoiser as a whole with its weights of now, and the blocks of the transformer.

        Args:
            mode (`str`, *optional*): As in [`~MARPipeline.enable_fast_sampling`].
        """
        torch.compiler.reset()  # programs of an earlier call, with the weights of then, would be found again
        for block in (*self.transformer.encoder_blocks, *self.transformer.decoder_blocks):
            block.compile(mode=mode)
        self.transformer.denoiser.compile(mode=mode)
        self._frozen[self.plain_transformer] = mode, self.get_weight_versions()

    # Copied from softvq_hf.pipelines.pipeline_softvq.SoftVQPipeline with SoftVQPipeline->MARPipeline
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

    def check_inputs(
        self,
        batch_size: int,
        guidance_scale: float,
        guidance_schedule: str,
        num_inference_steps: int,
        num_diffusion_steps: int,
        temperature: float,
        generator: torch.Generator | list[torch.Generator] | None,
        orders: torch.Tensor | None,
        token_noise: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a `ValueError` or `TypeError` which says what [`~MARPipeline.__call__`] accepts."""
        transformer = self.transformer
        if "temperature" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(
                f"`scheduler` is a {self.scheduler.__class__.__name__}, allowed: `TemperatureDDPMScheduler`."
            )
        if output_type != "latent":
            vae_config = self.vae.config
            made = (transformer.num_tokens, transformer.token_channels)
            if "num_latent_tokens" not in vae_config:  # AutoencoderKL
                if not transformer.is_2d or transformer.config.in_channels != vae_config.latent_channels:
                    raise ValueError(
                        f"`transformer` makes {'2-D' if transformer.is_2d else '1-D'} latents of "
                        f"{transformer.config.in_channels} channels, allowed: 2-D latents of "
                        f"{vae_config.latent_channels} channels, which `vae` decodes."
                    )
            elif transformer.is_2d or made != (vae_config.num_latent_tokens, vae_config.latent_channels):
                raise ValueError(
                    f"`transformer` makes {'patches of 2-D latents' if transformer.is_2d else 'latents'} of shape "
                    f"{made}, allowed: latents of shape {(vae_config.num_latent_tokens, vae_config.latent_channels)}, "
                    "which `vae` decodes."
                )
        if batch_size == 0:
            raise ValueError("`class_labels` is empty, allowed: at least one label.")

        for name, value in {"guidance_scale": guidance_scale, "temperature": temperature}.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"`{name}` is {value!r}, allowed: numbers.")
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, allowed: finite numbers from 0 on (guidance is off up to 1)."
            )
        if guidance_scale > 1 and transformer.config.class_dropout_prob == 0:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, allowed: at most 1 for this transformer, which was trained "
                "without label dropout (`class_dropout_prob` is 0) and so has no null class."
            )
        if guidance_schedule not in ("linear", "constant"):
            raise ValueError(f"`guidance_schedule` is {guidance_schedule!r}, allowed: 'linear', 'constant'.")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"`temperature` is {temperature}, allowed: finite numbers above 0.")
        steps = {"num_inference_steps": num_inference_steps, "num_diffusion_steps": num_diffusion_steps}
        for name, value in steps.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"`{name}` is {value!r}, allowed: integers.")
            if value < 1:
                raise ValueError(f"`{name}` is {value}, allowed: integers from 1 on.")
        if num_diffusion_steps > self.scheduler.config.num_train_timesteps:
            raise ValueError(
                f"`num_diffusion_steps` is {num_diffusion_steps}, allowed: up to "
                f"{self.scheduler.config.num_train_timesteps}, the steps of the chain."
            )

        if generator is not None:
            generators = generator if isinstance(generator, list) else [generator]
            if not all(isinstance(entry, torch.Generator) for entry in generators):
                raise TypeError(f"`generator` is {generator!r}, allowed: a `torch.Generator` or a list of them.")
            if isinstance(generator, list) and len(generator) != batch_size:
                raise ValueError(
                    f"`generator` is a list of {len(generator)}, allowed: one generator for each of the {batch_size} "
                    "labels, or a single one."
                )

        num_tokens, channels = transformer.num_tokens, transformer.token_channels
        if orders is not None:
            if not torch.is_tensor(orders) or orders.dtype not in (torch.int64, torch.int32):
                dtype = orders.dtype if torch.is_tensor(orders) else type(orders).__name__
                raise TypeError(f"`orders` is of type {dtype}, allowed: a tensor of dtype int64 or int32.")
            if tuple(orders.shape) != (batch_size, num_tokens):
                raise ValueError(
                    f"`orders` has shape {tuple(orders.shape)}, allowed: {(batch_size, num_tokens)} for {batch_size} "
                    "labels."
                )
            if not torch.equal(orders.sort(dim=1).values.cpu(), torch.arange(num_tokens).expand_as(orders)):
                raise ValueError(f"`orders` holds a row that is no permutation of 0..{num_tokens - 1}.")
        if token_noise is not None:
            expected_shape = (num_diffusion_steps + 1, batch_size, num_tokens, channels)
            if not torch.is_tensor(token_noise) or not token_noise.is_floating_point():
                dtype = token_noise.dtype if torch.is_tensor(token_noise) else type(token_noise).__name__
                raise TypeError(f"`token_noise` is of type {dtype}, allowed: a floating-point tensor.")
            if tuple(token_noise.shape) != expected_shape:
                raise ValueError(f"`token_noise` has shape {tuple(token_noise.shape)}, allowed: {expected_shape}.")
            if not torch.isfinite(token_noise).all():
                raise ValueError("`token_noise` holds NaN or infinite values, allowed: finite numbers.")

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

    def plan_steps(self, num_inference_steps: int, guidance_scale: float, schedule: str) -> list[tuple[int, float]]:
        """
        What is made when (MAR, section 3.4): the number of tokens still unknown after a step falls as a cosine.

        Args:
            num_inference_steps (`int`): Steps K; those that would make no token are left out.
            guidance_scale (`float`): Scale of classifier-free guidance.
            schedule (`str`): "constant", or "linear" from 1 to almost `guidance_scale` as tokens become known.

        Returns:
            `list` of `tuple`: for each step the number of tokens that are unknown after it, and its guidance scale.
        """
        num_tokens = self.transformer.num_tokens
        plan, num_unknown = [], num_tokens
        for step in range(num_inference_steps):
            remaining = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / num_inference_steps))
            remaining = max(1, min(num_unknown - 1, remaining))
            scale = guidance_scale
            if schedule == "linear":
                scale = 1 + (guidance_scale - 1) * (num_tokens - remaining) / num_tokens
            if step == num_inference_steps - 1:
                remaining = 0
            if remaining < num_unknown:
                plan.append((remaining, scale))
            num_unknown = remaining
        return plan

    def prepare_orders(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        orders: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Permutations `(batch_size, num_tokens)` of the positions, on the CPU. Tokens are made from their ends on."""
        if orders is None:
            shape = (batch_size, self.transformer.num_tokens)
            orders = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).argsort(dim=1)
        return orders.to("cpu", torch.int64)

    @property
    def precomputes_conditioning(self) -> bool:
        """
        Whether what the denoiser makes of timesteps and conditions is computed once for all steps of a chain: not
        where hooks on its layers move or cast their weights (offloading within the model), which act when it is
        called.
        """
        return not any(
            hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
            for module in self.transformer.denoiser.modules()
        )

    def make_tokens(
        self,
        conditions: torch.Tensor,
        timestep_embeds: torch.Tensor | None,
        guidance_scale: float | None,
        temperature: float,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """
        Run the chain of single tokens.

        Args:
            conditions (`torch.Tensor` of shape `(N, D)`, or `(2 * N, D)` with guidance): Of the transformer.
            timestep_embeds (`torch.Tensor` of shape `(T, W)`, *optional*):
                Of the scheduler's timesteps, in their order, where the conditioning is computed in advance.
            guidance_scale (`float`, *optional*): Scale of classifier-free guidance, `None` for none.
            temperature (`float`): Factor of the noise that the steps add.
            noise (`torch.Tensor` of shape `(T + 1, N, C)`): What the chain starts from, then what its steps add.

        Returns:
            `torch.Tensor` of shape `(N, C)`: normalised tokens, float32. Guidance concerns the noise that is
            predicted; the variance stays that of the conditional half (MAR, section 3.4).
        """
        tokens, noise = noise[0], noise[1:]
        if timestep_embeds is not None:
            condition_embeds = self.transformer.embed_conditions(conditions)
        else:
            device_timesteps = self.scheduler.timesteps.to(tokens.device)
        for i, timestep in enumerate(self.scheduler.timesteps.tolist()):
            model_input = tokens if guidance_scale is None else torch.cat([tokens, tokens])
            if timestep_embeds is not None:
                model_kwargs = {"conditioning": condition_embeds + timestep_embeds[i]}
            else:
                model_kwargs = {"timestep": device_timesteps[i].expand(len(conditions)), "conditions": conditions}
            with self.compile_options():
                prediction = self.transformer.denoise(model_input.to(self.transformer.dtype), **model_kwargs).float()
            if guidance_scale is not None:
                conditional, unconditional = prediction.chunk(2)
                conditional, variance = conditional.chunk(2, dim=1)
                unconditional, _ = unconditional.chunk(2, dim=1)
                predicted_noise = unconditional + guidance_scale * (conditional - unconditional)
                prediction = torch.cat([predicted_noise, variance], dim=1)
            tokens = self.scheduler.step(
                prediction, timestep, tokens, variance_noise=noise[i], temperature=temperature, return_dict=False
            )[0]
        return tokens

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | torch.Tensor | None,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        num_inference_steps: int = 64,
        num_diffusion_steps: int = 100,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        orders: torch.Tensor | None = None,
        token_noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, torch.Tensor]], dict]
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
            guidance_schedule (`str`, *optional*, defaults to `"linear"`):
                `"linear"`: from 1 to almost `guidance_scale`, as tokens become known. `"constant"`: always that.
            num_inference_steps (`int`, *optional*, defaults to 64):
                Autoregressive steps, from 1 on: calls of the transformer. More than there are tokens make one token
                at a time.
            num_diffusion_steps (`int`, *optional*, defaults to 100):
                Steps of the chain of every token, from 1 to 1000.
            temperature (`float`, *optional*, defaults to 1.0):
                Factor of the noise that the chain's steps add, above 0.
            generator (`torch.Generator` or a list of one per label, *optional*):
                Source of the orders and of all noise.
            orders (`torch.Tensor` of shape `(batch_size, num_tokens)`, int64 or int32, *optional*):
                Permutations of the positions instead of drawing them. Tokens are made from their ends on.
            token_noise (`torch.Tensor` of shape `(num_diffusion_steps + 1, batch_size, num_tokens, C)`, *optional*):
                For every position what its chain starts from, then what each step adds, instead of drawing it. The
                last entry has no effect.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`PIL.Image.Image`), `"np"` (`(batch_size, height, width, 3)` in [0, 1]), `"pt"`
                (`(batch_size, 3, height, width)` in [0, 1]) or `"latent"` (normalised latents, float32, not decoded).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~diffusers.ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called after every autoregressive step as `callback_on_step_end(pipeline, step, num_known,
                callback_kwargs)`, where `num_known` tokens of each image are known; the dictionary it returns may
                replace the tensors in `callback_kwargs`.
            callback_on_step_end_tensor_inputs (`list` of `str`, *optional*, defaults to `["latents"]`):
                The tensors in `callback_kwargs`, out of `pipeline._callback_tensor_inputs`: `latents` are tokens
                `(batch_size, num_tokens, C)`, zero where unknown.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images, as `images` or as the only entry.

        Raises:
            ValueError: If a value is not allowed: a label or name, a scale, schedule or number of steps, the
                temperature, the length of a list of generators, orders or noise of a wrong shape or content,
                `output_type` or a callback input. Raised before any computation.
            TypeError: If labels, numbers, generators, orders, noise or names of callback inputs are of a wrong type.

        Examples:

        ```py
        >>> import torch
        >>> from softvq_hf import MARPipeline

        >>> pipeline = MARPipeline.from_pretrained("outputs/quickstart/mar")
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = pipeline([0, 1], guidance_scale=2.0, num_inference_steps=16, generator=generator).images
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
            guidance_schedule,
            num_inference_steps,
            num_diffusion_steps,
            temperature,
            generator,
            orders,
            token_noise,
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
        transformer, device = self.transformer, self._execution_device
        is_guided = guidance_scale > 1
        copies = 2 if is_guided else 1

        # 2. Labels, orders, steps. Positions are looked up on the CPU: nothing in the loop waits for the device.
        null_ids = [transformer.config.num_classes] * batch_size if is_guided else []
        class_labels = torch.tensor(class_ids + null_ids, device=device)
        orders = self.prepare_orders(batch_size, generator, orders, device)
        plan = self.plan_steps(num_inference_steps, guidance_scale, guidance_schedule)
        self._num_timesteps = len(plan)
        self.scheduler.set_timesteps(num_diffusion_steps)
        timestep_embeds = None

        # 3. Make tokens
        latents = torch.zeros(batch_size, transformer.num_tokens, transformer.token_channels, device=device)
        num_unknown = transformer.num_tokens
        with self.progress_bar(total=len(plan)) as progress_bar:
            for i, (remaining, scale) in enumerate(plan):
                if self.interrupt:
                    break

                visible = orders[:, num_unknown:].sort(dim=1).values.to(device)
                predicted = orders[:, remaining:num_unknown].sort(dim=1).values.to(device)
                conditions = transformer(
                    latents.to(transformer.dtype).repeat(copies, 1, 1),
                    class_labels=class_labels,
                    visible_positions=visible.repeat(copies, 1),
                    predicted_positions=predicted.repeat(copies, 1),
                    return_dict=False,
                )[0].flatten(0, 1)
                if i == 0 and self.precomputes_conditioning:  # after a call, so that the weights are there
                    timestep_embeds = transformer.embed_timesteps(self.scheduler.timesteps.to(device))

                index = predicted[:, :, None].expand(-1, -1, latents.shape[-1])
                if token_noise is None:
                    shape = (batch_size, predicted.shape[1], num_diffusion_steps + 1, latents.shape[-1])
                    noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                    noise = noise.permute(2, 0, 1, 3)
                else:
                    noise = token_noise.to(device, torch.float32).gather(
                        2, index.expand(num_diffusion_steps + 1, -1, -1, -1)
                    )
                step_scale = scale if is_guided else None
                tokens = self.make_tokens(conditions, timestep_embeds, step_scale, temperature, noise.flatten(1, 2))
                latents = latents.scatter(1, index, tokens.unflatten(0, (batch_size, -1)))
                num_unknown = remaining

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    num_known = transformer.num_tokens - num_unknown
                    callback_outputs = callback_on_step_end(self, i, num_known, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)

                progress_bar.update()

        # 4. Decode
        latents = transformer.unpatchify(latents)
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
