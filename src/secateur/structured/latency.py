"""Finds the largest cut with which a token takes at most a part of its time: `--decode-latency`.

A token is timed in transformers at batch 1. Sizes are timed, not calculated, because time depends
on the processor, its memory, and the dtype. Each size takes turns with the uncut model, and the
next one halves the range between the largest that met the target and the smallest that did not.

The layers that are timed are spread evenly (`random_models` says how those of the whole model
follow). The weights are random, with the right shapes and dtype.
All compared models are views of one memory. So memory holds only n layers of the largest model, and
the parts outside its layers. A model whose layers have less than `LAYER_BYTES` is timed whole.
Weights in the processor's caches are read faster, so the timed weights must be larger than the
caches.

The models take turns, so that other load on the machine affects both alike. Each time is a
median over all turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
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


LEAST, ROUNDS = 0.1, 7
"""The smallest fraction of heads and neurons that is tried, and how often the range is halved: then
fractions of 1 % are told apart."""


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
    file, target = work / "latency.json", recipe.decode_latency
    if file.exists():
        measured: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return measured
    assert target is not None
    whole, narrowable = (design(model, x).skeleton for x in (Cut(), representative(plan)))
    sizes, context, low, high = dict[tuple[int, int], Size](), 0, LEAST, 1.0
    for kept in (1.0,) * plan.cuts + (None,) * ROUNDS:
        tried = kept or (low + high) / 2
        try:
            cut = uniform_cut(replace(plan, joint=1 - tried), narrowable, recipe.multiple)
        except RecipeError:  # the size is too small for whole units
            low = tried
            continue
        skeleton = design(narrowable, cut).skeleton
        units = _most_units(plan, skeleton)
        if units not in sizes:
            (uncut, own), context = time_steps([whole, skeleton], device, progress)
            sizes[units] = Size(tried, *units, 1e3 * own, 1e3 * uncut)
        low, high = (tried, high) if sizes[units].left <= target else (low, tried)
    best = _largest(sizes.values(), target)
    seconds = best.milliseconds_uncut / 1e3, best.milliseconds / 1e3
    found = {
        "target": target,
        "joint": 1 - best.kept,
        **recorded(Timed(seconds, context), model.dtype, device),
        "candidates": sorted(map(asdict, sizes.values()), key=lambda size: -size["kept"]),
    }
    write_json(file, found)
    return found


def recorded(timed: Timed, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The record of the times of a token in the uncut model and in the cut one."""
    before, after = (1e3 * each for each in timed.seconds)
    return {
        "milliseconds_before": before,
        "milliseconds_after": after,
        "batch": 1,
        "context_tokens": timed.context_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _most_units(plan: CutPlan, model: Any) -> tuple[int, int]:
    """The most KV groups, and the most neurons, of a layer that is narrowed."""
    sizes = sizes_of(model)
    narrowed = plan.narrowed(sizes.layers)
    neurons = (getattr(sizes, kind)[i] for kind in NEURONS for i in narrowed)
    return max(sizes.groups[i] for i in narrowed), max(neurons)


def _largest(sizes: Collection[Size], target: float) -> Size:
    """The largest size within the target."""
    if not sizes:
        raise RecipeError(
            "heads and neurons cannot be cut to any size between a tenth and all of them",
            remedy="choose a smaller --multiple, or drop layers: --keep-layers",
        )
    least = min(sizes, key=lambda size: size.kept)
    best = max((x for x in sizes if x.left <= target), key=lambda size: size.kept, default=None)
    if best is None:
        raise RecipeError(
            f"a token is to take {target:.0%} of its time; with {least.groups} KV groups and "
            f"{least.neurons} neurons a layer, the smallest size measured, it takes "
            f"{least.left:.1%} ({least.milliseconds:.2f} of {least.milliseconds_uncut:.2f} ms)",
            remedy="ask for more than that, or drop layers too: --keep-layers",
        )
    if best.kept == 1:
        raise RecipeError(
            f"a token is to take {target:.0%} of its time; with all heads and neurons it takes "
            f"{best.left:.1%}",
            remedy="leave the target out, or choose a smaller one",
        )
    return best
