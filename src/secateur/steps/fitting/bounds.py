"""The bounds of a fit: refused before any work if they cannot be kept, and checked at the end.

Speed and memory come from processes of their own, as in `secateur bench`: the packed winner and the
source as dense int8 take turns. The memory is that of a process with a short text, and the KV cache
of the rest of the context is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from secateur.errors import RecipeError
from secateur.evaluation.speed import Speed, take_turns
from secateur.models.counting import counted
from secateur.models.skeleton import build_skeleton
from secateur.recipes.compress import FitRecipe
from secateur.recipes.options import bytes_of
from secateur.reporting.fit import FitCheck, FitLoss
from secateur.steps.fitting.costs import MEMORY, SECONDS, SIZE, Costs
from secateur.steps.fitting.models import FitContext

OPTION_OF: Mapping[str, str] = {
    SIZE: "max_size",
    MEMORY: "max_inference_memory",
    SECONDS: "decode_speedup",
}
"""The option that bounds each kind of cost."""

NEAREST: Mapping[str, str] = {
    SIZE: "the smallest possible size is",
    MEMORY: "the smallest possible memory is",
    SECONDS: "the largest speed-up by the table of timed matrices is",
}

TIMING_ERROR = 0.05
"""How far a speed-up may be off when it is measured again; a bound is kept up to here."""

PROMPT_TOKENS, NEW_TOKENS, ROUNDS, MOST_SECONDS = 32, 16, 15, 90.0


def check_feasible(recipe: FitRecipe, costs: Costs, source: int) -> None:
    """Refuse a bound that no model can keep, and bounds that cannot be kept together.

    Args:
        recipe: gives the bounds.
        costs: of the model.
        source: bytes of the model's weight files.

    Raises:
        RecipeError: names the nearest bound that is possible.
    """
    bounded = [n for n, kind in enumerate(costs.kinds) if math.isfinite(kind.limit)]
    for alone in (True, False):
        for place in bounded:
            least = costs.least(place, alone=alone)
            if least is None or least > costs.kinds[place].limit:
                raise _impossible(recipe, costs, place, least, alone=alone)
    if bounded == [0] and recipe.max_loss_increase is None and costs.kinds[0].limit >= source:
        nearest = as_option(costs, SIZE, costs.least(0) or 0.0)
        raise RecipeError(
            f"the model has {source / 2**20:.1f}MiB, so it fits into {recipe.max_size} as it is",
            where="--max-size",
            remedy=f"leave it, or give a size from {nearest} on",
        )


def _impossible(
    recipe: FitRecipe, costs: Costs, place: int, least: float | None, *, alone: bool
) -> RecipeError:
    """The error for a bound that cannot be kept; `least` is the smallest cost that can."""
    name = costs.kinds[place].name
    bounds = [OPTION_OF[kind.name] for kind in costs.kinds if math.isfinite(kind.limit)]
    others = " and ".join(option for option in bounds if option != OPTION_OF[name])
    if least is None:
        return RecipeError(
            f"no model keeps {others} together", where=OPTION_OF[name], remedy="leave one out"
        )
    given = getattr(recipe, OPTION_OF[name])
    fault = {
        SIZE: f"no model fits into {given}",
        MEMORY: f"no model runs in {given} with {recipe.context_length} tokens of context",
        SECONDS: f"no model decodes {given} times as fast as dense int8 on this machine",
    }[name]
    nearest = f"{NEAREST[name]} {as_option(costs, name, least)}"
    return RecipeError(
        fault + ("" if alone else f" with this {others}"),
        where=OPTION_OF[name],
        remedy=f"{nearest}; or cut the model first with `secateur structure`",
    )


def as_option(costs: Costs, name: str, value: float) -> str:
    """A cost in the form of the option that bounds it, rounded to the side that can be kept."""
    if name == SECONDS:
        return f"{math.floor(100 * costs.table.base / value) / 100:g}"
    unit, size = ("KiB", 2**10) if value < 2**20 else ("MiB", 2**20)
    return f"{math.ceil(10 * value / size) / 10:.1f}{unit}"


def check_bounds(
    context: FitContext, made: Path, file_bytes: int, loss: FitLoss
) -> tuple[FitCheck, ...]:
    """Compare every bound with what is measured.

    Args:
        context: of the fit.
        made: folder of the packed winner.
        file_bytes: of its weight files.
        loss: its loss on text that did not choose, measured on the packed winner as it runs.
    """
    recipe = context.recipe
    found = []
    if recipe.max_size is not None:
        most = bytes_of(recipe.max_size)
        found.append(FitCheck("max_size", most, file_bytes, file_bytes <= most))
    if recipe.max_loss_increase is not None:
        bound, rise, error = recipe.max_loss_increase, loss.loss_increase, loss.standard_error
        kept = rise <= bound
        found.append(FitCheck("max_loss_increase", bound, rise, kept, standard_error=error))
    if recipe.max_inference_memory is not None or recipe.decode_speedup is not None:
        found += check_running(context, made)
    return tuple(found)


def check_running(context: FitContext, made: Path) -> list[FitCheck]:
    """The bounds on speed and memory."""
    recipe, found = context.recipe, []
    ours, *others = race(context, made)
    failure = next((one.failure for one in (ours, *others) if one.failure), None)
    if recipe.decode_speedup is not None:
        wanted, speedup = recipe.decode_speedup, 0.0
        if failure is None:
            speedup = ours.tokens_per_second / others[0].tokens_per_second
        kept = speedup >= wanted * (1 - TIMING_ERROR)
        found.append(FitCheck("decode_speedup", wanted, speedup, kept, failure))
    if recipe.max_inference_memory is not None:
        most, held = bytes_of(recipe.max_inference_memory), 0
        if failure is None:
            shape = counted("", build_skeleton(made, trust_remote_code=recipe.trust_remote_code))
            grown = shape.held_bytes(recipe.context_length, "cpu")
            grown -= shape.held_bytes(PROMPT_TOKENS + NEW_TOKENS, "cpu")
            held = ours.resident_bytes + max(0, round(grown))
        kept = failure is None and held <= most
        found.append(FitCheck("max_inference_memory", most, held, kept, failure))
    return found


def speedup_of(context: FitContext, made: Path) -> float | None:
    """How many times as fast as dense int8 a packed winner decodes; None if it cannot be timed."""
    ours, dense = race(context, made)
    if ours.failure or dense.failure:
        return None
    return ours.tokens_per_second / dense.tokens_per_second


def race(context: FitContext, made: Path) -> list[Speed]:
    """The packed winner, and for a speed-up the source as dense int8, timed in turns.

    A model that our loop does not decode runs in transformers.
    """
    dense = [] if context.recipe.decode_speedup is None else [("dense int8", context.source.folder)]
    for backend in ("packed", "packed in transformers"):
        found = take_turns(
            [(backend, made), *dense],
            prompt=context.judging.windows.flatten()[:PROMPT_TOKENS].tolist(),
            new_tokens=NEW_TOKENS,
            rounds=ROUNDS,
            seconds=MOST_SECONDS,
            progress=context.progress,
        )
        if not found[0].failure:
            break
    return found
