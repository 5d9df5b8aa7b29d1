"""A budget of time on SmolLM2-135M: what the search of `secateur fit` chooses, measured again.

    python benchmarks/fit_speed.py --calibration c4.jsonl --levels DIR --work DIR [--speedups 1.5 2]

The levels are those of `benchmarks/fit.py` (its `--work`): made with 43 windows of 512 tokens of
the calibration text. For each speed-up over dense int8, the mix with the least predicted loss
within this budget is packed from the levels, and timed beside dense int8 by the processes of
`secateur bench`. If it misses the speed-up, a mix for a tighter budget follows, as in the verb. The
last mix is timed three times more. Speed does not depend on the weights, so mixes are not made
whole. A speed-up that no level reaches has no mix: its row holds what the refusal says.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hardware import add, heading
from secateur.engine.search.stored_levels import FitSearch
from secateur.errors import RecipeError
from secateur.models.sources import resolve
from secateur.progress import Silent
from secateur.recipes.compress import CompressRecipe, FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.reporting.models import CompressResult
from secateur.runs.environment import Meter
from secateur.runs.folder import RunFolder
from secateur.runtime.storage_plan import ChosenValues, MixedReader, PackableCheckpoint
from secateur.sparsity.evolution import Candidate
from secateur.steps.compress import pack_into
from secateur.steps.fit import MOST, is_faster, make_search, misses
from secateur.steps.fitting.bounds import check_feasible, speedup_of
from secateur.steps.fitting.context import FitContext, TimeBudget
from secateur.steps.fitting.costs import Costs, costs_of
from secateur.steps.fitting.storage_formats import StorageFormat
from secateur.steps.runner import RunContext
from stored import known_rows

MEASUREMENTS = 3


def recipe_of(args: argparse.Namespace, speedup: float, output: Path) -> FitRecipe:
    """The recipe of one fit."""
    return build_recipe(
        FitRecipe,
        {
            "model": "smollm2-135m", "output": str(output), "decode_speedup": speedup,
            "structure": False,
            "calibration": {"source": str(args.calibration), "windows": 64, "sequence_length": 512},
        },
    )  # fmt: skip


def row_of(args: argparse.Namespace, speedup: float) -> dict[str, Any]:
    """Search, pack and measure."""
    output = args.work / f"speedup-{speedup:g}"
    recipe, source = recipe_of(args, speedup, output), resolve("smollm2-135m")
    model = PackableCheckpoint.open(source.folder)
    costs = costs_of(recipe, model, Silent())
    row: dict[str, Any] = {"asked": speedup, "table": costs.table.measured}
    try:
        check_feasible(recipe, costs, 10**9)
    except RecipeError as error:
        return {**row, "refused": f"{error.what}; {error.remedy}"}
    budget = TimeBudget(None, args.work / "pace.json", time.perf_counter())
    context = FitContext.prepare(recipe, source, model, costs, budget, args.work, Silent())
    search = make_search(context)
    search.survey(costs.levels.index(StorageFormat("int4", 0.5)))
    folder, rounds = RunFolder(str(output), "compress", overwrite=True, restart=True), []
    candidate, aimed = None, speedup
    with folder:
        folder.begin({})
        while len(rounds) <= MOST:
            found = search.knapsack.best(aimed_at(costs, aimed).aim)
            if found is None or found == candidate:
                break
            packed = packed_mix(context, search, found, folder)
            predicted = costs.table.base / (costs.rest[-1] + search.knapsack.total(found)[-1])
            measured = speedup_of(context, folder.model)
            assert measured is not None
            rounds.append({"aimed": aimed, "predicted": predicted, "measured": measured})
            if candidate is not None and not is_faster(measured, rounds[-2]["measured"]):
                packed = packed_mix(context, search, candidate, folder)
                break
            candidate = found
            if not misses(speedup, measured):
                break
            aimed = speedup * predicted / measured
        again = [speedup_of(context, folder.model) for _ in range(MEASUREMENTS)]
        folder.finish()
    assert candidate is not None
    kinds = [costs.levels[level].name for level in candidate]
    return {
        **row,
        "rounds": rounds,
        "measured": again,
        "mib": packed.file_bytes / 2**20,
        "predicted_divergence": search.knapsack.predicted(candidate),
        "linears": {name: kinds.count(name) for name in dict.fromkeys(kinds)},
    }


def aimed_at(costs: Costs, speedup: float) -> Costs:
    """The same costs with another bound on the time, not beyond what is possible."""
    place = len(costs.kinds) - 1
    least = costs.least(place) or 0.0
    return costs.limited(place, max(costs.table.base / speedup, least))


def packed_mix(
    context: FitContext, search: FitSearch, candidate: Candidate, folder: RunFolder
) -> CompressResult:
    """Pack a mix of levels."""
    levels = dict(zip(search.names, candidate, strict=True))
    stored = context.model.linears
    readers = {stored[n]: search.levels[level].reader for n, level in levels.items() if level}
    values = {stored[n]: context.costs.levels[level].values for n, level in levels.items()}
    ends = {"model": context.recipe.model, "output": context.recipe.output}
    recipe = build_recipe(CompressRecipe, {**ends, "values": "bfloat16", "embeddings": "int8"})
    mixed = replace(context.model, reader=MixedReader(context.source.folder, readers))
    run = RunContext(folder, context.source, Silent(), Meter.start())
    return pack_into(run, recipe, ChosenValues(mixed, values, {}))


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--levels", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
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
