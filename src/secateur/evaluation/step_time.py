"""Time one token in transformers at batch 1, for model shapes that have no weights yet.

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

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import StandIn, replaced_layers
from secateur.evaluation.random_models import RandomModel
from secateur.models.architecture import describe
from secateur.models.skeleton import assign, quiet_transformers
from secateur.progress import Progress
from secateur.runtime.decode import given_cache
from secateur.structured.cut import Cut
from secateur.structured.design import design
from secateur.structured.edits import parameters_of
from secateur.timing import alternate

LAYER_BYTES = 512 * 2**20
"""Bytes of decoder layers to time: more than the last-level cache of any processor or GPU."""

CONTEXT_TOKENS = 256
"""Tokens before the timed ones, if the model has that many positions."""

TURNS, STEPS = 5, 5
"""Turns of each model, and timed steps per turn; one more step before them warms the caches up."""


@dataclass(frozen=True)
class Timed:
    """The measured times.

    Attributes:
        seconds: seconds per token, one for each model.
        context_tokens: tokens in the KV cache before the first timed token.
    """

    seconds: tuple[float, ...]
    context_tokens: int


class StepTimer(Protocol):
    """Times one decode step of several models in turns."""

    def __call__(self, models: Sequence[Any], device: torch.device, progress: Progress) -> Timed:
        """Time skeletons. They do not change.

        Args:
            models: models with all their layers, parameters on the meta device.
            device: the device to time on.
            progress: receives every turn of a model.
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
    """The `StepTimer` that really runs the models.

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
    context = context_tokens(models[0].config)
    with quiet_transformers():
        running = [
            Running(short, len(describe(model).layers(model)), device, context, clock)
            for short, model in zip(shortened, models, strict=True)
        ]
        progress.start("timing sizes", TURNS * len(running))

        def turn(one: Running) -> None:
            one.turn()
            progress.step()

        alternate(running, turn, len, turns=TURNS)
        progress.finish()
    return Timed(tuple(each.seconds for each in running), context)


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
        shared[name] = flat.fill_(1) if p.ndim == 1 else flat.normal_(0, 0.02)
    for model in models:
        for name, p in parameters_of(model).items():
            assign(model, name, shared[name][: p.numel()].view(p.shape))
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def context_tokens(config: Any) -> int:
    """The number of tokens before the timed ones."""
    positions = getattr(config, "max_position_embeddings", None) or CONTEXT_TOKENS * 16
    return max(1, min(CONTEXT_TOKENS, positions - TURNS * (STEPS + 1)))


class Running(RandomModel):
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
        from transformers import DynamicCache

        self.model, self.there = model, describe(model).layers(model)
        super().__init__(layers, len(self.there), clock)
        self.cache = given_cache(model, DynamicCache(config=model.config))
        prompt = torch.arange(context, device=device)[None] % model.config.vocab_size
        self.token = prompt[:, :1]
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **self.cache)
        self.whole: list[float] = []
        self.outside: list[float] = []

    def step(self) -> None:
        """Decode a token and choose the next, which waits for a GPU to finish."""
        out = self.model(input_ids=self.token, use_cache=True, **self.cache)
        int(out.logits[0, -1].argmax())

    def without_layers(self) -> AbstractContextManager[None]:
        """As the contract says."""
        nothing: list[nn.Module] = [StandIn(layer, in_tuple=False) for layer in self.there]
        return replaced_layers(self.there, nothing)

    def turn(self) -> None:
        """Time some steps."""
        if self.count < self.layers:
            with self.without_layers():
                self.outside += self.steps(STEPS)
        self.whole += self.steps(STEPS)

    @property
    def seconds(self) -> float:
        """Seconds per token of the full model."""
        whole = statistics.median(self.whole)
        if self.count == self.layers:
            return whole
        outside = statistics.median(self.outside)
        return outside + self.of_all_layers(whole - outside)
