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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.architecture import family_of
from secateur.models.expert_layout import ExpertLayout, Experts, shapes_of


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
            weight, bias = parts[f"{name}.weight"], parts.get(f"{name}.bias")
            rows, columns = weight.shape
            linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
            linear.weight = weight
            if bias is not None:
                linear.bias = bias
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
            # [tokens of this expert, hidden]
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
        """The weights of the outputs of an expert, for each token that it received."""
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
    experts = (Expert(mine, layout, activation) for mine in parts)
    return sort(experts, layout).train(fused.training)
