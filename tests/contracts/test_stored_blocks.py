"""Matrices in types of llama.cpp: what is stored is what the package gguf reads."""

from __future__ import annotations

import gguf
import pytest
import torch
from pydantic import TypeAdapter

from secateur.errors import CheckpointError
from secateur.runtime.formats import BLOCKS, Layout, PartSpec, check_specs, fitting, formats

SHAPE = 3, 512


def weight_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("values", BLOCKS)
def test_the_stored_bytes_are_those_of_a_gguf_file(values: str) -> None:
    layout, weight = Layout("dense", values, SHAPE), weight_of()
    parts = formats["dense"].pack(weight, layout)
    specs = {suffix: PartSpec(part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    assert specs == formats["dense"].parts(layout, 0)
    formats["dense"].check(parts, layout)
    kind = gguf.GGMLQuantizationType[values.upper()]
    theirs = torch.from_numpy(gguf.quants.dequantize(parts["blocks"].numpy(), kind))
    ours = formats["dense"].unpack(parts, layout)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert (ours - weight).norm() < 0.3 * weight.norm()
    mask, kept = formats["dense"].kept(parts, layout)
    assert torch.equal(ours[mask], kept)


@pytest.mark.parametrize(
    ("values", "narrow"),
    [
        ("q2_k", "q4_0"), ("q3_k", "q4_0"), ("q4_k", "q5_0"), ("q5_k", "q5_1"), ("q6_k", "q8_0"),
        ("iq4_xs", "iq4_nl"), ("q8_0", "q8_0"), ("int4", "int4"),
    ],
)  # fmt: skip
def test_rows_without_whole_blocks_have_the_type_that_llama_cpp_takes(values, narrow) -> None:
    """`tensor_type_fallback` in llama.cpp's src/llama-quant.cpp."""
    assert [fitting(values, columns) for columns in (512, 576)] == [values, narrow]
    assert fitting(values, 40) == ("float16" if values in BLOCKS else values)


@pytest.mark.parametrize(
    "given",
    [
        {"format": "bitmask", "values": "q4_0", "shape": [2, 256]},
        {"format": "n-of-m", "values": "q8_0", "shape": [2, 256], "pattern": "2:4"},
        {"format": "dense", "values": "q4_k", "shape": [2, 320]},
        {"format": "dense", "values": "q4_0", "shape": [2, 40]},
        {"format": "dense", "values": "q4_0", "shape": [2, 256], "group": 32},
        {"format": "dense", "values": "q4_k_m", "shape": [2, 256]},
    ],
)
def test_a_layout_that_cannot_be_is_refused(given) -> None:
    with pytest.raises(CheckpointError):
        TypeAdapter(Layout).validate_python(given)


@pytest.mark.parametrize("values", ["q4_k", "q6_k", "q4_0"])
def test_damaged_blocks_are_refused(values: str) -> None:
    layout = Layout("dense", values, SHAPE)
    parts = formats["dense"].pack(weight_of(), layout)
    blocks = parts["blocks"]
    for wrong in (blocks[:, :-1], blocks[:2], blocks.view(torch.int8)):
        with pytest.raises(CheckpointError, match="blocks"):
            check_specs({"blocks": PartSpec(wrong.dtype, tuple(wrong.shape))}, layout)
    with pytest.raises(CheckpointError, match="parts"):
        check_specs({"weight": PartSpec(torch.float32, SHAPE)}, layout)
    place = blocks.shape[1] // 2 - 2 if values == "q6_k" else 0  # d is last in Q6_K
    blocks[1, place : place + 2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # +inf
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        formats["dense"].check(parts, layout)
