"""The reader of GGUF files: equal to the package `gguf` on sound files, strict on all others."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    HOSTILE,
    SOUND,
    STRING,
    U32,
    array,
    key,
    number,
    tensor,
    text,
    written_by_gguf,
)

import secateur
from secateur.errors import CheckpointError
from secateur.exporting.gguf.edit import Edit, written
from secateur.models.gguf_file import GGUFSource, StoredTensor
from secateur.models.sources import resolve


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_by_gguf(tmp_path_factory.mktemp("all") / "all.gguf")


def test_all_types_are_read_as_the_package_gguf_reads_them(file: Path) -> None:
    source, expected = GGUFSource.read(file), gguf.GGUFReader(file)
    assert source.architecture == "anything"
    assert len(source.tensors) == len(expected.tensors) == len(gguf.GGMLQuantizationType)
    for theirs in expected.tensors:
        ours = source.tensors[theirs.name]
        assert ours.type == theirs.tensor_type
        assert ours.shape == tuple(theirs.shape.tolist())[::-1]
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        rows = ours.read([4, 5, 1])
        content = np.ascontiguousarray(theirs.data).view(np.uint8).reshape(6, -1)
        assert (rows == content[[4, 5, 1]]).all()
    own = {name for name in expected.fields if not name.startswith("GGUF.")}
    assert set(source.fields) == own
    for name, field in source.fields.items():
        theirs = expected.fields[name]
        assert field.type == theirs.types[0]
        assert field.items == (theirs.types[1] if len(theirs.types) > 1 else None)
        value = field.value.tolist() if isinstance(field.value, np.ndarray) else field.value
        assert value == theirs.contents()


def test_a_vector_of_blocks_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(SOUND.with_tensor(0, tensor("v", (1024,), 12, 0)).content)
    with pytest.raises(CheckpointError, match="Q4_K"):
        GGUFSource.read(tmp_path / "v.gguf").tensors["v"].read([0])


PATHS = {
    "structure": lambda file: secateur.structure(
        file, experts=0.5, experts_by="random", output=file.with_name("out.gguf")
    ),
    "inspect": secateur.inspect,
    "source": resolve,
    "prune": lambda file: secateur.prune(file, sparsity=0.5, output=file.with_name("out")),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_is_written(
    what: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    room = tmp_path / "room"
    room.mkdir()
    (room / "bad.gguf").write_bytes(HOSTILE[what])
    with pytest.raises(CheckpointError) as raised:
        PATHS[path](room / "bad.gguf")
    assert "bad.gguf" in str(raised.value.where)
    assert raised.value.remedy
    assert [x.name for x in room.iterdir()] == ["bad.gguf"]
    assert (room / "bad.gguf").read_bytes() == HOSTILE[what]


def test_a_sound_file_of_the_same_making_is_read(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(SOUND.content)
    source = GGUFSource.read(tmp_path / "good.gguf")
    assert source.get("expert_count") == 4
    assert [x.shape for x in source.tensors.values()] == [(4, 2, 256), (4, 8), (8,)]


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bits_are_refused_or_another_sound_file(seed: int, tmp_path: Path) -> None:
    draw, sound = random.Random(seed), SOUND.plus(*_more_keys())
    refused = 0
    for trial in range(40):
        content = bytearray(sound.content)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(sound.header))] ^= 1 << draw.randrange(8)
        file = tmp_path / f"{trial}.gguf"
        file.write_bytes(content)
        try:
            source = GGUFSource.read(file)
        except CheckpointError:
            refused += 1
            continue
        [made] = written(source, Edit.of(source), tmp_path / "again.gguf")
        again = GGUFSource.read(made)
        assert {k: x.encoded() for k, x in again.fields.items()} == {
            k: x.encoded() for k, x in source.fields.items()
        }
        for one, other in zip(source.tensors.values(), again.tensors.values(), strict=True):
            assert (one.name, one.shape, one.type) == (other.name, other.shape, other.type)
            assert _bytes_of(one) == _bytes_of(other)
    assert 0 < refused < 40


def _bytes_of(stored: StoredTensor) -> bytes:
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset)
        return stream.read(stored.nbytes)


def _more_keys() -> list[bytes]:

    return [
        key("general.alignment", U32, number(32)),
        key("flag", BOOL, b"\1"),
        key("words", ARRAY, array(STRING, 3, text("a") + text("") + text("ü"))),
        key("numbers", ARRAY, array(U32, 3, bytes(12))),
    ]


# -- parts ---------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The tensors of every type in four files."""
    written_by_gguf(tmp_path / "m.gguf", tensors=10)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_parts_are_read_from_any_of_them(file: Path, parts: list[Path]) -> None:
    assert len(parts) == 4
    whole = GGUFSource.read(file)
    for part in parts:
        source = GGUFSource.read(part)
        assert source.file == parts[0]
        assert [*source.tensors] == [*whole.tensors]
        assert source.size_bytes == sum(x.stat().st_size for x in parts)
        for name, stored in source.tensors.items():
            assert _bytes_of(stored) == _bytes_of(whole.tensors[name])


def damaged_parts(parts: list[Path], how: str) -> None:
    if how == "missing":
        parts[2].unlink()
    elif how == "exchanged":
        content = parts[1].read_bytes()
        parts[1].write_bytes(parts[2].read_bytes())
        parts[2].write_bytes(content)
    elif how == "renamed":
        parts[0].rename(parts[0].with_name("first.gguf"))
    elif how == "of another model":
        tensors = SOUND.tensors
        split = {"split.no": 1, "split.count": 4, "split.tensors.count": 99}
        keys = tuple(key(name, U32, number(value)) for name, value in split.items())
        parts[1].write_bytes(replace(SOUND, keys=keys, tensors=tensors).content)
    else:
        parts[3].write_bytes(parts[3].read_bytes()[:-1000])


@pytest.mark.parametrize("how", ["missing", "exchanged", "renamed", "of another model", "cut off"])
def test_damaged_parts_are_refused(how: str, parts: list[Path]) -> None:
    damaged_parts(parts, how)
    named = parts[0].with_name("first.gguf") if how == "renamed" else parts[0]
    for call in (secateur.inspect, GGUFSource.read, resolve):
        with pytest.raises(CheckpointError):
            call(named)


def test_a_model_in_parts_is_not_expanded(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match="4 files"):
        resolve(parts[1])


def test_a_large_vocabulary_is_read_without_a_quadratic_cost(tmp_path: Path) -> None:

    words = [f"word{number}" for number in range(100_000)]
    content = array(STRING, len(words), b"".join(map(text, words)))
    (tmp_path / "v.gguf").write_bytes(SOUND.plus(key("words", ARRAY, content)).content)
    assert GGUFSource.read(tmp_path / "v.gguf").fields["words"].value == words
