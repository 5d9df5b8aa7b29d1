"""From the keep-options of a structured cut to numbers of units, before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.recipes.structure import Kept, StructureRecipe
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, Sizes, couplings_of, sizes_of

__all__ = ["CutPlan", "aim_of", "count"]


TARGETS = ("keep_parameters", "file_mib", "decode_latency")
"""What says how much heads and neurons lose together."""

UNITS = (*TARGETS, "kv_groups", "ffn", "kv_cache", "query_heads", "hidden_size", "experts")
"""What cuts within layers, for which a family has to be declared."""


@dataclass(frozen=True)
class CutPlan:
    """What stays and what goes, in units of the model.

    Attributes:
        sizes: of the model as it is.
        drop_layers: decoder layers, or two sub-blocks for each, that go.
        keep_experts: experts of each layer that stay; None keeps all.
        keep_hidden: channels of the residual stream that stay; None keeps all.
        keep_queries: query heads of each KV group that stay; None keeps all.
        heads: fraction of KV groups that goes.
        neurons: fraction of FFN neurons that goes.
        joint: fraction of the parameters of both together that goes; None where each has its
            own.
        ends: layers at the start and at the end that keep all heads and neurons.
    """

    sizes: Sizes
    drop_layers: int = 0
    keep_experts: int | None = None
    keep_hidden: int | None = None
    keep_queries: int | None = None
    heads: float = 0.0
    neurons: float = 0.0
    joint: float | None = None
    ends: tuple[int, int] = (0, 0)

    def narrowed(self, layers: int) -> range:
        """The layers whose heads and neurons are cut, of so many that are left."""
        return range(self.ends[0], layers - self.ends[1])

    @property
    def narrows(self) -> bool:
        """Whether heads or neurons are cut."""
        return bool(self.heads or self.neurons or self.joint)

    @property
    def cuts(self) -> bool:
        """Whether anything is."""
        kept = self.keep_experts, self.keep_hidden, self.keep_queries
        return bool(self.drop_layers or self.narrows or kept != (None, None, None))


def count(kept: Kept, total: int, what: str) -> int:
    """How many of `total` units stay.

    Args:
        kept: a number of units, or a fraction (a float of at most 1).
        total: units there are.
        what: they are called.

    Raises:
        RecipeError: none would stay, or more than there are.
    """
    number = round(kept * total) if isinstance(kept, float) and kept <= 1 else kept
    if number != int(number):
        raise RecipeError(
            f"{kept} {what} are neither a number of units nor a fraction of them",
            remedy=f"give a whole number up to {total}, or a fraction up to 1.0",
        )
    if not 0 < number <= total:
        raise RecipeError(
            f"{kept} {what} were asked for, of {total} there are",
            remedy=f"give a number from 1 to {total}, or a fraction of them such as 0.75",
        )
    return int(number)


def fewer(kept: Kept, total: int, what: str) -> int | None:
    """How many units stay; None where all do. The arguments and errors are those of `count`."""
    number = count(kept, total, what)
    return number if number < total else None


def aim_of(recipe: StructureRecipe, model: Any) -> CutPlan:
    """The plan of a recipe for a model; a target in time is searched later (`latency.py`).

    Args:
        recipe: as the user wrote it.
        model: the skeleton.

    Raises:
        RecipeError: nothing would be cut, or too much, or two options contradict each other.
        ArchitectureError: units within layers are to go, and the family does not declare them.
    """
    check_together(recipe)
    if any(getattr(recipe, name) is not None for name in UNITS):
        couplings_of(describe(model))
    sizes = sizes_of(model)
    layers = sizes.layers
    drop = 0
    if recipe.keep_layers is not None:
        drop = layers - count(recipe.keep_layers, layers, "decoder layers")
    hidden = experts = None
    if recipe.hidden_size is not None:
        hidden = fewer(recipe.hidden_size, sizes.hidden, "channels of the residual stream")
    if recipe.experts is not None:
        if not any(sizes.experts):
            raise RecipeError("the model has no experts", remedy="leave --experts out")
        experts = fewer(recipe.experts, max(sizes.experts), "experts of a layer")
    queries = queries_of(recipe, sizes)
    heads = neurons = 0.0
    ends = ends_of(recipe, layers - drop)
    if recipe.kv_cache is not None:  # layers that go take their part of the cache with them
        gone = max(0.0, 1 - recipe.kv_cache * layers / (layers - drop))
        heads = gone * (layers - drop) / (layers - drop - sum(ends))
        if heads >= 1:
            raise RecipeError(
                f"no KV groups would stay between the {sum(ends)} layers that keep all",
                remedy="keep more of the cache, or fewer layers whole",
            )
        if recipe.allocation in (None, "uniform"):  # whole groups, and no more than the target
            most = max(1, *sizes.groups)
            heads = ceil(heads * most - 1e-9) / most
    if recipe.kv_groups is not None:
        heads = 1 - share(recipe.kv_groups, sizes.groups, "KV groups")
    if recipe.ffn is not None:
        neurons = 1 - share(recipe.ffn, sizes.neurons, "FFN neurons")
    if any(n % recipe.multiple for n in sizes.neurons):
        raise RecipeError(
            f"{max(sizes.neurons)} FFN neurons are no multiple of {recipe.multiple}",
            remedy="choose a number that divides them, such as 8 or 64",
        )
    if any(getattr(recipe, name) is not None for name in TARGETS):
        check_narrowable(model, sizes)
    aim = CutPlan(sizes, drop, experts, hidden, queries, heads, neurons, ends=ends)
    target = decoder_target(recipe, model)
    if target is not None:
        aim = with_target(aim, target, model)
    if not aim.cuts and recipe.decode_latency is None:
        raise RecipeError(
            "nothing is to be cut: the model has no more than what is to stay",
            remedy="say a smaller number, or a fraction below 1 such as 0.75",
        )
    return aim


def check_together(recipe: StructureRecipe) -> None:
    """Refuse options that contradict each other, or cut nothing.

    Raises:
        RecipeError: naming the options.
    """
    targets = [n for n in TARGETS if getattr(recipe, n) is not None]
    widths = [n for n in ("kv_groups", "ffn", "kv_cache") if getattr(recipe, n) is not None]
    steps = ("keep_layers", "experts", "hidden_size", "query_heads")
    others = [n for n in steps if getattr(recipe, n) is not None]
    if not targets + widths + others:
        raise RecipeError(
            "nothing is to be cut",
            remedy="say what stays: --keep-layers 24, --ffn 0.75, --kv-groups 0.67, "
            "--hidden-size 0.9, --experts 0.5, or --keep-parameters 0.75 of the decoder's",
        )
    narrowed = targets or widths or recipe.query_heads is not None
    if not narrowed and (recipe.whole_first or recipe.whole_last):
        raise RecipeError(
            "some layers keep all heads and neurons, but no other layer loses any",
            remedy="leave --whole-first and --whole-last out, or add --ffn, --kv-groups or a "
            "target",
        )
    if len(targets) > 1:
        raise RecipeError(f"{targets[0]} and {targets[1]} are two targets", remedy="give one")
    if targets and widths:
        raise RecipeError(
            f"{targets[0]} says how much heads and neurons lose together, and {widths[0]} too",
            remedy=f"leave {widths[0]} out, or the target",
        )
    if recipe.kv_groups is not None and recipe.kv_cache is not None:
        raise RecipeError("kv_groups and kv_cache say the same thing", remedy="give one of them")


def queries_of(recipe: StructureRecipe, sizes: Sizes) -> int | None:
    """How many query heads of each KV group stay; None for all.

    Raises:
        RecipeError: a group has one query head, or there is no such number of them.
    """
    if recipe.query_heads is None:
        return None
    each = sizes.heads_per_group
    if each == 1 or not any(sizes.groups):
        raise RecipeError(
            "every query head of the model has a key and a value of its own",
            remedy="cut them together, with --kv-groups",
        )
    return fewer(recipe.query_heads, each, "query heads of a KV group")


def ends_of(recipe: StructureRecipe, layers: int) -> tuple[int, int]:
    """Layers at the start and at the end that keep all heads and neurons.

    Args:
        recipe: as the user wrote it.
        layers: that stay.

    Raises:
        RecipeError: none would be left between them, or query heads are to go, of which all layers
            have as many.
    """
    ends = recipe.whole_first, recipe.whole_last
    if sum(ends) >= layers:
        raise RecipeError(
            f"of {layers} layers, {ends[0]} at the start and {ends[1]} at the end are to be whole",
            remedy="leave some between them",
        )
    if any(ends) and recipe.query_heads is not None:
        raise RecipeError(
            "all layers have as many query heads in a KV group, so none can keep them",
            remedy="leave --whole-first and --whole-last out, or --query-heads",
        )
    return ends


def check_narrowable(model: Any, sizes: Sizes) -> None:
    """Refuse a target where heads and neurons cannot be cut to reach it.

    Raises:
        RecipeError: there are no neurons to make up for what whole heads leave.
    """
    if max(sizes.neurons) < 2:
        raise RecipeError(
            "the model has no FFN neurons outside its experts, and whole heads alone reach no "
            "target",
            remedy="say what stays of each: --kv-groups, --experts, --keep-layers",
        )


def share(kept: Kept, each: tuple[int, ...], what: str) -> float:
    """The fraction of units that stays in every layer.

    Raises:
        RecipeError: more than there are, or no layer has such units.
    """
    most = max(each)
    if not most:
        raise RecipeError(f"the model has no {what} that could be cut")
    if kept == 0:
        raise RecipeError(
            f"no {what} would stay", remedy="to drop sub-blocks, use --depth-units blocks"
        )
    return count(kept, most, f"{what} of a layer") / most


def decoder_target(recipe: StructureRecipe, model: Any) -> float | None:
    """The fraction of the decoder's parameters that is to stay, if a target was given."""
    if recipe.keep_parameters is not None:
        return recipe.keep_parameters
    if recipe.file_mib is None:
        return None
    whole = accounting(model, Cut()).before
    outside = whole.file_bytes - whole.decoder * model.dtype.itemsize
    left = (recipe.file_mib * 2**20 - outside) / (whole.file_bytes - outside)
    if not 0 < left < 1:
        raise RecipeError(
            f"{recipe.file_mib:g} MiB were asked for; the weights have "
            f"{whole.file_bytes / 2**20:.1f}, of which {outside / 2**20:.1f} lie outside the "
            "decoder layers",
            remedy="give a number between these two",
        )
    return left


def with_target(aim: CutPlan, target: float, model: Any) -> CutPlan:
    """The aim, with the fraction that heads and neurons have to lose together.

    Raises:
        RecipeError: the other cuts reach the target alone, or no width could reach it.
    """
    found = accounting(model, representative(aim))
    whole, rest = found.before.decoder, found.after
    width = rest.attention + rest.ffn
    joint = (rest.decoder - target * whole) / width if width else 0.0
    if not 0 < joint < 1:
        raise RecipeError(
            f"{target:.1%} of the decoder's parameters are to stay; without a cut of heads and "
            f"neurons {rest.decoder / whole:.1%} would, and these hold {width / whole:.1%}",
            remedy="leave the target out, or choose another one",
        )
    return replace(aim, joint=joint)


def representative(aim: CutPlan) -> Cut:
    """A cut with the same numbers of layers, experts, channels and query heads: the first stay."""
    layers = range(aim.sizes.layers - aim.drop_layers)
    experts = {}
    if aim.keep_experts is not None:
        experts = {
            i: tuple(range(min(n, aim.keep_experts)))
            for i, n in enumerate(aim.sizes.experts)
            if n and i in layers
        }
    hidden = None if aim.keep_hidden is None else tuple(range(aim.keep_hidden))
    queries = {}
    if aim.keep_queries is not None:
        each = aim.sizes.heads_per_group
        queries = {
            i: tuple(head for head in range(n) if head % each < aim.keep_queries)
            for i, n in enumerate(aim.sizes.queries)
            if n and i in layers
        }
    return Cut(layers=tuple(layers), queries=queries, experts=experts, hidden=hidden)
