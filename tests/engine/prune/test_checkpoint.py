"""Checkpoints are read tensor by tensor, and the copy differs only where it was patched."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import CheckpointError, MemoryBudgetError
from secateur.models import checkpoint
from secateur.models.checkpoint import CheckpointReader, PatchedCopy, read_header


def folder_with(path: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 2) -> Path:
    path.mkdir()
    torch.manual_seed(0)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {f"a.{shard}": torch.randn(3, 5, dtype=dtype), f"b.{shard}": torch.ones(7)}
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("the source's own card")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_equals_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = folder_with(tmp_path / "m", dtype)
    reader = CheckpointReader(folder)
    for file in reader.files:
        for name, tensor in load_file(file).items():
            assert torch.equal(reader.read(name), tensor)
            assert reader.entries[name].dtype == tensor.dtype
    mapped = dict(reader.mapped(["a.1", "b.0"]))
    assert torch.equal(mapped["a.1"], reader.read("a.1"))
    assert reader.total_bytes == 2 * (15 * dtype.itemsize + 28)


def test_a_patched_copy_differs_only_where_it_was_patched(tmp_path: Path) -> None:
    reader = CheckpointReader(folder_with(tmp_path / "m"))
    copy = PatchedCopy(reader, tmp_path / "copy")
    copy.create()
    new = torch.randn(5, 3).t()  # neither contiguous nor of the stored dtype
    copy.write("a.1", new)
    copy.sync()
    after = CheckpointReader(tmp_path / "copy")
    assert torch.equal(after.read("a.1"), new.bfloat16())
    for name in ("a.0", "b.0", "b.1"):
        assert torch.equal(after.read(name), reader.read(name))
    assert (tmp_path / "copy" / "config.json").exists()
    assert not (tmp_path / "copy" / "README.md").exists()
    assert after.files[0].read_bytes() == reader.files[0].read_bytes()


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(folder_with(tmp_path / "m"))
    copy = PatchedCopy(reader, tmp_path / "copy")
    copy.create()
    with pytest.raises(CheckpointError, match=r"\(5, 3\) where \(3, 5\) is stored"):
        copy.write("a.1", torch.zeros(5, 3))


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_a_truncated_file_is_reported_by_name_and_size(tmp_path: Path, cut: int) -> None:
    folder = folder_with(tmp_path / "m")
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"(?s)bytes.*model-00001-of-00002"):
        CheckpointReader(folder)


def test_a_header_that_is_not_json(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((6).to_bytes(8, "little") + b"{oops}")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_header(file)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        CheckpointReader(folder)


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"(?s)can run code.*save_pretrained"):
        CheckpointReader(tmp_path)


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CheckpointReader(folder_with(tmp_path / "m"))
    copy = PatchedCopy(reader, tmp_path / "copy")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copyfile", full)
    with pytest.raises(MemoryBudgetError, match="disk"):
        copy.create()


def write_header(file: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "its header describes 1"),
        ({"a": GOOD, "b": GOOD}, "the one before it ends at"),
        ({"b": {**GOOD, "shape": [1], "data_offsets": [4, 8]}}, "begins at byte"),
        ({"a": {**GOOD, "shape": [3]}}, "has 8 bytes, its shape .* needs 12"),
        ({"a": {**GOOD, "shape": [2**32, 2**32]}}, "needs"),
        ({"a": {**GOOD, "shape": [2**63, 0]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [-2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": "2"}}, "impossible shape"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "impossible byte range"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "impossible byte range"),
        ({"a": {**GOOD, "dtype": "F33"}}, "unknown dtype F33"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "not described by"),
        ({"a": 5}, "not described by"),
        ({"a": {**GOOD, "data_offsets": [0, 16], "shape": [4]}}, "its header describes"),
        ({"__metadata__": {"x": 1}, "a": GOOD}, "metadata is not a table"),
        ([1], "not a JSON object"),
        (f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}', "'a' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, header: object, why: str) -> None:
    assert read_header(write_header(tmp_path / "good", {"a": GOOD}))["a"].shape == (2,)
    with pytest.raises(CheckpointError, match=why):
        read_header(write_header(tmp_path / "bad", header))


@pytest.mark.parametrize("name", ["../secret.safetensors", "..", "a/b.safetensors", "x.bin", 5])
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: object) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index of shards"):
        CheckpointReader(tmp_path)
