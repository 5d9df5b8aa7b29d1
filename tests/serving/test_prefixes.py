"""The prefix cache against a plain table of all beginnings that were added."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.serving.scheduler import BLOCK_TOKENS, PrefixCache

N = BLOCK_TOKENS
BLOCK_BYTES = N * 4


def tensor_of(text: list[int], begin: int, end: int) -> torch.Tensor:
    """Stands for keys and values: they depend on all tokens up to the end of the block."""
    return torch.tensor([hash(tuple(text[: i + 1])) % 10**6 for i in range(begin, end)]).int()


def add(cache: PrefixCache, text: list[int]) -> None:
    cache.add(text, lambda begin, end: tensor_of(text, begin, end))


def block(kind: int, rest: int = 0) -> list[int]:
    return [kind, rest, *range(N - 2)]


TEXTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, N - 1)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.integers(1, 8))
def test_what_is_found_was_added_and_memory_is_bounded(texts, room: int) -> None:
    cache = PrefixCache(room * BLOCK_BYTES)
    known: set[tuple[int, ...]] = set()
    for kinds, extra in texts:
        text = [token for kind in kinds for token in block(kind)] + [77] * extra
        found = cache.find(text)
        assert len(found) * N < len(text)  # the last token is always read
        for number, tensor in enumerate(found):
            assert tuple(text[: (number + 1) * N]) in known
            assert torch.equal(tensor, tensor_of(text, number * N, (number + 1) * N))
        add(cache, text)
        known |= {tuple(text[:end]) for end in range(N, len(text) + 1, N)}
        assert cache.bytes <= room * BLOCK_BYTES
        assert cache.bytes == sum(b.known.nbytes for b in cache.blocks.values())
        whole = min(len(text) // N, room)
        assert len(cache.find([*text, 5])) >= whole  # what was added last is there
        numbers = {0, *(b.number for b in cache.blocks.values())}
        assert {before for before, _ in cache.blocks} <= numbers  # no block without its beginning


def test_the_longest_unused_goes_first() -> None:
    cache = PrefixCache(3 * BLOCK_BYTES)
    for kind in (1, 2, 3):
        add(cache, block(kind))
    assert cache.find([*block(1), 0])
    add(cache, block(4))
    assert [bool(cache.find([*block(kind), 0])) for kind in (1, 2, 3, 4)] == [
        True,
        False,
        True,
        True,
    ]


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    cache = PrefixCache(100 * BLOCK_BYTES)
    first, second = block(1) + block(9), block(2) + block(9)
    add(cache, first)
    add(cache, second)
    for text in (first, second):
        found = cache.find([*text, 0])
        assert torch.equal(torch.cat(found), tensor_of(text, 0, 2 * N))
    assert not torch.equal(cache.find([*first, 0])[1], cache.find([*second, 0])[1])


def test_no_memory_keeps_nothing_and_copies_nothing() -> None:
    cache = PrefixCache(0)
    cache.add(block(1), lambda begin, end: 1 / 0)  # type: ignore[arg-type, return-value]
    assert cache.find([*block(1), 0]) == []
