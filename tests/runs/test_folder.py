"""The folder of a run: what it keeps, what it refuses, what it never touches."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from secateur.errors import CheckpointError, MemoryBudgetError, RecipeError
from secateur.runs import output as output_files
from secateur.runs.folder import RunFolder
from secateur.runs.lock import Lock

IDENTITY = {"sparsity": 0.5, "source_files": {"model.safetensors": "0" * 64}}


def write(folder: RunFolder, text: str) -> None:
    """A result that a check takes for a model."""
    (folder.model / "config.json").write_text("{}")
    (folder.model / "weights").write_text(text)


def finished(output: Path, text: str, **options: bool) -> None:
    """A whole run."""
    with RunFolder(output, "prune", **options) as folder:
        folder.begin(IDENTITY)
        write(folder, text)
        folder.finish()


def stopped(output: Path, **options: bool) -> None:
    """A run that a kill stops when it has something to resume."""
    with pytest.raises(KeyboardInterrupt), RunFolder(output, "prune", **options) as folder:
        folder.begin(IDENTITY)
        (folder.work / "layer").write_text("half of it")
        raise KeyboardInterrupt


def because(error: Exception, cause: Exception) -> Exception:
    """An error with the error that it comes from."""
    error.__cause__ = cause
    return error


def test_a_finished_run_leaves_its_result_and_nothing_else(tmp_path: Path) -> None:
    finished(tmp_path / "deep" / "out", "new")
    assert [x.name for x in (tmp_path / "deep").iterdir()] == ["out"]
    assert sorted(x.name for x in (tmp_path / "deep" / "out").iterdir()) == [
        "config.json", "secateur", "weights",
    ]  # fmt: skip


def test_a_stopped_run_is_resumed_or_discarded_and_never_silently_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out)
    with pytest.raises(RecipeError, match="--resume to continue"):
        RunFolder(out, "prune")
    with pytest.raises(RecipeError, match="secateur prune"):
        RunFolder(out, "structure", resume=True)
    with (
        pytest.raises(RecipeError, match=r"sparsity: 0\.5 then, 0\.6 now"),
        RunFolder(out, "prune", resume=True) as folder,
    ):
        folder.begin({**IDENTITY, "sparsity": 0.6})
    with RunFolder(out, "prune", resume=True) as folder:
        assert folder.resumed
        assert (folder.work / "layer").read_text() == "half of it"
        folder.begin(IDENTITY)
        write(folder, "resumed")
        folder.finish()
    assert (out / "weights").read_text() == "resumed"
    stopped(tmp_path / "other")
    with RunFolder(tmp_path / "other", "structure", restart=True) as folder:
        assert not folder.resumed
        assert not any(folder.work.iterdir())


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (CheckpointError("NaN"), False),
        (MemoryBudgetError("it needs 9 GiB"), False),
        (because(MemoryBudgetError("step 2 needs 9 GiB"), MemoryBudgetError("9 GiB")), False),
        (because(MemoryBudgetError("memory has ended"), MemoryError()), True),
        (KeyError("x"), True),
    ],
)
def test_an_error_keeps_what_can_be_resumed_and_nothing_else(
    error: Exception, left: bool, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), RunFolder(tmp_path / "out", "prune") as folder:
        folder.begin(IDENTITY)
        folder.worth_resuming = lambda: False
        raise error
    assert (tmp_path / "out.partial").exists() == left
    with pytest.raises(type(error)), RunFolder(tmp_path / "early", "prune") as folder:
        raise error
    assert not (tmp_path / "early.partial").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_step_can_be_resumed_and_files_that_prepare_one_cannot(
    finished: bool, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError), RunFolder(tmp_path / "out", "fit") as folder:
        folder.begin(IDENTITY)
        (folder.work / "pace.json").write_text("{}")
        if finished:
            (folder.work / "pruned-0.5").mkdir()
        raise CheckpointError("NaN")
    assert (tmp_path / "out.partial").exists() == finished


def test_an_error_of_a_resumed_run_keeps_the_work_of_the_first(tmp_path: Path) -> None:
    stopped(tmp_path / "out")
    with (
        pytest.raises(CheckpointError),
        RunFolder(tmp_path / "out", "prune", resume=True) as folder,
    ):
        folder.worth_resuming = lambda: False
        raise CheckpointError("before begin")
    assert (tmp_path / "out.partial" / "work" / "layer").exists()


def test_a_full_disk_is_an_error_of_ours_that_can_be_resumed(tmp_path: Path) -> None:
    with (
        pytest.raises(MemoryBudgetError, match="--resume"),
        RunFolder(tmp_path / "out", "prune") as folder,
    ):
        folder.begin(IDENTITY)
        raise OSError(28, os.strerror(28), str(folder.work))
    assert (tmp_path / "out.partial").exists()


def test_a_run_that_comes_when_another_has_just_finished_leaves_no_folder(tmp_path: Path) -> None:
    late = RunFolder(tmp_path / "out", "prune")
    finished(tmp_path / "out", "new")
    with pytest.raises(RecipeError, match="exists"), late:
        pytest.fail("it entered")
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_to_look_whether_a_folder_is_taken_makes_none(tmp_path: Path, monkeypatch) -> None:
    lock, answers = Lock(tmp_path / "out.partial"), iter([True, False])  # removed in between
    monkeypatch.setattr(Path, "exists", lambda place: next(answers))
    assert not lock.is_taken
    assert not list(tmp_path.iterdir())


# -- what is there already -------------------------------------------------------------------------


def test_an_output_is_replaced_only_where_the_user_wants_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out, "old")
    with pytest.raises(RecipeError, match="--overwrite"):
        RunFolder(out, "prune")
    finished(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="no model folder"):
        RunFolder(tmp_path / "mine", "prune", overwrite=True)
    (tmp_path / "mine" / "thesis.tex").rename(tmp_path / "mine" / "secateur")
    (tmp_path / "mine" / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(RecipeError, match="no model folder"):
        RunFolder(tmp_path / "mine", "prune", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="a symbolic link"):
        RunFolder(tmp_path / "link", "prune")


@pytest.mark.parametrize("notes", [(), ("README.md", "secateur/run.json")])
def test_a_folder_with_only_a_gguf_file_is_replaced(notes: Sequence[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "secateur" if notes else out).mkdir(parents=True)
    for name, content in {"m.gguf": "GGUF and more", **dict.fromkeys(notes, "{}")}.items():
        (out / name).write_text(content)
    with pytest.raises(RecipeError, match="--overwrite"):
        RunFolder(out, "prune")
    (out / "more.gguf").write_text("GGUF")
    with pytest.raises(RecipeError, match="no model folder"):
        RunFolder(out, "prune", overwrite=True)
    (out / "more.gguf").unlink()
    finished(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "new"
    assert not (out / "m.gguf").exists()


def test_a_whole_result_is_kept_though_nothing_of_the_run_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(RecipeError, match=r"result is in .*model"),
        RunFolder(out, "decompress") as folder,
    ):
        write(folder, "new")
        out.mkdir()
        folder.finish()
    assert (tmp_path / "out.partial" / "model" / "weights").read_text() == "new"


def test_a_file_system_without_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    finished(tmp_path / "out", "new")
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert "without locks" in caplog.text


def test_an_output_beside_its_sources_is_taken(tmp_path: Path) -> None:
    source = tmp_path / "dir" / "model"
    source.mkdir(parents=True)
    inside = RunFolder(tmp_path / "dir" / "out", "prune")
    inside.keep_apart(source, tmp_path / "dir", None, "hub/id", "x" * 5000)  # a folder of texts


@pytest.mark.parametrize(
    ("name", "why"), [("x" * 250, "too long"), ("file/out", "inside a file"), ("a\0b", "null byte")]
)
def test_an_output_that_cannot_be_made_is_refused(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(RecipeError, match=why):
        RunFolder(tmp_path / name, "prune")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


# -- two at once, and kills ------------------------------------------------------------------------


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_killed_anywhere_while_it_gets_its_name(
    swaps: bool, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of the file system in `finish` and after it is a point to be killed at."""
    names = ["rename", "replace", "unlink", "rmdir"]
    if not swaps:
        monkeypatch.setattr(output_files, "rename", lambda *_: False)
    point, resumed = 0, 0
    while True:
        out = tmp_path / f"out-{point}"
        if overwrite:
            finished(out, "old")
        left = point

        def counting(real: object) -> object:
            def call(*args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return real(*args, **options)  # type: ignore[operator]

            return call

        folder = RunFolder(out, "prune", overwrite=overwrite)
        try:
            with monkeypatch.context() as patched, folder:
                folder.begin(IDENTITY)
                write(folder, "new")
                for name in names:
                    patched.setattr(os, name, counting(getattr(os, name)))
                patched.setattr(output_files, "rename", counting(output_files.rename))
                folder.finish()
            break
        except KeyboardInterrupt:
            folder.lock.release()
        if swaps and overwrite:
            assert (out / "weights").read_text() in ("old", "new")
        point += 1
        if not (folder.partial / "run.json").exists():  # killed at the very last
            assert (out / "weights").read_text() == "new"
            continue
        with RunFolder(out, "prune", resume=True, overwrite=overwrite) as again:
            assert not overwrite or (out / "weights").exists()
            again.begin(IDENTITY)
            assert (again.model / "weights").read_text() == "new"
            if not again.finished:
                again.finish()
        assert (out / "weights").read_text() == "new"
        assert not folder.partial.exists()
        resumed += 1
    assert point - 2 <= resumed
    assert resumed >= 5
