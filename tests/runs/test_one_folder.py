"""Who may write where, and what a run goes on with: the rules of a run's folder, for every verb."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gguf
import pytest
from cases import CASES, FAST, make_sources
from contents import contents, every_byte
from slow import slow

import secateur
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.models import checkpoint

VERBS = (
    "prune", "structure", "train", "train with a teacher", "chain", "compress",
    "compress int8", "decompress",
)  # fmt: skip
RESUMABLE = [name for name in VERBS if CASES[name].resumes]
MODES = ({}, {"resume": True}, {"restart": True}, {"overwrite": True})


class At:
    """A progress that does something at one of its steps, once, and counts them all."""

    def __init__(self, step: int = 0, act: Callable[[], object] = lambda: None) -> None:
        self.wanted, self.act, self.steps, self.stages = step, act, 0, 0

    def start(self, label: str, steps: int) -> None:
        self.stages += 1

    def step(self, count: int = 1, note: str = "") -> None:
        before, self.steps = self.steps, self.steps + count
        if before < self.wanted <= self.steps:
            self.act()

    def finish(self) -> None:
        pass


def stop() -> None:
    """End a run."""
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and texts."""
    place = tmp_path_factory.mktemp("runs") / "sources"
    make_sources(place)
    return place


class Finished(NamedTuple):
    """An uninterrupted run, which is only looked at."""

    output: Path
    result: Any
    contents: dict[str, str]
    steps: int


Finish = Callable[..., Finished]


@pytest.fixture(scope="module")
def finished(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Finish:
    """What an uninterrupted run of a case makes; it resumes where nothing was left, if it can."""
    found: dict[str, Finished] = {}

    def made(name: str, **options: Any) -> Finished:
        key, case = json.dumps([name, options]), CASES[name]
        if key not in found:
            output, counted = tmp_path_factory.mktemp("straight") / "out", At()
            result = case.call(sources, output, counted, **case.retry(False), **options)
            found[key] = Finished(output, result, contents(output), counted.steps)
        return found[key]

    return made


def modes(name: str) -> list[dict[str, bool]]:
    """The ways in which a verb can be called."""
    case = CASES[name]
    known = {*(("resume", "restart") if case.resumes else ()), *case.anew(True)}
    return [mode for mode in MODES if mode.keys() <= known]


def work_in(folder: Path) -> dict[str, str]:
    """All that lies in a folder, but for who worked there last."""
    return {name: x for name, x in every_byte(folder).items() if Path(name).name != "run.json"}


# -- two at once ------------------------------------------------------------------------------


class Waiting(At):
    """A progress that waits at its first step until it may go on."""

    def __init__(self) -> None:
        super().__init__(1, self.wait)
        self.held, self.going_on = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.held.set()
        assert self.going_on.wait(60)


@pytest.mark.parametrize("name", VERBS)
def test_a_second_run_is_refused_and_names_the_first(
    name: str, sources: Path, finished: Finish, tmp_path: Path
) -> None:
    """A lock belongs to an open folder, so a thread is like another process."""
    output, case, first = tmp_path / "out", CASES[name], Waiting()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(case.call, sources, output, first)
        assert first.held.wait(60)
        file = tmp_path / "out.partial" / "run.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        assert state["process"] == os.getpid()
        file.write_text(json.dumps({**state, "process": 98765, "host": "another"}))
        for mode in modes(name):
            with pytest.raises(RecipeError, match=r"98765 on another .* \d\d:\d\d"):
                case.call(sources, output, At(), **mode)
        first.going_on.set()
        running.result()
    assert contents(output) == finished(name).contents


# -- what is somebody else's ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "when"),
    [
        *((name, "first step") for name in ("prune", "chain")),
        *((name, "last step") for name in VERBS),
        ("prune", "last step, empty"),
    ],
)
def test_an_output_that_appears_meanwhile_is_not_touched(
    name: str, when: str, sources: Path, finished: Finish, tmp_path: Path
) -> None:
    steps = finished(name).steps
    output, case = tmp_path / "out", CASES[name]

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    if "empty" not in when:
        shutil.copytree(sources / "old", theirs, dirs_exist_ok=True)

    def appear() -> None:
        shutil.copytree(theirs, output)

    with pytest.raises(RecipeError):
        case.call(sources, output, At(1 if when == "first step" else steps, appear))
    assert every_byte(output) == every_byte(theirs)
    shutil.rmtree(output)
    case.call(sources, output, At(), **case.retry(False))
    assert contents(output) == finished(name).contents


@pytest.mark.parametrize("name", VERBS)
def test_a_folder_of_the_user_beside_the_output_is_never_deleted(
    name: str, sources: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine", encoding="utf-8")
    for mode in modes(name):
        with pytest.raises(RecipeError, match="in the way"):
            CASES[name].call(sources, tmp_path / "out", At(), **mode)
        assert mine.read_text(encoding="utf-8") == "mine"


# -- source and output are two places ---------------------------------------------------------

Places = tuple[Path, Path]


def same(model: Path, old: Path) -> Places:
    return model, model


def same_by_another_name(model: Path, old: Path) -> Places:
    return model, old / ".." / model.name


def output_is_a_link_to_the_source(model: Path, old: Path) -> Places:
    link = model.with_name("link")
    link.symlink_to(model, target_is_directory=True)
    return model, link


def source_is_a_link_to_the_output(model: Path, old: Path) -> Places:
    link, _ = reversed(output_is_a_link_to_the_source(model, old))
    return link, model


def source_inside_the_output(model: Path, old: Path) -> Places:
    return Path(shutil.move(model, old / "model")), old


def source_inside_by_a_link(model: Path, old: Path) -> Places:
    inside, _ = source_inside_the_output(model, old)
    link = old.with_name("link")
    link.symlink_to(inside, target_is_directory=True)
    return link, old


def output_inside_the_source(model: Path, old: Path) -> Places:
    return model, Path(shutil.move(old, model / "old"))


def output_inside_by_a_link(model: Path, old: Path) -> Places:
    link = model.with_name("link")
    link.symlink_to(model, target_is_directory=True)
    shutil.move(old, model / "old")
    return model, link / "old"


LAYOUTS = [
    same, same_by_another_name, output_is_a_link_to_the_source, source_is_a_link_to_the_output,
    source_inside_the_output, source_inside_by_a_link,
    output_inside_the_source, output_inside_by_a_link,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", VERBS)
def test_source_and_output_must_be_apart(
    name: str, layout: Callable[[Path, Path], Places], sources: Path, tmp_path: Path
) -> None:
    case, place = CASES[name], tmp_path / "place"
    shutil.copytree(sources / case.source, place / "model")
    shutil.copytree(sources / "old", place / "old")
    model, output = layout(place / "model", place / "old")
    before, seen = every_byte(tmp_path), At()
    with pytest.raises(RecipeError):
        case.call(sources, output, seen, model=model, **case.anew(True))
    assert every_byte(tmp_path) == before
    assert seen.stages == 0


def test_a_teacher_inside_the_output_is_not_deleted(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "old", tmp_path / "out")
    shutil.copytree(sources / "dense", tmp_path / "out" / "teacher")
    before = every_byte(tmp_path)
    options: dict[str, Any] = {"teacher": str(tmp_path / "out" / "teacher"), "overwrite": True}
    with pytest.raises(RecipeError):
        CASES["train with a teacher"].call(sources, tmp_path / "out", At(), **options)
    assert every_byte(tmp_path) == before


# -- going on ---------------------------------------------------------------------------------


CHAIN = CASES["chain"].options["steps"]
TEXT = {"calibration": "{sources}/text.txt", "sequence_length": 16, "windows": 4}
OTHER_TEXT = {"calibration": "{sources}/other.txt"}
CHANGES: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("prune", {}, [{"calibration": "{sources}/others.safetensors"}]),
    ("prune", TEXT, [{"windows": 3}, OTHER_TEXT, {"seed": 1}]),
    ("structure", TEXT, [{"windows": 3}, OTHER_TEXT]),
    ("compress int8", TEXT, [{"windows": 3}, OTHER_TEXT]),
    ("train", {}, [{"windows": 11}, {"text": "{sources}/other.txt"}]),
    ("train with a teacher", {}, [{"text": "{sources}/other.txt"}]),
    ("chain", {}, [{"steps": [{"structure": {**FAST, "ffn": 0.75}}, *CHAIN[1:]]}]),
]
"""Cases, further options of them, and changes that make other runs of them."""

of_changes = pytest.mark.parametrize(
    ("name", "options", "changes"),
    CHANGES,
    ids=lambda x: x if isinstance(x, str) else "-".join(key for one in [*x] for key in one),
)


def stopped(name: str, sources: Path, output: Path, steps: int, **options: Any) -> None:
    """A run that is stopped after half of its steps."""
    with pytest.raises(KeyboardInterrupt):
        CASES[name].call(sources, output, At(max(1, steps // 2), stop), **options)


@of_changes
def test_resume_with_another_text_is_refused(
    name: str,
    options: dict[str, Any],
    changes: list[dict[str, Any]],
    sources: Path,
    finished: Finish,
    tmp_path: Path,
) -> None:
    case, straight = CASES[name], finished(name, **options)
    stopped(name, sources, tmp_path / "out", straight.steps, **options)
    before = work_in(tmp_path)
    for change in changes:
        with pytest.raises(RecipeError):
            case.call(sources, tmp_path / "out", At(), resume=True, **{**options, **change})
        assert work_in(tmp_path) == before
    case.call(sources, tmp_path / "out", At(), resume=True, **options)
    assert contents(tmp_path / "out") == straight.contents


@pytest.mark.parametrize("name", [*RESUMABLE, slow("fit"), slow("draft")])
def test_resume_of_a_finished_run_shows_its_result(
    name: str, sources: Path, finished: Finish, caplog: pytest.LogCaptureFixture
) -> None:
    first = finished(name)
    before = every_byte(first.output.parent)
    again = CASES[name].call(sources, first.output, At(), resume=True)
    assert json.dumps(again.to_json()) == json.dumps(first.result.to_json())
    assert "out: finished already" in caplog.text
    assert every_byte(first.output.parent) == before


@of_changes
def test_resume_of_a_finished_run_with_another_recipe_is_refused(
    name: str,
    options: dict[str, Any],
    changes: list[dict[str, Any]],
    sources: Path,
    finished: Finish,
) -> None:
    output = finished(name, **options).output
    before = every_byte(output.parent)
    message = r"the finished run was a different one \(.*(now|changed)"
    for change in changes:
        with pytest.raises(RecipeError, match=message) as error:
            CASES[name].call(sources, output, At(), resume=True, **{**options, **change})
        assert "overwrite" in str(error.value.remedy)
    assert every_byte(output.parent) == before


@pytest.mark.parametrize("name", [x for x in RESUMABLE if x != "compress"])
def test_resume_with_other_weights_in_the_source_is_refused(
    name: str, sources: Path, finished: Finish, tmp_path: Path
) -> None:
    case, straight, here = CASES[name], finished(name), tmp_path / "here"
    model = Path(shutil.copytree(sources / case.source, tmp_path / "model"))
    here.mkdir()
    stopped(name, sources, here / "out", straight.steps, model=model)
    before, file = work_in(here), max(model.glob("*.safetensors"))
    as_it_was = file.read_bytes()
    changed = bytearray(as_it_was)
    changed[-2] ^= 1
    file.write_bytes(changed)
    with pytest.raises(RecipeError):
        case.call(sources, here / "out", At(), model=model, resume=True)
    assert work_in(here) == before
    file.write_bytes(as_it_was)
    case.call(sources, here / "out", At(), model=model, resume=True)
    assert contents(here / "out") == straight.contents


# -- disks ------------------------------------------------------------------------------------


MADE = [*VERBS[:-3], "compress", "compress int8", "decompress", "export", "import"]


@pytest.mark.parametrize("name", [name for name in MADE if name != "chain"])
def test_a_disk_that_is_too_small_is_seen_before_the_work(
    name: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: left)
    with pytest.raises(MemoryBudgetError, match=r"0\.00 MiB"):
        CASES[name].call(sources, tmp_path / "out", At())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["gguf", "openvino", "compressed-tensors"])
def test_a_disk_that_fills_up_under_an_export_is_named_and_nothing_stays(
    target: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(*_: Any) -> None:
        raise OSError("3145728 requested and 1915416 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", cut_short)
    monkeypatch.setattr(checkpoint, "write_all", cut_short)
    with pytest.raises(MemoryBudgetError, match="run again, or") as full:
        secateur.export(sources / "bytes", to=target, output=tmp_path / "out")
    assert "--resume" not in str(full.value)
    assert not list(tmp_path.iterdir())


# -- other spellings --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prune", "structure", "train", "chain", "compress int8"])
@pytest.mark.parametrize("stop_at", [5, 10**9], ids=["stopped", "finished"])
def test_the_same_files_may_be_spelled_in_another_way(
    name: str, stop_at: int, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, here = CASES[name], tmp_path / "here"
    shutil.copytree(sources / case.source, here / "m" / "model")
    for file in ("windows.safetensors", "text.txt"):
        shutil.copy(sources / file, here / file)
    monkeypatch.chdir(here)
    try:
        case.call(Path(), tmp_path / "out", At(stop_at, stop), Path("m/model"))
    except KeyboardInterrupt:
        assert stop_at == 5
    monkeypatch.chdir(tmp_path)
    moved = here.rename(tmp_path / "there")
    resumed = case.call(Path("there"), tmp_path / "out", At(), f"{moved}/m/model/", resume=True)
    assert resumed is not None
    assert (tmp_path / "out" / "config.json").is_file()
    shutil.copy(sources / "other.txt", moved / "text.txt")
    shutil.copy(sources / "others.safetensors", moved / "windows.safetensors")
    with pytest.raises(RecipeError, match=r"changed|now"):
        case.call(Path("there"), tmp_path / "out", At(), moved / "m" / "model", resume=True)
