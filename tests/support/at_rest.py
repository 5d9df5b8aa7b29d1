"""Checkpoints whose weights are stored in fewer bits, made from tiny models, and slow oracles.

The oracles go number by number, from the words of the formats' own descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, split_shards
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def describe_as(folder: Path, quantization: dict[str, Any]) -> None:
    """Write a description of the form into the configuration."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": quantization}))


def described(folder: Path) -> dict[str, Any]:
    """The description of the form in the configuration; empty if there is none."""
    found = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    return dict(found)


def text_file(place: Path) -> Path:
    """A text to calibrate on."""
    file = place / "text.txt"
    file.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return file


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def to_float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix in float8 and its scales, the largest of a block becoming 448."""
    rows, columns = weight.shape
    scales = torch.ones(ceil(rows / block[0]), ceil(columns / block[1]))
    codes = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            part = weight[place].float()
            scales[i, j] = part.abs().max().clamp(min=1e-8) / 448
            codes[place] = (part / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def from_float8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix, number by number, in bfloat16."""
    made = torch.empty(codes.shape, dtype=torch.bfloat16)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            made[i, j] = codes[i, j].float() * scales[i // block[0], j // block[1]].float()
    return made


def in_float8(
    folder: Path, family: str, block: tuple[int, int] = (16, 16), shards: int = 1, **sizes: Any
) -> Path:
    """A tiny model whose decoder matrices are in float8 with block scales; routers are not."""
    save_tiny(folder, family, dtype=torch.bfloat16, **sizes)
    tensors = load_file(folder / "model.safetensors")
    spared = ["lm_head"]
    for name, weight in list(tensors.items()):
        if weight.ndim == 2 and ".layers." in name:
            if name.endswith("gate.weight"):
                spared.append(name.removesuffix(".weight"))
                continue
            tensors[name], tensors[f"{name}_scale_inv"] = to_float8(weight, block)
    save_in(folder, tensors, shards)
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [*block],
    }
    describe_as(folder, {**quantization, "modules_to_not_convert": spared})
    return folder


def save_in(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write tensors in so many files."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if shards > 1:
        split_shards(folder, shards)


def to_microscaled(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Experts [experts, in, out] as blocks and scales of 4-bit floating point."""
    rows = experts.float().transpose(1, 2).contiguous()
    count, out, columns = rows.shape
    groups = rows.view(count, out, columns // 32, 32)
    exponents = torch.log2(groups.abs().amax(-1).clamp(min=1e-20) / 6).ceil()
    grid = torch.tensor([*E2M1, *(-x for x in E2M1)])
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - grid).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)


def from_microscaled(blocks: Tensor, scales: Tensor) -> Tensor:
    """The experts [experts, in, out], number by number, in bfloat16."""
    count, out, groups, _ = blocks.shape
    made = torch.empty(count, groups * 32, out, dtype=torch.bfloat16)
    for e in range(count):
        for o in range(out):
            for i in range(groups * 32):
                byte = int(blocks[e, o, i // 32, (i % 32) // 2])
                code = byte >> 4 if i % 2 else byte & 15
                value = -E2M1[code - 8] if code >= 8 else E2M1[code]
                made[e, i, o] = value * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    return made


def packed_words(integers: Tensor, order: tuple[int, ...], lower: int = 0) -> Tensor:
    """Integers [rows, columns] in int32 words along the columns, in an order of each word's.

    From each word, as one unsigned number of 32 bits, `lower` is taken.
    """
    (rows, columns), count = integers.shape, len(order)
    words = torch.zeros(rows, columns // count, dtype=torch.int64)
    for r in range(rows):
        for c in range(columns // count):
            word = 0
            for field, place in enumerate(order):
                word |= int(integers[r, count * c + place]) << (32 // count * field)
            words[r, c] = (word - lower) % 2**32
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def everywhere(reader: Any, oracle: Callable[[str], Tensor]) -> None:
    """Every made tensor of a reader has the values of an oracle, bit for bit."""
    assert reader.made
    for name in reader.made:
        read = reader.whole(name)
        expected = oracle(name)
        assert read.dtype == expected.dtype
        assert torch.equal(raw(read), raw(expected)), name
