"""Dynamic batch loading: proportions follow losses, and windows take turns."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.errors import NumericalError, RecipeError
from secateur.training.domains import DomainLoading

WINDOWS = {"code": torch.zeros(30, 4).long(), "prose": torch.arange(10)[:, None].expand(10, 4) + 1}
REFERENCES = {"code": 1.0, "prose": 2.0}


def test_proportions_follow_the_formula():
    loading = DomainLoading(WINDOWS, REFERENCES)
    assert loading.proportions == {"code": 0.75, "prose": 0.25}
    loading.update({"code": 0.5, "prose": 2.6})
    loading.update({"code": 1.2, "prose": 2.1})
    code, prose = 0.75 * math.exp(0.2), 0.25 * math.exp(0.6 + 0.1)
    assert loading.proportions["code"] == pytest.approx(code / (code + prose))
    assert sum(loading.proportions.values()) == pytest.approx(1)
    loading.update({"code": 5000.0, "prose": 2.0})
    assert loading.proportions == {"code": 1.0, "prose": 0.0}


def test_batches_have_these_proportions_and_all_windows_take_turns():
    loading = DomainLoading(WINDOWS, REFERENCES, proportions={"code": 1.0, "prose": 3.0})
    batches = list(loading.batches(8, 500))
    assert {tuple(b.shape) for b in batches} == {(8, 4)}
    prose = [int(row[0]) for b in batches for row in b if int(row[0])]
    assert len(prose) / 4000 == pytest.approx(0.75, abs=0.03)
    for start in range(0, len(prose) - 10, 10):
        assert sorted(prose[start : start + 10]) == list(range(1, 11))
    again = DomainLoading(WINDOWS, REFERENCES, proportions={"code": 1.0, "prose": 3.0})
    assert all(torch.equal(a, b) for a, b in zip(batches, again.batches(8, 500), strict=True))


def test_an_update_changes_the_batches_to_come():
    loading = DomainLoading(WINDOWS, REFERENCES)
    batches = loading.batches(64, 2)
    first = next(batches)
    loading.update({"code": 1.0, "prose": 12.0})
    assert bool((first[:, 0] == 0).any())
    assert not bool((next(batches)[:, 0] == 0).any())


@pytest.mark.parametrize(
    ("windows", "references", "proportions", "said"),
    [
        ({}, {}, None, "at least one"),
        (WINDOWS, {"code": 1.0}, None, "same domains"),
        (WINDOWS, REFERENCES, {"code": 1.0, "prose": 0.0}, "'prose' has 10 windows"),
        ({"code": torch.zeros(0, 4).long()}, {"code": 1.0}, {"code": 1.0}, "'code' has 0 windows"),
    ],
)
def test_refuses_what_cannot_be(windows, references, proportions, said):
    with pytest.raises(RecipeError, match=said):
        DomainLoading(windows, references, proportions=proportions)


def test_refuses_a_loss_that_is_not_a_number():
    with pytest.raises(NumericalError, match="'prose' is nan"):
        DomainLoading(WINDOWS, REFERENCES).update({"code": 1.0, "prose": math.nan})
