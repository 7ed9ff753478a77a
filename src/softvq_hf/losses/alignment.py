"""Alignment to the patch tokens of a frozen vision model (REPA, arXiv 2410.06940): of a tokenizer's latents, as
SoftVQ-VAE (arXiv 2412.10958) trains with, or of a generator's hidden states, as in REPA itself. The teacher and the
projection stay outside the model that is trained."""

import inspect
import os

import torch
import torch.nn.functional as F
from huggingface_hub.constants import HF_HUB_CACHE
from torch import nn
from transformers import AutoModel, PreTrainedModel

from softvq_hf.losses.draws import to_device


ALIGNMENT_MODES = ("global", "avg_1d", "avg_1d_shuffle", "repeat")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Vision models of the CLIP family apply their final norm to the class token only.
WITHOUT_FINAL_NORM = (
    "altclip_vision_model",
    "chinese_clip_vision_model",
    "clip_vision_model",
    "metaclip_2_vision_model",
)
# Models that fit their positions to any image without being asked to.
ANY_RESOLUTION = ("dinov2", "dinov2_with_registers", "dinov3_vit", "siglip2_vision_model")


class AlignmentLoss(nn.Module):
    """Negative cosine similarity between projected latents and a teacher's patch tokens.

    Holds the trainable projection, Linear-SiLU-Linear-SiLU-Linear, whose parameters belong to the optimizer of the
    model that is aligned; the teacher's tokens are an input ([`load_teacher`]). The modes differ in what meets what:

    - "global": the projected mean of all latents and the mean of all teacher tokens;
    - "avg_1d": each projected latent and the average of its share of the teacher tokens in raster order;
    - "avg_1d_shuffle": the same after one random permutation of the teacher tokens, drawn anew for every call;
    - "repeat" (published models): each projected latent and each of the N / L teacher tokens of its raster-order run.

    For a generator (REPA) the hidden states of one of its blocks take the place of the latents, with `hidden_dim=2048`
    in mode "repeat": for 2-D latents, which have as many tokens as the teacher, token by token as published; for 1-D
    latents as in the tokenizer's alignment. The published weight is 0.5, for the hidden states after block 8 and
    DINOv2-B; the published tokenizers have 0.1 and DINOv2-L.

    Args:
        latent_channels (`int`): Channels C of the latents (the width of the generator).
        teacher_dim (`int`): Channels D of the teacher's tokens (`teacher.hidden_size`).
        hidden_dim (`int`, defaults to 1024):
            Width of the projection. The published configuration sets 1024; the official default is 2048.
        mode (`str`, defaults to "repeat"): "global", "avg_1d", "avg_1d_shuffle" or "repeat".

    Raises:
        ValueError: If `mode` is unknown or a width is below 1.
    """

    def __init__(self, latent_channels: int, teacher_dim: int, hidden_dim: int = 1024, mode: str = "repeat") -> None:
        super().__init__()
        if mode not in ALIGNMENT_MODES:
            raise ValueError(f"`mode` is {mode!r}, allowed: {', '.join(ALIGNMENT_MODES)}.")
        for name, value in [
            ("latent_channels", latent_channels),
            ("teacher_dim", teacher_dim),
            ("hidden_dim", hidden_dim),
        ]:
            if value < 1:
                raise ValueError(f"`{name}` is {value}, allowed: 1 or more.")
        self.mode = mode
        self.projection = nn.Sequential(
            nn.Linear(latent_channels, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, teacher_dim),
        )

    def forward(
        self, latent: torch.Tensor, teacher_tokens: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """
        Args:
            latent (`torch.Tensor` of shape `(B, L, C)`):
                Raw latents, or hidden states; gradients flow into them and into the projection.
            teacher_tokens (`torch.Tensor` of shape `(B, N, D)`): Patch tokens in raster order.
            generator (`torch.Generator`, *optional*):
                Source of the permutation in mode "avg_1d_shuffle", drawn on its device (CPU without one).

        Returns:
            `torch.Tensor`: the unweighted loss in [-1, 1], a float32 scalar: minus the mean cosine similarity.

        Raises:
            ValueError: If a shape does not fit, or mode is "repeat" and N is not a multiple of L.
        """
        channels, teacher_dim = self.projection[0].in_features, self.projection[-1].out_features
        if latent.ndim != 3 or latent.shape[2] != channels:
            raise ValueError(f"`latent` has shape {tuple(latent.shape)}, allowed: (B, L, {channels}).")
        batch_size, num_latent_tokens, _ = latent.shape
        if teacher_tokens.ndim != 3 or teacher_tokens.shape[0] != batch_size or teacher_tokens.shape[2] != teacher_dim:
            raise ValueError(
                f"`teacher_tokens` has shape {tuple(teacher_tokens.shape)}, allowed: ({batch_size}, N, {teacher_dim})."
            )
        num_teacher_tokens = teacher_tokens.shape[1]

        if self.mode == "global":
            student = self.projection(latent.mean(1))
            target = teacher_tokens.mean(1)
        elif self.mode == "repeat":
            if num_teacher_tokens % num_latent_tokens != 0:
                raise ValueError(
                    f"`teacher_tokens` has {num_teacher_tokens} tokens, allowed in mode 'repeat': multiples of the "
                    f"{num_latent_tokens} tokens of `latent`."
                )
            student = self.projection(latent).repeat_interleave(num_teacher_tokens // num_latent_tokens, dim=1)
            target = teacher_tokens
        else:
            student = self.projection(latent)
            if self.mode == "avg_1d_shuffle":
                device = generator.device if generator is not None else "cpu"
                permutation = torch.randperm(num_teacher_tokens, generator=generator, device=device)
                teacher_tokens = teacher_tokens[:, to_device(permutation, teacher_tokens.device)]
            target = F.adaptive_avg_pool1d(teacher_tokens.transpose(1, 2), num_latent_tokens).transpose(1, 2)
        return -F.cosine_similarity(student.float(), target.float(), dim=-1).mean()


class FrozenTeacher(nn.Module):
    """A frozen vision transformer that turns images into patch tokens.

    Takes Dinov2, Dinov2WithRegisters, DINOv3, ViT, DeiT, SigLIP, SigLIP2 and CLIP vision models, and any other of
    transformers whose output has one token per patch, after a class token and register tokens if there are any. Tokens
    are those after the model's final norm; for CLIP, which leaves it out, it is applied here. All teachers are shown
    images with the ImageNet mean and standard deviation, as in the official code, whatever they were trained with.

    Always in eval mode and without gradients. It is no part of what is aligned: it is neither trained nor saved. Move
    it with `.to(device, dtype)`; any floating dtype will do. The model is run once here, on a black image.

    Args:
        model (`transformers.PreTrainedModel`): The vision model, frozen in place.
        resolution (`int`): Side of the square images in pixels.
        patch_size (`int`, *optional*):
            Side in pixels of the piece of the image that one token stands for, by default the model's own patch size.
            Where it is another, images are resized (bicubic, antialiased) so that the model's patches fall on this
            grid: for patch 14, images of 256 pixels and `patch_size=16` they are resized to 224 pixels, which gives
            16x16 tokens. The official code keeps the images and resamples the patch kernel instead. Positions are
            interpolated by the model.

    Attributes:
        hidden_size (`int`): Channels D of the tokens.
        num_tokens (`int`): Number N of tokens per image.

    Raises:
        ValueError: If the model has no patch tokens or cannot be told where they are, if `resolution` is not a
            multiple of `patch_size`, or not the model's own where its positions cannot be interpolated.
    """

    def __init__(self, model: PreTrainedModel, resolution: int, patch_size: int | None = None) -> None:
        super().__init__()
        config = model.config
        self.model_patch_size = _side(getattr(config, "patch_size", None))
        if self.model_patch_size is None or config.model_type == "vit_mae":  # vit_mae: shuffles and drops patches
            raise ValueError(
                f"the teacher is of model type {config.model_type!r}, allowed: vision models with a token for every "
                "square patch, such as dinov2, dinov2_with_registers, siglip_vision_model, clip_vision_model, vit."
            )
        patch_size = self.model_patch_size if patch_size is None else patch_size
        if patch_size < 1 or resolution < 1 or resolution % patch_size != 0:
            raise ValueError(
                f"`resolution` is {resolution}, allowed: multiples of the teacher's `patch_size`, {patch_size}; "
                "another `patch_size` can be chosen, 16 is that of the published tokenizers."
            )
        self.grid_size = resolution // patch_size
        self.model_resolution = self.grid_size * self.model_patch_size
        self.interpolate_positions = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        if not self.interpolate_positions and config.model_type not in ANY_RESOLUTION:
            native_resolution = _side(getattr(config, "image_size", None))
            if native_resolution not in (None, self.model_resolution):
                raise ValueError(
                    f"`resolution` is {resolution} with `patch_size` {patch_size}, allowed: "
                    f"{native_resolution // self.model_patch_size * patch_size}; positions of the model type "
                    f"{config.model_type!r} cannot be interpolated."
                )
        self.model = model
        self.resolution = resolution
        self.num_tokens = self.grid_size**2
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            constant = torch.tensor(values, device=model.device, dtype=model.dtype).view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)
        self.requires_grad_(False)
        self.train(False)

        images = torch.zeros(
            1, 3, self.model_resolution, self.model_resolution, device=model.device, dtype=model.dtype
        )
        with torch.no_grad():
            tokens = self.run_model(images)
        num_registers = getattr(config, "num_register_tokens", None) or 0
        prefix_lengths = [0, 1, 1 + num_registers]
        if config.model_type == "deit":
            prefix_lengths = [2]  # class and distillation token
        if tokens.ndim != 3 or tokens.shape[1] - self.num_tokens not in prefix_lengths:
            raise ValueError(
                f"the teacher, of model type {config.model_type!r}, gives an output of shape {tuple(tokens.shape)} "
                f"for {self.grid_size}x{self.grid_size} patches, allowed: (1, N, D) with N = {self.num_tokens} plus "
                f"{' or '.join(str(length) for length in sorted(set(prefix_lengths)))} tokens before the patches."
            )
        self.hidden_size = tokens.shape[2]

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def cast_linear_weights(self, dtype: torch.dtype) -> "FrozenTeacher":
        """
        Keep the weights of linear layers in `dtype`, for a teacher that is always called under autocast to it: tokens
        stay the same to the bit, autocast has nothing left to cast in every call, and the weights take half the space.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, R, R)` in [-1, 1] with the ImageNet mean removed and divided by its standard deviation, in
        the teacher's dtype and at the side length it is fed with."""
        if images.shape[2:] != (self.model_resolution, self.model_resolution):
            size = (self.model_resolution, self.model_resolution)
            images = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
        return ((images.to(self.mean.dtype) + 1) / 2 - self.mean) / self.std

    def run_model(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """All tokens of preprocessed images after the final norm: P before the patches, then N, `(B, P + N, D)`."""
        model_type = self.model.config.model_type
        if model_type == "siglip2_vision_model":
            return self.model(**self.patchify(pixel_values)).last_hidden_state
        options = {"interpolate_pos_encoding": True} if self.interpolate_positions else {}
        hidden_states = self.model(pixel_values=pixel_values, **options).last_hidden_state
        if model_type in WITHOUT_FINAL_NORM:
            hidden_states = self.model.post_layernorm(hidden_states)
        return hidden_states

    def patchify(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of SigLIP2: patches `(B, N, P * P * 3)`, each with rows, columns and channels in this order, a
        mask that takes all of them, and the shape of the grid."""
        batch_size, channels, *_ = pixel_values.shape
        side, patch = self.grid_size, self.model_patch_size
        patches = pixel_values.reshape(batch_size, channels, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        return {
            "pixel_values": patches.reshape(batch_size, side * side, patch * patch * channels),
            "pixel_attention_mask": torch.ones(batch_size, side * side, dtype=torch.long, device=pixel_values.device),
            "spatial_shapes": torch.full((batch_size, 2), side),  # read one by one, hence on the CPU
        }

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, resolution, resolution)`): Images in [-1, 1].

        Returns:
            `torch.Tensor`: patch tokens of shape `(B, num_tokens, hidden_size)` in raster order, after the model's
            final norm, without class and register tokens.

        Raises:
            ValueError: If the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(
                f"`images` has shape {tuple(images.shape)}, allowed: (B, 3, {self.resolution}, {self.resolution})."
            )
        return self.run_model(self.preprocess(images))[:, -self.num_tokens :]


def load_teacher(name_or_path: str | os.PathLike, resolution: int, patch_size: int | None = None) -> FrozenTeacher:
    """Loads a frozen teacher for [`AlignmentLoss`].

    The published tokenizers are aligned to DINOv2-L, `load_teacher("facebook/dinov2-large", 256, patch_size=16)`.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or Hub id of a vision model of transformers, or of an image-text model (CLIP, SigLIP), whose
            vision model is taken.
        resolution (`int`): Side of the training images in pixels.
        patch_size (`int`, *optional*): Side of the piece of the image one token stands for, see [`FrozenTeacher`].

    Returns:
        [`FrozenTeacher`]: in float32, on the CPU.

    Raises:
        ValueError:
            If weights are missing, or the model cannot be a teacher at this resolution, see [`FrozenTeacher`].
        OSError: If there is no such model, or it is not in the cache and cannot be downloaded.
    """
    try:
        model, loading = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise OSError(
            f"The teacher {os.fspath(name_or_path)!r} could not be loaded ({error}). Allowed: a folder with "
            "config.json and model.safetensors, or a Hub id that can be downloaded or is in the cache, "
            f"{HF_HUB_CACHE} (`hf download` on a machine with network fills it)."
        ) from error
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))  # not used here
    if missing:
        raise ValueError(f"The teacher {os.fspath(name_or_path)!r} lacks weights of its model: {', '.join(missing)}.")
    return FrozenTeacher(getattr(model, "vision_model", model), resolution, patch_size)


def _side(size: int | list[int] | tuple[int, ...] | None) -> int | None:
    """Side of a square of which configurations give one number or two; `None` for anything else."""
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None
