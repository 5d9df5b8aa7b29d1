"""What every linear, and the embeddings, lose in every format.

One pass through the dense model (`engine.search.allocation.ChangedAlone`) measures the divergence
that each linear makes alone, once rounded to 3 bits and once without half of its nonzero weights.
By these two,

    rise(values, s) = D_rounded · R(values) / R(int3) · (1 − s / 2)  +  D_pruned · exp(9 (s − 1/2))

where a fraction s of the nonzero weights is pruned; without pruning the second term is none. R is
the squared error of rounding to the nearest, of some rows of the matrix. The rises of all linears
add up (to second order errors of different linears are independent). 9 is the growth of the
allocation by divergence. With half of the weights pruned, rounding the others costs three quarters
(SmolLM2-135M, int4 and int3).

Embedding and head are rounded once, on the calibration text, and the model with them is measured.

What is predicted is the sum of what single linears lose. A model that is made has linears that make
up for each other, so it loses less, or more where much is lost. So the predictions are multiplied
by what the first model that was made lost, over what was predicted (`Predictions.scaled`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, partial
from math import exp
from typing import Any

from torch import Tensor

from secateur.calibration.windows import load_windows, stored_extra
from secateur.engine.prepared import prepare
from secateur.engine.prune.tasks import Settings
from secateur.engine.search.allocation import (
    ChangedAlone,
    LayerView,
    Survey,
    Ways,
    grains_of,
    pooled,
)
from secateur.engine.search.knapsack import Knapsack
from secateur.engine.stream.targets import CheckpointTarget
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import quantize_rows
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.methods_of import method_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runs.output import write_json
from secateur.runtime.formats import GRID_BITS
from secateur.runtime.storage_plan import MixedReader
from secateur.sparsity.allocation.divergence import ByDivergence
from secateur.steps.compress import head_gram, round_head
from secateur.steps.fitting.costs import Costs
from secateur.steps.fitting.models import FitContext, ModelEvaluator, paths, shared_options
from secateur.steps.fitting.storage_formats import EMBEDDINGS, GROUP, StorageFormat, embedded
from secateur.types import Weight

TOKENS = 4096
"""Tokens on which the divergences are measured."""

PROBE = "int3"
"""The values to which every linear is rounded once."""

HALF = 0.5

GROWTH = ByDivergence.growth

KEPT = 0.5
"""What zeros take off the cost of rounding, by their fraction."""

HEAD_WINDOWS = 16
"""Calibration windows on which embedding and head are rounded for the survey."""

SAMPLED = 2**14
"""Weights of a linear that say how much coarser one grid is than another."""


@dataclass(frozen=True)
class UnitLosses:
    """What the survey has measured.

    Attributes:
        rounded: the divergence of each linear rounded to `PROBE`, nats per token.
        pruned: of each linear with half of its nonzero weights.
        coarser: the squared error of each linear rounded to the nearest, over that of `PROBE`, by
            values.
        kept: the fraction of nonzeros of each linear, by the names of formats with zeros.
        embeddings: the divergence with embedding and head in these values.
    """

    rounded: dict[str, float]
    pruned: dict[str, float]
    coarser: dict[str, dict[str, float]]
    kept: dict[str, dict[str, float]]
    embeddings: dict[str, float]

    def rise(self, name: str, stored: StorageFormat, share: float) -> float:
        """What a unit adds to the divergence in a format that prunes a share of its weights."""
        if name == EMBEDDINGS:
            return self.embeddings[embedded(stored)]
        rounding = self.rounded[name] * self.coarser[name].get(stored.values, 0.0)
        pruning = self.pruned[name] * exp(GROWTH * (share - HALF)) if share else 0.0
        return rounding * (1 - KEPT * share) + pruning


@dataclass(frozen=True)
class Predictions:
    """The formats of every unit, what they cost and what they are predicted to lose.

    Attributes:
        losses: what was measured of single units.
        scale: by which they are multiplied.
    """

    losses: UnitLosses
    scale: float = 1.0

    def knapsack(self, costs: Costs) -> Knapsack:
        """The choice of a format for every unit of the model."""
        cost, rise = [], []
        for name in costs.units:
            kept = self.losses.kept.get(name, {})
            cost.append(tuple(costs.of(name, x, kept.get(x.name)) for x in costs.formats))
            rises = (self.losses.rise(name, x, costs.pruned(name, x)) for x in costs.formats)
            rise.append(tuple(self.scale * each for each in rises))
        return Knapsack(tuple(cost), tuple(rise))

    def scaled(self, made: float, predicted: float) -> Predictions:
        """The same after a model was made, and lost more or less than predicted."""
        return replace(self, scale=self.scale * made / predicted)


def survey_model(context: FitContext, evaluator: ModelEvaluator) -> Predictions:
    """Measure what every unit loses, unless an earlier run has."""
    file = context.work / "survey.json"
    if not file.exists():
        rounded, pruned = _divergences(context)
        coarser, kept = _sampled(context)
        write_json(
            file,
            {
                "rounded": rounded,
                "pruned": pruned,
                "coarser": coarser,
                "kept": kept,
                "embeddings": _of_embeddings(context, evaluator),
            },
        )
    return Predictions(UnitLosses(**json.loads(file.read_text(encoding="utf-8"))))


def _divergences(context: FitContext) -> tuple[dict[str, float], dict[str, float]]:
    """The divergence of every linear, rounded to the probe and without half of its weights."""
    zeros = context.costs.zeros
    recipe = build_recipe(PruneRecipe, {**_probe(context), "sparsity": HALF})
    prepared = prepare(recipe, context.source)
    pruning = prepared.method
    rounding, _ = method_of(build_recipe(PruneRecipe, {**_probe(context), **_rounding()}))
    tasks = prepared.tasks()
    settings = Settings.of(recipe, "disk", context.work / "survey")
    stream = settings.stream(prepared.target, prepared.tokens)
    survey = Survey(prepared.target, tasks, stream, settings, context.progress)
    part = ByDivergence(judged_tokens=TOKENS)
    grains = grains_of(tasks, part)

    def ways(view: LayerView) -> Ways:
        found: dict[str, dict[str, Tensor]] = {name: {} for name in view.weights}
        for way, method, share in (("pruned", pruning, HALF), ("rounded", rounding, 0.0)):
            for name, weight in view.weights.items():
                own = zeros.get(name, 0.0)
                solved = view.solved(name, method, own + (1 - own) * share)
                found[name][way] = solved - weight
        return found

    names = survey.statistics_for(part)
    alone = ChangedAlone(survey, TOKENS, names, grains, ways).divergences("surveying the layers")

    def of_linears(way: str) -> dict[str, float]:
        slopes = pooled({name: found[way] for name, found in alone.items()}, grains)
        return {name: slope * grains[name].total for name, slope in slopes.items()}

    return of_linears("rounded"), of_linears("pruned")


def _probe(context: FitContext) -> dict[str, Any]:
    """A run that prunes by SparseGPT; only its parts are used."""
    return {
        "effort": "fast",
        "method": "sparsegpt",
        "calibration": {"source": str(context.calibration_file)},
        **shared_options(context.recipe),
        **paths(context.recipe, context.source.folder, context.work / "survey"),
    }


def _rounding() -> dict[str, Any]:
    """What makes the probe round instead."""
    return {
        "method": None,
        "score": "kept",
        "solver": "obs",
        "scope": "layer",
        "sparsity": 0.0,
        "method_parameters": {"bits": GRID_BITS[PROBE], "group": GROUP, "descent": 0},
    }


def _sampled(
    context: FitContext,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What some rows of every linear say of grids: their errors, and the weights that stay nonzero.

    Zeros are those of the smallest weights of a row, or those that the linear has already.

    Returns:
        By linear: squared errors over that of the probe, by values; and the fraction of nonzeros,
        by the names of formats, for linears with zeros.
    """
    coarser, kept = {}, dict[str, dict[str, float]]()
    model, costs, progress = context.model, context.costs, context.progress
    progress.start("rounding samples", len(model.linears))
    for linear, name in model.linears.items():
        weight = model.reader.read(name).float()
        weight = weight.t() if model.matrices[name].transposed else weight
        rows = weight[:: max(1, weight.numel() // SAMPLED)]
        errors = {x: float((_nearest(rows, x) - rows).square().sum()) for x in GRIDS}
        coarser[linear] = {x: error / max(errors[PROBE], 1e-30) for x, error in errors.items()}
        order = rows.abs().argsort(dim=1).argsort(dim=1)
        kept[linear] = {}
        for one in costs.formats:
            if one.values in GRIDS and (one.sparsity or linear in costs.zeros):
                pruned = round(one.sparsity * rows.shape[1]) if costs.pruned(linear, one) else 0
                nonzeros = _nearest(rows * (order >= pruned), one.values).count_nonzero()
                kept[linear][one.name] = float(nonzeros) / rows.numel()
        progress.step(note=linear)
    progress.finish()
    return coarser, kept


GRIDS = ("int8", *GRID_BITS)


def _nearest(weight: Weight, values: str) -> Weight:
    """A matrix [out, in], rounded to the nearest."""
    if values in GRID_BITS:
        grid = GroupGrid(GRID_BITS[values], GROUP)
        return grid.dequantize(*grid.quantize(weight))
    codes, scale = quantize_rows(weight)
    return codes.float() * scale[:, None]


def _of_embeddings(context: FitContext, evaluator: ModelEvaluator) -> dict[str, float]:
    """The divergence with embedding and head in each of their values."""
    found = {"int8": 0.0}
    windows = load_windows(context.calibration_file)
    windows = windows[: min(HEAD_WINDOWS, len(windows) - stored_extra(context.calibration_file))]
    gram_of = cache(partial(head_gram, context.target, windows, context.progress))
    for values in sorted({embedded(stored) for stored in context.costs.formats} - found.keys()):
        options = {
            "values": values,
            "embeddings": values,
            "group_size": GROUP,
            **shared_options(context.recipe),
        }
        own = paths(context.recipe, context.source.folder, context.work / "embeddings")
        recipe = build_recipe(CompressRecipe, {**options, **own})
        folder = context.work / f"head-{values}"
        readers = round_head(recipe, context.target, gram_of, folder, context.progress)
        reader = MixedReader.of(context.model.reader, readers)
        trust = context.recipe.trust_remote_code
        target = CheckpointTarget(reader, None, context.target.device, trust_remote_code=trust)
        found[values] = max(evaluator.of_target(target, f"embeddings {values}"), 0.0)
    return found
