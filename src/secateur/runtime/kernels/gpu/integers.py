"""Weights of integers on a GPU, and the Triton kernels that multiply rounded activations by them.

Integers are held with their zeros: 8 bits for a weight, or 4 and a scale of bfloat16 for each run
of columns. Activations become int8 as on a CPU, 64 columns with one scale. Tensor cores add the
products of a word (64 columns) as integers, without rounding, and the sums of the words are added
in float32. So only the order of sums differs from the CPU.

Of 4 bits a byte has column i of a word in its low half and column i + 32 in its high half. The
kernel needs only a mask and a shift to make two matrices [ROWS, 32] of 16 times the weights, and
the factor 1/16 goes into the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur.quantization.activations import GROUP, integers_of, shares_of, spread_order
from secateur.runtime.kernels.gpu.bitmask import divided
from secateur.runtime.kernels.linear import IntegerLinear, expanded_product, in_halves


class Tile(NamedTuple):
    """What a program multiplies at once, and how many warps and loads ahead it has."""

    tokens: int
    rows: int
    warps: int
    stages: int


FEW, MANY = Tile(16, 64, 2, 4), Tile(64, 128, 8, 3)
WORDS = 8
"""Words that a program rounds."""


@triton.jit
def rounded(x, order, q, steps, columns, words, WORDS: tl.constexpr):
    """Activations as `quantization.activations.integers_of` rounds them, to the bit.

    Args:
        x: [tokens, columns], contiguous.
        order: the column that each place of `q` has, int32 [words · 64].
        q: int8 [tokens, words · 64].
        steps: the scales, float32 [tokens, words].
        columns: of x.
        words: of a token.
        WORDS: of a program.
    """
    token = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    here = word < words
    place = word[:, None] * 64 + tl.arange(0, 64)[None, :]
    column = tl.load(order + place, mask=here[:, None], other=0)
    inside = here[:, None] & (column < columns)
    value = tl.load(x + token * columns + column, mask=inside, other=0).to(tl.float32)
    # the sum is 0, and NaN if a value is none: a maximum drops those
    most = tl.max(tl.abs(value), 1) + tl.sum(value * 0.0, 1)
    inverse = tl.div_rn(127.0, tl.where(most > 0, most, 127.0))
    # at 1.5 · 2^23 a float32 has no bits behind the point: half to even
    near = (value * inverse[:, None] + 12582912.0) - 12582912.0
    tl.store(q + token * words * 64 + place, near.to(tl.int8), mask=here[:, None])
    tl.store(steps + token * words + word, tl.div_rn(most, 127.0), mask=here)


@triton.jit
def halves_of(packed, PLAIN: tl.constexpr):
    """The low and the high codes of bytes, 16 times as large, int8."""
    if PLAIN:
        return packed << 4, packed & -16
    # four bytes of a register at once: Triton would take each byte apart
    low = tl.inline_asm_elementwise(
        "{ .reg .b32 moved; shl.b32 moved, $1, 4; and.b32 $0, moved, 0xf0f0f0f0; }",
        "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
    )  # fmt: skip
    high = tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xf0f0f0f0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
    )
    return low, high


@triton.jit
def integer_product(
    q, steps, y, codes, scales, rows, words, tokens, words_each,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Parts of x · Wᵀ, [splits, tokens, rows]; program (i, k, t) adds the words of split k.

    Args:
        q: rounded activations, int8 [tokens, words · 64].
        steps: their scales, float32 [tokens, words].
        y: the parts.
        codes: int8 [rows, words · 64]; with `RUNS` two in a byte, [rows, words · 32].
        scales: float32 [rows]; with `RUNS` [rows, words · RUNS].
        rows: of W.
        words: of a row.
        tokens: of x.
        words_each: of a split.
        TOKENS: of a program.
        ROWS: of a program.
        RUNS: 0 for a scale for each row; else for 4 bits: scales of a word, 1 or 2.
        PLAIN: whether no machine code may be used, as in Triton's interpreter.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    here, known = row < rows, token < tokens
    BYTES: tl.constexpr = 32 if RUNS else 64
    byte = tl.arange(0, BYTES)
    own = codes + row[:, None].to(tl.int64) * (words * BYTES) + byte[None, :]
    inputs = q + token[:, None].to(tl.int64) * (words * 64) + byte[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for word in tl.range(split * words_each, tl.minimum(words, (split + 1) * words_each)):
        stored = tl.load(own + word * BYTES, mask=here[:, None], other=0)
        step = tl.load(steps + token * words + word, mask=known, other=0)[None, :]
        x = tl.trans(tl.load(inputs + word * 64, mask=known[:, None], other=0))
        if RUNS:
            low, high = halves_of(stored, PLAIN)
            last = tl.trans(tl.load(inputs + word * 64 + 32, mask=known[:, None], other=0))
            at = scales + (row * words + word) * RUNS
            scale = tl.load(at, mask=here, other=0).to(tl.float32)[:, None]
            dots = tl.dot(low, x, out_dtype=tl.int32)
            if RUNS == 2:
                sums += dots.to(tl.float32) * (step * scale)
                scale = tl.load(at + 1, mask=here, other=0).to(tl.float32)[:, None]
                dots = tl.dot(high, last, out_dtype=tl.int32)
            else:
                dots = tl.dot(high, last, dots, out_dtype=tl.int32)
            sums += dots.to(tl.float32) * (step * scale)
        else:
            sums += tl.dot(stored, x, out_dtype=tl.int32).to(tl.float32) * step
    if RUNS:
        sums *= 0.0625  # the codes were 16 times as large
    else:
        sums *= tl.load(scales + row, mask=here, other=0)[:, None]
    places = (split * tokens + token[None, :]).to(tl.int64) * rows + row[:, None]
    tl.store(y + places, sums.to(y.dtype.element_ty), mask=here[:, None] & known[None, :])


@dataclass(frozen=True)
class GpuIntegers:
    """A weight [out, in] of integers on one device.

    Attributes:
        shape: (out, in).
        codes: int8 [out, ⌈in / 64⌉ · 64]; in groups two in a byte.
        scales: float32 [out, 1]; in groups bfloat16 [out, runs], which is exact.
        group: columns that share a scale; None for whole rows.
        order: the column of each code, int32.
    """

    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    group: int | None
    order: Tensor

    integers = True

    @classmethod
    def of(cls, linear: IntegerLinear, device: torch.device | str = "cuda") -> GpuIntegers:
        """The matrix of a linear; in groups its codes have at most 4 bits."""
        codes, scales, group = linear.codes, linear.scales, linear.group
        order = torch.arange(codes.shape[1])
        if group is None:
            order = spread_order(linear.in_features)
        else:
            codes, scales = in_halves(codes), scales.bfloat16()
        shape = (linear.out_features, linear.in_features)
        return cls(
            shape, codes.contiguous().to(device), scales.contiguous().to(device), group,
            order.int().to(device),
        )  # fmt: skip

    @property
    def kind(self) -> tuple[object, ...]:
        """The properties that decide how fast it is to multiply."""
        return self.shape, self.group

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.order))

    def multiply(self, x: Tensor) -> Tensor:
        """The product of rounded activations and Wᵀ, by two launches and a sum.

        Args:
            x: [tokens, in], float32, bfloat16 or float16; at least 1 token.

        Returns:
            [tokens, out] of the dtype of x.
        """
        rows, columns = self.shape
        tokens, words = len(x), len(self.order) // GROUP
        q = torch.empty(tokens, words * GROUP, dtype=torch.int8, device=x.device)
        steps = torch.empty(tokens, words, dtype=torch.float32, device=x.device)
        tile = FEW if tokens <= FEW.tokens else MANY
        blocks = -(-rows // tile.rows)
        each, splits = divided(blocks, words) if tile is FEW else (words, 1)
        kind = x.dtype if splits == 1 else torch.float32
        parts = torch.empty(splits, tokens, rows, dtype=kind, device=x.device)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            rounded[tokens, -(-words // WORDS)](
                x.contiguous(), self.order, q, steps, columns, words, WORDS=WORDS
            )
            integer_product[blocks, splits, -(-tokens // tile.tokens)](
                q, steps, parts, self.codes, self.scales, rows, words, tokens, each,
                TOKENS=tile.tokens, ROWS=tile.rows,
                RUNS=0 if self.group is None else GROUP // min(self.group, GROUP),
                PLAIN=x.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return parts[0] if splits == 1 else parts.sum(0).to(x.dtype)

    def expanded(self, x: Tensor) -> Tensor:
        """The product of rounded activations and Wᵀ by torch, as `expanded_product`."""
        integers, steps = integers_of(x, shares_of(self.group))
        return expanded_product(integers, steps, self.codes, self.scales, x.dtype)
