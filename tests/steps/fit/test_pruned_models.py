"""A fit of a model that has zeros already: they stay, are counted, and may become more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.search.survey import LayerView
from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.formats import WeightFormat
from secateur.runtime.install import open_checkpoint
from secateur.steps.fitting.problem import SIZE, CostKind, Costs, FitProblem, UnitLosses

HALF, MORE = 0.5, 0.7


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with half of the weights of every linear, and windows."""
    place = tmp_path_factory.mktemp("pruned")
    save_tiny(place / "dense", num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    secateur.prune(place / "dense", output=place / "half", method="magnitude", sparsity=HALF)
    save_windows(tiny_windows(12, 24), place / "windows.safetensors")
    return place


def fit(place: Path, output: Path, **bounds: Any) -> Any:
    return secateur.fit(
        place / "half", output=output, calibration=place / "windows.safetensors", effort="fast",
        **bounds,
    )  # fmt: skip


def test_zeros_stay_and_what_a_format_prunes_comes_on_top(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved, zeros = LayerView.solved, {"rounded": list[bool](), "pruned": list[float]()}

    def noted(view: LayerView, name: str, method: Any, sparsity: float) -> torch.Tensor:
        made = solved(view, name, method, sparsity)
        if getattr(method.solver, "bits", None):
            held = made[view.weights[name] == 0]
            zeros["rounded"].append(bool((held == 0).all()))
        else:
            zeros["pruned"].append(1 - int(made.count_nonzero()) / made.numel())
        return made

    monkeypatch.setattr(LayerView, "solved", noted)
    found = fit(place, tmp_path / "small", max_size="34KiB")
    # the survey rounds what is kept, and prunes half of it
    assert len(zeros["rounded"]) == 14
    assert all(zeros["rounded"])
    assert zeros["pruned"] == pytest.approx([HALF + HALF / 2] * 14, abs=0.001)
    before, after = CheckpointReader(place / "half"), open_checkpoint(tmp_path / "small")
    for name, kind in found.kind_of.items():
        old, new = before.read(f"{name}.weight"), after.read(f"{name}.weight")
        assert not new[old == 0].any(), name
        pruned = 1 - int(new.count_nonzero()) / new.numel()
        assert pruned >= (float(kind.split("%")[0]) / 100 if "zeros" in kind else HALF) - 0.01
    assert found.packed.file_bytes == found.winner.file_bytes <= 34 * 1024
    assert {"60%", "70%"} & {kind.split()[0] for kind in found.kind_of.values()}
    assert not {"30%", "40%", "50%"} & {kind.split()[0] for kind in found.kind_of.values()}


def test_the_smallest_model_within_a_loss_is_smaller_for_a_pruned_source(
    place: Path, tmp_path: Path
) -> None:
    """int2 without a bitmask takes 2.1 bits; half of the weights in bfloat16 take 9."""
    found = fit(place, tmp_path / "small", max_loss_increase=5.0)
    assert not found.broken
    assert found.packed.file_bytes < (place / "half" / "model.safetensors").stat().st_size / 4


def test_a_format_costs_the_zeros_that_are_there() -> None:
    shape, kind = (512, 512), CostKind(SIZE, 0.0, 1e9)
    costs = Costs((kind,), {"a": shape, "b": shape}, zeros={"a": HALF})
    of = {share: WeightFormat("int8", share) for share in (0.0, 0.3, HALF, MORE)}
    assert costs.of("a", of[0.0]) == costs.of("a", of[0.3]) == costs.of("b", of[HALF])
    assert costs.of("a", of[MORE]) == costs.of("b", of[MORE])
    assert costs.of("b", of[0.0])[0] > costs.of("b", of[HALF])[0] > costs.of("b", of[MORE])[0]
    assert costs.pruned("a", of[HALF]) == 0
    assert costs.pruned("a", of[MORE]) == pytest.approx(0.4)
    assert costs.pruned("b", of[MORE]) == MORE


def test_no_format_is_chosen_that_prunes_nothing_further() -> None:
    losses = UnitLosses(
        rounded={"a": 0.02}, pruned={"a": 0.03}, kept={},
        embeddings={"int8": 0.0, "int4": 0.1, "int3": 0.2},
        coarser={"a": {"int8": 0.001, "int4": 0.25, "int3": 1.0, "int2": 4.0}},
    )  # fmt: skip
    costs = Costs((CostKind(SIZE, 0.0, 1e9),), {"a": (512, 512)}, zeros={"a": HALF})
    knapsack = FitProblem(costs, losses).knapsack
    for bits in (9.1, 5.1, 3.2, 2.7, 2.3):
        chosen = knapsack.best((512 * 512 * bits / 8,))
        assert chosen is not None
        stored = costs.formats[chosen[0]]
        assert stored.sparsity in (0.0, 0.6, MORE), bits


def test_a_linear_of_nothing_but_zeros_stays_as_it_is(place: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    shutil.copytree(place / "half", tmp_path / "empty")
    weights = load_file(tmp_path / "empty" / "model.safetensors")
    weights[f"{name}.weight"].zero_()
    save_file(weights, tmp_path / "empty" / "model.safetensors", {"format": "pt"})
    found = secateur.fit(
        tmp_path / "empty", output=tmp_path / "small", max_size="60KiB", effort="fast",
        calibration=place / "windows.safetensors",
    )  # fmt: skip
    assert found.packed.file_bytes <= 60 * 1024
    assert not open_checkpoint(tmp_path / "small").read(f"{name}.weight").any()
