"""How much a tokenizer compresses: tokens, numbers and bits of an image, from its configuration alone."""

import math
from collections.abc import Mapping
from typing import Any


def rate(config: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> dict[str, float | None]:
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
        image_size (`tuple[int, int]`, *optional*): Height and width of the images in pixels, by default
            `sample_size` of `config`. The number of latents of an `AutoencoderKL` depends on it.

    Returns:
        `dict`: `tokens_per_image`, L, or the positions of 2-D latents; `floats_per_image`, the continuous numbers, L
        times channels, `None` for "vq"; then, for "vq", `bits_per_image` and `compression`, or otherwise
        `bits_per_image_16` and `compression_16` with 16 bits for each number, `bits_per_image_32` and
        `compression_32` with 32. Compression is the number of bits of the image, 8 for every pixel and colour,
        over that of the latents.

    Raises:
        ValueError: If `config` is of another model, or an `AutoencoderKL` does not divide the image.
    """
    if "in_channels" not in config or "latent_channels" not in config:
        raise ValueError(
            f"`config` is that of {config.get('_class_name', 'an unknown model')}, allowed: AutoencoderSoftVQ and"
            " AutoencoderKL."
        )
    source = "`image_size`"
    if image_size is None:
        source, sample_size = "`sample_size` of `config`", config["sample_size"]
        image_size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    height, width = image_size
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
