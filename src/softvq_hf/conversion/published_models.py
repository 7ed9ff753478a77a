"""The models that the authors of SoftVQ-VAE (arXiv 2412.10958) and MAETok (arXiv 2502.03444) have published.

`published_models.yaml` beside this file has them: configurations, parameter counts, figures and their sources. As a
program, this module brings the tables of documents up to date, between their markers:

    python -m softvq_hf.conversion.published_models README.md docs/models.md
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class PublishedModel:
    """
    One published model.

    Args:
        name (`str`): What it is called here.
        repo_id (`str`): Its repository on the Hub.
        kind (`str`): `"tokenizer"` or `"generator"`.
        system (`str`): What [`convert_checkpoint`] calls its kind of checkpoint: `"softvq"`, `"sit"` or `"dit"`.
        resolution (`int`): Side of the images in pixels.
        config (`dict`): The official flat configuration.
        num_parameters (`int`): Parameters of the official architecture.
        published (`dict[str, float]`):
            Figures of the authors: `rfid` of a tokenizer, `gfid` and `gfid_guided` (with classifier-free guidance) of
            a generator, on ImageNet.
        sources (`dict[str, str]`): Addresses of the page that states the figures and of the paper.
        num_unused_parameters (`int`, defaults to 0): How many of `num_parameters` the converted model leaves out.
        num_encoder_parameters (`int`, *optional*): Parameters of a tokenizer's official encoder.
        num_decoder_parameters (`int`, *optional*): Parameters of a tokenizer's official decoder.
        tokenizer (`str`, *optional*): Repository of the tokenizer that a generator works on.
        notes (`str`, *optional*): What one should know before using it.
    """

    name: str
    repo_id: str
    kind: str
    system: str
    resolution: int
    config: dict[str, Any]
    num_parameters: int
    published: dict[str, float]
    sources: dict[str, str]
    num_unused_parameters: int = 0
    num_encoder_parameters: int | None = None
    num_decoder_parameters: int | None = None
    tokenizer: str | None = None
    notes: str | None = None

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Number of latent tokens and their channels."""
        if self.kind == "tokenizer":
            return self.config["num_latent_tokens"], self.config["codebook_embed_dim"]
        return self.config["input_size"], self.config["in_channels"]


def load_published_models() -> list[PublishedModel]:
    """
    Read the table of published models.

    Returns:
        `list[PublishedModel]`: The tokenizers, then the generators.
    """
    table = yaml.safe_load(resources.files(__package__).joinpath("published_models.yaml").read_text(encoding="utf-8"))
    return [PublishedModel(kind=kind, **entry) for kind in ("tokenizer", "generator") for entry in table[f"{kind}s"]]


def published_models_table(kind: str | None = None) -> str:
    """
    The published models in Markdown.

    Args:
        kind (`str`, *optional*):
            `"tokenizer"` or `"generator"` for that table alone; otherwise both, with headings and notes.

    Returns:
        `str`: Lines without a line break at the end.

    Raises:
        ValueError: If `kind` is neither.
    """
    models = load_published_models()
    if kind is None:
        notes = [f"- {model.name}: {model.notes}" for model in models if model.notes]
        parts = ["## Tokenizers", published_models_table("tokenizer"), "## Generators"]
        parts += [published_models_table("generator"), "## Notes", "\n".join(notes)]
        return "\n\n".join(parts)
    if kind not in ("tokenizer", "generator"):
        raise ValueError(f"`kind` is {kind!r}, allowed: 'tokenizer', 'generator' or None.")

    rows = [["model", "Hub repository", "pixels", "tokens × channels"]]
    if kind == "tokenizer":
        rows[0] += ["encoder / decoder / all", "rFID", "SiT-XL gFID", "guided"]
    else:
        rows[0] += ["parameters", "gFID", "guided"]
    for model in models:
        if model.kind != kind:
            continue
        row = [model.name, f"`{model.repo_id}`", str(model.resolution), "{} × {}".format(*model.latent_shape)]
        if kind == "tokenizer":
            counts = (model.num_encoder_parameters, model.num_decoder_parameters, model.num_parameters)
            row += [" / ".join(f"{count / 1e6:.2f}M" for count in counts), f"{model.published['rfid']:.2f}"]
            (model,) = (other for other in models if other.system == "sit" and other.tokenizer == model.repo_id)
        else:
            row.append(f"{model.num_parameters / 1e6:.2f}M")
        rows.append(row + [f"{model.published[figure]:.2f}" for figure in ("gfid", "gfid_guided")])
    return _markdown_table(rows)


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head, padded so that it reads well as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def update_published_models(document: str) -> str:
    """
    Bring the tables of a Markdown document up to date: everything between `<!-- published models: start -->` and
    `<!-- published models: end -->`, and the same with `tokenizers` for the first table alone.

    Args:
        document (`str`): The document.

    Returns:
        `str`: The document as it should be.
    """
    for name, kind in (("models", None), ("tokenizers", "tokenizer")):
        start, end = f"<!-- published {name}: start -->", f"<!-- published {name}: end -->"
        region = f"{start}\n\n{published_models_table(kind)}\n\n{end}"
        document = re.sub(f"{start}.*?{end}", lambda match, region=region: region, document, flags=re.DOTALL)
    return document


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(update_published_models(path.read_text(encoding="utf-8")), encoding="utf-8")
