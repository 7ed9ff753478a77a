"""A uniform sample of features that does not depend on order, batch size or number of processes."""

from typing import Any

import numpy as np
import torch


class FeatureSample:
    """
    At most `capacity` features out of any number, every set of them equally probable.

    Every sample has a pseudo-random priority that depends on `seed` and its index in the whole set only (SplitMix64 of
    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"); those of the lowest priorities are
    kept. So the sample is the same for any order, batch size and number of processes.

    Memory: up to `capacity * D * 4` bytes, 410 MB for 50 000 times the 2048 features of Inception; twice as much for
    features in float64, which are kept as such: differences beside a large common offset may not fit into float32.

    Args:
        capacity (`int`): Number of features to keep, from 1 on.
        seed (`int`, *optional*, defaults to 0): Chooses the sample, from 0 on. Without effect on which features are
            kept if there are no more than `capacity`.

    Raises:
        ValueError: If `capacity` or `seed` is out of range.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"`capacity` is {capacity}, allowed: integers from 1 on.")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"`seed` is {seed}, allowed: integers from 0 to 2 ** 32 - 1.")
        self.capacity = capacity
        self.seed = seed
        self.count = 0
        self.num_features: int | None = None
        self._indices = np.empty(0, np.int64)
        self._buffer = torch.empty(
            0, 0, dtype=torch.float32
        )  # (capacity, D) from the first batch on; its first len(_indices) rows count

    def __len__(self) -> int:
        """Number of features kept."""
        return len(self._indices)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffer": self._buffer[: len(self)].clone()}  # without rows not in use

    def update(self, features: torch.Tensor, indices: np.ndarray) -> None:
        """
        Take in a batch.

        Args:
            features (`torch.Tensor` of shape `(B, D)`):
                Floating point, kept on the CPU as float64 if they are or earlier ones were, else as float32.
            indices (`numpy.ndarray` of shape `(B,)`): int64, the number of each in the whole set.

        Raises:
            ValueError: If `D` has changed.
        """
        if self.num_features is None:
            self.num_features = features.shape[1]
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"The features have {features.shape[1]} numbers, allowed after the earlier ones: {self.num_features}."
            )
        dtype = torch.promote_types(self._buffer.dtype, features.dtype)
        if len(self._buffer) < self.capacity or self._buffer.dtype != dtype:
            kept = self._buffer[: len(self)].reshape(len(self), self.num_features)
            # memory is used as it is written to
            self._buffer = torch.empty(self.capacity, self.num_features, dtype=dtype)
            self._buffer[: len(self)] = kept
        self.count += len(features)
        free = min(self.capacity - len(self), len(features))
        self._buffer[len(self) : len(self) + free] = features[:free]
        self._indices = np.concatenate([self._indices, indices[:free]])
        if free < len(features):
            self._replace(features[free:], indices[free:])

    def merge(self, other: "FeatureSample") -> None:
        """Take in what another process has kept."""
        if len(other) > 0:
            self.update(other._buffer[: len(other)], other._indices)
            self.count += other.count - len(other)

    def features(self) -> torch.Tensor:
        """
        The sample, in the order of its priorities, which is random with respect to the order of the indices.

        Returns:
            `torch.Tensor` of shape `(min(count, capacity), D)`: float32, or float64 if some of the features were.

        Raises:
            ValueError: If an index was given twice.
        """
        values, counts = np.unique(self._indices, return_counts=True)
        if len(values) < len(self._indices):
            raise ValueError(
                f"`indices` held {values[counts > 1][:10].tolist()} more than once, allowed: once for each sample."
            )
        order = np.argsort(_priorities(self._indices, self.seed))
        return self._buffer[torch.from_numpy(order)]

    def _replace(self, features: torch.Tensor, indices: np.ndarray) -> None:
        """Let new features take the places of kept ones of higher priorities."""
        priorities = _priorities(np.concatenate([self._indices, indices]), self.seed)
        lowest = np.zeros(len(priorities), bool)
        lowest[np.argpartition(priorities, self.capacity - 1)[: self.capacity]] = True
        places = np.flatnonzero(~lowest[: self.capacity])
        chosen = np.flatnonzero(lowest[self.capacity :])
        self._buffer[torch.from_numpy(places)] = features[torch.from_numpy(chosen)].to(self._buffer.dtype)
        self._indices[places] = indices[chosen]


def _priorities(indices: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64: for every seed, different indices get different numbers."""
    start = _mix(np.array([seed], np.uint64))
    return _mix(start + indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(numbers: np.ndarray) -> np.ndarray:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
