"""Keys and values of beginnings that several prompts share, such as a system message."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

BLOCK_TOKENS = 32
"""Tokens are kept in blocks of this many. A shorter block finds more, and costs more to look up."""

Key = tuple[int, tuple[int, ...]]
"""The number of the block before this one, and the tokens of this one."""

START = 0
"""The number before the first block."""


class KnownBlock(NamedTuple):
    """Keys and values of some tokens after a known beginning."""

    number: int
    known: Tensor


class PrefixCache:
    """A tree of blocks of tokens, with a bound on its memory.

    A block is found by its tokens and all tokens before it, compared as they are, so two texts
    never share what they do not have in common. When memory is short, the block goes that was not
    used for the longest time. A block is used whenever one after it is, so the tree loses leaves
    only.

    Args:
        limit_bytes: of all keys and values together; 0 keeps nothing.

    Attributes:
        bytes: of all keys and values together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.blocks: OrderedDict[Key, KnownBlock] = OrderedDict()  # the longest unused first
        self.numbers = 0

    def walk(self, ids: Sequence[int]) -> Iterator[tuple[int, Key, KnownBlock | None]]:
        """Where each whole block begins, its key, and what is known of it; ends after the first
        unknown one.
        """
        number = START
        for begin in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = number, tuple(ids[begin : begin + BLOCK_TOKENS])
            block = self.blocks.get(key)
            yield begin, key, block
            if (block := self.blocks.get(key)) is None:
                return
            number = block.number

    def find(self, ids: Sequence[int]) -> list[Tensor]:
        """Keys and values of the longest known beginning, block by block.

        Args:
            ids: a prompt. Its last token is never part of what is found, because it has to be
                read for its logits.
        """
        path = [(key, block) for _, key, block in self.walk(ids[:-1]) if block is not None]
        self.use([key for key, _ in path])
        return [block.known for _, block in path]

    def add(self, ids: Sequence[int], copy: Callable[[int, int], Tensor]) -> None:
        """Keep the whole blocks of a text.

        Args:
            ids: the text.
            copy: gives keys and values of the positions from one number to another.
        """
        if self.limit_bytes == 0:
            return
        path: list[Key] = []
        for begin, key, block in self.walk(ids):
            path.append(key)
            if block is None:
                known = copy(begin, begin + BLOCK_TOKENS)
                self.numbers += 1
                self.blocks[key] = KnownBlock(self.numbers, known)
                self.bytes += known.nbytes
        self.use(path)
        while self.bytes > self.limit_bytes:
            _, block = self.blocks.popitem(last=False)
            self.bytes -= block.known.nbytes

    def use(self, path: Sequence[Key]) -> None:
        """Note that blocks are used, the last of a path first."""
        for key in reversed(path):
            self.blocks.move_to_end(key)
