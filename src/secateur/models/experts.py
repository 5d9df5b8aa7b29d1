"""The experts of a loaded model: each becomes a module, with linears that are views.

transformers multiplies with slices of tensors that hold all experts of a layer, so no hook sees the
inputs of an expert. Which code does this depends on `experts_implementation`. After opening, the
experts are modules, whatever that setting is, and gate, up and down of each are linears [out, in]
like any others: statistics, halted forwards, solvers and packed matrices need no special case.
`expert_layout.py` describes how experts are fused, and the family declares it. For a family that
is not declared, the class of transformers says it itself.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.architecture import family_of
from secateur.models.expert_layout import ExpertLayout, Experts, shapes_of

AT_ONCE = 128
"""The most experts that get their inputs together."""

_LANES = 64  # values that a processor computes at once, at most


def _form_of(path: str, module: nn.Module, declared: Experts | None) -> Experts | None:
    """How a module fuses experts; None if it is no such module, or in a form that is not known."""
    if declared is not None and path.endswith("." + declared.module):
        return declared if declared.layout.fits(shapes_of(module)) else None
    layout = ExpertLayout.of_class(module)
    return None if layout is None else Experts(path, layout=layout)


def open_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Open all experts of a model whose form is known, in place."""
    from transformers.initialization import no_init_weights

    family, replaced = family_of(model), dict[str, nn.Module]()
    if family is not None and family.experts is None:
        return replaced
    # Experts receive any number of rows. For each one oneDNN prepares a product of 0.3 MiB, and
    # torch would keep 2,048 of them. It reads these names before its first product.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    declared = family.experts if family else None
    for path, module in list(model.named_modules()):
        form = _form_of(path, module, declared)
        if form is not None:
            replaced[path] = module
            with no_init_weights():  # the linears already have their weights
                _put(model, path, _opened(module, form.layout, scaled_inputs=form.scaled_inputs))
    return replaced


@contextmanager
def opened_experts(model: nn.Module) -> Iterator[None]:
    """Opens the experts of a loaded model for a while; changes to their weights stay."""
    replaced = open_experts(model)
    try:
        yield
    finally:
        for path, fused in replaced.items():
            experts = model.get_submodule(path)
            assert isinstance(experts, OpenExperts)
            _close(_opened(fused, experts.layout), experts)
            _put(model, path, fused)


@torch.no_grad()
def _close(views: nn.Module, experts: nn.Module) -> None:
    """Copy the weights of opened experts back if they are no longer views."""
    for name, was in views.named_parameters():
        now = experts.get_parameter(name)
        if now.data_ptr() != was.data_ptr():
            was.copy_(now)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a module by another."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


class ExpertActivation(nn.Module):
    """What an expert computes between its linears, by the code of the class of transformers.

    Most classes multiply act(gate) by up; some clamp both first (gpt-oss, MiniMax-M3).
    """

    def __init__(self, fused: nn.Module, layout: ExpertLayout) -> None:
        super().__init__()
        shell = copy.copy(fused)
        shell._parameters = {}
        # In a tuple, because transformers would initialise a module of this class.
        self.fused = (shell,)
        self.joined = layout.joined
        own = getattr(type(fused), "_apply_gate", None)  # in the place of act(gate) · up
        self.own = own is not None and own.__name__ != "_default_apply_gate"

    def forward(self, *parts: Tensor) -> Tensor:
        """Gate and up, or up alone, [tokens, neurons] each, to [tokens, neurons]."""
        of: Any = self.fused[0]
        if len(parts) == 1 or not self.own:
            out: Tensor = of.act_fn(parts[0])
            return out if len(parts) == 1 else out * parts[1]
        gated: Tensor = of._apply_gate(self.joined(*parts))
        return gated


class Expert(nn.Module):
    """The linears of down(act(gate(x)) · up(x)), or of down(act(up(x))) for experts without a gate.

    Args:
        parts: weights [out, in] and biases [out], by names such as `gate_proj.weight`.
        layout: says which linears there are.
    """

    def __init__(self, parts: Mapping[str, nn.Parameter], layout: ExpertLayout) -> None:
        super().__init__()
        for name in layout.projections:
            weight, bias = parts[f"{name}.weight"], parts.get(f"{name}.bias")
            rows, columns = weight.shape
            linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
            linear.weight = weight
            if bias is not None:
                linear.bias = bias
            self.add_module(name, linear)


@dataclass(frozen=True)
class Sent:
    """The tokens that some experts of a layer receive, sorted by expert.

    Attributes:
        experts: the numbers of the experts.
        counts: the number of tokens of each.
        rows: the row of each token among the hidden states, [sent].
        weights: what the model multiplies each output by, [sent, 1].
        places: of the tokens of each row among those of all experts, [rows, top_k], ascending.
        first: the place of the first token of these experts.
    """

    experts: Sequence[int]
    counts: list[int]
    rows: Tensor
    weights: Tensor
    places: Tensor
    first: int

    def taken(self, x: Tensor, experts: Sequence[int]) -> Tensor:
        """The rows of some of the experts."""
        pairs = zip(self.experts, x.split(self.counts), strict=True)
        return torch.cat([rows for number, rows in pairs if number in experts])

    def add(self, total: Tensor, out: Tensor) -> None:
        """Add the outputs of the experts [sent, hidden] to the sums of all tokens [rows, hidden].

        A token adds its outputs in the order of the experts, so a GPU has the same bits in every
        run.
        """
        added, places = (out * self.weights).to(total.dtype), self.places
        if len(out) < places.numel():  # other experts have the rest: zero here
            added, places = nn.functional.pad(added, (0, 0, 0, 1)), places - self.first
            places = torch.where((places < 0) | (places > len(out)), len(out), places)
        for one in added[places].unbind(1):
            total += one


class ExpertStage(nn.Module):
    """The linears that get their inputs together, in all experts of a layer: gate and up, or down.

    A hook on it sees the inputs of many experts at once. They arrive as `(x, sent)`.

    Args:
        experts: of the layer.
        names: the linears of each expert.
        scattered: whether x has the hidden states of all tokens. Otherwise it has a row for each
            token that is sent.
    """

    def __init__(self, experts: OpenExperts, names: Sequence[str], *, scattered: bool) -> None:
        super().__init__()
        self.experts = (experts,)  # in a tuple, because they are no part of the stage
        self.names, self.scattered = names, scattered

    def inputs(self, x: Tensor, sent: Sent) -> Tensor:
        """The inputs of the experts, [sent, in]."""
        return x[sent.rows] if self.scattered else x

    def only(self, x: Tensor, sent: Sent, experts: Sequence[int]) -> tuple[Tensor, Sent]:
        """What arrives for some of the experts."""
        if list(experts) == list(sent.experts):
            return x, sent
        counts = [sent.counts[number - sent.experts[0]] for number in experts]
        rows, weights = (sent.taken(own, experts) for own in (sent.rows, sent.weights))
        theirs = replace(sent, experts=experts, counts=counts, rows=rows, weights=weights)
        return x if self.scattered else sent.taken(x, experts), theirs

    def forward(self, x: Tensor, sent: Sent) -> list[Tensor]:
        """The outputs [sent, out] of each linear."""
        every, x = self.experts[0], self.inputs(x, sent)
        experts = list(every)[sent.experts[0] : sent.experts[-1] + 1]
        called = [i for i, count in enumerate(sent.counts) if count or every.call_idle]
        counts, parts, outs = [sent.counts[i] for i in called], list[Tensor](), []
        for name in self.names:
            linears: list[Any] = [experts[i]._modules[name] for i in called]
            out = _grouped(linears, x, counts)
            if out is None:
                # Nothing is the same for experts without tokens, not even the place in memory.
                parts = parts or [rows if len(rows) else rows.clone() for rows in x.split(counts)]
                out = torch.cat([_product(*own) for own in zip(linears, parts, strict=True)])
            outs.append(out)
        return outs


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear is nothing but its weight and bias, and nobody listens."""
    return type(linear) is nn.Linear and not (linear._forward_pre_hooks or linear._forward_hooks)


def _product(linear: Any, x: Tensor) -> Tensor:
    """The outputs of a linear, without the cost of a call where nothing else happens in it."""
    if not _is_plain(linear):
        return cast("Tensor", linear(x))
    own = linear._parameters
    return nn.functional.linear(x, own["weight"], own["bias"])


def _grouped(linears: Sequence[Any], x: Tensor, counts: Sequence[int]) -> Tensor | None:
    """The outputs of linears for their rows of x, as one product of a GPU in bfloat16.

    None where there is no such product. It has no backward here.
    """
    if (
        x.device.type != "cuda"
        or torch.is_grad_enabled()
        or not hasattr(nn.functional, "grouped_mm")
    ):
        return None
    rounded = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if rounded else x.dtype
    able = torch.cuda.get_device_capability(x.device) >= (8, 0)
    rows, columns = linears[0].weight.shape
    fits = rows % 8 == columns % 8 == 0  # it reads 16 bytes at a time
    if dtype != torch.bfloat16 or not able or not fits or not all(map(_is_plain, linears)):
        return None
    weights = torch.stack([own.weight for own in linears]).to(dtype)
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(x.device)
    out: Tensor = nn.functional.grouped_mm(x.to(dtype), weights.mT, offs=ends)
    if linears[0].bias is None:
        return out
    biases = torch.stack([own.bias for own in linears]).to(dtype)
    return out + biases[numbers_of(counts).to(x.device)]


def numbers_of(counts: Sequence[int]) -> Tensor:
    """The number of the group of each row, given the rows of each group."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


class OpenExperts(nn.ModuleList):
    """The experts of a layer; replaces the fused module and is called like it.

    Attributes:
        call_idle: whether an expert without tokens is called too, with no rows. Then gradients
            reach every weight. Generation is faster without it.
        at_once: the number of experts that get their inputs together. A halted forward holds
            the outputs of gate and up for so many.
        stages: gate and up of all experts, and down of all experts.
    """

    call_idle, at_once = True, AT_ONCE

    def __init__(
        self, experts: Iterable[Expert], layout: ExpertLayout, activation: ExpertActivation
    ) -> None:
        super().__init__(experts)
        self.layout, (*first, last) = layout, layout.projections
        # in a list and a tuple, because they are no modules of this one
        stages = (first, True), ([last], False)
        self.stages = [ExpertStage(self, names, scattered=every) for names, every in stages]
        self.activation = (activation,)

    def forward(self, hidden_states: Tensor, *router: Tensor, **named: Tensor) -> Tensor:
        """Σ of weight times output, over the experts that a token is sent to.

        Args:
            hidden_states: [tokens, hidden].
            *router: as in `sent`.
            **named: as in `sent`.
        """
        total = torch.zeros_like(hidden_states)
        for sent in self.sent(hidden_states, *router, **named):
            if self.call_idle or len(sent.rows):
                sent.add(total, self.outputs(hidden_states, sent))
        return total

    def outputs(self, hidden_states: Tensor, sent: Sent) -> Tensor:
        """The outputs of experts for the tokens that they receive, [sent, hidden]."""
        first, last = self.stages
        (out,) = last(self._activated(first(hidden_states, sent), sent), sent)
        return out

    def _activated(self, first: Sequence[Tensor], sent: Sent) -> Tensor:
        """What enters the last linears, from the outputs [sent, neurons] of the first ones."""
        (activation,) = self.activation
        if first[0].device.type != "cpu" or first[0].shape[1] % _LANES == 0:
            return cast("Tensor", activation(*first))
        # A processor computes what is left behind its lanes in another way, so that experts alone
        # and experts together would differ in the last bit.
        parts = zip(*(x.split(sent.counts) for x in first), strict=True)
        return torch.cat([activation(*own) for own in parts])

    def sent(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Iterator[Sent]:
        """The tokens that the experts receive, a batch of experts at a time.

        On the meta device routing is unknown, so all experts receive as many.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: the experts of each token, [tokens, top_k].
            top_k_weights: their weights, of the same shape.
        """
        ordered, order = top_k_index.flatten().sort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        weights = top_k_weights.flatten()[order, None]
        limits = torch.arange(len(self) + 1, device=order.device)
        rows, by_row = order // top_k_index.shape[1], places.view_as(top_k_index)
        yield from self._batches(rows, weights, by_row.sort(-1).values, ordered, limits)

    def _batches(
        self, rows: Tensor, weights: Tensor, places: Tensor, ordered: Tensor, limits: Tensor
    ) -> Iterator[Sent]:
        """What each batch of experts receives.

        Args:
            rows: as in `Sent`, for all experts.
            weights: as in `Sent`, for all experts.
            places: as in `Sent`.
            ordered: a number for each token, ascending.
            limits: the number at which each expert begins, and the end of the last one's.
        """
        if ordered.device.type == "meta":
            bounds = [len(ordered) * number // len(self) for number in range(len(self) + 1)]
        else:
            bounds = torch.searchsorted(ordered, limits).tolist()
        for start in range(0, len(self), self.at_once):
            experts = range(start, min(start + self.at_once, len(self)))
            here = slice(bounds[start], bounds[experts.stop])
            counts = [bounds[number + 1] - bounds[number] for number in experts]
            yield Sent(experts, counts, rows[here], weights[here], places, here.start)


class ScaledExperts(OpenExperts):
    """Experts whose inputs the model has multiplied by the router's weights (Llama 4).

    The module gets every token once for each expert. A token that is not sent to an expert is zero,
    and its output would be zero too, so the expert does not receive it.
    """

    def sent(self, hidden_states: Tensor) -> Iterator[Sent]:  # type: ignore[override]
        """The tokens that the experts receive: those that are not zero."""
        count, device = len(hidden_states), hidden_states.device
        rows = every = torch.arange(count, device=device)
        places = every[:, None]
        if device.type != "meta":
            used = hidden_states.any(-1)
            rows = every[used]
            # `count` is behind the places of all tokens that are sent
            places = torch.where(used, used.cumsum(0) - 1, count)[:, None]
        limits = torch.arange(len(self) + 1, device=device) * (count // len(self))
        weights = hidden_states.new_ones(len(rows), 1)
        yield from self._batches(rows, weights, places, rows, limits)


def opened_form(fused: nn.Module, declared: Experts) -> OpenExperts:
    """The experts of a fused module as modules, which it does not become.

    Raises:
        ArchitectureError: it has another form than its family declares.
    """
    if not declared.layout.fits(shapes_of(fused)):
        raise ArchitectureError(f"its experts ({type(fused).__name__}) have an unknown form")
    return _opened(fused, declared.layout, scaled_inputs=declared.scaled_inputs)


def _opened(fused: nn.Module, layout: ExpertLayout, *, scaled_inputs: bool = False) -> OpenExperts:
    """The experts of a fused module; their weights are views of its parameters."""
    parts: list[dict[str, nn.Parameter]] = []
    for name in layout.tensors:
        parameter = fused.get_parameter(name)
        views = layout.apart(name, parameter.detach())
        parts = parts or [{} for _ in views]
        for mine, own in zip(parts, views, strict=True):
            for part, view in own.items():
                mine[part] = nn.Parameter(view, requires_grad=parameter.requires_grad)
    activation = ExpertActivation(fused, layout)
    sort = ScaledExperts if scaled_inputs else OpenExperts
    experts = (Expert(mine, layout) for mine in parts)
    return sort(experts, layout, activation).train(fused.training)
