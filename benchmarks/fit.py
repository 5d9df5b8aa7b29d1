"""`secateur fit` on SmolLM2-135M at several sizes, against single techniques at the same sizes.

    python benchmarks/fit.py --calibration c4.jsonl --text wiki.txt --work DIR [--sizes 60 75]

The levels are made once, with 43 windows of 512 tokens of the calibration text; 10 windows choose,
10 judge, and the first 16 windows of the text judge too (`wiki`). For each size the candidates are:
the winner; the best mix of levels that are only rounded; the best single level that fits, whatever
it is; and the best single level that is only rounded. Loss in nats above the dense model's. The
source is a 4-bit file (Q4_1), so its dense weights have only 16 values in a group of 32.
Every finished row is kept at once. Times are not compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from hardware import add, heading, markdown
from secateur.models.checkpoint import CheckpointReader
from secateur.models.sources import resolve
from secateur.progress import Silent
from secateur.recipes.calibration import CalibrationWindows
from secateur.recipes.fit import FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.workflows.compress.packable import find_matrices
from secateur.workflows.fit.bounds import other_bytes
from secateur.workflows.fit.course import evolution_of, new_search, single_within
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import PROBE
from secateur.workflows.fit.loss_meter import LossMeter
from secateur.workflows.prune.prepare import calibration_windows
from stored import known_rows

MIB = 2**20


def recipe_of(args: argparse.Namespace) -> FitRecipe:
    """The recipe that makes the levels."""
    return build_recipe(
        FitRecipe,
        {
            "model": "smollm2-135m", "max_size": "100MiB", "generations": args.generations,
            "calibration": {"source": str(args.calibration), "windows": 64, "sequence_length": 512},
        },
    )  # fmt: skip


def rows(args: argparse.Namespace) -> None:
    """Make the levels, then a row for each size."""
    recipe, source = recipe_of(args), resolve("smollm2-135m")
    reader = CheckpointReader(source.folder)
    matrices = find_matrices(reader, "int8", False)
    rest = other_bytes(reader, matrices)
    args.work.mkdir(parents=True, exist_ok=True)
    ground = Ground.prepared(recipe, source, reader, matrices, args.work, Silent())
    search = new_search(ground)
    singles = search.singles()
    search.survey(PROBE)
    options = CalibrationWindows(windows=16, sequence_length=512)
    wiki, _ = calibration_windows(str(args.text), options, source.folder, ground.target)
    texts = {"c4": ground.judged, "wiki": wiki}
    meters = {
        name: LossMeter.on(text, ground, search.names, search.levels, args.work / f"{name}.jsonl")
        for name, text in texts.items()
    }

    def kept(size: float, contender: str, candidate: Any) -> None:
        if candidate is None:
            return
        loss = {name: meter.rise(candidate) for name, meter in meters.items()}
        predicted = search.menu.predicted(candidate)
        cost = (rest + search.menu.total(candidate)) / MIB
        row = {"size": size, "contender": contender, "mib": cost, "predicted": predicted, **loss}
        add("fit", {"judged": "see benchmarks/fit.py"}, row)
        print(row, flush=True)

    for point in singles:
        if not known(0, point.name):
            kept(0, point.name, point.candidate)
    for size in args.sizes:
        if known(size, "winner"):
            continue
        began, budget = time.perf_counter(), size * MIB - rest
        quantized = search.menu.best(budget, search.allowed("quantize"))
        best = search.menu.best(budget)
        starts = [p.candidate for p in singles if p.cost <= budget]
        starts += [x for x in (best, quantized) if x is not None] + search.between(budget)
        winner = search.refined(starts, budget, lambda tokens: evolution_of(recipe, tokens))
        only = [p for p in singles if p.families == "quantize" or p.candidate[0] == 0]
        kept(size, "single, rounded", single_within(only, budget))
        kept(size, "single", single_within(singles, budget))
        kept(size, "mixed, rounded", quantized)
        kept(size, "mixed, by the survey", best)
        kept(size, "winner", winner.candidate)
        print(f"{size} MiB: {time.perf_counter() - began:.0f} s", flush=True)


def known(size: float, contender: str) -> bool:
    """Whether a row is there."""
    return any((r["size"], r["contender"]) == (size, contender) for r in known_rows("fit"))


def table() -> str:
    """As it stands in the documentation."""
    lines = [
        [f"{r['size'] or '':}", r["contender"], f"{r['mib']:.1f}", f"{r['wiki']:.3f}",
         f"{r['c4']:.3f}"]
        for r in sorted(known_rows("fit"), key=lambda r: (r["size"], r["mib"]))
    ]  # fmt: skip
    return markdown(["at most, MiB", "", "MiB", "loss, WikiText-2", "loss, C4"], lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[60, 75, 90, 120, 150])
    parser.add_argument("--generations", type=int, default=10)
    args = parser.parse_args()
    print(heading())
    with torch.no_grad():
        rows(args)
    print(table())


if __name__ == "__main__":
    main()
