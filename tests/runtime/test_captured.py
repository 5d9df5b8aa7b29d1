"""Steps as one graph, on a pretended one: it knows operations and memory, as a CUDA graph does.

What a real GPU adds is not checked: that no operation needs the host while it is captured, and that
memory of the graph is not used by others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import tiny_model

from secateur.errors import ArchitectureError, ShapeError
from secateur.models.experts import open_experts
from secateur.runtime.captured import CapturedGeneration, why_not_captured
from secateur.runtime.decode import SteppedGeneration, continued

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
"""Operations in which the host waits for the GPU: a capture refuses them."""


class PretendedGraph(TorchDispatchMode):
    """Records operations; `replay` repeats them without the code that called them.

    Results are written where the recorded ones are, so whoever holds these sees the new numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.split("::")[1] not in WAITING, f"the host waits in {func}"
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.steps.append((func, args, kwargs or {}, made))
        return out

    def replay(self) -> None:
        for func, args, kwargs, made in self.steps:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(made, again, strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def pretended(call: Callable[[], Tensor], rewind: Callable[[], None]) -> Callable[[], Tensor]:
    for _ in range(2):  # to warm up
        rewind()
        call()
    rewind()
    graph = PretendedGraph()
    with graph:
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


FAMILIES = ["llama", "qwen2", "gemma", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_are_those_of_generate(family: str) -> None:
    model = tiny_model(family).eval()
    ids = torch.tensor([3, 1, 4, 1, 5])
    captured = CapturedGeneration(model, 16, pretended)
    usual = SteppedGeneration(model)
    for prompt in (ids, ids[:2]):  # the second one with the graph of the first
        ours, theirs = captured.prefill(prompt), usual.prefill(prompt)
        for _ in range(6):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            token = int(theirs.argmax())
            ours, theirs = captured.step(token), usual.step(token)
        assert captured.length == len(prompt) + 6
    usual.close()


def test_one_capture_serves_all_texts() -> None:
    captures: list[int] = []

    def counted(call: Callable[[], Tensor], rewind: Callable[[], None]) -> Callable[[], Tensor]:
        captures.append(1)
        return pretended(call, rewind)

    model = tiny_model("llama").eval()
    steps = CapturedGeneration(model, 12, counted)
    first = [*continued(steps, torch.tensor([7, 8]), 8)]
    [*continued(steps, torch.tensor([5]), 4)]
    assert [*continued(steps, torch.tensor([7, 8]), 8)] == first
    assert len(captures) == 1


def test_the_cache_has_an_end() -> None:
    steps = CapturedGeneration(tiny_model("llama").eval(), 3, pretended)
    with pytest.raises(ShapeError, match="0 tokens in a cache of 3"):
        steps.step(1)
    for length in (0, 4):
        with pytest.raises(ShapeError, match=f"a prompt of {length} tokens, for a cache of 3"):
            steps.prefill(torch.ones(length, dtype=torch.int64))
    steps.prefill(torch.tensor([1, 2]))
    steps.step(3)
    with pytest.raises(ShapeError, match="3 tokens in a cache of 3"):
        steps.step(4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mixtral", "which experts compute"), ("gemma3", "Python counts the tokens of its cache")],
)
def test_models_that_python_steers_are_refused(family: str, reason: str) -> None:
    model = tiny_model(family)
    open_experts(model)
    assert why_not_captured(model) is not None
    with pytest.raises(ArchitectureError, match=reason):
        CapturedGeneration(model, 8, pretended)
