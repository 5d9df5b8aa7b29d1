"""Counts what calibration reaches. Some experts receive few tokens, some none.

Without tokens, an expert cannot be scored or compensated. If no token reaches an expert's linear,
it stays unchanged, whatever its task, and the ledger names it. If few tokens reach it, it is
pruned, and its record gives their number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from secateur.errors import RecipeError, VerificationError
from secateur.models.architecture import Architecture
from secateur.runs.records import Layer

log = logging.getLogger(__name__)

_MORE = "calibrate on more text (--windows), of more kinds"


def is_reached(tokens: int | None, own: Mapping[str, Tensor]) -> bool:
    """Whether calibration reached a linear of an expert. It always reaches all others.

    Args:
        tokens: number of its inputs; None if inputs do not matter.
        own: its own statistics, all zero if no gradient arrived.
    """
    return tokens != 0 and (not own or any(bool(value.any()) for value in own.values()))


def refuse_unreached(unreached: Sequence[str]) -> None:
    """Refuse to allocate a budget if calibration did not reach some of the linears.

    Raises:
        RecipeError: there are such linears.
    """
    if unreached:
        raise RecipeError(
            f"no calibration token is routed to {len(unreached)} expert matrices of this layer, "
            "so an allocation knows nothing of them",
            where=unreached[0],
            remedy=f"{_MORE}, leave the allocation out, or leave them out (--exclude)",
        )


def coverage(layers: Sequence[Layer], architecture: Architecture) -> dict[str, Any] | None:
    """Summarise how well calibration reached the experts that were pruned, from the ledger.

    Args:
        layers: of the ledger.
        architecture: shows which linears belong to experts.

    Returns:
        The record for the manifest; None for a model without experts:
            linears: number of pruned linears of experts.
            few: number of them that received fewer tokens than they have inputs.
            fewest_tokens: the smallest number of tokens of one; None if inputs did not matter.
            unseen: linears that stayed unchanged because no token reached them.
            experts: number of experts of which linears were to be pruned.
            silent: experts that no token reached: their numbers, by the number of the layer.
    """
    if architecture.experts is None:
        return None
    records = [r for x in layers for r in x.linears if architecture.of_expert(r.name)]
    seen = [(r.tokens, r.shape[1]) for r in records if r.tokens is not None]
    unseen = [name for x in layers for name in x.unseen]
    reached = {_number_of(r.name) for r in records if r.tokens != 0}
    return {
        "linears": len(records),
        "few": sum(tokens < inputs for tokens, inputs in seen),
        "fewest_tokens": min((tokens for tokens, _ in seen), default=None),
        "unseen": unseen,
        "experts": len({_number_of(r.name) for r in records} | {_number_of(n) for n in unseen}),
        "silent": silent_experts(name for name in unseen if _number_of(name) not in reached),
    }


def warn_of_experts(found: Mapping[str, Any]) -> None:
    """Warn about linears of experts that stayed unchanged, or that received few tokens."""
    if unseen := found["unseen"]:
        log.warning(
            "no calibration token was routed to %d expert matrices (%s, …); they stay dense; %s",
            len(unseen),
            unseen[0],
            _MORE,
        )
    if found["few"]:
        log.warning(
            "%d of %d expert matrices saw fewer tokens than they have inputs (fewest: %d); %s",
            found["few"],
            found["linears"],
            found["fewest_tokens"],
            _MORE,
        )


def silent_experts(unseen: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of experts, by the number of the layer, from the names of their linears."""
    found: dict[str, list[int]] = {}
    for layer, expert in sorted({_number_of(name) for name in unseen}):
        found.setdefault(str(layer), []).append(expert)
    return found


def _number_of(name: str) -> tuple[int, int]:
    """The numbers of the layer and of the expert in the name of an expert's linear."""
    layer, expert, *_ = (*(int(x) for x in name.split(".") if x.isdecimal()), -1, -1)
    return layer, expert


def reach(layers: Sequence[Layer], changed: Iterable[str]) -> dict[str, int | None]:
    """Count what a run reached, and refuse a matrix that it passed over.

    Args:
        layers: of the ledger.
        changed: names of the linears that were to be pruned.

    Returns:
        The record for the manifest:
            matrices: number of matrices to prune.
            pruned: number of them that were pruned; the others are `unseen` in `coverage`.
            fewest_tokens: the smallest number of calibration tokens of a pruned matrix; None if
                inputs did not matter.

    Raises:
        VerificationError: a linear has no record, or it was pruned without calibration tokens
            where others had some.
    """
    records = {r.name: r.tokens for x in layers for r in x.linears}
    unseen = {name for x in layers for name in x.unseen}
    counted = [tokens for tokens in records.values() if tokens is not None]
    lost = sorted(set(changed) - records.keys() - unseen)
    if counted:
        lost += sorted(name for name, tokens in records.items() if not tokens)
    if lost:
        raise VerificationError(
            f"{len(lost)} matrices were to be pruned, but calibration passed over them",
            where=lost[0],
            remedy="please report this with the model's name: its layers run in a way that is not "
            "known; --exclude leaves such matrices out",
        )
    return {
        "matrices": len(records) + len(unseen),
        "pruned": len(records),
        "fewest_tokens": min(counted, default=None),
    }
