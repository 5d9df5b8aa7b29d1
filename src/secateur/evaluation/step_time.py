"""How long one token takes in transformers at batch 1, of models that need not exist.

    time of a token = t(n) + (L − n) · (t(n) − t(0)) / n

L is the number of decoder layers, t(n) the time with n of them, spread evenly, and t(0) the time
with none: embedding, last norm and head. The weights are random, of the right shapes and dtype, and
all models that are compared are views of one memory, so no more is held than n layers of the
largest, and what is outside them. A model with fewer weights than `LAYER_BYTES` in its layers is
timed whole. Caches decide how fast weights are read: what is timed has to be larger than they are.

The models take turns, so that whatever else the machine does happens to all of them; each time is a
median over all turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import Recorder, replaced_layers
from secateur.models.architecture import describe
from secateur.models.skeleton import assign, quiet_transformers
from secateur.progress import Progress
from secateur.runtime.decode import given_cache
from secateur.structured.cut import Cut
from secateur.structured.design import design
from secateur.structured.edits import parameters_of

__all__ = ["StepTimer", "Timed", "time_steps"]

LAYER_BYTES = 512 * 2**20
"""Of decoder layers that are timed; more than the last cache of any processor or GPU."""

CONTEXT_TOKENS = 256
"""Before the tokens that are timed, where the model has so many positions."""

TURNS, STEPS = 5, 5
"""Turns of each model, and steps that count in each; one more warms the caches up."""


@dataclass(frozen=True)
class Timed:
    """What was measured.

    Attributes:
        seconds: for one token, of each model.
        context_tokens: in the cache before the first of them.
    """

    seconds: tuple[float, ...]
    context_tokens: int


class StepTimer(Protocol):
    """Times one decode step of some models against each other."""

    def __call__(self, models: Sequence[Any], device: torch.device, progress: Progress) -> Timed:
        """Time skeletons, which are left as they are.

        Args:
            models: with all their layers, parameters on the meta device.
            device: where they would run.
            progress: told of every turn of a model.
        """
        ...


@torch.inference_mode()
def time_steps(
    models: Sequence[Any],
    device: torch.device,
    progress: Progress,
    *,
    layer_bytes: int = LAYER_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """The `StepTimer` that runs them.

    Args:
        models: with all their layers, parameters on the meta device.
        device: where they run.
        progress: told of every turn of a model.
        layer_bytes: of decoder layers that are timed of the largest model, and two at least.
        clock: tells seconds.
    """
    layers = max(2, layer_bytes // max(bytes_of_a_layer(model) for model in models))
    shortened = [first_of(model, layers) for model in models]
    fill(shortened, device)
    context = context_tokens(models[0].config)
    with quiet_transformers():
        running = [
            Running(short, len(describe(model).layers(model)), device, context)
            for short, model in zip(shortened, models, strict=True)
        ]
        progress.start("timing sizes", TURNS * len(running))
        for _ in range(TURNS):
            for each in running:
                each.turn(clock)
                progress.step()
        progress.finish()
    return Timed(tuple(each.seconds for each in running), context)


def bytes_of_a_layer(model: Any) -> int:
    """Of the largest decoder layer."""
    layers = describe(model).layers(model)
    return max(sum(p.numel() * p.itemsize for p in layer.parameters()) for layer in layers)


def first_of(model: Any, count: int) -> Any:
    """A skeleton like it with at most so many of its decoder layers, spread evenly."""
    there = len(describe(model).layers(model))
    if count >= there:
        return design(model, Cut()).skeleton
    spread = tuple(round(i * (there - 1) / (count - 1)) for i in range(count))
    return design(model, Cut(layers=spread)).skeleton


def fill(models: Sequence[Any], device: torch.device) -> None:
    """Give skeletons random weights, which they share as far as names and sizes go.

    What is read is what counts, not what it says; ones in vectors keep norms from making all values
    tiny, which some processors are slow with.
    """
    largest: dict[str, Tensor] = {}
    for model in models:
        for name, p in parameters_of(model).items():
            if name not in largest or p.numel() > largest[name].numel():
                largest[name] = p
    shared = {}
    for name, p in largest.items():
        flat = torch.empty(p.numel(), dtype=p.dtype, device=device)
        shared[name] = flat.fill_(1) if p.ndim == 1 else flat.normal_(0, 0.02)
    for model in models:
        for name, p in parameters_of(model).items():
            assign(model, name, shared[name][: p.numel()].view(p.shape))
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def context_tokens(config: Any) -> int:
    """How many tokens there can be before those that are timed."""
    positions = getattr(config, "max_position_embeddings", None) or CONTEXT_TOKENS * 16
    return max(1, min(CONTEXT_TOKENS, positions - TURNS * (STEPS + 1)))


class Running:
    """A shortened model with a context in its cache, that grows with the steps.

    Args:
        model: shortened, with weights.
        layers: that it stands for.
        device: it is on.
        context: tokens of its context.
    """

    def __init__(self, model: Any, layers: int, device: torch.device, context: int) -> None:
        from transformers import DynamicCache

        self.model, self.layers = model, describe(model).layers(model)
        self.untimed = layers - len(self.layers)
        self.cache = given_cache(model, DynamicCache(config=model.config))
        prompt = torch.arange(context, device=device)[None] % model.config.vocab_size
        self.token = prompt[:, :1]
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **self.cache)
        self.whole: list[float] = []
        self.outside: list[float] = []

    def turn(self, clock: Callable[[], float]) -> None:
        """Time some steps; the first one fetches what the other models drove out of the caches."""
        if self.untimed:
            nothing: list[nn.Module] = [Recorder(layer, last=False) for layer in self.layers]
            with replaced_layers(self.layers, nothing):
                self.outside += [self.step(clock) for _ in range(STEPS + 1)][1:]
        self.whole += [self.step(clock) for _ in range(STEPS + 1)][1:]

    def step(self, clock: Callable[[], float]) -> float:
        """Seconds for one token, the choice of the next one with it, for which a GPU is awaited."""
        started = clock()
        out = self.model(input_ids=self.token, use_cache=True, **self.cache)
        int(out.logits[0, -1].argmax())
        return clock() - started

    @property
    def seconds(self) -> float:
        """For one token of the model with all its layers."""
        whole = statistics.median(self.whole)
        if not self.untimed:
            return whole
        layer = (whole - statistics.median(self.outside)) / len(self.layers)
        return whole + self.untimed * layer
