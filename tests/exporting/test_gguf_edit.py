"""Edits of GGUF files: the bytes that stay, parts, and a run that is stopped anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_bytes import SOUND, U32, key, number, written_by_gguf

from secateur.errors import CheckpointError
from secateur.exporting.gguf import edit as editing
from secateur.exporting.gguf.edit import Edit, Kept, written
from secateur.models.gguf_file import Field, GGUFSource, part_name
from secateur.progress import Silent
from secateur.runs.ledger import Ledger


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_by_gguf(tmp_path_factory.mktemp("all") / "all.gguf")


@pytest.fixture(params=["in the kernel", "through memory"])
def copying(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to copy, in pieces that are smaller than a tensor."""
    monkeypatch.setattr(editing, "COPIED_BYTES", 1000)
    monkeypatch.setattr(editing, "IN_KERNEL_BYTES", 500)
    if request.param == "through memory":
        monkeypatch.delattr(os, "copy_file_range", raising=False)


def few_rows(source: GGUFSource) -> Edit:
    """An edit with everything that an edit can do."""
    tensors: dict[str, Kept] = {}
    for place, name in enumerate(source.tensors):
        if place % 5 == 0:
            tensors[name] = Kept(name, rows=(1, 2, 5))
        elif place % 5 == 1:
            tensors[f"new.{place}"] = Kept(name, rows=(4, 0))
        elif place % 5 == 2:
            tensors[name] = Kept(name)
        elif place % 5 == 3:
            content = bytes(range(256)) * 8
            kind = gguf.GGMLQuantizationType.F32
            tensors[name] = Kept(name, replaced=lambda c=content: c, shape=(2, 256), type=kind)
    edit = Edit.of(source)
    fields = {"text": Field.text("other"), "new": Field.text("key")}
    return replace(edit, tensors=tensors, fields={**edit.fields, **fields})


@pytest.mark.usefixtures("copying")
def test_an_edit_that_keeps_everything_gives_the_same_file(file: Path, tmp_path: Path) -> None:
    source = GGUFSource.read(file)
    edit = Edit.of(source)
    [made] = written(source, edit, tmp_path / "out.gguf")
    assert made.read_bytes() == file.read_bytes()
    assert edit.bytes_in(source) == file.stat().st_size


@pytest.mark.usefixtures("copying")
def test_what_stays_is_read_by_the_package_gguf(file: Path, tmp_path: Path) -> None:
    source = GGUFSource.read(file)
    edit = few_rows(source)
    [made] = written(source, edit, tmp_path / "out.gguf")
    before = {x.name: x for x in gguf.GGUFReader(file).tensors}
    after = {x.name: x for x in gguf.GGUFReader(made).tensors}
    assert [*after] == [*edit.tensors]
    for name, kept in edit.tensors.items():
        old, new = before[kept.source].data.view(np.uint8), after[name].data.view(np.uint8)
        if kept.replaced:
            assert new.tobytes() == kept.replaced()
        else:
            rows = range(6) if kept.rows is None else kept.rows
            assert (new == old[[*rows]]).all()
    foreseen, found = edit.foreseen(source), GGUFSource.read(made)
    assert {n: (x.shape, x.type, x.nbytes) for n, x in foreseen.tensors.items()} == {
        n: (x.shape, x.type, x.nbytes) for n, x in found.tensors.items()
    }
    assert edit.bytes_in(source) == made.stat().st_size
    keys = [*source.fields, "new"]
    assert [*found.fields] == keys
    same = (name for name in keys if name not in ("text", "new"))
    assert all(found.fields[n].encoded() == source.fields[n].encoded() for n in same)


def test_new_bytes_can_come_in_pieces(file: Path, tmp_path: Path) -> None:
    source = GGUFSource.read(file)
    name = "tensor.F32"
    content = np.arange(6 * 3 * 512, dtype="<f4")

    def pieces() -> Iterator[Any]:
        yield from np.split(content, 6)

    edit = replace(Edit.of(source), tensors={name: Kept(name, replaced=pieces)})
    [made] = written(source, edit, tmp_path / "out.gguf")
    assert GGUFSource.read(made).tensors[name].read().tobytes() == content.tobytes()
    for wrong in (content[:-1], np.append(content, content)):
        edit = replace(edit, tensors={name: Kept(name, replaced=lambda x=wrong: x)})
        with pytest.raises(ValueError, match=name):
            written(source, edit, tmp_path / "out.gguf")


WRONG: dict[str, Callable[[Edit], Edit]] = {
    "row": lambda edit: replace(edit, tensors={"a": Kept("tensor.F32", rows=(0, 6))}),
    "no row": lambda edit: replace(edit, tensors={"a": Kept("tensor.F32", rows=())}),
    "block": lambda edit: replace(edit, tensors={"a": Kept("tensor.Q4_K", shape=(2, 128))}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_edit_that_does_not_fit_writes_nothing(wrong: str, file: Path, tmp_path: Path) -> None:
    source = GGUFSource.read(file)
    with pytest.raises(ValueError, match=r"."):
        written(source, WRONG[wrong](Edit.of(source)), tmp_path / "out.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_alignment_of_the_source_stays(alignment: int, tmp_path: Path) -> None:
    content = replace(SOUND, tensors=SOUND.tensors[:1], alignment=alignment)
    content = content.plus(key("general.alignment", U32, number(alignment)))
    (tmp_path / "a.gguf").write_bytes(content.content)
    source = GGUFSource.read(tmp_path / "a.gguf")
    [name] = source.tensors
    tensors = {"one": Kept(name, rows=(2,)), "two": Kept(name, rows=(3, 1))}
    [made] = written(source, replace(Edit.of(source), tensors=tensors), tmp_path / "b.gguf")
    found = GGUFSource.read(made)
    assert found.fields["general.alignment"].value == alignment
    assert all(tensor.offset % alignment == 0 for tensor in found.tensors.values())
    rows = source.tensors[name].read()
    assert (found.tensors["two"].read() == rows[[3, 1]]).all()


class Stopped(Exception):  # noqa: N818
    """The run is killed."""


class StopAt(Silent):
    """Stops a run at a piece."""

    def __init__(self, place: int) -> None:
        self.place = place

    def step(self, count: int = 1, note: str = "") -> None:
        self.place -= 1
        if self.place < 0:
            raise Stopped


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("tensors", [0, 10])
def test_a_run_that_is_stopped_anywhere_is_resumed_to_the_same_bytes(
    tensors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing, "SYNCED_BYTES", 7000)
    written_by_gguf(tmp_path / "m.gguf", tensors)
    source = GGUFSource.read(next(iter(sorted(tmp_path.glob("m*.gguf")))))
    edit, room = few_rows(source), tmp_path / "whole"
    room.mkdir()
    whole = {x.name: x.read_bytes() for x in written(source, edit, room / "out.gguf")}
    place = again = 0
    while True:
        room = tmp_path / f"stopped-{place}"
        room.mkdir()
        ledger = Ledger(room / "ledger")
        ledger.begin()
        try:
            written(source, edit, room / "out.gguf", StopAt(place), ledger)
        except Stopped:
            place, again = place + 7, again + 1
        else:
            break
        for file in room.glob("*.gguf"):  # torn: what follows the last line of the ledger
            with file.open("ab") as stream:
                stream.write(b"torn")
        ledger = Ledger(room / "ledger")
        ledger.resume()
        done = {entry["file"]: entry["bytes"] for entry in ledger.entries}
        made = written(source, edit, room / "out.gguf", ledger=ledger)
        assert {x.name: x.read_bytes() for x in made} == whole
        assert all(done.get(x.name, 0) <= len(whole[x.name]) for x in made)
    assert again > 5


def test_parts_stay_parts(tmp_path: Path) -> None:
    written_by_gguf(tmp_path / "m.gguf", tensors=10)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    source = GGUFSource.read(parts[2])
    made = written(source, Edit.of(source), tmp_path / "out.gguf")
    assert [x.name for x in made] == [f"out-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    assert [x.read_bytes() for x in made] == [x.read_bytes() for x in parts]
    few = few_rows(source)
    found = GGUFSource.read(written(source, few, tmp_path / "few.gguf")[0])
    assert [*found.tensors] == [*few.tensors]
    assert found.fields["split.tensors.count"].value == len(few.tensors)


def test_the_name_of_a_part_names_all() -> None:
    assert part_name(Path("a.gguf"), 0, 1) == Path("a.gguf")
    assert part_name(Path("a.gguf"), 1, 3) == Path("a-00002-of-00003.gguf")
    assert part_name(Path("a-00001-of-00009.gguf"), 1, 3) == Path("a-00002-of-00003.gguf")


@pytest.mark.usefixtures("copying")
def test_a_source_that_becomes_shorter_is_an_error(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    source = GGUFSource.read(copy)
    os.truncate(copy, copy.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="shorter") as raised:
        written(source, Edit.of(source), tmp_path / "out.gguf")
    assert raised.value.where == str(copy)
