"""The draws of a step: the same for any division of a global batch, other ones for every sample, step and seed."""

import torch

from softvq_hf.training.randomness import batch_generators


def test_a_global_batch_can_be_divided():
    whole = batch_generators(seed=42, step=3, epoch=1, first_sample=8, batch_size=4)
    halves = [batch_generators(seed=42, step=3, epoch=1, first_sample=first, batch_size=2) for first in (8, 10)]
    for draw in (lambda g: g.randn(2, 3), lambda g: g.rand(), lambda g: g.randint(1000)):
        assert torch.equal(draw(whole), torch.cat([draw(half) for half in halves]))
    shared = torch.rand(4, generator=whole.shared)
    for half in halves:
        assert torch.equal(torch.rand(4, generator=half.shared), shared)


def test_draws_depend_on_seed_step_epoch_and_sample_alone():
    def draws(seed: int, step: int, epoch: int, first_sample: int) -> tuple[float, float, float]:
        torch.randn(100)  # the global state before does not matter
        generators = batch_generators(seed, step, epoch, first_sample, batch_size=1)
        return torch.rand((), generator=generators.shared).item(), generators.rand().item(), torch.rand(()).item()

    first = draws(42, 3, 1, 8)
    assert draws(42, 3, 1, 8) == first and len(set(first)) == 3
    assert not set(draws(43, 3, 1, 8)) & set(first)
    shared, sample, library = draws(42, 4, 1, 8)  # another step shows the same sample with other shared draws
    assert shared != first[0] and (sample, library) == first[1:]
    for other in (draws(42, 3, 2, 8), draws(42, 3, 1, 9)):
        assert other[0] == first[0] and not set(other[1:]) & set(first[1:])


def test_shapes_and_ranges():
    generators = batch_generators(0, 1, 0, 0, batch_size=64)
    normal, uniform, integers = generators.randn(5, 2), generators.rand(), generators.randint(3)
    assert normal.shape == (64, 5, 2) and abs(normal.mean()) < 0.15 and abs(normal.std() - 1) < 0.1
    assert uniform.shape == (64,) and 0 <= uniform.min() and uniform.max() < 1
    assert integers.dtype == torch.int64 and set(integers.tolist()) == {0, 1, 2}
