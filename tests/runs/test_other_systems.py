"""Runs where Linux's calls do not exist keep the same promises.

Nothing of macOS or Windows runs here: their calls are pretended (`other_systems.py`). Windows also
refuses to move and to delete what is open or mapped.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cases import CASES, make_sources
from contents import contents
from other_systems import SYSTEMS, pretend
from slow import slow_but
from stopped_stage import StopAt, StoppedError

import secateur
from secateur.errors import RecipeError
from secateur.progress import Silent
from secateur.runs import environment
from secateur.runs import lock as run_lock
from secateur.runs.environment import Meter, usable_processors
from secateur.runs.folder import RunFolder
from secateur.runs.lock import Lock
from secateur.runs.output import take_name

FEW = ("prune", "train", "compress int8")
Pretend = Callable[[str], pytest.MonkeyPatch]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and texts, made on Linux."""
    place = tmp_path_factory.mktemp("other") / "sources"
    make_sources(place)
    return place


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def pretended(system: str) -> Iterator[str]:
    """The system, for the whole test."""
    with pytest.MonkeyPatch.context() as patch:
        pretend(system, patch)
        yield system


@pytest.mark.parametrize("name", slow_but(FEW, CASES))
def test_a_verb_makes_the_same_files(name: str, sources: Path, tmp_path: Path, system: str) -> None:
    case = CASES[name]
    here, there = (tmp_path / of / case.output for of in ("linux", system))
    for output in (here, there):
        output.parent.mkdir()
    case.call(sources, here, Silent())
    with pytest.MonkeyPatch.context() as patch:
        pretend(system, patch)
        case.call(sources, there, Silent())
        if case.verb != "export":  # a file alone is no model folder
            case.call(sources, there, Silent(), **case.anew(overwrite=True))
    assert contents(there) == contents(here)
    assert sorted(os.listdir(there.parent)) == sorted(os.listdir(here.parent))


def test_from_a_model_to_a_text(sources: Path, tmp_path: Path, pretended: str) -> None:
    planned = secateur.prune(sources / "dense", method="magnitude", sparsity=0.5, dry_run=True)
    assert planned.peak_bytes > 0
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    secateur.prune(sources / "dense", output=pruned, method="magnitude", sparsity=0.5)
    secateur.compress(pruned, output=packed, values="int8")
    made = secateur.generate(packed, "abc", max_new_tokens=4)
    assert made.tokens == 4
    manifest = json.loads((pruned / "secateur" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["cost"]["peak_resident_bytes"] > 0
    assert manifest["cost"]["peak_is_of_this_run_alone"] is False


@pytest.mark.parametrize("step", [4, 12])
def test_a_stopped_run_is_resumed(step: int, sources: Path, tmp_path: Path, pretended: str) -> None:
    case = CASES["prune"]
    case.call(sources, tmp_path / "straight", Silent())
    with pytest.raises(StoppedError):
        case.call(sources, tmp_path / "out", StopAt(None, step))
    case.call(sources, tmp_path / "out", Silent(), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path, pretended: str) -> None:
    out = tmp_path / "out"
    with RunFolder(out, "prune") as folder:
        folder.begin({"sparsity": 0.5})
        with pytest.raises(RecipeError, match=rf"process {os.getpid()} on "):
            RunFolder(out, "prune", resume=True)
        (folder.work / "layer").mkdir()
        (folder.model / "config.json").write_text("{}", encoding="utf-8")
        folder.finish()
    assert os.listdir(tmp_path) == ["out"]


HOLDER = """
import sys
from pathlib import Path
import pytest
sys.path.insert(0, sys.argv[1])
from other_systems import pretend
from secateur.runs.lock import Lock

pretend("windows", pytest.MonkeyPatch())
lock = Lock(Path(sys.argv[2]))
print(lock.take(), flush=True)
sys.stdin.readline()
"""


def test_a_killed_process_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out.partial"
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        pretend("windows", monkeypatch)
        lock = Lock(folder)
        assert lock.is_taken
        assert not lock.take()
        other.kill()
        other.wait()
    assert (tmp_path / "out.partial.lock").exists()
    assert not lock.is_taken
    assert lock.take()
    lock.release()
    assert os.listdir(tmp_path) == ["out.partial"]


def test_a_system_without_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "fcntl", None)
    monkeypatch.setattr(run_lock, "msvcrt", None)
    with caplog.at_level(logging.WARNING):
        assert Lock(tmp_path / "out").take()
    assert "without locks" in caplog.text


@pytest.mark.parametrize("kind", ["file", "folder", "filled folder"])
def test_a_name_that_is_taken_in_the_last_moment_is_left_alone(
    kind: str, tmp_path: Path, pretended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, name = tmp_path / "made", tmp_path / "name"
    made.mkdir()
    (made / "weights").write_text("new", encoding="utf-8")
    if kind == "file":
        name.write_text("mine", encoding="utf-8")
    else:
        name.mkdir()
    if kind == "filled folder":
        (name / "mine").write_text("mine", encoding="utf-8")
    seen = iter([False])  # not there when it is looked for
    monkeypatch.setattr(os.path, "lexists", lambda place: next(seen, True))
    with pytest.raises(FileExistsError):
        take_name(made, name, tmp_path / "spare")
    assert (made / "weights").exists()
    assert name.is_file() or not (name / "weights").exists()


def test_two_names_are_swapped(tmp_path: Path, pretended: str) -> None:
    made, name = tmp_path / "made", tmp_path / "name"
    for folder in (made, name):
        folder.mkdir()
        (folder / folder.name).write_text("", encoding="utf-8")
    take_name(made, name, tmp_path / "spare")
    assert os.listdir(name) == ["made"]
    (old,) = set(os.listdir(tmp_path)) - {"name"}
    assert old == ("made" if pretended == "macos" else "spare")


def test_the_refusals_of_windows_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("windows", monkeypatch)
    with pytest.raises(OSError, match="incorrect"):
        (tmp_path / "2:4").mkdir()
    with pytest.raises(OSError, match="incorrect"), (tmp_path / "nul.txt").open("wb"):
        pass
    with (tmp_path / "open").open("wb"), pytest.raises(PermissionError):
        (tmp_path / "open").unlink()
    with (tmp_path / "other").open("wb"), pytest.raises(PermissionError):
        (tmp_path / "open").replace(tmp_path / "other")
    with pytest.raises(FileExistsError):
        (tmp_path / "open").rename(tmp_path / "other")


def test_what_the_system_does_not_say_is_not_made_up(
    pretended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.platform, "processor", lambda: "a processor")
    assert environment._cpu_name() == "a processor"
    assert usable_processors() == os.cpu_count()
    reading = Meter.start().read()
    assert reading["peak_is_of_this_run_alone"] is False
    if pretended == "windows":
        assert reading["peak_resident_bytes"] == 2**29


def test_a_finished_run_does_not_fail_for_a_file_that_somebody_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend("windows", monkeypatch)
    with ExitStack() as reading, RunFolder(tmp_path / "out", "prune") as folder:
        folder.begin({"sparsity": 0.5})
        (folder.model / "config.json").write_text("{}", encoding="utf-8")
        (folder.work / "layer").write_text("half of it", encoding="utf-8")
        reading.enter_context((folder.work / "layer").open(encoding="utf-8"))
        folder.finish()
    assert "is finished; delete" in caplog.text
    assert (tmp_path / "out" / "config.json").exists()
