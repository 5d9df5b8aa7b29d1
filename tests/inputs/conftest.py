"""A command run in this process, and what it printed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from commands import Outcome


@pytest.fixture
def refused(run: Callable[..., Outcome]) -> Callable[..., str]:
    """Run a command that has to be refused, and give what it said; `codes` has its exit codes."""
    codes: list[int] = []

    def refused(*words: object) -> str:
        done = run(*words)
        codes.append(done.code)
        assert done.code in (1, 2), done
        assert ("\n" + done.err).count("\nerror: ") == 1, done.err
        assert "fault in secateur" not in done.err
        said = ("remedy: ", " should ", "must be ", "unknown key")  # pydantic says what should be
        assert any(words in done.err for words in said), done.err
        return done.err

    refused.codes = codes  # type: ignore[attr-defined]
    return refused
