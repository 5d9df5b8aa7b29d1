"""Experts see only the tokens that are routed to them: some see few of the calibration, some none.

What an expert has not seen cannot be scored or compensated. An expert's linear that no token
reaches is left as it is, whatever was asked of it, and named in the ledger; one that few tokens
reach is pruned, and its record says by how many.
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
    """Whether calibration says anything of a linear; of one outside the experts it always does.

    Args:
        architecture: tells whose linear it is.
        linear: the linear.
        tokens: how many inputs were seen; None where inputs do not matter.
        own: its own statistics, which are zero throughout where no gradient arrived.
    """
    if not architecture.of_expert(linear.name):
        return True
    return tokens != 0 and (not own or any(bool(value.any()) for value in own.values()))


def refuse_unreached(unreached: Sequence[str]) -> None:
    """Refuse to share out a budget among linears of some of which nothing is known.

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
        linears: linears of experts that were pruned.
        few: those that saw fewer tokens than they have inputs.
        fewest_tokens: that one of them saw; None where inputs did not matter.
        unseen: linears left as they were, because no token reached them.
    """

    linears: int = 0
    few: int = 0
    fewest_tokens: int | None = None
    unseen: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As it is written to the manifest."""
        return asdict(self)

    def tell(self) -> None:
        """Warn of what was left, and of what little is known."""
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
    """What the ledger says of the experts; None for a model without.

    Args:
        layers: the lines of its layers.
        architecture: tells whose linears are whose.
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
