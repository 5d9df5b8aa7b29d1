"""What every linear, and the embeddings, lose in every format.

One pass through the dense model (`engine.search.sensitivity.ChangedAlone`) measures the divergence
that each linear makes alone, once rounded to 3 bits and once without half of its nonzero weights.
By these two,

    rise(values, s) = D_rounded · R(values) / R(int3) · (1 − s / 2)  +  D_pruned · exp(9 (s − 1/2))

where a fraction s of the nonzero weights is pruned; without pruning the second term is none. R is
the squared error of rounding to the nearest, of some rows of the matrix. 9 is the growth of the
allocation by divergence. With half of the weights pruned, rounding the others costs three quarters
(SmolLM2-135M, int4 and int3).

Embedding and head are rounded once, on the calibration text, and the model with them is measured.
For llama.cpp each of them is a matrix like the others: rounded alone to the nearest of one type,
measured, and R says what other types lose.
"""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from secateur.calibration.windows import load_windows, stored_extra
from secateur.engine.prepared import prepare
from secateur.engine.prune.tasks import Settings
from secateur.engine.rounded_head import head_gram, round_head
from secateur.engine.search.expert_divergence import TOKENS as OF_EXPERTS
from secateur.engine.search.expert_divergence import removals
from secateur.engine.search.sensitivity import ChangedAlone, Ways, pooled
from secateur.engine.search.survey import LayerView, Survey, grains_of
from secateur.models.checkpoint import CheckpointReader
from secateur.models.targets import CheckpointTarget
from secateur.progress import each_step
from secateur.quantization.blocks import BlockGrid
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import quantize_rows
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.methods_of import method_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runs.output import whole_folder, write_json
from secateur.runtime.formats import BLOCKS, GRID_BITS
from secateur.runtime.storage_plan import MixedReader
from secateur.sparsity.allocation.divergence import ByDivergence
from secateur.steps.fitting.bench import FitBench, shared_options
from secateur.steps.fitting.problem import EMBEDDINGS, GROUP, HALF, FitProblem, UnitLosses, embedded
from secateur.structured.choices import CutLosses, readers_of, without_units
from secateur.structured.cut import NEURONS
from secateur.types import FLOATS, Weight

TOKENS = 4096
"""Tokens on which the divergences are measured."""

PROBE = "int3"
"""The values to which every linear is rounded once."""

PROBE_OF_ENDS = "int4"
"""The values to which embedding and head are rounded for llama.cpp."""

GRIDS = ("int8", *GRID_BITS)

HEAD_WINDOWS = 16
"""Calibration windows on which embedding and head are rounded for the survey."""

SAMPLED = 2**14
"""Weights of a linear that say how much coarser one grid is than another."""


def survey_model(bench: FitBench) -> FitProblem:
    """Measure what every unit loses, unless an earlier run has."""
    file = bench.work / "survey.json"
    if not file.exists():
        rounded, pruned, cuts = _divergences(bench)
        coarser, kept = _sampled(bench)
        embeddings = _of_embeddings(bench) if EMBEDDINGS in bench.costs.units else {}
        if not embeddings:
            rounded |= _of_ends(bench)
        found = {"rounded": rounded, "pruned": pruned, "coarser": coarser, "kept": kept}
        write_json(file, {**found, "embeddings": embeddings, "cuts": vars(cuts)})
    read = json.loads(file.read_text(encoding="utf-8"))
    losses = UnitLosses(**{**read, "cuts": CutLosses(**read["cuts"])})
    return FitProblem(bench.costs, losses)


def _divergences(bench: FitBench) -> tuple[dict[str, float], dict[str, float], CutLosses]:
    """The divergence of every linear, rounded to the probe and without half of its weights; and
    what experts and neurons cost, where they may go.
    """
    zeros, prunes = bench.costs.zeros, any(one.sparsity for one in bench.costs.formats)
    probe = {
        **_named(bench, "survey"),
        "effort": "fast",
        "method": "sparsegpt",
        "calibration": {"source": str(bench.windows_file)},
    }
    # only the parts of these two runs are used
    recipe = build_recipe(PruneRecipe, {**probe, "sparsity": HALF})
    opened = prepare(recipe, bench.source)
    rounding, _ = method_of(build_recipe(PruneRecipe, {**probe, **ROUNDING}))
    tasks, settings = opened.tasks(), Settings.of(recipe, "disk", bench.work / "survey")
    stream = opened.stream(settings)
    survey = Survey(opened.target, tasks, stream, settings, bench.progress)
    part = ByDivergence(judged_tokens=TOKENS)
    grains, cut = grains_of(tasks, part), bench.recipe.structure
    readers = readers_of(opened.target.model, NEURONS) if cut else {}

    def ways(view: LayerView) -> Ways:
        found: dict[str, dict[str, Tensor]] = {name: {} for name in view.weights}
        pruning = [("pruned", opened.method, HALF)] if prunes else []
        for way, method, share in (*pruning, ("rounded", rounding, 0.0)):
            for name, weight in view.weights.items():
                own = zeros.get(name, 0.0)
                # zeros that are there stay, and a share of the others is pruned
                solved = view.solved(name, method, own + (1 - own) * share)
                found[name][way] = solved - weight
        for name, narrower in without_units(view, readers).items():
            found[name] |= narrower
        return found

    names, mixture = survey.statistics_for(part), opened.target.architecture.experts is not None
    tokens = OF_EXPERTS if cut and mixture else TOKENS
    alone = ChangedAlone(survey, tokens, names, grains, ways)
    if cut and mixture:
        alone.others = removals(alone.drawn)
    every = alone.divergences("surveying the layers")

    def of_linears(way: str) -> dict[str, float]:
        slopes = pooled({n: found[way] for n, found in every.items() if n in grains}, grains)
        return {name: slope * grains[name].total for name, slope in slopes.items()}

    rounded, pruned = of_linears("rounded"), of_linears("pruned") if prunes else {}
    return rounded, pruned, CutLosses.of(every)


ROUNDING: dict[str, Any] = {
    "method": None,
    "score": "kept",
    "solver": "obs",
    "scope": "layer",
    "sparsity": 0.0,
    "method_parameters": {"bits": GRID_BITS[PROBE], "group": GROUP, "descent": 0},
}
"""The options of a run that rounds to the probe instead of pruning."""


def _named(bench: FitBench, name: str) -> dict[str, Any]:
    """The options that all runs of the survey share; none of them writes its output."""
    own = {"model": str(bench.source.folder), "output": str(bench.work / name)}
    return {**bench.named, **shared_options(bench.recipe), **own}


def _sampled(bench: FitBench) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What some rows of every linear say of grids: their errors, and the weights that stay nonzero.

    Zeros are those of the smallest weights of a row, or those that the linear has already.

    Returns:
        By linear: squared errors over that of the probe, by values; and the fraction of nonzeros,
        by the names of formats, for linears with zeros. For llama.cpp also of embedding and head.
    """
    coarser, kept = {}, dict[str, dict[str, float]]()
    model, costs = bench.model, bench.costs
    units = {one: unit for unit, names in costs.members.items() for one in names}
    names = {n: model.linears.get(n, f"{n}.weight") for n in units if n != EMBEDDINGS}
    for linear in each_step(bench.progress, "rounding samples", names):
        weight = model.weight(names[linear])
        rows = weight[:: max(1, weight.numel() // SAMPLED)]
        offered = {one.values for one in costs.offered(units[linear])}
        probe = PROBE if linear in model.linears else PROBE_OF_ENDS
        errors = {
            x: float((_nearest(rows, x) - rows).square().sum())
            for x in {probe, *offered} - FLOATS.keys()
        }
        coarser[linear] = {x: error / max(errors[probe], 1e-30) for x, error in errors.items()}
        order = rows.abs().argsort(dim=1).argsort(dim=1)  # the rank of each weight in its row
        kept[linear] = {}
        for one in costs.formats:
            if one.values in GRIDS and (one.sparsity or linear in costs.zeros):
                pruned = round(one.sparsity * rows.shape[1]) if costs.pruned(linear, one) else 0
                nonzeros = _nearest(rows * (order >= pruned), one.values).count_nonzero()
                kept[linear][one.name] = float(nonzeros) / rows.numel()
    return coarser, kept


def _nearest(weight: Weight, values: str) -> Weight:
    """A matrix [out, in], rounded to the nearest."""
    if values in BLOCKS:
        return BlockGrid(values).quantize(weight).values
    if values in GRID_BITS:
        grid = GroupGrid(GRID_BITS[values], GROUP)
        return grid.dequantize(*grid.quantize(weight))
    codes, scale = quantize_rows(weight)
    return codes.float() * scale[:, None]


def _of_embeddings(bench: FitBench) -> dict[str, float]:
    """The divergence with embedding and head in each of their values."""
    found, target = {"int8": 0.0}, bench.target
    windows = load_windows(bench.windows_file)
    # the last ones only heal
    windows = windows[: min(HEAD_WINDOWS, len(windows) - stored_extra(bench.windows_file))]
    gram_of = cache(partial(head_gram, target, windows, bench.progress))
    for values in sorted({embedded(stored) for stored in bench.costs.formats} - found.keys()):
        own = {"values": values, "embeddings": values, "group_size": GROUP}
        recipe = build_recipe(CompressRecipe, {**own, **_named(bench, "embeddings")})
        folder = bench.work / f"head-{values}"
        readers = round_head(recipe, target, gram_of, folder, bench.progress)
        reader = MixedReader.of(bench.model.reader, readers)
        rounded = CheckpointTarget(reader, None, target.device)
        found[values] = max(bench.chosen.of(rounded, f"embeddings {values}"), 0.0)
    return found


def _of_ends(bench: FitBench) -> dict[str, float]:
    """The divergence with embedding or head rounded to the probe, alone, by their names."""
    found = dict[str, float]()
    for end in bench.costs.outer:
        name, folder = f"{end}.weight", bench.work / f"rounded-{end}"
        if not folder.exists():
            with whole_folder(folder) as unfinished:
                rounded = _nearest(bench.model.reader.read(name), PROBE_OF_ENDS).contiguous()
                save_file({name: rounded}, unfinished / "model.safetensors")
        reader = MixedReader.of(bench.model.reader, {name: CheckpointReader(folder)})
        target = bench.opened(reader)
        found[end] = max(bench.chosen.of(target, f"{end} {PROBE_OF_ENDS}"), 0.0)
    return found
