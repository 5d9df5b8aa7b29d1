"""Find the layer of a tensor by its name."""

from __future__ import annotations


def layer_of(name: str) -> int:
    """The layer number in a tensor's name: its first number (experts have a second); -1 if none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
