"""Opens mixtures of experts: every expert becomes a module with three linears.

transformers stores the experts of a layer in two tensors, [experts, 2 · neurons, hidden] for gate
and up and [experts, hidden, neurons] for down. It multiplies with slices of them, so no hook sees
the inputs of an expert. After opening, gate, up and down of each expert are linears [out, in] like
any others: statistics, halted forwards, solvers and packed matrices need no special case. Most
checkpoints also store experts one by one, under names that the family declares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.architecture import PROJECTIONS, Experts, family_of
from secateur.models.checkpoint import CheckpointReader

__all__ = [
    "Expert",
    "OpenExperts",
    "expert_renamings",
    "of_unknown_experts",
    "open_experts",
    "opened_experts",
    "refuse_fused",
    "split_stored",
]

FUSED = ("gate_up_proj", "down_proj")
"""The parameters in which transformers stores experts."""


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)).

    Args:
        gate: weight [neurons, hidden].
        up: weight [neurons, hidden].
        down: weight [hidden, neurons].
        act_fn: the activation.
    """

    def __init__(
        self, gate: nn.Parameter, up: nn.Parameter, down: nn.Parameter, act_fn: nn.Module
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (bare_linear(w) for w in (gate, up, down))
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class OpenExperts(nn.ModuleList):
    """The experts of a layer; replaces the fused module and is called like it.

    Attributes:
        call_idle: whether an expert without tokens is called too, with no rows. Then all forwards
            pass all linears in the same order, and gradients reach every weight. Generation is
            faster without it.
    """

    call_idle = True

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


def bare_linear(weight: nn.Parameter) -> nn.Linear:
    """A linear without bias around an existing weight [out, in]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def is_fused(module: nn.Module) -> bool:
    """Whether these are experts as transformers stores them: gate before up, no biases."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != set(FUSED) or any(p.ndim != 3 for p in own.values()):
        return False
    gate_up, down = (own[name].shape for name in FUSED)
    return gate_up == (down[0], 2 * down[2], down[1])


def opened(fused: nn.Module) -> OpenExperts:
    """The experts of a fused module; their weights are views of its two parameters."""
    gate_up, down = (fused.get_parameter(name) for name in FUSED)
    neurons = down.shape[2]

    def view(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.detach(), requires_grad=gate_up.requires_grad)

    experts = OpenExperts(
        Expert(
            view(gate_up[e, :neurons]),
            view(gate_up[e, neurons:]),
            view(down[e]),
            fused.act_fn,  # type: ignore[arg-type]
        )
        for e in range(len(down))
    )
    return experts.train(fused.training)


def open_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Open all experts of a model of a declared family, in place.

    Returns:
        The replaced fused modules, by path; empty for a model without experts.
    """
    from transformers.initialization import no_init_weights

    family, replaced = family_of(model), {}
    if family is None or family.experts is None:
        return {}
    for path, module in list(model.named_modules()):
        if path.endswith("." + family.experts.module) and is_fused(module):
            replaced[path] = module
            with no_init_weights():  # the linears already have their weights
                put(model, path, opened(module))
    return replaced


def of_unknown_experts(path: str, module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter contains matrices of experts in an unknown layout.

    Args:
        path: of the module.
        module: the owner of the parameter.
        parameter: within a decoder layer; the caller excludes routers.
    """
    named = "expert" in f"{path}.{type(module).__name__}".lower()
    return named and parameter.ndim > 1 and not isinstance(module, nn.Linear)


def refuse_fused(layers: nn.Module) -> None:
    """Refuse decoder layers with experts that cannot be opened.

    Raises:
        ArchitectureError: their family is not declared, or their form is unknown.
    """
    for path, module in layers.named_modules():
        for parameter in module.parameters(recurse=False):
            if of_unknown_experts(path, module, parameter):
                raise ArchitectureError(
                    f"the experts ({type(module).__name__}) are fused into one tensor, in a form "
                    "that is not known for this family",
                    where=path,
                    remedy="mixtral, qwen2_moe and qwen3_moe are known; see CONTRIBUTING.md, 'Add "
                    "a model family'",
                )


@contextmanager
def opened_experts(model: nn.Module) -> Iterator[None]:
    """Opens the experts of a loaded model for a while; changes to their weights stay."""
    replaced = open_experts(model)
    try:
        yield
    finally:
        for path, fused in replaced.items():
            close(fused, model.get_submodule(path))
            put(model, path, fused)


@torch.no_grad()
def close(fused: nn.Module, experts: nn.Module) -> None:
    """Copy the weights of opened experts back if they are no longer views."""
    for name, was in opened(fused).named_parameters():
        now = experts.get_parameter(name)
        if now.data_ptr() != was.data_ptr():
            was.copy_(now)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a module by another."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def expert_renamings(experts: Experts) -> Mapping[str, str]:
    """Patterns in stored names of experts' linears, and what replaces them; as in transformers."""
    where = re.escape(experts.module.rpartition(".")[2])
    return {
        rf"(\.{where}\.\d+)\.{stored}\.": rf"\1.{name}."
        for stored, name in zip(experts.stored, PROJECTIONS, strict=True)
        if stored != name
    }


def split_stored(reader: CheckpointReader, experts: Experts) -> None:
    """Show experts that are stored fused as single tensors, named like those stored one by one.

    The rows of one expert's gate, up or down are contiguous, so each is a range of bytes.
    """
    leaf = experts.module.rpartition(".")[2]
    gate, up, down = experts.stored
    parts: dict[str, Callable[[Any], list[tuple[str, int]]]] = {
        FUSED[0]: lambda shape: [(gate, shape[1] // 2), (up, shape[1] // 2)],
        FUSED[1]: lambda shape: [(down, shape[1])],
    }
    for name in list(reader.entries):
        owner, _, last = name.rpartition(".")
        shape = reader.entries[name].shape
        if last in parts and owner.endswith("." + leaf) and len(shape) == 3:
            reader.split(
                name,
                {
                    f"{owner}.{e}.{part}.weight": (rows, shape[2])
                    for e in range(shape[0])
                    for part, rows in parts[last](shape)
                },
            )
