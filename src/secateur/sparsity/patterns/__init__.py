"""Patterns: which sets of zeros are allowed? One file each.

A pattern turns a score into a mask (True = kept) with an exact number of zeros, also under ties:
of equal scores the one with the lower index is pruned first. A pattern that declares
`batched = True` also takes scores [batch, out, in]; each matrix gets the mask that it gets alone.

Which pattern the zeros of a matrix follow, seen from the zeros alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.errors import NumericalError, PatternError
from secateur.registry import Registry
from secateur.types import Mask, Score, UnitScores, Weight

__all__ = [
    "Pattern",
    "WholeUnits",
    "check_sparsity",
    "misplaced",
    "parse_pattern",
    "patterns",
    "pruned_count",
    "recognised",
    "unit_scores",
    "within",
]


@runtime_checkable
class Pattern(Protocol):
    """The contract of a pattern."""

    @property
    def name(self) -> str:
        """How the pattern is written in a recipe, for example `unstructured`, `2:4`, `16x1`."""
        ...

    @property
    def scope(self) -> str:
        """The set within which scores compete: `row`, `layer`, `global`, or `group` for N:M."""
        ...

    @property
    def columns_together(self) -> int:
        """How many consecutive columns must be decided at once (1, M, or the block's width)."""
        ...

    @property
    def sparsity(self) -> float | None:
        """The only sparsity of the pattern (1 − N/M), or None if every sparsity is possible."""
        ...

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes that the pattern can have."""
        ...

    @property
    def whole_units(self) -> bool:
        """Whether whole columns go together; then the pattern is a `WholeUnits`."""
        ...

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Raise PatternError or ShapeError if a matrix [out, in] cannot hold this sparsity."""
        ...

    def pruned(self, shape: tuple[int, int], sparsity: float) -> int:
        """The exact number of zeros the mask of a matrix [out, in] will have."""
        ...

    def step(self, shape: tuple[int, int]) -> int:
        """The step in the number of zeros of a matrix [out, in]; it changes in multiples of it."""
        ...

    def mask(self, score: Score, sparsity: float, *, allowed: Mask | None = None) -> Mask:
        """The mask of a matrix: True = kept; exactly `pruned(score.shape, sparsity)` zeros.

        Args:
            score: float32 [out, in]; higher = keep.
            sparsity: the fraction of zeros.
            allowed: the weights that may be kept, bool [out, in]; None for all. No other weight is
                ever kept, and the scores of others do not count. Units without such a weight are
                pruned first. There are more zeros than `pruned` only if too few units remain, or if
                a kept unit contains weights that may not be kept.
        """
        ...

    def units(self, score: Score) -> UnitScores:
        """The scores that compete with each other: of single weights, or of whole blocks.

        With scope `global` they compete across the model; see `allocation.global_threshold`.

        Raises:
            PatternError: the pattern's weights compete only within a group (N:M).
        """
        ...

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """The most memory that `mask` takes for scores [out, in], besides them."""
        ...


class WholeUnits(Pattern, Protocol):
    """The contract of a pattern whose `whole_units` is True: units are groups of columns."""

    @property
    def width(self) -> int:
        """How many consecutive columns are a unit."""
        ...

    @property
    def among(self) -> int:
        """Units compete within sets of so many, and each set loses the same number; 0: all."""
        ...

    def units_pruned(self, inputs: int, sparsity: float) -> int:
        """How many units of a matrix with so many inputs are pruned."""
        ...


@runtime_checkable
class PatternKind(Protocol):
    """A class of patterns that can read itself from the text in a recipe."""

    written: str
    """How its patterns are written, for messages and lists."""

    def parse(self, text: str, scope: str | None) -> Pattern | None:
        """The pattern written as `text`, or None if the text is not of this kind."""
        ...


patterns: Registry[PatternKind] = Registry("pattern", __name__)


def parse_pattern(text: str, scope: str | None = None) -> Pattern:
    """Read a pattern as written in a recipe: `unstructured`, `2:4`, `16x1`.

    Args:
        text: the pattern.
        scope: `row`, `layer` or `global` for patterns that have a choice, None for its default.

    Raises:
        PatternError: no kind of pattern is written like this, or the scope does not fit.

    Example:
        >>> from secateur.sparsity.patterns import parse_pattern
        >>> parse_pattern("2:4")
        NOfM(kept=2, group=4)
        >>> parse_pattern("unstructured", "row")
        Unstructured(scope='row')
    """
    for name in sorted(patterns, key=lambda name: name != text):  # its own name first
        pattern = patterns[name].parse(text, scope)
        if pattern is not None:
            return pattern
    raise PatternError(
        f"no pattern is written {text!r}",
        remedy="use " + "; or ".join(patterns[name].written for name in patterns),
    )


def pruned_count(total: int, sparsity: float) -> int:
    """The number of zeros that comes nearest to `sparsity` of `total`, halves rounded up.

    The sparsity is read as the decimal number a person would write for it, so that 0.7 of 45 is
    31.5 and rounds to 32, although the double nearest to 0.7 lies below it. For every whole
    0 <= k <= total, `pruned_count(total, k / total) == k`.

    Args:
        total: how many weights or blocks there are.
        sparsity: the fraction of zeros.

    Example:
        >>> from secateur.sparsity.patterns import pruned_count
        >>> pruned_count(45, 0.7)
        32
    """
    exact = Decimal(repr(float(sparsity))) * total  # repr: the shortest decimal, as it was written
    return int(exact.to_integral_value(rounding=ROUND_HALF_UP))


def check_sparsity(sparsity: float, scope: str) -> None:
    """Refuse a sparsity outside [0, 1); a global threshold may take all of one matrix, so 1 too.

    Raises:
        PatternError: the sparsity is negative, too large, or not a number.
    """
    if not 0 <= sparsity < 1 and not (scope == "global" and sparsity == 1):
        percent = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise PatternError(
            f"sparsity is {sparsity}",
            remedy=f"give the fraction of zeros, at least 0 and below 1{percent}",
        )


def unit_scores(units: Callable[[Score], Tensor], score: Score, allowed: Mask | None) -> UnitScores:
    """The scores of a pattern's units; −∞ for units of which no weight may be kept.

    The −∞ is set after the scores of each unit have been joined, because a sum or a magnitude would
    change it.

    Args:
        units: joins scores [out, in] into those of units; at least 0 for scores of 0 and 1, and 0
            only where all are 0.
        score: of each weight.
        allowed: which weights may be kept; None for all.

    Raises:
        NumericalError: the score of a unit is NaN.
    """
    if allowed is None:
        found = units(score)
    else:
        # Weights that may not be kept add nothing; units without others are found by counting.
        found = units(score.masked_fill(~allowed, 0.0))
        found = found.masked_fill(units(allowed.to(score.dtype)) == 0, -math.inf)
    if torch.isnan(found.sum()):  # one pass; NaN anywhere is NaN in the sum, and so is ∞ − ∞
        missing = int(torch.isnan(found).sum())
        if missing:
            raise NumericalError(
                f"{missing} of {found.numel()} scores are not a number",
                remedy="look for NaN or infinite weights, or an overflow in the calibration "
                "inputs; loading the model in bfloat16 or float32 avoids overflow",
            )
    return found


def within(mask: Mask, allowed: Mask | None) -> Mask:
    """The weights of a mask that may be kept."""
    return mask if allowed is None else mask & allowed


def misplaced(pattern: Pattern, weight: Weight, sparsity: float) -> int:
    """How many weights of a matrix [out, in] are nonzero where the pattern needs zeros.

    With the score 1 for nonzero weights and 0 for zeros, the pattern prunes zeros first. So every
    nonzero weight that it prunes is misplaced.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns import misplaced, parse_pattern
        >>> misplaced(parse_pattern("2:4"), torch.tensor([[1.0, 2.0, 3.0, 0.0]]), 0.5)
        1
    """
    if sparsity <= 0:
        return 0
    nonzero = weight != 0
    # 1 for a nonzero weight, 0 for a zero: the mask takes as many zeros as there are.
    return int((nonzero & ~pattern.mask(nonzero.to(torch.float32), sparsity)).sum())


_DENSE, _UNSTRUCTURED = "dense", "unstructured"
_BY_CHANCE = 0.001
"""The share of zeros that a dense matrix may have by chance."""
_EXPLAINED = 0.8
"""The share of the zeros that N:M must account for. Many zeros anywhere also leave some in every
group, but the N:M that they fulfil accounts for few of them."""
_GROUPS = (4, 8, 16, 32)
_FEWEST = 4
"""Groups in a row; with fewer, rows with equal numbers of zeros would look like N:M."""


def recognised(weight: Weight) -> str:
    """Return `N:M`, `unstructured` or `dense` for a matrix [out, in].

    N:M means that no group of M consecutive inputs keeps more than N weights, and that this alone
    makes at least 4 of 5 zeros; a row has at least 4 groups. Of several, it is the one with the
    most zeros, then the smallest M.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns import recognised
        >>> recognised(torch.tensor([[1.0, 0, 0, 2] * 4, [0, 3, 4, 0] * 4]))
        '2:4'
        >>> recognised(torch.tensor([[1.0, 0, 0, 0] * 4, [2, 3, 4, 0] * 4]))
        'unstructured'
    """
    kept = weight != 0
    sparsity = 1 - float(kept.float().mean())
    if sparsity < _BY_CHANCE:
        return _DENSE
    best, name = 0.0, _UNSTRUCTURED
    for size in _GROUPS:
        if weight.shape[1] % size or weight.shape[1] < _FEWEST * size:
            continue
        most = int(kept.reshape(-1, size).sum(-1).max())  # N: the fullest group decides
        zeros = 1 - most / size
        if zeros > best and zeros >= _EXPLAINED * sparsity:
            best, name = zeros, f"{most}:{size}"
    return name
