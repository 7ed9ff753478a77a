"""Plots show the numbers that they are given."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch

from softvq_hf.evaluation.plots import (
    channel_figure,
    codebook_figure,
    influence_figure,
    interpolation_figure,
    projection_figure,
    reconstruction_figure,
)
from softvq_hf.metrics.codebook_usage import CodebookUsage
from softvq_hf.metrics.latent_statistics import LatentStatistics


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def drawn(axis) -> np.ndarray:
    (image,) = axis.get_images()
    return np.asarray(image.get_array())


@pytest.mark.parametrize(("num_images", "columns"), [(2, 2), (8, 8), (11, 8)])
def test_reconstructions(num_images, columns, tmp_path):
    originals, reconstructions = random_images(num_images, 3, 24, 24), random_images(num_images, 3, 24, 24)
    figure = reconstruction_figure(originals, reconstructions, [20.0 + i for i in range(num_images)])
    grid = drawn(figure.axes[0])
    blocks = -(-num_images // columns)
    assert grid.shape == (3 * blocks * 25 - 1, columns * 25 - 1, 3)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        *("original", "reconstruction", "absolute error")
    ] * blocks
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{20 + i}.0 dB" for i in range(num_images)]

    last = num_images - 1
    left, top = last % columns * 25, 3 * (last // columns) * 25
    original, reconstruction, error = (grid[y : y + 24, left : left + 24] for y in (top, top + 25, top + 50))
    assert np.array_equal(original, originals[last].permute(1, 2, 0))
    assert np.array_equal(reconstruction, reconstructions[last].permute(1, 2, 0))
    errors = (originals.double() - reconstructions.double()).abs().mean(1)
    darkest, brightest = errors[last].argmin(), errors[last].argmax()
    assert error.sum(2).flatten()[darkest] < error.sum(2).flatten()[brightest]
    text = figure.axes[0].texts[last].get_position()
    assert left < text[0] < left + 24 and top + 25 < text[1] < top + 49
    figure.savefig(tmp_path / "figure.png")


def test_error_colours_end_at_the_largest_error():
    originals, reconstructions = torch.zeros(2, 3, 24, 24, dtype=torch.uint8), torch.zeros(2, 3, 24, 24).byte()
    reconstructions[1, 0, 5, 7] = 90  # of three colours one
    figure = reconstruction_figure(originals, reconstructions, [math.inf, 40.0])
    errors = drawn(figure.axes[0])[50:74, 25:49]
    magma = mpl.colormaps["magma"]
    assert errors[5, 7].tolist() == list(magma(1.0, bytes=True)[:3])
    assert errors[0, 0].tolist() == list(magma(0.0, bytes=True)[:3])
    assert figure.axes[1].get_ylim() == (0, 30)
    assert figure.axes[0].texts[0].get_text() == "inf dB"


def test_influence_of_five_tokens_in_a_grid():
    maps, mean_maps = torch.rand(5, 24, 24), torch.rand(5, 24, 24)
    figure = influence_figure(random_images(3, 24, 24), maps, mean_maps, [0, 3, 6, 9, 12], num_images=4)
    one, mean = (drawn(axis) for axis in figure.axes[1:3])
    assert one.shape == (2 * 24 + 1, 3 * 24 + 2)  # two rows of three, a pixel apart
    assert np.allclose(one[25:, 25:49], maps[4], atol=1e-6)
    assert np.allclose(mean[:24, 50:], mean_maps[2], atol=1e-6)
    assert [text.get_text() for text in figure.axes[1].texts] == ["0", "3", "6", "9", "12"]
    assert figure.axes[2].get_title() == "mean change of 4 images"


def test_influence_of_nothing(tmp_path):
    maps = torch.zeros(2, 8, 8)
    figure = influence_figure(random_images(3, 8, 8), maps, maps, [0, 1], num_images=2)
    figure.savefig(tmp_path / "figure.png")
    assert np.nanmax(drawn(figure.axes[1])) == 0  # NaN: the gaps between the maps


def test_interpolation():
    first, strips, second = random_images(2, 3, 24, 24), random_images(2, 3, 3, 24, 24), random_images(2, 3, 24, 24)
    figure = interpolation_figure(first, strips, second)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        *("original", "weight 0", "weight 0.5", "weight 1", "original")
    ]
    row = drawn(figure.axes[0])[25:]
    assert np.array_equal(row[:, :24], first[1].permute(1, 2, 0))
    assert np.array_equal(row[:, 50:74], strips[1, 1].permute(1, 2, 0))
    assert np.array_equal(row[:, 100:], second[1].permute(1, 2, 0))


def test_codewords_are_sorted_by_frequency():
    indices = torch.tensor([3, 3, 3, 1, 1, 2]).reshape(1, 1, 6)
    counts = torch.tensor([[0, 2, 1, 3]])
    figure = codebook_figure(counts, CodebookUsage(4).compute(predictions=indices))
    (axis,) = figure.axes
    values = axis.patches[0].get_data().values
    assert values[:3].tolist() == [3, 2, 1] and np.isnan(values[3])
    assert axis.get_title() == "75.0% of 1 x 4 codewords chosen by 6 tokens, perplexity 2.749"
    assert axis.get_yscale() == "log"


def test_few_classes_have_a_colour_each():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    figure = projection_figure(np.random.rand(6, 2), ("x", "y"), labels, {0: "tench, Tinca tinca", 1: "cat", 2: "dog"})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["tench", "cat", "dog"]
    assert [len(points.get_offsets()) for points in figure.axes[0].collections] == [2, 3, 1]
    colours = {tuple(points.get_facecolor()[0]) for points in figure.axes[0].collections}
    assert len(colours) == 3


def test_names_of_classes_are_plain_text(tmp_path):
    names = ["_hidden", "$20 off", "$x^", "100 % $"]
    labels = torch.arange(4).repeat_interleave(2)
    figure = projection_figure(np.random.rand(8, 2), ("x", "y"), labels, dict(enumerate(names)))
    assert [text.get_text() for text in figure.legends[0].texts] == names
    assert not any(text.get_parse_math() for text in figure.legends[0].texts)
    figure.savefig(tmp_path / "figure.png")  # "$x^$" would be no formula


def test_of_many_classes_the_most_frequent_ones_have_colours():
    labels = torch.arange(25).repeat_interleave(torch.tensor([1] * 7 + [2] * 18))
    figure = projection_figure(np.random.rand(43, 2), ("x", "y"), labels, {i: f"class {i}" for i in range(25)})
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["7 other classes", *(f"class {i}" for i in range(7, 25))]
    groups = figure.axes[0].collections
    assert [len(points.get_offsets()) for points in groups] == [7] + [2] * 18
    colours = [tuple(points.get_facecolor()[0][:3]) for points in groups]
    assert len(set(colours)) == 19
    assert [len(set(colour)) == 1 for colour in colours] == [True] + [False] * 18  # the others alone are grey


def test_projection_without_labels():
    figure = projection_figure(np.random.rand(6, 2), ("x", "y"), None, {})
    assert figure.legends == [] and len(figure.axes[0].collections[0].get_offsets()) == 6


def test_channels(tmp_path):
    latents = torch.randn(10, 4, 3)
    latents[..., 2] = 5.0  # a channel that never varies has no kurtosis
    statistics = LatentStatistics(flat=False).compute(predictions=latents)
    figure = channel_figure(statistics)
    kurtosis = figure.axes[1].lines[0].get_ydata()
    assert kurtosis[:2].tolist() == statistics["latent_channel_kurtosis"][:2] and np.isnan(kurtosis[2])
    figure.savefig(tmp_path / "figure.png")
