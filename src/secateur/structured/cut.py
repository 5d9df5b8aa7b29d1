"""The units of a model that can be cut, which of them a cut keeps, and which cuts cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from secateur.errors import ArchitectureError, RecipeError
from secateur.models.architecture import (
    Architecture,
    Couplings,
    Linear,
    describe,
    hidden_size,
    setting,
    text_config,
)
from secateur.models.expert_layout import Experts

QUERIES_OF_A_GROUP = "num_key_value_groups"
"""The name in transformers of the number of query heads that share a key."""

Kept = tuple[int, ...]
"""Indices of units that are kept, ascending."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of units; tuples have one number per decoder layer.

    Attributes:
        hidden: channels of the residual stream.
        head_dim: channels of one head.
        heads_per_group: query heads that share a key and a value.
        groups: KV groups; 0 where there is no attention.
        neurons: FFN neurons; 0 where there is no FFN, or a mixture of experts.
        experts: experts; 0 where the FFN is dense.
        of_experts: neurons of the expert that every token has, and of each other expert; 0 where
            there is none.
        expert_groups: the groups into which a router divides them, in their order.
        latent: whether attention is latent, so that what is cached belongs to no head.
    """

    hidden: int
    head_dim: int
    heads_per_group: int
    groups: tuple[int, ...]
    neurons: tuple[int, ...]
    experts: tuple[int, ...]
    of_experts: tuple[tuple[int, int], ...]
    expert_groups: int = 1
    latent: bool = False

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.groups)

    @property
    def queries(self) -> tuple[int, ...]:
        """Query heads of each layer."""
        return tuple(groups * self.heads_per_group for groups in self.groups)

    @property
    def shared_neurons(self) -> tuple[int, ...]:
        """Neurons of the shared expert of each layer."""
        return tuple(shared for shared, _ in self.of_experts)

    @property
    def expert_neurons(self) -> tuple[int, ...]:
        """Neurons of each other expert of each layer."""
        return tuple(each for _, each in self.of_experts)


@dataclass(frozen=True)
class Cut:
    """The units of a model to keep. A kind without an entry is kept whole; indices are of the uncut
    model.

    Attributes:
        layers: decoder layers.
        groups: KV groups with their query heads, by layer; an empty list removes the attention
            sub-block.
        queries: query heads, by layer: the same number of each KV group, in every layer that has
            attention. Then groups stay whole.
        neurons: FFN neurons, by layer; an empty list removes the FFN sub-block.
        experts: experts, by layer.
        shared_neurons: neurons of the expert that every token has, by layer.
        expert_neurons: neurons of each expert of the uncut layer, by layer. Those of a layer keep
            equally many.
        hidden: channels of the residual stream.
        predicting: experts of layers that predict further tokens, by the number of the layer among
            these, from 0.
    """

    layers: Kept | None = None
    groups: Mapping[int, Kept] = field(default_factory=dict)
    queries: Mapping[int, Kept] = field(default_factory=dict)
    neurons: Mapping[int, Kept] = field(default_factory=dict)
    experts: Mapping[int, Kept] = field(default_factory=dict)
    shared_neurons: Mapping[int, Kept] = field(default_factory=dict)
    expert_neurons: Mapping[int, tuple[Kept, ...]] = field(default_factory=dict)
    hidden: Kept | None = None
    predicting: Mapping[int, Kept] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units within layers that it cuts."""
        return tuple(kind for kind in ("hidden", *UNITS) if getattr(self, kind))

    def to_json(self) -> dict[str, Any]:
        """The cut as JSON: keys are text, tuples are lists."""
        of_model = {name: getattr(self, name) for name in ("layers", "hidden")}
        record: dict[str, Any] = {name: list(x) for name, x in of_model.items() if x is not None}
        for name in (name for name in (*UNITS, "predicting") if getattr(self, name)):
            record[name] = {str(i): list(kept) for i, kept in getattr(self, name).items()}
        return record

    def check(self, sizes: Sizes) -> None:
        """Refuse an impossible cut.

        Args:
            sizes: of the model.

        Raises:
            RecipeError: names every fault.
        """
        if faults := list(self._faults(sizes)):
            raise RecipeError(
                "the cut is impossible:\n    " + "\n    ".join(faults),
                remedy="indices count from 0 and are of the uncut model, each once, ascending",
            )

    def _faults(self, sizes: Sizes) -> Iterator[str]:
        """Sentences that describe every fault."""
        yield from _faults_of("decoder layers", self.layers, sizes.layers)
        yield from _faults_of("hidden channels", self.hidden, sizes.hidden)
        for name, what in UNITS.items():
            counts = getattr(sizes, name)
            for layer, kept in getattr(self, name).items():
                if not 0 <= layer < sizes.layers:
                    yield f"{what} of layer {layer}: there are {sizes.layers} layers"
                elif name == "expert_neurons":
                    yield from self._faults_of_experts(layer, sizes)
                elif name in ("experts", "queries", "shared_neurons") or kept:
                    yield from _faults_of(f"{what} of layer {layer}", kept, counts[layer])
        yield from self._uneven(sizes)

    def _faults_of_experts(self, layer: int, sizes: Sizes) -> Iterator[str]:
        """Sentences about the kept neurons of the experts of a layer."""
        each, there = self.expert_neurons[layer], sizes.experts[layer]
        if len(each) != there:
            yield f"layer {layer}: the cut names neurons of {len(each)} of its {there} experts"
        for expert, kept in enumerate(each[:there]):
            what = f"neurons of expert {expert} of layer {layer}"
            yield from _faults_of(what, kept, sizes.expert_neurons[layer])
        if len(counts := {*map(len, each)}) > 1:
            yield f"layer {layer}: some experts keep {min(counts)} neurons, some {max(counts)}"

    def _uneven(self, sizes: Sizes) -> Iterator[str]:
        """Sentences about the kept query heads."""
        if not self.queries:
            return
        if self.groups:
            yield "query heads and whole KV groups cannot be cut at once"
        there = range(sizes.layers) if self.layers is None else self.layers
        missing = [i for i in there if sizes.groups[i] and i not in self.queries]
        if missing:
            yield f"query heads: layer {missing[0]} keeps all, others do not"
        # How many query heads each KV group of each layer keeps: one number, or the cut is uneven.
        per_group = {
            sum(head // sizes.heads_per_group == group for head in kept)
            for layer, kept in self.queries.items()
            for group in range(sizes.groups[layer])
        }
        if len(per_group) > 1:
            yield f"query heads: some KV groups keep {min(per_group)}, some {max(per_group)}"


UNITS = {
    "groups": "KV groups",
    "queries": "query heads",
    "neurons": "FFN neurons",
    "experts": "experts",
    "shared_neurons": "neurons of the shared expert",
    "expert_neurons": "neurons of experts",
}

NEURONS = ("neurons", "shared_neurons", "expert_neurons")
"""The kinds of units that are neurons."""


def _faults_of(what: str, kept: Sequence[int] | None, there: int) -> Iterator[str]:
    """Sentences about a list of kept units."""
    if kept is None:
        return
    if not kept:
        yield f"{what}: the cut keeps none"
    elif len(kept) > there:
        yield f"{what}: the cut keeps {len(kept)}, but there are {there}"
    elif min(kept) < 0 or max(kept) >= there:
        odd = min(kept) if min(kept) < 0 else max(kept)
        yield f"{what}: there is no {odd}, only 0 to {there - 1}"
    elif list(kept) != sorted(set(kept)):
        yield f"{what}: not ascending, or named twice"


def sizes_of(model: Any) -> Sizes:
    """The numbers of units of a model, loaded or a skeleton; its layers may differ.

    If the family declares no couplings, only layers can be cut and everything else is 0.
    """
    architecture = describe(model)
    config, layers = text_config(model.config), architecture.layers(model)
    couplings, none = architecture.couplings, (0,) * len(layers)
    if couplings is None:
        return Sizes(hidden_size(model), 0, 1, none, none, none, ((0, 0),) * len(layers))
    # Attention says itself how many query heads share a key; the configuration counts all heads.
    heads = setting(config, "num_attention_heads") or 1
    per_group = heads // (setting(config, "num_key_value_heads") or heads)
    attention = (find(layer, couplings.attention) for layer in layers)
    named = (getattr(module, QUERIES_OF_A_GROUP, None) for module in attention)
    per_group = next((each for each in named if each), per_group)
    head_dim = next(
        (size for layer in layers if (size := head_size(layer, couplings))),
        setting(config, "head_dim") or config.hidden_size // heads,
    )
    width = per_group * head_dim  # input columns of the output projection for one KV group
    # The norm at the end has only the stream; an embedding may have another width.
    there = dict(model.named_parameters())
    norms = [f"{name}.weight" for name, x in couplings.outside.items() if x == ("hidden",)]
    norm = next((there[name] for name in norms if name in there), None)
    return Sizes(
        hidden=config.hidden_size if norm is None else len(norm),
        head_dim=head_dim,
        heads_per_group=per_group,
        groups=tuple(_columns(x, couplings.consumer("queries")) // width for x in layers),
        neurons=tuple(_columns(x, couplings.consumer("neurons")) for x in layers),
        experts=tuple(_experts_of(layer, couplings) for layer in layers),
        of_experts=tuple(
            (_columns(x, couplings.consumer("shared_neurons")), _inside(x, architecture.experts))
            for x in layers
        ),
        expert_groups=architecture.experts.divided(config) if architecture.experts else 1,
        latent=any(
            getattr(find(layer, couplings.attention), "kv_lora_rank", None) for layer in layers
        ),
    )


def consumers(model: Any) -> dict[str, str]:
    """The linears whose input columns are the units, by kind, named within a decoder layer.

    The name for neurons of experts is a glob: such a linear is in every expert.

    Raises:
        ArchitectureError: the family declares no couplings.
    """
    architecture = describe(model)
    couplings = couplings_of(architecture)
    found = {kind: couplings.consumer(axis) for kind, axis in _CONSUMED.items()}
    if architecture.experts is not None:
        found["expert_neurons"] = f"{architecture.experts.module}.*.down_proj"
    return {kind: name for kind, name in found.items() if name is not None}


_CONSUMED = {"groups": "queries", "neurons": "neurons", "shared_neurons": "shared_neurons"}


def unit_width(sizes: Sizes, kind: str) -> int:
    """How many consecutive input columns of its consumer make one unit.

    Args:
        sizes: of the model.
        kind: `groups`, `queries`, or one of `NEURONS`.
    """
    widths = {"groups": sizes.heads_per_group * sizes.head_dim, "queries": sizes.head_dim}
    return widths.get(kind, 1)


def couplings_of(architecture: Architecture, kinds: Iterable[str] = ()) -> Couplings:
    """The parameters that must be cut together.

    Args:
        architecture: of the model.
        kinds: of units to cut.

    Raises:
        ArchitectureError: the family does not declare them, or says that units of one of the kinds
            cannot be cut.
    """
    if architecture.couplings is None:
        raise ArchitectureError(
            f"only whole layers can be cut of this model ({architecture.family}): its family does "
            "not declare which parameters belong to a head, a neuron, an expert or a channel",
            remedy="cut layers, or declare the couplings of its family: see CONTRIBUTING.md, 'Add "
            "a model family'",
        )
    for kind in kinds:
        why = architecture.couplings.fixed.get("groups" if kind == "queries" else kind)
        if why is not None:
            what = UNITS.get(kind, "hidden channels")
            raise ArchitectureError(
                f"{what} of this family ({architecture.family}) cannot be cut: {why}",
                remedy="cut other units: see docs/families.md",
            )
    return architecture.couplings


def head_size(layer: nn.Module, couplings: Couplings) -> int | None:
    """Channels of one head's output, from the attention module; None without the sub-block."""
    module = find(layer, couplings.attention)
    names = ("v_head_dim", "head_dim", "head_size")  # the first is of latent attention
    return next((size for name in names if (size := getattr(module, name, None))), None)


def _columns(layer: nn.Module, name: str | None) -> int:
    """Input columns of a linear of a layer; 0 if there is no such linear."""
    module = None if name is None else find(layer, name)
    if getattr(module, "weight", None) is None:
        return 0
    assert module is not None
    return Linear("", module).shape[1]


def _experts_of(layer: nn.Module, couplings: Couplings) -> int:
    """How many experts a layer has."""
    there = dict(layer.named_parameters())
    for name, axes in couplings.layer.items():
        parameter = there.get(name, there.get(f"{name}.weight"))
        if "experts" in axes and parameter is not None:
            return int(parameter.shape[axes.index("experts")])
    return 0


def _inside(layer: nn.Module, experts: Experts | None) -> int:
    """How many neurons each expert of a layer has, fused or opened."""
    module = find(layer, experts.module) if experts is not None else None
    if experts is None or module is None:
        return 0
    if isinstance(module, nn.ModuleList):
        return _columns(module[0], "down_proj")
    shape = module.get_parameter("down_proj").shape
    return int(shape[1 if experts.layout.transposed else 2])


def find(layer: nn.Module, name: str) -> nn.Module | None:
    """A module by its name, or None."""
    try:
        return layer.get_submodule(name)
    except AttributeError:  # there is none, or None in its place
        return None


def check_configuration(model: Any, cut: Cut, sizes: Sizes) -> None:
    """Refuse a cut that the configuration makes impossible.

    A router that picks groups first (`n_group`) divides the experts into groups of one size, in
    their order, and rates a group by its two best experts.

    Raises:
        RecipeError: fewer experts than each token needs, or than the router needs of a group, or
            groups of different sizes.
        ArchitectureError: the index of a layer has a meaning in this model.
    """
    config = text_config(model.config)
    architecture = describe(model)
    experts = architecture.experts
    needed = (experts.per_token(config) if experts else None) or 0
    for layer, kept in cut.experts.items():
        if len(kept) < needed:
            raise RecipeError(
                f"layer {layer}: the cut keeps {len(kept)} experts, but each token needs {needed}",
                remedy=f"keep {needed} experts or more in each layer",
            )
        groups, count = sizes.expert_groups, sizes.experts[layer]
        if experts is not None and groups > 1 and count:
            # expert e is in group e · groups // count
            own = [sum(e * groups // count == group for e in kept) for group in range(groups)]
            least = experts.fewest(config) // groups
            if len(set(own)) > 1 or own[0] < least:
                raise RecipeError(
                    f"layer {layer}: the cut keeps {own} experts of the {groups} groups between "
                    "which the router chooses",
                    remedy=f"keep the same number in every group, {least} or more",
                )
    if (cut.groups or cut.queries) and architecture.couplings is not None:
        attention = [find(x, architecture.couplings.attention) for x in architecture.layers(model)]
        named = (getattr(module, QUERIES_OF_A_GROUP, None) for module in attention)
        found = sorted({int(number) for number in named if number})
        if len(found) > 1:
            raise ArchitectureError(
                f"heads cannot be cut, because layers have {' or '.join(map(str, found))} "
                "query heads in a KV group",
                remedy="cut FFN neurons, experts or layers",
            )
    sparse = setting(config, "activation_sparsity_pattern") or ()
    for layer, kept in cut.neurons.items():
        if kept and layer < len(sparse) and sparse[layer] > 0:
            raise ArchitectureError(
                f"layer {layer}: FFN neurons cannot be cut, because their activations are chosen "
                f"by the mean and deviation of all neurons (activation sparsity {sparse[layer]:g})",
                remedy="cut neurons of the other layers",
            )
    if cut.layers is not None and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ArchitectureError(
            "attention is scaled by the index of its layer, so layers cannot be cut",
            remedy="cut heads, neurons or hidden channels",
        )
