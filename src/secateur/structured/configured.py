"""A smaller model before any of its tensors is made, and the configuration that says its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.models.architecture import Architecture, setting, text_config
from secateur.models.layout import Couplings
from secateur.structured.cut import Sizes
from secateur.structured.edits import Edit, LayerCut
from secateur.structured.layer_settings import kept_settings


@dataclass(frozen=True)
class Design:
    """A smaller model, before any of its tensors is made.

    Attributes:
        uncut: the uncut model, with experts as transformers stores them.
        architecture: of the uncut model.
        sizes: of the uncut model.
        layers: for each kept layer, the units it keeps.
        skeleton: the cut model, parameters on the meta device.
        edits: of each parameter, by its name in the cut model.
    """

    uncut: Any
    architecture: Architecture
    sizes: Sizes
    layers: list[LayerCut]
    skeleton: Any
    edits: Mapping[str, Edit]

    @property
    def varied(self) -> bool:
        """Whether the result needs its own code to load."""
        return hasattr(self.skeleton.config, "secateur_cut")

    @property
    def heads_per_group(self) -> int:
        """Remaining query heads of each KV group."""
        for layer in self.layers:
            if layer.queries is not None:
                return len(layer.queries) // self.sizes.groups[layer.index]
        return self.sizes.heads_per_group


def layer_changes(model: Any, made: Design, hidden: Any) -> dict[str, Any]:
    """The changed entries of the configuration, for fewer layers or a narrower stream."""
    config, kept = text_config(model.config), [layer.index for layer in made.layers]
    count = len(made.architecture.layers(model))
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changes: dict[str, Any] = {key: len(kept)}
    if count != len(kept):
        changes |= kept_settings(config.to_dict(), kept, count)
    if getattr(config, "decoder_sparse_step", None) is not None and count != len(kept):
        dense = [new for new, i in enumerate(kept) if not made.sizes.experts[i]]
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if hidden is not None and getattr(config, "rms_norm_eps", None) is not None:
        changes["rms_norm_eps"] = config.rms_norm_eps * made.sizes.hidden / len(hidden)
    return changes


def layer_sizes(made: Design) -> dict[str, list[int]]:
    """The number of units of each kept layer, by kind; 0 in layers of another kind."""
    kinds = ("groups", "neurons", "experts")
    return {name: [kept_count(made, layer, name) for layer in made.layers] for name in kinds}


def uniform(sizes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """One size of each kind: the largest of all layers, and the smallest where they differ.

    A class may compute the sizes of some layers from one entry: late layers of small Gemma 4 have
    twice as many neurons.
    """
    least = {name: min(filter(None, counts), default=0) for name, counts in sizes.items()}
    most = {name: max(counts) for name, counts in sizes.items()}
    return [most] if least == most else [most, least]


def differ(counts: Sequence[int]) -> bool:
    """Whether layers that have such units have different numbers of them."""
    return len({count for count in counts if count}) > 1


def own_sizes(
    made: Design,
    couplings: Couplings,
    sizes: Mapping[str, Sequence[int]],
    known: Mapping[Any, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """The entries of the configuration for sizes in which layers differ.

    Some configurations have a list for a size (`intermediate_size` of Gemma 3n). For all others it
    is transformers' `per_layer_config`: {number of a layer: {entry: value}}. Few classes read that;
    the others refuse it when they are built.

    Args:
        made: the design.
        couplings: of the family.
        sizes: from `layer_sizes`.
        known: what the layers have of their own besides.
    """
    config = text_config(made.uncut.config)
    names, experts = config.attribute_map, made.architecture.experts
    of_all: dict[str, Any] = {}
    own = {new: dict((known or {}).get(new, {})) for new in range(len(made.layers))}
    for new, groups in enumerate(sizes["groups"]):
        if groups:
            heads = names.get("num_attention_heads", "num_attention_heads")
            own[new] |= {heads: groups * made.heads_per_group}
            own[new] |= {names.get("num_key_value_heads", "num_key_value_heads"): groups}
    if isinstance(setting(config, couplings.neurons_key), list):
        of_all[couplings.neurons_key] = list(sizes["neurons"])
    elif couplings.neurons_key:
        for new, neurons in enumerate(sizes["neurons"]):
            own[new] |= {couplings.neurons_key: neurons} if neurons else {}
    if experts is not None:
        for new, count in enumerate(sizes["experts"]):
            own[new] |= {names.get(experts.count, experts.count): count} if count else {}
    alike = not (differ(sizes["groups"]) or differ(sizes["experts"]))
    if of_all and alike and known is None:
        return of_all
    return of_all | {"per_layer_config": own}


def kept_count(made: Design, layer: LayerCut, name: str) -> int:
    """How many units of a kind a layer keeps."""
    kept = getattr(layer, name)
    return getattr(made.sizes, name)[layer.index] if kept is None else len(kept)


def size_changes(
    model: Any, made: Design, couplings: Couplings, sizes: Mapping[str, int], hidden: Any
) -> dict[str, Any]:
    """The entries of the configuration for sizes that all layers share, or for the largest."""
    config = text_config(model.config)
    names = config.attribute_map
    channels = made.sizes.hidden if hidden is None else len(hidden)
    heads = sizes["groups"] * made.heads_per_group
    changes: dict[str, Any] = {names.get("hidden_size", "hidden_size"): channels}
    if heads:
        changes[names.get("num_attention_heads", "num_attention_heads")] = heads
        if setting(config, "num_key_value_heads") is not None:
            changes["num_key_value_heads"] = sizes["groups"]
        own = setting(config, "head_dim", "unknown") != "unknown"
        if not made.sizes.latent and (own or heads * made.sizes.head_dim != channels):
            changes["head_dim"] = made.sizes.head_dim
    if sizes["neurons"] and couplings.neurons_key:
        changes |= {couplings.neurons_key: sizes["neurons"], **couplings.with_neurons}
    if made.architecture.experts is not None:
        count = made.architecture.experts.count
        changes[names.get(count, count)] = sizes["experts"]
    if getattr(config, "word_embed_proj_dim", None) == made.sizes.hidden:
        changes["word_embed_proj_dim"] = channels
    return changes
