"""Plots of `softvq-hf inspect`, from numbers that are there. Each function returns a matplotlib `Figure`, which is
no part of the state of pyplot: `figure.savefig(path)` writes it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.patheffects as patheffects
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure


IMAGES_PER_ROW = 8
MOST_CLASSES = 18  # colours of "tab20" without its greys
DPI = 120


def reconstruction_figure(originals: torch.Tensor, reconstructions: torch.Tensor, psnr: Sequence[float]) -> Figure:
    """
    Originals, reconstructions and the absolute error of each pixel, averaged over its colours.

    Args:
        originals (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        reconstructions (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        psnr (`Sequence[float]`): Decibels, of each image.
    """
    errors = (originals.int() - reconstructions.int()).abs().float().mean(1).numpy()
    norm = Normalize(0, max(errors.max(), 1.0))
    kinds = {
        "original": _to_rgb(originals),
        "reconstruction": _to_rgb(reconstructions),
        "absolute error": mpl.colormaps["magma"](norm(errors), bytes=True)[..., :3],
    }
    columns = min(len(originals), IMAGES_PER_ROW)
    blocks = math.ceil(len(originals) / columns)
    height, width = originals.shape[2:]
    blank = np.full((blocks * columns - len(originals), height, width, 3), 255, dtype=np.uint8)
    rows = [np.split(np.concatenate([images, blank]), blocks) for images in kinds.values()]
    grid, corners = _tile(np.concatenate([row for block in zip(*rows, strict=True) for row in block]), columns)

    figure = Figure(figsize=(1.3 * columns + 1.1, 3.9 * blocks), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    _hide(axis)
    axis.imshow(grid)
    middles = [top + height / 2 for _, top in corners[::columns]]
    axis.set_yticks(middles, list(kinds) * blocks, rotation=90, va="center", fontsize=9)
    for i, decibels in enumerate(psnr):
        place = 3 * columns * (i // columns) + columns + i % columns
        _write(axis, corners[place], width, f"{decibels:.1f} dB", fontsize=8)
    _draw_colorbar(figure, axis, norm)
    return figure


def influence_figure(
    image: torch.Tensor, maps: torch.Tensor, mean_maps: torch.Tensor, tokens: Sequence[int], num_images: int
) -> Figure:
    """
    An image, the influence of each token on it, and on the mean of several images. All maps have the same colours,
    which end at the 99.8th percentile of their pixels: brighter ones are drawn as bright as that.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`): The original, uint8.
        maps (`torch.Tensor` of shape `(T, H, W)`): Change of its decoded image in grey levels.
        mean_maps (`torch.Tensor` of shape `(T, H, W)`): The mean over images.
        tokens (`Sequence[int]` of length T): Numbers of the tokens.
        num_images (`int`): How many images `mean_maps` come from.
    """
    figure = Figure(figsize=(13, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 2, 2))
    for axis in axes:
        _hide(axis)
    highest = np.quantile(torch.cat([maps, mean_maps]).numpy(), 0.998)
    norm = Normalize(0, max(highest, 1e-6))
    axes[0].imshow(_to_rgb(image))
    axes[0].set_title("the image", fontsize=10)
    _draw_maps(axes[1], maps, tokens, norm)
    axes[1].set_title("change of this image, by token", fontsize=10)
    _draw_maps(axes[2], mean_maps, tokens, norm)
    axes[2].set_title(f"mean change of {num_images} images", fontsize=10)
    _draw_colorbar(figure, axes, norm, extend="max")
    return figure


def _draw_maps(axis: Axes, maps: torch.Tensor, tokens: Sequence[int], norm: Normalize) -> None:
    """Maps `(T, H, W)` in a square grid, the number of its token in the corner of each."""
    columns = math.ceil(math.sqrt(len(tokens)))
    grid, corners = _tile(maps.numpy(), columns)
    axis.imshow(grid, cmap="magma", norm=norm)
    for corner, token in zip(corners, tokens, strict=True):
        _write(axis, corner, maps.shape[2], str(token), fontsize=10 if columns <= 4 else 7)


def interpolation_figure(first: torch.Tensor, strips: torch.Tensor, second: torch.Tensor) -> Figure:
    """
    Strips of images between pairs of originals.

    Args:
        first (`torch.Tensor` of shape `(P, 3, H, W)`): Originals at the beginning, uint8.
        strips (`torch.Tensor` of shape `(P, S, 3, H, W)`): Decoded from latents between the two, uint8.
        second (`torch.Tensor` of shape `(P, 3, H, W)`): Originals at the end, uint8.
    """
    num_pairs, num_steps, _, height, width = strips.shape
    columns = num_steps + 2
    images = torch.cat([first[:, None], strips, second[:, None]], dim=1).flatten(0, 1)
    grid, corners = _tile(_to_rgb(images), columns)
    figure = Figure(figsize=(1.25 * columns + 0.2, 1.25 * num_pairs + 0.3), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    _hide(axis)
    axis.imshow(grid)
    weights = [f"weight {weight:.2g}" for weight in torch.linspace(0, 1, num_steps).tolist()]
    axis.xaxis.tick_top()
    axis.set_xticks(
        [left + width / 2 for left, _ in corners[:columns]], ["original", *weights, "original"], fontsize=9
    )
    return figure


def codebook_figure(counts: torch.Tensor, usage: Mapping[str, Any]) -> Figure:
    """
    How often each codeword was chosen, the most frequent ones first.

    Args:
        counts (`torch.Tensor` of shape `(num_codebooks, codebook_size)`): Integers.
        usage (`Mapping`): What [`~softvq_hf.metrics.codebook_usage.CodebookUsage`] says of them.
    """
    figure = Figure(figsize=(8, 3.8), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    num_codebooks, codebook_size = counts.shape
    edges = np.arange(codebook_size + 1)
    for codebook, perplexity in enumerate(usage["codebook_perplexity_per_codebook"]):
        ordered = counts[codebook].sort(descending=True).values.double().numpy()
        name = f"codebook {codebook}, perplexity {perplexity:.4g}" if num_codebooks > 1 else None
        axis.stairs(np.where(ordered > 0, ordered, np.nan), edges, baseline=None, label=name, linewidth=1.5)
    mean = counts.sum(1).double().mean().item() / codebook_size
    axis.axhline(mean, color="0.4", linestyle="--", linewidth=1, label=f"all equally often: {mean:.3g} each")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.set_xlim(0, codebook_size)
    axis.set_xlabel("codewords, by falling frequency; those that are never chosen are left out", fontsize=9)
    axis.set_ylabel("times chosen", fontsize=9)
    axis.set_title(
        f"{usage['codebook_usage']:.1%} of {num_codebooks} x {codebook_size} codewords chosen by"
        f" {usage['num_tokens']:,} tokens, perplexity {usage['codebook_perplexity']:.4g}",
        fontsize=10,
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    return figure


def projection_figure(
    points: np.ndarray,
    axis_names: tuple[str, str],
    class_labels: torch.Tensor | None,
    id2label: Mapping[int, str],
) -> Figure:
    """
    Points in two dimensions, coloured by class. Of more than 18 classes the 18 most frequent ones get a colour, and
    the others are grey.

    Args:
        points (`numpy.ndarray` of shape `(N, 2)`): The points.
        axis_names (`tuple[str, str]`): What the axes are.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*): int64; without, all points have one colour.
        id2label (`Mapping[int, str]`): Names of the classes.
    """
    figure = Figure(figsize=(8.5, 5.5), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    size = 14 if len(points) > 300 else 28
    if class_labels is None:
        axis.scatter(*points.T, s=size, alpha=0.8, linewidths=0)
    else:
        labels = class_labels.numpy()
        classes, counts = np.unique(labels, return_counts=True)
        shown = np.sort(classes[np.argsort(-counts, kind="stable")[:MOST_CLASSES]])
        others = ~np.isin(labels, shown)
        groups, names = [], []
        if others.any():
            groups.append(axis.scatter(*points[others].T, s=size / 2, color="0.8", linewidths=0))
            names.append(f"{len(classes) - MOST_CLASSES} other classes")
        colours = mpl.colormaps["tab10" if len(shown) <= 10 else "tab20"].colors
        if len(shown) > 10:
            colours = colours[:14] + colours[16:]
        for label, colour in zip(shown.tolist(), colours, strict=False):
            groups.append(axis.scatter(*points[labels == label].T, s=size, color=colour, alpha=0.8, linewidths=0))
            names.append(_shorten(id2label[label]))
        # given with their groups, names may begin with an underscore
        legend = figure.legend(groups, names, loc="outside right upper", fontsize=8, markerscale=1.5, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar sign is one
    axis.set_xlabel(axis_names[0], fontsize=9)
    axis.set_ylabel(axis_names[1], fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    return figure


def channel_figure(statistics: Mapping[str, Any]) -> Figure:
    """
    Mean, standard deviation and kurtosis of each channel.

    Args:
        statistics (`Mapping`): From [`~softvq_hf.metrics.latent_statistics.LatentStatistics`].
    """
    mean = np.array(statistics["latent_channel_mean"])
    std = np.array(statistics["latent_channel_std"])
    kurtosis = np.array(statistics["latent_channel_kurtosis"])
    channels = np.arange(len(mean))
    figure = Figure(figsize=(10, 3.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(channels, mean, yerr=std, fmt="o", markersize=4, capsize=2, linewidth=1)
    left.axhline(0, color="0.4", linewidth=1, zorder=0)
    left.set_title("mean ± standard deviation", fontsize=10)
    right.plot(channels, kurtosis, "o", markersize=4)
    right.axhline(3, color="0.4", linestyle="--", linewidth=1, zorder=0, label="normal distribution: 3")
    right.set_title("kurtosis", fontsize=10)
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("channel", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure


def _to_rgb(images: torch.Tensor) -> np.ndarray:
    """Images `(..., 3, H, W)` as matplotlib takes them, `(..., H, W, 3)`."""
    return images.movedim(-3, -1).numpy()


def _tile(images: np.ndarray, columns: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """
    Images `(N, H, W, 3)`, uint8, or maps `(N, H, W)`, floating point, row by row in a grid, and the left and top pixel
    of each. Between them it is white, or NaN.
    """
    height, width = images.shape[1:3]
    gap = max(1, width // 24)
    corners = [(i % columns * (width + gap), i // columns * (height + gap)) for i in range(len(images))]
    rows = math.ceil(len(images) / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *images.shape[3:])
    grid = np.full(shape, 255 if images.dtype == np.uint8 else np.nan, dtype=images.dtype)
    for image, (left, top) in zip(images, corners, strict=True):
        grid[top : top + height, left : left + width] = image
    return grid, corners


def _write(axis: Axes, corner: tuple[int, int], width: int, text: str, fontsize: int) -> None:
    """Write into the upper left corner of an image, readable on any ground."""
    left, top = corner
    axis.text(
        left + 0.05 * width,
        top + 0.05 * width,
        text,
        color="white",
        fontsize=fontsize,
        va="top",
        path_effects=[patheffects.withStroke(linewidth=1.5, foreground="black")],
    )


def _draw_colorbar(figure: Figure, axes: Axes | np.ndarray, norm: Normalize, extend: str = "neither") -> None:
    colorbar = figure.colorbar(ScalarMappable(norm, "magma"), ax=axes, fraction=0.02, pad=0.01, extend=extend)
    colorbar.set_label("grey levels", fontsize=9)
    colorbar.ax.tick_params(labelsize=8)


def _hide(axis: Axes) -> None:
    """Leave nothing of an axis but what is drawn on it and the labels of its ticks."""
    axis.set(xticks=[], yticks=[])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _shorten(name: str, most: int = 24) -> str:
    """A class name that fits into a legend: of several names, separated by commas, the first."""
    name = name.split(",")[0]
    return name if len(name) <= most else f"{name[: most - 1]}…"
