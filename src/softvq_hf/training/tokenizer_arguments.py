"""Arguments of `training/train_softvq.py`: the tokenizer, what is trained of it, and the weights of its losses."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from softvq_hf.losses import ADVERSARIAL_LOSSES, ALIGNMENT_MODES, DISCRIMINATORS
from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.fine_tuning import TUNING_METHODS


@dataclass(kw_only=True)
class SoftVQTrainingArguments(TrainingArguments):
    """Arguments of a tokenizer's training besides the common ones. A loss with weight 0 is not computed."""

    # tokenizer
    model: dict | str | None = field(
        default=None, metadata={"help": "Configuration of a new AutoencoderSoftVQ: a mapping in YAML, JSON here."}
    )
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer to go on from, instead of --model: a folder or a Hub id. Its positions are resampled"
            " where --resolution is another one than its own."
        },
    )
    encoder_init: str | None = field(
        default=None, metadata={"help": "DINOv2 (a folder or a Hub id) whose weights a new encoder starts from."}
    )
    encoder_tuning: str = field(
        default="full", metadata={"help": "What is trained of the encoder.", "choices": list(TUNING_METHODS)}
    )
    decoder_tuning: str = field(
        default="full", metadata={"help": "What is trained of the decoder.", "choices": list(TUNING_METHODS)}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters, with a tuning of lora."})

    # masked patches (MAETok), for a tokenizer with `encoder_mask_token`
    mask_ratio_min: float = field(default=0.0, metadata={"help": "Smallest share of masked patches of an image."})
    mask_ratio_max: float = field(default=0.0, metadata={"help": "Largest and most likely share; 0 masks nothing."})

    # losses: reconstruction and quantizer
    reconstruction_loss: str = field(default="l2", metadata={"help": "Distance of pixels.", "choices": ["l1", "l2"]})
    reconstruction_weight: float = field(default=1.0, metadata={"help": "Weight of the pixel distance."})
    entropy_weight: float = field(default=0.01, metadata={"help": "Weight of the codebook entropy (softvq, vq)."})
    vq_weight: float = field(default=1.0, metadata={"help": "Weight of the loss that moves codewords (vq)."})
    commit_weight: float = field(default=0.25, metadata={"help": "Weight of the commitment loss (vq)."})
    kl_weight: float = field(default=1e-6, metadata={"help": "Weight of the KL divergence (kl)."})

    # perceptual loss
    perceptual_weight: float | None = field(
        default=None, metadata={"help": "Weight of LPIPS-VGG; by default 0, which is off."}
    )
    perceptual_warmup_steps: int = field(default=0, metadata={"help": "Updates in which it grows from 0."})
    perceptual_dropout: bool = field(default=False, metadata={"help": "Dropout inside LPIPS, as published."})
    perceptual_trunk: str | None = field(
        default=None, metadata={"help": "File of torchvision's VGG16 weights; by default its cache or a download."}
    )

    # adversarial losses
    discriminator: str | None = field(
        default=None,
        metadata={"help": "Discriminator by name; by default none.", "choices": ["none", *DISCRIMINATORS]},
    )
    discriminator_backbone: str | None = field(
        default=None, metadata={"help": "Frozen ViT of the discriminator dino, by default facebook/dino-vits16."}
    )
    discr_learning_rate: float | None = field(default=None, metadata={"help": "By default --learning_rate."})
    adversarial_loss: str = field(
        default="hinge", metadata={"help": "GAN objective.", "choices": list(ADVERSARIAL_LOSSES)}
    )
    adversarial_weight: float = field(default=0.2, metadata={"help": "Weight of the adversarial losses."})
    adversarial_start: int = field(default=0, metadata={"help": "First update with adversarial losses."})
    adversarial_warmup_steps: int = field(
        default=0, metadata={"help": "Updates after the start in which their weight grows from 0."}
    )
    adaptive_adversarial_weight: bool = field(
        default=False, metadata={"help": "Scale by the ratio of gradient norms at the last layer (VQGAN)."}
    )
    lecam_weight: float = field(default=0.0, metadata={"help": "Weight of LeCAM regularisation; 0 = off."})
    consistency_weight: float = field(
        default=0.0, metadata={"help": "Weight of the discriminator's consistency under strong augmentation; 0 = off."}
    )
    augment_discriminator: bool = field(
        default=False, metadata={"help": "Weak differentiable augmentation of what the discriminator sees."}
    )

    # alignment to a vision model
    alignment_teacher: str | None = field(
        default=None, metadata={"help": "Frozen vision model of transformers the latents are aligned to."}
    )
    alignment_weight: float | None = field(
        default=None, metadata={"help": "Weight of the alignment loss, by default 0.1 with a teacher; 0 = off."}
    )
    alignment_mode: str = field(
        default="repeat", metadata={"help": "How latents meet teacher tokens.", "choices": list(ALIGNMENT_MODES)}
    )
    alignment_hidden_size: int = field(default=1024, metadata={"help": "Width of the projection to the teacher."})
    alignment_patch_size: int | None = field(
        default=None, metadata={"help": "Patch size the teacher is resampled to; by default its own."}
    )

    # auxiliary decoders (MAETok)
    auxiliary_hog_weight: float = field(
        default=0.0, metadata={"help": "Weight of predicting histograms of oriented gradients; 0 = off."}
    )
    auxiliary_dinov2_weight: float = field(
        default=0.0, metadata={"help": "Weight of predicting the features of a DINOv2; 0 = off."}
    )
    auxiliary_dinov2_teacher: str = field(default="facebook/dinov2-large", metadata={"help": "That DINOv2."})
    auxiliary_clip_weight: float = field(
        default=0.0, metadata={"help": "Weight of predicting the features of a CLIP or SigLIP; 0 = off."}
    )
    auxiliary_clip_teacher: str = field(
        default="google/siglip-so400m-patch14-384", metadata={"help": "That CLIP or SigLIP."}
    )
    auxiliary_hidden_size: int = field(default=192, metadata={"help": "Width of the auxiliary decoders."})
    auxiliary_num_layers: int = field(default=3, metadata={"help": "Blocks of the auxiliary decoders."})
    auxiliary_masked_only: bool = field(
        default=False, metadata={"help": "Take the auxiliary losses from masked patches only."}
    )

    channels_last: bool = field(
        default=False, metadata={"help": "Channels-last memory in convolutional networks: faster on GPUs."}
    )

    # validation
    validation_split: str = field(default="validation", metadata={"help": "Split that validation measures."})
    max_validation_samples: int | None = field(default=1000, metadata={"help": "Images PSNR is measured on."})
    num_validation_images: int = field(default=8, metadata={"help": "Images in the picture of reconstructions."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_source is None:
            raise ValueError("Neither `--dataset_name` nor `--train_data_dir` is given, one of them is needed.")
        if (self.model is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                f"`--model` is {self.model!r} and `--pretrained_model_name_or_path` is"
                f" {self.pretrained_model_name_or_path!r}, allowed: exactly one of them."
            )
        if self.encoder_init is not None and self.pretrained_model_name_or_path is not None:
            raise ValueError("`--encoder_init` starts a new tokenizer, `--pretrained_model_name_or_path` has weights.")
        self._check_ranges()
        self._check_losses()
        self._check_tuning()

    def _check_ranges(self) -> None:
        for name, value in vars(self).items():
            is_weight = name.endswith("_weight") and not isinstance(value, bool) and value is not None
            if is_weight and not 0 <= value < math.inf:
                raise ValueError(f"`--{name}` is {value}, allowed: finite numbers from 0 on.")
        if self.discr_learning_rate is not None and not 0 < self.discr_learning_rate < math.inf:
            raise ValueError(
                f"`--discr_learning_rate` is {self.discr_learning_rate}, allowed: finite numbers above 0, or leave it"
                " out."
            )
        for name in ("perceptual_warmup_steps", "adversarial_start", "adversarial_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 0 on.")
        for name in (
            *("lora_rank", "alignment_hidden_size", "auxiliary_hidden_size", "auxiliary_num_layers"),
            *("alignment_patch_size", "max_validation_samples", "num_validation_images"),
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if self.auxiliary_hidden_size % 64 != 0:
            raise ValueError(f"`--auxiliary_hidden_size` is {self.auxiliary_hidden_size}, allowed: multiples of 64.")
        if not 0 <= self.mask_ratio_min <= self.mask_ratio_max <= 1:
            raise ValueError(
                f"`--mask_ratio_min` is {self.mask_ratio_min} and `--mask_ratio_max` is {self.mask_ratio_max},"
                " allowed: 0 <= min <= max <= 1."
            )

    def _check_tuning(self) -> None:
        tuning = (self.encoder_tuning, self.decoder_tuning)
        if tuning == ("frozen", "frozen"):
            raise ValueError("`--encoder_tuning` and `--decoder_tuning` are both frozen: nothing is left to train.")
        if tuning != ("full", "full") and self.pretrained_model_name_or_path is None:
            raise ValueError(
                f"`--encoder_tuning` is {self.encoder_tuning} and `--decoder_tuning` is {self.decoder_tuning}, allowed"
                " for a new tokenizer: full. `--pretrained_model_name_or_path` names a trained one."
            )
        if self.encoder_tuning == "frozen":  # nothing moves the latents then
            for name in (
                *("mask_ratio_max", "alignment_weight"),
                *("auxiliary_hog_weight", "auxiliary_dinov2_weight", "auxiliary_clip_weight"),
            ):
                if getattr(self, name):
                    raise ValueError(
                        f"`--{name}` is {getattr(self, name)}, allowed with `--encoder_tuning frozen`: 0, for it is"
                        " there to shape the latents."
                    )
        if self.adaptive_adversarial_weight and self.decoder_tuning != "full":
            raise ValueError(
                f"`--adaptive_adversarial_weight` needs gradients at the decoder's last layer, `--decoder_tuning` is"
                f" {self.decoder_tuning!r}: allowed is full."
            )

    def _check_losses(self) -> None:
        # What is switched off explicitly may keep its settings, as in a recipe; what was never chosen has none.
        if self.discriminator is None:
            self._refuse(
                "--discriminator",
                *("lecam_weight", "consistency_weight", "augment_discriminator", "adaptive_adversarial_weight"),
                *("adversarial_start", "adversarial_warmup_steps", "discr_learning_rate"),
            )
            self.discriminator = "none"
        if self.perceptual_weight is None:
            self._refuse("--perceptual_weight", "perceptual_dropout", "perceptual_warmup_steps", "perceptual_trunk")
            self.perceptual_weight = 0.0
        if self.perceptual_trunk is not None and not Path(self.perceptual_trunk).is_file():
            raise ValueError(f"`--perceptual_trunk` is {self.perceptual_trunk!r}, allowed: a file that exists.")
        if self.discriminator_backbone is not None and self.discriminator != "dino":
            raise ValueError(
                f"`--discriminator_backbone` is {self.discriminator_backbone!r}, which only `--discriminator dino`"
                f" has; `--discriminator` is {self.discriminator!r}."
            )
        if self.alignment_teacher is None and (self.alignment_weight or self.alignment_patch_size is not None):
            raise ValueError(
                f"`--alignment_weight` is {self.alignment_weight} and `--alignment_patch_size` is"
                f" {self.alignment_patch_size}, but `--alignment_teacher` is not given: name one, or leave them out."
            )
        if self.alignment_weight is None:
            self.alignment_weight = 0.1 if self.alignment_teacher is not None else 0.0
        if self.auxiliary_masked_only and self.mask_ratio_max == 0:
            raise ValueError("`--auxiliary_masked_only` needs masked patches, `--mask_ratio_max` is 0.")

    def _refuse(self, missing: str, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ValueError(f"`--{name}` is {getattr(self, name)}, but `{missing}` is not given.")

    def check_length(self, max_train_steps: int) -> None:
        super().check_length(max_train_steps)
        if self.discriminator != "none" and self.adversarial_start > max_train_steps:
            raise ValueError(
                f"`--adversarial_start` is {self.adversarial_start}, allowed: up to the last update,"
                f" {max_train_steps}; `--discriminator none` trains without one."
            )
