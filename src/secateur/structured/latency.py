"""Finds the largest size of heads and neurons that meets a target in time.

Sizes are timed, not calculated, because time depends on the processor, its memory, and the dtype.
There are three passes. In each pass, a few sizes take turns with the uncut model. The next pass
searches between the largest size that met the target and the next larger size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secateur.errors import RecipeError
from secateur.recipes.structure import StructureRecipe
from secateur.runs.output import write_json
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.cut_plan import CutPlan, representative, uniform_cut
from secateur.structured.design import design

LATENCY = "latency.json"
"""The file of the measurements in the work folder. A resumed run reads it."""

FIRST = (0.85, 0.7, 0.5, 0.3, 0.1)
"""Fractions of heads and neurons to keep in the first pass."""

PASSES = 3

BETWEEN = 4
"""Sizes of each later pass: three passes distinguish fractions of 1 %."""

StepTimes = Callable[[Sequence[Any]], tuple[Sequence[float], int]]
"""Times a token of several skeletons in turns: seconds of each, and the tokens in the cache."""


@dataclass(frozen=True)
class Size:
    """A timed candidate.

    Attributes:
        kept: target fraction of the parameters of heads and neurons; whole units come as near as
            possible.
        groups: maximum number of KV groups in a layer.
        neurons: maximum number of FFN neurons in a layer.
        milliseconds: time of a token.
        milliseconds_uncut: time of a token in the uncut model, in the same turns.
    """

    kept: float
    groups: int
    neurons: int
    milliseconds: float
    milliseconds_uncut: float

    @property
    def left(self) -> float:
        """The fraction of the uncut model's time."""
        return self.milliseconds / self.milliseconds_uncut


@dataclass(frozen=True)
class SizeSearch:
    """The inputs for making and timing sizes.

    Attributes:
        plan: the plan of the other cuts.
        uncut: skeleton of the uncut model.
        narrowable: the model after the other cuts.
        multiple: the number of kept neurons is a multiple of this.
        times: measures the time of a token.
    """

    plan: CutPlan
    uncut: Any
    narrowable: Any
    multiple: int
    times: StepTimes

    @property
    def alone(self) -> bool:
        """Whether only heads and neurons are cut."""
        plan = self.plan
        others = plan.keep_experts, plan.keep_hidden, plan.keep_queries
        return not plan.drop_layers and others == (None, None, None)

    def timed(
        self, fractions: Sequence[float], known: Collection[Size] = ()
    ) -> tuple[list[Size], int]:
        """Time sizes, largest first, and each number of units once.

        Args:
            fractions: fractions of heads and neurons to keep. Sizes that whole units cannot make
                are skipped.
            known: sizes that are already timed; skipped too.

        Returns:
            The sizes, and how many tokens were in the cache.
        """
        before = {(size.groups, size.neurons) for size in known}
        made: dict[tuple[int, int], tuple[float, Any]] = {}
        for kept in fractions:
            try:
                cut = uniform_cut(
                    replace(self.plan, joint=1 - kept), self.narrowable, self.multiple
                )
            except RecipeError:  # the size is too small for whole units
                continue
            skeleton = design(self.narrowable, cut).skeleton
            sizes = sizes_of(skeleton)
            narrowed = self.plan.narrowed(sizes.layers)
            units = (
                max(sizes.groups[i] for i in narrowed),
                max(sizes.neurons[i] for i in narrowed),
            )
            if units not in before:
                made.setdefault(units, (kept, skeleton))
        if not made:
            return [], 0
        skeletons = [skeleton for _, skeleton in made.values()]
        (uncut, *seconds), context = self.times([self.uncut, *skeletons])
        return [
            Size(kept, *units, 1e3 * each, 1e3 * uncut)
            for (units, (kept, _)), each in zip(made.items(), seconds, strict=True)
        ], context


def find_latency(
    recipe: StructureRecipe,
    plan: CutPlan,
    model: Any,
    device: torch.device,
    times: StepTimes,
    kept: Path,
) -> dict[str, Any]:
    """Find the largest size that meets the target, and return all measurements.

    Args:
        recipe: recipe with a target in time.
        plan: the plan of the other cuts, with all heads and neurons.
        model: the uncut skeleton.
        device: where a token is timed.
        times: measures the time of a token.
        kept: file of the result; a stopped run may have written it.

    Returns:
        The record for the manifest; `joint` is the fraction of heads and neurons to remove.

    Raises:
        RecipeError: no size meets the target, or the other cuts alone meet it.
    """
    if kept.exists():
        measured: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return measured
    assert recipe.decode_latency is not None
    search = SizeSearch(
        plan,
        design(model, Cut()).skeleton,
        design(model, representative(plan)).skeleton,
        recipe.multiple,
        times,
    )
    best, sizes, context = _largest(search, recipe.decode_latency)
    found: dict[str, Any] = {
        "target": recipe.decode_latency,
        "joint": 1 - best.kept,
        "milliseconds_before": best.milliseconds_uncut,
        "milliseconds_after": best.milliseconds,
        "batch": 1,
        "context_tokens": context,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "candidates": [asdict(size) for size in sizes],
    }
    write_json(kept, found)
    return found


def _largest(search: SizeSearch, target: float) -> tuple[Size, list[Size], int]:
    """The largest size within the target, all timed sizes, and the length of the context."""
    sizes, context = search.timed(FIRST if search.alone else (1.0, *FIRST))
    within = [size for size in sizes if size.left <= target]
    if not within:
        raise _beyond_reach(target, sizes)
    best = within[0]
    if best.kept == 1:
        raise RecipeError(
            f"a token is to take {target:.0%} of its time; with all heads and neurons it takes "
            f"{best.left:.1%}",
            remedy="leave the target out, or choose a smaller one",
        )
    timed, above = list(sizes), next((s.kept for s in reversed(sizes) if s.kept > best.kept), 1.0)
    for _ in range(PASSES - 1):
        step = (above - best.kept) / (BETWEEN + 1)
        sizes, _ = search.timed([above - step * (i + 1) for i in range(BETWEEN)], timed)
        timed += sizes
        best = max((s for s in timed if s.left <= target), key=lambda size: size.kept)
        above = min((s.kept for s in timed if s.kept > best.kept), default=1.0)
    return best, sorted(timed, key=lambda size: -size.kept), context


def _beyond_reach(target: float, sizes: Sequence[Size]) -> RecipeError:
    """The error that no size meets the target. It names the smallest measured size."""
    if not sizes:
        return RecipeError(
            "heads and neurons cannot be cut to any size between a tenth and all of them",
            remedy="choose a smaller --multiple, or drop layers: --keep-layers",
        )
    least = sizes[-1]
    return RecipeError(
        f"a token is to take {target:.0%} of its time; with {least.groups} KV groups and "
        f"{least.neurons} neurons a layer, the smallest size measured, it takes {least.left:.1%} "
        f"({least.milliseconds:.2f} of {least.milliseconds_uncut:.2f} ms)",
        remedy="ask for more than that, or drop layers too: --keep-layers",
    )
