"""How far each decoder layer is from the dense one, with one layer of each model in memory.

For a token x that enters a layer, y is the output of the dense layer and ŷ that of the pruned one.

    stream   each model on its own hidden states: the error accumulated up to this layer own
    both layers on the dense hidden states: the error of this layer alone,
             ‖(ŷ − x) − (y − x)‖ / ‖y − x‖, measured on the layer's addition to the stream

Every number is the median over tokens. A few tokens would dominate a mean: in any healthy model,
the first token and some delimiters have hidden states a thousand times as large as the others.

Findings from it: collapse, broken residuals, the layers hit hardest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from secateur.diagnostics.findings import finding
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.calls import call_layer
from secateur.models.architecture import hidden_size, refuse_other_sizes, vocabulary_of
from secateur.models.targets import CheckpointTarget
from secateur.progress import Progress
from secateur.runs.measured import Drift, Finding

TOKENS_AT_ONCE = 1024


class LayerDrift(Drift[float]):
    """What the checks know of a layer.

    Attributes:
        layer: its number.
        kept_input: how much of its input the output of the layer alone contains, ⟨ŷ, x⟩ / ⟨x, x⟩.
        dense_kept_input: the same of the dense layer.
        not_finite: hidden states of the pruned model that are NaN or infinite.
    """

    layer: int
    kept_input: float
    dense_kept_input: float
    not_finite: int = 0


def check_same_model(pruned: CheckpointTarget, dense: CheckpointTarget) -> None:
    """Refuse a reference that is a different model.

    Raises:
        RecipeError: layers, hidden size or vocabulary differ.
    """
    sizes: dict[str, Callable[[CheckpointTarget], int]] = {
        "layers": lambda target: len(target.layers),
        "channels": lambda target: hidden_size(target.model),
        "tokens": lambda target: vocabulary_of(target.model),
    }
    refuse_other_sizes(
        sizes, pruned, dense, ("the model", "its reference"),
        where=str(dense.reader.folder),
        remedy="name the dense model that was pruned with --dense",
    )  # fmt: skip


@torch.no_grad()
def layer_drifts(
    pruned: CheckpointTarget, dense: CheckpointTarget, windows: Tensor, progress: Progress
) -> list[LayerDrift]:
    """Pass windows through both models, layer by layer, and compare them.

    Ends after the first layer whose hidden states are not finite: later ones mean nothing.

    Args:
        pruned: the model.
        dense: its reference, of the same layers, hidden size and vocabulary.
        windows: token ids [windows, sequence_length].
        progress: hears of every layer.
    """
    ours, theirs = (
        CalibrationStream(t, windows, TOKENS_AT_ONCE, True, None).open() for t in (pruned, dense)
    )
    found = []
    progress.start("layers", len(pruned.layers))
    for (index, layer), (_, dense_layer) in zip(ours.walk(), theirs.walk(), strict=True):
        measured: dict[str, list[Tensor]] = {}
        for batch in ours.batches():
            own, other = (x.stream.call(index, batch) for x in (ours, theirs))
            x, dense_x = ours.read(batch), theirs.read(batch)
            y, dense_y = call_layer(layer, x, own), call_layer(dense_layer, dense_x, other)
            # the error of this layer alone: both layers read the dense hidden states
            alone = call_layer(layer, dense_x, own)
            states = [own.states(each) for each in (y, dense_y, alone, dense_x)]
            for name, values in compared(*states).items():
                measured.setdefault(name, []).append(values)
            ours.write(batch, y)
            theirs.write(batch, dense_y)
        found.append(medians(index, measured))
        progress.step(note=f"layer {index}")
        if found[-1].not_finite:
            break
    progress.finish()
    return found


def compared(y: Tensor, dense_y: Tensor, alone: Tensor, dense_x: Tensor) -> dict[str, Tensor]:
    """The measures of `LayerDrift` for each token of a micro-batch."""
    # [tokens, hidden size]
    y, dense_y, alone, x = (t.flatten(0, -2) for t in (y, dense_y, alone, dense_x))
    added, dense_added = alone - x, dense_y - x
    length, step = _never_zero(dense_y.norm(dim=-1)), _never_zero(dense_added.norm(dim=-1))
    energy = _never_zero(x.square().sum(-1))
    return {
        "relative_error": (y - dense_y).norm(dim=-1) / length,
        "cosine": functional.cosine_similarity(y, dense_y, dim=-1),
        "norm_ratio": y.norm(dim=-1) / length,
        "own_error": (added - dense_added).norm(dim=-1) / step,
        "contribution": added.norm(dim=-1) / step,
        "kept_input": (alone * x).sum(-1) / energy,
        "dense_kept_input": (dense_y * x).sum(-1) / energy,
        "not_finite": (~torch.isfinite(y + alone)).sum(-1),
    }


def _never_zero(x: Tensor) -> Tensor:
    """Divisors with zeros replaced by the smallest number."""
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def medians(index: int, measured: dict[str, list[Tensor]]) -> LayerDrift:
    """The medians over all tokens."""
    joined = {name: torch.cat(values) for name, values in measured.items()}
    bad = int(joined.pop("not_finite").sum())
    found = {name: float(values.median()) for name, values in joined.items()}
    return LayerDrift(layer=index, not_finite=bad, **found)


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
        if fault := _fault_of(layer):
            found.append(finding(fault[0], layer_name(layer.layer), fault[1]))
    last = drift[-1]
    if not last.not_finite and last.cosine < LOST_STREAM:
        evidence = (
            f"the outputs of the last layer have a cosine of {last.cosine:.2f} with those of the "
            f"dense model, and a relative error of {last.relative_error:.2f}"
        )
        found.append(finding("drift", layer_name(last.layer), evidence))
    hit = sorted((x for x in drift if x.layer in bears), key=lambda x: -x.own_error)[:3]
    if hit:
        worst = "; ".join(
            f"{layer_name(x.layer)} {x.own_error:.2f} ({bears[x.layer]:.0%})" for x in hit
        )
        usual = statistics.median(x.own_error for x in drift)
        evidence = (
            f"layers with the largest relative error of the residual update (median {usual:.2f}), "
            f"suggested sparsity in brackets: {worst}"
        )
        found.append(finding("hit-hardest", layer_name(hit[0].layer), evidence))
    return found


def _fault_of(layer: LayerDrift) -> tuple[str, str] | None:
    """The worst fault of one layer, its kind and evidence; others may be its symptoms."""
    if layer.not_finite:
        said = f"{layer.not_finite} of its outputs are NaN or infinite; the layers after it "
        return "hidden-states-not-finite", said + "were not checked"
    added = f"it adds {layer.contribution:.2g} times as much to the stream as the dense layer does"
    if layer.contribution < COLLAPSED:
        return "layer-collapse", added
    if layer.contribution > EXPLODED:
        return "layer-exploded", added
    # a dense layer may itself turn its input around; then nothing is lost
    if 0 < LOST_RESIDUAL * layer.dense_kept_input > layer.kept_input:
        kept, dense = f"{layer.kept_input:.2f}", f"{layer.dense_kept_input:.2f}"
        return (
            "residual-lost",
            f"its output contains {kept} of its input, the dense layer's output {dense}",
        )
    if layer.own_error > NOTHING:
        said = f"its error is {layer.own_error:.2f} of the dense layer's addition: removing the "
        return "layer-damaged", said + "layer would be no worse"
    return None


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
    # a dense layer has no error to compare, and its g(s) is 0
    errors = {
        x.layer: x.own_error
        for x in drift
        if not x.not_finite and x.own_error > 0 and sparsity_of[x.layer] > 0.01
    }
    if not errors:
        return {}
    common = statistics.median(errors.values())
    return {
        layer: _sparsity_with(pruned_energy(sparsity_of[layer]) * (common / error) ** 2)
        for layer, error in errors.items()
    }


def pruned_energy(sparsity: float) -> float:
    """The share of the energy of normal weights that is in the smallest ones."""
    normal = statistics.NormalDist()
    quantile = normal.inv_cdf((1 + min(sparsity, 1 - 1e-9)) / 2)
    return sparsity - 2 * quantile * normal.pdf(quantile)


def _sparsity_with(energy: float) -> float:
    """The sparsity with this `pruned_energy`, at most `HIGHEST`; found by bisection."""
    if energy >= pruned_energy(HIGHEST):
        return HIGHEST
    low, high = 0.0, HIGHEST
    # the energy rises with the sparsity, so one half always holds the answer
    while not math.isclose(low, high, abs_tol=1e-4):
        middle = (low + high) / 2
        low, high = (middle, high) if pruned_energy(middle) < energy else (low, middle)
    return (low + high) / 2
