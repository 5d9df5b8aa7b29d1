"""The page of claims is what its script writes; only measured numbers are called ours."""

from __future__ import annotations

import json
import re

import pytest
import yaml

import guide_claims

ROOT = guide_claims.ROOT


def test_the_page_is_up_to_date() -> None:
    """If not: `python tools/guide_claims.py`."""
    assert (ROOT / guide_claims.PAGE).read_text(encoding="utf-8") == guide_claims.page()


def test_all_claims_of_the_survey_are_there() -> None:
    assert len(re.findall(r"^\*\*\d+\. Guides say:\*\*", guide_claims.page(), re.M)) == 54


def test_a_number_is_the_mean_of_the_rows() -> None:
    """Looked up here in another way."""
    rows = json.loads((ROOT / "benchmarks/results/presets.json").read_text())["rows"]
    best = [
        r["perplexity"]["wikitext2"] for r in rows if (r["row"], r["column"]) == ("best", "50 %")
    ]
    words = "presets | row=best; column=50 % | perplexity.wikitext2 | .1f"
    assert len(best) == 1
    assert guide_claims.found(words) == ("presets", f"{best[0]:.1f}")


def test_the_second_value_is_taken_off() -> None:
    words = "trainers | way=lora, our merge | zeros_kept | way=weights | zeros_kept | .1f"
    assert guide_claims.found(words) == ("trainers", "1.0")


def test_a_number_that_no_row_has_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"presets\.json has no row with row=nobody"):
        guide_claims.found("presets | row=nobody | perplexity.wikitext2 | .1f")


def test_a_claim_without_a_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="claim 7 names no source"):
        list(guide_claims.entry({"number": 7, "claim": "", "right": "It is 3.", "source": ""}, 1))


def test_measured_is_only_what_is_looked_up() -> None:
    """A text that says that we measured has a number from a benchmark."""
    topics = yaml.safe_load((ROOT / guide_claims.CLAIMS).read_text(encoding="utf-8"))
    ours = re.compile(r"\b(?:[Ww]e measured|SmolLM2|[Oo]urs?\b|a small model|On one CPU)")
    for claims in topics.values():
        for claim in claims:
            assert not ours.search(claim["right"]) or "{" in claim["right"], claim["claim"]
