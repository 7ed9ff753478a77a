"""The mean of a number per sample, streamed."""

import torch


class MeanAccumulator:
    """
    Sum in float64 and count of a number per sample.

    Attributes:
        total (`float`): The sum.
        count (`int`): How many numbers it has.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, values: torch.Tensor) -> None:
        """Add `values` of shape `(B,)`."""
        self.total += values.double().sum().item()
        self.count += len(values)

    def merge(self, other: "MeanAccumulator") -> None:
        """Add what another accumulator has."""
        self.total += other.total
        self.count += other.count

    def mean(self) -> float:
        """
        The mean.

        Raises:
            ValueError: If nothing was added.
        """
        if self.count == 0:
            raise ValueError("No sample was added, allowed: one or more.")
        return self.total / self.count
