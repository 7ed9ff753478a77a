"""What latents look like: location, spread and tails of every channel, and how many directions they fill."""

import math
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
import torch

from softvq_hf.metrics.batches import check_batch, not_finite
from softvq_hf.metrics.gaussian import GaussianAccumulator
from softvq_hf.metrics.streaming import StreamingMetric


_DESCRIPTION = """
Mean, standard deviation and kurtosis of latents by channel, and the effective rank of channels and of whole latents.
"""
_CITATION = """
@inproceedings{roy2007effective,
    title = {The effective rank: A measure of effective dimensionality},
    author = {Roy, Olivier and Vetterli, Martin},
    booktitle = {European Signal Processing Conference},
    year = {2007}
}
"""
_INPUTS = """
Args:
    predictions: `(B, L, C)` latents, floating point.
Returns:
    latent_mean (`float`), latent_std (`float`): Of all numbers.
    latent_channel_mean, latent_channel_std, latent_channel_kurtosis (`list[float]`): By channel; 3 is the kurtosis of
        a normal distribution.
    latent_kurtosis (`float`): Mean over the channels that vary.
    effective_rank (`float`): Of the channels over all tokens, from 1 to C.
    effective_rank_flat (`float`): Of whole latents, with `flat`.
    num_tokens (`int`): Number of tokens.
"""


def effective_rank(vectors: GaussianAccumulator) -> float:
    """
    In how many directions vectors spread: the exponential of the entropy of the normalised singular values of the
    centred data matrix (Roy & Vetterli, "The effective rank", EUSIPCO 2007, definition 1). The singular values are the
    roots of the eigenvalues of its sum of products.

    Args:
        vectors ([`GaussianAccumulator`]): What is left of the vectors, of D numbers each.

    Returns:
        `float`: from 1 (all on a line) to the smaller one of D and the number of vectors less one; 0 where all vectors
        are the same, up to 1e-12 of their length.
    """
    singular_values = torch.linalg.eigvalsh(vectors.sum_of_products).clamp(min=0).sqrt()
    if singular_values.norm() <= 1e-12 * vectors.count**0.5 * vectors.mean.norm():
        return 0.0
    return torch.special.entr(singular_values / singular_values.sum()).sum().exp().item()


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class Moments:
    """
    Central moments of vectors, in float64. Parts are merged by the formulas of Pébay (Sandia report SAND2008-6212,
    section 3), which lose no digits where the mean is large beside the deviation.

    Args:
        count (`int`, *optional*, defaults to 0): How many vectors.
        mean (`torch.Tensor` of shape `(D,)`, *optional*): Their mean; without vectors this and the rest are scalars 0.
        squares (`torch.Tensor` of shape `(D,)`, *optional*): Sum of the squared differences from the mean; exactly 0
            where a component never varies.
        cubes (`torch.Tensor` of shape `(D,)`, *optional*), fourths (same shape, *optional*): The same of the third and
            fourth powers.
    """

    count: int = 0
    mean: torch.Tensor = field(default_factory=_zero)
    squares: torch.Tensor = field(default_factory=_zero)
    cubes: torch.Tensor = field(default_factory=_zero)
    fourths: torch.Tensor = field(default_factory=_zero)

    @classmethod
    def of(cls, vectors: torch.Tensor) -> "Moments":
        """Moments of the rows of a matrix `(N, D)`."""
        mean = vectors[0] + (vectors - vectors[0]).mean(0)
        deviations = vectors - mean
        return cls(len(vectors), mean, *(deviations.pow(power).sum(0) for power in (2, 3, 4)))

    def merge(self, other: "Moments") -> None:
        """Take in the vectors of `other`."""
        if other.count == 0:
            return
        a, b, n = self.count, other.count, self.count + other.count
        difference = other.mean - self.mean
        self.fourths = (
            self.fourths
            + other.fourths
            + difference**4 * (a * b * (a**2 - a * b + b**2) / n**3)
            + difference**2 * (a**2 * other.squares + b**2 * self.squares) * (6 / n**2)
            + difference * (a * other.cubes - b * self.cubes) * (4 / n)
        )
        self.cubes = (
            self.cubes
            + other.cubes
            + difference**3 * (a * b * (a - b) / n**2)
            + difference * (a * other.squares - b * self.squares) * (3 / n)
        )
        self.squares = self.squares + other.squares + difference**2 * (a * b / n)
        self.mean = self.mean + difference * (b / n)
        self.count = n


class LatentStatistics(StreamingMetric):
    """
    Moments of latents per channel, and the effective rank of their channels and of whole latents.

    Predictions are latents of shape `(B, L, C)`; 2-D latents `(B, C, H, W)` are added as `flatten(2).mT`. A channel
    has `B * L` numbers: tokens count as samples. Raw and normalised latents have the same kurtosis and effective
    ranks; mean and standard deviation are those of what was added.

    Results:

    - `latent_mean`, `latent_std`: of all numbers. All standard deviations are those of the population.
    - `latent_channel_mean`, `latent_channel_std`, `latent_channel_kurtosis`: a list of C numbers each. Kurtosis is the
        fourth central moment over the squared variance, 3 for a normal distribution (not the excess), at least 1. It
        is NaN for a channel that never varies.
    - `latent_kurtosis`: mean over the channels that vary.
    - `effective_rank`: of the channels over all tokens, from 1 to C, see [`effective_rank`]. Far below C, channels
        repeat each other.
    - `effective_rank_flat` (with `flat`): of whole latents, as vectors of `L * C` numbers, over images: at most the
        number of images less one, so that it is comparable at equal numbers of images only.
    - `num_tokens`: tokens that were added, those of all latents together.

    Memory: `(L * C)**2 * 8` bytes with `flat`, 33.5 MB for 64 tokens of 32 channels, and 8 MB for latents that wait to
    be taken in; without it `C**2 * 8`, and as much as a batch.

    Args:
        flat (`bool`, *optional*, defaults to `True`): Whether to measure `effective_rank_flat`.
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: On adding, if latents are not floating point, not finite, or of another shape than before, or there
            are references; on computing, if nothing was added, or their fourth powers are beyond
            float64.
    """

    def __init__(self, flat: bool = True, **kwargs: Any) -> None:
        self.flat = flat
        self.latent_shape: tuple[int, int] | None = None
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(predictions=datasets.Array2D((None, None), "float32")),
        )

    def new_accumulators(self) -> dict[str, Moments | GaussianAccumulator]:
        accumulators = {"moments": Moments(), "tokens": GaussianAccumulator()}
        return {**accumulators, "latents": GaussianAccumulator()} if self.flat else accumulators

    def update(self, predictions: Any, references: Any) -> None:
        if references is not None:
            raise ValueError("`references` are given, allowed: predictions only.")
        latents = check_batch(predictions, "predictions", "(B, L, C)")
        if not latents.dtype.is_floating_point:
            raise ValueError(f"`predictions` has dtype {latents.dtype}, allowed: floating point.")
        broken = not_finite(latents)
        if broken:
            raise ValueError(f"`predictions` holds NaN or infinite numbers, in the latents {broken} of the batch.")
        if self.accumulators["moments"].count > 0 and self.latent_shape != latents.shape[1:]:
            raise ValueError(
                f"`predictions` holds latents of shape {tuple(latents.shape[1:])}, allowed: {self.latent_shape} as"
                " before."
            )
        self.latent_shape = tuple(latents.shape[1:])
        latents = latents.double()
        tokens = latents.flatten(0, 1)
        self.accumulators["moments"].merge(Moments.of(tokens))
        self.accumulators["tokens"].update(tokens)
        if self.flat:
            self.accumulators["latents"].update(latents.flatten(1))

    def result(self, accumulators: dict[str, Moments | GaussianAccumulator]) -> dict[str, Any]:
        channels = accumulators["moments"]
        if channels.count == 0:
            raise ValueError("No `predictions` were added, at least one latent is needed.")
        if not channels.fourths.isfinite().all():
            raise ValueError("The fourth moment of `predictions` is not finite: they are too large for float64.")
        variance = channels.squares / channels.count
        kurtosis = channels.fourths / channels.count / variance**2
        varying = kurtosis[variance > 0]
        figures = {
            "latent_mean": channels.mean.mean().item(),
            "latent_std": (variance.mean() + channels.mean.var(correction=0)).sqrt().item(),
            "latent_channel_mean": channels.mean.tolist(),
            "latent_channel_std": variance.sqrt().tolist(),
            "latent_channel_kurtosis": kurtosis.tolist(),
            "latent_kurtosis": varying.mean().item() if len(varying) > 0 else math.nan,
            "effective_rank": effective_rank(accumulators["tokens"]),
            "num_tokens": channels.count,
        }
        if self.flat:
            figures["effective_rank_flat"] = effective_rank(accumulators["latents"])
        return figures
