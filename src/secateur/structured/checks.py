"""What makes a cut impossible before anything is designed."""

from __future__ import annotations

from typing import Any

from secateur.errors import ArchitectureError, RecipeError
from secateur.models.architecture import Architecture, text_config
from secateur.models.skeleton import stored_buffers
from secateur.structured.cut import Cut

__all__ = ["check_configuration", "refuse_buffers"]


def refuse_buffers(model: Any, architecture: Architecture) -> None:
    """Refuse decoder layers that store values other than parameters: a cut would lose them.

    Raises:
        ArchitectureError: names the first one.
    """
    prefix = architecture.layers_path + "."
    found = [name for name in stored_buffers(model) if name.startswith(prefix)]
    if found:
        raise ArchitectureError(
            f"{len(found)} buffers of the decoder layers are stored, and a cut would not keep them",
            where=found[0],
            remedy="this family cannot be cut yet",
        )


def check_configuration(model: Any, cut: Cut, pad: bool) -> None:
    """Refuse a cut that the configuration makes impossible.

    Raises:
        RecipeError: fewer experts than each token needs; padding where there is nothing to pad.
        ArchitectureError: the index of a layer has a meaning in this model.
    """
    config = text_config(model.config)
    needed = getattr(config, "num_experts_per_tok", None) or 0
    for layer, kept in cut.experts.items():
        if len(kept) < needed:
            raise RecipeError(
                f"layer {layer}: the cut keeps {len(kept)} experts, but each token needs {needed}",
                remedy=f"keep {needed} experts or more in each layer",
            )
    if pad and hasattr(config, "secateur_cut"):
        raise RecipeError(
            "this model cannot be padded: it was cut to different sizes before",
            remedy="cut its source model, with padding",
        )
    if cut.layers is not None and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ArchitectureError(
            "attention is scaled by the index of its layer, so layers cannot be cut",
            remedy="cut heads, neurons or hidden channels",
        )
