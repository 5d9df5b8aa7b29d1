"""`secateur generate` and `secateur chat`: text from stdin, and a conversation on a terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

from secateur.steps.generate import Conversation


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model without a chat template."""
    return save_tiny(tmp_path / "m", "llama", head_dim=16, max_position_embeddings=128)


class Terminal(io.StringIO):
    """Input that is typed."""

    def isatty(self) -> bool:
        return True


def test_the_prompt_comes_from_stdin(secateur, model: Path, monkeypatch) -> None:
    given = secateur("generate", model, "--prompt", "abc", "--max-new-tokens", 6)
    for stdin in (io.StringIO("abc\n"), Terminal("abc\n")):
        monkeypatch.setattr(sys, "stdin", stdin)
        read = secateur("generate", model, "--max-new-tokens", 6)
        assert read.code == 0
        assert read.out == given.out
        assert read.out.startswith("abc")
        assert ("secateur chat" in read.err) == stdin.isatty()


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_conversation(secateur, model: Path, monkeypatch, kind) -> None:
    """Typed, or from a file."""
    answer = secateur("generate", model, "--prompt", "abc", "--max-new-tokens", 6).out
    words = "abc\n\n/what\n/reset\nabc\n" + "x" * 200 + "\n/exit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", kind(words))
    talked = secateur("chat", model, "--max-new-tokens", 6)
    assert talked.code == 0
    new = answer.removeprefix("abc").strip("\n")
    assert talked.out.count(new) == 2
    typed = kind is Terminal
    assert ("no chat template" in talked.err) == typed
    assert talked.err.count("/exit or Ctrl-D") == 1 + typed  # for /what, and at the beginning
    assert "128 positions" in talked.err  # and it goes on
    assert talked.err.count("tokens/s") == 2


def test_answers_as_json(secateur, model: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\nabd\n"))
    talked = secateur("chat", model, "--max-new-tokens", 6, "--json")
    found, decoder = [], json.JSONDecoder()
    rest = talked.out.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].strip()
    assert [value["prompt"] for value in found] == ["abc", "abd"]
    assert all(value["tokens"] == 6 for value in found)


def test_ctrl_c_stops_an_answer_and_not_the_program(secateur, model, monkeypatch) -> None:
    say = Conversation.say

    def interrupted(self, prompt, tell):
        if prompt == "stop":
            tell("half")
            raise KeyboardInterrupt
        return say(self, prompt, tell)

    monkeypatch.setattr(Conversation, "say", interrupted)
    monkeypatch.setattr(sys, "stdin", Terminal("stop\nabc\n"))
    talked = secateur("chat", model, "--max-new-tokens", 6)
    assert talked.code == 0
    assert "half" in talked.out
    assert "(stopped" in talked.err
    assert talked.err.count("tokens/s") == 1


def test_the_end_of_the_input_ends_it(secateur, model: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert secateur("chat", model).code == 0


def test_it_says_what_comes_from_the_model(secateur, model: Path) -> None:
    file = model / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "top_p": 0.8}))
    done = secateur("generate", model, "--prompt", "a", "--max-new-tokens", 2)
    assert "top_p 0.8, temperature 1.0" in done.err
    done = secateur("generate", model, "--prompt", "a", "--temperature", 0, "--top-p", 1)
    assert "generation_config" not in done.err
