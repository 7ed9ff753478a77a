"""Latents that are changed and decoded again: what a single token does, and what lies between two images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm


@dataclass
class TokenExtent:
    """
    How far the influence of each token reaches. Every list has a number per token.

    Args:
        change (`list[float]`): Mean absolute change of a pixel in grey levels, in [0, 255].
        area (`list[float]`): Share of the image that changes, in [0, 1]: the participation ratio `(sum m)**2 / (n sum
            m**2)` of a map m of n pixels; the mean over images. If some pixels change alike and the others do not, it
            is their share. 0: nothing changes.
        area_of_mean (`list[float]`): The same of the mean of the maps over images. Equal to `area` where a token has
            the same place in every image; larger where its place depends on the image.
        centre (`list[tuple[float, float] | None]`): Centre of mass of the mean map, x and y in [0, 1] from the top
            left corner; `None` where nothing changes.
    """

    change: list[float]
    area: list[float]
    area_of_mean: list[float]
    centre: list[tuple[float, float] | None]


def choose_tokens(num_tokens: int, most: int, is_grid: bool = False) -> list[int]:
    """
    The tokens to look at, where there are more than can be shown.

    Args:
        num_tokens (`int`): Tokens of an image, L.
        most (`int`): Show at most so many.
        is_grid (`bool`, *optional*, defaults to `False`): Whether tokens are the positions of a square, row by row.
            A smaller square of them is taken then, evenly spread over rows and columns.

    Returns:
        `list[int]`: ascending, each in [0, L).
    """
    if num_tokens <= most:
        return list(range(num_tokens))
    if not is_grid:
        return [(2 * i + 1) * num_tokens // (2 * most) for i in range(most)]
    side, shown = math.isqrt(num_tokens), math.isqrt(most)
    places = [(2 * i + 1) * side // (2 * shown) for i in range(shown)]
    return [row * side + column for row in places for column in places]


def token_influence(
    decode: Callable[[torch.Tensor, Sequence[str]], torch.Tensor],
    latents: torch.Tensor,
    replacements: torch.Tensor,
    tokens: Sequence[int],
    image_id: Sequence[str],
    desc: str = "tokens",
) -> torch.Tensor:
    """
    Which pixels change when a single token is replaced.

    Args:
        decode (`Callable`): From latents `(B, L, C)`, and what they are (B names, for errors), to images
            `(B, 3, H, W)`, pixels in [0, 255].
        latents (`torch.Tensor` of shape `(N, L, C)`): Of the images to look at.
        replacements (`torch.Tensor` of shape `(N, L, C)`): What takes the place of each token.
        tokens (`Sequence[int]` of length T): The tokens to replace, one at a time.
        image_id (`Sequence[str]` of length N): Names of the images.
        desc (`str`, *optional*, defaults to `"tokens"`): Title of the progress bar.

    Returns:
        `torch.Tensor` of shape `(N, T, H, W)`: the absolute change of the decoded image, averaged over its three
        colours, in grey levels, [0, 255].
    """
    maps = []
    images = zip(image_id, latents, replacements, strict=True)
    for name, image, replacement in tqdm(images, total=len(latents), desc=desc):
        changed = image.repeat(len(tokens), 1, 1)
        changed[range(len(tokens)), tokens] = replacement[tokens]
        changed_names = [f"{name} with another token {token}" for token in tokens]
        maps.append((decode(changed, changed_names) - decode(image.unsqueeze(0), [name])).abs().mean(1))
    return torch.stack(maps)


def spatial_extent(maps: torch.Tensor) -> TokenExtent:
    """
    Numbers on influence maps.

    Args:
        maps (`torch.Tensor` of shape `(N, T, H, W)`): From [`token_influence`].

    Returns:
        [`TokenExtent`]
    """
    maps = maps.double()
    mean_maps = maps.mean(0)
    height, width = maps.shape[2:]
    shares = mean_maps / mean_maps.sum((1, 2), keepdim=True)
    x = (shares.sum(1) * (torch.arange(width) + 0.5) / width).sum(1)
    y = (shares.sum(2) * (torch.arange(height) + 0.5) / height).sum(1)
    return TokenExtent(
        change=mean_maps.mean((1, 2)).tolist(),
        area=_area(maps).mean(0).tolist(),
        area_of_mean=_area(mean_maps).tolist(),
        centre=[None if math.isnan(place[0]) else place for place in zip(x.tolist(), y.tolist(), strict=True)],
    )


def _area(maps: torch.Tensor) -> torch.Tensor:
    """Share of the image that each map `(..., H, W)` covers, see [`TokenExtent`]; 0 for an empty map."""
    total, squares = maps.sum((-2, -1)), maps.square().sum((-2, -1))
    return total**2 / (squares.where(squares > 0, 1) * maps.shape[-2:].numel())


def interpolate(first: torch.Tensor, second: torch.Tensor, num_steps: int) -> torch.Tensor:
    """
    Latents on the straight line between two.

    Args:
        first (`torch.Tensor` of shape `(P, L, C)`): Where the lines begin.
        second (`torch.Tensor` of shape `(P, L, C)`): Where they end.
        num_steps (`int`): Points of a line, S, at equal distances, both ends included; 2 or more.

    Returns:
        `torch.Tensor` of shape `(P, S, L, C)`
    """
    weights = torch.linspace(0, 1, num_steps, dtype=first.dtype)[:, None, None]
    return torch.lerp(first[:, None], second[:, None], weights)
