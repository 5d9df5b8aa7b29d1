"""Attention of one token over long contexts: the kernels by cache, beside torch.

    python -m benchmarks.speed.long_contexts [--rounds 15]

One layer's attention of a token whose sequence fills the cache; heads / KV heads x width. Each
round goes over the caches of several layers, which together exceed the caches of the processor. The
least time of a layer. torch is `scaled_dot_product_attention` in bfloat16 on a cache laid out for
it. GB/s are those of keys and values in bf16 that the kernels read.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable

import torch
from benchmarks.hardware import heading, keep, markdown
from torch.nn.functional import scaled_dot_product_attention

from secateur.runtime.decode import KeyValueCache
from secateur.runtime.kernels.library import TYPES, CDecoder, CLayer, CToken
from secateur.runtime.kernels.matrix import kernels

MEASURES = ("src/secateur/runtime/kernels",)

SHAPES = ((9, 3, 64), (32, 4, 64), (32, 8, 128))
LENGTHS = (1900, 4096, 16384, 32768)
CACHES = {"bf16": torch.bfloat16, "int8": torch.int8}
LEAST_BYTES = 100e6


def by_kernels(
    shape: tuple[int, int, int], length: int, layers: int, dtype: torch.dtype
) -> Callable[[], float]:
    """Seconds of all layers."""
    heads, groups, head = shape
    sizes = {"slots": 1, "groups": groups, "capacity": length, "head": head}
    cache = KeyValueCache(dtype, windows=[0] * layers, **sizes)
    cache.tiles[0].random_(0, 60)  # small numbers in every type
    described = [
        CLayer(keys=keys, values=values, tiles=tiles)
        for keys, values, tiles in map(cache.place, range(layers))
    ]
    vectors = torch.randn(2 * (heads + groups), head)
    token = (CToken * 1)((0, length - 1))

    def once() -> float:
        started = time.perf_counter()
        for layer in described:
            decoder = CDecoder(
                layer=ctypes.pointer(layer), heads=heads, kv_heads=groups, head=head,
                cache_type=TYPES[dtype], epsilon=1e-6, attention_scale=head**-0.5,
            )  # fmt: skip
            kernels().sct_attention_alone(ctypes.byref(decoder), token, 0, 0, 1, vectors.data_ptr())
        return time.perf_counter() - started

    once.cache = cache  # type: ignore[attr-defined]
    return once


def by_torch(shape: tuple[int, int, int], length: int, layers: int) -> Callable[[], float]:
    """The same."""
    heads, groups, head = shape
    query = torch.randn(1, heads, 1, head, dtype=torch.bfloat16)
    caches = torch.randn(layers, 2, 1, groups, length, head).bfloat16()

    def once() -> float:
        started = time.perf_counter()
        for keys, values in caches:
            scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return time.perf_counter() - started

    return once


def timed(shape: tuple[int, int, int], length: int, rounds: int) -> list[dict[str, object]]:
    """One shape and length, with one thread and with two."""
    layers = max(2, int(LEAST_BYTES / (4 * length * shape[1] * shape[2])))
    ways = {name: by_kernels(shape, length, layers, dtype) for name, dtype in CACHES.items()}
    ways["torch"] = by_torch(shape, length, layers)
    rows = []
    for threads in (1, 2):
        kernels().sct_set_threads(threads)
        torch.set_num_threads(threads)
        with torch.inference_mode():
            taken = {name: min(way() for _ in range(rounds)) / layers for name, way in ways.items()}
        rows.append(
            {
                "shape": "{}/{} x {}".format(*shape), "keys": length, "threads": threads,
                **{f"{name}_us": 1e6 * seconds for name, seconds in taken.items()},
                "bf16_gb_per_second": 4e-9 * length * shape[1] * shape[2] / taken["bf16"],
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(heading())
    rows = [row for shape in SHAPES for n in LENGTHS for row in timed(shape, n, rounds)]
    keep("long-contexts", {"protocol": __doc__, "rounds": rounds}, rows)
    names = ("shape", "keys", "threads", "bf16_us", "int8_us", "torch_us", "bf16_gb_per_second")
    lines = [[f"{r[n]:.0f}" if isinstance(r[n], float) else str(r[n]) for n in names] for r in rows]
    print(markdown([n.replace("_", " ") for n in names], lines))


if __name__ == "__main__":
    main()
