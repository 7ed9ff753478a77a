"""How much of a codebook is in use: the share of its codewords that are chosen, and the perplexity of the choices."""

from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import torch

from softvq_hf.metrics.batches import check_batch
from softvq_hf.metrics.streaming import StreamingMetric


_DESCRIPTION = """
Share of the codewords that are chosen at least once, and perplexity of the choices.
"""
_INPUTS = """
Args:
    predictions: `(B, num_codebooks, T)` integers, the chosen codeword of each token.
Returns:
    codebook_usage (`float`): In (0, 1].
    codebook_perplexity (`float`): From 1 to the number of codewords, the mean over the codebooks.
    codebook_perplexity_per_codebook (`list[float]`): The same of each codebook.
    num_tokens (`int`): Number of choices.
"""


def codebook_statistics(counts: torch.Tensor) -> tuple[float, torch.Tensor]:
    """
    Use of codebooks, from how often each codeword was chosen.

    Args:
        counts (`torch.Tensor` of shape `(num_codebooks, codebook_size)`): Integers; at least one choice per codebook.

    Returns:
        `tuple`: the share of all codewords that were chosen at least once, in (0, 1], and the perplexity of each
        codebook, a float64 tensor of shape `(num_codebooks,)`: `exp(-sum_k p_k log p_k)` with the shares `p_k` of its
        codewords in its choices, from 1 (always the same) to `codebook_size` (all equally often).
    """
    counts = counts.double()
    entropy = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
    return (counts > 0).double().mean().item(), entropy.exp()


@dataclass
class CodewordCounts:
    """
    How often each codeword was chosen.

    Args:
        counts (`torch.Tensor` of shape `(num_codebooks, codebook_size)`): int64 on the CPU.
    """

    counts: torch.Tensor

    def merge(self, other: "CodewordCounts") -> None:
        """Add the counts of another process."""
        self.counts += other.counts


class CodebookUsage(StreamingMetric):
    """
    Share of the codewords in use, and perplexity of the choices.

    Predictions are the `indices` of [`AutoencoderSoftVQ.encode`], of shape `(B, num_codebooks, T)`: for "vq" the
    nearest codeword of each token, for "softvq" the most probable one. Few tokens cannot use many codewords: both
    figures grow with the number of images until they settle, so they are comparable at equal numbers only. For
    "softvq" they tell how the peaks of the soft assignment spread; the latent is a mixture of many codewords.

    Memory: `num_codebooks * codebook_size * 8` bytes, 262 kB for the 4 x 8192 codewords of the published models.

    Args:
        codebook_size (`int`): Codewords of a codebook.
        num_codebooks (`int`, *optional*, defaults to 1): Codebooks; codebook k has the indices `[:, k]`.
        kwargs: As in [`StreamingMetric`].

    Raises:
        ValueError: If a size is no integer from 1 on; on adding, if indices are no integers in [0,
            codebook_size) or of another shape, or there are references; on computing, if nothing was added.
    """

    def __init__(self, codebook_size: int, num_codebooks: int = 1, **kwargs: Any) -> None:
        for name, value in (("codebook_size", codebook_size), ("num_codebooks", num_codebooks)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, allowed: integers from 1 on.")
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(predictions=datasets.Array2D((self.num_codebooks, None), "int64")),
        )

    def new_accumulators(self) -> dict[str, CodewordCounts]:
        return {"counts": CodewordCounts(torch.zeros(self.num_codebooks, self.codebook_size, dtype=torch.int64))}

    def update(self, predictions: Any, references: Any) -> None:
        if references is not None:
            raise ValueError("`references` are given, allowed: predictions only.")
        indices = check_batch(predictions, "predictions", f"(B, {self.num_codebooks}, T)")
        if indices.shape[1] != self.num_codebooks:
            raise ValueError(
                f"`predictions` has shape {tuple(indices.shape)}, allowed: (B, {self.num_codebooks}, T) for"
                f" {self.num_codebooks} codebooks."
            )
        if indices.dtype.is_floating_point or indices.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise ValueError(f"`predictions` has dtype {indices.dtype}, allowed: integers.")
        indices = indices.long()
        lowest, highest = indices.min().item(), indices.max().item()
        if lowest < 0 or highest >= self.codebook_size:
            raise ValueError(
                f"`predictions` holds indices from {lowest} to {highest}, allowed: 0 to {self.codebook_size - 1}."
            )
        counts = [codebook.flatten().bincount(minlength=self.codebook_size) for codebook in indices.unbind(1)]
        self.accumulators["counts"].merge(CodewordCounts(torch.stack(counts)))

    def result(self, accumulators: dict[str, CodewordCounts]) -> dict[str, Any]:
        counts = accumulators["counts"].counts
        num_tokens = counts.sum().item()
        if num_tokens == 0:
            raise ValueError("No `predictions` were added, at least one is needed.")
        usage, perplexity = codebook_statistics(counts)
        return {
            "codebook_usage": usage,
            "codebook_perplexity": perplexity.mean().item(),
            "codebook_perplexity_per_codebook": perplexity.tolist(),
            "num_tokens": num_tokens,
        }
