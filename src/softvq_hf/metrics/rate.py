"""How much a tokenizer compresses: tokens, numbers and bits of an image, from its configuration alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from softvq_hf.metrics.batches import check_batch, not_finite
from softvq_hf.metrics.streaming import StreamingMetric


_DESCRIPTION = """
Size of the latents of an image: tokens, continuous numbers, bits, and the compression of 8-bit pixels. Only quantized
latents ("vq") have an exact number of bits; for continuous ones it is given at 16 and 32 bits for each number.
"""
_INPUTS = """
Args:
    predictions: `(B, L, C)` latents. They are counted, and their shape is compared with that of the configuration.
Returns:
    tokens_per_image, floats_per_image, bits_per_image and compression, or bits_per_image_16, compression_16,
    bits_per_image_32 and compression_32: see [`rate`].
    num_images (`int`): Number of images.
"""


class ImageCount:
    """Number of images seen."""

    def __init__(self) -> None:
        self.num_images = 0

    def merge(self, other: "ImageCount") -> None:
        """Take in what another process has counted."""
        self.num_images += other.num_images


class Rate(StreamingMetric):
    """
    The rate of a tokenizer ([`rate`]) as a metric, which makes sure that the latents are those of its configuration.

    Args:
        config (`Mapping`), image_size (`int` or `tuple[int, int]`, *optional*): As in [`rate`].
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: As [`rate`]; on adding, if latents are of another shape than by `config`, or not finite.
    """

    def __init__(
        self, config: Mapping[str, Any], image_size: int | tuple[int, int] | None = None, **kwargs: Any
    ) -> None:
        self.rate = rate(config, image_size)
        self.latent_shape = (self.rate["tokens_per_image"], config["latent_channels"])
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Array2D((None, None), "float32")}),
        )

    def new_accumulators(self) -> dict[str, ImageCount]:
        return {"predictions": ImageCount()}

    def update(self, predictions: Any, references: Any = None) -> None:
        if references is not None:
            raise ValueError("`references` were given, allowed: None; the rate is that of the predictions.")
        latents = check_batch(predictions, "predictions", "(B, L, C)")
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"`predictions` has latents of shape {tuple(latents.shape[1:])}, allowed with this `config`:"
                f" {self.latent_shape}."
            )
        broken = not_finite(latents)
        if broken:
            raise ValueError(f"`predictions` holds NaN or infinite numbers, in the latents {broken} of the batch.")
        self.accumulators["predictions"].num_images += len(latents)

    def result(self, accumulators: dict[str, ImageCount]) -> dict[str, float | None]:
        num_images = accumulators["predictions"].num_images
        if num_images == 0:
            raise ValueError("`predictions` has no latents, allowed: those of 1 image or more.")
        return {**self.rate, "num_images": num_images}


def rate(config: Mapping[str, Any], image_size: int | tuple[int, int] | None = None) -> dict[str, float | None]:
    """
    Size of the latents of one image.

    For "vq" the bits are exact: `L log2(K)` for L tokens out of K codewords tell which latents the decoder gets. They
    are what a code of fixed length takes; where codewords are not equally frequent, an entropy coder comes down to
    `L log2(perplexity)`, see [`CodebookUsage`].

    Continuous latents ("softvq", whose tokens are mixtures of codewords, "kl" and "none") have no exact number of
    bits. Given is what they take if each number is stored in 16 or 32 bits. This says nothing of how coarsely the
    numbers may be rounded before the image changes, so it compares tokenizers of one kind; it is no rate in the sense
    of rate and distortion, and it must not be set against the bits of "vq".

    Args:
        config (`Mapping`): `config` of an [`AutoencoderSoftVQ`] or of an [`~diffusers.AutoencoderKL`].
        image_size (`int` or `tuple[int, int]`, *optional*): Height and width of the images in pixels, or the side of
            squares, from 1 on; by default `sample_size` of `config`. The number of latents of an `AutoencoderKL`
            depends on it.

    Returns:
        `dict`: `tokens_per_image`, L, or the positions of 2-D latents; `floats_per_image`, the continuous numbers, L
        times channels, `None` for "vq"; then, for "vq", `bits_per_image` and `compression`, or otherwise
        `bits_per_image_16` and `compression_16` with 16 bits for each number, `bits_per_image_32` and
        `compression_32` with 32. Compression is the number of bits of the image, 8 for every pixel and colour,
        over that of the latents.

    Raises:
        ValueError: If `config` is no mapping, of another model, or lacks something (which is named), `image_size` is
            no size, or an `AutoencoderKL` does not divide the image.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"`config` is of type {type(config).__name__}, allowed: a mapping, the `config` of an AutoencoderSoftVQ or"
            " an AutoencoderKL."
        )
    if "in_channels" not in config or "latent_channels" not in config:
        raise ValueError(
            f"`config` is that of {config.get('_class_name', 'an unknown model')}, allowed: AutoencoderSoftVQ and"
            " AutoencoderKL."
        )
    needed = [] if "num_latent_tokens" in config else ["block_out_channels"]
    if config.get("quantizer") == "vq":
        needed.append("codebook_size")
    if image_size is None:
        needed.append("sample_size")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(
            f"`config` lacks {' and '.join(missing)}, allowed: the `config` of an AutoencoderSoftVQ or an"
            " AutoencoderKL. `image_size` stands in for sample_size."
        )
    source, size = "`image_size`", image_size
    if size is None:
        source, size = "`sample_size` of `config`", config["sample_size"]
    sides = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or not all(isinstance(side, int) and side >= 1 for side in sides)
    ):
        raise ValueError(f"{source} is {size!r}, allowed: one integer or two, height and width, from 1 on.")
    height, width = sides
    if "num_latent_tokens" in config:
        tokens = config["num_latent_tokens"]
    else:  # 2-D latents
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        if height % factor or width % factor:
            raise ValueError(f"{source} is {height} x {width}, allowed for this tokenizer: multiples of {factor}.")
        tokens = (height // factor) * (width // factor)
    image_bits = height * width * config["in_channels"] * 8
    if config.get("quantizer") == "vq":
        bits = tokens * math.log2(config["codebook_size"])
        return {
            "tokens_per_image": tokens,
            "floats_per_image": None,
            "bits_per_image": bits,
            "compression": image_bits / bits if bits > 0 else math.inf,  # a single codeword takes no bit
        }
    floats = tokens * config["latent_channels"]
    return {
        "tokens_per_image": tokens,
        "floats_per_image": floats,
        "bits_per_image_16": floats * 16,
        "compression_16": image_bits / (floats * 16),
        "bits_per_image_32": floats * 32,
        "compression_32": image_bits / (floats * 32),
    }
