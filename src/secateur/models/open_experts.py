"""Experts as modules: every expert has linears of its own, which are views of the fused tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.layout import ExpertLayout


class ExpertActivation(nn.Module):
    """What an expert computes between its linears, by the code of the class of transformers.

    Most classes multiply act(gate) by up; some clamp both first (gpt-oss, MiniMax-M3).

    Args:
        fused: the experts as transformers holds them.
        layout: their form.
    """

    def __init__(self, fused: nn.Module, layout: ExpertLayout) -> None:
        super().__init__()
        # In a tuple, because transformers would initialise a module of this class.
        self.fused = (without_parameters(fused),)
        self.interleaved = layout.interleaved
        self.own = has_own_gate(fused)

    def forward(self, *parts: Tensor) -> Tensor:
        """Gate and up, or up alone, [tokens, neurons] each, to [tokens, neurons]."""
        of: Any = self.fused[0]
        if len(parts) == 1 or not self.own:
            out: Tensor = of.act_fn(parts[0])
            return out if len(parts) == 1 else out * parts[1]
        if self.interleaved:
            together = torch.stack(parts, dim=-1).flatten(-2)
        else:
            together = torch.cat(parts, dim=-1)
        gated: Tensor = of._apply_gate(together)
        return gated


def has_own_gate(fused: nn.Module) -> bool:
    """Whether a class of experts replaces act(gate) · up by something else."""
    own = getattr(type(fused), "_apply_gate", None)
    return own is not None and own.__name__ != "_default_apply_gate"


def without_parameters(module: nn.Module) -> nn.Module:
    """A module with the settings of another, but none of its parameters."""
    shell = copy.copy(module)
    shell._parameters = {}
    return shell


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) for experts without a gate.

    Args:
        parts: weights [out, in] and biases [out], by names such as `gate_proj.weight`.
        layout: says which linears there are.
        activation: of the experts of a layer.
    """

    def __init__(
        self, parts: Mapping[str, nn.Parameter], layout: ExpertLayout, activation: ExpertActivation
    ) -> None:
        super().__init__()
        for name in layout.projections:
            linear = bare_linear(parts[f"{name}.weight"], parts.get(f"{name}.bias"))
            self.add_module(name, linear)
        self.first = layout.projections[:-1]
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        first = [self.get_submodule(name)(x) for name in self.first]
        out: Tensor = self.get_submodule("down_proj")(self.activation(*first))
        return out


class OpenExperts(nn.ModuleList):
    """The experts of a layer; replaces the fused module and is called like it.

    Args:
        experts: in the order of their numbers.
        layout: the form in which they were fused.

    Attributes:
        call_idle: whether an expert without tokens is called too, with no rows. Then all forwards
            pass all linears in the same order, and gradients reach every weight. Generation is
            faster without it.
    """

    call_idle = True

    def __init__(self, experts: Iterable[Expert], layout: ExpertLayout) -> None:
        super().__init__(experts)
        self.layout = layout

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ of weight times output, over the experts that a token is sent to.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: the experts of each token, [tokens, top_k].
            top_k_weights: their weights, of the same shape.
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = self.routed(top_k_index, number)
            if not len(token) and not self.call_idle:
                continue
            out = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total

    @staticmethod
    def routed(top_k_index: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that an expert receives, and its place among the choices of each token.

        On the meta device routing is unknown, so every expert gets every token: an upper bound.
        """
        if top_k_index.device.type == "meta":
            token = torch.arange(len(top_k_index), device="meta")
            return token, torch.zeros_like(token)
        token, place = torch.where(top_k_index == expert)
        return token, place

    def weights(self, given: Mapping[str, Tensor], expert: int) -> Tensor:
        """The weights of the outputs of an expert, for each token that it received.

        Args:
            given: the arguments of `forward`.
            expert: its number.
        """
        return given["top_k_weights"][self.routed(given["top_k_index"], expert)]


class ScaledExperts(OpenExperts):
    """Experts whose inputs the model has multiplied by the router's weights (Llama 4).

    The module gets every token once for each expert. A token that is not sent to an expert is zero,
    and its output would be zero too, so the expert does not receive it.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[experts · tokens, hidden] to the same shape."""
        every = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        total = torch.zeros_like(every)
        for number, expert in enumerate(self):
            token = self.sent(every[number])
            if not len(token) and not self.call_idle:
                continue
            total[number].index_add_(0, token, expert(every[number][token]).to(total.dtype))
        return total.view_as(hidden_states)

    @staticmethod
    def sent(rows: Tensor) -> Tensor:
        """The tokens that an expert receives: those that are not zero."""
        if rows.device.type == "meta":
            return torch.arange(len(rows), device="meta")
        return rows.any(-1).nonzero().flatten()

    def weights(self, given: Mapping[str, Tensor], expert: int) -> Tensor:
        """Ones: the outputs of an expert are added up as they are."""
        every = given["hidden_states"].view(len(self), -1, given["hidden_states"].shape[-1])
        return torch.ones(len(self.sent(every[expert])), device=every.device)


def bare_linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear around an existing weight [out, in] and bias [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def opened(fused: nn.Module, layout: ExpertLayout, *, scaled_inputs: bool = False) -> OpenExperts:
    """The experts of a fused module; their weights are views of its parameters."""
    parts: list[dict[str, nn.Parameter]] = []
    for name in layout.names:
        parameter = fused.get_parameter(name)
        views = layout.apart(name, parameter.detach())
        parts = parts or [{} for _ in views]
        for mine, own in zip(parts, views, strict=True):
            for part, view in own.items():
                mine[part] = nn.Parameter(view, requires_grad=parameter.requires_grad)
    activation = ExpertActivation(fused, layout)
    sort = ScaledExperts if scaled_inputs else OpenExperts
    experts = (Expert(mine, layout, activation) for mine in parts)
    return sort(experts, layout).train(fused.training)
