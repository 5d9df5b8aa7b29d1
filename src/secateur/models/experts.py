"""Opens mixtures of experts: every expert becomes a module with linears of its own.

transformers multiplies with slices of tensors that hold all experts of a layer, so no hook sees the
inputs of an expert. Which code does this depends on `experts_implementation`. After opening, the
experts are modules, whatever that setting is, and gate, up and down of each are linears [out, in]
like any others: statistics, halted forwards, solvers and packed matrices need no special case.
`expert_layout.py` describes how experts are fused, and the family declares it. For a family that is
not declared, the class of transformers says it itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.architecture import family_of
from secateur.models.layout import Experts, flagged_layout
from secateur.models.open_experts import opened


def form_of(path: str, module: nn.Module, declared: Experts | None) -> Experts | None:
    """How a module fuses experts; None if it is no such module, or in a form that is not known.

    Args:
        path: of the module.
        module: any module of the model.
        declared: by the family of the model.
    """
    if declared is not None and path.endswith("." + declared.module):
        shapes = {name: p.shape for name, p in module.named_parameters(recurse=False)}
        return declared if declared.layout.fits(shapes) else None
    layout = flagged_layout(module)
    return None if layout is None else Experts(path, layout=layout)


def open_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Open all experts of a model whose form is known, in place.

    Returns:
        The replaced fused modules, by path; empty for a model without experts.
    """
    from transformers.initialization import no_init_weights

    family, replaced = family_of(model), {}
    declared = family.experts if family else None
    for path, module in list(model.named_modules()):
        form = form_of(path, module, declared)
        if form is not None:
            replaced[path] = module
            with no_init_weights():  # the linears already have their weights
                put(model, path, opened(module, form.layout, scaled_inputs=form.scaled_inputs))
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
        ArchitectureError: their form is unknown.
    """
    for path, module in layers.named_modules():
        for parameter in module.parameters(recurse=False):
            if of_unknown_experts(path, module, parameter):
                raise ArchitectureError(
                    f"the experts ({type(module).__name__}) are fused into one tensor, in a form "
                    "that is not known for this family",
                    where=path,
                    remedy="declare how it stores them: see CONTRIBUTING.md, 'Add a model family'",
                )


@contextmanager
def opened_experts(model: nn.Module) -> Iterator[None]:
    """Opens the experts of a loaded model for a while; changes to their weights stay."""
    replaced = open_experts(model)
    try:
        yield
    finally:
        family = family_of(model)
        for path, fused in replaced.items():
            form = form_of(path, fused, family.experts if family else None)
            assert form is not None
            close(opened(fused, form.layout), model.get_submodule(path))
            put(model, path, fused)


@torch.no_grad()
def close(views: nn.Module, experts: nn.Module) -> None:
    """Copy the weights of opened experts back if they are no longer views.

    Args:
        views: the experts of the fused module, opened anew.
        experts: the experts as they were used.
    """
    for name, was in views.named_parameters():
        now = experts.get_parameter(name)
        if now.data_ptr() != was.data_ptr():
            was.copy_(now)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a module by another."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
