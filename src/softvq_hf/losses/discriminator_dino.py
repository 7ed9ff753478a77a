"""The discriminator of the published SoftVQ-VAE tokenizers (arXiv 2412.10958): a frozen DINO vision transformer
(arXiv 2104.14294) whose tokens are judged by small convolutional heads, after StyleGAN-T (arXiv 2301.09515)."""

import math
import os

import torch
import torch.nn.functional as F
from huggingface_hub.constants import HF_HUB_CACHE
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoConfig, ViTModel
from transformers.activations import ACT2FN


IMAGE_SIZE = 224
PATCH_SIZE = 16
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DINOHead(nn.Module):
    """Judges each token of one read-out of the backbone: a convolution over single tokens, one over neighbours in
    raster order (circular, with a residual connection), and one to a single channel, all spectrally normalised.

    Args:
        channels (`int`): Channels C of the tokens.
        kernel_size (`int`): Tokens that the middle convolution sees, odd.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv_in = spectral_norm(nn.Conv1d(channels, channels, 1), eps=1e-12)
        self.norm_in = nn.BatchNorm1d(channels, eps=1e-6)
        self.conv_mid = spectral_norm(
            nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular"), eps=1e-12
        )
        self.norm_mid = nn.BatchNorm1d(channels, eps=1e-6)
        self.conv_out = spectral_norm(nn.Conv1d(channels, 1, 1), eps=1e-12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `(B, N)` of tokens `(B, C, N)`."""
        hidden_states = F.leaky_relu(self.norm_in(self.conv_in(tokens)), 0.2)
        residual = hidden_states
        hidden_states = F.leaky_relu(self.norm_mid(self.conv_mid(hidden_states)), 0.2)
        hidden_states = (hidden_states + residual) / math.sqrt(2)
        return self.conv_out(hidden_states).squeeze(1)


class DINODiscriminator(nn.Module):
    """Frozen DINO ViT-S/16 with one trainable head for each of five read-outs (7.4 million trainable parameters).

    The read-outs are the backbone's tokens before its first block and after the blocks in `depths`, without final
    norm; the class token is added to every patch token. As in the official code the backbone has the tanh
    approximation of GELU, LayerNorms with eps 1e-6 and keys without bias, other than transformers' configuration of
    the same weights. Backbone and heads run in float32 under autocast too.

    Images are brought to 224x224 pixels: in train mode, if both sides are larger, a random crop (one for the batch)
    with probability 0.5; otherwise, and always in eval mode, resized, by area averaging if the height is above 224,
    else bicubically without antialiasing.

    The backbone is no part of `parameters()`, `state_dict()` or `modules()`: it is neither trained, saved, put into
    train mode, cast nor sharded. It moves to the device of the images in the forward pass.

    Args:
        backbone (`str`, `os.PathLike` or `transformers.ViTModel`, defaults to "facebook/dino-vits16"):
            A folder or Hub id, or the model itself, which is changed (see above) and frozen in place. Patch size 16
            and positions for 224x224 pixels are required.
        depths (`tuple[int, ...]`, defaults to `(2, 5, 8, 11)`):
            Backbone blocks, counted from 0, whose output is judged besides the input of the first block.
        kernel_size (`int`, defaults to 9): Tokens that the middle convolution of a head sees.

    Raises:
        ValueError: If the backbone is another kind of model, lacks weights, or an argument does not fit it.
        OSError: If the backbone is neither a folder nor in the cache, and cannot be downloaded.
    """

    def __init__(
        self,
        backbone: str | os.PathLike | ViTModel = "facebook/dino-vits16",
        depths: tuple[int, ...] = (2, 5, 8, 11),
        kernel_size: int = 9,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, ViTModel):
            backbone = _load_backbone(backbone)
        backbone = backbone.float().requires_grad_(False).eval()
        config = backbone.config
        positions = backbone.embeddings.position_embeddings.shape[1]
        if backbone.embeddings.patch_embeddings.projection.kernel_size != (PATCH_SIZE, PATCH_SIZE) or (
            positions != NUM_PATCHES + 1
        ):
            raise ValueError(
                f"`backbone` has patch size {config.patch_size} and {positions} positions, allowed: patch size "
                f"{PATCH_SIZE} and {NUM_PATCHES + 1} positions, those of {IMAGE_SIZE}x{IMAGE_SIZE} pixels."
            )
        if not depths or not all(0 <= depth < config.num_hidden_layers for depth in depths):
            raise ValueError(
                f"`depths` is {tuple(depths)}, allowed: one or more blocks of the backbone, 0 to "
                f"{config.num_hidden_layers - 1}."
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` is {kernel_size}, allowed: odd numbers from 1 on.")

        for layer in backbone.layers:
            layer.mlp.activation_fn = ACT2FN["gelu_pytorch_tanh"]
            layer.layernorm_before.eps = layer.layernorm_after.eps = 1e-6
            nn.init.zeros_(layer.attention.k_proj.bias)
        self._backbone = (backbone,)  # in a tuple it is no submodule
        self.depths = tuple(depths)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.heads = nn.ModuleList(DINOHead(config.hidden_size, kernel_size) for _ in (0, *depths))

    @property
    def backbone(self) -> ViTModel:
        """The frozen vision transformer."""
        return self._backbone[0]

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
            generator (`torch.Generator`, *optional*):
                Source of the crop in train mode, drawn on its device (CPU without one).

        Returns:
            `torch.Tensor`: logits of shape `(B, (len(depths) + 1) * 196)`, read-out by read-out in raster order.

        Raises:
            ValueError: If the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` has shape {tuple(images.shape)}, allowed: (B, 3, H, W).")
        if self.backbone.device != images.device:
            self.backbone.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            images = self.crop_or_resize((images.float() * 0.5 + 0.5 - self.mean) / self.std, generator)
            hidden_states = self.backbone(pixel_values=images, output_hidden_states=True).hidden_states
            logits = []
            for head, index in zip(self.heads, (0, *(depth + 1 for depth in self.depths)), strict=True):
                class_token, patches = hidden_states[index][:, :1], hidden_states[index][:, 1:]
                logits.append(head((patches + class_token).transpose(1, 2)))
        return torch.cat(logits, dim=1)

    def crop_or_resize(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images `(B, 3, H, W)` at 224x224 pixels, see the class."""
        height, width = images.shape[2:]
        if self.training and min(height, width) > IMAGE_SIZE:
            device = generator.device if generator is not None else "cpu"
            if torch.rand((), generator=generator, device=device) < 0.5:
                top = torch.randint(height - IMAGE_SIZE + 1, (), generator=generator, device=device).item()
                left = torch.randint(width - IMAGE_SIZE + 1, (), generator=generator, device=device).item()
                return images[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        mode = "area" if height > IMAGE_SIZE else "bicubic"
        return F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode=mode)


def _load_backbone(name_or_path: str | os.PathLike) -> ViTModel:
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "vit":
            raise ValueError(
                f"`backbone` is {os.fspath(name_or_path)!r} of model type {config.model_type!r}, allowed: 'vit'."
            )
        backbone, loading = ViTModel.from_pretrained(
            name_or_path, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise OSError(
            f"`backbone` is {os.fspath(name_or_path)!r}, which could not be loaded ({error}). Allowed: a folder with "
            "config.json and model.safetensors, or a Hub id that can be downloaded or is in the cache, "
            f"{HF_HUB_CACHE} (`hf download` on a machine with network fills it)."
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"`backbone` is {os.fspath(name_or_path)!r}, which lacks weights of a ViT: "
            f"{', '.join(sorted(loading['missing_keys']))}."
        )
    return backbone
