"""Whatever a verb raises ends in a message and an exit code, and never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.cli.errors import to_error, write_log

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
    assert "this is a fault in secateur: ZeroDivisionError" in done.err
    assert "open an issue" in done.err
    (file,) = (state / "faults").glob("fault-*.log")
    assert str(file) in done.err
    error = json.loads(done.out)["error"]
    assert error["kind"] == "InternalError"
    assert str(file) in error["where"]
    log = file.read_text()
    assert "Traceback (most recent call last)" in log
    assert "command: secateur inspect m --json" in log
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


INTERRUPTED = """
import os, signal, sys
import secateur.steps.inspect
def wait(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
secateur.steps.inspect.inspect = wait
sys.argv = ["secateur", "inspect", "m", *sys.argv[1:]]
from secateur.cli import main
main()
"""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c_says_how_to_go_on(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted")
    assert "start again with: secateur inspect m" in done.stderr
    assert "Traceback" not in done.stderr
    if flags:
        assert json.loads(done.stdout)["error"]["kind"] == "UserInterruptError"


def test_usage_errors_and_help_are_as_ever(run) -> None:
    assert run("inspect").code == 2
    assert run("--version").out.startswith("secateur ")
    assert run("inspect", "--help").code == 0
