"""Kernels against slow products in float64, in every tier this processor has."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from with_kernels import needs_kernels

from oracles.kernels import bitmask_product, rounded_to_bytes
from runtime.kernel_examples import TIERS, example, example_of_codes, using
from secateur.errors import KernelError, ShapeError
from secateur.machine import LARGE_PAGE
from secateur.quantization.groups import GROUPS, Scales
from secateur.runtime.formats.bits import pack_bits
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels.dispatch import by_blocks, by_kernel, choose, speedup_over_dense
from secateur.runtime.kernels.matrix import KernelMatrix, matrix_bytes, to_large_pages, turned_fours

pytestmark = needs_kernels

SHAPES = ((1, 1), (5, 7), (64, 64), (33, 130), (7, 577), (40, 1000))
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    """Each tier in turn; the best one afterwards."""
    with using(request.param):
        yield request.param


def check_products(matrix, dense, shares):
    """Of up to eight tokens, by the matrix in float64; `shares`: how activations are rounded."""
    for batch in range(1, lib.MAX_BATCH + 1):
        x = torch.randn(batch, dense.shape[1], generator=torch.Generator().manual_seed(batch))
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
            given = x.to(dtype)
            seen = rounded_to_bytes(given.float(), shares) if shares else given.double()
            got = matrix.multiply(given)
            assert got.dtype == dtype
            # relative to what is summed up, for sums may cancel
            size = seen.abs() @ dense.abs().T + 1e-60
            wanted = bitmask_product(seen, dense)
            assert float(((got.double() - wanted).abs() / size).max()) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.5, 0.95])
def test_products_are_those_of_float64(tier, shape, values, sparsity):
    check_products(*example(*shape, values, sparsity), "spread" if values == torch.int8 else "")


@pytest.mark.parametrize("shape", [*SHAPES, (6, 2500), (5, 700), (4, 576)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.95, "2:4"])
def test_products_of_4_bits_are_those_of_float64(tier, shape, group, sparsity):
    matrix, dense = example_of_codes(*shape, group, sparsity)
    assert torch.equal(matrix.tile(0, shape[0]).double(), dense)
    check_products(matrix, dense, "consecutive")


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_sums_of_4_bits_are_exact_integers(tier, sparsity):
    """Activations of 127 and weights of 7 or −8, all of one sign, make the largest sums."""
    codes = torch.full((4, 2048), 7, dtype=torch.int8)
    codes[1], codes[2:] = -7, -8
    scales = Scales(torch.zeros(4, dtype=torch.int8), torch.zeros(4, 16, dtype=torch.uint8))
    scales.code[3] = 128
    kept = None if sparsity is None else torch.rand(4, 2048) >= sparsity
    matrix = KernelMatrix.of_codes(codes, scales, 128, kept)
    signed = codes.double() * torch.tensor([1.0, 1, 1, -1])[:, None]
    dense = signed if kept is None else signed * kept
    for x in (torch.full((1, 2048), 127.0), torch.full((1, 2048), -127.0)):
        assert torch.equal(matrix.multiply(x).double(), bitmask_product(x, dense))


def test_4_bits_stay_4_bits_when_zeros_are_stored():
    matrix, dense = example_of_codes(23, 130, 32, 0.5)
    stored = matrix.dense(torch.float32)
    assert (stored.mask, stored.group, stored.nonzeros) == (None, 32, 23 * 130)
    assert torch.equal(stored.tile(0, 23).double(), dense)


@pytest.mark.parametrize("group", GROUPS)
def test_columns_of_one_sum_share_a_scale(group):
    """The order of columns is a permutation, and 16 lanes of a block stay in their groups."""
    for words in (*range(1, 40), 172):
        order = turned_fours(words, group)
        assert torch.equal(order.sort().values, torch.arange(16 * words))
        lanes = (order * 4 // group).view(words, 16)
        at, block = 0, min(16, group // 4)
        while at < words:
            while block > words - at:
                block //= 2
            assert (lanes[at : at + block] == lanes[at]).all()
            at += block


@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
def test_tiles_of_4_bits_begin_at_any_row(tier, sparsity):
    matrix, dense = example_of_codes(23, 130, 64, sparsity)
    for begin, end in ((0, 23), (5, 6), (4, 7), (22, 23)):
        assert torch.equal(matrix.tile(begin, end).double(), dense[begin:end])


@pytest.mark.parametrize("shape", [(23, 130), (6, 64)])
def test_rows_of_4_bits_in_any_order(tier, shape):
    matrix, dense = example_of_codes(*shape, 32, None)
    for rows in (torch.tensor([5, 0, 5, shape[0] - 1]), torch.arange(6)[::2], torch.arange(0)):
        assert torch.equal(matrix.gathered(rows).double(), dense[rows])
    for outside in (-1, shape[0]):
        with pytest.raises(ShapeError, match=f"{shape[0]}"):
            matrix.gathered(torch.tensor([0, outside]))


def test_two_of_four_works_on_every_tier():
    """The layout is chosen by the tier of the time; each tier reads all layouts."""
    x = torch.randn(3, 577, generator=torch.Generator().manual_seed(0))
    with using("avx512"):
        for group in GROUPS:
            lib.use_tier("avx512")
            matrix, dense = example_of_codes(7, 577, group, "2:4")
            assert (matrix.of_four, matrix.mask) == (2, None)
            answers = []
            for tier in TIERS:
                try:
                    lib.use_tier(tier)
                except KernelError:
                    continue
                assert torch.equal(matrix.tile(0, 7).double(), dense)
                assert torch.equal(matrix.dense(torch.float32).tile(2, 7).double(), dense[2:])
                answers.append((matrix.multiply(x), by_blocks(matrix, x)))
            for answer in answers[1:]:
                torch.testing.assert_close(answer, answers[0], rtol=1e-3, atol=0.0)


def test_two_of_four_is_stored_where_it_is_smaller():
    with using("avx512"):
        for keeps, of_four in ((2, 2), (3, 0)):
            kept = torch.zeros(8, 64, 4, dtype=torch.bool)
            kept[0::2, :, :keeps] = kept[1::2, :, 4 - keeps :] = True
            matrix = of_ones(kept.view(8, 256))
            assert matrix.of_four == of_four
            assert matrix.nonzeros == 8 * 64 * keeps
        assert of_ones(torch.rand(8, 256) < 0.05).of_four == 0
    with using("avx2"):
        two = torch.tensor([True, False, True, False]).repeat(8, 64)
        assert of_ones(two).of_four == 0


def of_ones(kept: torch.Tensor) -> KernelMatrix:
    codes = torch.ones(kept.shape, dtype=torch.int8)
    scales = Scales(
        torch.zeros(len(kept), dtype=torch.int8),
        torch.zeros(len(kept), kept.shape[1] // 64, dtype=torch.uint8),
    )
    return KernelMatrix.of_codes(codes, scales, 64, kept)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_tiles_are_the_matrix_bit_for_bit(tier, values, sparsity):
    matrix, dense = example(23, 130, values, sparsity)
    for begin, end in ((0, 23), (5, 6), (22, 23)):
        tile = matrix.tile(begin, end).double()
        if matrix.scale is not None:
            tile *= matrix.scale.double()[begin:end, None]
        assert torch.equal(tile, dense[begin:end])


def test_both_ways_agree_for_many_tokens(tier):
    matrix, _ = example(300, 200, torch.bfloat16, 0.6)
    x = torch.randn(21, 200)
    torch.testing.assert_close(by_kernel(matrix, x), by_blocks(matrix, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "matrix",
    [example(101, 333, torch.bfloat16, 0.5)[0]]
    + [example_of_codes(101, 333, 64, sparsity)[0] for sparsity in (None, 0.5, "2:4")],
    ids=["bfloat16", "dense int4", "int4", "int4 2:4"],
)
def test_one_answer_whatever_the_threads(tier, matrix):
    kernels = lib.library()
    x = torch.randn(3, 333)
    usual = kernels.sct_threads()
    try:
        answers = []
        for threads in (1, 2, 3, 7):
            assert kernels.sct_set_threads(threads) == threads
            answers.append(matrix.multiply(x))
        assert all(torch.equal(answers[0], other) for other in answers)
    finally:
        kernels.sct_set_threads(usual)


BOUND = """
import os, sys
import torch
from secateur.runtime.kernels.library import library
from secateur.runtime.kernels.matrix import KernelMatrix

allowed = os.sched_getaffinity(0)
before = set(os.listdir("/proc/self/task"))
assert library().sct_set_threads(len(allowed)) == len(allowed)
workers = [int(x) for x in set(os.listdir("/proc/self/task")) - before]
matrix, x = KernelMatrix(torch.randn(64, 64)), torch.randn(1, 64)

def processors():
    matrix.multiply(x)
    return [os.sched_getaffinity(worker) for worker in workers]

first = processors()
assert all(len(own) == 1 for own in first), first
assert len(set.union(*first)) == len(workers) == len(allowed) - 1
assert os.sched_getaffinity(0) == allowed
for moved_to in allowed:  # each worker that the caller comes to makes room
    os.sched_setaffinity(0, {moved_to})
    assert set.union(*processors()) == allowed - {moved_to}
os.sched_setaffinity(0, allowed)
library().sct_set_threads(len(allowed) + 1)  # more than processors: the scheduler's business
workers = [int(x) for x in set(os.listdir("/proc/self/task")) - before]
assert all(own == allowed for own in processors())
"""


def test_workers_have_processors_of_their_own():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    subprocess.run([sys.executable, "-c", BOUND], check=True)


def test_not_a_number_stays_one(tier):
    for values in VALUES:
        matrix, _ = example(4, 70, values, 0.5)
        x = torch.zeros(1, 70)
        x[0, 3] = float("nan")
        assert matrix.multiply(x)[0, 1:].isnan().all()
    matrix, _ = example_of_codes(4, 70, 32, 0.5)
    assert matrix.multiply(x)[0].isnan().all()


def test_a_dense_weight_is_used_where_it_lies():
    weight = torch.randn(8, 128)
    matrix = KernelMatrix(weight)
    assert matrix.values.data_ptr() == weight.data_ptr()
    assert matrix.weight is not None
    assert torch.equal(matrix.weight, weight)
    assert KernelMatrix(torch.randn(8, 100)).weight.shape == (8, 100)


def test_memory_is_that_of_the_format():
    matrix, _ = example(64, 4096, torch.bfloat16, 0.5)
    bits = 2 * matrix.nonzeros + 64 * 4096 / 8
    assert bits <= matrix.nbytes <= bits * 1.005


@pytest.mark.parametrize("group", GROUPS)
def test_memory_of_4_bits_is_that_of_the_format(group):
    matrix, dense = example_of_codes(64, 4096, group, 0.5)
    either = int(((dense[0::2] != 0) | (dense[1::2] != 0)).sum())
    size = either + 32 * 4096 / 8 + 64 * 4096 / group + 64
    assert size <= matrix.nbytes <= size * 1.1  # a code of 0 is kept
    assert abs(matrix_bytes((64, 4096), "int4", 0.5, group) / matrix.nbytes - 1) < 0.02


def test_parts_that_do_not_fit_are_refused():
    bits = pack_bits(torch.ones(3, 10, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"29.*30"):
        KernelMatrix(torch.randn(29), bitmask=bits, columns=10)
    matrix = KernelMatrix(torch.randn(30), bitmask=bits, columns=10)
    for x in (torch.randn(1, 9), torch.randn(9, 10), torch.zeros(1, 10, dtype=torch.float64)):
        with pytest.raises(ShapeError):
            matrix.multiply(x)
    with pytest.raises(ShapeError, match="2 to 4"):
        matrix.tile(2, 4)


def test_the_choice_is_measured_once_for_each_kind():
    matrices = [example(64, 64, torch.bfloat16, 0.5, seed)[0] for seed in range(2)]
    first = choose(matrices, torch.float32)
    assert first.kernel_up_to >= 1
    assert first.speedup_over_dense > 0
    assert choose(matrices[1:], torch.float32) is first


@pytest.mark.parametrize("of", ["int4", "int8"])
def test_integers_are_compared_with_integers(of):
    """Torch has none to compare them with, and other memory is read before every measurement."""
    if of == "int4":
        matrix, _ = example_of_codes(64, 256, 64, 0.5)
    else:
        matrix, _ = example(64, 256, torch.int8, 0.5)
    assert 0 < speedup_over_dense([matrix], torch.bfloat16, 2**20) < 1000
    assert speedup_over_dense([matrix.dense(torch.bfloat16)], torch.bfloat16, 0) == math.inf


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_matrices_that_move_multiply_as_before(monkeypatch, rows, sparsity):
    """Two pieces of memory; a matrix that two modules share moves once."""
    monkeypatch.setattr("secateur.runtime.kernels.matrix.MOVED_BYTES", 1000)
    made = [example(rows, 70, dtype, sparsity)[0] for dtype in (torch.float32, torch.int8)]
    made += [example_of_codes(rows, 70, group, sparsity)[0] for group in (32, 64)]
    x = torch.randn(3, 70)
    expected, sizes = [m.multiply(x) for m in made], [m.nbytes for m in made]
    places = [m.values.data_ptr() for m in made]
    to_large_pages([*made, *made])
    assert [m.nbytes for m in made] == sizes
    assert not {*places} & {m.values.data_ptr() for m in made}
    assert made[0].values.data_ptr() % LARGE_PAGE == 0
    for matrix, product in zip(made, expected, strict=True):
        assert torch.equal(matrix.multiply(x), product)


def test_a_tier_that_is_not_there_is_refused():
    with pytest.raises(KernelError, match="avx9000"):
        lib.use_tier("avx9000")
