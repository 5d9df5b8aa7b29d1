"""Checks each pruned layer for collapse.

A linear has collapsed when it has lost four fifths of the energy of its output, a relative error
of 0.9. Solvers that repair weights measure that error. For solvers that only set weights to zero,
the norms of the inputs give an estimate that assumes uncorrelated inputs:

    lost = Σ over pruned w² ‖X_j‖² / Σ over all w² ‖X_j‖²
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.engine.prune.linear_record import LinearRecord
from secateur.errors import VerificationError
from secateur.types import Mask, Statistics, Weight

COLLAPSED = 0.8
"""A linear has collapsed if it lost more than this share of its output's energy."""


def lost_energy(weight: Weight, mask: Mask, statistics: Statistics) -> float | None:
    """The estimate above; None without statistics of the inputs."""
    if "column_norm" in statistics:
        power = statistics["column_norm"].square()
    elif "gram" in statistics:
        power = statistics["gram"].diagonal()
    else:
        return None
    energy = weight.detach().float().square() * power
    total = float(energy.sum())
    return float(energy.masked_fill(mask, 0.0).sum()) / total if total > 0 else None


def collapsed(records: Sequence[LinearRecord]) -> dict[str, float]:
    """The collapsed linears, with their lost energy."""
    known = {r.name: r.lost if r.error is None else r.error for r in records}
    # an error that is not a number counts as the largest
    return {n: lost for n, lost in known.items() if lost is not None and not lost <= COLLAPSED}


def in_words(lost: Mapping[str, float]) -> str:
    """Describe the collapsed linears of a layer in one line."""
    return ", ".join(f"{name} lost {share:.1%} of its output" for name, share in lost.items())


def collapse_error(layer: str, lost: Mapping[str, float]) -> VerificationError:
    """The error that ends a run after a collapsed layer."""
    return VerificationError(
        f"the layer has collapsed: {in_words(lost)}",
        where=layer,
        remedy="start anew with --restart and a lower --sparsity, or less for this layer "
        f"(--overrides '{layer}.*=0.3'); the finished layers were kept, and --resume "
        "--on-collapse warn goes on with the same sparsity",
    )
