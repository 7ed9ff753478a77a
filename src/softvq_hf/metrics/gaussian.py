"""Gaussians fitted to features: their running mean and covariance, and the Fréchet distance between two of them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """
    Mean and covariance of a set of features.

    Args:
        count (`int`, *optional*): Number of samples; `None` where a file of published statistics does not say.
        mean (`torch.Tensor` of shape `(D,)`): Kept as float64 on the CPU.
        covariance (`torch.Tensor` of shape `(D, D)`):
            Unbiased, that is divided by `count - 1`. Kept as float64 on the CPU.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or `covariance` is not symmetric or has a negative
            variance.
    """

    count: int | None
    mean: torch.Tensor
    covariance: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).to("cpu", torch.float64))
        if self.mean.ndim != 1 or len(self.mean) == 0:
            raise ValueError(f"`mean` has shape {tuple(self.mean.shape)}, allowed: (D,), D from 1 on.")
        if self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"`covariance` has shape {tuple(self.covariance.shape)}, allowed with {len(self.mean)} means: "
                f"({len(self.mean)}, {len(self.mean)})."
            )
        for name in ("mean", "covariance"):
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"`{name}` holds values that are not finite (NaN or infinite).")
        largest = self.covariance.abs().max()
        asymmetry = (self.covariance - self.covariance.T).abs().max()
        if asymmetry > 1e-4 * largest:
            raise ValueError(f"`covariance` differs from its transpose by up to {asymmetry:.4g}, allowed: symmetric.")
        if self.covariance.diagonal().min() < -1e-4 * largest:
            raise ValueError(
                f"`covariance` holds the variance {self.covariance.diagonal().min():.4g}, allowed: 0 or more."
            )


class GaussianAccumulator:
    """
    Running mean and covariance of features in float64 on the CPU.

    Deviations from the mean are summed, not raw squares, and two sets are joined by the pairwise formulas of Chan,
    Golub and LeVeque (1979, "Updating formulae and a pairwise algorithm for computing sample variances"): the result
    does not depend on how the samples are split, up to rounding of float64. Memory: `8 * D * (D + 1)` bytes, 34 MB for
    the 2048 features of Inception, whatever the number of samples.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: torch.Tensor | None = None
        self.sum_of_products: torch.Tensor | None = None  # of deviations from the mean, (D, D)

    @property
    def num_features(self) -> int | None:
        """`D`, or `None` before the first batch."""
        return None if self.mean is None else len(self.mean)

    def update(self, features: torch.Tensor) -> None:
        """Take in `(B, D)` floating point features, B from 1 on."""
        features = features.to("cpu", torch.float64)
        mean = features.mean(0)
        deviations = features - mean
        self._join(len(features), mean, deviations.T @ deviations)

    def merge(self, other: "GaussianAccumulator") -> None:
        """Take in what another process has accumulated."""
        if other.count > 0:
            self._join(other.count, other.mean, other.sum_of_products)

    def statistics(self) -> GaussianStatistics:
        """
        Mean and unbiased covariance of all features so far.

        Raises:
            ValueError: If there are fewer than two samples, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"The covariance is asked of {self.count} sample(s), allowed: 2 or more.")
        return GaussianStatistics(self.count, self.mean.clone(), self.sum_of_products / (self.count - 1))

    def _join(self, count: int, mean: torch.Tensor, sum_of_products: torch.Tensor) -> None:
        """Chan et al.: the sum of products of a union, from those of two parts and the distance of their means."""
        if self.count == 0:
            self.count, self.mean, self.sum_of_products = count, mean.clone(), sum_of_products.clone()
            return
        if len(mean) != len(self.mean):
            raise ValueError(
                f"The features have {len(mean)} numbers, allowed after the earlier ones: {len(self.mean)}."
            )
        total = self.count + count
        difference = mean - self.mean
        self.sum_of_products += sum_of_products
        self.sum_of_products.addr_(difference, difference, alpha=self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """
    The (squared) Fréchet distance of two Gaussians, `|mu1 - mu2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2))`: Dowson and
    Landau (1982); for images Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium", arXiv 1706.08500, equation 6.

    The trace of the root is the sum of the singular values of `S1^(1/2) S2^(1/2)`, here in float64.
    torch-fidelity and torchmetrics take square roots of the eigenvalues of `S1 S2`, others scipy's
    `sqrtm` of it. Both agree with this where the covariances are regular. Where they are singular (fewer samples than
    features), rounding errors of 1e-16 become 1e-8 under the root in every direction without variance: the distance of
    a set from itself comes out below zero, and the last digits depend on the order of the samples. Singular values
    have no such error.

    Args:
        first ([`GaussianStatistics`]): Either of the two; the distance is symmetric.
        second ([`GaussianStatistics`]): The other one, of as many features.

    Returns:
        `float`: From 0 on, in squared units of the features.

    Raises:
        ValueError: If the numbers of features differ, or a covariance has a negative eigenvalue beyond rounding.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"`first` has {len(first.mean)} features and `second` has {len(second.mean)}, allowed: the same number."
        )
    trace_of_root = torch.linalg.svdvals(_root(first.covariance).T @ _root(second.covariance)).sum()
    distance = (
        (first.mean - second.mean).square().sum()
        + first.covariance.trace()
        + second.covariance.trace()
        - 2 * trace_of_root
    )
    return max(distance.item(), 0.0)  # a distance of 0 may be rounded to just below


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """`(D, D)` matrix R with `R @ R.T` equal to the `(D, D)` covariance."""
    eigenvalues, eigenvectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if eigenvalues[0] < -1e-4 * eigenvalues[-1].abs():
        raise ValueError(
            f"`covariance` has the eigenvalue {eigenvalues[0]:.4g} beside {eigenvalues[-1]:.4g}, allowed: 0 or more."
        )
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()
