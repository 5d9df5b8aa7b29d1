"""Decoder layers that share weights with each other."""

from __future__ import annotations

from typing import Any

from secateur.errors import ArchitectureError
from secateur.models.architecture import Architecture

__all__ = ["refuse_shared", "shared_parameters"]


def shared_parameters(model: Any, architecture: Architecture) -> dict[str, str]:
    """Parameters of decoder layers that are the same as another's: name → name of the first.

    A loaded model shows it by the parameters themselves. In a skeleton they are apart until they
    are tied; there its class says so.
    """
    prefix = architecture.layers_path + "."
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and name.startswith(prefix):
            found[name] = other
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found.update({name: other for name, other in tied.items() if name.startswith(prefix)})
    return found


def refuse_shared(model: Any, architecture: Architecture) -> None:
    """Refuse decoder layers that share weights with each other.

    What one layer loses all of them lose, but its score would know the inputs of one of them only.

    Raises:
        ArchitectureError: naming two parameters that are one.
    """
    shared = shared_parameters(model, architecture)
    if shared:
        name, other = next(iter(shared.items()))
        raise ArchitectureError(
            f"{len(shared)} parameters of decoder layers are shared with other layers; the first "
            f"is that of {other}",
            where=name,
            remedy="pruning layers that share weights is not supported",
        )
