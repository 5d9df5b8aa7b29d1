"""Whatever a verb raises ends in a message and an exit code, and never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secateur.cli.errors import to_error, write_log
from secateur.errors import SourceError
from secateur.models.cache import cache_folder

BROKEN = "secateur.steps.inspect.inspect"


def raising(error: BaseException):
    def verb(*_: object, **__: object) -> None:
        raise error

    return verb


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own."""
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_fault_of_ours_says_so_and_keeps_its_traceback(run, monkeypatch, state: Path) -> None:
    monkeypatch.setattr(BROKEN, raising(ZeroDivisionError("by \ud800\nmore")))
    done = run("inspect", "m", "--json")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "ZeroDivisionError" in done.err
    assert "open an issue" in done.err
    (file,) = (state / "faults").glob("fault-*.log")
    assert str(file) in done.err
    error = json.loads(done.out)["error"]
    assert error["kind"] == "InternalError"
    assert str(file) in error["where"]
    log = file.read_text()
    assert "Traceback" in log
    assert "inspect m --json" in log
    assert "ZeroDivisionError" in log


def test_the_end_of_an_input_is_no_silent_abort(run, monkeypatch) -> None:
    monkeypatch.setattr(BROKEN, raising(EOFError("compressed file ended")))
    done = run("inspect", "m")
    assert done.code == 1
    assert "EOFError: compressed file ended" in done.err


def test_the_log_lies_in_the_run_that_failed(tmp_path: Path, monkeypatch) -> None:
    work = tmp_path / "out.partial" / "work"
    work.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["secateur", "prune", "m", "-o", str(tmp_path / "out")])
    file = write_log(ValueError("x"))
    assert file is not None
    assert file.parent == work


def test_the_log_falls_back_where_the_state_folder_cannot_be_written(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert write_log(ValueError("x")).parent == tmp_path  # type: ignore[union-attr]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert write_log(ValueError("gone")) is None
    assert "ValueError: gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "can be written"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.ENOTDIR, "part of the path is a file"),
        (errno.EXDEV, "mend what it complains of"),
    ],
)
def test_an_error_of_the_system_is_no_fault_of_ours(run, monkeypatch, code, remedy) -> None:
    error = OSError(code, os.strerror(code), "/some/file")
    monkeypatch.setattr(BROKEN, raising(error))
    done = run("inspect", "m", "--json")
    assert done.code == 1
    assert "fault in secateur" not in done.err
    record = json.loads(done.out)["error"]
    assert os.strerror(code) in record["what"]
    assert record["where"] == "/some/file"
    assert remedy in record["remedy"]


def test_both_names_of_a_failed_rename_are_reported() -> None:
    error = OSError(errno.ENOTEMPTY, "Directory not empty", "a", None, b"b")
    assert to_error(error).where == "a → b"


@pytest.fixture
def ctrl_c() -> Iterator[Callable[..., None]]:
    """A verb that is interrupted; a test suite may have been started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_, **__: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c_says_how_to_go_on(run, monkeypatch, ctrl_c, flags: list[str]) -> None:
    monkeypatch.setattr(BROKEN, ctrl_c)
    done = run("inspect", "m", *flags)
    assert done.code == 130
    assert done.err.startswith("error: interrupted")
    assert "secateur inspect m" in done.err
    assert "Traceback" not in done.err
    if flags:
        assert json.loads(done.out)["error"]["kind"] == "UserInterruptError"


def test_a_user_without_a_home_reads_what_to_set(run, monkeypatch, tmp_path: Path) -> None:
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SECATEUR_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SourceError, match="SECATEUR_HOME"):
        cache_folder()
    monkeypatch.setattr(BROKEN, raising(ZeroDivisionError("once more")))
    done = run("inspect", "m")
    assert "ZeroDivisionError" in done.err
    assert list(tmp_path.glob("fault-*.log"))
