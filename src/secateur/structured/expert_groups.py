"""Groups of experts, between which some routers choose first, stay equally large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.errors import RecipeError
from secateur.structured.cut import Sizes


def refuse_uneven_groups(config: Any, kept: Sequence[int], sizes: Sizes, layer: int) -> None:
    """Refuse a cut that leaves the groups of experts uneven, or too small for the router.

    A router that picks groups first (`n_group`) divides the experts into groups of one size, in
    their order, and rates a group by its two best experts.

    Raises:
        RecipeError: the groups are uneven, or too small.
    """
    groups, count = sizes.expert_groups, sizes.experts[layer]
    if groups == 1 or not count:
        return
    own = [sum(e * groups // count == group for e in kept) for group in range(groups)]
    chosen = config.num_experts_per_tok
    open_groups = getattr(config, "topk_group", None) or groups
    least = max(2, -(-chosen // open_groups))
    if len(set(own)) > 1 or own[0] < least:
        raise RecipeError(
            f"layer {layer}: the cut keeps {own} experts of the {groups} groups between which the "
            "router chooses",
            remedy=f"keep the same number in every group, {least} or more",
        )
