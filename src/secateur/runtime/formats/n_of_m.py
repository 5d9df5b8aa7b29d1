"""N-of-M: for every group of M weights the rank of its set of N kept ones, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.runtime.formats import (
    Format,
    Layout,
    PartSpec,
    bits,
    encode_values,
    formats,
    value_spec,
)
from secateur.runtime.formats import kept as shared
from secateur.types import Mask, Weight

LARGEST_GROUP = 32
"""The largest M of N:M, so that the rank of a set of kept weights fits 32 bits."""

GROUPS = (2, 4, 8, 16, 32)
"""The M that are tried; for each of them N follows from the fullest group."""

LARGEST_TABLE = 16
"""The largest M for which all sets are listed in a table."""


def _code_bits(kept: int, group: int) -> int:
    """The bits of a code: ceil(log2 C(M, N))."""
    return (comb(group, kept) - 1).bit_length()


def _binomials(kept: int, group: int) -> Tensor:
    """C(j, k) for j < M and k <= N, int32 [M, N + 1]."""
    return torch.tensor(
        [[comb(j, k) for k in range(kept + 1)] for j in range(group)], dtype=torch.int32
    )


def _ranks(mask: Mask, kept: int) -> Tensor:
    """The rank of each set of kept weights in the combinatorial number system.

        rank = Σ_i C(p_i, i)    for the kept positions p_1 < p_2 < … < p_N, counted from 0

    For 2:4 that is 0 for {0, 1}, then {0, 2}, {1, 2}, {0, 3}, {1, 3}, and 5 for {2, 3}.

    Args:
        mask: bool [groups, M] with exactly `kept` True in each group.
        kept: N.

    Returns:
        int32 [groups], each below C(M, N).

    Example:
        >>> import torch
        >>> from secateur.runtime.formats.n_of_m import _ranks
        >>> _ranks(torch.tensor([[True, True, False, False], [False, True, False, True]]), kept=2)
        tensor([0, 4], dtype=torch.int32)
    """
    table = _binomials(kept, mask.shape[1])
    rank = torch.zeros(len(mask), dtype=torch.int32)
    seen = torch.zeros(len(mask), dtype=torch.int32)
    # One position of all groups at a time: a loop of M steps over vectors of all groups.
    for position in range(mask.shape[1]):
        here = mask[:, position]
        seen += here  # this is the seen-th kept weight, i in C(p_i, i)
        rank += torch.where(here, table[position][seen], 0)
    return rank


def _sets_of(rank: Tensor, kept: int, group: int) -> Mask:
    """The sets of kept weights with these ranks: the inverse of `_ranks`, bool [groups, M]."""
    table = _binomials(kept, group)
    left = torch.full_like(rank, kept)
    rank = rank.clone()
    mask = torch.empty(len(rank), group, dtype=torch.bool)
    # greedily from the last position: p_N is the largest j with C(j, N) <= rank, and so on
    for position in reversed(range(group)):
        below = table[position][left]
        # C(j, 0) = 1 says "no more to place" here, not "rank 1 is too large"
        here = (left > 0) & (rank >= below)
        mask[:, position] = here
        rank -= torch.where(here, below, 0)
        left -= here.to(torch.int32)
    return mask


@cache
def _tables(kept: int, group: int) -> tuple[Tensor, Tensor]:
    """Tables of rank by set and set by rank; a set is a whole number with bit j for position j."""
    # every subset of a group, as a row of M bits: [2^M, M]
    members = torch.arange(2**group, dtype=torch.int32)[:, None] >> torch.arange(group) & 1
    sets = torch.nonzero(members.sum(dim=1) == kept).view(-1)
    rank_of = torch.zeros(2**group, dtype=torch.int32)
    rank_of[sets] = _ranks(members[sets].bool(), kept)
    set_of = torch.empty(len(sets), dtype=torch.int32)
    set_of[rank_of[sets].long()] = sets.int()
    return rank_of, set_of


def _codes_of_groups(mask: Mask, kept: int) -> Tensor:
    """`_ranks`, by a table where M is at most 16."""
    group = mask.shape[1]
    if group > LARGEST_TABLE:
        return _ranks(mask, kept)
    sets = torch.zeros(len(mask), dtype=torch.int32)
    for position in range(group):
        sets |= mask[:, position].int() << position
    return _tables(kept, group)[0].index_select(0, sets)


def _groups_of_codes(rank: Tensor, kept: int, group: int) -> Mask:
    """`_sets_of`, by a table where M is at most 16."""
    if group > LARGEST_TABLE:
        return _sets_of(rank, kept, group)
    sets = _tables(kept, group)[1].index_select(0, rank)
    mask = torch.empty(len(rank), group, dtype=torch.bool)
    for position in range(group):
        mask[:, position] = (sets >> position) & 1
    return mask


def _fill_groups(mask: Mask, kept: int, group: int) -> Mask:
    """Also keep the first zeros of a group, until exactly N are kept."""
    # sums by columns: torch's sum over a short last dimension of bytes is many times slower
    groups = mask.view(torch.uint8).reshape(-1, group)
    counts = groups[:, 0].clone()
    for position in range(1, group):
        counts += groups[:, position]
    fullest = int(counts.max())
    if fullest > kept:
        raise CheckpointError(
            f"{int((counts > kept).sum())} groups of {group} keep more than {kept} weights",
            remedy="store this matrix as bitmask",
        )
    if int(counts.min()) == kept:
        return mask
    filled = mask.reshape(-1, group).clone()
    missing = kept - counts
    for position in range(group):
        take = ~filled[:, position] & (missing > 0)
        filled[:, position] |= take
        missing -= take.to(torch.uint8)
    return filled.reshape(mask.shape)


class NOfM(Format):
    """Parts: `codes` uint8 [out, ceil(in/M · bits / 8)], `compressed` [out · in/M · N].

    A code is the rank of the group's set (see `_ranks`) in bits = ceil(log2 C(M, N)) bits. The
    codes of a row follow each other without gaps, lowest bit first, and the row ends with zeros
    up to a whole byte. A group with fewer than N nonzero weights also keeps its first zeros.
    Integers add their scales. int4, int3 and int2 are one bit stream:
    `compressed` uint8 [ceil(out · in/M · N · bits / 8)].

    Example:
        >>> import torch
        >>> from secateur.runtime.formats import Layout, formats
        >>> weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 0.0, 0.0, 0.0]])
        >>> layout = Layout("n-of-m", "float32", (1, 8), pattern="2:4")
        >>> formats["n-of-m"].pack(weight, layout)
        {'codes': tensor([[4]], dtype=torch.uint8), 'compressed': tensor([5., 7., 1., 0.])}
    """

    name: ClassVar[str] = "n-of-m"
    suffixes: ClassVar[tuple[str, ...]] = ("codes", "compressed", "weight_scale", "weight_exponent")

    def candidates(self, nonzero: Mask, dense: Layout) -> list[Layout]:
        """One for each pattern that holds every weight that is not zero."""
        found = []
        counts = nonzero.contiguous().view(torch.uint8)
        # Counts of groups of 2 give those of groups of 4, and so on: each adds two neighbours.
        for group in GROUPS:
            if counts.shape[1] % 2:
                break
            counts = counts[:, 0::2] + counts[:, 1::2]
            kept = max(1, int(counts.max()))
            if kept < group:
                found.append(replace(dense, format=self.name, pattern=f"{kept}:{group}"))
        return found

    def why_not(self, layout: Layout) -> str | None:
        """It needs a pattern N:M with M up to 32, and whole groups."""
        if layout.pattern is None:
            return "the format 'n-of-m' needs a pattern"
        kept, group = layout.kept_of_group
        columns = layout.shape[1]
        if 1 <= kept < group <= LARGEST_GROUP and columns % group == 0:
            return None
        return (
            f"{columns} inputs are not whole groups of {layout.pattern} "
            f"with 1 <= N < M <= {LARGEST_GROUP}"
        )

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts, whatever the number of zeros."""
        kept, group = layout.kept_of_group
        out, columns = layout.shape
        groups, width = columns // group, _code_bits(kept, group)
        return {
            "codes": PartSpec(torch.uint8, (out, bits.row_bytes(groups * width)), width),
            "compressed": value_spec(layout, out * groups * kept),
            **shared.scale_specs(layout),
        }

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """Codes and kept values of a matrix [out, in].

        Raises:
            CheckpointError: a group keeps more than N.
        """
        kept, group = layout.kept_of_group
        mask, stored, scales = shared.as_stored(weight, layout)
        mask = _fill_groups(mask, kept, group)
        rank = _codes_of_groups(mask.reshape(-1, group), kept)
        codes = bits.pack_numbers(rank.view(layout.shape[0], -1), _code_bits(kept, group))
        values = encode_values(shared.select(stored, mask), layout)
        return {"codes": codes, "compressed": values, **scales}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """Mask [out, in], N in each group, and values."""
        kept, group = layout.kept_of_group
        mask = _groups_of_codes(self.codes(parts, layout), kept, group)
        values = shared.decode_values(parts["compressed"], layout, layout.weights // group * kept)
        return mask.reshape(layout.shape), values

    def codes(self, parts: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """The code of every group, int32 [out · in/M]."""
        kept, group = layout.kept_of_group
        groups = layout.shape[1] // group
        return bits.unpack_numbers(parts["codes"], _code_bits(kept, group), groups).int().view(-1)

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        return shared.expand(*self.kept(parts, layout), parts, layout)

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Also refuse codes without a set, and bits past the end of a row."""
        shared.check_parts(parts, layout)
        kept, group = layout.kept_of_group
        shared.check_values(parts["compressed"], layout, layout.weights // group * kept)
        width = _code_bits(kept, group)
        if beyond := bits.padding_bits(parts["codes"], layout.shape[1] // group * width):
            raise CheckpointError(f"{beyond} bits are set past the last code of a row")
        sets = comb(group, kept)
        # 6 sets of 2:4 have codes of 3 bits, so 6 and 7 fit the bits and mean nothing
        if wrong := int((self.codes(parts, layout) >= sets).sum()):
            raise CheckpointError(
                f"{wrong} codes are {sets} or more, and {layout.pattern} has only {sets} sets"
            )


formats.register(NOfM.name)(NOfM())
