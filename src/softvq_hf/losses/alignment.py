"""Alignment of a tokenizer's latents to the patch tokens of a frozen vision model, after REPA (arXiv 2410.06940), as
SoftVQ-VAE (arXiv 2412.10958) trains with. The teacher and the projection stay outside the tokenizer."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel


ALIGNMENT_MODES = ("global", "avg_1d", "avg_1d_shuffle", "repeat")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Models whose last hidden state is normalised and holds the class token (and register tokens), then the patches.
TEACHER_MODEL_TYPES = ("dinov2", "dinov2_with_registers")


class AlignmentLoss(nn.Module):
    """Negative cosine similarity between projected latents and a teacher's patch tokens.

    Holds the trainable projection, Linear-SiLU-Linear-SiLU-Linear, whose parameters belong to the tokenizer's
    optimizer; the teacher's tokens are an input ([`load_teacher`]). The modes differ in what meets what:

    - "global": the projected mean of all latents and the mean of all teacher tokens;
    - "avg_1d": each projected latent and the average of its share of the teacher tokens in raster order;
    - "avg_1d_shuffle": the same after one random permutation of the teacher tokens, drawn anew for every call;
    - "repeat" (published models): each projected latent and each of the N / L teacher tokens of its raster-order run.

    Args:
        latent_channels (`int`): Channels C of the latents.
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
                Raw latents; gradients flow into them and into the projection.
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
                teacher_tokens = teacher_tokens[:, permutation.to(teacher_tokens.device)]
            target = F.adaptive_avg_pool1d(teacher_tokens.transpose(1, 2), num_latent_tokens).transpose(1, 2)
        return -F.cosine_similarity(student.float(), target.float(), dim=-1).mean()


class FrozenTeacher(nn.Module):
    """A frozen vision transformer that turns images into patch tokens.

    Always in eval mode and without gradients. It is no part of the tokenizer: it is neither trained nor saved. Move it
    with `.to(device, dtype)`; any floating dtype will do.

    Args:
        model (`transformers.PreTrainedModel`): A vision model of a type in `TEACHER_MODEL_TYPES`, frozen in place.
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
        ValueError: If the model is of another type, or `resolution` is not a multiple of `patch_size`.
    """

    def __init__(self, model: PreTrainedModel, resolution: int, patch_size: int | None = None) -> None:
        super().__init__()
        _check_model_type(model.config)
        model_patch_size = model.config.patch_size
        patch_size = model_patch_size if patch_size is None else patch_size
        if patch_size < 1 or resolution < 1 or resolution % patch_size != 0:
            raise ValueError(
                f"`resolution` is {resolution}, allowed: multiples of the teacher's `patch_size`, {patch_size}; "
                "another `patch_size` can be chosen, 16 is that of the published tokenizers."
            )
        self.model = model
        self.resolution = resolution
        self.hidden_size = model.config.hidden_size
        self.num_tokens = (resolution // patch_size) ** 2
        self.model_resolution = resolution // patch_size * model_patch_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, R, R)` in [-1, 1] with the ImageNet mean removed and divided by its standard deviation, in
        the teacher's dtype and at the side length it is fed with."""
        if images.shape[2:] != (self.model_resolution, self.model_resolution):
            size = (self.model_resolution, self.model_resolution)
            images = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
        return ((images.to(self.mean.dtype) + 1) / 2 - self.mean) / self.std

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
        hidden_states = self.model(pixel_values=self.preprocess(images)).last_hidden_state
        return hidden_states[:, -self.num_tokens :]


def load_teacher(name_or_path: str, resolution: int, patch_size: int | None = None) -> FrozenTeacher:
    """Loads a frozen teacher for [`AlignmentLoss`].

    The published tokenizers are aligned to DINOv2-L, `load_teacher("facebook/dinov2-large", 256, patch_size=16)`.

    Args:
        name_or_path (`str`): A folder or Hub id of a transformers DINOv2 model, with or without registers.
        resolution (`int`): Side of the training images in pixels.
        patch_size (`int`, *optional*): Side of the piece of the image one token stands for, see [`FrozenTeacher`].

    Returns:
        [`FrozenTeacher`]: in float32, on the CPU.

    Raises:
        ValueError: If the model is of another type, or `resolution` is not a multiple of `patch_size`.
        OSError: If there is no such model, or it cannot be downloaded.
    """
    _check_model_type(AutoConfig.from_pretrained(name_or_path))
    return FrozenTeacher(AutoModel.from_pretrained(name_or_path, dtype=torch.float32), resolution, patch_size)


def _check_model_type(config) -> None:
    if config.model_type not in TEACHER_MODEL_TYPES:
        raise ValueError(
            f"the teacher is of model type {config.model_type!r}, allowed: {', '.join(TEACHER_MODEL_TYPES)}."
        )
