"""Compressed folders are read as they were written, and refused by name when they are not whole."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import zstandard
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from oracles import packed_reader
from runtime.packed_examples import LAYOUTS, Forgery, matrix, packed_folder
from secateur.errors import CheckpointError
from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.runtime import archive as archives
from secateur.runtime.formats import PartSpec, formats
from secateur.runtime.formats.bits import pack_numbers, unpack_numbers
from secateur.runtime.install import DenseView, open_checkpoint
from secateur.runtime.packed import (
    Archived,
    PackedCheckpoint,
    from_archive,
    is_packed,
    to_archive,
)

FIRST_FILE, SECOND_FILE = (f"secateur-0000{i}-of-00002.safetensors" for i in (1, 2))


def checked(entry: dict[str, object], stored: Tensor) -> Archived:
    """An entry of a description, as a file's text gives it."""
    found = TypeAdapter(Archived).validate_python(json.loads(json.dumps(entry)))
    found.check(PartSpec(stored.dtype, tuple(stored.shape)))
    return found


@pytest.mark.parametrize("archive", [False, True])
def test_what_was_written_is_read(tmp_path: Path, archive: bool) -> None:
    tensors = packed_folder(tmp_path / "m", archive=archive)
    packed = PackedCheckpoint(tmp_path / "m")
    assert packed.archive is archive
    assert packed.layouts == LAYOUTS
    found = list(packed.tensors())
    assert sorted(name for name, _ in found) == sorted(tensors)
    for name, tensor in found:
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
        assert packed.specs[name] == PartSpec(tensor.dtype, tuple(tensor.shape))
    owners = [name.rpartition(".")[0] or name for name, _ in found]
    runs = [owner for owner, _ in itertools.groupby(owners)]
    assert len(runs) == len(set(runs))  # the parts of a matrix follow each other
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        weight = matrix(layout, number)
        unpacked = formats[layout.format].unpack(packed.parts(name), layout)
        if layout.values == "int8":
            weight = dequantize_rows(*quantize_rows(weight))
        elif layout.grid is not None:
            weight = layout.grid.dequantize(*layout.grid.quantize(weight))
        assert torch.equal(unpacked, weight)
    stored = [tensor for file in packed.files for tensor in load_file(file).items()]
    assert len(stored) == len(tensors)  # the safetensors library reads the files too


@pytest.mark.parametrize("archive", [False, True])
def test_a_reader_written_from_the_specification_agrees(tmp_path: Path, archive: bool) -> None:
    packed_folder(tmp_path / "m", archive=archive)
    packed = PackedCheckpoint(tmp_path / "m")
    found = {}
    for file in packed.files:
        found |= packed_reader.read_matrices(file)
    assert found.keys() == packed.layouts.keys()
    for name, layout in packed.layouts.items():
        ours = formats[layout.format].unpack(packed.parts(name), layout).float()
        assert torch.equal(ours, torch.tensor(found[name])), name


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    packed_folder(tmp_path / "m")
    for entry in PackedCheckpoint(tmp_path / "m").entries.values():
        assert entry.offset % entry.dtype.itemsize == 0


def test_the_dense_view_is_the_dense_checkpoint(tmp_path: Path) -> None:
    packed_folder(tmp_path / "m")
    assert is_packed(tmp_path / "m")
    view = open_checkpoint(tmp_path / "m")
    assert isinstance(view, DenseView)
    assert set(view.entries) == {f"{name}.weight" for name in LAYOUTS} | {"norm.weight", "bias"}
    assert view.entries["layer.bitmask8.weight"].shape == (70, 24)  # stored [in, out] by its source
    for name, tensor in view.mapped([*view.entries]):
        assert (tensor.dtype, tuple(tensor.shape)) == (
            view.entries[name].dtype,
            view.entries[name].shape,
        )
        assert tensor.is_contiguous()
        assert tensor.is_floating_point()
    assert torch.equal(view.read("layer.bitmask16.weight"), matrix(LAYOUTS["layer.bitmask16"], 0))
    assert view.total_bytes == sum(e.size_bytes for e in view.entries.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_archived_tensors_come_back(dtype: torch.dtype) -> None:
    for shape in ((1500,), (37, 65), (3, 5, 401), (2, 3)):
        tensor = (torch.randn(shape) * 9).to(dtype)
        stored, archived = to_archive(tensor)
        found = from_archive(stored, archived)
        assert torch.equal(found, tensor)
        assert found.dtype == dtype
        if tensor.nbytes > archives.SMALLEST_BYTES:
            checked(archived.to_json(), stored)


@pytest.mark.parametrize("width", [3, 5, 6, 7])
def test_numbers_that_straddle_bytes_are_widened(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for rows, count in ((1, 90_000), (600, 51), (400, 88)):
        numbers = torch.randn(rows, count, generator=generator) * 2 ** (width - 3)
        numbers = numbers.round().clamp(1 - 2 ** (width - 1), 2 ** (width - 1) - 1).char()
        packed = pack_numbers(numbers, width)
        plain, _ = to_archive(packed)
        stored, archived = to_archive(packed, width)
        assert archived.codec == f"zstd-{width}"
        assert torch.equal(from_archive(stored, archived), packed)
        chance = numbers.unique(return_counts=True)[1] / numbers.numel()
        entropy = float(-(chance * chance.log2()).sum()) * numbers.numel() / 8
        assert stored.numel() < (1.02 if rows == 1 else 1.1) * entropy
        assert stored.numel() < 0.97 * plain.numel()
        assert checked(archived.to_json(), stored) == archived
    anything = torch.randint(0, 256, (7, 3, 401), generator=generator).to(torch.uint8)
    assert torch.equal(from_archive(*to_archive(anything, width)), anything)


def test_the_example_of_widened_numbers() -> None:
    numbers = unpack_numbers(torch.tensor([0x33, 0x52], dtype=torch.uint8), 3, 6)
    assert numbers.tolist() == [3, 6, 0, 1, 5, 0]
    assert pack_numbers(numbers, 4).tolist() == [0x63, 0x10, 0x05]


def test_widened_numbers_that_do_not_fit_are_refused() -> None:
    packed = torch.full((3, 1001), 0x49, dtype=torch.uint8)
    _, archived = to_archive(packed, 3)
    count = -(-8 * 1001 // 3)
    wide = pack_numbers(unpack_numbers(packed, 3, count), 4)
    for row, byte, value in ((0, 0, 0x80), (2, -1, 0x20)):
        wrong = wide.clone()
        wrong[row, byte] |= value
        frame = zstandard.ZstdCompressor().compress(wrong.numpy().tobytes())
        stored = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        with pytest.raises(CheckpointError, match="1 widened"):
            from_archive(stored, archived)
    short = zstandard.ZstdCompressor().compress(packed.numpy().tobytes())
    stored = torch.frombuffer(bytearray(short), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"3003.*4005"):
        from_archive(stored, archived)
    with pytest.raises(CheckpointError, match="I8"):
        checked({**archived.to_json(), "dtype": "I8"}, torch.zeros(2000, dtype=torch.uint8))


def test_what_shrinks_too_well_to_be_believed_is_not_compressed(monkeypatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_BELIEVED_BYTES", 10_000)
    for elements, codec in ((2_000, "zstd"), (200_000, "none")):
        stored, archived = to_archive(torch.zeros(elements))
        assert archived.codec == codec
        checked(archived.to_json(), stored)
        assert torch.equal(from_archive(stored, archived), torch.zeros(elements))


def test_bombs_are_refused_before_they_are_opened() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(2**20))
    stored = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    entry = {"dtype": "U8", "shape": [2**40], "codec": "zstd"}
    with pytest.raises(CheckpointError, match=str(2**40)):
        checked(entry, stored)
    for change in ({"shape": [2**62, 2**62]}, {"dtype": "U9"}, {"codec": "gzip"}, {"more": 1}):
        with pytest.raises(ValidationError):
            checked({**entry, **change}, stored)
    smaller = checked({**entry, "shape": [4096]}, stored)
    with pytest.raises(CheckpointError, match=r"1048576.*4096"):
        from_archive(stored, smaller)
    lying = bytearray(frame)  # a frame that holds more than it says
    at = frame.index((2**20).to_bytes(4, "little"))
    lying[at : at + 4] = (4096).to_bytes(4, "little")
    with pytest.raises(CheckpointError, match="frame"):
        from_archive(torch.frombuffer(lying, dtype=torch.uint8), smaller)


def config_with(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def remove_from_index(folder: Path) -> None:
    file = folder / "secateur.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f == FIRST_FILE}
    file.write_text(json.dumps(index))


def misplace(folder: Path) -> None:
    file = folder / "secateur.safetensors.index.json"
    file.write_text(file.read_text().replace('"bias": "secateur-00002', '"bias": "secateur-00001'))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda f: config_with(f, version=6), "6"),
        (lambda f: config_with(f, version=4), "4"),
        (lambda f: config_with(f, version=True), "True"),
        (lambda f: config_with(f, archive="no"), "archive"),
        (lambda f: config_with(f, archive=True), "archive"),
        (lambda f: config_with(f, activations={"values": "int4"}), "int4"),
        (lambda f: config_with(f, quant_method="gptq"), "config.json"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json"),
        (lambda f: (f / SECOND_FILE).unlink(), "1 of 2"),
        (remove_from_index, SECOND_FILE),
        (misplace, "'bias'"),
        (lambda f: (f / "secateur.safetensors.index.json").write_text("{"), "index.json"),
        (lambda f: shutil.copy(f / FIRST_FILE, f / SECOND_FILE), SECOND_FILE),
    ],
)
def test_folders_that_are_not_whole_are_refused(tmp_path: Path, damage, why: str) -> None:
    packed_folder(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(CheckpointError, match=why):
        PackedCheckpoint(tmp_path / "m")


def test_a_dense_folder_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_packed(tmp_path)
    with pytest.raises(CheckpointError, match="secateur compress"):
        PackedCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["layer.bitmask16.bitmask", "norm.weight", "bias"])
def test_a_flipped_bit_is_reported_by_tensor(tmp_path: Path, name: str) -> None:
    packed_folder(tmp_path / "m")
    packed = PackedCheckpoint(tmp_path / "m")
    entry = packed.entries[name]
    raw = bytearray(entry.file.read_bytes())
    raw[entry.offset + 5] ^= 16
    entry.file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=name):
        list(PackedCheckpoint(tmp_path / "m").tensors())


def test_a_newer_file_says_what_to_do(tmp_path: Path) -> None:
    packed_folder(tmp_path / "m")
    forgery = Forgery(tmp_path / "m" / FIRST_FILE)
    forgery.description["version"] = 6
    forgery.write()
    with pytest.raises(CheckpointError, match="newer secateur"):
        PackedCheckpoint(tmp_path / "m")


def test_an_exchanged_dtype_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    packed_folder(tmp_path / "m")
    forgery = Forgery(tmp_path / "m" / SECOND_FILE)
    forgery.header["bias"]["dtype"] = "F16"
    forgery.write(repair=False)
    with pytest.raises(CheckpointError, match="digest"):
        PackedCheckpoint(tmp_path / "m")
