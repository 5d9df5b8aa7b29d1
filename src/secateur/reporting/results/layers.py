"""Which layer a tensor belongs to, by its name."""

from __future__ import annotations

__all__ = ["layer_of"]


def layer_of(name: str) -> int:
    """The number of a tensor's layer: the first in its name (experts have another); -1 for none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
