"""What every registered format must do, with every kind of value and of shape."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from oracles import packing
from secateur.errors import CheckpointError, NumericalError
from secateur.quantization.groups import GROUPS
from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.runtime.formats import (
    GRID_BITS,
    VALUES,
    Layout,
    PartSpec,
    bitmask_parts,
    check_specs,
    formats,
    stored_bytes,
)

PATTERNS = {
    "dense": [None],
    "bitmask": [None],
    "n-of-m": ["1:2", "2:4", "1:4", "3:4", "4:8", "2:8", "8:16", "16:32", "31:32"],
}
"""Patterns to try a format with; a format without patterns is not tested and so fails."""

SHAPES = [
    (1, 1), (1, 7), (5, 9), (8, 8), (7, 31), (3, 64), (17, 33), (64, 96), (3, 576), (2, 1000),
    (33, 1),
]  # fmt: skip
EXTREMES = [0.0, 0.99, 1.0]
"""Sparsities to try beside one half, with some of the shapes."""

CASES = [(name, pattern) for name in formats for pattern in PATTERNS.get(name, [])]

GRIDS = [f"{values} g{group}" for values, group in itertools.product(GRID_BITS, GROUPS)]
STORED = [*(values for values in VALUES if values not in GRID_BITS), *GRIDS]
"""Every kind of value, those of groups with their size."""


def test_every_format_is_tested():
    assert set(PATTERNS) == set(formats)


def layout_of(name: str, stored: str, shape: tuple[int, int], pattern: str | None) -> Layout:
    values, _, group = stored.partition(" g")
    return Layout(name, values, shape, pattern, group=int(group) if group else None)


def source_dtype(stored: str) -> torch.dtype:
    """The dtype of a matrix that is to be stored."""
    return VALUES[stored] if stored in ("float32", "bfloat16", "float16") else torch.bfloat16


def stands_for(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What comes back: the weights, or those on the grid."""
    if layout.grid is not None:
        return layout.grid.dequantize(*layout.grid.quantize(weight))
    return dequantize_rows(*quantize_rows(weight)) if layout.values == "int8" else weight


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def sparse_matrix(
    shape: tuple[int, int], sparsity: float, pattern: str | None, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """A random matrix with zeros in the pattern; row 0 is empty when there are several."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if pattern is None:
        weight[torch.rand(shape, generator=generator) < sparsity] = 0
    else:
        kept, group = map(int, pattern.split(":"))
        places = torch.rand(weight.reshape(-1, group).shape, generator=generator).argsort(1)
        weight.view(-1, group).masked_fill_(places >= kept, 0)
    if shape[0] > 1:
        weight[0] = 0
    return weight.to(dtype)


def shapes_for(pattern: str | None) -> list[tuple[int, int]]:
    """The shapes, of whole groups."""
    group = 1 if pattern is None else int(pattern.split(":")[1])
    return list(dict.fromkeys((out, -(-columns // group) * group) for out, columns in SHAPES))


@functools.cache
def source(
    stored: str, shape: tuple[int, int], sparsity: float, pattern: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix that is to be stored and what it stands for, whatever the format."""
    weight = sparse_matrix(shape, sparsity, pattern, source_dtype(stored))
    return weight, stands_for(weight, layout_of("dense", stored, shape, None))


@functools.cache
def packed(
    name: str, stored: str, shape: tuple[int, int], pattern: str | None, sparsity: float = 0.5
) -> tuple[torch.Tensor, Layout, dict[str, torch.Tensor]]:
    """A matrix, its layout and its parts: not to be written to."""
    weight, layout = (
        source(stored, shape, sparsity, pattern)[0],
        layout_of(name, stored, shape, pattern),
    )
    before = weight.clone()
    parts = formats[name].pack(weight, layout)
    assert torch.equal(bits(weight), bits(before))
    return weight, layout, parts


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", STORED)
def test_round_trips_are_exact(name, pattern, stored):
    chosen, shapes = formats[name], shapes_for(pattern)
    cases = [(shape, 0.5) for shape in shapes]
    if pattern is None:
        cases += itertools.product(shapes[1::2], EXTREMES)
    for shape, sparsity in cases:
        weight, layout, parts = packed(name, stored, shape, pattern, sparsity)
        chosen.check(parts, layout)
        found = chosen.unpack(parts, layout)
        assert tuple(found.shape) == shape
        expected = source(stored, shape, sparsity, pattern)[1]
        assert found.dtype == (torch.float32 if layout.integers else weight.dtype)
        assert torch.equal(bits(found), bits(expected)), (shape, sparsity)
        assert not found[weight == 0].any()
        if name != "dense":
            assert chosen.kept(parts, layout)[0][weight != 0].all()


@settings(max_examples=120, deadline=None)
@given(
    case=st.sampled_from(CASES),
    stored=st.sampled_from(STORED),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 150)),
    sparsity=st.floats(0, 1),
    spread=st.integers(0, 30),
    seed=st.integers(0, 2**16),
)
def test_zeros_stay_whatever_the_matrix(case, stored, sides, sparsity, spread, seed):
    """Rows of very different sizes, any fraction of zeros, groups that do not divide."""
    name, pattern = case
    shape = (sides[0], sides[1] * (1 if pattern is None else int(pattern.split(":")[1])))
    weight = sparse_matrix(shape, sparsity, pattern, torch.float32, seed)
    weight *= torch.logspace(-spread / 10, spread / 10, shape[0])[:, None]
    weight = weight.to(source_dtype(stored))
    layout = layout_of(name, stored, shape, pattern)
    parts = formats[name].pack(weight, layout)
    formats[name].check(parts, layout)
    found = formats[name].unpack(parts, layout)
    assert not found[weight == 0].any()
    assert torch.equal(bits(found), bits(stands_for(weight, layout)))
    if layout.grid is not None:  # what is on the grid is found again
        again = formats[name].pack(found.bfloat16(), layout)
        assert torch.equal(formats[name].unpack(again, layout), found)


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", STORED)
def test_sizes_are_those_of_theory(name, pattern, stored):
    for shape in shapes_for(pattern):
        weight, layout, parts = packed(name, stored, shape, pattern)
        nonzeros = int((weight != 0).sum())
        assert sum(part.nbytes for part in parts.values()) == stored_bytes(layout, nonzeros)
        specs = {suffix: PartSpec(x.dtype, tuple(x.shape)) for suffix, x in parts.items()}
        assert specs == formats[name].parts(layout, nonzeros)
        check_specs(specs, layout)
        if layout.grid is not None:
            bits, out, columns = layout.grid.bits, *shape
            scales = out * (-(-columns // layout.grid.group) + 1)
            kept = nonzeros if pattern is None else layout.weights * nm(pattern)
            values = {"dense": out * -(-columns * bits // 8)}.get(name, -(-int(kept) * bits // 8))
            mask = sum(parts[s].nbytes for s in ("bitmask", "codes") if s in parts)
            assert stored_bytes(layout, nonzeros) == values + mask + scales


def nm(pattern: str) -> Fraction:
    """N / M."""
    return Fraction(*map(int, pattern.split(":")))


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", STORED)
def test_every_format_becomes_a_bitmask(name, pattern, stored):
    for shape in shapes_for(pattern):
        _, layout, parts = packed(name, stored, shape, pattern)
        as_bitmask = layout_of("bitmask", stored, shape, None)
        found = bitmask_parts(parts, layout)
        formats["bitmask"].check(found, as_bitmask)
        unpacked = formats["bitmask"].unpack(found, as_bitmask)
        assert torch.equal(unpacked, formats[name].unpack(parts, layout))
        if name == "n-of-m" and layout.grid is not None:  # the same bit stream
            assert torch.equal(found["compressed"], parts["compressed"])


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16"])
def test_negative_zeros_nans_and_infinities_come_back_bit_for_bit(name, pattern, values):
    shape = (4, 96)
    weight = sparse_matrix(shape, 0.5, pattern, VALUES[values])
    odd = bits(weight)
    kept = odd.nonzero()
    limit = torch.iinfo(odd.dtype)
    signalling = bits(torch.tensor([float("inf")], dtype=weight.dtype))[0] + 1
    for place, value in zip(kept, [limit.min, -1, limit.max, int(signalling)], strict=False):
        odd[tuple(place)] = value
    layout = Layout(name, values, shape, pattern)
    parts = formats[name].pack(odd.view(weight.dtype), layout)
    formats[name].check(parts, layout)
    assert torch.equal(bits(formats[name].unpack(parts, layout)), odd)


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", ["int8", "int4 g32", "int3 g128", "int2 g64"])
def test_integers_refuse_what_is_not_finite(name, pattern, odd, stored):
    weight = sparse_matrix((4, 96), 0.5, pattern, torch.float32)
    weight[tuple(weight.nonzero()[0])] = odd
    with pytest.raises(NumericalError, match="1 of 384"):
        formats[name].pack(weight, layout_of(name, stored, (4, 96), pattern))


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_weights_too_large_for_float16_are_refused(name, pattern):
    weight = sparse_matrix((4, 96), 0.5, pattern, torch.bfloat16)
    weight[tuple(weight.nonzero()[0])] = 1e5
    with pytest.raises(NumericalError, match="float16"):
        formats[name].pack(weight, Layout(name, "float16", (4, 96), pattern))


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_a_cast_that_makes_zeros_drops_them(name, pattern):
    weight = sparse_matrix((4, 96), 0.5, pattern, torch.float32)
    weight[tuple(weight.nonzero()[0])] = 1e-30  # float16 has no such number
    layout = Layout(name, "float16", (4, 96), pattern)
    parts = formats[name].pack(weight, layout)
    formats[name].check(parts, layout)
    assert torch.equal(formats[name].unpack(parts, layout), weight.half())


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", ["int8", "int4 g128", "int3 g128", "int2 g64"])
def test_a_kept_weight_that_rounds_to_zero_stays_kept(name, pattern, stored):
    weight = sparse_matrix((2, 96), 0.5, pattern, torch.float32)
    weight[1] = torch.where(weight[1] == 0, 0.0, 1e-6)
    weight[tuple(weight.nonzero()[0])] = 1.0
    layout = layout_of(name, stored, (2, 96), pattern)
    parts = formats[name].pack(weight, layout)
    assert int((formats[name].unpack(parts, layout) != 0).sum()) == 1
    if name == "bitmask":
        mask, values = formats[name].kept(parts, layout)
        assert torch.equal(mask, weight != 0)
        assert values.numel() == int((weight != 0).sum())
        assert values.dtype == torch.int8


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", ["bfloat16", "int8", "int4 g32", "int3 g64"])
def test_any_strides_are_taken(name, pattern, stored):
    weight = sparse_matrix((4, 96), 0.5, pattern, torch.bfloat16)
    strided = weight.t().contiguous().t()
    layout = layout_of(name, stored, (4, 96), pattern)
    parts = formats[name].pack(strided, layout)
    for suffix, part in formats[name].pack(weight, layout).items():
        assert torch.equal(parts[suffix], part)
        assert parts[suffix].is_contiguous()


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", ["bfloat16", "int8", "int4 g64", "int3 g32"])
def test_parts_that_do_not_fit_are_refused(name, pattern, stored):
    layout = layout_of(name, stored, (4, 96), pattern)
    parts = formats[name].pack(sparse_matrix((4, 96), 0.5, pattern, torch.bfloat16), layout)
    for suffix, part in parts.items():
        without = {s: p for s, p in parts.items() if s != suffix}
        for broken in (
            without,
            {**parts, suffix: part.reshape(1, *part.shape)},
            {**parts, suffix: part[:-1]},
            {**parts, suffix: part.to(torch.float64)},
            {**parts, "other": part},
        ):
            with pytest.raises(CheckpointError):
                formats[name].check(broken, layout)
    if stored == "int8":
        for scale in (0.0, -1.0, float("nan"), float("inf")):
            wrong = parts["weight_scale"].clone()
            wrong[2] = scale
            with pytest.raises(CheckpointError, match="1 of 4 scales"):
                formats[name].check({**parts, "weight_scale": wrong}, layout)
        main = "weight" if name == "dense" else "compressed"
        wrong = parts[main].clone()
        wrong.view(-1)[3] = -128
        with pytest.raises(CheckpointError, match="1 int8 values are -128"):
            formats[name].check({**parts, main: wrong}, layout)


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("stored", GRIDS)
def test_bit_streams_and_exponents_that_do_not_fit_are_refused(name, pattern, stored):
    columns = 224 if pattern is None else 32 * 7
    layout = layout_of(name, stored, (3, columns), pattern)
    weight = sparse_matrix((3, columns), 0.5, pattern, torch.bfloat16)
    parts = formats[name].pack(weight, layout)
    formats[name].check(parts, layout)
    for exponent in (-128, -127, 118, 127):
        wrong = parts["weight_exponent"].clone()
        wrong[1] = exponent
        with pytest.raises(CheckpointError, match="1 of 3"):
            formats[name].check({**parts, "weight_exponent": wrong}, layout)
    for exponent in (-126, 117):
        wrong = parts["weight_exponent"].clone()
        wrong[1] = exponent
        extreme = {**parts, "weight_exponent": wrong}
        extreme["weight_scale"] = torch.full_like(parts["weight_scale"], 255)
        formats[name].check(extreme, layout)
        assert torch.isfinite(formats[name].unpack(extreme, layout)).all()


@pytest.mark.parametrize("stored", GRIDS)
def test_the_rest_of_the_last_byte_is_zero(stored):
    bits = int(stored[3])
    for name, pattern, shape in (
        ("dense", None, (3, 31)),
        ("bitmask", None, (1, 31)),
        ("n-of-m", "1:2", (1, 22)),
    ):
        layout = layout_of(name, stored, shape, pattern)
        weight = torch.ones(shape)
        if pattern is not None:
            weight[:, ::2] = 0
        parts = formats[name].pack(weight, layout)
        formats[name].check(parts, layout)
        main = "weight" if name == "dense" else "compressed"
        count = {"dense": 31, "bitmask": 31, "n-of-m": 11}[name]
        for place in range(count * bits % 8, 8):
            wrong = parts[main].clone()
            wrong[..., -1] |= 1 << place
            with pytest.raises(CheckpointError, match=r"[13] bits"):
                formats[name].check({**parts, main: wrong}, layout)


@pytest.mark.parametrize("stored", GRIDS)
def test_a_mask_that_needs_another_number_of_bytes_is_refused(stored):
    layout = layout_of("bitmask", stored, (2, 40), None)
    weight = torch.zeros(2, 40)
    weight[0, :16] = 1
    parts = formats["bitmask"].pack(weight, layout)
    for change, why in ((0b1, "keeps 15"), (0b111, "keeps 13"), (0b11111, "keeps 11")):
        mask = parts["bitmask"].clone()
        mask[0, 0] ^= change
        with pytest.raises(CheckpointError, match=f"{why}|bits|bytes"):
            formats["bitmask"].check({**parts, "bitmask": mask}, layout)
    long = torch.zeros(80, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="of 80"):
        formats["bitmask"].check({**parts, "compressed": long}, layout)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (4, 29)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitmask_is_the_oracles(shape, dtype):
    weight = sparse_matrix(shape, 0.5, None, dtype, seed=3)
    weight[-1, -1] = -0.0
    values = {v: k for k, v in VALUES.items()}[dtype]
    parts = formats["bitmask"].pack(weight, Layout("bitmask", values, shape))
    rows, places = packing.bitmask_of(weight)
    assert parts["bitmask"].tolist() == rows
    assert torch.equal(bits(parts["compressed"]), bits(torch.stack([weight[p] for p in places])))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "3:4", "2:8", "4:8", "5:8", "2:16"])
def test_codes_are_the_oracles(pattern):
    kept, group = map(int, pattern.split(":"))
    weight = sparse_matrix((5, 3 * group), 0.5, pattern, torch.float32, seed=4)
    weight[2, : group + 1] = 0  # groups with less than N
    parts = formats["n-of-m"].pack(weight, Layout("n-of-m", "float32", (5, 3 * group), pattern))
    rows, places = packing.codes_of(weight, kept, group)
    assert parts["codes"].tolist() == rows
    assert torch.equal(parts["compressed"], torch.stack([weight[p] for p in places]))


def test_int8_is_the_oracles():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(20, 41, generator=generator) * torch.logspace(-30, 30, 20)[:, None]
    weight[3] = 0
    weight[4] = torch.arange(41) - 20.0  # halves: 127 / 20 · x
    weight[5, :] = torch.tensor([1.5, 2.5, 127.0] + [0.5] * 38)
    weight[6] = 1e-44  # below the smallest scale
    quantized, scale = quantize_rows(weight)
    for row, integers, step in zip(
        weight.tolist(), quantized.tolist(), scale.tolist(), strict=True
    ):
        expected, expected_step = packing.int8_row(row)
        assert step == expected_step
        assert integers == expected
    assert quantized[5, :4].tolist() == [2, 2, 127, 0]
    error = (dequantize_rows(quantized, scale) - weight).abs()
    assert bool((error <= 0.5001 * scale[:, None]).all())


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "coo"},
        {"format": ["bitmask"]},
        {"values": "int5"},
        {"values": "int4"},
        {"values": "int4", "group": 16},
        {"values": "int3", "group": True},
        {"values": "int3", "group": "32"},
        {"values": "int4", "group": None},
        {"group": 32},
        {"values": None},
        {"shape": [4]},
        {"shape": [4, 8, 1]},
        {"shape": [4.0, 8]},
        {"shape": [True, 8]},
        {"shape": "48"},
        {"shape": [0, 8]},
        {"shape": [-4, 8]},
        {"shape": [2**31, 8]},
        {"pattern": "2:4"},
        {"format": "n-of-m"},
        {"format": "n-of-m", "pattern": "4:4"},
        {"format": "n-of-m", "pattern": "0:4"},
        {"format": "n-of-m", "pattern": "2:99"},
        {"format": "n-of-m", "pattern": "1:3"},
        {"format": "n-of-m", "pattern": ["2:4"]},
        {"format": "n-of-m", "pattern": "2:4 "},
        {"transposed": 1},
        {"code": "os.system"},
    ],
    ids=str,
)
def test_layouts_that_cannot_be(changes):
    good = {"format": "bitmask", "values": "int8", "shape": [4, 8]}
    layouts, faults = TypeAdapter(Layout), (CheckpointError, ValidationError)
    assert layouts.validate_python(good).to_json() == good
    with pytest.raises(faults):
        layouts.validate_python({**good, **changes})
    for missing in good:
        with pytest.raises(faults):
            layouts.validate_python({k: v for k, v in good.items() if k != missing})


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "16:32"])
def test_groups_that_keep_too_many_are_refused(pattern):
    group = int(pattern.split(":")[1])
    with pytest.raises(CheckpointError, match=f"groups of {group} keep more than"):
        formats["n-of-m"].pack(
            torch.ones(3, 2 * group), Layout("n-of-m", "float32", (3, 2 * group), pattern)
        )


def test_masks_and_codes_that_say_too_much_are_refused():
    layout = Layout("bitmask", "float32", (2, 9))
    parts = formats["bitmask"].pack(torch.ones(2, 9), layout)
    for place, bit, why in ((0, 0, "keeps 17 weights, but there are 18"), (1, 1, "1 bits .* past")):
        mask = parts["bitmask"].clone()
        mask[0, place] ^= 1 << bit
        with pytest.raises(CheckpointError, match=why):
            formats["bitmask"].check({**parts, "bitmask": mask}, layout)
    layout = Layout("n-of-m", "float32", (1, 8), "2:4")
    parts = formats["n-of-m"].pack(sparse_matrix((1, 8), 0.5, "2:4", torch.float32), layout)
    for code, why in ((0b000110, "1 codes are 6 or more"), (0b111111, "2 codes"), (64, "1 bits")):
        codes = torch.tensor([[code]], dtype=torch.uint8)
        with pytest.raises(CheckpointError, match=why):
            formats["n-of-m"].check({**parts, "codes": codes}, layout)


def test_the_examples_of_the_specification():
    weight = torch.tensor([[0, 3, 0, 0, -1, 0, 0, 0, 0, 2]]).bfloat16()
    parts = formats["bitmask"].pack(weight, Layout("bitmask", "bfloat16", (1, 10)))
    assert parts["bitmask"].tolist() == [[0x12, 0x02]]
    assert parts["compressed"].tolist() == [3, -1, 2]
    weight = torch.tensor([[0, 5, 0, 7, 1, 0, 0, 0]]).float()
    parts = formats["n-of-m"].pack(weight, Layout("n-of-m", "float32", (1, 8), "2:4"))
    assert parts["codes"].tolist() == [[0x04]]
    assert parts["compressed"].tolist() == [5, 7, 1, 0]
    parts = formats["n-of-m"].pack(weight, Layout("n-of-m", "int4", (1, 8), "2:4", group=32))
    assert parts["codes"].tolist() == [[0x04]]
    assert parts["compressed"].tolist() == [0x75, 0x01]
    ranks = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert packing.sets_in_order(2, 4) == ranks


def test_the_examples_of_bit_streams_in_the_specification():
    weight = torch.tensor([[2.625, -0.75, 0.0, 0.375, -2.625]])
    scales = {"weight_scale": [[0x78]], "weight_exponent": [-9]}
    parts = formats["dense"].pack(weight, Layout("dense", "int4", (1, 5), group=32))
    assert {s: p.tolist() for s, p in parts.items()} == {"weight": [[0xE7, 0x10, 0x09]], **scales}
    parts = formats["bitmask"].pack(weight, Layout("bitmask", "int4", (1, 5), group=32))
    assert parts["bitmask"].tolist() == [[0x1B]]
    assert parts["compressed"].tolist() == [0xE7, 0x91]
    weight = torch.tensor([[1.125, -0.75, 0.0, 0.375, -1.125]])
    parts = formats["dense"].pack(weight, Layout("dense", "int3", (1, 5), group=32))
    assert {s: p.tolist() for s, p in parts.items()} == {"weight": [[0x33, 0x52]], **scales}
    parts = formats["bitmask"].pack(weight, Layout("bitmask", "int3", (1, 5), group=32))
    assert parts["compressed"].tolist() == [0x73, 0x0A]
    weight = torch.tensor([[0.75, -0.375, 0.0, 0.375, 0.75]])
    scales = {"weight_scale": [[0xF8]], "weight_exponent": [-9]}
    parts = formats["dense"].pack(weight, Layout("dense", "int2", (1, 5), group=32))
    assert {s: p.tolist() for s, p in parts.items()} == {"weight": [[0xC6, 0x02]], **scales}
    parts = formats["bitmask"].pack(weight, Layout("bitmask", "int2", (1, 5), group=32))
    assert parts["compressed"].tolist() == [0xB6]
