"""Gathers inputs and gradients for scores from a whole model during training.

The engine gathers the same statistics with one decoder layer in memory
(`engine/stream/forwards.py`, `engine/stream/gradients.py`). A model in training is in memory
anyway, so this module uses ordinary forwards and backwards with the current weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.calibration.statistics import Statistic, of_gradients, of_inputs, statistics
from secateur.errors import NumericalError, RecipeError
from secateur.models.architecture import Linear
from secateur.precision import full_float32
from secateur.types import STORED, Statistics, Windows


@full_float32()
def gather(
    model: Any, linears: Sequence[Linear], requires: frozenset[str], windows: Windows | None
) -> dict[str, Statistics]:
    """Return the statistics of linears by full name. Each forward runs one window.

    Memory: the statistics of all linears. Gradients also need two float32 copies of their
    weights and the activations of one window.

    Args:
        model: a causal language model. It is in eval mode during the call, and the call leaves no
            gradient on it.
        linears: the matrices to score.
        requires: names of statistics; see `secateur.types.Statistics`.
        windows: token ids [samples, sequence_length]; None where no statistic needs a forward.

    Raises:
        RecipeError: a statistic needs windows, and there are none.
        NumericalError: the loss of a window, or an input of a linear, is not finite.
    """
    gathered: dict[str, dict[str, Tensor]] = {
        x.name: {STORED: x.weight} if STORED in requires else {} for x in linears
    }
    run = requires - {STORED}
    if not run:
        return dict(gathered)
    if windows is None or not len(windows):
        raise RecipeError(
            f"the score needs {', '.join(sorted(run))}, but there are no windows to gather it from",
            remedy="give windows of token ids [samples, sequence_length], or use score 'magnitude'",
        )
    seen, derived = of_inputs(run), of_gradients(run)
    backward = _Gradients(linears, derived) if derived else None
    device = linears[0].weight.device
    with _eval(model), _watched(linears, seen) as watching:
        for number, ids in enumerate(windows):
            if backward is None:
                with torch.no_grad():
                    model(input_ids=ids[None].to(device), use_cache=False)
            else:
                backward.add(model, ids[None].to(device), number)
    for name, values in gathered.items():
        values |= {key: watching[name, key].value() for key in seen}
        if backward is not None:
            values |= {key: backward.kept[name, key].value() for key in derived}
    return dict(gathered)


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _watched(
    linears: Sequence[Linear], names: frozenset[str]
) -> Iterator[Mapping[tuple[str, str], Statistic]]:
    """Statistics of the inputs of linears, gathered from every forward inside the context."""
    kept = _running(linears, names)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for key in names:
                kept[name, key].update(inputs[0].detach().flatten(0, -2))

        return take

    handles = [x.module.register_forward_pre_hook(watch(x.name)) for x in linears]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _running(linears: Sequence[Linear], names: frozenset[str]) -> dict[tuple[str, str], Statistic]:
    """The statistics of linears, by linear and by statistic."""
    return {
        (x.name, key): statistics[key](x.shape, x.weight.device) for x in linears for key in names
    }


class _Gradients:
    """Statistics of the gradients of windows.

    Args:
        linears: the linears whose weights get gradients.
        names: names of the statistics.
    """

    def __init__(self, linears: Sequence[Linear], names: frozenset[str]) -> None:
        self.linears, self.names = {x.name: x for x in linears}, names
        self.leaves = [x.module.get_parameter("weight") for x in linears]
        self.kept = _running(linears, names)

    def add(self, model: Any, ids: Tensor, number: int) -> None:
        """Add one window [1, sequence_length]."""
        before = [leaf.requires_grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.requires_grad_(True)
        try:
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits
                loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
                found = torch.autograd.grad(loss, self.leaves)
        finally:
            for leaf, required in zip(self.leaves, before, strict=True):
                leaf.requires_grad_(required)
        if not torch.isfinite(loss):
            raise NumericalError(
                f"the loss of window {number} is {loss.item()}",
                remedy="lower the learning rate, or use float32 or bfloat16",
            )
        for (name, linear), gradient in zip(self.linears.items(), found, strict=True):
            for key in self.names:
                self.kept[name, key].update(gradient.t() if linear.transposed else gradient)
