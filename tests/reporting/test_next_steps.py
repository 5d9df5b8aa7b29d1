"""The commands at the end of a result name real folders, and flags that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from secateur.reporting.results.next_steps import (
    after_a_dense_folder,
    after_a_packed_folder,
    after_a_sweep,
)
from secateur.reporting.tables import plain_text

FOLDER = Path("runs/my model")
ENDS = {
    "dense": after_a_dense_folder(FOLDER, "some/model"),
    "packed": after_a_packed_folder(FOLDER, None),
    "sweep": after_a_sweep(FOLDER, "some/model"),
}


@pytest.mark.parametrize("end", ENDS)
def test_commands_can_be_run_as_they_are_written(secateur, end: str) -> None:
    text = plain_text(ENDS[end])
    commands = re.findall(r"secateur (\w+) (.*)", text)
    assert commands
    for verb, words in commands:
        known = secateur(verb, "--help").out
        for flag in re.findall(r"(?<!\S)--[a-z0-9-]+", words):
            assert flag in known, f"secateur {verb} {flag}"
        if end != "sweep":
            assert words.startswith("'runs/my model'"), words


def test_the_dense_model_is_named_where_it_is_known() -> None:
    assert "--dense some/model" in plain_text(ENDS["dense"])
    assert "--dense" not in plain_text(ENDS["packed"])


def test_a_report_names_what_is_where() -> None:
    assert f"the packed model: {FOLDER}" in plain_text(ENDS["packed"])
