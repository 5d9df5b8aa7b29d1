"""Measures the packed winner, and compares it with every bound.

Speed and memory come from processes of their own, as in `secateur bench`: the packed winner and the
source as dense int8 take turns. The memory is that of a process with a short text, and the KV cache
of the rest of the context is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.evaluation.speed import Speed, take_turns
from secateur.evaluation.tasks import PreparedTask
from secateur.models.skeleton import build_skeleton
from secateur.recipes.sizes import bytes_of
from secateur.reporting.results.fit import FitCheck, FitLoss
from secateur.workflows.advise import counted
from secateur.workflows.fit.accuracy import accuracy
from secateur.workflows.fit.ground import Ground

TIMING_ERROR = 0.05
"""How far a speed-up may be off when it is measured again; a bound is kept up to here."""

PROMPT_TOKENS, NEW_TOKENS, ROUNDS, MOST_SECONDS = 32, 16, 15, 90.0


def checks_of(
    ground: Ground, made: Path, file_bytes: int, loss: FitLoss, tasks: Sequence[PreparedTask]
) -> tuple[FitCheck, ...]:
    """Every bound beside what was measured.

    Args:
        ground: of the fit.
        made: folder of the packed winner.
        file_bytes: of its weight files.
        loss: its loss on text that did not choose, measured on the packed winner as it runs.
        tasks: for the accuracy; none if it has no bound.
    """
    recipe = ground.recipe
    found = []
    if recipe.max_size is not None:
        most = bytes_of(recipe.max_size)
        found.append(FitCheck("max_size", most, file_bytes, file_bytes <= most))
    if recipe.max_loss_increase is not None:
        bound, rise = recipe.max_loss_increase, loss.loss_increase
        error = loss.standard_error
        found.append(
            FitCheck("max_loss_increase", bound, rise, rise <= bound, standard_error=error)
        )
    if recipe.max_inference_memory is not None or recipe.decode_speedup is not None:
        found += checks_of_running(ground, made)
    if recipe.min_accuracy_kept is not None:
        found.append(check_of_accuracy(ground, made, recipe.min_accuracy_kept, tasks))
    return tuple(found)


def check_of_accuracy(
    ground: Ground, made: Path, least: float, tasks: Sequence[PreparedTask]
) -> FitCheck:
    """The accuracy that is kept."""
    recipe, progress = ground.recipe, ground.progress
    dense = accuracy(ground.reader.folder, tasks, recipe, progress, "dense")
    if not dense:
        failure = "the dense model answers none of the questions right"
        return FitCheck("min_accuracy_kept", least, 0.0, kept=False, failure=failure)
    kept = accuracy(made, tasks, recipe, progress, "winner") / dense
    return FitCheck("min_accuracy_kept", least, kept, kept >= least)


def checks_of_running(ground: Ground, made: Path) -> list[FitCheck]:
    """The bounds on speed and memory."""
    recipe, found = ground.recipe, []
    ours, *others = raced(ground, made)
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
            grown = shape.cache_bytes(recipe.context_length)
            grown -= shape.cache_bytes(PROMPT_TOKENS + NEW_TOKENS)
            held = ours.resident_bytes + max(0, round(grown))
        kept = failure is None and held <= most
        found.append(FitCheck("max_inference_memory", most, held, kept, failure))
    return found


def speedup_of(ground: Ground, made: Path) -> float | None:
    """How many times as fast as dense int8 a packed winner decodes; None if it cannot be timed."""
    ours, dense = raced(ground, made)
    if ours.failure or dense.failure:
        return None
    return ours.tokens_per_second / dense.tokens_per_second


def raced(ground: Ground, made: Path) -> list[Speed]:
    """The packed winner, and for a speed-up the source as dense int8, timed in turns.

    A model that our loop does not decode runs in transformers.
    """
    found = in_turns(ground, "packed", made)
    return in_turns(ground, "packed in transformers", made) if found[0].failure else found


def in_turns(ground: Ground, contender: str, made: Path) -> list[Speed]:
    """A contender on the packed winner, and dense int8 where a speed-up is bounded."""
    contenders = [(contender, made)]
    if ground.recipe.decode_speedup is not None:
        contenders.append(("dense int8", ground.reader.folder))
    return take_turns(
        contenders,
        prompt=ground.judged.flatten()[:PROMPT_TOKENS].tolist(),
        new_tokens=NEW_TOKENS,
        rounds=ROUNDS,
        seconds=MOST_SECONDS,
        progress=ground.progress,
    )
