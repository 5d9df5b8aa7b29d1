"""The block types of ggml beside the package `gguf` and llama.cpp's own quantizer."""

import ctypes
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.errors import CheckpointError, NumericalError, RecipeError, ShapeError
from secateur.quantization.block_types import TYPES
from secateur.quantization.blocks import BlockGrid, Blocks

gguf = pytest.importorskip("gguf")

EVERY = pytest.mark.parametrize("kind", TYPES)


def read_by_gguf(blocks, kind):
    packed = blocks if isinstance(blocks, torch.Tensor) else blocks.encode()
    values = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(values.copy())


def ggml():
    """The library of llama.cpp with its types."""
    package = pytest.importorskip("llama_cpp_py_sync")
    return ctypes.CDLL(str(Path(package.__path__[0]) / "libggml-base.so.0"))


def by_llama_cpp(weight, importance, kind):
    """What llama.cpp's quantizer makes of a weight with an importance matrix."""
    library = ggml()
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize = library.ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    quantize.restype = ctypes.c_size_t
    rows, columns = weight.shape
    packed = np.zeros((rows, BlockGrid(kind).row_bytes(columns)), dtype=np.uint8)
    values, each = weight.contiguous().numpy(), importance.contiguous().numpy()
    kind_number = int(gguf.GGMLQuantizationType[kind.upper()])
    written = quantize(
        kind_number, values.ctypes.data, packed.ctypes.data, 0, rows, columns, each.ctypes.data
    )
    assert written == packed.size
    return read_by_gguf(torch.from_numpy(packed), kind)


def same_bits(left, right):
    odd = left.isnan()
    assert torch.equal(odd, right.isnan())
    assert torch.equal(left[~odd].view(torch.int32), right[~odd].view(torch.int32))


def random_weight(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Some rows have heavy tails, and one is all zeros.
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[: rows // 2] *= torch.rand(rows // 2, columns, generator=generator) ** 2 * 4
    weight[-1] = 0
    return weight, torch.rand(columns, generator=generator) ** 2 + 0.01


@EVERY
@pytest.mark.parametrize("shape", [(5, 512), (2, 3, 256)])
def test_any_bytes_come_back_and_are_the_numbers_of_gguf(kind, shape):
    grid = BlockGrid(kind)
    *rows, columns = shape
    generator = torch.Generator().manual_seed(1)
    size = (*rows, grid.row_bytes(columns))
    packed = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    blocks = Blocks.decode(kind, packed)
    assert torch.equal(blocks.encode(), packed)
    with np.errstate(all="ignore"):
        same_bits(blocks.values, read_by_gguf(packed, kind))
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    assert (grid.block, grid.table.block_bytes) == size


@EVERY
def test_llama_cpp_reads_the_same_numbers(kind):
    weight, importance = random_weight(4, 512, 5)
    blocks = BlockGrid(kind).quantize(weight, importance)
    packed, values = blocks.encode().numpy(), np.empty(weight.numel(), dtype=np.float32)
    read = getattr(ggml(), f"dequantize_row_{kind.replace('_k', '_K')}")
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    read(packed.ctypes.data, values.ctypes.data, values.size)
    same_bits(blocks.values, torch.from_numpy(values).view(weight.shape))


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl", "q5_0", "q4_1"])
def test_the_search_comes_near_to_the_best_of_very_many_scales(kind):
    weight, importance = random_weight(8, 32, 6)
    weight, importance = weight[:-1], importance[:32]
    grid = BlockGrid(kind)
    found = grid.quantize(weight, importance)

    def errors(blocks):
        return (importance * (weight - blocks.values) ** 2).sum(1)

    peak = weight.abs().amax(1, keepdim=True)
    largest = max(map(abs, grid.table.ends))
    minima = torch.linspace(-1.2, 0, 24) if grid.table.has_minima else torch.zeros(1)
    best = torch.full((len(weight),), torch.inf)
    for reach in torch.linspace(0.4, 2.5, 100 if grid.table.has_minima else 250).tolist():
        for sign, minimum in itertools.product((1, -1), minima.tolist()):
            tried = replace(
                found, d=(sign * reach * peak / largest).half(), d_min=(minimum * peak).half()
            )
            best = torch.minimum(best, errors(tried.recoded(weight)))
    assert (errors(found) < 1.2 * best).all()
    assert errors(found).sum() < 1.05 * best.sum()


@EVERY
def test_the_search_is_no_worse_than_that_of_llama_cpp(kind):
    weight, importance = random_weight(24, 768)
    blocks = BlockGrid(kind).quantize(weight, importance)
    same_bits(blocks.values, read_by_gguf(blocks, kind))

    def errors(rounded):
        return (importance * (weight - rounded) ** 2).sum(1).double()

    ours, theirs = errors(blocks.values), errors(by_llama_cpp(weight, importance, kind))
    assert ours.sum() < theirs.sum()
    assert (ours <= 1.05 * theirs).all()
    assert not blocks.values[-1].any()


@EVERY
def test_rounding_again_changes_nothing(kind):
    weight, _ = random_weight(6, 512, 2)
    blocks = BlockGrid(kind).quantize(weight.bfloat16())
    again = blocks.recoded(blocks.values)
    assert torch.equal(again.values, blocks.values)
    values, beyond = blocks.nearest(weight.bfloat16())
    assert torch.equal(values, blocks.values)
    shifted = blocks.nearest(weight + 10)[1]
    assert shifted[:-1].all()
    assert beyond.float().mean() < 0.3


@EVERY
def test_the_codes_are_the_nearest_there_are(kind):
    weight, _ = random_weight(4, 256, 3)
    blocks = BlockGrid(kind).quantize(weight)
    table = BlockGrid(kind).table
    best = torch.full_like(weight, torch.inf)
    for code in range(table.lowest + table.unused, table.highest + 1):
        tried = replace(blocks, codes=torch.full_like(blocks.codes, code)).values
        best = torch.minimum(best, (tried - weight).abs())
    torch.testing.assert_close((blocks.values - weight).abs(), best, rtol=1e-4, atol=1e-8)


def test_what_is_no_block_is_refused():
    with pytest.raises(RecipeError, match="q7_k"):
        BlockGrid("q7_k")
    with pytest.raises(ShapeError):
        BlockGrid("q4_k").quantize(torch.ones(2, 576))
    with pytest.raises(CheckpointError):
        Blocks.decode("q4_0", torch.zeros(2, 19, dtype=torch.uint8))
    with pytest.raises(NumericalError):
        BlockGrid("q6_k").quantize(torch.full((1, 256), torch.nan))


def test_which_types_hold_zeros():
    holding = {kind for kind in TYPES if BlockGrid(kind).exact_zero}
    assert holding == {"q3_k", "q6_k", "q4_0", "q5_0", "q8_0"}
