"""Which path a flow-matching generator was trained on: nothing in an official checkpoint says it, its weights do."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from softvq_hf.data import collate_images, load_image_dataset
from softvq_hf.losses import flow_matching_loss
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.generator import encode_latents


PATH_TYPES = ("linear", "cosine")

# A difference counts from this many standard errors on, and these need some images.
STANDARD_ERRORS = 4
FEWEST_IMAGES = 8
TIMES_PER_IMAGE = 4


@torch.no_grad()
def encode_images(
    vae: AutoencoderSoftVQ | AutoencoderKL,
    images: str | Path,
    num_images: int,
    num_classes: int,
    resolution: int,
    batch_size: int = 16,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Normalised latents of centre crops, as a generator is trained on.

    Args:
        vae ([`AutoencoderSoftVQ`] or [`~diffusers.AutoencoderKL`]): The tokenizer; it stays where it is.
        images (`str` or `Path`): What [`load_image_dataset`] takes.
        num_images (`int`): At most so many images, spread over all of them.
        num_classes (`int`): Classes of the generator.
        resolution (`int`): Side of the square images in pixels.
        batch_size (`int`, *optional*, defaults to 16): Images per forward pass.

    Returns:
        `tuple`: latents of shape `(N, L, C)`, or `(N, C, H, W)` for a 2-D tokenizer, float32 on the CPU, and int64
        class ids of shape `(N,)`, or `None` if the images have no labels or another number of classes.

    Raises:
        ValueError: If the images cannot be loaded, there are too few, or the latents are far from unit variance.
    """
    options = {"resolution": resolution, "train": False, "max_samples": num_images}
    try:
        dataset = load_image_dataset(str(images), **options)
    except ValueError:  # no labels; whatever else is wrong, the second call says it
        dataset = load_image_dataset(str(images), label_column=None, **options)

    latents, class_labels = [], []
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate_images)
    for batch in tqdm(loader, desc="encode images", leave=False):
        if len(batch["image_id"]) == 0:  # none of them can be read
            continue
        pixel_values = batch["pixel_values"].to(vae.device)
        latents.append(encode_latents(vae, pixel_values).cpu())
        if dataset.num_classes == num_classes:
            class_labels.append(batch["class_labels"])

    count = sum(map(len, latents))
    if count < FEWEST_IMAGES:
        raise ValueError(
            f"`images` holds {count} readable images, allowed to detect the path: {FEWEST_IMAGES} or more."
        )
    latents = torch.cat(latents)
    std = latents.std().item()
    if not 0.3 < std < 3:
        raise ValueError(
            f"The latents of `images` have the standard deviation {std:.3g} after normalisation, expected: about"
            " 1, as in training. The config of the tokenizer has no `vq_mean` and `vq_std`, or wrong ones."
        )
    return latents, torch.cat(class_labels) if class_labels else None


@dataclass(frozen=True)
class PathDetection:
    """
    Which path a flow-matching model was trained on, and what says so.

    Attributes:
        path_type (`str`): "linear" or "cosine".
        errors (`dict[str, float]`): By path, the mean squared error of data and noise that the velocity implies.
        losses (`dict[str, float]`): By path, the mean flow-matching loss at the same noise-to-data ratios.
        standard_error (`float`): Of the difference of the two errors.
    """

    path_type: str
    errors: dict[str, float]
    losses: dict[str, float]
    standard_error: float

    def __str__(self) -> str:
        values = [f"{path} {self.errors[path]:.4f} (loss {self.losses[path]:.4f})" for path in PATH_TYPES]
        return f"error {', '.join(values)}, difference known to {self.standard_error:.4f}"

    def table(self) -> dict[str, str]:
        """Rows for a model card."""
        return {
            f"{path} path": f"denoising error {self.errors[path]:.4f}, flow-matching loss {self.losses[path]:.4f}"
            for path in PATH_TYPES
        }


@torch.no_grad()
def detect_path_type(
    transformer: DiTTransformer1DModel,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> PathDetection:
    r"""
    Find the path that a SiT was trained on, by how well it denoises under either.

    The flow-matching losses themselves must not be compared: their targets differ in size, and on the cosine path the
    loss may be the larger one even for a model that was trained on it. But at the same ratio q of noise to data both
    paths show the model the same noisy latents up to a factor, and the velocity implies an estimate of data and noise,

        x = (s' x_t - s v) / (a s' - a' s),    e = (a v - a' x_t) / (a s' - a' s).

    A trained model gives the best estimate there is on its own path, so the other path gives a worse one. The mean
    squared error of x and e together is the loss times (a^2 + s^2) / (a s' - a' s)^2. It is compared on a
    deterministic, stratified grid of angles atan(q), four for each latent, with the same noise.

    Args:
        transformer ([`DiTTransformer1DModel`]): The model, which predicts a velocity; it stays where it is.
        latents (`torch.Tensor` of shape `(N, L, C)`, or `(N, C, H, W)`): Normalised latents of images.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*): Class ids; by default the null class.
        batch_size (`int`, *optional*, defaults to 32): Latents per forward pass.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.

    Returns:
        [`PathDetection`]: the answer and both numbers.

    Raises:
        ValueError: If the two errors differ by less than four standard errors, the better one is no better than what
            can be told without a model, or there is neither a label nor a null class.
    """
    if class_labels is None:
        if transformer.config.class_dropout_prob == 0:
            raise ValueError(
                "The generator has no null class (`class_dropout_prob` is 0): the path can be detected only on images"
                f" in {transformer.config.num_classes} folders, one for each of its classes."
            )
        class_labels = torch.full((len(latents),), transformer.config.num_classes)
    device = transformer.device
    paths = {path_type: StochasticInterpolantScheduler(path_type=path_type) for path_type in PATH_TYPES}
    generator = torch.Generator().manual_seed(seed)
    offsets = (torch.arange(len(latents), dtype=torch.float64) + 0.5) / len(latents)
    losses = {path_type: torch.zeros(len(latents), TIMES_PER_IMAGE, dtype=torch.float64) for path_type in PATH_TYPES}
    errors = {path_type: torch.zeros_like(losses[path_type]) for path_type in PATH_TYPES}
    errors["none"] = torch.zeros_like(losses["linear"])

    transformer.eval()
    progress = tqdm(total=TIMES_PER_IMAGE * len(latents), desc="compare paths", leave=False)
    for stratum in range(TIMES_PER_IMAGE):
        angles = (stratum + offsets) / TIMES_PER_IMAGE * (math.pi / 2)
        noise = torch.randn(latents.shape, generator=generator)
        # a = cos and s = sin of the angle, or both divided by their sum; a s' - a' s is pi / 2, or 1
        times = {"cosine": angles / (math.pi / 2), "linear": angles.sin() / (angles.sin() + angles.cos())}
        weights = {
            "cosine": torch.full_like(angles, (math.pi / 2) ** -2),
            "linear": (1 - times["linear"]).square() + times["linear"].square(),
        }
        for start in range(0, len(latents), batch_size):
            batch = slice(start, start + batch_size)
            for path_type, scheduler in paths.items():
                losses[path_type][batch, stratum] = flow_matching_loss(
                    transformer,
                    scheduler,
                    latents[batch].to(device),
                    class_labels[batch].to(device),
                    times[path_type][batch].float().to(device),
                    noise[batch].to(device),
                ).cpu()
            progress.update(len(latents[batch]))
        for path_type in PATH_TYPES:
            errors[path_type][:, stratum] = losses[path_type][:, stratum] * weights[path_type]
        # for latents of which only their unit variance is known, the best velocity of the cosine path is 0
        velocity = paths["cosine"].get_velocity(latents, noise, times["cosine"] * 1000)
        errors["none"][:, stratum] = velocity.square().flatten(1).mean(1) * weights["cosine"]
    progress.close()

    # every latent gives one number; they are independent
    errors = {path_type: values.mean(1) for path_type, values in errors.items()}
    means = {path_type: errors[path_type].mean().item() for path_type in PATH_TYPES}
    path_type = min(means, key=means.get)
    standard_error = _standard_error(errors["cosine"] - errors["linear"])
    detection = PathDetection(
        path_type=path_type,
        errors=means,
        losses={path_type: values.mean().item() for path_type, values in losses.items()},
        standard_error=standard_error,
    )
    gain = errors["none"] - errors[path_type]
    if not gain.mean() > STANDARD_ERRORS * _standard_error(gain):
        raise ValueError(
            "The path cannot be detected: the model denoises these latents not measurably better than without a model"
            f" (error {errors['none'].mean():.4f}) on either path: {detection}. Do tokenizer and generator belong"
            " together? Give `path_type` if you know the path."
        )
    if not abs(means["cosine"] - means["linear"]) > STANDARD_ERRORS * standard_error:
        raise ValueError(
            f"The path cannot be detected: {detection}, and {STANDARD_ERRORS} times that is needed. Use more images,"
            " or give `path_type`."
        )
    return detection


def _standard_error(values: torch.Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()
