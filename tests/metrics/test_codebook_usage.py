"""`softvq_hf.metrics.codebook_usage`: counts of codewords, their share and perplexity."""

import math

import pytest
import torch

from softvq_hf.metrics.codebook_usage import CodebookUsage, codebook_statistics


def test_known_counts():
    counts = torch.tensor([[4, 4, 0, 0], [8, 0, 0, 0], [1, 1, 1, 1], [1, 3, 0, 0]])
    usage, perplexity = codebook_statistics(counts)
    assert usage == (2 + 1 + 4 + 2) / 16
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    expected = [2.0, 1.0, 4.0, (-(shares * shares.log()).sum()).exp().item()]
    assert perplexity.dtype == torch.float64 and perplexity.tolist() == pytest.approx(expected, rel=1e-12)


def test_result_of_indices():
    # codebook 0 chooses 0, 0, 1, 1 and codebook 1 always 2
    indices = torch.tensor([[[0, 1], [2, 2]], [[1, 0], [2, 2]]])
    result = CodebookUsage(codebook_size=4, num_codebooks=2).compute(predictions=indices)
    assert result["codebook_usage"] == 3 / 8 and result["num_tokens"] == 8
    assert result["codebook_perplexity_per_codebook"] == pytest.approx([2.0, 1.0])
    assert result["codebook_perplexity"] == pytest.approx(1.5)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_any_batches_give_the_same(batch_size):
    indices = torch.randint(0, 32, (50, 2, 6))
    expected = CodebookUsage(32, 2).compute(predictions=indices)
    metric = CodebookUsage(32, 2)
    for batch in indices.split(batch_size):
        metric.add_batch(predictions=batch)
    assert metric.compute() == expected
    choices = [indices[:, k].flatten().tolist() for k in range(2)]
    assert expected["codebook_usage"] == sum(len(set(codebook)) for codebook in choices) / 64
    for codebook, perplexity in zip(choices, expected["codebook_perplexity_per_codebook"], strict=True):
        shares = [codebook.count(code) / len(codebook) for code in set(codebook)]
        assert perplexity == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))

    # what was computed is forgotten
    assert metric.compute(predictions=indices[:1])["num_tokens"] == 12


def test_accepts_arrays_single_samples_and_other_integers():
    indices = torch.randint(0, 8, (4, 1, 5))
    expected = CodebookUsage(8).compute(predictions=indices)
    for dtype in ("int32", "uint16", "uint32", "uint64", ">i8"):
        assert CodebookUsage(8).compute(predictions=indices.numpy().astype(dtype)) == expected
    metric = CodebookUsage(8)
    for sample in indices:
        metric.add(prediction=sample)
    assert metric.compute() == expected


@pytest.mark.parametrize(
    "predictions, message",
    [
        (torch.zeros(2, 1, 3, dtype=torch.int64), r"shape \(2, 1, 3\), allowed: \(B, 2, T\)"),
        (torch.zeros(2, 3, dtype=torch.int64), r"shape \(2, 3\), allowed: \(B, 2, T\)"),
        (torch.zeros(0, 2, 3, dtype=torch.int64), r"shape \(0, 2, 3\)"),
        (torch.full((1, 2, 3), 8), "indices from 8 to 8, allowed: 0 to 7"),
        (torch.full((1, 2, 3), -1), "indices from -1 to -1, allowed: 0 to 7"),
        (torch.zeros(1, 2, 3), "dtype torch.float32, allowed: integers"),
        (torch.zeros(1, 2, 3, dtype=torch.bool), "dtype torch.bool, allowed: integers"),
        ([], "holds no sample"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"shapes \[\(2, 3\), \(2, 4\)\]"),
        ([[0, 1]], "allowed: tensors and arrays"),
        (3, "of type int"),
    ],
)
def test_refuses(predictions, message):
    metric = CodebookUsage(codebook_size=8, num_codebooks=2)
    good = torch.randint(0, 8, (2, 2, 3))
    metric.add_batch(predictions=good)
    with pytest.raises(ValueError, match=f"`predictions`.*{message}"):
        metric.add_batch(predictions=predictions)
    # what was refused has left nothing behind
    assert metric.compute() == CodebookUsage(8, 2).compute(predictions=good)


@pytest.mark.parametrize("size", ["a", 2.5, None, -1])
@pytest.mark.parametrize("name", ["codebook_size", "num_codebooks"])
def test_refuses_sizes_that_are_no_integers(name, size):
    with pytest.raises(ValueError, match=f"`{name}` is {size!r}, allowed: integers from 1 on"):
        CodebookUsage(**{"codebook_size": 4, "num_codebooks": 1, name: size})


def test_refuses_references_and_nothing():
    with pytest.raises(ValueError, match="`references` are given"):
        CodebookUsage(8).add_batch(predictions=torch.zeros(1, 1, 1, dtype=torch.int64), references=torch.zeros(1))
    with pytest.raises(ValueError, match="No `predictions` were added"):
        CodebookUsage(8).compute()
    with pytest.raises(ValueError, match="`codebook_size` is 0, allowed: integers from 1 on"):
        CodebookUsage(codebook_size=0)
    with pytest.raises(ValueError, match="`num_codebooks` is 0, allowed: integers from 1 on"):
        CodebookUsage(codebook_size=1, num_codebooks=0)
