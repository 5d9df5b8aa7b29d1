"""`draft --head`: its numbers are those of an oracle; kills resume, bad input is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import runner
from fixed_times import PARENT, drawing_time
from test_draft import TOKENS, parent, text
from tiny import save_tiny
from with_kernels import needs_kernels
from zoo import tiny_windows

import secateur
from secateur.calibration.continuation import continue_windows, opened_for_writing
from secateur.calibration.windows import load_windows, save_windows
from secateur.errors import ArchitectureError, RecipeError, SourceError
from secateur.models.draft_head import read_head
from secateur.reporting.fit import HeadResult
from secateur.steps import draft as drafts
from secateur.steps import draft_head as heads
from secateur.training import loop

pytestmark = needs_kernels

OPTIONS: dict[str, Any] = {"head": True, "heal_tokens": 960}

TOKEN = {"bfloat16": 0.3, "int8": 0.2, "int4": 0.25}
"""Seconds of a token of the head."""


@pytest.fixture(scope="module", autouse=True)
def fixed_times() -> Iterator[None]:
    """Times that are the same on every machine."""

    def turns(verify: Any, measured: list[Any]) -> Any:
        return PARENT, [x - 0.01 * n for x in TOKEN.values() for n in range(3)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "time_turns", turns)
        patch.setattr(drafts, "time_drawing", drawing_time)
        patch.setattr(drafts, "HEADS", (48, TOKENS))
        yield


def train(place: Path, output: Path, **options: Any) -> HeadResult:
    """Train a head of the model in a place."""
    found: Any = secateur.draft(
        place / "dense", output=output, calibration=place / "text.safetensors",
        **{**OPTIONS, **options},
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, windows, and a head of the model."""
    place = tmp_path_factory.mktemp("heads")
    parent(place / "dense"), text(place / "text.safetensors")
    train(place, place / "made")
    return place


@pytest.fixture
def result(place: Path) -> HeadResult:
    """What the head in `place` says."""
    return HeadResult.model_validate(json.loads((place / "made/secateur/draft.json").read_text()))


def test_the_folder_is_what_the_result_says(place: Path, result: HeadResult) -> None:
    head = read_head(place / "made")
    assert (len(head.ids), head.taps, head.values) == (
        result.head_tokens, result.taps, result.values,
    )  # fmt: skip
    assert {0, 1, 2, 3} <= set(head.ids.tolist())  # <pad>, <bos>, <eos> and <unk>
    assert result.formats.keys() == TOKEN.keys()
    best = max(result.formats, key=lambda one: result.formats[one].gain)
    assert (result.values, result.draft_seconds) == (best, result.formats[best].seconds)
    assert [one.tokens for one in result.heads] == [96, 48, TOKENS]
    assert result.tokens >= 960
    assert (place / "made" / "tokenizer.json").exists()


def test_it_learns(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, losses = loop.Loop.end, list[float]()

    def end(self: loop.Loop) -> None:
        real(self)
        losses.extend(line["loss"] for line in self.outcome.log)

    monkeypatch.setattr(loop.Loop, "end", end)
    monkeypatch.setattr(heads, "EPOCHS", 9)
    train(place, tmp_path / "made")
    steps = 9 * 24 // heads.BATCH
    assert len(losses) == steps
    assert losses[round(heads.ALONE * steps) - 1] < 0.8 * losses[0]


def test_acceptance_is_that_of_the_folder(place: Path, result: HeadResult) -> None:
    """By a loop over the chains in what the parent writes after the windows that judge."""
    writer = opened_for_writing(place / "dense", torch.device("cpu"), 40)
    windows = continue_windows(writer, load_windows(place / "text.safetensors")[10:12], 2, seed=0)
    model: Any = secateur.load(place / "dense")
    head, places = read_head(place / "made").float(), 7
    assert head.taps == (0, 1, 2)
    rates, same = torch.zeros(2, 33, places), torch.zeros(2, 33, places)
    ends: list[Any] = []  # what the last norm reads; the last of `hidden_states` is what it gives
    model.model.norm.register_forward_pre_hook(lambda _, inputs: ends.append(inputs[0]))
    with torch.no_grad():
        found = model(windows, output_hidden_states=True)
        p = found.logits.float().softmax(-1)
        states = torch.cat([*found.hidden_states[:2], ends[0]], -1).float()
        embedded = model.get_input_embeddings()(windows).float()
        for window in range(2):
            for t in range(33):
                chain = head(
                    states[window, None, : t + 1], embedded[window, None, 1 : t + 8], places
                )
                for i, logits in enumerate(chain):
                    own = torch.zeros(96)
                    own[head.ids] = logits[0, -1].softmax(-1)
                    rates[window, t, i] = torch.minimum(own, p[window, t + 1 + i]).sum()
                    same[window, t, i] = own.argmax() == p[window, t + 1 + i].argmax()
    for runs, each in ((result.acceptance.runs, rates), (result.acceptance.greedy_runs, same)):
        for i in range(places):
            assert runs[i] == pytest.approx(float(each[..., : i + 1].prod(-1).mean()), abs=0.02)


def test_a_finished_head_is_shown_again(place: Path, result: HeadResult) -> None:
    assert train(place, place / "made", resume=True) == result
    assert "temperature 1" in str(result)
    secateur.report([place / "made"], output=place / "page.html")
    assert f"{result.acceptance.mean:.3f}" in (place / "page.html").read_text()


@pytest.mark.parametrize("killed", [4, 11])  # of 12 steps, of which the last three train chains
def test_a_killed_run_makes_the_same_bytes(
    place: Path, tmp_path: Path, killed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = loop.Loop.step, 0

    def step(self: loop.Loop) -> None:
        nonlocal steps
        steps += 1
        if steps == killed:
            raise KeyboardInterrupt
        real(self)
        self.save()

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(place, tmp_path / "made")
    train(place, tmp_path / "made", resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (place / "made" / name).read_bytes()


def test_a_parent_that_runs_packed(place: Path, tmp_path: Path, result: HeadResult) -> None:
    secateur.compress(place / "dense", output=tmp_path / "int4", values="int4")
    found = train(place, tmp_path / "made", runs_as=tmp_path / "int4")
    assert found.parent == str(tmp_path / "int4")
    assert found.acceptance.mean != pytest.approx(result.acceptance.mean, abs=1e-5)


def test_a_plan_says_what_it_would_take(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--calibration", place / "text.safetensors", "--head", "--dry-run", "--json")
    done = runner(monkeypatch, capsys)("draft", place / "dense", "--output", tmp_path / "x", *words)
    assert done.code == 0
    plan = json.loads(done.out)
    assert plan["taps"] == [0, 1, 2]
    assert plan["disk_bytes"] == plan["tokens"] * 2 * 4 * 64
    assert not (tmp_path / "x").exists()


def test_where_nothing_pays_the_exit_code_is_3(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "time_turns", lambda *_: (PARENT, [1.1] * 9))
    assert train(place, tmp_path / "made").exit_code == 3
    assert read_head(tmp_path / "made").ids.numel()


def test_a_parent_that_our_loop_does_not_decode(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "gpt2")
    with pytest.raises(ArchitectureError):
        secateur.draft(tmp_path / "dense", output=tmp_path / "made", head=True)
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize(
    ("windows", "length", "error"), [(2, 40, RecipeError), (6, 12, SourceError)]
)
def test_too_little_text(
    place: Path, tmp_path: Path, windows: int, length: int, error: type[Exception]
) -> None:
    save_windows(tiny_windows(windows, length), tmp_path / "text.safetensors")
    with pytest.raises(error):
        secateur.draft(
            place / "dense", output=tmp_path / "made", head=True,
            calibration=tmp_path / "text.safetensors",
        )  # fmt: skip
