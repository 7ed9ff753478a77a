"""Latents that are changed and decoded again, with constructed decoders."""

from collections.abc import Sequence

import pytest
import torch

from softvq_hf.evaluation.latent_edits import choose_tokens, interpolate, spatial_extent, token_influence


def quarter_decoder(latents: torch.Tensor, image_id: Sequence[str]) -> torch.Tensor:
    """Ignores all but token 2, whose first number is the grey of the upper left quarter of 8 x 8 pixels."""
    images = torch.full((len(latents), 3, 8, 8), 100.0)
    images[:, :, :4, :4] = latents[:, 2, 0].reshape(-1, 1, 1, 1)
    return images


def test_influence_of_the_only_token_that_counts():
    latents, replacements = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    latents[:, 2, 0] = torch.tensor([50.0, 200.0])
    replacements[:, :, 0] = 80.0
    maps = token_influence(quarter_decoder, latents, replacements, [0, 1, 2, 3], ["a", "b"])
    expected = torch.zeros(2, 4, 8, 8)
    expected[0, 2, :4, :4] = 30.0
    expected[1, 2, :4, :4] = 120.0
    assert torch.equal(maps, expected)

    extent = spatial_extent(maps)
    assert extent.change == pytest.approx([0, 0, 75 / 4, 0])
    assert extent.area == extent.area_of_mean == pytest.approx([0, 0, 0.25, 0])
    assert extent.centre[:2] == [None, None] and extent.centre[2] == pytest.approx((0.25, 0.25))


def test_tokens_that_stay_have_no_influence():
    latents = torch.randn(2, 4, 3)
    assert token_influence(quarter_decoder, latents, latents, [1, 2], ["a", "b"]).abs().max() == 0


def test_what_is_decoded_has_a_name():
    decoded = []

    def decode(latents, image_id):
        decoded.append((len(latents), image_id))
        return quarter_decoder(latents, image_id)

    token_influence(decode, torch.randn(1, 4, 3), torch.randn(1, 4, 3), [0, 3], ["a.png"])
    assert sorted(decoded) == [(1, ["a.png"]), (2, ["a.png with another token 0", "a.png with another token 3"])]


def test_extent_of_a_token_that_moves_and_of_one_that_is_everywhere():
    maps = torch.zeros(2, 2, 4, 8)
    maps[0, 0, 0, 0] = maps[1, 0, 3, 7] = 2.0
    maps[:, 1] = 1.0
    extent = spatial_extent(maps)
    assert extent.area == pytest.approx([1 / 32, 1.0])
    assert extent.area_of_mean == pytest.approx([2 / 32, 1.0])
    assert extent.centre[0] == pytest.approx((0.5, 0.5)) and extent.centre[1] == pytest.approx((0.5, 0.5))
    assert spatial_extent(maps[:1]).centre[0] == pytest.approx((0.5 / 8, 0.5 / 4))
    assert extent.change == pytest.approx([2 / 32, 1.0])


def test_interpolation_is_linear():
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    path = interpolate(first, second, 5)
    assert path.shape == (2, 5, 3, 4)
    assert torch.equal(path[:, 0], first) and torch.equal(path[:, 4], second)
    assert torch.allclose(path[:, 1], 0.75 * first + 0.25 * second)


@pytest.mark.parametrize(
    ("num_tokens", "most", "is_grid", "expected"),
    [
        (3, 64, False, [0, 1, 2]),
        (128, 4, False, [16, 48, 80, 112]),
        (16, 4, True, [5, 7, 13, 15]),  # rows and columns 1 and 3
        (16, 5, True, [5, 7, 13, 15]),
    ],
)
def test_tokens_are_spread(num_tokens, most, is_grid, expected):
    assert choose_tokens(num_tokens, most, is_grid) == expected
