"""What training minimises: perceptual, adversarial, alignment, auxiliary, flow-matching and diffusion losses, and the
discriminators."""

from softvq_hf.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    LeCAMRegularizer,
    adaptive_weight,
    adversarial_weight,
    consistency_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_generator_loss,
    vanilla_discriminator_loss,
)
from softvq_hf.losses.alignment import ALIGNMENT_MODES, AlignmentLoss, FrozenTeacher, load_teacher
from softvq_hf.losses.augmentation import STRONG_AUGMENTATION, WEAK_AUGMENTATION, differentiable_augmentation
from softvq_hf.losses.auxiliary import (
    AUXILIARY_LOSSES,
    HOG_CHANNELS,
    AuxiliaryDecoder,
    feature_loss,
    hog_loss,
    hog_targets,
)
from softvq_hf.losses.diffusion import diffusion_loss, token_diffusion_loss
from softvq_hf.losses.discriminator_dino import DINODiscriminator
from softvq_hf.losses.discriminators import (
    DISCRIMINATORS,
    MaskBitDiscriminator,
    PatchGANDiscriminator,
    build_discriminator,
    frozen_discriminator,
)
from softvq_hf.losses.flow_matching import flow_matching_loss, lognormal_times, sample_flow_times
from softvq_hf.losses.perceptual import PerceptualLoss, PerceptualWeightsUnavailable, warmup_weight
from softvq_hf.schedulers.scheduling_ddpm_temperature import exact_betas


__all__ = [
    "ADVERSARIAL_LOSSES",
    "ALIGNMENT_MODES",
    "AUXILIARY_LOSSES",
    "AlignmentLoss",
    "AuxiliaryDecoder",
    "DINODiscriminator",
    "DISCRIMINATORS",
    "FrozenTeacher",
    "HOG_CHANNELS",
    "LeCAMRegularizer",
    "MaskBitDiscriminator",
    "PatchGANDiscriminator",
    "PerceptualLoss",
    "PerceptualWeightsUnavailable",
    "STRONG_AUGMENTATION",
    "WEAK_AUGMENTATION",
    "adaptive_weight",
    "adversarial_weight",
    "build_discriminator",
    "consistency_loss",
    "differentiable_augmentation",
    "diffusion_loss",
    "exact_betas",
    "feature_loss",
    "flow_matching_loss",
    "frozen_discriminator",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "hog_loss",
    "hog_targets",
    "load_teacher",
    "lognormal_times",
    "non_saturating_generator_loss",
    "sample_flow_times",
    "token_diffusion_loss",
    "vanilla_discriminator_loss",
    "warmup_weight",
]
