"""What makes a cut impossible before anything is designed."""

from __future__ import annotations

from typing import Any

from secateur.errors import ArchitectureError, RecipeError
from secateur.models.architecture import describe, setting, text_config
from secateur.structured.cut import QUERIES_OF_A_GROUP, Cut, Sizes, find
from secateur.structured.expert_groups import refuse_uneven_groups


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
    refuse_uneven_heads(model, cut)
    refuse_sparse_activations(config, cut)
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


def refuse_uneven_heads(model: Any, cut: Cut) -> None:
    """Refuse to cut heads where layers have different numbers of query heads in a KV group.

    Raises:
        ArchitectureError: they have.
    """
    architecture = describe(model)
    if not (cut.groups or cut.queries) or architecture.couplings is None:
        return
    attention = [find(x, architecture.couplings.attention) for x in architecture.layers(model)]
    named = (getattr(module, QUERIES_OF_A_GROUP, None) for module in attention)
    found = sorted({int(number) for number in named if number})
    if len(found) > 1:
        raise ArchitectureError(
            f"heads cannot be cut, because layers have {' or '.join(map(str, found))} "
            "query heads in a KV group",
            remedy="cut FFN neurons, experts or layers",
        )


def refuse_sparse_activations(config: Any, cut: Cut) -> None:
    """Refuse to cut FFN neurons whose activations are chosen by their mean and deviation.

    Raises:
        ArchitectureError: a layer with such a feed-forward would lose neurons.
    """
    sparse = setting(config, "activation_sparsity_pattern") or ()
    for layer, kept in cut.neurons.items():
        if kept and layer < len(sparse) and sparse[layer] > 0:
            raise ArchitectureError(
                f"layer {layer}: FFN neurons cannot be cut, because their activations are chosen "
                f"by the mean and deviation of all neurons (activation sparsity {sparse[layer]:g})",
                remedy="cut neurons of the other layers",
            )
