"""Auxiliary decoders of MAETok (arXiv 2502.03444, section 3): while the encoder sees masked patches, tiny decoders
predict features of the whole image from the latents, which keeps the latents meaningful. They are used in training
only and are saved with no tokenizer.

Confirmed for the official training: the three targets with their losses, MoVQ decoders with a class token and mixed
rotary positions of base 10, a linear projection of the latents and a linear head of their own, and the average over
masked patches as an option. Unknown, and therefore a choice of this library: width and depth of the decoders, the
weights of the losses, and the details of the HOG (border, soft or hard bins, normalisation, order of the values). The
official third teacher is SigLIP-so400m; that other models of the CLIP family do as well is not confirmed either.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


# Channels of an attention head, as in all ViTs of the family.
HEAD_DIM = 64

HOG_ORIENTATIONS = 9
# per patch: orientations x colours x 2 x 2 cells
HOG_CHANNELS = HOG_ORIENTATIONS * 3 * 2 * 2


class AuxiliaryDecoder(nn.Module):
    """A small MoVQ decoder from latents to a vector for each patch of the image.

    Its parameters belong to the tokenizer's optimizer. It has the layers and the initial weights of an
    [`AutoencoderSoftVQ`] decoder: a projection of the latents (`post_quant_conv`), MoVQ blocks with a class token and
    mixed rotary positions of base 10, and a linear head.

    Args:
        latent_channels (`int`): Channels C of the latents.
        num_latent_tokens (`int`): Number of latent tokens L.
        grid_size (`tuple[int, int]`): Patches per column and per row of the image.
        target_channels (`int`):
            Length D of the vectors: [`HOG_CHANNELS`], or `teacher.hidden_size` of a [`FrozenTeacher`].
        hidden_size (`int`, defaults to 192): Width, a multiple of 64. The official one is not known; this is ViT-Ti's.
        num_layers (`int`, defaults to 3): Blocks. The official number is not known.

    Raises:
        ValueError: If a size is below 1, or `hidden_size` is no multiple of 64.
    """

    def __init__(
        self,
        latent_channels: int,
        num_latent_tokens: int,
        grid_size: tuple[int, int],
        target_channels: int,
        hidden_size: int = 192,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        for name, value in [
            ("latent_channels", latent_channels),
            ("num_latent_tokens", num_latent_tokens),
            ("grid_size", min(grid_size)),
            ("target_channels", target_channels),
            ("num_layers", num_layers),
        ]:
            if value < 1:
                raise ValueError(f"`{name}` is {value}, allowed: 1 or more.")
        if hidden_size < 1 or hidden_size % HEAD_DIM != 0:
            raise ValueError(f"`hidden_size` is {hidden_size}, allowed: multiples of {HEAD_DIM}, the width of a head.")
        self.grid_size = tuple(grid_size)
        # The target as an image with one pixel for each patch. Its autoencoder's encoder, a single block, is left out.
        autoencoder = AutoencoderSoftVQ(
            sample_size=self.grid_size,
            in_channels=target_channels,
            encoder_patch_size=1,
            decoder_patch_size=1,
            num_latent_tokens=num_latent_tokens,
            latent_channels=latent_channels,
            quantizer="none",
            encoder_hidden_size=HEAD_DIM,
            encoder_num_layers=1,
            encoder_num_attention_heads=1,
            decoder_hidden_size=hidden_size,
            decoder_num_layers=num_layers,
            decoder_num_attention_heads=hidden_size // HEAD_DIM,
            position_embedding_type="rope_mixed",
            rope_theta=10.0,
            decoder_type="movq",
            decoder_cls_token=True,
        )
        self.post_quant_conv = autoencoder.post_quant_conv
        self.decoder = autoencoder.decoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latent (`torch.Tensor` of shape `(B, L, C)`): Raw latents; gradients flow into them.

        Returns:
            `torch.Tensor`: predictions of shape `(B, N, target_channels)`, the patches in raster order.

        Raises:
            ValueError: If `latent` has another shape.
        """
        num_tokens = self.decoder.positions.latent_position_embedding.shape[1]
        channels = self.post_quant_conv.in_features
        if latent.ndim != 3 or latent.shape[1:] != (num_tokens, channels):
            raise ValueError(f"`latent` has shape {tuple(latent.shape)}, allowed: (B, {num_tokens}, {channels}).")
        prediction = self.decoder(self.post_quant_conv(latent), latent, self.grid_size)
        return prediction.flatten(2).transpose(1, 2)


@torch.no_grad()
def hog_targets(images: torch.Tensor, patch_size: int = 16) -> torch.Tensor:
    """
    Histograms of oriented gradients, the target of MaskFeat (arXiv 2112.09133, section 3.2).

    In each colour, central differences give a magnitude and an unsigned orientation for every pixel. A patch has 2 x 2
    cells; each of them sums the magnitudes into 9 equal bins from 0 to 180 degrees (bin 0 starts at a gradient along
    the rows, that is at vertical edges) and the 9 sums are divided by their l2 norm. A cell without gradients gives
    zeros. The image is continued by reflection, so no gradient points across its border. Scale and shift of the
    pixels, alike for all or per colour, do not matter.

    The number of values is that of the official training. Whether it also smooths its histograms, normalises over
    larger blocks, or orders the values in another way is not known.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
        patch_size (`int`, defaults to 16): Side of a patch in pixels, even; that of a cell is half of it.

    Returns:
        `torch.Tensor`: float32 of shape `(B, N, 108)` for the N patches in raster order, in [0, 1]. The values of a
        patch are ordered by colour, then orientation, then row of the cell, then column of the cell.

    Raises:
        ValueError: If `patch_size` is odd or below 2, or the images have another shape.
    """
    if patch_size < 2 or patch_size % 2 != 0:
        raise ValueError(f"`patch_size` is {patch_size}, allowed: even numbers from 2 on (a patch has 2 x 2 cells).")
    if images.ndim != 4 or images.shape[1] != 3 or any(side == 0 or side % patch_size for side in images.shape[2:]):
        raise ValueError(
            f"`images` has shape {tuple(images.shape)}, allowed: (B, 3, H, W), H and W multiples of `patch_size`"
            f" {patch_size}."
        )
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    gradient_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    gradient_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    magnitude = torch.hypot(gradient_x, gradient_y)
    angle = torch.atan2(gradient_y, gradient_x).remainder(math.pi)
    # an angle that rounds up to 180 degrees is 0
    orientation = (angle * (HOG_ORIENTATIONS / math.pi)).long() % HOG_ORIENTATIONS

    # bin by bin: little memory, and unlike a scatter the same sums in every run
    bins = [F.avg_pool2d(magnitude * (orientation == k), patch_size // 2) for k in range(HOG_ORIENTATIONS)]
    histograms = F.normalize(torch.stack(bins, dim=2), dim=2)
    return F.pixel_unshuffle(histograms.flatten(1, 2), 2).flatten(2).transpose(1, 2)


def hog_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean squared error between predicted histograms and [`hog_targets`].

    Args:
        prediction (`torch.Tensor` of shape `(B, N, 108)`): Output of an [`AuxiliaryDecoder`].
        target (`torch.Tensor` of the same shape): The histograms.
        mask (`torch.BoolTensor` of shape `(B, N)`, *optional*):
            The patches to average over, those that the encoder did not see; all by default. In distributed training
            each process takes its own mean: all images of a global batch have equally many masked patches
            (`sample_patch_mask`), so the mean of the means is that of the global batch.

    Returns:
        `torch.Tensor`: the unweighted loss, a float32 scalar; 0 where nothing is masked.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    _check_shapes(prediction, target, mask)
    return _mean_over_patches((prediction.float() - target.float()).square().mean(-1), mask)


def feature_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Minus the cosine similarity between predictions and the patch tokens of a [`FrozenTeacher`].

    Args:
        prediction (`torch.Tensor` of shape `(B, N, D)`): Output of an [`AuxiliaryDecoder`].
        target (`torch.Tensor` of the same shape): The teacher's tokens on the same grid of patches.
        mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): The patches to average over, as in [`hog_loss`].

    Returns:
        `torch.Tensor`: the unweighted loss in [-1, 1], a float32 scalar; 0 where nothing is masked.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    _check_shapes(prediction, target, mask)
    return _mean_over_patches(-F.cosine_similarity(prediction.float(), target.float(), dim=-1), mask)


# By target. The official teachers are DINOv2-L and SigLIP-so400m.
AUXILIARY_LOSSES = {"hog": hog_loss, "dinov2": feature_loss, "clip": feature_loss}


def _check_shapes(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> None:
    if prediction.ndim != 3:
        raise ValueError(f"`prediction` has shape {tuple(prediction.shape)}, allowed: (B, N, D).")
    if target.shape != prediction.shape:
        raise ValueError(f"`target` has shape {tuple(target.shape)}, allowed: {tuple(prediction.shape)}.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != prediction.shape[:2]):
        raise ValueError(
            f"`mask` has dtype {mask.dtype} and shape {tuple(mask.shape)}, allowed: torch.bool and"
            f" {tuple(prediction.shape[:2])}, an entry for each patch."
        )


def _mean_over_patches(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of `(B, N)` values, over the `True` entries of `mask` where there is one."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)
