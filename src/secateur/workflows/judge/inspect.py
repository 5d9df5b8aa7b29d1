"""Looking at a model without changing it."""

from __future__ import annotations

from secateur.diagnostics.audit import audit_checkpoint
from secateur.errors import RecipeError
from secateur.models.sources import resolve
from secateur.reporting.results.inspect import InspectResult

__all__ = ["inspect"]


def inspect(model: str, *, layer: int = 0, trust_remote_code: bool = False) -> InspectResult:
    """Family, sizes, linears and the zeros really stored in a model.

    Args:
        model: hub id, folder, GGUF file or named sample.
        layer: the decoder layer whose linears are listed; -1 for all.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        RecipeError: the model has no such layer.
    """
    source = resolve(model, trust_remote_code=trust_remote_code)
    audit = audit_checkpoint(source.folder, trust_remote_code=trust_remote_code)
    if layer >= audit.num_hidden_layers:
        raise RecipeError(
            f"there is no decoder layer {layer}: the model has {audit.num_hidden_layers}",
            where="--layer",
            remedy=f"use a number from 0 to {audit.num_hidden_layers - 1}, or -1 for all",
        )
    return InspectResult(model, audit, layer)
