"""The rows of one matrix, divided among processes, get the mask that the whole matrix gets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from secateur.parallel.ranks import Ranks
from secateur.sparsity.methods import compose
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.shared_rows import SharedRows, row_shares
from secateur.sparsity.solvers import Solution

T = TypeVar("T")


class Threads(Ranks):
    """Processes of one machine, as threads."""

    def __init__(self, rank: int, count: int, meeting: threading.Barrier, shown: list[Any]) -> None:
        super().__init__(rank, count, count)
        self.meeting, self.shown = meeting, shown

    def seen(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all threads."""
        self.shown[self.rank] = tensor.clone()
        self.meeting.wait()
        found = list(self.shown)
        self.meeting.wait()
        return found

    def total(self, tensor: Tensor) -> None:
        """Replace a tensor in place by its sum over all threads."""
        tensor.copy_(sum(self.seen(tensor)))

    def share(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor in place by the one of a thread."""
        tensor.copy_(self.seen(tensor)[owner])


def in_each(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """What some work returns in each of several threads."""
    meeting, shown = threading.Barrier(count, timeout=60), [None] * count
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda i: work(Threads(i, count, meeting, shown)), range(count)))


def scores_of(kind: str, shape: tuple[int, int]) -> Tensor:
    """Scores without ties, with many, or with zeros of both signs and infinities."""
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(shape, generator=draw)
    if kind == "ties":
        return score.mul(2).round()
    if kind == "odd":
        score[::3] = 0.0
        score[1::3] = -0.0
        score[2, :5], score[5, :5] = torch.inf, -torch.inf
    return score


@pytest.mark.parametrize("kind", ["plain", "ties", "odd"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_mask_of_shared_rows_is_that_of_the_matrix(kind: str, pattern: str, count: int) -> None:
    score, of = scores_of(kind, (200, 24)), parse_pattern(pattern)
    shares = row_shares(200, count)
    for sparsity in [of.sparsity] if of.sparsity else [0.0, 0.2, 0.5, 0.703]:

        def own(ranks: Ranks, sparsity: float = sparsity) -> Tensor:
            return SharedRows(of, 200, ranks).mask(score[shares[ranks.rank]], sparsity)

        assert torch.equal(torch.cat(in_each(count, own)), of.mask(score, sparsity))


def test_rows_that_compete_for_themselves_need_no_sums() -> None:
    of = parse_pattern("unstructured", "row")
    score = scores_of("ties", (130, 8))
    masks = [SharedRows(of, 130, Ranks(0, 2)).mask(score[rows], 0.5) for rows in row_shares(130, 2)]
    assert torch.equal(torch.cat(masks), of.mask(score, 0.5))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_row_has_one_process(count: int) -> None:
    for rows in (1, 63, 64, 65, 576, 4096):
        shares = row_shares(rows, count)
        assert [row for share in shares for row in range(share.start, share.stop)] == [*range(rows)]


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"bits": 4, "group": 32}], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
def test_processes_solve_one_linear_together(
    name: str, pattern: str, options: dict[str, Any]
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(300, 96, generator=draw), torch.randn(500, 96, generator=draw)
    statistics = {"gram": inputs.t() @ inputs}
    method = compose(name, pattern, **options)
    assert method.by_rows
    alone = method.solve(weight, method.prepare(statistics), statistics, 0.5)

    def own(ranks: Ranks) -> Solution:
        prepared = method.prepare(statistics, ranks)
        return method.solve(weight, prepared, statistics, 0.5, ranks)

    for found in in_each(3, own):
        assert torch.equal(found.mask, alone.mask)
        assert torch.equal(found.weight, alone.weight)
        assert float(found.error) == pytest.approx(float(alone.error), rel=1e-9)


def test_a_method_whose_score_needs_all_rows_is_not_solved_in_rows() -> None:
    assert not compose("ria", "unstructured").by_rows
    assert not compose("alps", "unstructured", score="ria").by_rows
    assert not compose("sparsegpt", "16x1").by_rows
