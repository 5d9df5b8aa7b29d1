"""Products by blocks against slow products, in every tier this processor has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from with_kernels import needs_kernels

from oracles.kernels import bitmask_product, rounded_to_bytes
from runtime.kernel_examples import TIERS, example, example_of_codes, using
from secateur.errors import ShapeError
from secateur.quantization.groups import GROUPS
from secateur.runtime.formats.bits import pack_bits
from secateur.runtime.kernels import dispatch
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels.dispatch import by_blocks, by_kernel
from secateur.runtime.kernels.linear import PackedLinear
from secateur.runtime.kernels.matrix import KernelMatrix

pytestmark = needs_kernels

TOKENS = (1, 9, 17, 63, 130)
SHAPES = ((1, 1), (5, 7), (64, 64), (33, 130), (70, 577), (97, 1000))


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    """Each tier in turn; the best one afterwards."""
    with using(request.param):
        yield request.param


def whole_numbers(tokens: int, columns: int) -> Tensor:
    """Activations that rounding does not change: integers, the largest of each share being 127."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-127, 128, (tokens, columns), generator=generator).float()
    for block in range(0, columns, 64):  # the first four of a word are in the first share, ...
        x[:, block : block + 64 : 4] = 127.0
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.5, 1.0])
def test_sums_of_integers_are_exact(tier, shape, sparsity):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    ones = torch.ones(shape[0])
    if sparsity is None:
        matrix = KernelMatrix(codes, scale=ones)
    else:
        mask = torch.rand(shape, generator=generator) >= sparsity
        codes = codes * mask
        matrix = KernelMatrix(codes[mask], bitmask=pack_bits(mask), scale=ones, columns=shape[1])
    for tokens in TOKENS:
        x = whole_numbers(tokens, shape[1])
        wanted = x.long() @ codes.long().T
        assert int(wanted.abs().max()) < 2**24  # float32 has all integers up to here
        assert torch.equal(by_blocks(matrix, x).long(), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_activations_are_rounded_as_for_few_tokens(tier, shape, sparsity):
    matrix, dense = example(*shape, torch.int8, sparsity)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        seen = rounded_to_bytes(x, "spread")
        size = seen.abs() @ dense.abs().T + 1e-30  # sums may cancel
        got = by_blocks(matrix, x)
        assert float(((got - bitmask_product(seen, dense)).abs() / size).max()) < 2e-6
        assert float(((got - by_kernel(matrix, x)).abs() / size).max()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_groups_have_their_scales(tier, shape, group, sparsity):
    matrix, dense = example_of_codes(*shape, group, sparsity)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        seen = rounded_to_bytes(x, "consecutive")
        size = seen.abs() @ dense.abs().T + 1e-30
        got = by_blocks(matrix, x)
        assert float(((got - bitmask_product(seen, dense)).abs() / size).max()) < 2e-6


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.5])
def test_floats_are_multiplied(tier, shape, values, sparsity):
    """float32 activations are never rounded; bfloat16 ones are what they are in every tier."""
    matrix, dense = example(*shape, values, sparsity)
    for tokens in (1, 7, 16, 17, 130, 513):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        for seen in (x, x.bfloat16()):
            got = by_blocks(matrix, seen)
            assert got.dtype == seen.dtype
            size = seen.double().abs() @ dense.abs().T + 1e-30
            error = (got.double() - bitmask_product(seen.double(), dense)).abs() / size
            assert float(error.max()) < (2e-6 if seen.dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("values", FLOATS)
def test_integers_in_floats_are_exact(tier, values):
    """No product or column is lost or taken twice."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        weight = torch.randint(-8, 9, (rows, columns), generator=generator)
        mask = torch.rand(rows, columns, generator=generator) >= 0.5
        stored = weight[mask].to(values)
        matrix = KernelMatrix(stored, bitmask=pack_bits(mask), columns=columns)
        x = torch.randint(-8, 9, (37, columns), generator=generator)
        wanted = x @ (weight * mask).T
        assert torch.equal(by_blocks(matrix, x.float()).long(), wanted)
        assert torch.equal(by_blocks(matrix, x.bfloat16()), wanted.bfloat16())


@pytest.mark.parametrize("values", [torch.int8, *FLOATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_beside_any_others(tier, values, dtype):
    """So the pieces of a prompt change nothing."""
    matrix, _ = example(70, 577, values, 0.5)
    x = torch.randn(100, 577).to(dtype)
    whole = by_blocks(matrix, x)
    for begin, end in ((0, 1), (3, 20), (37, 100)):
        assert torch.equal(by_blocks(matrix, x[begin:end]), whole[begin:end])


def test_bfloat16_is_the_float32_answer_rounded(tier):
    matrix, _ = example(70, 300, torch.int8, 0.5)
    x = torch.randn(19, 300).bfloat16()
    x[3, 5] = float("nan")
    got, wanted = by_blocks(matrix, x), by_blocks(matrix, x.float()).bfloat16()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("values", [torch.int8, *FLOATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_stays_in_its_token(tier, values, dtype):
    matrix, _ = example(20, 70, values, 0.5)
    x = torch.zeros(18, 70, dtype=dtype)
    x[11, 3] = float("nan")
    y = by_blocks(matrix, x)
    assert y[11].isnan().all()
    assert torch.equal(y[:11], torch.zeros(11, 20, dtype=dtype))
    assert torch.equal(y[12:], torch.zeros(6, 20, dtype=dtype))


@pytest.mark.parametrize("values", [torch.int8, *FLOATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_answer_whatever_the_threads(tier, values, dtype):
    kernels = lib.library()
    matrix, _ = example(301, 333, values, 0.5)
    x = torch.randn(37, 333).to(dtype)
    usual = kernels.sct_threads()
    try:
        answers = []
        for threads in (1, 2, 3, 7):
            assert kernels.sct_set_threads(threads) == threads
            answers.append(by_blocks(matrix, x))
        assert all(torch.equal(answers[0], other) for other in answers)
    finally:
        kernels.sct_set_threads(usual)


def test_rows_of_a_wider_tensor_are_multiplied(tier):
    matrix, _ = example(20, 70, torch.int8, None)
    wide = torch.randn(12, 90)
    assert torch.equal(by_blocks(matrix, wide[:, :70]), by_blocks(matrix, wide[:, :70].clone()))


def test_what_does_not_fit_is_refused():
    whole, _ = example(4, 70, torch.int8, None)
    for x in (torch.randn(9, 71), torch.randn(0, 70), torch.randn(9, 70).double()):
        with pytest.raises(ShapeError):
            by_blocks(whole, x)


def of_values(values: torch.dtype | str) -> KernelMatrix:
    """A matrix with half zeros, 33 × 300."""
    if values == "int4":
        return example_of_codes(33, 300, 64, 0.5)[0]
    return example(33, 300, values, 0.5)[0]


@pytest.mark.parametrize("values", [torch.int8, "int4", torch.bfloat16])
def test_no_stopwatch_changes_a_number(monkeypatch, values):
    """Whatever is measured to be faster, a prompt and its tokens get the same product."""
    matrix, x, found, chosen = of_values(values), torch.randn(21, 300), [], set()
    for times in ([1.0, 2.0], [2.0, 1.0]):
        monkeypatch.setattr(dispatch, "_least_seconds", lambda *_, times=times: times)
        monkeypatch.setattr(dispatch, "speedup_over_dense", lambda *_: 1.0)
        up_to = dispatch.measure([matrix], torch.float32, 0).kernel_up_to
        linear = PackedLinear(matrix, kernel_up_to=up_to)
        found += [linear(x), torch.cat([linear(one[None]) for one in x])]
        chosen.add(up_to)
    assert chosen == {1, 64}
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5 * found[0].abs().max())


@pytest.mark.parametrize("values", [torch.int8, "int4"])
def test_a_matrix_that_is_made_dense_keeps_its_integers(values):
    """It was made bfloat16, so a stopwatch decided whether activations are rounded."""
    matrix = of_values(values)
    dense = matrix.dense(torch.bfloat16)
    assert dense.integers
    assert dense.mask is None
    x = torch.randn(9, 300)
    torch.testing.assert_close(by_blocks(dense, x), by_blocks(matrix, x))


def test_a_linear_takes_its_way_for_many_tokens():
    matrix, _ = example(33, 130, torch.int8, 0.5)
    linear = PackedLinear(matrix, kernel_up_to=4)
    x = torch.randn(9, 130)
    assert torch.equal(linear(x[:4]), by_kernel(matrix, x[:4]))
    assert torch.equal(linear(x), by_blocks(matrix, x))
    floats, _ = example(33, 130, torch.bfloat16, 0.5)
    assert torch.equal(PackedLinear(floats, kernel_up_to=4)(x), by_blocks(floats, x))
