"""Designs the smaller model: its configuration, its class, and the edit of each parameter.

A test, not a rule, decides whether plain transformers can load the result. The configuration with
the new sizes is built on the meta device. If all parameters have the shapes of the edits and all
heads their size, the result is plain. Otherwise it is a varied model (`models/varied.py`).

A configuration says in many ways what each layer is: a list with an entry for every layer, a list
of indices, a number of layers at the start or at the end. When layers are removed, the entries are
changed, and the layers of the built model are compared with those they come from: a class may also
compute what a layer is from its index, and then no configuration keeps it.

A design also counts what the cut removes (`accounting`): parameters by kind, cache and bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError, VerificationError
from secateur.models import skeleton as skeletons
from secateur.models.architecture import (
    Couplings,
    describe,
    further_counts,
    only_embeds,
    setting,
    text_config,
)
from secateur.models.checkpoint import CheckpointReader
from secateur.models.counting import layer_caches
from secateur.models.inventory import FurtherLayers
from secateur.runs.records import Counts
from secateur.structured import cut as units
from secateur.structured.edits import (
    Blueprint,
    LayerCut,
    TensorEdit,
    edits_of,
    gone_of,
    layer_cuts,
    tensors_of,
)

_INDICES = ("attn_layer_indices", "full_attn_idxs", "mlp_only_layers", "moe_layers", "dense_layers")
"""Entries with the indices of some layers."""

_FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
"""Entries that count layers at the start."""

_LAST = ("num_kv_shared_layers",)
"""Entries that count layers at the end."""

_CYCLES = ("block_types",)
"""Entries that repeat over the layers."""

_PER_LAYER = ("layer", "block", "pattern", "intermediate_size", "num_key_value_heads")
"""What is in the names of entries with a value for each layer."""

_OF_THE_INDEX = ("layer_idx", "layer_id", "layer_number", "training")


@dataclass(frozen=True)
class Design(Blueprint):
    """A smaller model, before any of its tensors is made.

    Attributes:
        edits: of each parameter, by its name in the cut model.
        skeleton: the cut model, parameters on the meta device.
    """

    edits: Mapping[str, TensorEdit]
    skeleton: Any

    @cached_property
    def further(self) -> FurtherLayers:
        """Finds layers of the uncut model that predict further tokens."""
        return FurtherLayers.of(self.uncut, self.architecture)

    @property
    def varied(self) -> bool:
        """Whether the result needs its own code to load."""
        return hasattr(self.skeleton.config, "secateur_cut")

    def further_edit(self, stored: str, name: str, shape: tuple[int, ...]) -> TensorEdit:
        """The edit of a tensor of a layer that predicts further tokens, by its place.

        Args:
            stored: its name.
            name: as the model would call it.
            shape: as it is stored.
        """
        edit, place = TensorEdit.copy(stored, shape), self.further.place(name)
        kept = self.predicting.get(place.layer) if place else None
        experts, couplings = self.architecture.experts, self.architecture.couplings
        if place is None or kept is None or experts is None or couplings is None:
            return edit
        owner, _, leaf = place.inner.rpartition(".")
        axes = couplings.layer.get(place.inner) or couplings.layer.get(owner, ())
        if owner == experts.module and leaf in experts.layout.projections:
            axes = ("experts",)  # those of all experts
        axes = axes[: len(shape)]
        return edit.keeping(axes.index("experts"), kept) if "experts" in axes else edit

    def misfit(self, edits: Mapping[str, TensorEdit], further: Mapping[str, TensorEdit]) -> str:
        """Why layers that predict further tokens cannot follow the cut; empty if they can.

        Args:
            edits: of the tensors that the class builds, by the stored names of the results.
            further: of the tensors of these layers, by the stored names of the results.
        """
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, edit in edits.items():
            if found := self.further.listed(name):
                shapes.setdefault(found[2], set()).add(edit.shape)
        for name, edit in further.items():
            place = self.further.place(edit.source)
            there = shapes.get(place.inner) if place else None
            if there and edit.shape not in there:
                return f"{name} is {list(edit.shape)}, and {list(max(there))} in decoder layers"
        experts = self.architecture.experts  # which may be stored in another form than these
        names = experts.layout.tensors if further and experts else ()
        fused = (x for x in self.edits.values() if x.source.rpartition(".")[2] in names)
        if any(kept is not None for x in fused for kept in x.kept[1:]):
            return "neurons of experts are cut"
        return ""


def design(model: Any, cut: units.Cut) -> Design:
    """Design the model that a cut leaves.

    Args:
        model: the uncut model, loaded or a skeleton.
        cut: what is kept.

    Raises:
        RecipeError: the cut is impossible.
        ArchitectureError: the family does not declare what the cut needs, or no class fits.
    """
    experts = describe(model).experts
    if experts is not None and experts.opened_in(describe(model).layers(model)):
        model = skeletons.skeleton_of(type(model), model.config, model.dtype)  # with fused experts
    architecture, sizes = describe(model), units.sizes_of(model)
    if cut.kinds:
        units.couplings_of(architecture, cut.kinds)
    cut.check(sizes)
    units.check_configuration(model, cut, sizes)
    hidden = None if cut.hidden is None else torch.tensor(cut.hidden, dtype=torch.long)
    if hidden is not None and len(hidden) == sizes.hidden:
        hidden = None
    predicting = {layer: torch.tensor(kept) for layer, kept in cut.predicting.items()}
    blueprint = Blueprint(model, architecture, sizes, hidden, layer_cuts(cut, sizes), predicting)
    edits: Mapping[str, TensorEdit] = edits_of(blueprint)
    plain = _built_plain(blueprint, edits)
    if plain is not None:
        edits = _for_scaled_embedding(blueprint, edits)
        return Design(**vars(blueprint), edits=edits, skeleton=plain)
    if architecture.couplings is None:
        raise ArchitectureError(
            f"{type(model).__name__} cannot be built with {len(blueprint.layers)} of its "
            f"{len(sizes.neurons)} layers: its configuration names their kinds in an unknown way",
            remedy="this family's layers cannot be cut yet",
        )
    return Design(**vars(blueprint), edits=edits, skeleton=_built_varied(blueprint, edits))


def _built_plain(blueprint: Blueprint, edits: Mapping[str, TensorEdit]) -> Any:
    """The skeleton of a plain model with the new sizes; None if no class has them."""
    model, couplings = blueprint.uncut, blueprint.architecture.couplings
    changes = _layer_changes(blueprint)
    forms = [changes]
    if couplings is not None:
        if any(gone_of(couplings, layer) for layer in blueprint.layers):
            return None
        # units of each kept layer; 0 in layers of another kind
        sizes = {
            kind: [blueprint.count(layer, kind) for layer in blueprint.layers]
            for kind in ("groups", "experts", *units.NEURONS)
        }
        forms = [changes | _size_changes(blueprint, couplings, one) for one in _uniform(sizes)]
        heterogeneous = getattr(text_config(model.config), "is_heterogeneous", False)
        if heterogeneous or any(map(_differ, sizes.values())):
            known = changes.get("per_layer_config")
            forms.insert(0, forms[0] | _own_sizes(blueprint, couplings, sizes, known))
    config_class, model_class, entries = _base_classes(model)
    part = skeletons.text_part(model.config)  # which describes the decoder
    for form in forms:
        try:
            whole = {**entries, **(form if part is None else {part: {**entries[part], **form}})}
            skeleton = _built(model_class, config_class, whole, model)
        except Exception:  # each class refuses sizes in its own way
            continue
        if _fits(skeleton, blueprint, edits):
            return skeleton
    return None


def _base_classes(model: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Configuration class, model class and configuration of the base class in transformers."""
    entries = model.config.to_dict()
    config_class, model_class = type(model.config), type(model)
    if entries.pop("secateur_cut", None) is not None:
        # Varied classes are made from these; the model's has a mixin before its base.
        config_class, model_class = config_class.__mro__[1], model_class.__mro__[2]
        entries["model_type"] = entries.pop("base_model_type")
        entries.pop("auto_map", None)
        entries["architectures"] = [model_class.__name__]
    return config_class, model_class, entries


def _layer_changes(blueprint: Blueprint) -> dict[str, Any]:
    """The changed entries of the configuration, for fewer layers or a narrower stream."""
    config, kept = text_config(blueprint.uncut.config), [layer.index for layer in blueprint.layers]
    count = len(blueprint.architecture.layers(blueprint.uncut))
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changes: dict[str, Any] = {key: len(kept)}
    if count != len(kept):
        further = max(further_counts(config).values(), default=0)
        changes |= _kept_settings(config.to_dict(), kept, count, further)
    if getattr(config, "decoder_sparse_step", None) is not None and count != len(kept):
        # Every n-th layer had experts; with layers removed only a list can say which have.
        dense = [new for new, i in enumerate(kept) if not blueprint.sizes.experts[i]]
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if blueprint.hidden is not None and getattr(config, "rms_norm_eps", None) is not None:
        # ε grows as the mean square of a norm whose removed channels were zero (`edits`).
        narrower = blueprint.sizes.hidden / len(blueprint.hidden)
        changes["rms_norm_eps"] = config.rms_norm_eps * narrower
    return changes


def _kept_settings(
    entries: Mapping[str, Any], kept: Sequence[int], count: int, further: int
) -> dict[str, Any]:
    """The entries of a configuration that change when only some layers are kept.

    Entries of layers that predict further tokens may follow those of the decoder layers, and stay.
    """
    new_index = {old: new for new, old in enumerate(kept)}
    found: dict[str, Any] = {}
    for name, value in entries.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name in _INDICES and isinstance(value, list):
            found[name] = [new_index[i] for i in value if i in new_index]
        elif name in _FIRST and whole:
            found[name] = sum(i < value for i in kept)  # how many of the first ones stay
        elif name in _LAST and whole:
            found[name] = sum(i >= count - value for i in kept)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            found[name] = {
                new_index[int(key)]: inner for key, inner in value.items() if int(key) in new_index
            }
        elif name in _CYCLES and isinstance(value, list | tuple) and value:
            # Written out: what is left of a cycle need not be one.
            found[name] = [value[i % len(value)] for i in kept]
        elif (
            isinstance(value, list | tuple | str)  # a value, or a letter, for each layer
            and len(value) in (count, count + further)
            and any(part in name for part in _PER_LAYER)
            and not name.startswith("mtp")  # of layers that predict further tokens
        ):
            own = [value[i] for i in (*kept, *range(count, len(value)))]
            found[name] = "".join(own) if isinstance(value, str) else type(value)(own)
    return found


def _uniform(sizes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """One size of each kind: the largest of all layers, and the smallest where they differ.

    A class may compute the sizes of some layers from one entry: late layers of small Gemma 4 have
    twice as many neurons.
    """
    # Layers that have no such units at all do not count.
    least = {name: min(filter(None, counts), default=0) for name, counts in sizes.items()}
    most = {name: max(counts) for name, counts in sizes.items()}
    return [most] if least == most else [most, least]


def _differ(counts: Sequence[int]) -> bool:
    """Whether layers that have such units have different numbers of them."""
    return len({count for count in counts if count}) > 1


def _own_sizes(
    blueprint: Blueprint,
    couplings: Couplings,
    sizes: Mapping[str, Sequence[int]],
    known: Mapping[Any, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """The entries of the configuration for sizes in which layers differ.

    Some configurations have a list for a size (`intermediate_size` of Gemma 3n). For all others it
    is transformers' `per_layer_config`: {number of a layer: {entry: value}}. Few classes read that;
    the others refuse it when they are built.
    """
    config = text_config(blueprint.uncut.config)
    names, experts = config.attribute_map, blueprint.architecture.experts
    of_all: dict[str, Any] = {}
    own = {new: dict((known or {}).get(new, {})) for new in range(len(blueprint.layers))}
    for new, groups in enumerate(sizes["groups"]):
        if groups:
            heads = names.get("num_attention_heads", "num_attention_heads")
            own[new] |= {heads: groups * blueprint.heads_per_group}
            own[new] |= {names.get("num_key_value_heads", "num_key_value_heads"): groups}
    if isinstance(setting(config, couplings.neurons_key), list):
        of_all[couplings.neurons_key] = list(sizes["neurons"])
    elif couplings.neurons_key:
        for new, neurons in enumerate(sizes["neurons"]):
            own[new] |= {couplings.neurons_key: neurons} if neurons else {}
    for new in range(len(own)) if experts is not None else ():
        own[new] |= _of_experts(blueprint, {kind: each[new] for kind, each in sizes.items()})
    alike = not any(_differ(each) for kind, each in sizes.items() if kind != "neurons")
    if of_all and alike and known is None:
        return of_all
    return of_all | {"per_layer_config": own}


def _size_changes(
    blueprint: Blueprint, couplings: Couplings, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The entries of the configuration for sizes that all layers share, or for the largest."""
    config = text_config(blueprint.uncut.config)
    names, channels = config.attribute_map, blueprint.channels
    heads = sizes["groups"] * blueprint.heads_per_group
    changes: dict[str, Any] = {names.get("hidden_size", "hidden_size"): channels}
    if heads:
        changes[names.get("num_attention_heads", "num_attention_heads")] = heads
        if setting(config, "num_key_value_heads") is not None:
            changes["num_key_value_heads"] = sizes["groups"]
        # Without an entry a class divides the stream by the heads, which may no longer be right.
        own = setting(config, "head_dim", "unknown") != "unknown"
        if not blueprint.sizes.latent and (own or heads * blueprint.sizes.head_dim != channels):
            changes["head_dim"] = blueprint.sizes.head_dim
    if sizes["neurons"] and couplings.neurons_key:
        changes |= {couplings.neurons_key: sizes["neurons"], **couplings.with_neurons}
    changes |= _of_experts(blueprint, sizes)
    if getattr(config, "word_embed_proj_dim", None) == blueprint.sizes.hidden:
        changes["word_embed_proj_dim"] = channels
    return changes


def _of_experts(blueprint: Blueprint, sizes: Mapping[str, int]) -> dict[str, int]:
    """The entries of the configuration for the number of experts and their sizes."""
    experts = blueprint.architecture.experts
    if experts is None:
        return {}
    names = text_config(blueprint.uncut.config).attribute_map
    entries = {
        experts.count: sizes["experts"],
        experts.width: sizes["expert_neurons"],
        experts.shared_width: sizes["shared_neurons"],
    }
    return {names.get(key, key): count for key, count in entries.items() if key and count}


def _built(model_class: Any, config_class: Any, entries: Mapping[str, Any], like: Any) -> Any:
    """A skeleton of a class, from the entries of its configuration."""
    with skeletons.quiet_transformers():
        config = config_class.from_dict(dict(entries))
    config._attn_implementation = like.config._attn_implementation
    return skeletons.skeleton_of(model_class, config, like.dtype)


def _fits(skeleton: Any, blueprint: Blueprint, edits: Mapping[str, TensorEdit]) -> bool:
    """Whether parameters and heads of a skeleton match; refuses one with other settings."""
    shapes = {name: tuple(p.shape) for name, p in tensors_of(skeleton).items()}
    if shapes != {name: edit.shape for name, edit in edits.items()}:
        return False
    couplings = blueprint.architecture.couplings
    if couplings is not None:
        sizes = {
            units.head_size(layer, couplings) for layer in blueprint.architecture.layers(skeleton)
        }
        if not sizes - {None} <= {blueprint.sizes.head_dim}:
            return False
    _refuse_other_settings(skeleton, blueprint, edits)
    return True


def _refuse_other_settings(
    skeleton: Any, blueprint: Blueprint, edits: Mapping[str, TensorEdit]
) -> None:
    """Refuse removed layers where the class computes what a layer is from its index."""
    before, after = map(blueprint.architecture.layers, (blueprint.uncut, skeleton))
    if len(before) == len(after):
        return
    there = tensors_of(blueprint.uncut)
    # Numbers in a layer may follow its sizes, so they are compared only where none changed.
    resized = any(x.shape != tuple(there[x.source].shape) for x in edits.values())
    kept = [layer.index for layer in blueprint.layers]
    if _has_attention(blueprint.uncut.config) and not _has_attention(skeleton.config):
        raise ArchitectureError(
            f"no layer with attention would stay of {len(kept)}, and transformers counts the "
            "tokens of its cache in such layers",
            remedy="keep one of them",
        )
    shared = any(getattr(m, "is_kv_shared_layer", False) for x in before for m in x.modules())
    for new, old in enumerate(kept):
        ours = dict(_plain_attributes(after[new], numbers=not resized))
        for name, value in _plain_attributes(before[old], numbers=not resized):
            if name.endswith("store_full_length_kv") and not shared:
                continue
            if name in ours and ours[name] != value:
                raise ArchitectureError(
                    f"these layers of {type(blueprint.uncut).__name__} cannot be removed: {name} "
                    f"of layer {old} is {value!r}, and would be {ours[name]!r}",
                    remedy="remove other layers, or cut units within layers",
                )


def _has_attention(config: Any) -> bool:
    """Whether a configuration that names the kinds of its layers names one with attention."""
    text = text_config(config)
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None) or ()
    return any(str(kind).endswith("attention") and "linear" not in str(kind) for kind in kinds)


def _plain_attributes(layer: nn.Module, *, numbers: bool) -> Iterator[tuple[str, Any]]:
    """The plain attributes of all modules of a layer."""
    kinds: Any = (bool, str, int, float) if numbers else (bool, str)
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if name in _OF_THE_INDEX or name.startswith("_") or not isinstance(value, kinds):
                continue
            yield f"{path}.{name}".lstrip("."), value


def _for_scaled_embedding(
    blueprint: Blueprint, edits: Mapping[str, TensorEdit]
) -> Mapping[str, TensorEdit]:
    """The edits where the factor of embeddings, √(hidden size), has become smaller.

    The embedding compensates for it. Where the head is tied to the embedding, the logits would grow
    too, so the final norm cancels the compensation.
    """
    couplings = blueprint.architecture.couplings
    if blueprint.hidden is None or couplings is None or not couplings.scaled_embedding:
        return edits
    factor = sqrt(blueprint.sizes.hidden / len(blueprint.hidden))
    embedding = next(n for n, axes in couplings.outside.items() if axes == ("-", "hidden"))
    norm = next(n for n, axes in couplings.outside.items() if axes == ("hidden",))
    table, last = f"{embedding}.weight", f"{norm}.weight"
    changed = {table: replace(edits[table], scale=factor)}
    if blueprint.uncut.config.tie_word_embeddings:
        changed[last] = replace(edits[last], scale=edits[last].scale / factor)
    return {**edits, **changed}


def _built_varied(blueprint: Blueprint, edits: Mapping[str, TensorEdit]) -> Any:
    """The skeleton of a varied model."""
    model = blueprint.uncut
    if skeletons.text_part(model.config) is not None:
        raise ArchitectureError(
            f"no class of transformers has these sizes, and {type(model).__name__} has a decoder "
            "inside, for which Secateur writes no class of its own",
            remedy="cut every layer alike",
        )
    family, alike = blueprint.architecture.family, units.couplings_of(blueprint.architecture).alike
    if alike:
        raise ArchitectureError(
            f"all layers of this family ({family}) must be cut alike: {alike}",
            remedy="cut every layer alike",
        )
    from secateur.models.varied import FILE_NAME, MODEL_TYPE, varied_classes

    config_class, model_class, entries = _base_classes(model)
    entries |= _layer_changes(blueprint)
    base = _built(model_class, config_class, entries, model)
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
        "secateur_cut": _difference(base, blueprint, edits),
    }
    skeleton = _built(varied_model, varied_config, entries, model)
    if not _fits(skeleton, blueprint, edits):
        raise ArchitectureError(
            "no model of this family can have these sizes",
            where=type(model).__name__,
            remedy="keep another number of hidden channels, or the same number in all layers",
        )
    return skeleton


def _difference(base: Any, blueprint: Blueprint, edits: Mapping[str, TensorEdit]) -> dict[str, Any]:
    """The differences between the cut model and a model that its base class builds."""
    couplings = units.couplings_of(blueprint.architecture)
    absent: dict[str, str] = {}
    attributes: dict[str, dict[str, int]] = {}
    for new, layer in enumerate(blueprint.layers):
        name = blueprint.architecture.layer_name(new)
        for gone in gone_of(couplings, layer) + _already_gone(blueprint, couplings, layer):
            kinds = {couplings.attention: "attention"} | dict.fromkeys(couplings.ffn, "ffn")
            if units.find(base, f"{name}.{gone}") is not None:
                absent[f"{name}.{gone}"] = kinds.get(gone, "norm")
        for path in dict.fromkeys((*couplings.attributes, couplings.attention)):
            module = units.find(base, f"{name}.{path}")
            if module is None or f"{name}.{path}" in absent:
                continue
            quantities = {**couplings.attributes.get(path, {})}
            if hasattr(module, units.QUERIES_OF_A_GROUP):
                quantities[units.QUERIES_OF_A_GROUP] = "heads_per_group"
            own = {a: _quantity(blueprint, layer, q) for a, q in quantities.items()}
            # the base has the configuration that its modules read
            there = {a: attrgetter(a)(base if a.startswith("config.") else module) for a in own}
            own = {a: v for a, v in own.items() if v != there[a]}
            if own:
                attributes[f"{name}.{path}"] = own
    shapes: dict[str, list[int]] = {}
    tensors = dict(base.named_parameters()) | skeletons.stored_buffers(base)
    for name, parameter in tensors.items():
        edit = edits.get(base.all_tied_weights_keys.get(name, name))
        owner, _, leaf = name.rpartition(".")
        if edit is None or edit.shape == tuple(parameter.shape) or leaf == "bias":
            continue  # a bias has the rows of its weight
        shapes[owner if leaf == "weight" else name] = list(edit.shape)
    return {"shapes": shapes, "attributes": attributes, "absent": absent}


def _already_gone(blueprint: Blueprint, couplings: Couplings, layer: LayerCut) -> tuple[str, ...]:
    """Modules of a layer whose sub-blocks the uncut model lacks."""
    sizes, i = blueprint.sizes, layer.index
    there = {"groups": sizes.groups[i], "neurons": sizes.neurons[i] or sizes.experts[i]}
    empty = {kind: torch.tensor([]) for kind, count in there.items() if not count}
    gone = gone_of(couplings, LayerCut(i, empty))
    uncut = blueprint.architecture.layers(blueprint.uncut)[i]  # stand-ins have no parameters
    modules = (units.find(uncut, name) for name in gone)
    without = (module is not None and not list(module.parameters()) for module in modules)
    return tuple(name for name, own in zip(gone, without, strict=True) if own)


def _quantity(blueprint: Blueprint, layer: LayerCut, name: str) -> int:
    """A size that an attribute of a module holds."""
    if name in ("neurons", "experts", "groups"):
        return blueprint.count(layer, name)
    heads = blueprint.count(layer, "groups") * blueprint.heads_per_group
    return {
        "hidden": blueprint.channels,
        "heads": heads,
        "queries": heads * blueprint.sizes.head_dim,
        "heads_per_group": blueprint.heads_per_group,
    }[name]


# -- what a cut removes ---------------------------------------------------------------------------

_UNCUT_BYTES = 2
"""Bytes cached for each token in place of a removed attention sub-block."""

_KINDS = ("attention", "ffn", "experts", "norms", "embeddings", "other")
"""The kinds of parameters; each parameter has one."""


class Accounting(NamedTuple):
    """Before and after a cut.

    Attributes:
        before: the uncut model.
        after: the cut one.
        varied: whether the result needs its own code to load.
    """

    before: Counts
    after: Counts
    varied: bool

    @property
    def removed(self) -> float:
        """The removed fraction of all parameters."""
        return 1 - self.after.parameters / self.before.parameters

    @property
    def decoder_removed(self) -> float:
        """The removed fraction of the parameters of the decoder layers."""
        return 1 - self.after.decoder / self.before.decoder

    def to_json(self) -> dict[str, Any]:
        """The counts by kind, without their sum."""
        before, after = (x.model_dump(exclude={"parameters"}) for x in (self.before, self.after))
        return {"before": before, "after": after, "varied": self.varied}


def accounting(model: Any, cut: units.Cut) -> Accounting:
    """Count what a cut would remove, without making a tensor.

    Args:
        model: loaded or a skeleton.
        cut: what is kept.

    Raises:
        RecipeError: the cut is impossible.
    """
    if only_embeds(model):  # of which only tokens are cut: all but their tables is its decoder
        sizes = {name: p.itemsize for name, p in skeletons.parameters_of(model).items()}
        counts = _counts(model, None, sizes)
        return Accounting(counts, counts, False)
    return account(design(model, cut))


def account(made: Design) -> Accounting:
    """Count what a design removes."""
    there = skeletons.parameters_of(made.uncut)
    before = {name: p.itemsize for name, p in there.items()}
    after = {n: before[edit.source] for n, edit in made.edits.items() if edit.source in there}
    return Accounting(
        _counts(made.uncut, made, before), _counts(made.skeleton, made, after), made.varied
    )


def _counts(model: Any, made: Design | None, itemsizes: Mapping[str, int]) -> Counts:
    """Count a model, whose weights are stored in numbers of these sizes."""
    from secateur.models.varied import NoAttention

    prefix = made.architecture.layers_path + "." if made else ""
    rows = None if made else model.get_input_embeddings().num_embeddings
    couplings, found = made.architecture.couplings if made else None, Counter[str]()
    for name, parameter in skeletons.parameters_of(model).items():
        values, inside = parameter.numel(), name.startswith(prefix) and len(parameter) != rows
        inner = name.removeprefix(prefix).partition(".")[2] if inside else None
        module = model.get_submodule(name.rpartition(".")[0])
        found[_kind_of(inner, module, parameter, couplings)] += values
        found["decoder"] += values * (inner is not None)
        found["file_bytes"] += values * itemsizes[name]
    # A stand-in for attention caches one number of each token, so that the cache has its length.
    removed = sum(isinstance(module, NoAttention) for module in model.modules())
    values = sum(cache.values for cache in layer_caches(model)) if made else 0
    cache = values * model.dtype.itemsize + removed * _UNCUT_BYTES
    return Counts(
        **{name: found[name] for name in (*_KINDS, "decoder", "file_bytes")},
        kv_cache_bytes_per_token=cache,
        parameters=sum(found[kind] for kind in _KINDS),
    )


def _kind_of(
    inner: str | None, module: nn.Module, parameter: Tensor, couplings: Couplings | None
) -> str:
    """The kind of a parameter."""
    if "Norm" in type(module).__name__:
        return "norms"
    if inner is None:
        return "embeddings" if parameter.ndim == 2 or couplings is None else "other"
    if couplings is None:
        return "other"
    axes = couplings.layer.get(inner) or couplings.layer.get(inner.rpartition(".")[0], ())
    if "state" in axes:
        return "other"
    if inner.startswith(f"{couplings.attention}."):
        return "attention"
    if "experts" in axes:
        return "experts"
    return "ffn" if inner.startswith(tuple(f"{x}." for x in couplings.ffn)) else "other"


def verified(skeleton: Any, source: Path, made: Path, promised: Mapping[str, Any]) -> Accounting:
    """Count the parameters of a written model, and compare them with the notes of the last step.

    Args:
        skeleton: the uncut model.
        source: its folder.
        made: folder of the cut model.
        promised: the notes of the last step.

    Raises:
        VerificationError: the numbers differ.
    """
    written = skeletons.build_skeleton(made)
    before, after = (accounting(x, units.Cut()).before for x in (skeleton, written))
    # weights in a form at rest take fewer bytes than in memory, and layers for further tokens more
    before = before.model_copy(update={"file_bytes": CheckpointReader(source).total_bytes})
    after = after.model_copy(update={"file_bytes": CheckpointReader(made).total_bytes})
    decoder = promised["after"]["decoder"]
    if after.decoder != decoder:
        raise VerificationError(
            f"the decoder has {after.decoder:,} parameters, the cut promised {decoder:,}",
            where=str(made),
            remedy="this is a fault in secateur; please report it",
        )
    return Accounting(before, after, promised["varied"])
