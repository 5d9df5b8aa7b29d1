"""Weights on small integer grids: one signed scale for each group of a row.

    w_ij ≈ s_ig · q_ij,      g = j div group,      −2^(bits − 1) ≤ q_ij ≤ 2^(bits − 1) − 1
    s_ig = ± 2^(e_i + c_ig div 16) · (1 + (c_ig mod 16) / 16),      0 ≤ c_ig ≤ 127

So a scale is one byte: c, and 128 more where it is negative. Each row has one exponent e. There is
no zero point: a zero is exactly the integer 0. The sign decides on which side of zero the grid has
one more number. A scale has 5 significant bits and q at most 3, so s · q has at most 8 and is exact
in bfloat16 and float32, and in float16 if 2⁻²⁰ ≤ |s| < 2¹³. A matrix on such a grid therefore needs
no other record of its scales: `quantize` finds them again, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from secateur.quantization.int8 import not_finite
from secateur.registry import CheckedPart, one_of
from secateur.types import Weight

BITS = (2, 3, 4)
"""The bits of a weight for which there is a grid."""

GROUPS = (32, 64, 128)
"""How many consecutive weights of a row can share a scale."""

Group = Annotated[int, one_of(*GROUPS)]

STEPS = 16
"""Scales between a power of two and the next."""

_OCTAVES = 8
"""Powers of two between the smallest scale of a row and twice its largest."""

_NEGATIVE = 128
"""The bit of a scale's byte that is its sign."""

LOWEST, HIGHEST = -126, 117
"""Exponents of rows: every scale is then a normal float32, and s · q is finite."""

_LARGEST_TRIED, _TRIED = 1.5, {2: 48, 3: 33, 4: 29}
"""The search begins at this multiple of the scale whose largest integer reaches the largest weight,
and tries so many scales downwards, by bits: to about half of the scale whose lowest integer does,
and with 2 bits to a third of it."""

AT_ONCE = 2**18
"""Weights that are searched at the same time: few enough for the caches."""


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix [out, in].

    Attributes:
        exponent: e, int8 [out].
        code: c and the sign, uint8 [out, groups].
    """

    exponent: Tensor
    code: Tensor

    @property
    def values(self) -> Tensor:
        """The scales themselves, float32 [out, groups]."""
        code = self.code.int()
        # The number of a scale counts from 1.0; c counts from 2^e, so e octaves are added.
        steps = self.exponent.int()[:, None] * STEPS + code % _NEGATIVE
        return _scale_of(steps).mul_(1 - 2 * (code // _NEGATIVE))

    @staticmethod
    def nearest(scale: Tensor, exponent: Tensor | None = None) -> Scales:
        """The nearest scales to float32 numbers [out, groups], with their signs; of 0 any will do.

        Those more than 7 octaves below the largest of their row become the smallest there is.

        Args:
            scale: the numbers.
            exponent: e, int8 [out], of a matrix that has these groups among others; None chooses
                it by the largest number of each row.
        """
        steps = _steps_of(scale.abs())
        if exponent is None:
            # The largest scale of the row lies in the highest of its 8 octaves.
            top = steps.amax(dim=1) // STEPS
            exponent = (top - _OCTAVES + 1).clamp(LOWEST, HIGHEST)
        code = (steps - exponent.int()[:, None] * STEPS).clamp(0, STEPS * _OCTAVES - 1)
        code += _NEGATIVE * (scale < 0)
        return Scales(exponent.to(torch.int8), code.to(torch.uint8))


def _scale_of(steps: Tensor) -> Tensor:
    """The positive scale with a number: 0 is 1.0, and 16 steps are an octave."""
    # % and // round down for negative numbers too, so the mantissa is always in [1, 2).
    return torch.ldexp(1 + (steps % STEPS).float() / STEPS, steps // STEPS)


def _steps_of(scale: Tensor) -> Tensor:
    """The number of the scale that is nearest to each positive number, int32."""
    mantissa, power = torch.frexp(scale.clamp_min(2.0**LOWEST))  # mantissa in [1/2, 1)
    # 2 · mantissa is in [1, 2); rounded up to 16 steps, it is the next power of two.
    return ((2 * mantissa - 1) * STEPS).round().int() + (power - 1) * STEPS


@dataclass(frozen=True)
class GroupGrid(CheckedPart):
    """The grid of `bits` bits with a scale for each `group` consecutive weights of a row.

    Args:
        bits: 2, 3 or 4.
        group: 32, 64 or 128. The last group of a row may be shorter.

    Raises:
        RecipeError: there is no such grid.

    Example:
        >>> import torch
        >>> from secateur.quantization.groups import GroupGrid
        >>> grid = GroupGrid(bits=4, group=32)
        >>> codes, scales = grid.quantize(torch.tensor([[3.5, -0.9, 0.0, 1.0]]))
        >>> codes, scales.values
        (tensor([[ 7, -2,  0,  2]], dtype=torch.int8), tensor([[0.5000]]))
        >>> grid.dequantize(codes, scales)
        tensor([[ 3.5000, -1.0000,  0.0000,  1.0000]])
    """

    bits: Annotated[int, one_of(*BITS)]
    group: Group

    @property
    def largest(self) -> int:
        """The largest integer: 7 of 4 bits, 3 of 3 bits, 1 of 2 bits."""
        return 2 ** (self.bits - 1) - 1

    @property
    def lowest(self) -> int:
        """The lowest integer: −8 of 4 bits, −4 of 3 bits, −2 of 2 bits."""
        return -self.largest - 1

    def groups(self, columns: int) -> int:
        """How many groups a row has."""
        return -(-columns // self.group)

    def quantize(self, weight: Weight) -> tuple[Tensor, Scales]:
        """Round a matrix; exact where it is on the grid already.

        Args:
            weight: [out, in], any floating dtype.

        Returns:
            The integers, int8 [out, in], and the scales: for a group on a grid those of that
            grid, for any other those with the least squared error.

        Raises:
            NumericalError: a weight is NaN or infinite.
        """
        parts = [self._quantize(rows) for rows in self._blocks(weight)]
        scales = Scales(
            torch.cat([scales.exponent for _, scales in parts]),
            torch.cat([scales.code for _, scales in parts]),
        )
        return torch.cat([codes for codes, _ in parts]), scales

    def dequantize(self, codes: Tensor, scales: Scales) -> Weight:
        """The weights s · q, float32 [out, in], of integers [out, in]."""
        weight = codes.float().mul_(self._spread(scales, codes.shape[1]))
        return weight.add_(0.0)  # 0 times a negative scale is −0

    def codes(self, weight: Weight, scales: Scales) -> Tensor:
        """The integers round(w / s), half to even, within the grid, int8 [out, in]."""
        spread = self._spread(scales, weight.shape[1])
        # Division by a power of two times 1 … 31/16, then half to even.
        rounded = (weight.float() / spread).round_().clamp_(self.lowest, self.largest)
        return rounded.to(torch.int8)

    def _spread(self, scales: Scales, columns: int) -> Tensor:
        # A scale for each weight, [out, in]; the last group may be cut.
        return scales.values.repeat_interleave(self.group, dim=1)[:, :columns]

    def holds(self, weight: Weight) -> bool:
        """Whether every weight [out, in] is on the grid, so that `quantize` changes none."""
        return all(
            torch.equal(self.dequantize(*self._quantize(rows)), rows.float())
            for rows in self._blocks(weight)
        )

    def nearest(self, weight: Weight, scale: Tensor) -> tuple[Weight, Tensor]:
        """The nearest weights s · q with given scales, and where round(w / s) is beyond the grid.

        Unlike `codes` and `dequantize` it needs no more memory than its results, and a little.

        Args:
            weight: [out, in].
            scale: s, [out, groups].

        Returns:
            float32 [out, in], and bool [out, in].
        """
        nearest = torch.empty(weight.shape, device=weight.device)
        beyond = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        # The four are split alike, by the columns of the weight: scales have fewer.
        parts = (self._blocks(x, weight.shape[1]) for x in (weight, scale, nearest, beyond))
        for rows, s, out, flags in zip(*parts, strict=True):
            rounded = self._grouped(rows.float()).div(s[:, :, None]).round_()
            codes = rounded.clamp(self.lowest, self.largest)
            # Flattened they have the padding of the last group at their end; it is cut off.
            flags.copy_((codes != rounded).flatten(1)[:, : weight.shape[1]])
            out.copy_(codes.mul_(s[:, :, None]).flatten(1)[:, : weight.shape[1]])
        return nearest, beyond

    def search(
        self, weight: Weight, importance: Tensor | None = None, exponent: Tensor | None = None
    ) -> Scales:
        """The scales with the least error Σ_j h_ij (w_ij − s q_ij)² in each group.

        Tries scales of both signs, from one and a half times the one whose largest integer reaches
        the largest weight, to those that clip too much.

        Args:
            weight: [out, in], any floating dtype. Weights that are pruned are zero.
            importance: h, [out, in] or [in]; 1 for every weight if not given.
            exponent: e of the rows, int8 [out]; None chooses it.
        """
        grouped = self._grouped(weight.float())
        weights = None
        if importance is not None:
            weights = self._grouped(importance.float().expand(weight.shape))
        # The first scale that is tried, as a number of steps, int32 [out, groups].
        reached = grouped.abs().amax(dim=2) * (_LARGEST_TRIED / self.largest)
        top = _steps_of(reached.clamp_max(2.0 ** (HIGHEST + _OCTAVES)))
        # The scales that a row can have: those of any exponent, or the 8 octaves of a given one.
        powers = torch.tensor([[LOWEST], [HIGHEST]], device=weight.device)
        if exponent is not None:
            powers = exponent.int().expand(2, -1)
        low = STEPS * powers[0][:, None]
        high = STEPS * (powers[1][:, None] + _OCTAVES) - 1
        # Squares of float32 weights below 1e-22 or above 1e19 would be 0 or infinite.
        # The power of two below the first scale of each group.
        unit = _scale_of(top // STEPS * STEPS)
        grouped = grouped / unit[:, :, None]
        best, least = torch.zeros_like(unit), torch.full_like(unit, torch.inf)
        for below in range(_TRIED[self.bits]):  # each a sixteenth of an octave below the last
            tried = _scale_of((top - below).clamp(low, high))
            scale = (tried / unit)[:, :, None]
            rounded = (grouped / scale).round_()
            # With −s the integers are the negatives, so the ends of the grid change places.
            for sign in (1, -1):
                ends = sorted((sign * self.lowest, sign * self.largest))
                # [out, groups, group], in units of `unit`; only compared within a group.
                lost = rounded.clamp(*ends).mul_(scale).sub_(grouped).square_()
                error = (lost if weights is None else lost.mul_(weights)).sum(dim=2)
                better = error < least  # of equal ones the larger scale, found first, stays
                least = torch.where(better, error, least)
                best = torch.where(better, sign * tried, best)
        return Scales.nearest(best, exponent)

    def scales_on_grid(self, weight: Weight) -> tuple[Tensor, Tensor]:
        """The scales of the groups that are on a grid, and which these are.

        The largest |w| of a group on a grid is |s| times some integer, so only a few s can be
        right: max |w| / 8, / 7, … / 1 with 4 bits. One is right if it has 5 significant bits, as
        all scales have, and if every w / s is an integer. With 8, w = −8 s, so s has the sign that
        makes the peak's integer negative, and the other side must not reach as far.

        Several may be right. It takes the largest of them that is not above the highest octave
        that the row needs, so that small groups stay within the octaves below it.

        Args:
            weight: float32 [out, in].

        Returns:
            The scales, float32 [out, groups], 0 for a group of zeros; and bool [out, groups].
        """
        grouped = self._grouped(weight)
        high, low = grouped.amax(dim=2), grouped.amin(dim=2)
        # The largest magnitude of each group, [out, groups].
        peak = torch.maximum(high, -low)
        fitting, least, on_grid = [], torch.zeros_like(peak), peak == 0
        for step in range(-self.lowest, 0, -1):  # from small scales to large ones
            tried = peak / step
            short = tried.frexp().mantissa * (2 * STEPS)  # whole for 5 significant bits
            # On the grid if rounding to it changes no bit.
            again = (grouped / tried[:, :, None]).round_().mul_(tried[:, :, None])
            fits = (again == grouped).all(dim=2) & (short.frac() == 0) & (peak > 0)
            if step > self.largest:  # only one side has such an integer
                fits &= high != -low
                tried = torch.where(high == peak, -tried, tried)
            least = torch.where(fits & ~on_grid, tried, least)  # the first that fits
            on_grid |= fits
            fitting.append((fits, tried))
        # The least scales that fit say which octave the row needs; up to it the largest are taken.
        scale, needed = least, least.abs().amax(dim=1, keepdim=True).frexp().exponent
        for fits, tried in fitting:
            scale = torch.where(fits & (tried.frexp().exponent <= needed), tried, scale)
        return scale, on_grid

    def _quantize(self, weight: Weight) -> tuple[Tensor, Scales]:
        """`quantize` for some rows."""
        values = weight.float()
        if not torch.isfinite(values).all():
            raise not_finite(values, f"int{self.bits}")
        # A matrix that was rounded before keeps its scales: rounding twice must change nothing.
        found, on_grid = self.scales_on_grid(values)
        if not on_grid.all():
            found = torch.where(on_grid, found, self.search(values).values)
        scales = Scales.nearest(found)
        return self.codes(values, scales), scales

    def _grouped(self, weight: Tensor) -> Tensor:
        """Rows [out, groups, group], the last group filled with zeros."""
        missing = -weight.shape[1] % self.group  # zeros are on every grid, and add no error
        padded = torch.nn.functional.pad(weight, (0, missing)) if missing else weight
        return padded.reshape(len(weight), -1, self.group)

    def _blocks(self, matrix: Tensor, columns: int | None = None) -> Sequence[Tensor]:
        """Rows that together are about `AT_ONCE` weights, where a row has so many."""
        return matrix.split(max(1, AT_ONCE // max(1, columns or matrix.shape[1])))
