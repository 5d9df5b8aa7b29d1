"""Finds the largest cut with which a token takes at most a part of its time: `--decode-latency`.

A token is timed in transformers at batch 1. Sizes are timed, not calculated, because time depends
on the processor, its memory, and the dtype. There are three passes. In each pass, a few sizes take
turns with the uncut model. The next pass searches between the largest size that met the target and
the next larger size.

The layers that are timed are spread evenly (`random_models` says how those of the whole model
follow). The weights are random, with the right shapes and dtype.
All compared models are views of one memory. So memory holds only n layers of the largest model, and
the parts outside its layers. A model whose layers have less than `LAYER_BYTES` is timed whole.
Weights in the processor's caches are read faster, so the timed weights must be larger than the
caches.

The models take turns, so that other load on the machine affects all of them alike. Each time is a
median over all turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import StandIn, replaced_layers
from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.models.skeleton import assign, empty_cache, parameters_of, quiet_transformers
from secateur.progress import Progress
from secateur.recipes.structure import StructureRecipe
from secateur.runs.output import write_json
from secateur.runtime.random_models import LAYER_BYTES, RandomModel, TokenTime
from secateur.structured.cut import NEURONS, Cut, sizes_of
from secateur.structured.cut_plan import CutPlan, representative, uniform_cut
from secateur.structured.design import design
from secateur.timing import alternate

CONTEXT_TOKENS = 256
"""Tokens before the timed ones, if the model has that many positions."""

TURNS, STEPS = 5, 5
"""Turns of each model, and timed steps per turn; one more step before them warms the caches up."""


class Timed(NamedTuple):
    """The measured times.

    Attributes:
        seconds: seconds per token, one for each model.
        context_tokens: tokens in the KV cache before the first timed token.
    """

    seconds: tuple[float, ...]
    context_tokens: int


@torch.inference_mode()
def time_steps(
    models: Sequence[Any],
    device: torch.device,
    progress: Progress,
    *,
    layer_bytes: int = LAYER_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Time one decode step of several skeletons in turns. They do not change.

    Args:
        models: models with all their layers, parameters on the meta device.
        device: the device to time on.
        progress: receives every turn of a model.
        layer_bytes: bytes of decoder layers to time in the largest model; at least two layers run.
        clock: returns seconds.
    """
    largest = max(
        sum(p.numel() * p.itemsize for p in layer.parameters())
        for model in models
        for layer in describe(model).layers(model)
    )
    layers = max(2, layer_bytes // largest)
    shortened = [_first_of(model, layers) for model in models]
    fill(shortened, device)
    positions = getattr(models[0].config, "max_position_embeddings", None) or CONTEXT_TOKENS * 16
    # every step adds a token, and one without layers may follow the last turn
    context = max(1, min(CONTEXT_TOKENS, positions - TURNS * (STEPS + 1) - 1))
    with quiet_transformers():
        running = [
            _Running(short, len(describe(model).layers(model)), device, context, clock)
            for short, model in zip(shortened, models, strict=True)
        ]
        progress.start("timing sizes", TURNS * len(running))

        def turn(one: _Running) -> TokenTime:
            progress.step()
            return one.turn(STEPS, STEPS)

        times = alternate(running, turn, list, turns=TURNS)
        progress.finish()
    # the medians of each part of a token: outside, layers; there is no prompt
    seconds = [sum(map(statistics.median, zip(*turns, strict=True))) for turns in times]
    return Timed(tuple(seconds), context)


def _first_of(model: Any, count: int) -> Any:
    """A skeleton with at most `count` of the model's decoder layers, spread evenly."""
    there = len(describe(model).layers(model))
    if count >= there:
        return design(model, Cut()).skeleton
    spread = tuple(round(i * (there - 1) / (count - 1)) for i in range(count))
    return design(model, Cut(layers=spread)).skeleton


def fill(models: Sequence[Any], device: torch.device) -> None:
    """Give skeletons random weights. Parameters of the same name share one memory.

    Only the number of bytes matters, not the values. Vectors are ones: otherwise norms would make
    all values tiny, and some processors compute slowly with tiny values.
    """
    largest: dict[str, Tensor] = {}
    for model in models:
        for name, p in parameters_of(model).items():
            if name not in largest or p.numel() > largest[name].numel():
                largest[name] = p
    shared = {}
    for name, p in largest.items():
        flat = torch.empty(p.numel(), dtype=p.dtype, device=device)
        shared[name] = flat.fill_(1) if p.ndim == 1 else flat.normal_(0, 0.02)  # norms are ones
    for model in models:
        for name, p in parameters_of(model).items():  # views of one memory
            assign(model, name, shared[name][: p.numel()].view(p.shape))
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


class _Running(RandomModel):
    """A shortened model with a context in its KV cache. Each step adds a token to the cache.

    Args:
        model: the shortened model, with weights.
        layers: number of layers of the full model.
        device: the device of the model.
        context: tokens of the context.
        clock: returns seconds.
    """

    def __init__(
        self,
        model: Any,
        layers: int,
        device: torch.device,
        context: int,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.there = model, describe(model).layers(model)
        super().__init__(layers, len(self.there), clock)
        self.cache = empty_cache(model)
        prompt = torch.arange(context, device=device)[None] % model.config.vocab_size
        self.token = prompt[:, :1]
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **self.cache)

    def step(self) -> None:
        """Decode a token and choose the next, which waits for a GPU to finish."""
        out = self.model(input_ids=self.token, use_cache=True, **self.cache)
        int(out.logits[0, -1].argmax())

    def without_layers(self) -> AbstractContextManager[None]:
        """As the contract says."""
        nothing: list[nn.Module] = [StandIn(layer, in_tuple=False) for layer in self.there]
        return replaced_layers(self.there, nothing)


FIRST = (0.85, 0.7, 0.5, 0.3, 0.1)
"""Fractions of heads and neurons to keep in the first pass."""

PASSES = 3

BETWEEN = 4
"""Sizes of each later pass: three passes distinguish fractions of 1 %."""


@dataclass(frozen=True)
class Size:
    """A timed candidate.

    Attributes:
        kept: target fraction of the parameters of heads and neurons; whole units come as near as
            possible.
        groups: maximum number of KV groups in a layer.
        neurons: maximum number of neurons in an FFN or an expert.
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


TimeSizes = Callable[[Sequence[float], Collection[Size]], tuple[list[Size], int]]
"""Times fractions to keep, but for the sizes that are known (`_time_sizes`)."""


def _time_sizes(
    plan: CutPlan,
    models: tuple[Any, Any],
    multiple: int,
    timer: Callable[[Sequence[Any]], Timed],
    fractions: Sequence[float],
    known: Collection[Size],
) -> tuple[list[Size], int]:
    """Time sizes, largest first, and each number of units once.

    Args:
        plan: the plan of the other cuts.
        models: skeletons of the uncut model, and of the model after the other cuts.
        multiple: the number of kept neurons is a multiple of this.
        timer: times models in turns.
        fractions: fractions of heads and neurons to keep. Sizes that whole units cannot make are
            skipped.
        known: sizes that are already timed; skipped too.

    Returns:
        The sizes, and how many tokens were in the cache.
    """
    whole, narrowable = models
    before = {(size.groups, size.neurons) for size in known}
    made: dict[tuple[int, int], tuple[float, Any]] = {}
    for kept in fractions:
        try:
            cut = uniform_cut(replace(plan, joint=1 - kept), narrowable, multiple)
        except RecipeError:  # the size is too small for whole units
            continue
        skeleton = design(narrowable, cut).skeleton
        sizes = sizes_of(skeleton)
        narrowed = plan.narrowed(sizes.layers)
        neurons = (getattr(sizes, kind)[i] for kind in NEURONS for i in narrowed)
        units = max(sizes.groups[i] for i in narrowed), max(neurons)
        if units not in before:
            made.setdefault(units, (kept, skeleton))
    if not made:
        return [], 0
    (uncut, *seconds), context = timer([whole, *(skeleton for _, skeleton in made.values())])
    return [
        Size(kept, *units, 1e3 * each, 1e3 * uncut)
        for (units, (kept, _)), each in zip(made.items(), seconds, strict=True)
    ], context


def find_latency(
    recipe: StructureRecipe,
    plan: CutPlan,
    model: Any,
    device: torch.device,
    work: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Find the largest size that meets the target, and return all measurements.

    Args:
        recipe: recipe with a target in time.
        plan: the plan of the other cuts, with all heads and neurons.
        model: the uncut skeleton.
        device: where a token is timed.
        work: folder for the result; a stopped run may have written it.
        progress: receives every turn of a model.

    Returns:
        The record for the manifest; `joint` is the fraction of heads and neurons to remove.

    Raises:
        RecipeError: no size meets the target, or the other cuts alone meet it.
    """
    kept = work / "latency.json"
    if kept.exists():
        measured: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return measured
    assert recipe.decode_latency is not None
    models = design(model, Cut()).skeleton, design(model, representative(plan)).skeleton
    timer = partial(time_steps, device=device, progress=progress)
    timed = partial(_time_sizes, plan, models, recipe.multiple, timer)
    first = (1.0, *FIRST) if plan.cuts else FIRST
    best, sizes, context = _largest(timed, first, recipe.decode_latency)
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


def _largest(
    time_sizes: TimeSizes, first: Sequence[float], target: float
) -> tuple[Size, list[Size], int]:
    """The largest size within the target, all timed sizes, and the length of the context."""
    sizes, context = time_sizes(first, ())
    within = [size for size in sizes if size.left <= target]
    if not sizes:
        raise RecipeError(
            "heads and neurons cannot be cut to any size between a tenth and all of them",
            remedy="choose a smaller --multiple, or drop layers: --keep-layers",
        )
    if not within:
        least = sizes[-1]
        raise RecipeError(
            f"a token is to take {target:.0%} of its time; with {least.groups} KV groups and "
            f"{least.neurons} neurons a layer, the smallest size measured, it takes "
            f"{least.left:.1%} ({least.milliseconds:.2f} of {least.milliseconds_uncut:.2f} ms)",
            remedy="ask for more than that, or drop layers too: --keep-layers",
        )
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
        sizes, _ = time_sizes([above - step * (i + 1) for i in range(BETWEEN)], timed)
        timed += sizes
        best = max((s for s in timed if s.left <= target), key=lambda size: size.kept)
        above = min((s.kept for s in timed if s.kept > best.kept), default=1.0)
    return best, sorted(timed, key=lambda size: -size.kept), context
