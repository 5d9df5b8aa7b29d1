"""Decodes on a GPU with one graph for each token, so that no operation is launched from Python.

At batch 1 the operations of a model are shorter than the time that Python takes to launch them. A
CUDA graph launches all of them at once. It runs the same operations on the same memory every time,
so everything that changes between two tokens must be in memory of the GPU: the token, keys and
values, and how many there are. `StaticCache` of transformers keeps them so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import ArchitectureError, ShapeError
from secateur.models.experts import OpenExperts
from secateur.models.skeleton import quiet_transformers
from secateur.runtime.decode import given_cache

WARM_UPS = 3
"""Steps before a capture: libraries choose algorithms and take memory in the first ones."""

Capture = Callable[[Callable[[], Tensor], Callable[[], None]], Callable[[], Tensor]]
"""Records what a call does; returns what repeats it and gives the result, in the same memory. The
second argument takes back what a call has changed; it comes before every call."""


def why_not_captured(model: Any) -> str | None:
    """Why the steps of a model cannot be one graph; None if they can."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if any(isinstance(x, OpenExperts) for x in model.modules()):
        return "which experts compute is decided by Python"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers does not say that Python decides nothing in a forward"
    cache = StaticCache(config=model.config, max_cache_len=1)
    others = {type(x).__name__ for x in cache.layers if type(x) is not StaticLayer}
    if others:
        return f"Python counts the tokens of its cache ({', '.join(sorted(others))})"
    if not isinstance(getattr(cache.layers[0], "cumulative_length", None), Tensor):
        return "this release of transformers counts the tokens of a cache in Python"
    return None


def _cuda_graph(call: Callable[[], Tensor], rewind: Callable[[], None]) -> Callable[[], Tensor]:
    """Capture a call on the current GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            rewind()
            call()
        rewind()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class CapturedGeneration:
    """Decodes one sequence; every token after the prompt replays one graph.

    The prompt goes through the model as usual.

    Args:
        model: a transformers causal language model in eval mode.
        capacity: the number of tokens that fit in the cache.
        capture: records a step.

    Raises:
        ArchitectureError: `why_not_captured` has a reason.
    """

    def __init__(self, model: Any, capacity: int, capture: Capture = _cuda_graph) -> None:
        from transformers import StaticCache

        reason = why_not_captured(model)
        if reason is not None:
            raise ArchitectureError(
                f"its steps cannot be one graph: {reason}", remedy="use SteppedGeneration"
            )
        self.model, self.capacity, self.capture = model, capacity, capture
        self.cache: Any = StaticCache(config=model.config, max_cache_len=capacity)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.replay: Callable[[], Tensor] | None = None
        self.length = 0

    def prefill(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Start anew with a prompt; returns the logits after its last token, float32 on the CPU.

        Raises:
            ShapeError: the prompt is empty, or longer than the cache.
        """
        if not 1 <= len(ids) <= self.capacity:
            raise ShapeError(f"a prompt of {len(ids)} tokens, for a cache of {self.capacity}")
        with torch.inference_mode(), quiet_transformers():
            self.cache.reset()
            logits = self.logits_after(ids[None].to(self.model.device))
        self.length = len(ids)
        return logits.cpu()

    def step(self, token: int) -> Float[Tensor, " vocabulary"]:
        """Process one token; returns the logits of the next, float32 on the CPU.

        Raises:
            ShapeError: there is no prompt, or the cache is full.
        """
        if not 1 <= self.length < self.capacity:
            raise ShapeError(f"{self.length} tokens in a cache of {self.capacity}")
        with torch.inference_mode(), quiet_transformers():
            self.token.fill_(token)
            if self.replay is None:
                self.replay = self.capture(lambda: self.logits_after(self.token), self.rewind)
                self.rewind()
            logits = self.replay()
        self.length += 1
        return logits.cpu()

    def close(self) -> None:
        """Forget the text and the graph."""
        self.replay, self.length = None, 0

    def rewind(self) -> None:
        """Let the cache have the tokens of the text, and no others."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def logits_after(self, ids: Tensor) -> Tensor:
        """One forward: the logits after the last of some tokens [1, tokens], float32."""
        given = given_cache(self.model, self.cache)
        found: Tensor = self.model(ids, use_cache=True, logits_to_keep=1, **given).logits[0, -1]
        return found.float()
