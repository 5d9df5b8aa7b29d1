"""Attention of the kernels over every kind of cache, beside a slow oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from with_kernels import needs_kernels

from oracles.attention import Attention
from runtime.attention_examples import CACHES, CAPACITY, a_text, oracle_of, rounding
from runtime.kernel_examples import TIERS, using
from secateur.runtime.decode import KeyValueCache
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels.library import TYPES, CDecoder, CLayer, CToken

pytestmark = needs_kernels

NORMS = ("head", "whole", "layer")
SLOTS = 3


class Layer:
    """One layer of the kernels, with its caches."""

    def __init__(self, oracle: Attention, dtype: torch.dtype, *, exact: bool = True) -> None:
        sizes = {"slots": SLOTS, "groups": oracle.groups, "head": oracle.head}
        self.cache = KeyValueCache(dtype, windows=[oracle.window], capacity=CAPACITY, **sizes)
        names = ("q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "cosine", "sine", "sinks")
        given = {name: getattr(oracle, name) for name in names}
        self.alive = {n: x.float().contiguous() for n, x in given.items() if x is not None}
        keys, values, tiles = self.cache.place(0)
        pointers = {name: x.data_ptr() for name, x in self.alive.items()}
        layer = CLayer(keys=keys, values=values, tiles=tiles, window=oracle.window, **pointers)
        self.c = CDecoder(
            layer=(CLayer * 1)(layer),
            heads=oracle.heads,
            kv_heads=oracle.groups,
            head=oracle.head,
            cache_type=TYPES[dtype],
            exact=int(exact),
            epsilon=oracle.epsilon,
            rotary=0 if oracle.cosine is None else 2 * oracle.cosine.shape[1],
            interleaved=int(oracle.interleaved),
            qk_norm=NORMS.index(oracle.norm or "head"),
            norm_rotated=int(oracle.norm_rotated),
            attention_scale=oracle.scale,
            softcap=oracle.softcap,
            clip=oracle.clip,
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, slot: int, first: int, places: Any = None
    ) -> Tensor:
        """Some tokens; `places` for single ones."""
        vectors = torch.cat([q, k, v, torch.zeros_like(q)], 1).contiguous()
        places = None if places is None else (CToken * len(q))(*places)
        loaded = lib.library()
        assert loaded is not None
        given = ctypes.byref(self.c), places, slot, first, len(q), vectors.data_ptr()
        assert loaded.sct_attention_alone(*given) == 0
        return vectors[:, -q.shape[1] :].double()


def read(layer: Layer, text: Sequence[Tensor], slot: int, prompt: int) -> Tensor:
    """A prompt in two pieces, then token by token."""
    q, k, v = text
    pieces, cut = [], prompt // 3
    for begin, end in ((0, cut), (cut, prompt)):
        if end > begin:
            pieces.append(layer(q[begin:end], k[begin:end], v[begin:end], slot, begin))
    for at in range(prompt, len(q)):
        one = slice(at, at + 1)
        pieces.append(layer(q[one], k[one], v[one], 0, 0, [(slot, at)]))
    return torch.cat(pieces)


SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "each head its keys": {"heads": 3, "groups": 3},
    "one group": {"heads": 7, "groups": 1, "head": 32},
    "wide": {"heads": 6, "groups": 2, "head": 80},
    "narrow heads": {"heads": 4, "groups": 2, "head": 8},
    "odd heads": {"heads": 5, "groups": 1, "head": 20},
    "window": {"window": 70},
    "narrow window": {"window": 1},
    "cap and sinks": {"softcap": 1.5, "sinks": True, "window": 100},
    "no positions": {"rotary": 0},
    "a part rotated": {"rotary": 6},
    "interleaved, biases, clip": {"interleaved": True, "biases": True, "clip": 1.0},
    "norm of heads": {"norm": "head", "biases": True},
    "norm of all": {"norm": "whole", "clip": 0.7},
    "layer norm": {"norm": "layer"},
    "norm after the rotation": {"norm": "head", "norm_rotated": True},
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("shape", [*SHAPES])
def test_every_kind(shape: str, dtype: torch.dtype, tier: str) -> None:
    oracle = oracle_of(**SHAPES[shape])
    text = a_text(oracle, 150)
    with using(tier):
        got = read(Layer(oracle, dtype), text, 1, 131)
    wanted = oracle(*text, rounding(dtype))
    close = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.int8: 4e-3}[dtype]
    torch.testing.assert_close(got, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", ["one group", "odd heads", "window", "cap and sinks"])
def test_models_of_bfloat16(shape: str, tier: str) -> None:
    """Queries and shares may be rounded to bfloat16 as well."""
    oracle = oracle_of(**SHAPES[shape])
    text = a_text(oracle, 150)
    with using(tier):
        got = read(Layer(oracle, torch.bfloat16, exact=False), text, 1, 131)
    wanted = oracle(*text, rounding(torch.bfloat16))
    assert float((got - wanted).norm() / wanted.norm()) < 6e-3


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", CACHES)
def test_ranges_of_keys(dtype: torch.dtype, tier: str) -> None:
    """Keys over several ranges; with any number of threads and neighbours the same bits."""
    oracle = oracle_of(heads=6, head=32, window=500, sinks=True)
    texts = [a_text(oracle, tokens, seed) for seed, tokens in enumerate((640, 300, 90))]
    loaded = lib.library()
    assert loaded is not None
    usual = loaded.sct_threads()
    with using(tier):
        layer = Layer(oracle, dtype, exact=dtype == torch.float32)
        for slot, (q, k, v) in enumerate(texts):
            layer(q[:-1], k[:-1], v[:-1], slot, 0)
        last = [torch.cat([text[i][-1:] for text in texts]) for i in range(3)]
        places = [(slot, len(q) - 1) for slot, (q, _, _) in enumerate(texts)]
        try:
            found = []
            for threads in (1, 2, 3):
                assert loaded.sct_set_threads(threads) == threads
                found.append(layer(*last, 0, 0, places))
        finally:
            loaded.sct_set_threads(usual)
        alone = [layer(*(x[i : i + 1] for x in last), 0, 0, places[i : i + 1]) for i in range(3)]
        prompts = [layer(*text, slot, 0)[-1:] for slot, text in enumerate(texts)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], torch.cat(alone))
    assert torch.equal(found[0], torch.cat(prompts))  # a prompt gives the same bits
    wanted = torch.stack([oracle(*text, rounding(dtype))[-1] for text in texts])
    apart = float((found[0] - wanted).norm() / wanted.norm())
    assert apart < (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("head", [16, 24, 32, 48, 80, 96, 112, 128])
@pytest.mark.parametrize("each", [1, 5])
def test_a_piece_rounds_like_single_tokens(
    each: int, head: int, dtype: torch.dtype, tier: str
) -> None:
    """However many rows and columns a product has: a prompt whole, in pieces, token by token."""
    oracle = oracle_of(heads=2 * each, groups=2, head=head)
    text = a_text(oracle, 90)
    with using(tier):
        for exact in (True, False):
            layer = Layer(oracle, dtype, exact=exact)
            whole = read(layer, text, 0, 90)
            for slot, prompt in ((1, 63), (2, 0)):
                assert torch.equal(read(layer, text, slot, prompt), whole)
            assert torch.equal(layer(*text, 1, 0), whole)


@pytest.mark.parametrize("dtype", CACHES)
def test_what_an_older_text_left_is_never_read(dtype: torch.dtype) -> None:
    oracle = oracle_of()
    text = a_text(oracle, 11)
    fresh, used = Layer(oracle, dtype), Layer(oracle, dtype)
    broken = [x * torch.nan for x in a_text(oracle, 70)]
    used(*broken, 1, 0)
    for prompt in (11, 6, 1):
        wanted = read(fresh, text, 1, prompt)
        assert torch.equal(read(used, text, 1, prompt), wanted)
        assert wanted.isfinite().all()


@pytest.mark.parametrize("dtype", CACHES)
def test_positions_are_copied(dtype: torch.dtype) -> None:
    oracle = oracle_of(head=20)
    q, k, v = a_text(oracle, 140)
    layer = Layer(oracle, dtype)
    wanted = read(layer, (q, k, v), 0, 140)[-1:]
    other = Layer(oracle, dtype)
    for begin, end in ((0, 3), (3, 66), (66, 139)):
        other.cache.put_rows(2, begin, layer.cache.rows(0, begin, end))
    got = other(q[-1:], k[-1:], v[-1:], 0, 0, [(2, 139)])
    alone = layer(q[-1:], k[-1:], v[-1:], 0, 0, [(0, 139)])
    assert torch.equal(got, alone)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    (written,), (given,) = other.cache.tiles.values(), layer.cache.tiles.values()
    assert torch.equal(written[:, :, 2], given[:, :, 0])


@pytest.mark.parametrize("dtype", CACHES)
def test_not_a_number_stays_one(dtype: torch.dtype) -> None:
    oracle = oracle_of()
    q, k, v = a_text(oracle, 9)
    v[4, 1, 3] = torch.nan
    out = read(Layer(oracle, dtype), (q, k, v), 0, 3)
    assert out[:4].isfinite().all()
    assert out[4:, 2:, 3].isnan().all()
