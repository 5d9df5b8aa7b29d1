"""A weight matrix in the form that the kernels read.

| part      | bitmask                                   | dense                                |
|-----------|-------------------------------------------|--------------------------------------|
| `values`  | kept weights, row by row                  | all weights [out, words · 64]        |
| `mask`    | bits [out, words · 64], 1 = kept          | none                                 |
| `offsets` | where each row's values begin [out + 1]   | none                                 |
| `scale`   | float32 [out] where values are int8       | the same                             |

words = ⌈in / 64⌉; entries past `in` are zero. Weights of 2 to 4 bits have two rows to a byte, an
order of columns of their own, and `scales` of groups instead of `scale`. Kernels may
read 64 bytes past the end of the values, so that they can load whole registers. All padding happens
here, when a matrix is loaded; files have none. A dense weight whose rows are already whole words is
used without a copy.

`csrc/secateur.h` defines the order of weights of 4 bits. Two rows share bytes: the lower four bits
of a byte are a weight of the even row, the upper four one of the odd row. Columns are in another
order than in the file. A block of k words of 64 columns is
16 runs of 4k columns; word j of the block holds columns 4j to 4j + 3 of every run.

The memory of a matrix:

    dense     rows · words · 64 · b / 8
    bitmask   nonzeros · b / 8 + rows · words · 8 + 8 · (rows + 1)

With int8, 4 · rows are added for scales. b is the bits of a value. With int4 (and int3 and int2,
which take as much in memory) two rows share a mask, an offset, and a byte for each column that
either keeps; each group of a row adds a byte, and each row one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from secateur.errors import KernelError, ShapeError
from secateur.machine import LARGE_PAGE, ask_for_large_pages, trim
from secateur.quantization.groups import GroupGrid, Scales
from secateur.runtime.formats import GRID_BITS, VALUES
from secateur.runtime.kernels import library
from secateur.runtime.kernels.library import TYPES, CMatrix, address
from secateur.types import Mask

WORD = 64
"""Weights for each word of the mask; rows are padded to whole words."""

READ_AHEAD_BYTES = 64
SCALES_AHEAD_BYTES = 16
_BITS_SET = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


class KernelMatrix:
    """A weight [out, in] on the CPU, ready for kernels.

    Args:
        values: kept weights [nonzeros] with a bitmask, otherwise the dense weight [out, in];
            float32, bfloat16, float16 or int8.
        bitmask: uint8 [out, ⌈in / 8⌉], bit j of a row little end first; None if dense.
        scale: float32 [out], for int8: W = scale · values.
        columns: in; needed with a bitmask.

    Raises:
        ShapeError: the parts do not fit each other.
    """

    def __init__(
        self,
        values: Tensor,
        *,
        bitmask: Tensor | None = None,
        scale: Tensor | None = None,
        columns: int | None = None,
    ) -> None:
        self.dtype = values.dtype
        self.rows = values.shape[0] if bitmask is None else bitmask.shape[0]
        self.columns = values.shape[1] if columns is None else columns
        self.scale = None if scale is None else scale.float().contiguous()
        self.group: int | None = None
        self.scales: Scales | None = None
        self.mask: Tensor | None = None
        self.offsets: Tensor | None = None
        self.of_four = 0
        self.nonzeros = self.rows * self.columns
        if bitmask is None and self.columns % WORD == 0:
            self.values = values.contiguous().view(-1)
        elif bitmask is None:
            self.values = _padded(values, self.rows, self.words * WORD)
        else:
            self.mask = torch.zeros(self.rows, self.words * WORD // 8, dtype=torch.uint8)
            self.mask[:, : bitmask.shape[1]] = bitmask
            # a table of the bits of a byte: torch has no count of bits
            counts = _BITS_SET[self.mask.int()].view(self.rows, -1).sum(1, dtype=torch.int64)
            self.offsets = torch.zeros(self.rows + 1, dtype=torch.int64)
            torch.cumsum(counts, 0, out=self.offsets[1:])
            self.nonzeros = int(self.offsets[-1])
            if self.nonzeros != values.numel():
                raise ShapeError(f"{values.numel()} values for {self.nonzeros} bits of a mask")
            self.values = _padded(values.view(1, -1), 1, values.numel())
        self.describe(TYPES[self.dtype])

    @classmethod
    def of_codes(
        cls, codes: Tensor, scales: Scales, group: int, kept: Mask | None = None
    ) -> KernelMatrix:
        """A matrix of 2, 3 or 4 bits, W = s · q; each takes 4 bits in memory.

        Args:
            codes: q, int8 [out, in], −8 to 7.
            scales: s, one for each group of a row.
            group: how many weights share a scale: 32, 64 or 128.
            kept: which weights to store, bool [out, in]; None stores all of them.
        """
        rows, columns = codes.shape
        groups = GroupGrid(4, group).groups(columns)
        self = cls.__new__(cls)
        self.dtype, self.rows, self.columns = torch.bfloat16, rows, columns
        self.scale, self.group = None, group
        self.mask = self.offsets = None
        self.nonzeros, self.of_four = rows * columns if kept is None else int(kept.sum()), 0
        if kept is None:
            self.values = _dense_codes(codes, group)
        elif _two_of_four_is_smaller(kept):
            self.values, self.of_four = _two_of_four_codes(codes, kept, group), 2
        else:
            self.values, self.mask, self.offsets = _bitmask_codes(codes, kept, group)
        # a pair of rows always has two codes and exponents, and kernels load 16 codes at once
        even = rows + rows % 2
        code = torch.zeros(even * groups + SCALES_AHEAD_BYTES, dtype=torch.uint8)
        code = code[: rows * groups].view(rows, groups)  # what is beyond stays in memory
        exponent = torch.zeros(even, dtype=torch.int8)[:rows]
        self.scales = Scales(exponent.copy_(scales.exponent), code.copy_(scales.code))
        self.describe(library.INT4)
        return self

    def describe(self, number: int) -> None:
        """Make the description for C, with the number of the type of the values."""
        self.c = CMatrix(
            self.rows,
            self.columns,
            self.words,
            _two_of_four_bytes(self.words) if self.of_four else self.words * WORD,
            number,
            address(self.values),
            address(self.mask),
            address(self.offsets),
            address(self.scale),
            self.group or 0,
            None if self.scales is None else address(self.scales.code),
            None if self.scales is None else address(self.scales.exponent),
            self.of_four,
        )
        self.pointer = ctypes.addressof(self.c)

    def move(self, place: Callable[[Tensor], Tensor]) -> None:
        """Put all parts in other memory, of which the kernels may read 64 bytes more."""
        self.values = place(self.values)
        self.mask, self.offsets, self.scale = (
            None if part is None else place(part) for part in (self.mask, self.offsets, self.scale)
        )
        if self.scales is not None:
            self.scales = Scales(place(self.scales.exponent), place(self.scales.code))
        self.describe(self.c.type)

    def rows_between(self, begin: int, end: int) -> CMatrix:
        """The description of some rows, for C; this matrix must outlive it.

        Args:
            begin: the first row; even for int4, whose rows come in pairs.
            end: the row after the last.
        """
        c, paired = CMatrix.from_buffer_copy(self.c), self.group is not None
        assert not (paired and begin % 2)
        c.rows = end - begin
        first = begin // 2 if paired else begin
        # the values of a mask are not moved: offsets count from the first row of the matrix
        if self.mask is None:
            c.values = self.values.data_ptr() + first * c.stride * self.values.element_size()
        else:
            assert self.offsets is not None
            c.mask = self.mask.data_ptr() + first * self.words * WORD // 8
            c.offsets = self.offsets.data_ptr() + 8 * first  # int64
        if self.scale is not None:
            c.scale = self.scale.data_ptr() + 4 * begin  # float32
        if self.scales is not None:
            c.scales = self.scales.code.data_ptr() + begin * self.scales.code.shape[1]
            c.exponents = self.scales.exponent.data_ptr() + begin
        return c

    def __deepcopy__(self, memo: object) -> KernelMatrix:
        """Return the matrix itself: copied models share their matrices, which never change."""
        return self

    @property
    def integers(self) -> bool:
        """Whether its values are integers, so that activations are rounded for every product."""
        return self.dtype == torch.int8 or self.group is not None

    @property
    def packed(self) -> bool:
        """Whether zeros are left out."""
        return self.mask is not None or self.of_four > 0

    @property
    def words(self) -> int:
        """Words of 64 columns in a row."""
        return _words_of(self.columns)

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        parts = [self.values, self.mask, self.offsets, self.scale]
        if self.scales is not None:
            parts += [self.scales.code, self.scales.exponent]
        return sum(part.nbytes for part in parts if part is not None)

    def multiply(self, x: Tensor) -> Tensor:
        """The product x · Wᵀ for at most 8 rows of x, by the kernels; see `product`."""
        return self.product(kernels().sct_linear, x, library.MAX_BATCH)

    def product(self, call: Callable[..., int], x: Tensor, most: int | None = None) -> Tensor:
        """The product x · Wᵀ, computed by C.

        Args:
            call: the function of the library.
            x: [batch, in], float32 or bfloat16. bfloat16 values with float32 x are computed in
                float32. With integer values, x is rounded to int8 with one scale per 64 entries.
            most: the most rows of x; None for any number.

        Returns:
            [batch, out] of the dtype of x.

        Raises:
            ShapeError: x does not fit the matrix, or is of another dtype.
            KernelError: there are no kernels here.
        """
        fits = x.ndim == 2 and x.shape[1] == self.columns and 1 <= len(x) <= (most or len(x))
        if not fits or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            raise ShapeError(
                f"x {list(x.shape)} of {x.dtype} on {x.device}, for rows of {self.columns} of "
                "float32 or bfloat16 on the cpu"
            )
        x = x.contiguous()
        y = torch.empty(len(x), self.rows, dtype=x.dtype)
        given = ctypes.byref(self.c), TYPES[x.dtype], x.data_ptr(), self.columns
        if call(*given, y.data_ptr(), self.rows, len(x)) != 0:
            raise _no_kernel()
        return y

    def tile(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) as a dense matrix [end − begin, in], for torch.

        int8 values come as bfloat16 integers without their scale, int4 values as bfloat16 with it.

        Args:
            begin: the first row.
            end: the row after the last.
        """
        if not 0 <= begin < end <= self.rows:
            raise ShapeError(f"rows {begin} to {end} of a matrix of {self.rows}")
        out = self.room(end - begin)
        if kernels().sct_expand(ctypes.byref(self.c), begin, end, out.data_ptr()) != 0:
            raise _no_kernel()
        return out[:, : self.columns]

    def gathered(self, rows: Tensor) -> Tensor:
        """Rows of a matrix of int4 as bfloat16 [count, in], which is exact.

        Args:
            rows: their numbers, int64 [count].

        Raises:
            ShapeError: there is no such row.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.rows:
            raise ShapeError(f"rows {rows.min()} to {rows.max()} of a matrix of {self.rows}")
        rows, out = rows.contiguous(), self.room(len(rows))
        given = ctypes.byref(self.c), rows.data_ptr(), len(rows), out.data_ptr()
        if kernels().sct_gather(*given) != 0:
            raise _no_kernel()
        return out[:, : self.columns].contiguous()

    def of_rows(self, rows: Tensor) -> KernelMatrix:
        """A matrix of some rows of this one, which has no mask.

        Args:
            rows: their numbers, int64 [count].
        """
        assert not self.packed
        if self.scales is not None and self.group is not None:
            scales = Scales(self.scales.exponent[rows], self.scales.code[rows])
            codes = GroupGrid(4, self.group).codes(self.gathered(rows), scales)
            return KernelMatrix.of_codes(codes, scales, self.group)
        width = self.words * WORD
        values = self.values[: self.rows * width].view(self.rows, width)[rows, : self.columns]
        return KernelMatrix(values, scale=None if self.scale is None else self.scale[rows])

    @property
    def weight(self) -> Tensor | None:
        """The dense weight [out, in] where it is stored as one, without a scale; else None."""
        if self.packed or self.scale is not None or self.group is not None:
            return None
        width = self.words * WORD
        return self.values[: self.rows * width].view(self.rows, width)[:, : self.columns]

    def dense(self, dtype: torch.dtype) -> KernelMatrix:
        """The same weights, stored with their zeros: integers as before, others in a dtype."""
        weight = self.tile(0, self.rows)
        if self.scales is not None and self.group is not None:
            codes = GroupGrid(4, self.group).codes(weight, self.scales)
            return KernelMatrix.of_codes(codes, self.scales, self.group)
        if self.scale is not None:
            return KernelMatrix(weight.to(torch.int8), scale=self.scale)
        return KernelMatrix(weight.to(dtype))

    def room(self, rows: int) -> Tensor:
        """Memory for a tile of so many rows."""
        dtype = torch.bfloat16 if self.dtype == torch.int8 else self.dtype
        return torch.empty(rows, self.words * WORD, dtype=dtype)


MOVED_BYTES = 64 * 2**20
"""Matrices that are moved at once; so much more memory is used meanwhile."""


def to_large_pages(matrices: Iterable[KernelMatrix]) -> None:
    """Move matrices next to each other, into large pages where the system has them.

    A token reads all of them, and with pages of 4 KiB a part of its time goes into finding pages.
    """
    waiting: list[KernelMatrix] = []
    # a tied head has the matrix of the embedding, which must move once
    for matrix in {id(m): m for m in matrices}.values():
        waiting.append(matrix)
        if sum(m.nbytes for m in waiting) >= MOVED_BYTES:
            _move_together(waiting)
            waiting = []
    _move_together(waiting)


def _move_together(matrices: list[KernelMatrix]) -> None:
    """Move some matrices, and return their old memory."""
    # each of at most six parts is filled up to a line of the cache; the start to a large page
    total = sum(m.nbytes + 6 * WORD for m in matrices) + LARGE_PAGE + READ_AHEAD_BYTES
    # empty: large pages must be asked for before the first byte is written
    memory = torch.empty(total, dtype=torch.uint8)
    at = -memory.data_ptr() % LARGE_PAGE
    ask_for_large_pages(memory.data_ptr() + at, total - at)

    def place(part: Tensor) -> Tensor:
        nonlocal at
        room = memory[at : at + part.nbytes].view(part.dtype).view(part.shape)
        at += -(-part.nbytes // WORD) * WORD
        return room.copy_(part)

    for matrix in matrices:
        matrix.move(place)
    trim()


def kernels() -> ctypes.CDLL:
    """The library, which has to be there.

    Raises:
        KernelError: it is not.
    """
    loaded = library.library()
    if loaded is None:
        raise _no_kernel()
    return loaded


def _no_kernel() -> KernelError:
    """What to raise when a kernel says no."""
    return KernelError(
        "no kernel for this processor, or memory ran out",
        remedy="secateur.kernel_info() reports the active tier",
    )


def _padded(values: Tensor, rows: int, width: int) -> Tensor:
    """Values [rows, ≤ width] in rows of `width`, zeros between, and room to read past the end."""
    # torch's memory ends with the tensor: a load of 64 bytes at the last value would leave it
    ahead = READ_AHEAD_BYTES // values.element_size()
    flat = torch.zeros(rows * width + ahead, dtype=values.dtype)
    flat[: rows * width].view(rows, width)[:, : values.shape[1]] = values
    return flat


LANES = 16
AT_ONCE = 2**22
"""Weights that are bytes at the same time."""


def _dense_codes(codes: Tensor, group: int) -> Tensor:
    """All codes of a matrix, int8 [out, in] from −8 to 7, as uint8 [pairs · words · 64].

    Zeros that kernels may read follow the bytes, here as in the other layouts.

    Args:
        codes: int8 [out, in].
        group: weights that share a scale.
    """
    pairs, width = -(-len(codes) // 2), _words_of(codes.shape[1]) * WORD
    values = torch.zeros(pairs * width + READ_AHEAD_BYTES, dtype=torch.uint8)
    for first, turned in _turned_rows(codes, group):
        both = _joined(turned).view(-1)
        values[first // 2 * width :][: both.numel()] = both
    return values


def _bitmask_codes(codes: Tensor, kept: Mask, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kept codes of a matrix.

    Args:
        codes: −8 to 7, int8 [out, in].
        kept: which of them to store, bool [out, in].
        group: weights that share a scale.

    Returns:
        A byte for each bit of the mask; the mask of what either row of a pair keeps, uint8
        [pairs · words · 8]; where the bytes of each pair begin, int64 [pairs + 1].
    """
    pairs = -(-len(codes) // 2)
    # The rows of a pair share a byte, so a column has one where either keeps it.
    either = kept[0::2].clone()
    either[: len(codes) // 2] |= kept[1::2]
    offsets = torch.zeros(pairs + 1, dtype=torch.int64)
    torch.cumsum(either.sum(1), 0, out=offsets[1:])
    del either  # as large as half of the codes
    values = torch.zeros(int(offsets[-1]) + READ_AHEAD_BYTES, dtype=torch.uint8)
    mask = torch.zeros(pairs, _words_of(codes.shape[1]) * WORD // 8, dtype=torch.uint8)
    for pair, turned, here in _turned_pairs(codes, kept, group):
        joined = _joined(turned * here).numpy()
        there = (here[0::2] | here[1::2]).numpy().view(np.bool_)
        bits = np.packbits(there, axis=1, bitorder="little")
        mask[pair : pair + len(bits)] = torch.from_numpy(bits)
        # numpy selects by a mask without an index of eight bytes for each byte
        begin, end = int(offsets[pair]), int(offsets[pair + len(bits)])
        values.numpy()[begin:end] = joined[there]
    return values, mask.view(-1), offsets


def _two_of_four_codes(codes: Tensor, kept: Mask, group: int) -> Tensor:
    """The kept codes of a matrix that keeps at most two of each four columns, with their places.

    Args:
        codes: −8 to 7, int8 [out, in].
        kept: which of them to store, bool [out, in].
        group: weights that share a scale.
    """
    pairs, words = -(-len(codes) // 2), _words_of(codes.shape[1])
    stride = _two_of_four_bytes(words)
    values = torch.zeros(pairs * stride + READ_AHEAD_BYTES, dtype=torch.uint8)
    rows_of_bytes = values[: pairs * stride].view(pairs, stride)
    for pair, turned, here in _turned_pairs(codes, kept, group):
        count = len(turned) // 2
        # the mask of each four columns as a number 0 to 15, and by it the places of two of them
        keeps = (here.view(-1, 4) * torch.tensor([1, 2, 4, 8], dtype=torch.int8)).sum(1)
        places = _TWO_PLACES[keeps]
        found = (turned * here).view(-1, 4).gather(1, places)
        weights = _joined(found.view(2 * count, -1)).view(count, words, LANES, 2)
        # two places of two bits: four bits for each four columns of a row
        near = (places[:, 0] | places[:, 1] << 2).view(count, 2, words, LANES).to(torch.uint8)
        parts, done = [], 0
        for each in (4, 2, 1):  # of the last words there are two, one, or two and one
            some = slice(done, done + (words - done) // each * each)
            done = some.stop
            parts.append(_with_places(weights[:, some], near[:, :, some], each))
        rows_of_bytes[pair : pair + count] = torch.cat(parts, 1)
    return values


_TWO_PLACES = torch.tensor(
    [
        ([i for i in range(4) if keeps >> i & 1] + [i for i in range(4) if not keeps >> i & 1])[:2]
        for keeps in range(16)
    ]
).sort(1)[0]
"""By the mask of four columns: two places that hold all it keeps, if it keeps at most two."""


def _with_places(weights: Tensor, near: Tensor, each: int) -> Tensor:
    """The bytes of some words that store two of four, as csrc/secateur.h says.

    Args:
        weights: uint8 [pairs, words, 16, 2].
        near: the two places of each lane, four bits, uint8 [pairs, 2, words, 16].
        each: words that are stored together: 4, 2 or 1.
    """
    pairs, count, together = len(weights), weights.shape[1] // each, min(each, 2)
    two = weights.reshape(pairs, count, each // together, together, LANES, 2).transpose(3, 4)
    places = near.reshape(pairs, 2, count, each // together, together, 8, 2)
    first, last = places[:, :, :, :, 0], places[:, :, :, :, -1]
    places = first if together == 1 else first | last << 4
    places = places.permute(0, 2, 4, 3, 1, 5)  # [pairs, count, 8, words / 2, row, lane]
    stored = (places.flatten(2), two.flatten(2))
    return torch.cat(stored, 2).flatten(1)


def _two_of_four_bytes(words: int) -> int:
    """Bytes of a pair of rows that stores two of each four columns."""
    # Weights take 32 bytes a word. Places take 16: 8 bytes for each word and row.
    # A lone word takes 32, because no second word shares the bytes of its places.
    return words // 4 * 192 + (words // 2 % 2) * 96 + words % 2 * 64


def _two_of_four_is_smaller(kept: Mask) -> bool:
    """Whether storing two of four is possible, smaller than a bitmask, and faster on this tier."""
    # only these tiers have a kernel for it that is as fast as that of the bitmask
    if library.kernel_info().tier not in ("amx", "avx512bf16", "avx512"):
        return False
    rows, columns = kept.shape
    # four strided sums of bytes; the last group of four may be short
    counts = torch.zeros(rows, -(-columns // 4), dtype=torch.uint8)
    for place in range(4):
        column = kept[:, place::4]
        counts[:, : column.shape[1]] += column
    if int(counts.max()) > 2:
        return False
    words = _words_of(columns)
    either = int(kept[: rows // 2 * 2].view(-1, 2, columns).any(1).sum())
    return _two_of_four_bytes(words) * (rows // 2) < either + rows // 2 * words * WORD // 8


def _joined(codes: Tensor) -> Tensor:
    """The bytes of pairs of rows: the even row in the lower four bits."""
    return ((codes[0::2] & 15) | (codes[1::2] << 4)).view(torch.uint8)


def _words_of(columns: int) -> int:
    """Words of 64 columns, the last one filled up."""
    return -(-columns // WORD)


def turned_fours(words: int, group: int) -> Tensor:
    """Which four columns, counted in fours, come in each place of a row; int64 [words · 16]."""
    # A block of k words is 16 runs of k fours. Word j takes the j-th four of every run. So each of
    # the 16 lanes of a register stays in one run, and a run is never longer than a group.
    found, at, block = [], 0, min(LANES, group // 4)
    while at < words:
        # the last words make blocks of smaller powers of two
        while block > words - at:
            block //= 2
        natural = torch.arange(block * LANES).view(LANES, block) + at * LANES
        found.append(natural.t().reshape(-1))
        at += block
    return torch.cat(found)


def _turned_rows(matrix: Tensor, group: int) -> Iterator[tuple[int, Tensor]]:
    """Some rows of bytes at a time, in the kernels' order of columns."""
    rows, columns = matrix.shape
    words = _words_of(columns)
    order = turned_fours(words, group)
    # in pairs of rows, so that a step never ends between two that share bytes
    step = 2 * max(1, AT_ONCE // (2 * words * WORD))
    for first in range(0, rows, step):
        part = matrix[first : first + step]
        filled = torch.zeros(len(part) + len(part) % 2, words * WORD, dtype=torch.int8)
        filled[: len(part), :columns] = part
        # four neighbouring bytes move together, so they are picked as one int32
        turned = filled.view(torch.int32).index_select(1, order)
        yield first, turned.view(torch.int8)


def _turned_pairs(codes: Tensor, kept: Mask, group: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some pairs of rows at a time: the number of the first pair, codes, and which are kept."""
    kept_bytes = _turned_rows(kept.view(torch.int8), group)
    for (first, turned), (_, here) in zip(_turned_rows(codes, group), kept_bytes, strict=True):
        yield first // 2, turned, here


def matrix_bytes(
    shape: tuple[int, int], values: str, sparsity: float = 0.0, group: int | None = None
) -> int:
    """Bytes of a matrix [out, in] in memory.

    In int4 a pair of rows has a byte for each column that either keeps. Zeros are taken to be
    independent; where rows keep the same columns, they need less.

    Args:
        shape: [out, in].
        values: a name in `VALUES`.
        sparsity: the fraction of zeros; 0 for a matrix without a bitmask.
        group: weights of a row that share a scale, for int4, int3 and int2.
    """
    rows, columns = shape
    words = _words_of(columns)
    paired = values in GRID_BITS
    bits = 4 if paired else VALUES[values].itemsize * 8
    # a byte of a pair is empty where both rows are
    empty = sparsity**2 if paired else sparsity
    nonzeros = rows * (columns - round(empty * columns)) if sparsity else rows * words * WORD
    total = nonzeros * bits // 8
    if sparsity:
        masks = -(-rows // 2) if paired else rows
        total += masks * words * WORD // 8 + 8 * (masks + 1)
    if values == "int8":
        total += 4 * rows
    if group is not None:
        total += rows * (GroupGrid(4, group).groups(columns) + 1)
    return total
