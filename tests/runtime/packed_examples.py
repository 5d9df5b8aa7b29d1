"""Small compressed folders, and ways to forge them: changed and made to fit again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.runtime.formats import Layout, PartSpec, formats
from secateur.runtime.packed import PlannedFile, quantization_config, write_packed

LAYOUTS = {
    "layer.bitmask16": Layout("bitmask", "bfloat16", (37, 65)),
    "layer.bitmask8": Layout("bitmask", "int8", (24, 70), transposed=True),
    "layer.two_of_four": Layout("n-of-m", "float16", (9, 64), "2:4"),
    "layer.four_of_eight": Layout("n-of-m", "int8", (9, 72), "4:8"),
    "embedding": Layout("dense", "int8", (50, 16)),
    "layer.bitmask4": Layout("bitmask", "int4", (23, 71), group=32),
    "layer.bitmask3": Layout("bitmask", "int3", (41, 200), transposed=True, group=64),
    "layer.dense4": Layout("dense", "int4", (11, 33), group=32),
    "layer.dense3": Layout("dense", "int3", (22, 130), group=128),
    "layer.two_of_four4": Layout("n-of-m", "int4", (9, 68), "2:4", group=64),
    "layer.four_of_eight3": Layout("n-of-m", "int3", (150, 72), "4:8", group=32),
    "layer.bitmask2": Layout("bitmask", "int2", (19, 75), group=32),
    "layer.dense2": Layout("dense", "int2", (13, 131), group=64),
    "layer.two_of_four2": Layout("n-of-m", "int2", (9, 132), "2:4", group=128),
}
SMALL_GRIDS = {
    "layer.bitmask4": Layout("bitmask", "int4", (7, 37), group=32),
    "layer.bitmask3": Layout("bitmask", "int3", (5, 100), transposed=True, group=64),
    "layer.dense4": Layout("dense", "int4", (5, 33), group=32),
    "layer.dense3": Layout("dense", "int3", (4, 130), group=128),
    "layer.two_of_four4": Layout("n-of-m", "int4", (5, 36), "2:4", group=64),
    "layer.four_of_eight3": Layout("n-of-m", "int3", (12, 40), "4:8", group=32),
    "layer.bitmask2": Layout("bitmask", "int2", (5, 45), group=32),
    "layer.dense2": Layout("dense", "int2", (4, 67), group=64),
}
FIRST = [
    "layer.bitmask16", "embedding", "norm.weight", "layer.two_of_four", "layer.bitmask4",
    "layer.dense3", "layer.four_of_eight3",
]  # fmt: skip
"""What lies in the first of the two files."""


def matrix(layout: Layout, seed: int) -> Tensor:
    """A matrix with zeros that fit a layout."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layout.shape, generator=generator)
    if layout.pattern:
        kept, group = layout.kept_of_group
        places = torch.rand(weight.view(-1, group).shape, generator=generator).argsort(1)
        weight.view(-1, group).masked_fill_(places >= kept, 0)
    elif layout.format == "bitmask":
        weight[torch.rand(layout.shape, generator=generator) < 0.5] = 0
    return weight.to(torch.bfloat16 if layout.integers else layout.dtype)


def packed_folder(
    folder: Path, *, archive: bool = False, layouts: Mapping[str, Layout] = LAYOUTS
) -> dict[str, Tensor]:
    """Write a compressed folder of two files; returns its tensors by full name."""
    folder.mkdir(parents=True)
    files = [PlannedFile(f"secateur-0000{i}-of-00002.safetensors") for i in (1, 2)]
    tensors: dict[str, Tensor] = {}
    for place, file in enumerate(files):
        for number, (name, layout) in enumerate(layouts.items()):
            if (name in FIRST) == (place == 0):
                file.layouts[name] = layout
                for suffix, part in (
                    formats[layout.format].pack(matrix(layout, number), layout).items()
                ):
                    file.tensors[f"{name}.{suffix}"] = PartSpec(part.dtype, tuple(part.shape))
                    tensors[f"{name}.{suffix}"] = part
        plain = {"norm.weight": torch.randn(31), "bias": torch.randn(700).bfloat16()}
        for name, tensor in plain.items():
            if (name in FIRST) == (place == 0):
                file.tensors[name] = PartSpec(tensor.dtype, tuple(tensor.shape))
                tensors[name] = tensor
    write_packed(folder, files, tensors.items(), archive=archive)
    config = {
        "model_type": "llama",
        "quantization_config": quantization_config(archive, layouts.values()),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


class Forgery:
    """A file taken apart, to be changed and put together so that all sums are right again.

    Attributes:
        header: name → dtype and shape.
        description: the description, as JSON.
        data: the stored bytes by name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        self.description: dict[str, Any] = json.loads(header.pop("__metadata__")["secateur"])
        self.header: dict[str, dict[str, Any]] = header
        self.data = {}
        for name, entry in header.items():
            start, end = entry.pop("data_offsets")
            self.data[name] = bytearray(raw[8 + length + start : 8 + length + end])

    def write(self, *, repair: bool = True, edit: Callable[[str], str] = str) -> None:
        """Put the file together.

        Args:
            repair: compute checksums and digest anew, as a forger would.
            edit: of the text of the header.
        """
        if repair:
            for name, stored in self.data.items():
                if name in self.description["checksums"]:
                    self.description["checksums"][name] = f"{zlib.crc32(stored):08x}"
            covered = {key: value for key, value in self.description.items() if key != "digest"}
            covered["tensors"] = {n: [e["dtype"], e["shape"]] for n, e in self.header.items()}
            text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
            self.description["digest"] = f"{zlib.crc32(text.encode()):08x}"
        metadata = {"format": "pt", "secateur": json.dumps(self.description)}
        header, end = {"__metadata__": metadata, **self.header}, 0
        for name, stored in self.data.items():
            if name in self.header:
                header[name] = {**self.header[name], "data_offsets": [end, end + len(stored)]}
                end += len(stored)
        text = edit(json.dumps(header)).encode()
        body = b"".join(bytes(self.data[name]) for name in self.data if name in self.header)
        self.file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def index_again(folder: Path) -> None:
    """Write the index that fits the files, after tensors were renamed or removed."""
    files = sorted(folder.glob("*.safetensors"))
    weight_map = {name: file.name for file in files for name in Forgery(file).header}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "secateur.safetensors.index.json").write_text(json.dumps(index))
