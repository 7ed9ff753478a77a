"""Differentiable augmentation of what the discriminator sees (DiffAugment, arXiv 2006.10738), in the weak and the
strong form of SoftVQ-VAE (arXiv 2412.10958). Functions named after a change take its random draws as arguments."""

import torch

from softvq_hf.losses.draws import to_device


# What the discriminator is fed with, real images and reconstructions alike.
WEAK_AUGMENTATION = {"cutout_ratio": 0.2, "probability": 0.5}
# What its logits are held constant under, see `consistency_loss`.
STRONG_AUGMENTATION = {"cutout_ratio": 0.5, "probability": 1.0}


def adjust_brightness(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Adds `draws - 0.5` to each image of `(B, C, H, W)`; `draws` is `(B,)`, uniform in [0, 1)."""
    return images + (draws.view(-1, 1, 1, 1) - 0.5)


def adjust_saturation(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Scales the distance from the mean of each pixel by `2 * draws`; `draws` is `(B,)`, uniform in [0, 1)."""
    mean = images.mean(1, keepdim=True)
    return (images - mean) * (2 * draws.view(-1, 1, 1, 1)) + mean


def adjust_contrast(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Scales the distance from the mean of each image by `draws + 0.5`; `draws` is `(B,)`, uniform in [0, 1)."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (draws.view(-1, 1, 1, 1) + 0.5) + mean


def translate(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Moves each image of `(B, C, H, W)` up by `rows` and left by `columns` pixels, int64 `(B,)`, zeros moving in:
    pixel `(r, c)` of the result is pixel `(r + rows, c + columns)` of the image."""
    batch_size, _, height, width = images.shape
    row = torch.arange(height, device=images.device) + rows[:, None]
    column = torch.arange(width, device=images.device) + columns[:, None]
    inside_row, inside_column = (row >= 0) & (row < height), (column >= 0) & (column < width)
    sample = torch.arange(batch_size, device=images.device)[:, None, None]
    row, column = row.clamp(0, height - 1)[:, :, None], column.clamp(0, width - 1)[:, None, :]
    moved = images.permute(0, 2, 3, 1)[sample, row, column].permute(0, 3, 1, 2)
    return moved * (inside_row[:, None, :, None] & inside_column[:, None, None, :])


def cut_out(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, ratio: float) -> torch.Tensor:
    """Zeroes a rectangle of each image of `(B, C, H, W)`, `int(size * ratio + 0.5)` pixels high and wide, starting
    half that above and left of its centre `(rows, columns)`, int64 `(B,)`; it may reach over the border."""

    def covered(centre: torch.Tensor, size: int) -> torch.Tensor:
        side = int(size * ratio + 0.5)
        first = centre[:, None] - side // 2
        pixel = torch.arange(size, device=images.device)
        return (pixel >= first) & (pixel < first + side)

    hole = covered(rows, images.shape[2])[:, None, :, None] & covered(columns, images.shape[3])[:, None, None, :]
    return images * ~hole


def differentiable_augmentation(
    images: torch.Tensor,
    cutout_ratio: float,
    probability: float,
    generator: torch.Generator | None = None,
    sample_generators: list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Colour, translation by up to an eighth of the size, and cutout, each for the whole batch or not at all; amounts
    are drawn per image. Gradients flow through.

    SoftVQ-VAE feeds its discriminator with the weak form of real images and of reconstructions, and holds its logits
    constant under the strong form: `differentiable_augmentation(images, **WEAK_AUGMENTATION)` and
    `**STRONG_AUGMENTATION`.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
        cutout_ratio (`float`): Side of the hole as a share of the image's side, in [0, 1].
        probability (`float`): Probability of each of the three changes.
        generator (`torch.Generator`, *optional*):
            Source of the draws for the batch, made on its device (CPU without one).
        sample_generators (`list[torch.Generator]`, *optional*):
            One source per image for its amounts, which then do not depend on the other images: with the same
            `generator` on all of them, the parts of a batch are changed as the whole would be. By default amounts
            come from `generator`.

    Returns:
        `torch.Tensor`: images of the same shape and dtype.

    Raises:
        ValueError: If `cutout_ratio` or `probability` is not in [0, 1], or there is not one generator per image.
    """
    for name, value in [("cutout_ratio", cutout_ratio), ("probability", probability)]:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` is {value}, allowed: from 0 to 1.")
    batch_size, _, *size = images.shape
    if sample_generators is not None and len(sample_generators) != batch_size:
        raise ValueError(
            f"`sample_generators` has length {len(sample_generators)}, allowed: {batch_size}, one per image."
        )
    draw_device = generator.device if generator is not None else torch.device("cpu")

    def uniform() -> torch.Tensor:
        if sample_generators is None:
            draws = torch.rand(batch_size, generator=generator, device=draw_device)
        else:
            draws = torch.cat([torch.rand(1, generator=g, device=g.device) for g in sample_generators])
        return to_device(draws.to(images.dtype), images.device)

    def integers(low: int, high: int) -> torch.Tensor:
        if sample_generators is None:
            draws = torch.randint(low, high + 1, (batch_size,), generator=generator, device=draw_device)
        else:
            draws = torch.cat(
                [torch.randint(low, high + 1, (1,), generator=g, device=g.device) for g in sample_generators]
            )
        return to_device(draws, images.device)

    colour, translation, cutout = (torch.rand(3, generator=generator, device=draw_device) < probability).tolist()
    if colour:
        images = adjust_brightness(images, uniform())
        images = adjust_saturation(images, uniform())
        images = adjust_contrast(images, uniform())
    if translation:
        reach = [int(side * 0.125 + 0.5) for side in size]
        images = translate(images, *(integers(-pixels, pixels) for pixels in reach))
    if cutout:
        # The range of centres is one larger where the hole's side is even.
        last = [side - int(side * cutout_ratio + 0.5) % 2 for side in size]
        images = cut_out(images, *(integers(0, centre) for centre in last), cutout_ratio)
    return images
