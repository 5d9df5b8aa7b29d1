"""The grids of 2, 3 and 4 bits, against a slow search over every scale of either sign."""

import itertools
import math

import pytest
import torch

from secateur.errors import NumericalError, RecipeError
from secateur.quantization.groups import HIGHEST, GroupGrid, Scales

GRIDS = [GroupGrid(bits, group) for bits, group in itertools.product((2, 3, 4), (32, 64, 128))]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < 0.5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [1, 31, 96, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_on_the_grid_is_found_again_in_any_dtype(grid, columns, dtype):
    weight = random_weight(7, columns) * 0.02
    first = grid.dequantize(*grid.quantize(weight))
    stored = first.to(dtype)
    assert torch.equal(stored.float(), first)
    again = grid.dequantize(*grid.quantize(stored))
    assert torch.equal(again, first)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_stay_and_nothing_leaves_the_grid(grid):
    weight = random_weight(5, 300)
    codes, scales = grid.quantize(weight)
    assert not codes[weight == 0].any()
    assert (int(codes.min()), int(codes.max())) == (grid.lowest, grid.largest)
    assert scales.code.shape == (5, -(-300 // grid.group))


def every_scale() -> list[float]:
    sizes = [math.ldexp(1 + step / 16, power) for power in range(-14, 3) for step in range(16)]
    return [sign * size for size in reversed(sizes) for sign in (1, -1)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_the_best_scale_there_is(bits):
    grid = GroupGrid(bits, 32)
    weight = random_weight(6, 32, 1)
    importance = 0.5 + torch.rand(6, 32, generator=torch.Generator().manual_seed(2))
    found = grid.search(weight, importance).values[:, 0].tolist()
    for row, scale in enumerate(found):
        errors = {}
        for tried in every_scale():
            rounded = (weight[row] / tried).round().clamp(grid.lowest, grid.largest) * tried
            errors[tried] = float((importance[row] * (weight[row] - rounded) ** 2).sum())
        assert errors[scale] == pytest.approx(min(errors.values()), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("power", [-117, -70, 60, 122])
def test_tiny_and_huge_weights_get_the_scales_that_others_get(bits, power):
    weight, grid = random_weight(6, 96, 3), GroupGrid(bits, 32)
    importance = torch.rand(6, 96, generator=torch.Generator().manual_seed(4))
    moved = torch.ldexp(weight, torch.tensor(power))
    assert torch.isfinite(moved).all()
    for how in (None, importance):
        scales = grid.search(weight, how).values
        assert torch.equal(grid.search(moved, how).values, torch.ldexp(scales, torch.tensor(power)))
    assert torch.equal(grid.quantize(moved)[0], grid.quantize(weight)[0])


def test_float16_holds_every_weight_of_scales_in_its_range():
    codes = torch.arange(-8.0, 8.0)
    for power in range(-20, 13):
        weights = torch.ldexp((1 + torch.arange(16) / 16)[:, None] * codes, torch.tensor(power))
        assert torch.equal(weights.half().float(), weights)
    for power in (-21, 13):
        weights = torch.ldexp((1 + torch.arange(16) / 16)[:, None] * codes, torch.tensor(power))
        assert not torch.equal(weights.half().float(), weights)


def test_the_largest_of_a_row_sets_its_exponent_and_small_groups_round_to_the_smallest_scale():
    weight = torch.tensor([[1.0] * 32 + [2.0**-30] * 32])
    grid = GroupGrid(4, 32)
    codes, scales = grid.quantize(weight)
    assert scales.values[0, 0] in (1.0, 0.5, 0.25, -0.125)
    assert scales.values[0, 1].abs() == 2.0 ** int(scales.exponent[0])
    assert not codes[0, 32:].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_of_eight_octaves_is_found_again(bits):
    """The largest group holds only two steps; a scale of two steps would be an octave higher."""
    weight = torch.zeros(2, 96)
    weight[:, :32] = torch.tensor([2.0, -2.0, 0.0, 2.0]).repeat(8)
    small = 2.0 ** (-7 if bits > 2 else -6)
    small *= torch.tensor([3.0, -1.0, 2.0, 0.0] if bits > 2 else [1.0, -1.0, 2.0, 0.0])
    weight[0, 32:64] = small.repeat(8)
    weight[1, 64:] = -small.repeat(8)
    grid = GroupGrid(bits, 32)
    assert torch.equal(grid.dequantize(*grid.quantize(weight)), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_pair_of_integers_with_every_scale_is_found_again(bits):
    """Both signs, all octaves of a row; the lowest integer and each other one in a group."""
    grid, generator = GroupGrid(bits, 32), torch.Generator().manual_seed(9)
    integers = range(grid.lowest, grid.largest + 1)
    pairs = torch.tensor(list(itertools.product(integers, integers)), dtype=torch.int8)
    for code in range(256):
        codes = pairs[:, torch.randint(2, (64,), generator=generator)]
        codes[:, 32:] = codes[:, :1]  # the row's largest scale is given by a group of one integer
        scales = Scales(
            torch.full((len(pairs),), -3, dtype=torch.int8),
            torch.tensor([[code, 7 * 16 + 3]], dtype=torch.uint8).repeat(len(pairs), 1),
        )
        weight = grid.dequantize(codes, scales)
        found, again = grid.quantize(weight.bfloat16())
        assert torch.equal(grid.dequantize(found, again), weight), code
        assert not torch.signbit(weight)[weight == 0].any()
        assert grid.holds(weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_peak_is_the_lowest_integer_on_either_side(bits):
    grid = GroupGrid(bits, 32)
    for sign in (1.0, -1.0):
        weight = torch.zeros(1, 32)
        weight[0, :3] = sign * torch.tensor([-grid.lowest * 0.375, -grid.largest * 0.375, 0.375])
        weight[0, 3] = sign * 0.375 * max(1, grid.largest - 1)  # only this scale holds them
        codes, scales = grid.quantize(weight)
        assert codes[0, 0] == grid.lowest
        assert scales.values[0, 0] == -sign * 0.375
        assert torch.equal(grid.dequantize(codes, scales), weight)
        assert not grid.holds(torch.cat([weight[:, :31], -weight[:, :1]], dim=1)) or bits == 2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_given_scales_of_either_sign(grid):
    weight, generator = random_weight(9, 200), torch.Generator().manual_seed(3)
    scale = torch.rand(9, grid.groups(200), generator=generator) + 0.1
    scale *= torch.where(torch.rand(scale.shape, generator=generator) < 0.5, -1.0, 1.0)
    nearest, clipped = grid.nearest(weight, scale)
    for row, column in itertools.product(range(9), range(200)):
        s, w = float(scale[row, column // grid.group]), float(weight[row, column])
        points = [s * q for q in range(grid.lowest, grid.largest + 1)]
        wanted = min(points, key=lambda point: abs(point - w))
        assert nearest[row, column] == pytest.approx(wanted)
        inside = min(points) - abs(s) / 2 <= w <= max(points) + abs(s) / 2
        assert clipped[row, column] == (not inside)


@pytest.mark.parametrize("size", [1e-9, 1e-20, 1.0, 1e9, 1e30])
def test_a_group_of_zeros_does_not_coarsen_its_row(size):
    weight = random_weight(4, 96) * size
    alone = GroupGrid(4, 32).quantize(weight[:, :64])
    weight[:, 64:] = 0
    codes, scales = GroupGrid(4, 32).quantize(weight)
    assert torch.equal(codes[:, :64], alone[0])
    assert torch.equal(scales.values[:, :2], alone[1].values)
    assert not codes[:, 64:].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_numbers_stay_finite(bits):
    grid = GroupGrid(bits, 32)
    largest = torch.finfo(torch.float32).max
    found = grid.dequantize(*grid.quantize(torch.full((1, 40), largest)))
    assert torch.isfinite(found).all()
    for code in (127, 255):
        extreme = Scales(torch.tensor([HIGHEST], dtype=torch.int8), torch.full((1, 1), code).byte())
        assert torch.isfinite(grid.dequantize(torch.full((1, 32), grid.lowest), extreme)).all()


def test_scales_by_their_bytes():
    scales = Scales(
        torch.tensor([-3], dtype=torch.int8), torch.tensor([[0, 8, 144, 127, 255]]).byte()
    )
    most = 2.0**4 * (1 + 15 / 16)
    assert scales.values.tolist() == [[0.125, 0.1875, -0.25, most, -most]]
    again = Scales.nearest(scales.values)
    assert torch.equal(again.values, scales.values)


def test_a_scale_between_two_is_rounded_up_into_the_next_octave():
    assert Scales.nearest(torch.tensor([[1.99, 1.0]])).values.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("tiny", [0.0, 1e-40, 1e-30])
def test_rows_of_nearly_nothing(tiny):
    grid = GroupGrid(4, 32)
    codes, scales = grid.quantize(torch.full((2, 40), tiny))
    assert torch.isfinite(grid.dequantize(codes, scales)).all()


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_no_grid_for_what_is_not_finite(odd):
    with pytest.raises(NumericalError, match="1 of 4 weights"):
        GroupGrid(4, 32).quantize(torch.tensor([[odd, 1.0, 2.0, 3.0]]))


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (8, 32), (4, 16), (4, 0)])
def test_other_grids_are_refused(bits, group):
    with pytest.raises(RecipeError, match=f"is {bits if group == 32 else group}"):
        GroupGrid(bits, group)
