"""Reports how well calibration reaches the experts. Some experts receive few tokens, some none.

Without tokens, an expert cannot be scored or compensated. If no token reaches an expert's linear,
it stays unchanged, whatever its task, and the ledger names it. If few tokens reach it, it is
pruned, and its record gives their number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from secateur.errors import RecipeError
from secateur.models.architecture import Architecture, Linear

__all__ = ["Coverage", "coverage", "is_reached", "refuse_unreached"]

log = logging.getLogger(__name__)

MORE = "calibrate on more text (--windows), of more kinds"


def is_reached(
    architecture: Architecture, linear: Linear, tokens: int | None, own: Mapping[str, Tensor]
) -> bool:
    """Whether calibration reached a linear. It always reaches linears outside the experts.

    Args:
        architecture: shows which linears belong to experts.
        linear: the linear.
        tokens: number of inputs; None if inputs do not matter.
        own: its own statistics, all zero if no gradient arrived.
    """
    if not architecture.of_expert(linear.name):
        return True
    return tokens != 0 and (not own or any(bool(value.any()) for value in own.values()))


def refuse_unreached(unreached: Sequence[str]) -> None:
    """Refuse to allocate a budget if calibration did not reach some of the linears.

    Raises:
        RecipeError: there are such linears.
    """
    if unreached:
        raise RecipeError(
            f"no calibration token is routed to {len(unreached)} linears of experts of this layer, "
            "so an allocation knows nothing of them",
            where=unreached[0],
            remedy=f"{MORE}, leave the allocation out, or leave them out (--exclude)",
        )


@dataclass(frozen=True)
class Coverage:
    """How well calibration reached the experts whose weights were pruned.

    Attributes:
        linears: number of pruned linears of experts.
        few: number of them that received fewer tokens than they have inputs.
        fewest_tokens: the smallest number of tokens of one of them; None if inputs did not matter.
        unseen: linears that stayed unchanged because no token reached them.
    """

    linears: int = 0
    few: int = 0
    fewest_tokens: int | None = None
    unseen: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The form for the manifest."""
        return asdict(self)

    def tell(self) -> None:
        """Warn about linears that stayed unchanged, and about linears with few tokens."""
        if self.unseen:
            log.warning(
                "no calibration token was routed to %d linears of experts (%s, …); they are left "
                "dense: %s",
                len(self.unseen),
                self.unseen[0],
                MORE,
            )
        if self.few:
            log.warning(
                "%d of %d linears of experts saw fewer tokens than they have inputs, one only %d: "
                "what their weights do is known in part; %s",
                self.few,
                self.linears,
                self.fewest_tokens,
                MORE,
            )


def coverage(layers: Sequence[Mapping[str, Any]], architecture: Architecture) -> Coverage | None:
    """Summarise the experts from the ledger; None for a model without experts.

    Args:
        layers: the ledger's lines of its layers.
        architecture: shows which linears belong to experts.
    """
    if architecture.experts is None:
        return None
    records = [r for x in layers for r in x["linears"] if architecture.of_expert(r["name"])]
    seen = [(r["tokens"], r["shape"][1]) for r in records if r.get("tokens") is not None]
    return Coverage(
        len(records),
        sum(tokens < inputs for tokens, inputs in seen),
        min((tokens for tokens, _ in seen), default=None),
        [name for x in layers for name in x.get("unseen", ())],
    )
