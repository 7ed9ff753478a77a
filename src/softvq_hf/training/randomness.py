"""The random draws of a training step: functions of seed, step and sample, so that a run can be resumed and divided.

What the whole global batch shares (a masking ratio, the coins of an augmentation) is drawn from a generator keyed by
seed and step; what belongs to one sample (noise, its timestep, a dropped label) from one keyed by seed, epoch and the
sample's position in the pass. So the draws are the same after an interruption, on any number of processes and however
an update is cut into batches. All draws are made on the CPU: they do not depend on the device either.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class BatchGenerators:
    """
    Sources of the draws for one batch of one process.

    Args:
        shared (`torch.Generator`): The same on all processes, and for all accumulated batches of an update.
        samples (`list[torch.Generator]`): One per sample of the batch.
    """

    shared: torch.Generator
    samples: list[torch.Generator]

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform draws in [0, 1), float32 of shape `(B, *shape)`, each sample's from its own generator."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.samples])

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard-normal draws, float32 of shape `(B, *shape)`, each sample's from its own generator."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.samples])

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        """Integers from 0 to `high - 1`, int64 of shape `(B, *shape)`, each sample's from its own generator."""
        return torch.stack([torch.randint(high, shape, generator=generator) for generator in self.samples])


def batch_generators(seed: int, step: int, epoch: int, first_sample: int, batch_size: int) -> BatchGenerators:
    """
    The generators for the batch of one process.

    The global generators, from which dropout inside of library modules draws, are seeded along with them: by seed,
    epoch and first sample.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): Optimizer update the batch belongs to, counted from 1.
        epoch (`int`): Pass over the data, counted from 0.
        first_sample (`int`): Position of the batch's first sample in the pass, over all processes.
        batch_size (`int`): Samples in the batch.

    Returns:
        [`BatchGenerators`]: on the CPU.
    """
    torch.manual_seed(_key(seed, 2, epoch, first_sample))
    return BatchGenerators(
        shared=torch.Generator().manual_seed(_key(seed, 0, step)),
        samples=[
            torch.Generator().manual_seed(_key(seed, 1, epoch, first_sample + index)) for index in range(batch_size)
        ],
    )


def _key(*numbers: int) -> int:
    """63 well-mixed bits of some numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
