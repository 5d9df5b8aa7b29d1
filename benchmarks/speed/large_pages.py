"""Seconds for a token with matrices in large pages, and as they were allocated.

    python -m benchmarks.speed.large_pages FOLDER ...

FOLDERs are compressed checkpoints (`int4_models.py --work WORK --only-make` makes some). Each is
loaded twice in one process, with `to_large_pages` and without. The two take turns: 24 tokens of one
sequence after a prompt of 64, medians of the tokens of all rounds, 2 MiB pages as Linux reports.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown

import secateur
from secateur.runtime import install
from secateur.runtime.decode import SlotDecoder, Token

MEASURES = ("src/secateur/runtime/kernels",)

PROMPT, TOKENS, ROUNDS = 64, 24, 7


def large_bytes() -> int:
    """Memory of this process in large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("AnonHugePages"))


def decoder_of(folder: Path, *, moved: bool) -> tuple[SlotDecoder, int]:
    """A decoder that has read a prompt, and how many bytes in large pages it added."""

    def stay(matrices: Iterable[Any]) -> None:
        """Move nothing."""

    own, before = install.to_large_pages, large_bytes()
    if not moved:
        install.to_large_pages = stay
    try:
        model = secateur.load(folder)
    finally:
        install.to_large_pages = own
    decoder = SlotDecoder(model, PROMPT + TOKENS)
    decoder.read(0, torch.arange(300, 300 + PROMPT))
    return decoder, large_bytes() - before


def seconds(decoder: SlotDecoder) -> list[float]:
    """Of each token of one round."""
    decoder.rewind(0, PROMPT)
    found = []
    for place in range(PROMPT, PROMPT + TOKENS):
        start = time.perf_counter()
        decoder.step([Token(0, place, 300 + place)])
        found.append(time.perf_counter() - start)
    return found


def measured(folder: Path) -> dict[str, Any]:
    """The row of one model."""
    both = [decoder_of(folder, moved=moved) for moved in (False, True)]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for mine, (decoder, _) in zip(times, both, strict=True):
            mine += seconds(decoder)
    as_allocated, large = (1e3 * statistics.median(each) for each in times)
    row = {"model": f"{folder.parent.name}, {folder.name}", "as allocated, ms": as_allocated}
    return {**row, "large pages, ms": large, "large, MiB": both[1][1] / 2**20}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()
    print(heading())
    rows = [measured(folder) for folder in args.folders]
    keep("large-pages", {"protocol": __doc__}, rows)
    lines = [[x if isinstance(x, str) else f"{x:.2f}" for x in row.values()] for row in rows]
    print(markdown([*rows[0]], lines))


if __name__ == "__main__":
    main()
