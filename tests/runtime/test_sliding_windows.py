"""The cache of a layer with a window: a ring of tiles gives the bits of a cache of all tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as t
from torch import Tensor
from with_kernels import needs_kernels
from zoo import CONFIGS, DENSE, MIXTURES, tiny_model

import secateur
from runtime.packed_models import packed_model, settled
from secateur.errors import ShapeError
from secateur.models.counting import counted
from secateur.models.shape import CHUNK_TOKENS, TILE, held_positions, memory_with
from secateur.recipes.deploy import Sampling
from secateur.runtime import decode as kv_cache
from secateur.runtime.decode import Decoder, KeyValueCache, SlotDecoder, Token, continued
from secateur.runtime.kernels import library as lib
from secateur.runtime.layer_forms import why_not
from secateur.runtime.speculative import Drafter, speculated

pytestmark = [needs_kernels, pytest.mark.usefixtures("settled")]
__all__ = ["settled"]

ROOM = 1500
WINDOWED = ("mistral", "gemma2", "gpt_oss", "cohere2", "olmo3", "phi3")


@contextmanager
def all_kept() -> Iterator[None]:
    """Caches made here keep every position of every layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "held_positions", lambda tokens, _: held_positions(tokens, None))
        yield


def model_of(folder: Path, family: str, window: int, **options: Any) -> Any:
    options = {"values": "int8", "head_dim": 16, "max_position_embeddings": ROOM, **options}
    return secateur.load(packed_model(folder, family, sliding_window=window, **options))


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed))


class Pair:
    """The same calls on a decoder with rings and on one that keeps all; the logits are compared."""

    def __init__(self, model: Any, slots: int, cache: str | None) -> None:
        self.ring = SlotDecoder(model, ROOM, slots, cache=cache)
        with all_kept():
            self.whole = SlotDecoder(model, ROOM, slots, cache=cache)
        assert self.ring.cache.nbytes < 0.7 * self.whole.cache.nbytes

    def read(self, slot: int, ids: Tensor) -> None:
        found = [x.read(slot, ids, every=True) for x in (self.ring, self.whole)]
        assert torch.equal(*found)

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> None:
        at, given = [*self.ring.lengths], []
        for slot, token in zip(slots, ids, strict=True):
            given.append(Token(slot, at[slot], token))
            at[slot] += 1
        assert torch.equal(self.ring.step(given), self.whole.step(given))

    def rewind(self, slot: int, length: int) -> None:
        for decoder in (self.ring, self.whole):
            decoder.rewind(slot, length)

    def move(self, slot: int, begin: int, other: int) -> None:
        """The last positions of a slot come from a copy, which another slot may have as well."""
        end = self.ring.lengths[slot]
        for decoder in (self.ring, self.whole):
            known = decoder.copy_out(slot, begin, end)
            assert known is not None
            decoder.rewind(slot, begin)
            decoder.copy_in(slot, known)
            if decoder.lengths[other] == begin:
                decoder.copy_in(other, known)


@pytest.mark.parametrize("cache", [None, "int8"])
@pytest.mark.parametrize(("family", "window"), [*((name, 8) for name in WINDOWED), ("gemma3", 70)])
def test_a_ring_changes_no_bit(family: str, window: int, cache: str | None) -> None:
    """Pieces, tokens of several texts in one call, texts that go back, copies, in any order."""
    drawn, slots = random.Random(window), 2
    model: Any = tiny_model(family, sliding_window=window, max_position_embeddings=ROOM)
    pair = Pair(model.to(torch.bfloat16), slots, cache)
    wrapped = 0
    for number in range(90):
        slot = drawn.randrange(slots)
        length = pair.ring.lengths[slot]
        kind = drawn.choice(["read", "read", "read", "step", "step", "back", "copy"])
        if kind == "read" and length < ROOM:
            most = min(ROOM - length, drawn.choice([5, 300, CHUNK_TOKENS + 90]))
            pair.read(slot, tokens(drawn.randint(1, most), number))
        elif kind == "step" and max(pair.ring.lengths) <= ROOM - 8:
            order = [drawn.randrange(slots) for _ in range(drawn.randint(1, 8))]
            pair.step(order, tokens(len(order), number).tolist())
        elif kind == "back":
            back = drawn.choice([1, 7, 100, CHUNK_TOKENS])
            pair.rewind(slot, pair.ring.kept(slot, max(0, length - back)))
        elif kind == "copy" and length == pair.ring.reached(slot) > 100:
            pair.move(slot, length - drawn.randint(1, 100), 1 - slot)
        wrapped += pair.ring.reached(slot) > held_positions(ROOM, window)
        if pair.ring.lengths[slot] > ROOM - 8:
            pair.rewind(slot, 0)
    assert wrapped > 15


def test_how_far_a_text_goes_back(tmp_path: Path) -> None:
    """A piece can always be taken back; what a window has lost is never used."""
    model = model_of(tmp_path, "gemma3", 70)
    for length in (300, 641, 1000, 1471):
        decoder = SlotDecoder(model, ROOM)
        decoder.read(0, tokens(length, 1))
        least = next(n for n in range(1, length + 1) if decoder.kept(0, n) == n)
        assert all(decoder.kept(0, n) == n for n in range(least, length + 1))
        room = held_positions(ROOM, 70)
        assert max(1, length - room) <= least <= max(1, length - CHUNK_TOKENS)
        if least > 1:
            with pytest.raises(ShapeError, match=f"token {least - 1}"):
                decoder.rewind(0, least - 1)
            assert decoder.copy_out(0, 0, 32) is None
        decoder.rewind(0, least)
        assert decoder.reached(0) == length  # going back in steps does not bring back what is lost
        assert decoder.kept(0, least - 1) == 0
        decoder.rewind(0)
        assert decoder.reached(0) == 0


def test_a_conversation_that_goes_far_back_is_read_again(tmp_path: Path) -> None:
    model = model_of(tmp_path, "mistral", 8)
    decoder = Decoder(model, ROOM, continues=True)
    text = tokens(1400, 1)
    decoder.prefill(text[:1300])
    for cut, known in ((1200, 1200), (900, 900), (100, 0), (90, 90)):
        prompt = torch.cat([text[:cut], tokens(40, cut)])
        prompt[cut] = 1  # where it differs for certain
        assert decoder.known(prompt.tolist()) == known
        assert torch.equal(decoder.prefill(prompt), Decoder(model, ROOM).prefill(prompt))


def test_a_text_with_a_draft_is_the_same_beyond_the_window(tmp_path: Path) -> None:
    """Parent and draft have rings, and the draft has other windows than the parent."""
    parent = model_of(tmp_path / "parent", "gemma3", 40)
    sizes = {"values": "int4", "group_size": 32, "sparsity": 0.1}
    draft = model_of(tmp_path / "draft", "gemma3", 9, **sizes)
    drafter = Drafter(SlotDecoder(draft, ROOM), 96)
    pace: Any = drafter.pace
    pace.awake, pace.value = (lambda: True), (lambda texts: float("inf"))
    decoder, greedy = Decoder(parent, ROOM, continues=True), Sampling(temperature=0.0)
    for ids in (tokens(700, 1), torch.cat([tokens(700, 1), tokens(60, 2)]), tokens(30, 1)):
        expected = [*continued(Decoder(parent, ROOM), ids, 200)]
        assert [*speculated(decoder, drafter, ids, 200, sampling=greedy)] == expected
    assert 0 < drafter.accepted < drafter.proposed


def test_the_longest_piece_is_that_of_the_kernels() -> None:
    header = Path(lib.__file__).with_name("csrc") / "secateur.h"
    (piece,) = re.findall(r"#define SCT_PIECE (\d+)", header.read_text(encoding="utf-8"))
    assert int(piece) == CHUNK_TOKENS


def long_gemma(layers: int = 12) -> Any:
    """Two of twelve layers see everything."""
    config = t.Gemma3TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, sliding_window=64,
    )  # fmt: skip
    return t.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_what_is_counted_is_what_is_held() -> None:
    model, context = long_gemma(), 8000
    shape = counted("", model)
    decoder = SlotDecoder(model, context)
    full = 2 * 2 * 4 * 64 * context * 2  # layers, keys and values, heads, columns, tokens, bytes
    ring = 10 * 2 * 4 * 64 * held_positions(context, 64) * 2
    assert decoder.cache.nbytes == full + ring == shape.held_bytes(context, "cpu")
    assert memory_with(0, shape, "cpu", 1, context).cache == decoder.cache.nbytes
    piece = 10 * 2 * 4 * 64 * (CHUNK_TOKENS + TILE) * 2
    assert 0 < decoder.cache.nbytes - shape.cache_bytes(context) <= piece
    assert memory_with(0, shape, "cuda", 1, context).cache == shape.cache_bytes(context)


def test_resident_memory_grows_with_the_text_to_what_is_counted() -> None:
    model, context, process = long_gemma(), 8000, psutil.Process()
    shape = counted("", model)
    Decoder(model, 600).prefill(tokens(600, 1))  # what a call takes besides is there
    before = process.memory_info().rss
    slots = SlotDecoder(model, context, 2)
    angles = process.memory_info().rss - before
    assert angles < 0.3 * slots.cache.nbytes / 2  # cosines and sines, and no cache
    for length in (640, 4000, 8000):
        slots.read(0, tokens(length - slots.lengths[0], length))
        grown = process.memory_info().rss - before - angles
        assert grown == pytest.approx(shape.held_bytes(length, "cpu"), rel=0.1, abs=3 * 2**20)


def test_every_family_of_the_loop_is_counted() -> None:
    """In columns of heads; a cache has 16 or a multiple of it."""
    found = []
    for family in sorted({*CONFIGS, *DENSE, *MIXTURES}):
        model: Any = tiny_model(family).to(torch.bfloat16)
        if why_not(model) is None:
            decoder, head = SlotDecoder(model, 100, 3), model.model.layers[0].self_attn.head_dim
            columns = 3 * counted("", model).held_bytes(100, "cpu") / head
            assert columns * decoder.cache.width == decoder.cache.nbytes, family
            found.append(family)
    assert len(found) > 35


def test_a_cache_is_zero_and_takes_memory_where_it_is_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    sizes = {"slots": 8, "groups": 4, "capacity": 4096, "head": 64}
    cache = KeyValueCache(torch.bfloat16, windows=[0] * 4, **sizes)
    assert cache.nbytes == 128 * 2**20
    assert process.memory_info().rss - before < 2**20
    assert not cache.tiles[0][:, :, 3].any()
