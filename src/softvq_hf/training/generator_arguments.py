"""Arguments of `training/train_sit.py` and `training/train_mar.py`: latents, transformer, objective and samples."""

import math
from dataclasses import dataclass, field

from softvq_hf.losses import ALIGNMENT_MODES
from softvq_hf.training.arguments import TrainingArguments


# Arguments that belong to one objective, or depend on it, with their values; the first is taken if none is given.
OBJECTIVES = {
    "flow_matching": {
        "path_type": ("linear", "cosine"),
        "weighting": ("uniform", "lognormal"),
        "sampler": ("ode", "sde"),
    },
    "ddpm": {"beta_schedule": ("squaredcos_cap_v2", "linear"), "sampler": ("ddpm", "ddim")},
}


@dataclass(kw_only=True)
class GeneratorTrainingArguments(TrainingArguments):
    """Arguments of a generator's training besides the common ones: its latents, its size and its samples."""

    # latents
    latents_dir: str | None = field(default=None, metadata={"help": "Folder written by training/cache_latents.py."})

    # transformer
    model: dict | str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a new transformer: a mapping in YAML, JSON here. Tokens, channels and classes"
            " come from the latents where they are not given."
        },
    )
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pipeline (a folder or a Hub id) whose transformer to go on from."}
    )

    # samples: a grid with one row per class every --validation_steps
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the sampler in sample grids."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance in sample grids; 1 = off."})
    num_sample_classes: int = field(default=8, metadata={"help": "Classes in a sample grid, spread over all of them."})
    num_samples_per_class: int = field(default=4, metadata={"help": "Samples of each class in a grid."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                f"`--model` is {self.model!r} and `--pretrained_model_name_or_path` is"
                f" {self.pretrained_model_name_or_path!r}, allowed: exactly one of them."
            )
        for name in ("num_inference_steps", "num_sample_classes", "num_samples_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if self.latents_dir is not None:
            for name in ("streaming", "max_train_samples", "jpeg_draft", "fast_resize"):
                if getattr(self, name):
                    raise ValueError(
                        f"`--{name}` is {getattr(self, name)}, allowed with `--latents_dir`: leave it out, for it is"
                        " about images."
                    )
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"`--guidance_scale` is {self.guidance_scale}, allowed: finite numbers from 1 on.")


@dataclass(kw_only=True)
class SiTTrainingArguments(GeneratorTrainingArguments):
    """Arguments of the training of a SiT or DiT: images instead of cached latents, objective and sampler."""

    # images of --dataset_name or --train_data_dir, of which latents are made
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes, for a stream that has integer labels without names."}
    )
    vae: str | None = field(
        default=None, metadata={"help": "Tokenizer (a folder or a Hub id) that encodes the images; it stays frozen."}
    )

    # objective
    objective: str = field(
        default="flow_matching",
        metadata={
            "help": "Velocity of a flow (SiT), or noise of a DDPM chain (DiT).",
            "choices": [*OBJECTIVES],
        },
    )
    path_type: str | None = field(
        default=None, metadata={"help": "Flow matching: path between data and noise, linear (default) or cosine."}
    )
    weighting: str | None = field(
        default=None, metadata={"help": "Flow matching: density of the times, uniform (default) or lognormal."}
    )
    beta_schedule: str | None = field(
        default=None, metadata={"help": "DDPM: noise schedule, squaredcos_cap_v2 (cosine, default) or linear."}
    )

    # alignment of the hidden states to a vision model (REPA, arXiv 2410.06940)
    repa_teacher: str | None = field(
        default=None, metadata={"help": "Frozen vision model of transformers; needs images, not cached latents."}
    )
    repa_weight: float | None = field(
        default=None, metadata={"help": "Weight of the alignment, by default 0.5 with a teacher."}
    )
    repa_layer: int = field(default=8, metadata={"help": "Block, from 1, whose output is aligned."})
    repa_hidden_size: int = field(default=2048, metadata={"help": "Width of the projection to the teacher."})
    repa_mode: str = field(
        default="repeat", metadata={"help": "How tokens meet teacher tokens.", "choices": list(ALIGNMENT_MODES)}
    )
    repa_patch_size: int | None = field(
        default=None, metadata={"help": "Patch size the teacher is resampled to; by default its own."}
    )

    # samples
    sampler: str | None = field(
        default=None,
        metadata={
            "help": "Scheduler of the pipeline. Flow matching: ode (Euler, default) or sde (Euler-Maruyama)."
            " DDPM: ddpm (ancestral, default) or ddim (deterministic)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents_dir is not None and (self.data_source is not None or self.vae is not None):
            raise ValueError(
                f"`--latents_dir` is {self.latents_dir!r}, which brings images and tokenizer along: leave out"
                " `--dataset_name`, `--train_data_dir` and `--vae`."
            )
        if self.latents_dir is None and (self.data_source is None or self.vae is None):
            raise ValueError(
                "Latents are missing: give `--latents_dir`, or images (`--dataset_name` or `--train_data_dir`) and the"
                " tokenizer (`--vae`) that encodes them."
            )
        for name in ("path_type", "weighting", "beta_schedule", "sampler"):
            allowed = OBJECTIVES[self.objective].get(name, ())
            if getattr(self, name) is None:
                setattr(self, name, allowed[0] if allowed else None)
            elif getattr(self, name) not in allowed:
                raise ValueError(
                    f"`--{name}` is {getattr(self, name)!r}, allowed with `--objective {self.objective}`:"
                    f" {', '.join(allowed) or 'none'}."
                )
        if self.repa_teacher is not None and self.latents_dir is not None:
            raise ValueError(
                f"`--repa_teacher` is {self.repa_teacher!r}, whose features need images, and `--latents_dir` is"
                f" {self.latents_dir!r}, which holds none: train on images (`--dataset_name` or `--train_data_dir`,"
                " and `--vae`)."
            )
        for name in ("repa_weight", "repa_patch_size"):
            if self.repa_teacher is None and getattr(self, name) is not None:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, but `--repa_teacher` is not given.")
        if self.repa_weight is None and self.repa_teacher is not None:
            self.repa_weight = 0.5
        if self.repa_weight is not None and not 0 < self.repa_weight < math.inf:
            raise ValueError(f"`--repa_weight` is {self.repa_weight}, allowed: finite numbers above 0.")
        for name in ("repa_layer", "repa_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: integers from 1 on.")
        if self.objective == "ddpm" and self.num_inference_steps > 1000:
            raise ValueError(
                f"`--num_inference_steps` is {self.num_inference_steps}, allowed with `--objective ddpm`: up to 1000,"
                " the steps of its chain."
            )
        if self.latents_dir is not None and self.num_classes is not None:
            raise ValueError(
                f"`--num_classes` is {self.num_classes}, allowed with `--latents_dir`: leave it out, for it is about"
                " images."
            )


@dataclass(kw_only=True)
class MARTrainingArguments(GeneratorTrainingArguments):
    """Arguments of the training of a MAR: masks, the loss of single tokens, and samples."""

    # masks and loss
    mask_ratio_min: float = field(
        default=0.7,
        metadata={"help": "Smallest share of masked tokens; the share of a batch is normal about 1, cut to it and 1."},
    )
    diffusion_batch_mul: int = field(
        default=4, metadata={"help": "How many timesteps and noises each masked token gets in the loss."}
    )

    # samples
    num_diffusion_steps: int = field(default=100, metadata={"help": "Steps of the chain of each token in samples."})
    temperature: float = field(default=1.0, metadata={"help": "Factor of the noise of that chain in samples."})
    guidance_schedule: str = field(
        default="linear",
        metadata={"help": "Guidance as tokens become known in samples.", "choices": ["linear", "constant"]},
    )
    clip_sample_range: float | None = field(
        default=None,
        metadata={
            "help": "Keep the data that the chain predicts in samples within this many standard deviations, such as"
            " 6: early in training the first steps leave the range of numbers. Off by default, as published."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents_dir is None:
            raise ValueError("`--latents_dir` is missing, allowed: a folder written by training/cache_latents.py.")
        if self.data_source is not None:
            raise ValueError(
                f"`--latents_dir` is {self.latents_dir!r}, which brings images along: leave out `--dataset_name` and"
                " `--train_data_dir`."
            )
        if not 0 < self.mask_ratio_min <= 1:
            raise ValueError(f"`--mask_ratio_min` is {self.mask_ratio_min}, allowed: numbers above 0, up to 1.")
        for name, highest in {"diffusion_batch_mul": math.inf, "num_diffusion_steps": 1000}.items():
            if not 1 <= getattr(self, name) <= highest:
                allowed = "integers from 1 on" if highest == math.inf else f"integers from 1 to {highest}"
                raise ValueError(f"`--{name}` is {getattr(self, name)}, allowed: {allowed}.")
        for name in ("temperature", "clip_sample_range"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`--{name}` is {value}, allowed: finite numbers above 0.")
