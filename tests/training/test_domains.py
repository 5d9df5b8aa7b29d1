"""Dynamic batch loading: proportions follow losses, and a resumed run reads the same windows."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.errors import NumericalError, RecipeError
from secateur.training.batches import Batches, DomainLoading

WINDOWS = {"code": torch.zeros(30, 4).long(), "prose": torch.arange(10)[:, None].expand(10, 4) + 1}
REFERENCES = {"code": 1.0, "prose": 2.0}
TOGETHER = torch.cat(list(WINDOWS.values()))


def loading(losses=None, size=8, every=0, **options):
    known = losses or {"code": 1.0, "prose": 2.0}
    return DomainLoading(
        WINDOWS, REFERENCES, lambda model: known, size=size, every=every, **options
    )


def read(order, first, last):
    """The windows of some steps, as the training loop reads them."""
    batches, found = Batches(TOGETHER, order.size, 0, order), []
    for step in range(first, last):
        found.append(batches.micro(step, order.size, torch.device("cpu"))[0].ids)
        order.on_step(step + 1, 1000, None, None)
    return found


def test_proportions_follow_the_formula():
    order = loading()
    assert order.proportions == {"code": 0.75, "prose": 0.25}
    order.update({"code": 0.5, "prose": 2.6})
    order.update({"code": 1.2, "prose": 2.1})
    code, prose = 0.75 * math.exp(0.2), 0.25 * math.exp(0.6 + 0.1)
    assert order.proportions["code"] == pytest.approx(code / (code + prose))
    assert sum(order.proportions.values()) == pytest.approx(1)
    order.update({"code": 5000.0, "prose": 2.0})
    assert order.proportions == {"code": 1.0, "prose": 0.0}


def test_batches_have_these_proportions_and_all_windows_take_turns():
    order = loading()
    order.update({"code": 1.0, "prose": 2.0 + math.log(9)})  # 1 to 3
    batches = read(order, 0, 500)
    assert {tuple(b.shape) for b in batches} == {(8, 4)}
    prose = [int(row[0]) for b in batches for row in b if int(row[0])]
    assert len(prose) / 4000 == pytest.approx(0.75, abs=0.03)
    for start in range(0, len(prose) - 10, 10):
        assert sorted(prose[start : start + 10]) == list(range(1, 11))


def test_an_update_changes_the_batches_to_come():
    order = loading({"code": 1.0, "prose": 40.0}, size=64, every=3)
    batches = read(order, 0, 5)
    assert all(bool((b[:, 0] == 0).any()) for b in batches[:3])
    assert not any(bool((b[:, 0] == 0).any()) for b in batches[3:])


@pytest.mark.parametrize("stop", [1, 7, 8])
def test_a_resumed_run_reads_the_same(stop):
    losses = {"code": 1.1, "prose": 2.4}
    straight = read(loading(losses, every=4, seed=5), 0, 20)
    stopped = loading(losses, every=4, seed=5)
    first = read(stopped, 0, stop)
    resumed = loading(losses, every=4, seed=5)
    for name, value in stopped.state().items():
        resumed.state()[name].copy_(value)
    again = [*first, *read(resumed, stop, 20)]
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


@pytest.mark.parametrize(
    ("windows", "references", "said"),
    [
        ({}, {}, "at least one"),
        (WINDOWS, {"code": 1.0}, "same domains"),
        ({"code": torch.zeros(0, 4).long()}, {"code": 1.0}, "'code' has no windows"),
    ],
)
def test_refuses_what_cannot_be(windows, references, said):
    with pytest.raises(RecipeError, match=said):
        DomainLoading(windows, references, lambda model: {}, size=1)


def test_refuses_a_loss_that_is_not_a_number():
    with pytest.raises(NumericalError, match="'prose' is nan"):
        loading().update({"code": 1.0, "prose": math.nan})
