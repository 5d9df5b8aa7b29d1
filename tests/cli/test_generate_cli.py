"""`secateur generate` without a prompt: text from stdin, and a conversation on a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model without a chat template."""
    return save_tiny(tmp_path / "m", "llama", head_dim=16, max_position_embeddings=128)


class Terminal(io.StringIO):
    """Input that is typed."""

    def isatty(self) -> bool:
        return True


def test_off_a_terminal_the_prompt_comes_from_stdin(secateur, model: Path, monkeypatch) -> None:
    given = secateur("generate", model, "--prompt", "abc", "--max-new-tokens", 6)
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
    read = secateur("generate", model, "--max-new-tokens", 6)
    assert read.code == 0
    assert read.out == given.out
    assert read.out.startswith("abc")


def test_on_a_terminal_it_is_a_conversation(secateur, model: Path, monkeypatch) -> None:
    answer = secateur("generate", model, "--prompt", "abc", "--max-new-tokens", 6).out
    words = "abc\n\n/what\n/new\nabc\n" + "x" * 200 + "\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", Terminal(words))
    talked = secateur("generate", model, "--max-new-tokens", 6)
    assert talked.code == 0
    new = answer.removeprefix("abc").strip("\n")
    assert talked.out.count(new) == 2
    assert "each line is a text to continue" in talked.err
    assert talked.err.count("/quit or Ctrl-D") == 2  # at the beginning, and for /what
    assert "the model has 128 positions" in talked.err  # and it goes on
    assert talked.err.count("tokens/s") == 2


def test_the_end_of_the_input_ends_it(secateur, model: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert secateur("generate", model).code == 0


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_temperature_must_be_a_number(secateur, model: Path, value: str) -> None:
    refused = secateur("generate", model, "--prompt", "a", "--temperature", value)
    assert refused.code == 2
    assert "temperature" in refused.err
