"""A thousand files that are damaged or forged: each is refused, or read exactly as it was written.

Damaged ones still carry the sums of the whole file; forged ones are changed by someone who
computes all sums anew. Of a forged file that is not refused, every matrix must unpack: then it is
a file that says something else, and no longer a fault.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch

from oracles import packed_reader
from runtime.mutations import anywhere
from runtime.packed_examples import SMALL_GRIDS, Forgery, packed_folder
from secateur.errors import CheckpointError
from secateur.runtime.formats import bitmask_parts, formats
from secateur.runtime.packed import PackedCheckpoint

ROUNDS = 500
"""For a plain folder and again for an archive."""


def cut(draw: random.Random, file: Path) -> None:
    """End the file early, or go on with other bytes."""
    raw = file.read_bytes()
    end = draw.randrange(len(raw))
    more = draw.choice([b"", b"", b"\0" * 64, raw[:100]])
    file.write_bytes((raw[:end] if draw.random() < 0.8 else raw + b"\0") + more)


def flip(draw: random.Random, file: Path) -> None:
    """Flip bits, half of the time in the header."""
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    end = 8 + length if draw.random() < 0.5 else len(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        raw[draw.randrange(end)] ^= 1 << draw.randrange(8)
    file.write_bytes(raw)


def splice(draw: random.Random, file: Path) -> None:
    """Overwrite, remove or repeat a run of bytes."""
    raw = file.read_bytes()
    start = draw.randrange(len(raw))
    end = min(len(raw), start + draw.choice([1, 8, 200]))
    between = draw.choice([b"", raw[start:end] * 2, b"\xff" * (end - start), b"[" * 5000])
    file.write_bytes(raw[:start] + between + raw[end:])


def false_length(draw: random.Random, file: Path) -> None:
    """Lie about the length of the header."""
    raw = file.read_bytes()
    length = draw.choice([0, 1, 2, 10**9, 2**63, 2**64 - 1, len(raw) - 8, len(raw)])
    file.write_bytes(struct.pack("<Q", length) + raw[8:])


def rewrite_header(draw: random.Random, file: Path) -> None:
    """Change the header's text: offsets, dtypes, shapes, names; one name twice."""
    forgery = Forgery(file)

    def edit(text: str) -> str:
        header = json.loads(text)
        if draw.random() < 0.2:
            name = draw.choice(sorted(forgery.header))
            again = json.dumps({name: header[name]})[1:-1]
            return text[:-1] + ", " + again + "}"
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        metadata = header["__metadata__"]
        if draw.random() < 0.2:
            metadata = anywhere(draw, metadata)
        changed = anywhere(draw, entries)
        if not isinstance(changed, dict):
            return json.dumps(changed)
        return json.dumps({"__metadata__": metadata, **changed})

    forgery.write(repair=False, edit=edit)


def damage_description(draw: random.Random, file: Path) -> None:
    """Change the description and leave its digest."""
    forgery = Forgery(file)
    changed = anywhere(draw, forgery.description)
    forgery.description = changed if isinstance(changed, dict) else {"version": changed}
    forgery.write(repair=False)


def forge_description(draw: random.Random, file: Path) -> None:
    """Change layouts, checksums or archive entries, and compute the digest anew."""
    forgery = Forgery(file)
    key = draw.choice(["layouts", "layouts", "layouts", "archived", "files", "version", "archive"])
    forgery.description[key] = anywhere(draw, forgery.description[key])
    forgery.write()


def forge_data(draw: random.Random, file: Path) -> None:
    """Change masks, codes, values, scales or frames, and compute the checksums anew."""
    forgery = Forgery(file)
    name = draw.choice(sorted(forgery.data))
    stored = forgery.data[name]
    for _ in range(draw.choice([1, 3, 50])):
        stored[draw.randrange(len(stored))] = draw.choice(
            [0, 1, 255, 127, 128, draw.randrange(256)]
        )
    forgery.write()


def forge_shapes(draw: random.Random, file: Path) -> None:
    """Let counts disagree: longer or shorter tensors that fit their own header."""
    forgery = Forgery(file)
    name = draw.choice(sorted(forgery.header))
    entry, stored = forgery.header[name], forgery.data[name]
    size = {"F32": 4, "BF16": 2, "F16": 2}.get(entry["dtype"], 1)
    row = size
    for side in entry["shape"][1:]:
        row *= side
    rows = max(0, entry["shape"][0] + draw.choice([-1, 1, -3, 7]))
    entry["shape"][0] = rows
    forgery.data[name] = (stored + stored)[: rows * row].ljust(rows * row, b"\0")
    if name in forgery.description["archived"] and draw.random() < 0.5:
        shape = forgery.description["archived"][name]["shape"]
        shape[0] = draw.choice([shape[0] + 1, 0, 2**40, shape[0] * 1000])
    forgery.write()


def forge_names(draw: random.Random, file: Path) -> None:
    """Rename or drop a tensor everywhere but in its layout."""
    forgery = Forgery(file)
    name = draw.choice(sorted(forgery.header))
    new = draw.choice([name + "2", "layer.bitmask16.weight", "embedding.codes", "\ud800", ""])
    for table in (
        forgery.header,
        forgery.data,
        forgery.description["checksums"],
        forgery.description["archived"],
    ):
        if name in table:
            value = table.pop(name)
            if draw.random() < 0.8:
                table[new] = value
    forgery.data = {n: forgery.data.get(n, bytearray()) for n in forgery.header}
    forgery.write()


DAMAGES = [cut, flip, flip, splice, false_length, rewrite_header, damage_description]
FORGERIES = [forge_description, forge_description, forge_data, forge_shapes, forge_names]


def read_all_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor; and every packed matrix unpacked in both ways."""
    packed = PackedCheckpoint(folder)
    found = dict(packed.tensors())
    for name, layout in packed.layouts.items():
        parts = packed.parts(name)
        unpacked = formats[layout.format].unpack(parts, layout)
        assert tuple(unpacked.shape) == layout.shape
        mask = bitmask_parts(parts, layout)["bitmask"]
        assert mask.shape == (layout.shape[0], -(-layout.shape[1] // 8))
    return found


@pytest.mark.parametrize("archive", [False, True])
def test_a_thousand_hostile_files(tmp_path: Path, archive: bool) -> None:
    whole = tmp_path / "whole"
    expected = packed_folder(whole, archive=archive)
    read_all_of(whole)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = {damage.__name__: 0 for damage in (*DAMAGES, *FORGERIES)}
    for seed in range(ROUNDS):
        draw = random.Random(seed)
        folder = tmp_path / "mutated"
        shutil.copytree(whole, folder)
        damage = draw.choice(DAMAGES if draw.random() < 0.6 else FORGERIES)
        damage(draw, draw.choice(sorted(folder.glob("*.safetensors"))))
        try:
            found = read_all_of(folder)
        except CheckpointError:
            refused[damage.__name__] += 1
        else:
            if damage in DAMAGES:
                assert found.keys() == expected.keys(), seed
                for name, tensor in found.items():
                    assert tensor.dtype == expected[name].dtype, (seed, name)
                    assert torch.equal(tensor, expected[name]), (seed, name)
        shutil.rmtree(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024  # KiB
    assert all(refused.values()), refused
    assert sum(refused.values()) > 0.8 * ROUNDS


@pytest.mark.parametrize("archive", [False, True])
def test_a_thousand_hostile_bit_streams(
    tmp_path: Path, archive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int4 and int3: what is not refused is read as by the reader written from the page."""
    monkeypatch.setattr("secateur.runtime.archive.SMALLEST_BYTES", 40)
    whole, folder = tmp_path / "whole", tmp_path / "mutated"
    expected = packed_folder(whole, archive=archive, layouts=SMALL_GRIDS)
    refused = forged = 0
    for seed in range(ROUNDS):
        draw = random.Random(seed)
        shutil.copytree(whole, folder)
        damage = draw.choice(
            DAMAGES if draw.random() < 0.3 else [*FORGERIES, forge_data, forge_data]
        )
        damage(draw, draw.choice(sorted(folder.glob("*.safetensors"))))
        try:
            found = read_all_of(folder)
        except CheckpointError:
            refused += 1
        else:
            if damage in DAMAGES:
                assert all(torch.equal(found[name], x) for name, x in expected.items()), seed
            packed = PackedCheckpoint(folder)
            for file in packed.files:
                for name, matrix in packed_reader.read_matrices(file).items():
                    layout = packed.layouts[name]
                    ours = formats[layout.format].unpack(packed.parts(name), layout)
                    assert torch.equal(ours, torch.tensor(matrix)), (seed, name)
            forged += damage in FORGERIES
        shutil.rmtree(folder)
    assert refused > 0.5 * ROUNDS
    assert forged > 0.1 * ROUNDS
