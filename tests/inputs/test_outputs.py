"""Outputs that cannot be made are refused before any work.

Root may write into folders that are read-only, so those are made by patching, and by /proc.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from slow import slow

from secateur.errors import RecipeError
from secateur.runs import output
from secateur.runs.output import check_writable

ALL = ["prune", "structure", "train", "compress", "sweep", "report"]


@pytest.fixture
def words(model: Path, windows: Path) -> Callable[[str], list[object]]:
    """The words of a verb that would do its work, but for the output."""
    text = ["--calibration", windows, "--windows", 4]
    return {
        "prune": ["prune", model, "--method", "wanda", "--sparsity", 0.5, *text],
        "structure": ["structure", model, "--keep-layers", 2, "--effort", "fast", *text],
        "train": ["train", model, "--text", windows, "--steps", 1],
        "compress": ["compress", model],
        "sweep": ["sweep", model, "--methods", "magnitude", "--sparsities", 0.5, *text,
                  "--text", windows],
        "report": ["report", model],
    }.__getitem__  # fmt: skip


def read_only(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/read-only")


@pytest.mark.parametrize("verb", ALL)
def test_a_folder_that_cannot_be_written(refused, words, tmp_path, monkeypatch, verb) -> None:
    command = words(verb)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    message = refused(*command, "--output", tmp_path / "new" / "out")
    assert "Read-only file system" in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", ALL)
def test_names_that_cannot_be(refused, words, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("kept")
    assert "inside a file" in refused(*words(verb), "--output", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "kept"
    assert "too long" in refused(*words(verb), "--output", tmp_path / ("x" * 300))


def test_a_name_that_is_too_long_with_its_ending(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    check_writable(tmp_path / ("x" * (longest - len(".partial"))))
    with pytest.raises(RecipeError, match="too long"):
        check_writable(tmp_path / ("x" * (longest - 1)))
    check_writable(tmp_path / ("x" * (longest - 1)), file=True)


@pytest.mark.parametrize("place", ["/proc/out", "/dev/null/out", "x\0y"])
def test_places_where_nothing_can_be_made(tmp_path: Path, place: str) -> None:
    with pytest.raises(RecipeError, match=r"remedy"):
        check_writable(Path(place) if place.startswith("/") else tmp_path / place)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "out")
    check_writable(tmp_path / "a" / "page.html", file=True)
    assert not list(tmp_path.iterdir())
    page = tmp_path / "page.html"
    page.write_text("old")
    check_writable(page, file=True)
    assert page.read_text() == "old"
    with pytest.raises(RecipeError, match="a folder, not a file"):
        check_writable(tmp_path, file=True)


@pytest.mark.parametrize(
    ("verb", "options", "file", "shown", "form"),
    [
        ("evaluate", ["--windows", 2, "--sequence-length", 32], "evaluation", "perplexity", []),
        ("diagnose", [], "diagnosis", "21", []),
        ("diagnose", [], "diagnosis", "21", ["--json"]),
        slow(("bench", ["--rounds", 1, "--contenders", "torch bf16", "--prompt-tokens", 4], "bench",
              "torch bf16", ["--json"])),
    ],
)  # fmt: skip
def test_results_of_a_read_only_model_are_shown(
    run, model: Path, tmp_path: Path, monkeypatch, caplog, verb, options, file, shown, form
) -> None:
    notes = model / "secateur"
    notes.mkdir()
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 " * 40)
    text = ["--text", tmp_path / "text.txt"] if verb == "evaluate" else []
    monkeypatch.setattr(output, "write_bytes", read_only)
    done = run(verb, model, *text, *options, *form)
    assert done.code == 0, done.err
    assert shown in (json.dumps(json.loads(done.out)) if form else done.out)
    unstored = f"not stored in {notes / file}.json: Read-only file system"
    assert unstored in caplog.text
    assert not list(notes.iterdir())


@pytest.mark.parametrize("verb", ["prune", "compress", "report"])
def test_the_root_is_no_output(refused, words, verb: str) -> None:
    assert "root" in refused(*words(verb), "--output", "/")


def test_a_report_on_a_text_names_what_it_reads(refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("my notes")
    message = refused("report", tmp_path / "notes.txt", "--output", tmp_path / "page.html")
    assert "notes.txt" in message


@pytest.mark.parametrize("content", [b"", b"words"])
def test_bench_refuses_what_is_no_gguf_before_it_loads(
    refused, model: Path, tmp_path: Path, monkeypatch, content: bytes
) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    monkeypatch.setattr("secateur.steps.bench.resolve", pytest.fail)
    message = refused("bench", model, "--gguf", tmp_path / "bad.gguf")
    assert str(tmp_path / "bad.gguf") in message
