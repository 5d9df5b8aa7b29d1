"""Turns the keep-options of a structured cut into numbers of units, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil, lcm
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from secateur.errors import RecipeError
from secateur.models.architecture import describe, hidden_size, only_embeds
from secateur.recipes.options import bytes_of
from secateur.recipes.structure import TARGETS, WIDTHS, Kept, StructureRecipe
from secateur.sparsity.patterns import parse_pattern
from secateur.structured.cut import NEURONS, UNITS, Cut, Sizes, couplings_of, sizes_of, unit_width
from secateur.structured.design import Accounting, account, accounting, design
from secateur.structured.embedders import check_embedder

WITHIN = (*TARGETS, "kv_groups", "ffn", "query_heads", "hidden_size", "experts", "experts_list")
"""Options that cut within layers. They need a family that declares its units."""

KINDS = {"kv_groups": "groups", "query_heads": "queries", "ffn": "neurons", "hidden_size": "hidden"}
"""The kind of units that an option cuts."""


def trims_vocabulary(recipe: StructureRecipe) -> bool:
    """Whether a recipe removes tokens."""
    return recipe.vocabulary is not None or recipe.vocabulary_size is not None


@dataclass(frozen=True)
class CutPlan:
    """The plan of a cut, in units of the model.

    Attributes:
        sizes: sizes of the uncut model.
        drop_layers: number of decoder layers to remove.
        keep_experts: number of experts to keep in each layer; None keeps all.
        named: the experts that stay where they are named, by number of the layer; else None.
        keep_hidden: number of channels of the residual stream to keep; None keeps all.
        keep_queries: number of query heads to keep in each KV group; None keeps all.
        heads: fraction of KV groups to remove.
        neurons: fraction of FFN neurons to remove, also of each expert.
        joint: fraction to remove from the parameters of heads and neurons together; None if each
            has its own fraction.
        whole_layers: number of layers at the start and at the end that keep all heads and neurons.
    """

    sizes: Sizes
    drop_layers: int = 0
    keep_experts: int | None = None
    named: Mapping[int, tuple[int, ...]] | None = None
    keep_hidden: int | None = None
    keep_queries: int | None = None
    heads: float = 0.0
    neurons: float = 0.0
    joint: float | None = None
    whole_layers: tuple[int, int] = (0, 0)

    def narrowed(self, layers: int) -> range:
        """The layers whose heads and neurons are cut, from the given number of remaining layers."""
        return range(self.whole_layers[0], layers - self.whole_layers[1])

    @property
    def narrows(self) -> bool:
        """Whether the plan cuts heads or neurons."""
        return bool(self.heads or self.neurons or self.joint)

    @property
    def cuts(self) -> bool:
        """Whether the plan cuts anything."""
        kept = self.keep_hidden, self.keep_queries
        return self.drop_layers > 0 or self.narrows or self.sheds or kept != (None, None)

    @property
    def sheds(self) -> bool:
        """Whether the plan cuts experts."""
        return self.keep_experts is not None or self.named is not None


def count(kept: Kept, total: int, what: str) -> int:
    """How many of `total` units to keep.

    Args:
        kept: a number of units, or a fraction (a float of at most 1).
        total: number of units in the model.
        what: name of the units.

    Raises:
        RecipeError: the result is 0, or more than `total`.
    """
    # 1.0 is all of them, 1 is one.
    number = round(kept * total) if isinstance(kept, float) and kept <= 1 else kept
    if not 0 < number <= total:
        raise RecipeError(
            f"the recipe keeps {kept} {what}, but the model has {total}",
            remedy=f"give a number from 1 to {total}, or a fraction of them such as 0.75",
        )
    return int(number)


def _fewer(kept: Kept | None, total: int, what: str) -> int | None:
    """How many units to keep; None for all. Arguments and errors as in `count`."""
    number = total if kept is None else count(kept, total, what)
    return number if number < total else None


def plan_cut(recipe: StructureRecipe, model: Any) -> CutPlan:
    """The plan of a recipe for a model. A target in time is met later (`structured/latency.py`).

    Args:
        recipe: the user's recipe.
        model: the skeleton.

    Raises:
        RecipeError: the recipe cuts nothing, or too much, or two options contradict each other.
        ArchitectureError: the recipe cuts units within layers, and the family does not declare
            them.
    """
    if only_embeds(model):
        check_embedder(recipe, model)
        return CutPlan(Sizes(hidden_size(model), 0, 1, (), (), (), ()))
    if any(getattr(recipe, name) is not None for name in WITHIN):
        couplings_of(describe(model), [k for n, k in KINDS.items() if getattr(recipe, n)])
    sizes, drop = sizes_of(model), 0
    layers = sizes.layers
    if recipe.keep_layers is not None:
        drop = layers - count(recipe.keep_layers, layers, "decoder layers")
    hidden = _fewer(recipe.hidden_size, sizes.hidden, "channels of the residual stream")
    if recipe.experts is not None and not any(sizes.experts):
        raise RecipeError("the model has no experts", remedy="leave --experts out")
    experts = _experts_of(recipe.experts, sizes)
    named = None
    if recipe.experts_list is not None:
        named = experts_in(recipe.experts_list)
        Cut(experts=named).check(sizes)
    queries = _queries_of(recipe, sizes)
    heads = neurons = 0.0
    whole_layers = _whole_layers(recipe, layers - drop)
    if recipe.kv_groups is not None:
        heads = 1 - _share(recipe.kv_groups, sizes.groups, "KV groups")
    if recipe.ffn is not None:
        # In a mixture a number is one of an expert's neurons; the others keep the same share.
        each = sizes.expert_neurons if any(sizes.expert_neurons) else sizes.neurons
        neurons = 1 - _share(recipe.ffn, each, "FFN neurons")
    for kind in NEURONS if any(getattr(recipe, name) is not None for name in WIDTHS) else ():
        if odd := [n for n in getattr(sizes, kind) if n % recipe.multiple]:
            raise RecipeError(
                f"{odd[0]} {UNITS[kind]} are no multiple of {recipe.multiple}",
                remedy="choose a number that divides them, such as 8 or 64",
            )
    plan = CutPlan(
        sizes, drop, experts, named, hidden, queries, heads, neurons, whole_layers=whole_layers
    )
    aims = any(getattr(recipe, name) is not None for name in TARGETS)
    if aims and max(max(getattr(sizes, kind)) for kind in NEURONS) < 2:
        raise RecipeError(
            "the model has no FFN neurons, and cuts of whole heads alone cannot reach a target",
            remedy="say how many of each to keep: --kv-groups, --experts, --keep-layers",
        )
    plan = with_target(plan, recipe, model)
    if not plan.cuts and recipe.decode_latency is None and not trims_vocabulary(recipe):
        raise RecipeError(
            "the recipe cuts nothing: the model already has these sizes",
            remedy="give a smaller number, or a fraction below 1 such as 0.75",
        )
    return plan


def experts_in(file: str) -> dict[int, tuple[int, ...]]:
    """The experts that stay, by number of the layer, from a JSON file.

    Raises:
        RecipeError: it cannot be read, or has something else.
    """
    place = Path(file).expanduser()
    try:
        return TypeAdapter(dict[int, tuple[int, ...]]).validate_json(place.read_bytes())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON object of lists of numbers"
        raise RecipeError(
            f"the list of experts cannot be read: {why}",
            where=str(place),
            remedy='write the numbers of the experts that stay by layer: {"0": [1, 2, 5], …}',
        ) from None


def _experts_of(wanted: Kept | None, sizes: Sizes) -> int | None:
    """How many experts each layer keeps; as many of each group between which a router chooses."""
    kept, groups = _fewer(wanted, max(sizes.experts), "experts of a layer"), sizes.expert_groups
    if kept is None or kept % groups == 0:
        return kept
    if isinstance(wanted, int):
        raise RecipeError(
            f"{kept} experts cannot be kept: the router chooses between {groups} groups of them, "
            "which stay equally large",
            remedy=f"keep a multiple of {groups}",
        )
    return kept - kept % groups


def _queries_of(recipe: StructureRecipe, sizes: Sizes) -> int | None:
    """How many query heads of each KV group to keep; None for all."""
    if recipe.query_heads is None:
        return None
    each = sizes.heads_per_group
    if each == 1 or not any(sizes.groups):
        raise RecipeError(
            "every query head of the model has a key and a value of its own",
            remedy="cut them together, with --kv-groups",
        )
    return _fewer(recipe.query_heads, each, "query heads of a KV group")


def _whole_layers(recipe: StructureRecipe, layers: int) -> tuple[int, int]:
    """The number of layers at the start and at the end that keep all heads and neurons."""
    first, last = recipe.whole_first, recipe.whole_last
    if first + last >= layers:
        raise RecipeError(
            f"{first} layers at the start and {last} at the end keep everything, but only "
            f"{layers} layers remain",
            remedy="keep fewer layers whole",
        )
    return first, last


def _share(kept: Kept, each: tuple[int, ...], what: str) -> float:
    """The fraction of units to keep in every layer."""
    most = max(each)
    if not most:
        raise RecipeError(f"the model has no {what} to cut")
    if kept == 0:
        raise RecipeError(f"no {what} would stay", remedy="to drop layers, use --keep-layers")
    return count(kept, most, f"{what} of a layer") / most


def _decoder_target(recipe: StructureRecipe, model: Any) -> float | None:
    """The fraction of the decoder's parameters to keep; None without a target."""
    if recipe.keep_parameters is not None:
        return recipe.keep_parameters
    if recipe.max_size is None:
        return None
    whole = accounting(model, Cut()).before
    # No cut reaches what is outside the decoder, so only the rest of the size can shrink.
    outside = whole.file_bytes - whole.decoder * model.dtype.itemsize
    left = (bytes_of(recipe.max_size) - outside) / (whole.file_bytes - outside)
    if not 0 < left < 1:
        raise RecipeError(
            f"max_size is {bytes_of(recipe.max_size) / 2**20:.1f} MiB; the weights take "
            f"{whole.file_bytes / 2**20:.1f} MiB, of which {outside / 2**20:.1f} are outside the "
            "decoder layers",
            remedy="give a number between these two",
        )
    return left


def with_target(plan: CutPlan, recipe: StructureRecipe, model: Any) -> CutPlan:
    """The plan with the fraction that heads and neurons must lose together.

    Args:
        plan: the plan of the other cuts.
        recipe: gives the target; perhaps none.
        model: the uncut skeleton.

    Raises:
        RecipeError: no fraction of heads and neurons meets the target.
    """
    target = _decoder_target(recipe, model)
    if target is None:
        return plan
    made = design(model, representative(plan))
    found, sizes = account(made), sizes_of(made.skeleton)
    whole, rest = found.before.decoder, found.after
    # What heads and neurons have after the other cuts; of that a share `joint` has to go.
    width = _parameters_of(unit_costs(sizes, made.skeleton), sizes, range(sizes.layers))
    joint = (rest.decoder - target * whole) / width if width else 0.0
    if not 0 < joint < 1:
        most, least = rest.decoder / whole, (rest.decoder - width) / whole
        raise RecipeError(
            f"a target of {target:.2%} of the decoder's parameters cannot be met: the other cuts "
            f"leave {most:.2%}, and without any heads and neurons {least:.2%} would be left",
            remedy=f"give a target between {least:.2%} and {most:.2%}, or leave it out",
        )
    return replace(plan, joint=joint)


def representative(plan: CutPlan) -> Cut:
    """A cut that keeps the planned numbers of layers, experts, channels, query heads: the first."""
    layers = range(plan.sizes.layers - plan.drop_layers)
    experts = {}
    if plan.named is not None:
        experts = {i: kept for i, kept in plan.named.items() if i in layers}
    elif plan.keep_experts is not None:
        each = plan.sizes.expert_groups  # which keep the same number
        experts = {
            # e · each mod n counts through a group in steps of `each`: the first of every group.
            i: tuple(e for e in range(n) if e * each % n < plan.keep_experts)
            for i, n in enumerate(plan.sizes.experts)
            if n and i in layers
        }
    hidden = None if plan.keep_hidden is None else tuple(range(plan.keep_hidden))
    queries = {}
    if plan.keep_queries is not None:
        each = plan.sizes.heads_per_group
        queries = {
            i: tuple(head for head in range(n) if head % each < plan.keep_queries)
            for i, n in enumerate(plan.sizes.queries)
            if n and i in layers
        }
    return Cut(layers=tuple(layers), queries=queries, experts=experts, hidden=hidden)


def counted_cut(recipe: StructureRecipe, plan: CutPlan, model: Any) -> Accounting:
    """Count what a cut would remove, if all layers lose equally many units.

    Args:
        recipe: the user's recipe.
        plan: the plan of the cut; a target in time is not known yet.
        model: the uncut skeleton.
    """
    whole = accounting(model, representative(plan))
    if not plan.narrows:
        return whole
    # As the run does it: the other cuts first, then heads and neurons of what they leave.
    left = design(model, representative(plan)).skeleton
    found = accounting(left, uniform_cut(plan, left, recipe.multiple))
    return Accounting(whole.before, found.after, whole.varied or found.varied)


def check_width(recipe: StructureRecipe, plan: CutPlan, model: Any) -> None:
    """Refuse, before any work, a width that whole heads and neurons cannot make.

    Args:
        recipe: the user's recipe.
        plan: the plan of the recipe; a target in time is not checked here.
        model: the uncut skeleton.

    Raises:
        RecipeError: no unit of a kind would stay, or no unit of a cut kind would go.
    """
    if not plan.narrows:
        return
    left = design(model, representative(plan)).skeleton
    sizes = sizes_of(left)
    if recipe.allocation not in (None, "uniform"):
        width_shares(plan, sizes, left, recipe.multiple)
        return
    counts = counts_left(plan, left, recipe.multiple)
    for gone, kinds in ((plan.heads, ("groups",)), (plan.neurons, NEURONS)):
        each = [(kind, i, n) for kind in kinds for i, n in counts[kind].items()]
        if gone and all(n == getattr(sizes, kind)[i] for kind, i, n in each):
            most = max(max(getattr(sizes, kind)) for kind in kinds)
            raise RecipeError(
                f"all {most} {UNITS[kinds[0]]} of a layer would stay",
                remedy="keep less, or in smaller multiples: --multiple",
            )


def uniform_cut(plan: CutPlan, model: Any, multiple: int) -> Cut:
    """A cut that removes the same number of heads and neurons from all layers.

    It keeps the first units. A run later selects the units on text; their number, and so size and
    speed, stay the same. Arguments and errors as in `counts_left`.
    """
    experts, kept = sizes_of(model).experts, dict[str, Any]()
    for kind, counts in counts_left(plan, model, multiple).items():
        kept[kind] = {layer: tuple(range(left)) for layer, left in counts.items()}
    each = kept["expert_neurons"]
    return Cut(**kept | {"expert_neurons": {i: (each[i],) * experts[i] for i in each}})


def counts_left(plan: CutPlan, model: Any, multiple: int) -> dict[str, dict[int, int]]:
    """How many units each layer keeps that loses some, by kind and layer.

    Args:
        plan: the plan of the cut.
        model: loaded or a skeleton, already cut to the kept layers, experts and channels.
        multiple: the number of kept neurons is a multiple of this.

    Raises:
        RecipeError: whole units cannot reach the aim, or no unit of a kind would stay.
    """
    sizes = sizes_of(model)
    counts: dict[str, dict[int, int]] = {kind: {} for kind in ("groups", *NEURONS)}
    for kind, gone in width_shares(plan, sizes, model, multiple).items():
        width = unit_width(sizes, kind)
        # The pattern of the later run counts here, so that both agree on every unit.
        pattern = parse_pattern(pattern_text(sizes, kind, multiple))
        for layer in plan.narrowed(sizes.layers):
            units: int = getattr(sizes, kind)[layer]
            if units and gone:
                left = units - pattern.pruned((1, units * width), gone) // width
                if not left:
                    raise RecipeError(
                        f"none of the {units} {UNITS[kind]} of a layer would stay",
                        remedy="keep more, or drop layers too: --keep-layers",
                    )
                counts[kind][layer] = left
    return counts


def width_shares(plan: CutPlan, sizes: Sizes, model: Any, multiple: int) -> dict[str, float]:
    """The fractions of units to remove by kind, before any allocation; of neurons one for all.

    With a joint target, the fraction of groups is rounded down to whole groups, and neurons make
    up the rest: there are hundreds of neurons for each group. The cut layers compensate for the
    layers that stay whole. Experts lose whole multiples; where one entry of the configuration has
    the sizes of shared and other experts, both lose exactly the same share.
    """
    heads, neurons = plan.heads, plan.neurons
    if plan.joint is not None:
        heads, neurons = _joint_shares(plan, sizes, model)
    found = {"groups": heads} if heads or plan.joint is not None else {}
    found |= {kind: neurons for kind in NEURONS if neurons and any(getattr(sizes, kind))}
    if "expert_neurons" in found:
        units = max(sizes.expert_neurons)
        pattern = parse_pattern(pattern_text(sizes, "expert_neurons", multiple))
        gone = pattern.pruned((1, units), neurons)
        if plan.joint is not None:  # at least as many as the target needs; 1e-9 as for groups
            step = pattern.step((1, units))
            gone = step * ceil(neurons * units / step - 1e-9)
        found["expert_neurons"] = gone / units
        if "shared_neurons" in found and _tied(model):
            found["shared_neurons"] = found["expert_neurons"]
    return {kind: share for kind, share in found.items() if any(getattr(sizes, kind))}


def _tied(model: Any) -> bool:
    """Whether one entry of the configuration has the sizes of shared and other experts."""
    experts = describe(model).experts
    return experts is not None and not experts.shared_width


def _joint_shares(plan: CutPlan, sizes: Sizes, model: Any) -> tuple[float, float]:
    """The fractions of groups and of neurons to remove for a joint target."""
    assert plan.joint is not None
    costs = unit_costs(sizes, model)
    cut = plan.narrowed(sizes.layers)
    gone = plan.joint * _parameters_of(costs, sizes, range(sizes.layers))
    heads = 0.0
    if "groups" in costs:
        most, total = max(sizes.groups), _parameters_of(costs, sizes, cut)
        # The same share of all kinds, rounded down to whole groups; 1e-9 keeps exact ones whole.
        heads = int(min(1, gone / total) * most + 1e-9) / most
        gone -= heads * _parameters_of({"groups": costs.pop("groups")}, sizes, cut)
    neurons = gone / _parameters_of(costs, sizes, cut)
    if not 0 <= neurons < 1:
        raise RecipeError(
            f"{neurons:.0%} of the FFN neurons would have to go",
            remedy="keep more parameters, or drop layers too: --keep-layers",
        )
    return heads, neurons


def _parameters_of(costs: Mapping[str, int], sizes: Sizes, layers: Iterable[int]) -> int:
    """How many parameters the units of some layers have, by what one of each kind has."""
    return sum(cost * getattr(sizes, kind)[i] for kind, cost in costs.items() for i in layers)


def pattern_text(sizes: Sizes, kind: str, multiple: int) -> str:
    """The pattern of the linear that reads units of a kind.

    Experts keep a multiple of 8 neurons if they have one: `grouped_mm` of torch, by which
    transformers multiplies by all experts at once, reads 16 bytes at a time.
    """
    together = multiple if kind in NEURONS else 1
    if kind == "expert_neurons" and max(sizes.expert_neurons) % 8 == 0:
        together = lcm(multiple, 8)
    return f"*x{unit_width(sizes, kind)}" + (f"/{together}" if together > 1 else "")


def unit_costs(sizes: Sizes, model: Any) -> dict[str, int]:
    """The number of parameters that one unit of each kind removes.

    One of `expert_neurons` is a neuron of every expert of a layer, with those of the shared expert
    that have to go with it.
    """
    found = {}
    for kind in ("groups", *NEURONS):
        each: tuple[int, ...] = getattr(sizes, kind)
        if max(each) < 2 or (kind == "shared_neurons" and _tied(model)):
            continue
        # One unit less in every layer, counted, so that a plain class has the sizes.
        fewer: Any = {kind: {i: tuple(range(n - 1)) for i, n in enumerate(each) if n > 1}}
        if kind == "expert_neurons":
            of_shared = {
                i: sizes.shared_neurons[i] // each[i] * len(x) for i, x in fewer[kind].items()
            }
            if _tied(model):
                fewer["shared_neurons"] = {i: tuple(range(n)) for i, n in of_shared.items() if n}
            fewer[kind] = {i: (x,) * sizes.experts[i] for i, x in fewer[kind].items()}
        counted = accounting(model, Cut(**fewer))
        found[kind] = (counted.before.decoder - counted.after.decoder) // len(fewer[kind])
    return found
