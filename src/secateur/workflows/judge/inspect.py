"""Looking at a model without changing it."""

from __future__ import annotations

from secateur.diagnostics.audit import Audit, audit_checkpoint
from secateur.models.sources import resolve

__all__ = ["inspect_model"]


def inspect_model(model: str, *, trust_remote_code: bool = False) -> Audit:
    """Family, sizes, linears and the zeros really stored in a model.

    Args:
        model: hub id, folder, GGUF file or named sample.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """
    source = resolve(model, trust_remote_code=trust_remote_code)
    return audit_checkpoint(source.folder, trust_remote_code=trust_remote_code)
