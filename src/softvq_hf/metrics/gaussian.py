"""Gaussians fitted to features: their running mean and covariance, and the Fréchet distance between two of them."""

from dataclasses import dataclass
from typing import Any

import torch


# Samples whose products are summed together.
BLOCK_SIZE = 512


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """
    Mean and covariance of a set of features.

    Args:
        count (`int` or `None`): Number of samples; `None` where a file of published statistics does not say.
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
    does not depend on how the samples are split, up to rounding of float64.

    Small batches wait until there are 512 samples or more, since a `(D, D)` product costs about as much for one sample
    as for many. Memory, whatever the number of samples: `8 * D * (D + 1)` bytes, 34 MB for the 2048 features of
    Inception, and `8 * D` for each of at most 511 samples that wait, 8 MB there. A pickle has none that wait.
    """

    def __init__(self) -> None:
        self.count = 0
        self.num_features: int | None = None  # D, or None before the first batch
        self._joined = 0  # how many samples the following two have; the others wait
        self._mean: torch.Tensor | None = None
        self._sum_of_products: torch.Tensor | None = None
        self._waiting: list[torch.Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        self._join_waiting()
        return self.__dict__

    @property
    def mean(self) -> torch.Tensor | None:
        """Mean of shape `(D,)`, float64, or `None` before the first batch."""
        self._join_waiting()
        return self._mean

    @property
    def sum_of_products(self) -> torch.Tensor | None:
        """Sum of the products of deviations from the mean, `(D, D)`, float64, or `None` before the first batch."""
        self._join_waiting()
        return self._sum_of_products

    def update(self, features: torch.Tensor) -> None:
        """
        Take in a batch.

        Args:
            features (`torch.Tensor` of shape `(B, D)`): Floating point, B from 1 on.

        Raises:
            ValueError: If `D` has changed.
        """
        self._check_num_features(features.shape[1])
        self._waiting.append(features.to("cpu", torch.float64, copy=True))
        self.count += len(features)
        if self.count - self._joined >= BLOCK_SIZE:
            self._join_waiting()

    def merge(self, other: "GaussianAccumulator") -> None:
        """Take in what another process has accumulated."""
        if other.count > 0:
            self._check_num_features(other.num_features)
            self._join_waiting()
            self._sum_of_products += other.sum_of_products
            self._join(other.count, other.mean)
            self.count += other.count

    def statistics(self) -> GaussianStatistics:
        """
        Mean and unbiased covariance of all features so far.

        Raises:
            ValueError: If there are fewer than two samples, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"The covariance is asked of {self.count} sample(s), allowed: 2 or more.")
        return GaussianStatistics(self.count, self.mean.clone(), self.sum_of_products / (self.count - 1))

    def _check_num_features(self, num_features: int) -> None:
        if self.num_features is None:
            self.num_features = num_features
            self._mean = torch.zeros(num_features, dtype=torch.float64)
            self._sum_of_products = torch.zeros(num_features, num_features, dtype=torch.float64)
        if num_features != self.num_features:
            raise ValueError(
                f"The features have {num_features} numbers, allowed after the earlier ones: {self.num_features}."
            )

    def _join_waiting(self) -> None:
        """Take the samples that wait into mean and sum of products."""
        if self._waiting:
            features = torch.cat(self._waiting)
            self._waiting = []
            mean = features.mean(0)
            features -= mean
            self._sum_of_products.addmm_(features.T, features)
            self._join(len(features), mean)

    def _join(self, count: int, mean: torch.Tensor) -> None:
        """Chan et al.: what the distance of the means of two parts adds to their sums of products, and its mean."""
        total = self._joined + count
        difference = mean - self._mean
        self._sum_of_products.addr_(difference, difference, alpha=self._joined * count / total)
        self._mean += difference * (count / total)
        self._joined = total


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
    lose less, but the roots of the covariances themselves have that error: in the order of 1e-8 of the traces remains.

    Args:
        first ([`GaussianStatistics`]): Either of the two; the distance is symmetric.
        second ([`GaussianStatistics`]): The other one, of as many features.

    Returns:
        `float`: From 0 on, in squared units of the features.

    Raises:
        ValueError: If the numbers of features differ, a covariance has a negative eigenvalue beyond rounding, or the
            numbers are so large that the distance is not finite.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"`first` has {len(first.mean)} features and `second` has {len(second.mean)}, allowed: the same number."
        )
    product_of_roots = _root(first.covariance).T @ _root(second.covariance)
    distance = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    if not (distance.isfinite() and product_of_roots.isfinite().all()):
        raise ValueError("The Fréchet distance is not finite: means or covariances are too large for float64.")
    distance -= 2 * torch.linalg.svdvals(product_of_roots).sum()
    return max(distance.item(), 0.0)  # a distance of 0 may be rounded to just below


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """`(D, D)` matrix R with `R @ R.T` equal to the `(D, D)` covariance."""
    eigenvalues, eigenvectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if eigenvalues[0] < -1e-4 * eigenvalues[-1].abs():
        raise ValueError(
            f"`covariance` has the eigenvalue {eigenvalues[0]:.4g} beside {eigenvalues[-1]:.4g}, allowed: 0 or more."
        )
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()
