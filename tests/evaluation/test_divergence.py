"""Divergence against an oracle in float64, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from zoo import tiny_model, tiny_windows

from secateur.errors import NumericalError, RecipeError
from secateur.evaluation import perplexity as room
from secateur.evaluation.divergence import divergence, divergence_of_texts
from secateur.evaluation.perplexity import perplexity


def oracle(model: nn.Module, reference: nn.Module, windows: torch.Tensor) -> list[list[float]]:
    """[KL, agreement, acceptance, loss change] of each window: a forward a token, in float64."""
    model, reference = model.double(), reference.double()
    found = []
    with torch.no_grad():
        for window in windows:
            sums = [0.0, 0.0, 0.0, 0.0]
            for t in range(1, len(window)):
                q = torch.softmax(model(window[None, :t]).logits[0, -1], -1).tolist()
                p = torch.softmax(reference(window[None, :t]).logits[0, -1], -1).tolist()
                sums[0] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                sums[1] += p.index(max(p)) == q.index(max(q))
                sums[2] += sum(map(min, p, q))
                sums[3] += math.log(p[window[t]] / q[window[t]])
            found.append([value / (len(window) - 1) for value in sums])
    model.float(), reference.float()
    return found


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """Two models that differ as a pruned and a dense one do."""
    torch.manual_seed(3)
    model, reference = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(torch.rand_like(weight) > 0.3)
    return model, reference


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_against_the_oracle(family: str, chunk_tokens: int, monkeypatch) -> None:
    model, reference = pair(family)
    windows = tiny_windows(5, 9)
    monkeypatch.setattr(room, "LOGITS_BYTES", 96 * 4 * chunk_tokens)
    got = divergence(model, reference, windows, batch_size=2)
    expected = oracle(model, reference, windows)
    for column, (mean, error) in enumerate(
        [
            (got.kl, got.kl_standard_error),
            (got.top1_agreement, got.top1_standard_error),
            (got.acceptance, got.acceptance_standard_error),
            (got.loss_change, got.loss_change_standard_error),
        ]
    ):
        values = [row[column] for row in expected]
        middle = sum(values) / 5
        spread = math.sqrt(sum((v - middle) ** 2 for v in values) / 4 / 5)
        assert mean == pytest.approx(middle, rel=1e-4, abs=1e-7)
        assert error == pytest.approx(spread, rel=1e-3, abs=1e-7)
    assert got.kl > 0
    assert got.tokens == 40


def test_its_perplexities_are_those_of_perplexity() -> None:
    model, reference = pair("llama")
    windows = tiny_windows(4, 12)
    got = divergence(model, reference, windows)
    assert got.model.mean_loss == pytest.approx(perplexity(model, windows).mean_loss, rel=1e-6)
    assert got.reference.mean_loss == pytest.approx(
        perplexity(reference, windows).mean_loss, rel=1e-6
    )
    assert got.loss_change == pytest.approx(got.model.mean_loss - got.reference.mean_loss)


def test_a_model_has_not_moved_from_itself() -> None:
    model = tiny_model("qwen2")
    steps: list[tuple[int, int]] = []
    got = divergence(
        model, model, tiny_windows(1, 8), progress=lambda done, total: steps.append((done, total))
    )
    assert (got.kl, got.top1_agreement, got.loss_change) == (0.0, 1.0, 0.0)
    assert got.acceptance == pytest.approx(1, abs=1e-6)
    assert got.kl_standard_error is None
    assert steps == [(1, 1)]


def test_texts_of_different_lengths_count_alike() -> None:
    model, reference = pair("llama")
    texts = [(tiny_windows(1, 12)[0, :n], given) for n, given in ((12, 5), (7, 2), (9, 1))]
    got = divergence_of_texts(model, reference, texts)
    alone = [divergence(model, reference, ids[None], start_tokens=n) for ids, n in texts]
    for name in ("kl", "top1_agreement", "acceptance", "loss_change"):
        values = [getattr(one, name) for one in alone]
        assert getattr(got, name) == pytest.approx(sum(values) / 3)
        error = getattr(got, f"{name.removesuffix('_agreement')}_standard_error")
        assert error == pytest.approx(torch.tensor(values).std().item() / math.sqrt(3), rel=1e-4)
    assert got.tokens == 7 + 5 + 8


def test_other_vocabulary() -> None:
    class Table(nn.Module):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.table = nn.Embedding(96, vocabulary)

        def forward(self, ids):
            return self.table(ids)

    with pytest.raises(RecipeError, match="vocabularies of 96 and 90"):
        divergence(Table(96), Table(90), tiny_windows(2, 6))


def test_not_a_number() -> None:
    model, reference = pair("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="window 0 of 2"):
        divergence(model, reference, tiny_windows(2, 6))


def test_progress_moves_within_a_short_text() -> None:
    model, steps = tiny_model("llama"), list[int]()
    windows = tiny_windows(8, 9)  # one forward could hold them all
    divergence(model, model, windows, progress=lambda done, _: steps.append(done))
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
