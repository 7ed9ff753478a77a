"""Which patches are masked in training."""

import pytest
import torch

from softvq_hf.training.masking import sample_patch_mask


def test_share_and_places():
    generator = torch.Generator().manual_seed(0)
    counts, places = [], torch.zeros(100)
    for _ in range(400):
        mask = sample_patch_mask(4, 100, 0.4, 0.6, generator)
        assert mask.dtype == torch.bool and mask.shape == (4, 100)
        numbers = mask.sum(dim=1)
        assert len(numbers.unique()) == 1, "one share for the batch"
        assert not torch.equal(mask[0], mask[1]), "other patches for every image"
        counts.append(numbers[0].item())
        places += mask.sum(dim=0) / 1600
    assert min(counts) >= 40 and max(counts) <= 60
    # a normal around 0.6 with deviation 0.25, cut at 0.4 and 0.6, has the mean 0.5045; rounding up adds half a patch
    assert sum(counts) / len(counts) == pytest.approx(50.95, abs=1.0)
    assert places.std() < 0.02, "every place is masked equally often"


def test_fixed_share_is_rounded_up_and_follows_the_generator():
    masks = [sample_patch_mask(2, 10, 0.25, 0.25, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*masks) and masks[0].sum(dim=1).tolist() == [3, 3]
    assert sample_patch_mask(2, 10, 1.0, 1.0).all() and not sample_patch_mask(2, 10, 0.0, 0.0).any()


def test_images_draw_from_their_own_generators():
    """The share belongs to the batch, the places to the image: whatever batch it comes in."""

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def mask(shared, *samples):
        return sample_patch_mask(len(samples), 40, 0.2, 0.9, *generators(shared), generators(*samples))

    together = mask(0, 1, 2, 3)
    assert torch.equal(together, torch.cat([mask(0, 1), mask(0, 2), mask(0, 3)]))
    assert torch.equal(together[[2, 0]], mask(0, 3, 1)) and not torch.equal(together[0], together[1])
    other_share = mask(5, 1)[0]
    assert other_share.sum() != together[0].sum()
    smaller, larger = sorted([other_share, together[0]], key=lambda one: one.sum().item())
    assert (larger | ~smaller).all(), "the order in which patches are masked is the image's"
    with pytest.raises(ValueError, match="`sample_generators` has 1 entries, allowed: 2, one for each image"):
        sample_patch_mask(2, 4, 0.5, 0.5, None, generators(1))


@pytest.mark.parametrize(("sizes", "name"), [((0, 4), "batch_size"), ((2, 0), "num_patches")])
def test_nothing_to_mask(sizes, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, allowed: integers from 1 on"):
        sample_patch_mask(*sizes, 0.5, 0.5)


@pytest.mark.parametrize("ratios", [(-0.1, 0.5), (0.6, 0.4), (0.5, 1.1), (float("nan"), 0.5)])
def test_bad_shares(ratios):
    with pytest.raises(ValueError, match="allowed: 0 <= min_ratio <= max_ratio <= 1"):
        sample_patch_mask(1, 4, *ratios)
