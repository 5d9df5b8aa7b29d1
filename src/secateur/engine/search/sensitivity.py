"""The divergence that changing each linear alone makes, to second order, in one pass."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import ForwardSource
from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.engine.search.survey import LayerView, Linears, Survey
from secateur.engine.stream.calls import layouts
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.layerwise import LayerwisePass, only_learning
from secateur.models.architecture import Linear, linears_of
from secateur.runs.output import write_json
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity

_ROWS = 64  # tokens whose probabilities are in memory at once

ALONE = "alone"
"""The folder of `ChangedAlone`, within the folder of the survey."""

Ways = Mapping[str, Mapping[str, Tensor]]
"""Ŵ − W of linears, by their full names and by the ways in which they are changed."""


class ChangedAlone:
    """The divergence that changing each linear alone makes, to second order.

        D_i = ½ mean_t (g_it · (Ŵ_i − W_i) x_it)²
        g_it = ∂/∂(W_i x_it) of Σ_s −log p(y_s)         y_s drawn from the dense model's p

    One forward and one backward of the dense model measure all linears in all ways, with one
    decoder layer in memory. Before the backward of a layer its linears are changed, on the inputs
    of the same windows. A killed run continues with the layer in which it stopped.

    Derivation: the second-order term of KL(p ‖ p') is ½ δzᵀ F δz with the Fisher matrix
    F = E_y[∇ log p(y) ∇ log p(y)ᵀ], so a drawn y gives an unbiased ½ (Σ_t g_it · δ_it)². The sum of
    squares leaves the products of different tokens out, whose mean is near 0 and whose noise is
    large.

    Args:
        survey: gives the model, the calibration tokens, and the folder for the work.
        tokens: calibration tokens to measure on.
        names: the statistics of the inputs that `ways` reads.
        grains: grains of the competing linears.
        ways: a layer → Ŵ − W of its linears in each way. Experts that saw no token are left out.
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
        self.target, self.folder = survey.target, survey.work / ALONE
        self.folder.mkdir(parents=True, exist_ok=True)
        windows = cut_windows(survey.calibration.windows, tokens)
        self.outer = EmbeddingAndHead(
            survey.target, windows, self.folder, fast=survey.settings.fast_matmuls
        )
        self.layouts = layouts(survey.target, windows.shape[1])
        self.walk = LayerwisePass(
            self.outer,
            range(len(windows)),
            self.folder,
            lambda number, window: self.outer.call(number, [window]),
            self.outer.matmuls,
        )

    def divergences(self, label: str) -> dict[str, dict[str, float]]:
        """D_i of each competing linear in each way. Experts that saw no token are left out."""
        walk, files = self.walk, [self.file(n) for n in range(self.walk.count)]
        steps = len(walk.windows) * (2 * walk.count + 1)
        self.survey.progress.start(label, steps)
        # the backward goes from the last layer down; each finished one has a file
        if not files[-1].exists() and not walk.gradients.has(walk.count):
            walk.forward(self.opened_dense)
            walk.losses(self.loss)
        walk.backward(self.opened, lambda number: files[number].exists(), lowest=-1)
        self.survey.progress.finish()
        layers = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return {name: found for layer in layers for name, found in layer.items()}

    def file(self, number: int) -> Path:
        """The file with the divergences of a layer."""
        return self.folder / f"divergence-{number:04d}.json"

    @contextmanager
    def opened_dense(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A layer for the forward."""
        with self.target.layer(number) as layer:
            yield layer, lambda place: self.survey.progress.step(note=f"layer {number}")

    def loss(self, place: int, hidden: Tensor) -> Tensor:
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
        self.survey.progress.step(note="predictions")
        return torch.dot(logits.flatten(), gradient.flatten())  # d/dlogits is `gradient`

    @contextmanager
    def opened(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A layer for the backward; in the end the divergences of its linears are in a file."""
        tokens = self.outer.windows.numel()
        with self.target.layer(number) as layer, only_learning(layer, []):
            linears = linears_of(layer, self.target.architecture.layer_name(number))
            changes = self.changes(number, layer, linears)
            with _products(linears.values(), changes) as sums:
                yield layer, lambda place: self.survey.progress.step(note=f"layer {number}")
        found = {
            # ½ mean_t (g_t · δ_t)²
            name: {way: 0.5 * float(total) / tokens for way, total in ways.items()}
            for name, ways in sums.items()
        }
        write_json(self.file(number), found)

    @torch.no_grad()
    def changes(self, number: int, layer: nn.Module, linears: Linears) -> Ways:
        """Ŵ − W of the competing linears of a layer; no experts that saw no token."""
        survey = self.survey
        # the same windows again, for the statistics that the changes read
        passes = range(len(self.walk.windows) if self.names else 0)
        forwards = [partial(self.walk.outputs, number, layer, place) for place in passes]
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

    hooks = [x.module.register_forward_hook(watching(x.name)) for x in linears if x.name in sums]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


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
