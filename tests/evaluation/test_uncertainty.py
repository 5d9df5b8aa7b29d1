"""Standard errors, pairs, chance and retention: by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.evaluation.perplexity import fingerprint, judged_part, protocol_id
from secateur.evaluation.uncertainty import compare, retention, standard_error


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_standard_error(values: list[float]) -> None:
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(expected, abs=1e-12)


def test_one_value_has_no_error() -> None:
    assert standard_error([0.3]) is None
    compared = compare([1.0], [0.0], 0.25)
    assert (compared.difference, compared.difference_standard_error, compared.significant) == (
        1.0,
        None,
        None,
    )
    assert compared.retention is None


def test_pairs_by_hand() -> None:
    model = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    dense = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    compared = compare(model, dense, 0.25)
    # differences 0 −1 0 −1 0 0 −1 −1: mean −1/2, variance 8 · 1/4 / 7, error √(2/7/8)
    assert compared.difference == -0.5
    assert compared.difference_standard_error == pytest.approx(math.sqrt(2 / 7 / 8))
    assert compared.significant is True
    assert compared.reference_value == 7 / 8
    assert compared.retention == pytest.approx((3 / 8 - 1 / 4) / (7 / 8 - 1 / 4))


def test_pairs_see_what_two_scores_do_not() -> None:
    """300 items of 1000 are right for both models; the pruned one loses ten of them."""
    dense = [1.0] * 300 + [0.0] * 700
    model = [0.0] * 10 + [1.0] * 290 + [0.0] * 700
    compared = compare(model, dense, 0.25)
    apart = math.hypot(standard_error(dense), standard_error(model))
    assert abs(compared.difference) < 1.96 * apart
    assert compared.significant is True


QUANTILES = {
    1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 7: 2.36462, 9: 2.26216, 10: 2.22814,
    20: 2.08596, 30: 2.04227, 60: 2.00030, 99: 1.98422, 120: 1.97993, 1000: 1.96234, 9999: 1.96020,
}  # fmt: skip
"""t with 95 % of the distribution within ±t, by degrees of freedom; from tables."""


@pytest.mark.parametrize(("degrees", "t"), QUANTILES.items())
def test_student_t_against_tables(degrees: int, t: float) -> None:
    count = degrees + 1
    around = [1.0, -1.0] * (count // 2) + [0.0] * (count % 2)  # of mean 0
    error = standard_error(around)
    assert error is not None
    for factor in (1 - 2e-5, 1 + 2e-5):
        found = compare([t * factor * error + x for x in around], [0.0] * count, 0.0)
        assert found.significant is (factor > 1)


def test_few_items_need_a_larger_difference() -> None:
    """Three pairs and six, both at 3 standard errors, which would do for very many."""
    three, six = 1 / math.sqrt(3), math.sqrt(5) / 3
    for differences, significant in (
        ([1.0, 1.0 + three, 1.0 - three], False),  # 4.30 are needed
        ([1.0 + six, 1.0 - six] * 3, True),  # 2.57 are needed
    ):
        found = compare(differences, [0.0] * len(differences), 0.0)
        assert found.difference / found.difference_standard_error == pytest.approx(3.0)
        assert found.significant is significant


def test_the_edge_of_significance() -> None:
    assert compare([0.0, 1.0] * 10, [1.0, 0.0] * 10, 0.5).significant is False
    same = compare([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], 0.0)
    assert (same.difference, same.difference_standard_error, same.significant) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("value", "reference", "error", "chance", "expected"),
    [
        (0.40, 0.55, 0.02, 0.25, 0.5),
        (0.55, 0.55, 0.02, 0.25, 1.0),
        (0.20, 0.55, 0.02, 0.25, -1 / 6),
        (0.40, 0.29, 0.02, 0.25, None),  # two standard errors from chance, no more
        (0.40, 0.20, 0.02, 0.25, None),  # below chance
        (0.40, 0.55, None, 0.25, None),  # a single item
        (0.30, 0.60, 0.02, 0.0, 0.5),
    ],
)
def test_retention(value, reference, error, chance, expected) -> None:
    found = retention(value, reference, error, chance)
    assert found == (None if expected is None else pytest.approx(expected))


def test_not_the_same_items() -> None:
    with pytest.raises(RecipeError, match="2 items"):
        compare([1.0, 0.0], [1.0], 0.5)


def test_protocol_ids_are_of_the_content() -> None:
    protocol = {"dataset": "a.txt", "join": "x", "windows": 3, "token_ids": "00", "dtype": "f"}
    named = protocol_id("ppl", protocol)
    assert named.startswith("ppl-")
    assert named.endswith("-f")
    assert len(judged_part(named)) == 12
    assert protocol_id("ppl", {**protocol, "dataset": "b.txt"}) == named
    assert protocol_id("ppl", {**protocol, "activations": "none"}) == named
    computed = {"dtype": "bfloat16", "activations": "int8 g64"}
    assert protocol_id("ppl", {**protocol, **computed}) == (
        f"{judged_part(named)}-bfloat16-int8g64"
    )
    assert protocol_id("ppl", {**protocol, "windows": 4}) != named
    assert protocol_id("div", protocol)[4:] != named[4:]


def test_fingerprints() -> None:
    ids = torch.arange(12)
    assert fingerprint(ids.view(3, 4)) != fingerprint(ids.view(4, 3))
    assert fingerprint(ids.view(3, 4)) == fingerprint(ids.view(3, 4).clone())
    assert fingerprint(["a", "b"]) != fingerprint(["ab"])
