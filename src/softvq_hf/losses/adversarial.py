"""Adversarial losses of the tokenizers: the GAN objectives and the adaptive weight of VQGAN (arXiv 2012.09841) and the
LeCAM regularisation of the discriminator (arXiv 2104.03310), as SoftVQ-VAE (arXiv 2412.10958) uses them. Logits may
have any shape: the losses are means over all entries."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn

from softvq_hf.losses.perceptual import warmup_weight


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """`(mean relu(1 - real) + mean relu(1 + fake)) / 2`, a scalar (Geometric GAN, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """`-mean fake`, a scalar: the generator's side of the hinge loss, and of the vanilla loss in VQGAN."""
    return -fake_logits.mean()


def vanilla_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """`(mean softplus(-real) + mean softplus(fake)) / 2`, a scalar: half the cross-entropy of telling real from
    fake (GAN, arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def non_saturating_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """`mean softplus(-fake)`, a scalar: cross-entropy of calling the fakes real (GAN, arXiv 1406.2661, section 3).

    The official SoftVQ-VAE code passes logits and targets in the wrong order here, which makes its generator loss
    linear and its discriminator loss independent of the fakes; this is the loss as published.
    """
    return F.softplus(-fake_logits).mean()


class AdversarialLoss(NamedTuple):
    """The two sides of a GAN objective.

    Args:
        discriminator (`Callable`): `(real_logits, fake_logits) -> scalar`.
        generator (`Callable`): `(fake_logits) -> scalar`.
    """

    discriminator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    generator: Callable[[torch.Tensor], torch.Tensor]


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    "hinge": AdversarialLoss(hinge_discriminator_loss, hinge_generator_loss),
    "vanilla": AdversarialLoss(vanilla_discriminator_loss, hinge_generator_loss),
    "non_saturating": AdversarialLoss(vanilla_discriminator_loss, non_saturating_generator_loss),
}


def adversarial_weight(step: int, weight: float, start: int, warmup_steps: int = 0) -> float:
    """Weight of the adversarial losses: 0 before step `start`, from then on `weight`, at once or growing linearly.

    Args:
        step (`int`): Optimizer step, counted from 1.
        weight (`float`): Final weight.
        start (`int`): First step with adversarial losses.
        warmup_steps (`int`, defaults to 0):
            Number of steps of the rise: `weight / warmup_steps` at the first step with adversarial losses, `weight`
            from the `warmup_steps`-th on. The published recipe has none.

    Returns:
        `float`: the weight of this step.

    Raises:
        ValueError: If `warmup_steps` is negative.
    """
    if warmup_steps < 0:
        raise ValueError(f"`warmup_steps` is {warmup_steps}, allowed: 0 or more.")
    if step < start:
        return 0.0
    return warmup_weight(step - max(start, 1) + 1, weight, warmup_steps)


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    generator_loss: torch.Tensor,
    last_layer: nn.Parameter,
    max_weight: float = 1e4,
) -> torch.Tensor:
    """Factor that gives the adversarial loss a gradient as large as that of the reconstruction at the decoder's last
    layer (VQGAN, arXiv 2012.09841, equation 7): `|grad reconstruction| / (|grad generator| + 1e-4)`.

    Both graphs are kept for the backward pass that follows. In distributed training the gradients are averaged over
    the processes, so that all of them use the weight of the global batch.

    Args:
        reconstruction_loss (`torch.Tensor`): Scalar, pixel and perceptual losses with their weights.
        generator_loss (`torch.Tensor`): Scalar, the generator's side of the adversarial loss, unweighted.
        last_layer (`torch.nn.Parameter`): Weight of the decoder's last layer, `tokenizer.decoder.last_layer`.
        max_weight (`float`, defaults to 1e4): Upper limit of the result.

    Returns:
        `torch.Tensor`: a detached scalar in [0, `max_weight`].

    Raises:
        ValueError: If `last_layer` is frozen.
    """
    if not last_layer.requires_grad:
        raise ValueError("`last_layer` has requires_grad=False, allowed: a trainable parameter.")
    reconstruction_gradient = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0].detach()
    generator_gradient = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0].detach()
    reconstruction_norm = _mean_over_processes(reconstruction_gradient).norm()
    generator_norm = _mean_over_processes(generator_gradient).norm()
    return (reconstruction_norm / (generator_norm + 1e-4)).clamp(0.0, max_weight)


class LeCAMRegularizer(nn.Module):
    """LeCAM regularisation of the discriminator (arXiv 2104.03310, equation 6).

    Keeps exponential moving averages of the mean logit of real and of fake images, starting at 0, as buffers: the
    module belongs into the checkpoints of a run. In distributed training the
    averages follow the global batch and are the same on all processes (the official code keeps one pair per process),
    so every process must call the module.

    Args:
        decay (`float`, defaults to 0.999): Decay of the averages per call.

    Raises:
        ValueError: If `decay` is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` is {decay}, allowed: from 0 to below 1.")
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def forward(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Updates the averages with these logits, then returns the unweighted penalty. A mean that is not finite
        leaves its average alone.

        The official code updates from the first step of training on, also before the adversarial losses start.

        Args:
            real_logits (`torch.Tensor`): The discriminator's logits of real images.
            fake_logits (`torch.Tensor`): The discriminator's logits of reconstructions.

        Returns:
            `torch.Tensor`: the scalar `mean relu(real - ema_fake)^2 + mean relu(ema_real - fake)^2`.
        """
        means = torch.stack([real_logits.detach().float().mean(), fake_logits.detach().float().mean()])
        means = _mean_over_processes(means)
        means = torch.where(means.isfinite(), means, torch.stack([self.ema_real, self.ema_fake]))
        self.ema_real.lerp_(means[0], 1 - self.decay)
        self.ema_fake.lerp_(means[1], 1 - self.decay)
        real_excess = F.relu(real_logits - self.ema_fake)
        fake_excess = F.relu(self.ema_real - fake_logits)
        return real_excess.square().mean() + fake_excess.square().mean()


def consistency_loss(
    real_logits: torch.Tensor,
    fake_logits: torch.Tensor,
    augmented_real_logits: torch.Tensor,
    augmented_fake_logits: torch.Tensor,
) -> torch.Tensor:
    """Consistency regularisation of the discriminator (arXiv 1910.12027): mean squared difference between its logits
    of images and of the same images strongly augmented, over real and fake. Gradients flow through both sides."""
    logits = torch.cat([real_logits, fake_logits])
    augmented_logits = torch.cat([augmented_real_logits, augmented_fake_logits])
    return F.mse_loss(logits, augmented_logits)


def _mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor without gradient over the processes of a distributed run; the tensor itself elsewhere."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
