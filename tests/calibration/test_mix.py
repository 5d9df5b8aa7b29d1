"""Calibration on several texts with weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer

from secateur.calibration.run_windows import load_calibration
from secateur.calibration.windows import WindowPlan, save_windows, shares
from secateur.errors import RecipeError
from secateur.recipes.shared import parts_of


def test_texts_and_weights(tmp_path: Path) -> None:
    assert parts_of("c4") == (("c4", 1.0),)
    assert parts_of("a.txt=3, b.jsonl ,hub:x/y@main=0.5") == (
        ("a.txt", 3.0), ("b.jsonl", 1.0), ("hub:x/y@main", 0.5),
    )  # fmt: skip
    odd = tmp_path / "a,b=2.txt"
    odd.write_text("x")
    assert parts_of(str(odd)) == ((str(odd), 1.0),)


@pytest.mark.parametrize("source", ["a,,b", "a=0,b", "a=-1", "a=x,b", "a=inf,b", "=2,b", "a=nan"])
def test_bad_weights_are_refused(source: str) -> None:
    with pytest.raises(RecipeError, match="weight above 0"):
        parts_of(source)


def test_a_text_named_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="names a text twice"):
        parts_of("a=1,b,a")


def test_windows_are_divided_by_weight() -> None:
    assert shares(10, (1.0, 1.0, 1.0)) == [4, 3, 3]
    assert shares(128, (0.5, 0.25, 0.25)) == [64, 32, 32]
    assert shares(2, (100.0, 1.0)) == [2, 0]


def test_windows_of_several_texts(tmp_path: Path) -> None:
    """Each text gives its share; the seed draws the order."""
    tokenizer = tiny_tokenizer()
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(letter * 4000)
    source = f"{tmp_path / 'a.txt'}=3,{tmp_path / 'b.txt'}"
    plan = WindowPlan(windows=16, sequence_length=20, seed=3)
    windows, record = load_calibration(source, tokenizer, plan, vocab_size=96)
    a, b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
    kinds = [
        "a" if bool((row == a).any()) else "b" if bool((row == b).any()) else "" for row in windows
    ]
    assert (kinds.count("a"), kinds.count("b")) == (12, 4)
    assert kinds != sorted(kinds)
    assert record["samples"] == 16
    assert [t["samples"] for t in record["texts"]] == [12, 4]
    again, other = (
        load_calibration(source, tokenizer, p, vocab_size=96)[0]
        for p in (plan, WindowPlan(windows=16, sequence_length=20, seed=4))
    )
    assert torch.equal(again, windows)
    assert not torch.equal(other, windows)


def test_ready_windows_and_empty_shares_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 4000)
    save_windows(torch.ones(2, 4, dtype=torch.int64), tmp_path / "w.safetensors")
    plan, tokenizer = WindowPlan(windows=4, sequence_length=20), tiny_tokenizer()
    for other, what in (
        (tmp_path / "w.safetensors", "ready windows"),
        ("c4=0.01", "none of the 4"),
    ):
        with pytest.raises(RecipeError, match=what):
            load_calibration(f"{tmp_path / 'a.txt'},{other}", tokenizer, plan, vocab_size=96)
