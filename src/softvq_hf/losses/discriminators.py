"""Discriminators of the tokenizers' adversarial training, registered by name in `DISCRIMINATORS`.

A discriminator is an `nn.Module` called as `discriminator(images, generator)`: images `(B, 3, H, W)` in [-1, 1] and an
optional `torch.Generator`, the source of what it draws in train mode (the crop of "dino"; the others draw nothing).
It returns logits of any shape, higher for real images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

from softvq_hf.losses.discriminator_dino import DINODiscriminator


class PatchGANDiscriminator(nn.Module):
    """PatchGAN: convolutions that judge overlapping patches (pix2pix, arXiv 1611.07004, appendix 6.1.2), with the
    weights' names and initialisation that VQGAN (arXiv 2012.09841) and its successors use.

    4x4 convolutions: one of stride 2, `num_layers - 1` of stride 2 and one of stride 1 with BatchNorm, one to a single
    channel. With 3 layers a logit sees 70x70 pixels and 256x256 images give 30x30 logits.

    Args:
        in_channels (`int`, defaults to 3): Channels of the images.
        hidden_channels (`int`, defaults to 64):
            Channels after the first convolution; they double with every layer, up to 8 times as many.
        num_layers (`int`, defaults to 3): Number of layers of stride 2.

    Raises:
        ValueError: If an argument is below 1.
    """

    def __init__(self, in_channels: int = 3, hidden_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        for name, value in [
            ("in_channels", in_channels),
            ("hidden_channels", hidden_channels),
            ("num_layers", num_layers),
        ]:
            if value < 1:
                raise ValueError(f"`{name}` is {value}, allowed: 1 or more.")
        self.in_channels = in_channels
        self.min_image_size = 3 * 2**num_layers
        layers = [nn.Conv2d(in_channels, hidden_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = hidden_channels
        for layer in range(1, num_layers + 1):
            out_channels = hidden_channels * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(channels, out_channels, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.LeakyReLU(0.2),
            ]
            channels = out_channels
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                Images in [-1, 1] with sides of at least `3 * 2**num_layers` pixels.
            generator (`torch.Generator`, *optional*): Not used, nothing is drawn.

        Returns:
            `torch.Tensor`: logits of shape `(B, 1, h, w)`, one per patch.

        Raises:
            ValueError: If the number of axes or channels is wrong or the images are too small for one logit.
        """
        _check_images(images, self.in_channels, self.min_image_size)
        return self.main(images)


class MaskBitDiscriminator(nn.Module):
    """The patch discriminator of MaskBit (arXiv 2409.16211), with the weights' names of the SoftVQ-VAE code.

    3x3 convolutions: `num_layers` of stride 2 and one of stride 1, all but the first behind GroupNorm, then max
    pooling and one to a single channel: with 3 layers 256x256 images give 16x16 logits. The logits of an image do not
    depend on the other images of the batch.

    Args:
        in_channels (`int`, defaults to 3): Channels of the images.
        hidden_channels (`int`, defaults to 64): Channels of the first two convolutions, a multiple of 32.
        num_layers (`int`, defaults to 3): Number of layers of stride 2; every further one doubles the channels.

    Raises:
        ValueError: If an argument is below 1 or `hidden_channels` is not a multiple of 32.
    """

    def __init__(self, in_channels: int = 3, hidden_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if hidden_channels < 1 or hidden_channels % 32 != 0:
            raise ValueError(f"`hidden_channels` is {hidden_channels}, allowed: multiples of 32.")
        if num_layers < 1:
            raise ValueError(f"`num_layers` is {num_layers}, allowed: 1 or more.")
        self.in_channels = in_channels
        self.min_image_size = 2 ** (num_layers + 1)
        layers = [nn.Conv2d(in_channels, hidden_channels, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = hidden_channels
        for layer in range(1, num_layers + 1):
            out_channels = hidden_channels * 2 ** (layer - 1)
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.GroupNorm(32, channels, eps=1e-6),
                nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1),
                nn.LeakyReLU(0.2),
            ]
            channels = out_channels
        self.main = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                Images in [-1, 1] with sides of at least `2**(num_layers + 1)` pixels.
            generator (`torch.Generator`, *optional*): Not used, nothing is drawn.

        Returns:
            `torch.Tensor`: logits of shape `(B, 1, h, w)`, one per patch.

        Raises:
            ValueError: If the number of axes or channels is wrong or the images are too small for one logit.
        """
        _check_images(images, self.in_channels, self.min_image_size)
        return self.main(images)


DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "dino": DINODiscriminator,
    "patchgan": PatchGANDiscriminator,
    "maskbit": MaskBitDiscriminator,
}


def build_discriminator(name: str, **config) -> nn.Module:
    """Builds a discriminator by its name in `DISCRIMINATORS`.

    Args:
        name (`str`):
            "dino" ([`DINODiscriminator`], of the published tokenizers), "patchgan" ([`PatchGANDiscriminator`]) or
            "maskbit" ([`MaskBitDiscriminator`]).
        config: Arguments of the class.

    Returns:
        `torch.nn.Module`: the new discriminator.

    Raises:
        ValueError: If there is no discriminator of that name.
    """
    if name not in DISCRIMINATORS:
        raise ValueError(f"`name` is {name!r}, allowed: {', '.join(DISCRIMINATORS)}.")
    return DISCRIMINATORS[name](**config)


@contextmanager
def frozen_discriminator(discriminator: nn.Module) -> Iterator[nn.Module]:
    """A forward pass of the discriminator inside the context leaves no trace in it, for the generator's step.

    Logits and gradients of the images are those of the discriminator's own step, but its parameters take no
    gradients, BatchNorm layers, which normalise with the statistics of the batch, leave their running statistics
    alone, and the vectors of spectral normalisation, which a pass in train mode moves before it uses them, are put
    back at the end. (In the official code both move.) Run the forward pass inside; the backward pass may follow
    outside. In distributed training pass the unwrapped discriminator, whose parameters then need no synchronisation.

    Example:
        ```python
        with frozen_discriminator(discriminator) as judge:
            generator_loss = hinge_generator_loss(judge(reconstruction, generator))
        ```
    """
    trainable = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    tracking = [m for m in discriminator.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    parametrizations = [m for m in discriminator.modules() if isinstance(m, ParametrizationList)]
    vectors = [(vector, vector.clone()) for module in parametrizations for vector in module.buffers()]
    for parameter in trainable:
        parameter.requires_grad_(False)
    for module in tracking:
        module.track_running_stats = False
    try:
        yield discriminator
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in tracking:
            module.track_running_stats = True
        for vector, value in vectors:
            vector.copy_(value)


def _check_images(images: torch.Tensor, channels: int, min_size: int) -> None:
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < min_size:
        raise ValueError(
            f"`images` has shape {tuple(images.shape)}, allowed: (B, {channels}, H, W) with sides of {min_size} "
            "pixels or more."
        )
