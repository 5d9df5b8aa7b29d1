"""Designs the smaller model: its configuration, its class, and the edit of each parameter.

A test, not a rule, decides whether plain transformers can load the result. The configuration with
the new sizes is built on the meta device. If all parameters have the shapes of the edits and all
heads their size, the result is plain. Otherwise it is a varied model (`models/varied.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import nn

from secateur.errors import ArchitectureError
from secateur.models.architecture import describe, text_config
from secateur.models.classes import text_part
from secateur.models.layout import Couplings
from secateur.models.skeleton import quiet_transformers, skeleton_of
from secateur.structured.checks import check_configuration
from secateur.structured.configured import (
    Design,
    differ,
    kept_count,
    layer_changes,
    layer_sizes,
    own_sizes,
    size_changes,
    uniform,
)
from secateur.structured.cut import (
    QUERIES_OF_A_GROUP,
    Cut,
    couplings_of,
    find,
    head_size,
    sizes_of,
)
from secateur.structured.edits import Edit, Editor, LayerCut, gone_of, layer_cuts, tensors_of
from secateur.structured.layer_settings import differing_layer, has_attention


def design(model: Any, cut: Cut, *, pad: bool = False) -> Design:
    """Design the model that a cut leaves.

    Args:
        model: the uncut model, loaded or a skeleton.
        cut: what is kept.
        pad: fill smaller layers with units of zeros, so that plain transformers can load them.

    Raises:
        RecipeError: the cut is impossible.
        ArchitectureError: the family does not declare what the cut needs, or no class fits.
    """
    model = with_fused_experts(model)
    architecture, sizes = describe(model), sizes_of(model)
    if cut.kinds:
        couplings_of(architecture, cut.kinds)
    cut.check(sizes)
    check_configuration(model, cut, sizes, pad)
    hidden = None if cut.hidden is None else torch.tensor(cut.hidden, dtype=torch.long)
    if hidden is not None and len(hidden) == sizes.hidden:
        hidden = None
    editor = Editor(model, architecture, sizes, hidden)
    # A class that ties the number of heads to the hidden size needs the old number of heads.
    for padding in ("largest", "uncut") if pad else (None,):
        layers = layer_cuts(cut, sizes, padding)
        made = Design(model, architecture, sizes, layers, None, editor.edits(layers))
        plain = built_plain(model, made, hidden)
        if plain is not None:
            return replace(made, skeleton=plain, edits=for_scaled_embedding(model, made, hidden))
    if pad:
        raise ArchitectureError(
            "no plain class of transformers has these sizes, padded or not",
            remedy="turn padding off; or keep all hidden channels, where the family ties their "
            "number to the number of heads",
        )
    if architecture.couplings is None:
        raise ArchitectureError(
            f"{type(model).__name__} cannot be built with {len(made.layers)} of its "
            f"{len(sizes.neurons)} layers: its configuration names their kinds in an unknown way",
            remedy="this family's layers cannot be cut yet",
        )
    return replace(made, skeleton=built_varied(model, made, hidden))


def with_fused_experts(model: Any) -> Any:
    """The model; if its experts are opened (`models/experts.py`), a skeleton of it instead."""
    experts = describe(model).experts
    if experts is None or not experts.opened_in(describe(model).layers(model)):
        return model
    return skeleton_of(type(model), model.config, model.dtype)


def base_classes(model: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Configuration class, model class and configuration of the base class in transformers."""
    entries = model.config.to_dict()
    config_class, model_class = type(model.config), type(model)
    if entries.pop("secateur_cut", None) is not None:
        config_class, model_class = config_class.__mro__[1], model_class.__mro__[2]
        entries["model_type"] = entries.pop("base_model_type")
        entries.pop("auto_map", None)
        entries["architectures"] = [model_class.__name__]
    return config_class, model_class, entries


def built_plain(model: Any, made: Design, hidden: Any) -> Any:
    """The skeleton of a plain model with the new sizes; None if no class has them."""
    couplings, config = made.architecture.couplings, text_config(model.config)
    changes = layer_changes(model, made, hidden)
    forms = [changes]
    if couplings is not None:
        if any(gone_of(couplings, layer) for layer in made.layers):
            return None
        sizes = layer_sizes(made)
        forms = [
            changes | size_changes(model, made, couplings, one, hidden) for one in uniform(sizes)
        ]
        if getattr(config, "is_heterogeneous", False) or any(map(differ, sizes.values())):
            known = changes.get("per_layer_config")
            forms.insert(0, forms[0] | own_sizes(made, couplings, sizes, known))
    config_class, model_class, entries = base_classes(model)
    for form in forms:
        try:
            skeleton = built(model_class, config_class, changed(model, entries, form), model)
        except Exception:  # each class refuses sizes in its own way
            continue
        if fits(skeleton, made):
            return skeleton
    return None


def changed(model: Any, entries: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration with changes to the part that describes the decoder."""
    part = text_part(model.config)
    return {**entries, **(changes if part is None else {part: {**entries[part], **changes}})}


def built(model_class: Any, config_class: Any, entries: Mapping[str, Any], like: Any) -> Any:
    """A skeleton of a class, from the entries of its configuration."""
    with quiet_transformers():
        config = config_class.from_dict(dict(entries))
    config._attn_implementation = like.config._attn_implementation
    return skeleton_of(model_class, config, like.dtype)


def fits(skeleton: Any, made: Design) -> bool:
    """Whether parameters and heads of a skeleton match the design.

    Raises:
        ArchitectureError: they do, but a layer would have another setting than before.
    """
    shapes = {name: tuple(p.shape) for name, p in tensors_of(skeleton).items()}
    if shapes != {name: edit.shape for name, edit in made.edits.items()}:
        return False
    couplings = made.architecture.couplings
    if couplings is not None:
        sizes = {head_size(layer, couplings) for layer in made.architecture.layers(skeleton)}
        if not sizes - {None} <= {made.sizes.head_dim}:
            return False
    refuse_other_settings(skeleton, made)
    return True


def refuse_other_settings(skeleton: Any, made: Design) -> None:
    """Refuse removed layers where the class computes what a layer is from its index.

    Raises:
        ArchitectureError: names a setting that a layer would lose.
    """
    before, after = (list(made.architecture.layers(model)) for model in (made.uncut, skeleton))
    if len(before) == len(after):
        return
    there = tensors_of(made.uncut)
    resized = any(edit.shape != tuple(there[edit.source].shape) for edit in made.edits.values())
    kept = [layer.index for layer in made.layers]
    if has_attention(made.uncut.config) and not has_attention(skeleton.config):
        raise ArchitectureError(
            f"no layer with attention would stay of {len(kept)}, and transformers counts the "
            "tokens of its cache in such layers",
            remedy="keep one of them",
        )
    differing = differing_layer(before, after, kept, resized=resized)
    if differing is not None:
        raise ArchitectureError(
            f"these layers of {type(made.uncut).__name__} cannot be removed: {differing}",
            remedy="remove other layers, or cut units within layers",
        )


def for_scaled_embedding(model: Any, made: Design, hidden: Any) -> dict[str, Edit]:
    """The edits where the factor of embeddings, √(hidden size), has become smaller.

    The embedding compensates for it. Where the head is tied to the embedding, the logits would grow
    too, so the final norm cancels the compensation.
    """
    edits, couplings = dict(made.edits), made.architecture.couplings
    if hidden is None or couplings is None or not couplings.scaled_embedding:
        return edits
    factor = sqrt(made.sizes.hidden / len(hidden))
    embedding = next(n for n, axes in couplings.outside.items() if axes == ("-", "hidden"))
    norm = next(n for n, axes in couplings.outside.items() if axes == ("hidden",))
    name = f"{embedding}.weight"
    edits[name] = replace(edits[name], scale=factor)
    if model.config.tie_word_embeddings:
        edit = edits[f"{norm}.weight"]
        edits[f"{norm}.weight"] = replace(edit, scale=edit.scale / factor)
    return edits


def built_varied(model: Any, made: Design, hidden: Any) -> Any:
    """The skeleton of a varied model.

    Raises:
        ArchitectureError: its parameters do not match the design, or it is inside another model.
    """
    if text_part(model.config) is not None:
        raise ArchitectureError(
            f"no class of transformers has these sizes, and {type(model).__name__} has a decoder "
            "inside, for which Secateur writes no class of its own",
            remedy="cut every layer alike, or fill up smaller layers (--pad)",
        )
    alike = couplings_of(made.architecture).alike
    if alike:
        raise ArchitectureError(
            f"all layers of this family ({made.architecture.family}) must be cut alike: {alike}",
            remedy="cut every layer alike, or fill up smaller layers (--pad)",
        )
    from secateur.models.varied import FILE_NAME, MODEL_TYPE, varied_classes

    config_class, model_class, entries = base_classes(model)
    entries |= layer_changes(model, made, hidden)
    base = built(model_class, config_class, entries, model)
    varied_config, varied_model = varied_classes(entries["model_type"])
    code = FILE_NAME.removesuffix(".py")
    entries |= {
        "base_model_type": entries["model_type"],
        "model_type": MODEL_TYPE,
        "architectures": [varied_model.__name__],
        "auto_map": {
            "AutoConfig": f"{code}.VariedConfig",
            "AutoModelForCausalLM": f"{code}.VariedForCausalLM",
        },
        "secateur_cut": difference(base, made, hidden),
    }
    skeleton = built(varied_model, varied_config, entries, model)
    if not fits(skeleton, made):
        raise ArchitectureError(
            "no model of this family can have these sizes",
            where=type(model).__name__,
            remedy="keep another number of hidden channels, or the same number in all layers",
        )
    return skeleton


def difference(base: Any, made: Design, hidden: Any) -> dict[str, Any]:
    """The differences between the cut model and a model that its base class builds."""
    couplings = couplings_of(made.architecture)
    absent: dict[str, str] = {}
    attributes: dict[str, dict[str, int]] = {}
    for new, layer in enumerate(made.layers):
        name = made.architecture.layer_name(new)
        for gone in gone_of(couplings, layer) + already_gone(made, couplings, layer):
            kinds = {couplings.attention: "attention"} | dict.fromkeys(couplings.ffn, "ffn")
            if find(base, f"{name}.{gone}") is not None:
                absent[f"{name}.{gone}"] = kinds.get(gone, "norm")
        for path in dict.fromkeys((*couplings.attributes, couplings.attention)):
            module = find(base, f"{name}.{path}")
            if module is None or f"{name}.{path}" in absent:
                continue
            quantities = {**couplings.attributes.get(path, {})}
            if hasattr(module, QUERIES_OF_A_GROUP):
                quantities[QUERIES_OF_A_GROUP] = "heads_per_group"
            own = {a: quantity(made, layer, q, hidden) for a, q in quantities.items()}
            own = {a: v for a, v in own.items() if v != read(base, module, a)}
            if own:
                attributes[f"{name}.{path}"] = own
    shapes: dict[str, list[int]] = {}
    for name, parameter in base.named_parameters():
        edit = made.edits.get(base.all_tied_weights_keys.get(name, name))
        owner, _, leaf = name.rpartition(".")
        if edit is None or edit.shape == tuple(parameter.shape) or leaf == "bias":
            continue
        shapes[owner if leaf == "weight" else name] = list(edit.shape)
    return {"shapes": shapes, "attributes": attributes, "absent": absent}


def already_gone(made: Design, couplings: Couplings, layer: LayerCut) -> tuple[str, ...]:
    """Modules of a layer whose sub-blocks the uncut model lacks."""
    empty = torch.tensor([], dtype=torch.long)
    sizes, i = made.sizes, layer.index
    groups = None if sizes.groups[i] else empty
    neurons = None if sizes.neurons[i] or sizes.experts[i] else empty
    gone = gone_of(couplings, LayerCut(i, groups, None, neurons, None))
    uncut = made.architecture.layers(made.uncut)[i]  # stand-ins have no parameters
    there = (find(uncut, name) for name in gone)
    without = (module is not None and not list(module.parameters()) for module in there)
    return tuple(name for name, empty in zip(gone, without, strict=True) if empty)


def quantity(made: Design, layer: LayerCut, name: str, hidden: Any) -> int:
    """A size that an attribute of a module holds."""
    sizes, groups = made.sizes, kept_count(made, layer, "groups")
    if name == "hidden":
        return sizes.hidden if hidden is None else len(hidden)
    if name in ("neurons", "experts"):
        return kept_count(made, layer, name)
    heads = groups * made.heads_per_group
    found = {"groups": groups, "heads": heads, "queries": heads * sizes.head_dim}
    return {**found, "heads_per_group": made.heads_per_group}[name]


def read(base: Any, module: nn.Module, attribute: str) -> Any:
    """An attribute of a module, or of the configuration it reads."""
    if attribute.startswith("config."):
        return getattr(base.config, attribute.removeprefix("config."))
    return getattr(module, attribute)
