"""Decoder layers without their attention, without their feed-forward sub-block, or without both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.engine.choose.depth_space import ATTENTION, FFN, WHOLE
from secateur.engine.choose.tournament import Version
from secateur.engine.stream.ends import ModelEnds
from secateur.errors import ArchitectureError

_NAMES = {ATTENTION: "attention", FFN: "feed-forward"}


def parts_of(layer: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules of a decoder layer that make up its attention and its feed-forward sub-block.

    Every child with a matrix belongs to one of the two: to attention if its name or class contains
    that word, else to the feed-forward sub-block. Norms belong to neither.
    """
    parts: dict[int, list[nn.Module]] = {ATTENTION: [], FFN: []}
    for name, child in layer.named_children():
        if any(p.ndim > 1 for p in child.parameters()):
            said = f"{name} {type(child).__name__}".lower()
            parts[ATTENTION if "attn" in said or "attention" in said else FFN].append(child)
    return parts


def parameters_of(layer: nn.Module) -> dict[int, int]:
    """How many parameters each sub-block of a layer has."""
    return {
        part: sum(p.numel() for module in modules for p in module.parameters())
        for part, modules in parts_of(layer).items()
    }


class SubBlocks:
    """Runs layers without some of their sub-blocks.

    The version of a layer is the sum of the sub-blocks that it keeps: ATTENTION, FFN or WHOLE.

    A removed sub-block adds nothing to the residual stream: its modules return zeros. Without both
    sub-blocks the layer must be the identity. That is checked once for each layer that loses a
    sub-block. So a family is refused if something else writes to the stream: a norm with a bias
    after the sub-blocks, or a norm on the stream itself.

    Args:
        ends: ends of the dense model.
    """

    dense: Version = WHOLE

    def __init__(self, ends: ModelEnds) -> None:
        self.ends = ends
        self.outputs: dict[tuple[int, int], list[int]] = {}

    @contextmanager
    def opened(
        self, number: int, layer: nn.Module
    ) -> Iterator[Callable[[Version], Callable[[Tensor], Tensor]]]:
        """The forward of each version of a layer."""

        def forward_of(version: Version) -> Callable[[Tensor], Tensor]:
            return partial(self.run, number, layer, cast(int, version))

        yield forward_of

    def run(self, number: int, layer: nn.Module, kept: int, hidden: Tensor) -> Tensor:
        """Run a layer that keeps at least one of its sub-blocks.

        Raises:
            ArchitectureError: the layer does more than add its sub-blocks to the stream.
        """
        if kept == WHOLE:
            return self.ends.run(number, layer, hidden)
        if (number, ATTENTION) not in self.outputs:
            self.learn(number, layer, hidden)
        with self.silenced(number, layer, WHOLE & ~kept):
            return self.ends.run(number, layer, hidden)

    def learn(self, number: int, layer: nn.Module, hidden: Tensor) -> None:
        """Record what the sub-blocks of a layer return, and check that it adds nothing without
        them.

        Raises:
            ArchitectureError: it adds something.
        """
        returned: dict[nn.Module, int] = {}

        def note(module: nn.Module, args: Any, out: Any) -> None:
            returned[module] = len(out) if isinstance(out, tuple) else 0

        parts = parts_of(layer)
        handles = [m.register_forward_hook(note) for ms in parts.values() for m in ms]
        try:
            self.ends.run(number, layer, hidden)
        finally:
            for handle in handles:
                handle.remove()
        for part, modules in parts.items():
            self.outputs[number, part] = [returned.get(module, 0) for module in modules]
        with self.silenced(number, layer, WHOLE):
            if not torch.equal(self.ends.run(number, layer, hidden), hidden):
                raise ArchitectureError(
                    f"without {' and '.join(_NAMES.values())} a {type(layer).__name__} still "
                    "changes its input, so sub-blocks cannot be dropped one by one",
                    where=self.ends.target.architecture.layer_name(number),
                    remedy="drop whole layers: units: layers",
                )

    @contextmanager
    def silenced(self, number: int, layer: nn.Module, missing: int) -> Iterator[None]:
        """A context in which some sub-blocks of a layer return zeros.

        Only `forward` is replaced, because layers read attributes of their attention.
        """
        parts = parts_of(layer)
        chosen = [
            (module, outputs)
            for part in (ATTENTION, FFN)
            if part & missing
            for module, outputs in zip(parts[part], self.outputs[number, part], strict=True)
        ]
        before = [vars(module).get("forward") for module, _ in chosen]
        for module, outputs in chosen:
            vars(module)["forward"] = zeros(outputs)
        try:
            yield
        finally:
            for (module, _), forward in zip(chosen, before, strict=True):
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward


def zeros(outputs: int) -> Callable[..., Any]:
    """A forward that returns zeros in the shape of its input.

    Args:
        outputs: the length of the tuple to return, the zeros first; 0 for a plain tensor.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (nothing, *[None] * (outputs - 1)) if outputs else nothing

    return forward
