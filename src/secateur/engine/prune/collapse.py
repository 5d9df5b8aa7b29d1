"""Is a run destroying the model? Each pruned layer is checked.

A linear has collapsed when it has lost four fifths of the energy of its output, a relative error
of 0.9. Solvers that repair weights measure that error. For solvers that only set weights to zero,
the norms of the inputs give an estimate, as if inputs were uncorrelated:

    lost = Σ over pruned w² ‖X_j‖² / Σ over all w² ‖X_j‖²
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.engine.prune.linear_record import LinearRecord
from secateur.errors import VerificationError
from secateur.types import Mask, Statistics, Weight

__all__ = ["COLLAPSED", "collapse_error", "collapsed", "in_words", "lost_energy"]

COLLAPSED = 0.8
"""The share of its output's energy that a linear has lost when it has collapsed."""


def lost_energy(weight: Weight, mask: Mask, statistics: Statistics) -> float | None:
    """The estimate above; None where no statistics of the inputs were gathered."""
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
    """The linears that have collapsed, with what they lost."""
    known = {r.name: r.lost if r.error is None else r.error for r in records}
    # an error that is not a number is above everything
    return {n: lost for n, lost in known.items() if lost is not None and not lost <= COLLAPSED}


def in_words(lost: Mapping[str, float]) -> str:
    """The collapsed linears of a layer in a line."""
    return ", ".join(f"{name} lost {share:.1%} of its output" for name, share in lost.items())


def collapse_error(layer: str, lost: Mapping[str, float]) -> VerificationError:
    """The error that ends a run after a layer in which something has collapsed."""
    return VerificationError(
        f"the layer has collapsed: {in_words(lost)}",
        where=layer,
        remedy="start anew with --restart and a lower --sparsity, or less for this layer "
        f"(--overrides '{layer}.*=0.3'); the finished layers were kept, and --resume "
        "--on-collapse warn goes on with the same sparsity",
    )
