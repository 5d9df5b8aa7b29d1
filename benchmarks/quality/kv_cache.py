"""What a KV cache of bf16 or int8 loses.

    python -m benchmarks.quality.kv_cache MODEL --text FILE [--windows 4] [--tokens 1024]

MODEL computes in float32 and reads each window in one call, so every token looks at keys and values
as the cache keeps them, and nothing else differs. Perplexity, and mean KL divergence of the next
token from the prediction with a cache of float32.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from torch import Tensor

import secateur
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.decode import SlotDecoder

MEASURES = ("src/secateur/runtime/decode.py", "src/secateur/runtime/kernels/csrc/attention.c")
MINUTES = 3

CACHES = (None, "bf16", "int8")


def caches(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Bytes of a token, and what the cache loses."""
    lines = [
        [row["cache"], f"{row['bytes_per_token'] / 1e3:.1f} kB", f"{row['perplexity']:.2f}",
         f"{row['divergence']:.5f}"]
        for row in rows
    ]  # fmt: skip
    return ["cache", "for each token", "perplexity", "KL divergence from float32"], lines


TABLES = {"caches": caches}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    folder = resolve(args.model).folder
    text = args.text.read_text(encoding="utf-8")[: 8 * args.windows * args.tokens]
    ids = torch.tensor(load_tokenizer(folder)(text)["input_ids"])
    windows = ids[: args.windows * args.tokens].view(args.windows, args.tokens)
    model = secateur.load(folder, dtype=torch.float32)
    decoders = {name: SlotDecoder(model, args.tokens, cache=name) for name in CACHES}
    loss, divergence = dict.fromkeys(CACHES, 0.0), dict.fromkeys(CACHES, 0.0)
    for window in windows:
        expected: Tensor | None = None
        for name, decoder in decoders.items():
            decoder.rewind(0)
            found = decoder.read(0, window, every=True).log_softmax(-1)
            expected = found if expected is None else expected
            own = -found[:-1].gather(1, window[1:, None]).mean()
            loss[name] += float(own) / len(windows)
            apart = (expected.exp() * (expected - found)).sum(-1).mean()
            divergence[name] += float(apart) / len(windows)
    rows = [
        {
            "cache": name or "float32",
            "bytes_per_token": sum(x[:, :, 0, :, 0].nbytes for x in decoder.cache.tiles.values())
            / 64,
            "perplexity": math.exp(loss[name]),
            "divergence": divergence[name],
        }
        for name, decoder in decoders.items()
    ]
    keep("kv-cache", {"protocol": __doc__, "model": args.model, "windows": args.windows}, rows)
    print(heading())
    print(
        markdown(
            ["cache", "bytes a token", "perplexity", "KL"],
            [
                [str(r["cache"]), f"{r['bytes_per_token']:.0f}", f"{r['perplexity']:.4f}",
                 f"{r['divergence']:.6f}"]
                for r in rows
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
