"""Findings from the drift of layers: collapse, broken residuals, the layers hit hardest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from secateur.diagnostics.drift import LayerDrift
from secateur.diagnostics.findings import Finding, Severity

COLLAPSED, EXPLODED = 0.1, 10.0
"""A layer is broken if its addition, relative to the dense layer's, is outside these bounds."""

NOTHING = 1.0
"""The own error at which removing the layer would be as good."""

LOST_RESIDUAL = 0.5
"""The least share of its input in a layer's output, relative to the dense layer's share."""

LOST_STREAM = 0.5
"""Below this cosine of the last hidden states, little of the dense model remains.

Measured on SmolLM2-135M: 0.93 after SparseGPT to 50 %, 0.81 after Wanda to 2:4, 0.45 after Wanda to
80 %, which generates no sentence.
"""

HIGHEST = 0.95
"""The highest sparsity that the estimate reports."""

AGAIN = "prune less of this layer: --overrides '{name}.*=0.3', or an --allocation"


def check_layers(
    drift: Sequence[LayerDrift], layer_name: Callable[[int], str], bears: Mapping[int, float]
) -> list[Finding]:
    """Findings about layers, from the drift of each.

    Args:
        drift: of the layers, in order.
        layer_name: the full name of a layer.
        bears: from `could_bear`.
    """
    found = []
    for layer in drift:
        found += faults_of(layer, layer_name(layer.layer))
    last = drift[-1]
    if not last.not_finite and last.cosine < LOST_STREAM:
        found.append(
            Finding(
                "drift",
                "warning",
                layer_name(last.layer),
                f"the outputs of the last layer have a cosine of {last.cosine:.2f} "
                f"with those of the dense model, and a relative error of {last.relative_error:.2f}",
                "prune less, by a better method (--effort balanced or best), or retrain",
            )
        )
    hit = sorted((x for x in drift if x.layer in bears), key=lambda x: -x.own_error)[:3]
    if hit:
        worst = "; ".join(
            f"{layer_name(x.layer)} {x.own_error:.2f} ({bears[x.layer]:.0%})" for x in hit
        )
        usual = statistics.median(x.own_error for x in drift)
        found.append(
            Finding(
                "hit-hardest",
                "note",
                layer_name(hit[0].layer),
                "layers with the largest relative error of the residual update (median "
                f"{usual:.2f}), suggested sparsity in brackets: {worst}",
                "prune these less and others more: --overrides, or an --allocation",
            )
        )
    return found


def faults_of(layer: LayerDrift, name: str) -> list[Finding]:
    """The worst fault of one layer; others may be its symptoms."""

    def fault(kind: str, severity: Severity, evidence: str, remedy: str) -> list[Finding]:
        return [Finding(kind, severity, name, evidence, remedy)]

    if layer.not_finite:
        return fault(
            "hidden-states-not-finite",
            "error",
            f"{layer.not_finite} of its outputs are NaN or infinite; the layers after it "
            "were not checked",
            "look for tensors that are not finite or far too large in this layer; prune again",
        )
    added = f"it adds {layer.contribution:.2g} times as much to the stream as the dense layer does"
    if layer.contribution < COLLAPSED:
        return fault("layer-collapse", "error", added, AGAIN.format(name=name))
    if layer.contribution > EXPLODED:
        return fault("layer-exploded", "error", added, AGAIN.format(name=name))
    kept = f"its output contains {layer.kept_input:.2f} of its input"
    if 0 < LOST_RESIDUAL * layer.dense_kept_input > layer.kept_input:
        return fault(
            "residual-lost",
            "error",
            f"{kept}, the dense layer's output {layer.dense_kept_input:.2f}",
            "the way past the layer is broken, or the layer undoes it: compare its weights with "
            "those of the dense model, and prune again",
        )
    if layer.own_error > NOTHING:
        return fault(
            "layer-damaged",
            "warning",
            f"its error is {layer.own_error:.2f} of the dense layer's addition: removing "
            "the layer would be no worse",
            AGAIN.format(name=name),
        )
    return []


def could_bear(sparsity_of: Mapping[int, float], drift: Sequence[LayerDrift]) -> dict[int, float]:
    """The sparsity at which the own error of each layer would equal that of the median layer.

    The model: of normally distributed weights, the smallest share s has the energy
    g(s) = s − 2 q φ(q), with q = Φ⁻¹((1 + s) / 2); the squared error of a layer is proportional to
    g of its sparsity. So a layer of sparsity s and error e, with a median error m, could bear the
    s′ with g(s′) = g(s) · m² / e². This is an estimate from one measurement. It can rank layers,
    but promises nothing.

    Args:
        sparsity_of: of each layer, by number, without dense layers.
        drift: contains the own errors.
    """
    errors = {
        x.layer: x.own_error
        for x in drift
        if not x.not_finite and x.own_error > 0 and sparsity_of[x.layer] > 0.01
    }
    if not errors:
        return {}
    common = statistics.median(errors.values())
    return {
        layer: sparsity_with(pruned_energy(sparsity_of[layer]) * (common / error) ** 2)
        for layer, error in errors.items()
    }


def pruned_energy(sparsity: float) -> float:
    """The share of the energy of normal weights that is in the smallest ones."""
    normal = statistics.NormalDist()
    quantile = normal.inv_cdf((1 + min(sparsity, 1 - 1e-9)) / 2)
    return sparsity - 2 * quantile * normal.pdf(quantile)


def sparsity_with(energy: float) -> float:
    """The sparsity with this `pruned_energy`, at most `HIGHEST`; found by bisection."""
    if energy >= pruned_energy(HIGHEST):
        return HIGHEST
    low, high = 0.0, HIGHEST
    while not math.isclose(low, high, abs_tol=1e-4):
        middle = (low + high) / 2
        low, high = (middle, high) if pruned_energy(middle) < energy else (low, middle)
    return (low + high) / 2
