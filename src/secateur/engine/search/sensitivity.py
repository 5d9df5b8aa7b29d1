"""What changes of the dense model cost, to second order, by one forward and one backward."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import ForwardSource
from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.engine.search.survey import LayerView, Linears, Survey
from secateur.engine.stream.calls import layouts
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.layerwise import LayerwisePass, only_learning
from secateur.models.architecture import Linear, linears_of
from secateur.models.targets import Target
from secateur.progress import Progress
from secateur.runs.output import write_json
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity

_ROWS = 64  # tokens whose probabilities are in memory at once

ALONE = "alone"
"""The folder of `ChangedAlone`, within the folder of the survey."""

Ways = Mapping[str, Mapping[str, Tensor]]
"""Ŵ − W of linears, by their full names and by the ways in which they are changed."""

Measured = Callable[[int, nn.Module], AbstractContextManager[dict[str, Any]]]
"""Number of a layer, and the layer → a context in which its backward runs. The dictionary holds
what was found once the context has left, as JSON."""


class DrawnBackward:
    """One forward and one backward of the dense model, with one decoder layer in memory.

        loss of a window   Σ_s −log p(y_s),  y_s drawn from the dense model's p

    KL(p ‖ p') is ½ δzᵀ F δz to second order, with the Fisher matrix
    F = E_y[∇ log p(y) ∇ log p(y)ᵀ], so the gradients of this loss measure what a change costs.

    A killed run continues with the layer in which it stopped.

    Args:
        target: the dense model.
        windows: token ids [samples, sequence_length].
        folder: of hidden states, gradients, and a file for each finished layer.
        progress: receives every step.
        fast: whether products may be in bfloat16 (`fast_matmuls`).
    """

    def __init__(
        self, target: Target, windows: Tensor, folder: Path, progress: Progress, *, fast: bool
    ) -> None:
        self.target, self.folder, self.progress = target, folder, progress
        folder.mkdir(parents=True, exist_ok=True)
        self.outer = EmbeddingAndHead(target, windows, folder, fast=fast)
        self.walk = LayerwisePass(
            self.outer,
            range(len(windows)),
            folder,
            lambda number, window: self.outer.call(number, [window]),
            self.outer.matmuls,
        )

    def records(self, label: str, measured: Measured) -> list[dict[str, Any]]:
        """What `measured` finds in each layer."""
        walk, files = self.walk, [self.file(n) for n in range(self.walk.count)]
        self.progress.start(label, len(walk.windows) * (2 * walk.count + 1))
        # the backward goes from the last layer down; each finished one has a file
        if not files[-1].exists() and not walk.gradients.has(walk.count):
            walk.forward(self._opened_dense)
            walk.losses(self._loss)
        opened = partial(self._opened, measured)
        walk.backward(opened, lambda number: files[number].exists(), lowest=-1)
        self.progress.finish()
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def outputs(self, number: int, layer: nn.Module) -> Iterator[Tensor]:
        """The outputs of the current layer for each window, once more."""
        for place in range(len(self.walk.windows)):
            yield self.walk.outputs(number, layer, place)

    def file(self, number: int) -> Path:
        """The file with what is found in a layer."""
        return self.folder / f"divergence-{number:04d}.json"

    @contextmanager
    def _opened_dense(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A layer for the forward."""
        with self.target.layer(number) as layer:
            yield layer, lambda place: self.progress.step(note=f"layer {number}")

    def _loss(self, place: int, hidden: Tensor) -> Tensor:
        """A number with the gradient of Σ_s −log p(y_s) of a window: p − (1 at y_s) at logits s."""
        logits = self.outer.head(place, hidden)
        # One number for each token, of the CPU: all devices draw the same.
        random = torch.Generator().manual_seed(place)
        draws = torch.rand(len(logits), 1, generator=random, dtype=torch.float64)
        draws = draws.to(logits.device)
        gradient = torch.empty_like(logits)
        with torch.no_grad():
            for rows, own, draw in zip(
                gradient.split(_ROWS), logits.split(_ROWS), draws.split(_ROWS), strict=True
            ):
                p = own.float().softmax(-1)  # [tokens, vocabulary]
                labels = drawn(p, draw)
                # ∂(−log p(y)) / ∂logits = p − 1 at the drawn token
                rows.copy_(p.scatter_add_(1, labels, torch.full_like(p[:, :1], -1.0)))
        self.progress.step(note="predictions")
        return torch.dot(logits.flatten(), gradient.flatten())  # d/dlogits is `gradient`

    @contextmanager
    def _opened(
        self, measured: Measured, number: int
    ) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A layer for the backward; in the end what is found is in a file."""
        with (
            self.target.layer(number) as layer,
            only_learning(layer, []),
            measured(number, layer) as found,
        ):
            yield layer, lambda place: self.progress.step(note=f"layer {number}")
        write_json(self.file(number), found)


class ChangedAlone:
    """The divergence that changing each linear alone makes, to second order.

        D_i = ½ mean_t (g_it · (Ŵ_i − W_i) x_it)²
        g_it = ∂/∂(W_i x_it) of the loss of `DrawnBackward`

    One forward and one backward of the dense model measure all linears in all ways, with one
    decoder layer in memory. Before the backward of a layer its linears are changed, on the inputs
    of the same windows.

    Derivation: a drawn y gives an unbiased ½ (Σ_t g_it · δ_it)² of the second-order term of
    KL(p ‖ p'). The sum of squares leaves the products of different tokens out, whose mean is near 0
    and whose noise is large.

    Args:
        survey: gives the model, the calibration tokens, and the folder for the work.
        tokens: calibration tokens to measure on.
        names: the statistics of the inputs that `ways` reads.
        grains: grains of the competing linears.
        ways: a layer → Ŵ − W of its linears in each way. Experts that saw no token are left out.

    Attributes:
        others: what else the same backward finds; nothing at first.
    """

    def __init__(
        self,
        survey: Survey,
        tokens: int,
        names: Mapping[str, ForwardSource],
        grains: Mapping[str, Granularity],
        ways: Callable[[LayerView], Ways],
    ) -> None:
        assert survey.calibration is not None
        self.survey, self.names, self.grains, self.ways = survey, names, grains, ways
        self.target = survey.target
        self.others: Measured = lambda number, layer: nullcontext({})
        windows = cut_windows(survey.calibration.windows, tokens)
        self.layouts = layouts(survey.target, windows.shape[1])
        self.drawn = DrawnBackward(
            survey.target,
            windows,
            survey.work / ALONE,
            survey.progress,
            fast=survey.settings.fast_matmuls,
        )

    def divergences(self, label: str) -> dict[str, dict[str, float]]:
        """D_i of each competing linear in each way, and what else was found, by its name.

        Experts that saw no token are left out.
        """
        layers = self.drawn.records(label, self.measured)
        return {name: found for layer in layers for name, found in layer.items()}

    @contextmanager
    def measured(self, number: int, layer: nn.Module) -> Iterator[dict[str, Any]]:
        """The divergences of the linears of a layer, after its backward."""
        tokens, found = self.drawn.outer.windows.numel(), dict[str, Any]()
        linears = linears_of(layer, self.target.architecture.layer_name(number))
        changes = self.changes(number, layer, linears)
        with _products(linears.values(), changes) as sums, self.others(number, layer) as others:
            yield found
        found.update(others)
        for name, ways in sums.items():
            # ½ mean_t (g_t · δ_t)²
            found[name] = {way: 0.5 * float(total) / tokens for way, total in ways.items()}

    @torch.no_grad()
    def changes(self, number: int, layer: nn.Module, linears: Linears) -> Ways:
        """Ŵ − W of the competing linears of a layer; no experts that saw no token."""
        survey = self.survey
        # the same windows again, for the statistics that the changes read
        walk = self.drawn.walk
        passes = range(len(walk.windows) if self.names else 0)
        forwards = [partial(walk.outputs, number, layer, place) for place in passes]
        shared = survey.gathered(layer, self.layouts[number].groups, linears, self.names, forwards)
        view = LayerView(survey, number, linears, shared, self.grains)
        for name in view.unreached:
            del view.weights[name]
        return self.ways(view)


def drawn(p: Tensor, draw: Tensor) -> Tensor:
    """The token of each row at which the probabilities up to it exceed a number.

    Args:
        p: probabilities [tokens, vocabulary].
        draw: numbers from 0 to 1, float64 [tokens, 1].
    """
    up_to = p.cumsum(-1, dtype=torch.float64)
    # Right of all that are not larger: never at a token whose probability is 0.
    found = torch.searchsorted(up_to, draw * up_to[:, -1:], right=True)
    return found.clamp_max_(p.shape[-1] - 1)


@contextmanager
def _products(linears: Iterable[Linear], changes: Ways) -> Iterator[dict[str, dict[str, Tensor]]]:
    """A context in which every backward adds Σ_t (g_t · ΔW x_t)² of each linear, float64 []."""
    sums = {
        name: {way: x.new_zeros((), dtype=torch.float64) for way, x in ways.items()}
        for name, ways in changes.items()
    }

    def watching(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            with torch.no_grad():  # δ = ΔW x of every token [..., out]
                moved = {w: args[0].to(x.dtype) @ x.t() for w, x in changes[name].items()}

            def add(gradient: Tensor) -> None:
                for way, change in moved.items():
                    product = (gradient.float() * change.float()).sum(-1)  # g_t · δ_t
                    sums[name][way] += product.square().sum(dtype=torch.float64)

            output.register_hook(add)

        return after

    with ExitStack() as hooks:
        for x in (x for x in linears if x.name in sums):
            hooks.enter_context(x.module.register_forward_hook(watching(x.name)))
        yield sums


def pooled(found: Mapping[str, float], grains: Mapping[str, Granularity]) -> dict[str, float]:
    """D_i / n_i of each linear. The experts of a layer count as one linear."""
    units: dict[str, list[str]] = {}
    for name in grains:
        units.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(name)
    slopes: dict[str, float] = {}
    for unit in units.values():
        reached = [name for name in unit if name in found]
        weights = sum(grains[name].total for name in reached)
        slope = sum(found[name] for name in reached) / max(weights, 1)  # nats for each weight
        slopes |= dict.fromkeys(unit, slope)
    return slopes


def pruned_alone(
    survey: Survey, allocation: Allocation, grains: Mapping[str, Granularity]
) -> dict[str, Tensor]:
    """D_i / n_i of each competing linear, pruned by an allocation (`name/1` of `observe`)."""

    def pruned(view: LayerView) -> Ways:
        kept = allocation.observe(view)
        return {name: {"1": kept[f"{name}/1"] - weight} for name, weight in view.weights.items()}

    names = survey.statistics_for(allocation)
    alone = ChangedAlone(survey, allocation.judged_tokens, names, grains, pruned)
    found = alone.divergences("allocation: divergence")
    slopes = pooled({name: ways["1"] for name, ways in found.items()}, grains)
    return {n: torch.tensor(slope, dtype=torch.float64) for n, slope in slopes.items()}
