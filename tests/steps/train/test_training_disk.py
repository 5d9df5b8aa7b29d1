"""A training and the disk: planned before it, and a full one ends in an error and can be mended."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from trainings import assert_same, make_place, train_in

import secateur
from secateur.errors import MemoryBudgetError
from secateur.models import checkpoint
from secateur.training import saved
from secateur.training.loop import Loop

OPTIONS: dict[str, Any] = {"steps": 6, "windows": 40, "validation_windows": 4, "validations": 2,
                           "save_minutes": 0}  # fmt: skip
MAPS = Path("/proc/self/maps")
Usage = namedtuple("Usage", "total used free")


train = partial(train_in, **OPTIONS)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training begins with, and what an undisturbed one makes of it."""
    place = make_place(tmp_path_factory.mktemp("disk"), sparsity=0.5)
    train(place, place / "straight")
    return place


def failing(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A function that finds the disk full the `at`-th time, after half of what it does is done."""
    count = 0

    def full(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        return call(*args, **options)

    return full


@pytest.mark.parametrize(
    ("owner", "name", "at", "where"),
    [
        (checkpoint, "write_all", 3, "work/best.unfinished"),  # before the first step
        (checkpoint, "write_all", 60, "work/state.unfinished"),  # the first save
        (checkpoint, "write_all", 500, "work/state.unfinished"),  # a later one
        (saved.Log, "written", 4, "."),
        (checkpoint, "write_all", 1300, "work/final.unfinished"),  # the trained weights
        (checkpoint, "write_all", 1330, "model/model.safetensors"),
        (shutil, "copyfile", 1, "model"),  # its copy of the source
    ],
)
def test_a_full_disk_is_named_and_the_training_goes_on(
    owner: Any,
    name: str,
    at: int,
    where: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at))
        with pytest.raises(MemoryBudgetError, match="disk") as full:
            train(places, tmp_path / "out")
    assert full.value.where == str(tmp_path / "out.partial" / where)
    assert "resume" in str(full.value.remedy)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial" / "work").glob("*.unfinished"))
    train(places, tmp_path / "out", resume=True)
    assert_same(places / "straight", tmp_path / "out")


def test_what_would_fill_the_disk_is_refused_before_any_work(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (places / "pruned" / "model.safetensors").stat().st_size
    monkeypatch.setattr(Loop, "begin", failing(Loop.begin, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 5 * source))
    with pytest.raises(MemoryBudgetError, match="disk"):
        train(places, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_plan_is_what_lies_on_the_disk(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, most = [], 0
    check = secateur.steps.runner.check_free

    def watched(needed: int, *places: Path) -> None:
        planned.append(needed)
        check(needed, *places)

    write = checkpoint.ShardWriter.close

    def look(self: Any, metadata: Any) -> None:
        nonlocal most
        write(self, metadata)
        files = [x for x in (tmp_path / "out.partial").rglob("*") if x.is_file()]
        most = max(most, sum(x.stat().st_size for x in files))

    monkeypatch.setattr("secateur.steps.runner.check_free", watched)
    monkeypatch.setattr(checkpoint.ShardWriter, "close", look)
    train(places, tmp_path / "out")
    assert most <= 1.1 * planned[0]  # headers count for much in so small a model
    assert most >= 0.7 * planned[0]


@pytest.mark.skipif(not MAPS.exists(), reason="Linux says there what is mapped")
def test_a_save_that_is_replaced_is_not_kept_on_the_disk(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", failing(Loop.step, 3))
        with pytest.raises(MemoryBudgetError):
            train(places, tmp_path / "out")
    mapped = []
    plain = Loop.train

    def look(self: Loop) -> None:
        lines = [line for line in MAPS.read_text().splitlines() if str(tmp_path) in line]
        mapped.append(any("state.safetensors" in line for line in lines))
        plain(self)

    monkeypatch.setattr(Loop, "train", look)
    train(places, tmp_path / "out", resume=True)
    assert mapped == [False]
