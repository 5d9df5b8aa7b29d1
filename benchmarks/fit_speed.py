"""`secateur fit --decode-speedup` on SmolLM2-135M, and the speed-up measured again.

    python benchmarks/fit_speed.py --calibration c4.jsonl --levels DIR --work DIR [--speedups 1.5 2]

The levels are those of `benchmarks/fit.py` (its `--work`): made with 43 windows of 512 tokens of
the calibration text; 10 windows choose. For each speed-up over dense int8 there is a search with
this budget alone; the winner is packed, and timed three times beside dense int8 by the processes of
`secateur bench`. Rows hold the prediction of the table, the three measurements, and the divergence
from the dense model on the windows that choose. A speed-up that no level reaches has no search: its
row holds what the refusal says.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from hardware import add, heading
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.sources import resolve
from secateur.progress import Silent
from secateur.recipes.fit import FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.runs.folder import RunFolder
from secateur.workflows.compress.packable import find_matrices
from secateur.workflows.fit.costs import costs_of
from secateur.workflows.fit.course import contested, new_search
from secateur.workflows.fit.feasible import check_feasible
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import probe_of
from secateur.workflows.fit.pace import Pace
from secateur.workflows.fit.packing import pack_winner
from secateur.workflows.fit.verify import raced
from stored import known_rows

MEASUREMENTS = 3


def recipe_of(args: argparse.Namespace, speedup: float, output: Path) -> FitRecipe:
    """The recipe of one fit."""
    return build_recipe(
        FitRecipe,
        {
            "model": "smollm2-135m", "output": str(output), "decode_speedup": speedup,
            "generations": args.generations, "structure": False,
            "calibration": {"source": str(args.calibration), "windows": 64, "sequence_length": 512},
        },
    )  # fmt: skip


def row_of(args: argparse.Namespace, speedup: float) -> dict[str, Any]:
    """Search, pack and measure."""
    output = args.work / f"speedup-{speedup:g}"
    recipe, source = recipe_of(args, speedup, output), resolve("smollm2-135m")
    reader = CheckpointReader(source.folder)
    matrices = find_matrices(reader, "int8", False)
    costs = costs_of(recipe, reader, matrices, Silent())
    assert costs.times is not None
    row: dict[str, Any] = {"asked": speedup, "table": costs.times.measured}
    try:
        check_feasible(recipe, costs, 10**9)
    except RecipeError as error:
        return {**row, "refused": f"{error.what}; {error.remedy}"}
    pace = Pace(args.minutes, args.work / "pace.json", time.perf_counter())
    ground = Ground.prepared(recipe, source, reader, matrices, costs, pace, args.work, Silent())
    search = new_search(ground)
    singles = search.singles()
    search.survey(probe_of(costs.levels))
    contest, _ = contested(ground, search, singles, (), costs)
    winner = min(contest, key=lambda one: one.told.divergence)
    linears = sum(costs.of(name, kind)[-1] for name, kind in winner.kinds.items())
    folder = RunFolder(str(output), "fit", overwrite=True, restart=True)
    with folder:
        folder.begin({})
        packed = pack_winner(folder, ground, winner, time.perf_counter())
        measured = []
        for _ in range(MEASUREMENTS):
            ours, dense = raced(ground, folder.model)
            measured.append(ours.tokens_per_second / dense.tokens_per_second)
        folder.finish()
    kinds = [kind.name for kind in winner.kinds.values()]
    return {
        **row,
        "winner": winner.told.name,
        "predicted": costs.times.base / (costs.rest[-1] + linears),
        "measured": measured,
        "mib": packed.file_bytes / 2**20,
        "divergence": winner.told.divergence,
        "linears": {name: kinds.count(name) for name in dict.fromkeys(kinds)},
        "dropped": pace.dropped,
        "each_alone": {
            point.name: costs.times.base / (costs.rest[-1] + point.cost[-1]) for point in singles
        },
    }


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--levels", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=None, help="for each search")
    args = parser.parse_args()
    print(heading())
    if not args.work.exists():
        shutil.copytree(args.levels, args.work)
    with torch.no_grad():
        for speedup in args.speedups:
            if speedup not in [row["asked"] for row in known_rows("fit_speed")]:
                row = row_of(args, speedup)
                add("fit_speed", {"protocol": __doc__}, row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
