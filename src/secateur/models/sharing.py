"""Decoder layers that share weights with each other."""

from __future__ import annotations

from typing import Any

from secateur.errors import ArchitectureError
from secateur.models.architecture import Architecture


def shared_parameters(model: Any, architecture: Architecture) -> dict[str, str]:
    """Parameters of decoder layers that are shared: name → name of the first one.

    In a loaded model the parameters are the same objects. In a skeleton they are separate until
    they are tied, so its class names them.
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

    Pruning one layer would prune all of them, but the score would use the inputs of only one.

    Raises:
        ArchitectureError: names two parameters that are the same.
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
