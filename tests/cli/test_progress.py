"""How progress is shown: lines off a terminal, a bar on one."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from secateur.cli.progress import ProgressLines, TerminalBar, show_progress, shown_note
from secateur.reporting.tables import duration


class Log:
    """Lines of a `ProgressLines` whose clock the test moves."""

    def __init__(self) -> None:
        self.now, self.lines = 0.0, list[str]()
        self.progress = ProgressLines(clock=lambda: self.now, write=self.lines.append)


Moment = tuple[float, int]
"""A time, and the steps that end then."""


@pytest.mark.parametrize(
    ("steps", "moments", "shown"),
    [
        (30, [(60, 10)], ["33% after 1 min 00 s, about 2 min 00 s left"]),
        (1, [(22, 0)], ["22 s so far"]),
        (8, [(5, 0)], ["0% after 5 s"]),  # no time left is invented before the first step
        (
            4,  # the time left does not rise with the clock, as it would for steps of many sizes
            [(20, 2), (25, 0), (60, 0), (100, 1)],
            [
                "50% after 20 s, about 20 s left",
                "50% after 25 s, about 15 s left",
                "50% after 1 min 00 s, about 10 s left",
                "75% after 1 min 40 s, about 33 s left",
            ],
        ),
    ],
)
def test_a_line_says_percent_time_and_time_left(
    steps: int, moments: list[Moment], shown: list[str]
) -> None:
    log = Log()
    log.progress.start("pruning", steps)
    for log.now, done in moments:
        if done:
            log.progress.step(done)
        log.progress.show()
    assert log.lines == [f"pruning: {line}" for line in shown]


def test_the_end_of_a_stage_is_reported_where_the_stage_was_shown() -> None:
    log = Log()
    log.progress.start("checking weights", 8)
    log.progress.finish()  # over before its first line
    log.progress.start("pruning", 8)
    log.now = 5.0
    log.progress.show()
    log.now = 9.0
    log.progress.finish()
    log.now = 14.0
    log.progress.show()
    assert log.lines == [
        "pruning: 0% after 5 s",
        "pruning: done in 9 s",
        "preparing: 5 s so far",
    ]


def test_lines_come_while_one_step_takes_long() -> None:
    second = threading.Event()
    lines: list[str] = []

    def write(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            second.set()

    with ProgressLines(interval_seconds=0.001, write=write) as progress:
        progress.start("one long step", 1)
        assert second.wait(60)
    count = len(lines)
    assert not progress.thread.is_alive()
    assert len(lines) == count


def test_a_pipe_gets_lines_even_where_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_progress() as progress:
        assert isinstance(progress, ProgressLines)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress() as progress:
        assert isinstance(progress, TerminalBar)
        progress.start("pruning", 4)
        progress.step(4)
        progress.finish()
        progress.start("reading", 1)  # of unknown length
        progress.step()
        progress.finish()
    assert "pruning" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.7, "1 min 00 s"), (3600, "1 h 00 min"), (86_400, "24 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("note", "shown"),
    [
        ("model.layers.6.self_attn.o_proj.weight", "layer 6, o_proj"),
        ("blk.11.ffn_down.weight", "layer 11, ffn_down"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.layers.2.mlp.experts.14.up_proj", "layer 2, expert 14, up_proj"),
        ("layer 6", "layer 6"),
        ("round 2: packed", "round 2: packed"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_the_name_of_a_tensor_is_shown_as_its_place(note: str, shown: str) -> None:
    assert shown_note(note) == shown
