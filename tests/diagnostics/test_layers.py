"""What the numbers of the layers are taken to mean."""

from __future__ import annotations

import math
import random

import pytest
import torch

from secateur.diagnostics.drift import (
    LayerDrift,
    check_layers,
    compared,
    could_bear,
    medians,
    pruned_energy,
)

FINE = LayerDrift(
    layer=0, relative_error=0.2, cosine=0.98, norm_ratio=0.95, own_error=0.3, contribution=0.95,
    kept_input=1.1, dense_kept_input=1.1,
)  # fmt: skip


def kinds(*layers: LayerDrift) -> dict[str, str]:
    """Findings by kind, with the place of each."""
    return {x.id: x.where for x in check_layers(layers, lambda i: f"layer {i}", {})}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, None),
        ({"contribution": 0.05}, "layer-collapse"),
        ({"contribution": 20.0}, "layer-exploded"),
        ({"kept_input": 0.3}, "residual-lost"),
        ({"own_error": 1.2}, "layer-damaged"),
        ({"not_finite": 5}, "hidden-states-not-finite"),
        ({"kept_input": -0.5, "dense_kept_input": -0.5}, None),
        ({"cosine": 0.3}, "drift"),
    ],
)
def test_faults(change: dict, kind: str | None) -> None:
    broken = FINE.model_copy(update={"layer": 1, **change})
    assert kinds(FINE, broken) == ({kind: "layer 1"} if kind else {})


def test_the_measures_of_known_vectors() -> None:
    """The pruned layer adds half of what the dense one does, at right angles to its input."""
    x = torch.tensor([[[2.0, 0.0]]]).expand(1, 5, 2)
    added = torch.tensor([[[0.0, 1.0]]]).expand(1, 5, 2)
    y, dense_y = x + added / 2, x + added
    layer = medians(3, {k: [v] for k, v in compared(y, dense_y, y, x).items()})
    assert layer.layer == 3
    assert layer.relative_error == pytest.approx(0.5 / math.sqrt(5))
    assert layer.cosine == pytest.approx(4.5 / math.sqrt(4.25 * 5))
    assert layer.norm_ratio == pytest.approx(math.sqrt(4.25 / 5))
    assert layer.own_error == layer.contribution == pytest.approx(0.5)
    assert layer.kept_input == layer.dense_kept_input == pytest.approx(1.0)
    assert layer.not_finite == 0


def test_a_massive_token_does_not_fool_the_median() -> None:
    torch.manual_seed(0)
    x, added = torch.randn(1, 9, 16), torch.randn(1, 9, 16)
    y, dense_y = x + 0.9 * added, x + added
    plain = medians(0, {k: [v] for k, v in compared(y, dense_y, y, x).items()})
    x[0, 0] *= 1e4
    y[0, 0], dense_y[0, 0] = 3 * x[0, 0], x[0, 0]
    massive = medians(0, {k: [v] for k, v in compared(y, dense_y, y, x).items()})
    assert massive.own_error == pytest.approx(plain.own_error, abs=0.02)
    assert massive.cosine > 0.9


def test_pruned_energy_is_that_of_normal_weights() -> None:
    rng = random.Random(0)
    squares = sorted(rng.gauss(0, 1) ** 2 for _ in range(100_000))
    for sparsity in (0.3, 0.5, 0.8):
        share = sum(squares[: int(sparsity * len(squares))]) / sum(squares)
        assert pruned_energy(sparsity) == pytest.approx(share, abs=0.01)


def test_what_layers_could_bear() -> None:
    drift = [
        FINE.model_copy(update={"layer": i, "own_error": e})
        for i, e in enumerate((0.2, 0.3, 0.6, 0.3, 0.01))
    ]
    bears = could_bear({0: 0.5, 1: 0.5, 2: 0.5, 3: 0.0, 4: 0.5}, drift)
    assert set(bears) == {0, 1, 2, 4}  # layer 3 is dense
    common = (0.2 + 0.3) / 2
    for layer, error in ((0, 0.2), (1, 0.3), (2, 0.6)):
        expected = pruned_energy(0.5) * (common / error) ** 2
        assert pruned_energy(bears[layer]) == pytest.approx(expected, abs=1e-3)
    assert bears[2] < 0.5 < bears[0]
    assert bears[4] == 0.95
    assert could_bear({0: 0.0}, [FINE]) == {}
