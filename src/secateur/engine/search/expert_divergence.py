"""What the divergence from the dense model rises when experts go, to second order, in one pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.engine.search.sensitivity import DrawnBackward, Measured
from secateur.errors import ArchitectureError
from secateur.machine import exact_matmuls
from secateur.models.expert_layout import Experts
from secateur.models.experts import OpenExperts, ScaledExperts, Sent, numbers_of
from secateur.models.targets import Target
from secateur.progress import Progress

TOKENS = 16_384
"""Calibration tokens to measure on."""

REMOVED = "removed"
"""The way in which an expert is changed: it goes."""

_LISTED = 2  # a token's list has so many times the experts that the router chooses for it


@dataclass(frozen=True)
class Listed:
    """The experts of each token that are first in the router's order, and what they add.

    Attributes:
        experts: their numbers in this order, int64 [tokens, listed].
        gates: what the router weighs them by, up to a factor, float32 [tokens, listed].
        weights: the weights of those that it chooses, the first ones, float32 [tokens, chosen].
        products: f_i · F f_j of their outputs, with the Fisher matrix F, float32 [tokens, listed,
            listed].
        shares: the probabilities of all experts [tokens, experts] where the weights are a part of
            them, so that those of the others rise when an expert goes; None where they are not.
    """

    experts: Tensor
    gates: Tensor
    weights: Tensor
    products: Tensor
    shares: Tensor | None


def removal_scores(listed: Listed, count: int) -> Tensor:
    """The nats that each expert of a layer costs when it goes, after all that cost less.

        D(K) = ½ mean_t δ_t · F δ_t        δ_t = Σ_{i in S_t(K)} w_i f_i − y_t

    S_t(K) are the experts that the router chooses for a token among those that stay, K, and w_i
    their new weights. From all experts the one goes whose removal adds least to D, then the next.
    What it adds is its score, and never less than the score of the one before.

    A token whose listed experts are all gone gets nothing.

    Args:
        listed: of all tokens.
        count: number of the experts.

    Returns:
        Float64 [experts], higher = keep. The last ones, as many as the router chooses, stay.
    """
    removal = _Removal(listed, count)
    found, least = torch.zeros(count, dtype=torch.float64), 0.0
    for _ in range(count - listed.weights.shape[1]):
        costs = removal.costs()
        worst = int(costs.argmin())
        found[worst] = max(float(costs[worst]), least)
        least = math.nextafter(float(found[worst]), math.inf)  # so that the order stays
        removal.remove(worst)
    stay = removal.stays.cpu()
    found[stay] = removal.costs().cpu()[stay].clamp_min(least)
    return found


class _Removal:
    """The experts of a layer that are left, and what each of them costs now."""

    def __init__(self, listed: Listed, count: int) -> None:
        self.listed, self.chosen = listed, listed.weights.shape[1]
        places = listed.experts.flatten()
        self.stays = torch.ones(count, dtype=torch.bool, device=places.device)
        self.order, self.lengths = places.argsort(stable=True), places.bincount(minlength=count)
        # where they differ, the router divides by the sum of the gates that it chooses
        own = torch.allclose(listed.gates[:, : self.chosen], listed.weights, rtol=1e-2, atol=1e-6)
        self.scale = None if own else listed.weights.sum(-1, keepdim=True)
        missing = listed.experts.shape[1] - self.chosen
        self.dense = nn.functional.pad(listed.weights, (0, missing))  # [tokens, listed]
        self.added = torch.zeros_like(listed.gates)  # by the removal of each listed expert
        self._measure(torch.arange(len(listed.experts), device=places.device))

    def costs(self) -> Tensor:
        """What each expert would add to D, float64 [experts]; infinite for those that are gone."""
        added = self.added.flatten()[self.order].double()
        total = torch.segment_reduce(added, "sum", lengths=self.lengths)
        return (0.5 * total / len(self.added)).masked_fill(~self.stays, torch.inf)

    def remove(self, expert: int) -> None:
        """Remove an expert."""
        self.stays[expert] = False
        touched = (self.listed.experts == expert).any(-1)
        if self.listed.shares is not None:  # the weights of all tokens rise
            touched = torch.ones_like(touched)
        self._measure(touched.nonzero()[:, 0])

    def _measure(self, rows: Tensor) -> None:
        """Measure for some tokens what the removal of each of their experts adds."""
        experts = self.listed.experts[rows]
        here = self.stays[experts]  # [rows, listed]
        place = here.cumsum(-1)
        now, following = here & (place <= self.chosen), here & (place == self.chosen + 1)
        # the chosen ones, and each time without one of them: [rows, 1 + chosen, listed]
        each = now.byte().argsort(dim=-1, descending=True, stable=True)[:, : self.chosen]
        without = (now | following)[:, None].repeat(1, self.chosen, 1)
        without.scatter_(2, each[:, :, None], value=False)
        gates = self.listed.gates[rows, None] * torch.cat((now[:, None], without), 1)
        change = gates / self._divisors(rows, gates, experts.gather(1, each))
        change -= self.dense[rows, None]
        # δ · F δ of each, from the products of the outputs
        value = ((change @ self.listed.products[rows]) * change).sum(-1)
        added = (value[:, 1:] - value[:, :1]) * now.gather(1, each)
        self.added[rows] = torch.zeros_like(self.dense[rows]).scatter_(1, each, added)

    def _divisors(self, rows: Tensor, gates: Tensor, leaving: Tensor) -> Tensor:
        """What the router divides gates by, [rows, 1 + chosen, 1].

        Args:
            rows: the tokens.
            gates: of those that are chosen, zero for others.
            leaving: the numbers of the experts of which each is left out in turn, [rows, chosen].
        """
        if self.scale is not None:
            found = gates.sum(-1) / self.scale[rows]
        elif self.listed.shares is not None:
            shares = self.listed.shares[rows] * self.stays
            left = shares.sum(-1, keepdim=True)
            found = torch.cat((left, left - shares.gather(1, leaving)), 1)
        else:
            found = torch.ones_like(gates[..., 0])
        return found.clamp_min(1e-20)[..., None]


def divergence_scores(
    target: Target, windows: Tensor, folder: Path, progress: Progress, *, fast: bool = True
) -> dict[int, Tensor]:
    """The nats of `removal_scores` for all layers with experts, from one forward and one backward.

    F is the mean of g_t g_tᵀ over tokens, with the gradients g_t of the loss of `DrawnBackward` at
    the output of the experts. So ½ mean_t δ_t · F δ_t is the second-order term of the divergence if
    gradients do not depend on the changes. With (g_t · δ_t)² in its place, few tokens with large
    gradients decide, and the order is worse than that of the frequency.

    The outputs of twice as many experts as the router chooses are computed for each token, in
    another forward of the layer. A killed run continues with the layer in which it stopped.

    Approximations: a token does not count for experts that it did not choose; Gemma 4's scale of
    each expert counts in the sum by which the router divides.

    Args:
        target: the dense model, with opened experts.
        windows: calibration tokens [samples, sequence_length]; about `TOKENS` of them are used.
        folder: for hidden states, gradients, and a file for each finished layer.
        progress: receives every step.
        fast: whether products may be in bfloat16.

    Raises:
        ArchitectureError: a router chooses in a way that is not known.
    """
    drawn = DrawnBackward(target, cut_windows(windows, TOKENS), folder, progress, fast=fast)
    layers = drawn.records("experts: divergence", removals(drawn))
    every = chain.from_iterable(found.items() for found in layers)
    return {int(n): torch.tensor(x[REMOVED], dtype=torch.float64) for n, x in every}


def removals(drawn: DrawnBackward) -> Measured:
    """What finds the scores of the experts of a layer: `REMOVED`, by the number of the layer."""
    experts, tokens = drawn.target.architecture.experts, drawn.outer.windows.numel()

    @contextmanager
    def measured(number: int, layer: nn.Module) -> Iterator[dict[str, Any]]:
        found = dict[str, Any]()
        opened = next((m for m in layer.modules() if isinstance(m, OpenExperts)), None)
        if opened is None or experts is None:
            yield found
            return
        router = _Router(layer, experts, len(opened))
        with _fisher(opened) as total:
            yield found
        with torch.no_grad(), _Lists(router, opened, total / tokens).listening() as lists:
            for _ in drawn.outputs(number, layer):
                pass
        scores = removal_scores(lists.all(), len(opened))
        found[f"{number}"] = {REMOVED: scores.tolist()}

    return measured


@contextmanager
def _fisher(experts: OpenExperts) -> Iterator[Tensor]:
    """A context in which every backward adds Σ_t g_t g_tᵀ at the experts' output, [out, out]."""
    down: Any = experts[0].get_parameter("down_proj.weight")
    total = torch.zeros(len(down), len(down), device=down.device)

    def watch(module: OpenExperts, args: Any, out: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            # where inputs are scaled, all experts have outputs of their own, with equal gradients
            copies = len(experts) if isinstance(experts, ScaledExperts) else 1
            own = gradient[: len(gradient) // copies].float()
            total.addmm_(own.t(), own)

        if out.requires_grad:
            out.register_hook(add)

    with experts.register_forward_hook(watch):
        yield total


class _Router:
    """The module of a layer that chooses experts: the declared one, or the one around it."""

    def __init__(self, layer: nn.Module, experts: Experts, count: int) -> None:
        self.scaled, self.named, self.count = experts.scaled_inputs, experts.chosen, count
        path = experts.router
        while path and self._place(layer.get_submodule(path)) is None:
            path = path.rpartition(".")[0]
        self.module: Any = layer.get_submodule(path)
        place = self._place(self.module)
        if place is None:
            raise self._unknown(f"nothing at {experts.router} says how many experts it chooses")
        self.place = place
        own = getattr(self.module, place)
        self.chosen: int = own if place == "top_k" else getattr(own, self.named)
        self.listed = min(_LISTED * self.chosen, count)

    def _place(self, module: nn.Module) -> str | None:
        """The attribute that holds how many experts a module chooses, or a configuration of it."""
        if hasattr(module, "top_k"):
            return "top_k"
        return "config" if hasattr(getattr(module, "config", None), self.named) else None

    def _unknown(self, why: str) -> ArchitectureError:
        return ArchitectureError(
            f"{type(self.module).__name__}: {why}", remedy="choose by --experts-by reap"
        )

    @contextmanager
    def choosing(self, count: int) -> Iterator[None]:
        """A context in which the router chooses another number of experts."""
        before = getattr(self.module, self.place)
        changed: Any = count
        if self.place == "config":
            changed = copy.copy(before)
            setattr(changed, self.named, count)
        setattr(self.module, self.place, changed)
        try:
            yield
        finally:
            setattr(self.module, self.place, before)

    def _weights(self, out: tuple[Tensor, ...], count: int) -> Tensor:
        """The weights of all experts, [tokens, experts]; NaN for those that are not chosen."""
        if self.scaled:  # the inputs have the weights, so the outputs count as they are
            chosen = out[0].topk(count).indices
            weights = torch.ones_like(chosen, dtype=torch.float32)
        else:
            _, weights, chosen = out
        if chosen.shape[-1] != count:
            raise self._unknown(f"it chooses {chosen.shape[-1]} experts, and no other number")
        every = torch.full((len(chosen), self.count), torch.nan, device=chosen.device)
        return every.scatter_(1, chosen, weights.float())

    def order(self, out: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The listed experts in the router's order, their gates, and the weights of the chosen.

        Args:
            out: what the router returned for as many experts as are listed.
            args: what it was called with.
            kwargs: what it was called with, by name.
        """
        each = [self._weights(out, self.listed)]
        for count in reversed(range(self.chosen, self.listed)):
            with self.choosing(count):  # one fewer, so the last one of its order is left out
                each.insert(0, self._weights(self.module.forward(*args, **kwargs), count))
        known = [~weights.isnan() for weights in each]
        first = known[0].byte().argsort(dim=-1, descending=True, stable=True)[:, : self.chosen]
        others = [(more & ~less).byte().argmax(-1, keepdim=True) for less, more in pairwise(known)]
        experts = torch.cat([first, *others], -1)
        return experts, each[-1].gather(1, experts).nan_to_num(), each[0].gather(1, first)


class _Lists:
    """Lists the experts of each token while forwards of a layer pass.

    Args:
        router: of the layer.
        experts: of the layer.
        fisher: F, float32 [out, out].
    """

    def __init__(self, router: _Router, experts: OpenExperts, fisher: Tensor) -> None:
        self.router, self.experts, self.fisher = router, experts, fisher
        self.windows: list[Listed] = []

    @contextmanager
    def listening(self) -> Iterator[_Lists]:
        """A context in which the router chooses more experts than it would."""
        with (
            self.router.module.register_forward_hook(self._route, with_kwargs=True),
            self.experts.stages[-1].register_forward_hook(self._take),
            self.experts.register_forward_hook(self._finish),
            self.router.choosing(self.router.listed),
        ):
            yield self

    def all(self) -> Listed:
        """Of all windows."""
        columns = zip(*(vars(own).values() for own in self.windows), strict=True)
        joined: Any = (None if own[0] is None else torch.cat(own) for own in columns)
        return Listed(*joined)

    def _route(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Read the order of the router for a window."""
        self.order, self.gates, self.weights = self.router.order(out, args, kwargs)
        self.shares = None if self.router.scaled else _shares(out[0], self.order, self.weights)
        places = torch.arange(self.order.shape[1], device=self.order.device)
        self.places = places.new_zeros(len(self.order), self.router.count)
        self.places.scatter_(1, self.order, places.expand_as(self.order))
        self.outputs = self.fisher.new_zeros(*self.order.shape, len(self.fisher))

    def _take(self, stage: nn.Module, args: tuple[Tensor, Sent], outs: list[Tensor]) -> None:
        """Keep the outputs of some experts, [sent, out]."""
        (_, sent), (out,) = args, outs
        rows = sent.rows % len(self.outputs)  # where inputs are scaled, experts have rows each
        numbers = numbers_of(sent.counts).to(rows.device) + sent.experts[0]
        self.outputs[rows, self.places[rows, numbers]] = out.float()

    def _finish(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Replace the outputs of a window by their products."""
        with exact_matmuls(out.device):
            products = self.outputs @ self.fisher @ self.outputs.mT
        self.windows.append(Listed(self.order, self.gates, self.weights, products, self.shares))


def _shares(logits: Tensor, experts: Tensor, weights: Tensor) -> Tensor | None:
    """The probabilities of all experts if weights are a fixed multiple of them, else None."""
    shares = logits.float().softmax(-1)
    ratio = weights / shares.gather(1, experts[:, : weights.shape[1]]).clamp_min(1e-20)
    return shares if torch.allclose(ratio, ratio.mean(), rtol=1e-2) else None
