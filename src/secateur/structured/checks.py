"""What makes a cut impossible before anything is designed."""

from __future__ import annotations

from typing import Any

from secateur.errors import ArchitectureError, RecipeError
from secateur.models.architecture import describe, text_config
from secateur.structured.cut import Cut, Sizes
from secateur.structured.expert_groups import refuse_uneven_groups

__all__ = ["check_configuration"]


def check_configuration(model: Any, cut: Cut, sizes: Sizes, pad: bool) -> None:
    """Refuse a cut that the configuration makes impossible.

    Raises:
        RecipeError: fewer experts than each token needs; padding where there is nothing to pad.
        ArchitectureError: the index of a layer has a meaning in this model.
    """
    config = text_config(model.config)
    experts = describe(model).experts
    needed = (experts.per_token(config) if experts else None) or 0
    for layer, kept in cut.experts.items():
        if len(kept) < needed:
            raise RecipeError(
                f"layer {layer}: the cut keeps {len(kept)} experts, but each token needs {needed}",
                remedy=f"keep {needed} experts or more in each layer",
            )
        refuse_uneven_groups(config, kept, sizes, layer)
    if pad and hasattr(model.config, "secateur_cut"):
        raise RecipeError(
            "this model cannot be padded: it was cut to different sizes before",
            remedy="cut its source model, with padding",
        )
    if cut.layers is not None and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ArchitectureError(
            "attention is scaled by the index of its layer, so layers cannot be cut",
            remedy="cut heads, neurons or hidden channels",
        )
