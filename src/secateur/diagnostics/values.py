"""Finds impossible values: NaN, Inf, and matrices that have shrunk to almost zero."""

from __future__ import annotations

import statistics

from secateur.diagnostics.findings import Finding
from secateur.diagnostics.weights import Weights

VANISHED = 1e-3
"""Relative to the median size of the same matrix in all layers; in SmolLM2 the least is 0.3."""


def check_values(weights: Weights) -> list[Finding]:
    """Tensors that are not finite, and linears far smaller than the same in other layers."""
    found = [
        Finding(
            "not-finite",
            "error",
            name,
            f"{bad} of {total} values are NaN or infinite",
            "the file is damaged or the run overflowed: get the model again, or prune again in "
            "float32 or bfloat16",
        )
        for name, (bad, total) in weights.not_finite.items()
    ]
    for kind in dict.fromkeys(x.kind for x in weights.linears):
        same = [x for x in weights.linears if x.kind == kind]
        usual = statistics.median(x.size for x in same)
        found += [
            Finding(
                "weights-vanished",
                "warning",
                x.name,
                f"its weights are {x.size:.2g} large (root mean square of those that are not "
                f"zero), the same matrix is {usual:.2g} in the median layer",
                "the layer adds almost nothing: compare it with the dense model (--dense REF), "
                "and prune again with an override for it",
            )
            for x in same
            if x.size < VANISHED * usual
        ]
    return found
