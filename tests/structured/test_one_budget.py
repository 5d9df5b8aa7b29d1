"""Experts and neurons share one budget, and experts stay that a list names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuts import logits
from tiny import saved
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import load_windows, save_windows
from secateur.engine.prune.routers import mixture_bytes
from secateur.engine.search.expert_divergence import divergence_scores
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.models.opening import open_weights
from secateur.models.skeleton import build_skeleton
from secateur.models.targets import CheckpointTarget
from secateur.progress import Silent
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.structured import choices, cut_steps
from secateur.structured.choices import CutLosses, readers_of, without_units
from secateur.structured.cut import NEURONS, sizes_of

IDS = tiny_windows(2, 9, seed=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 8 experts, two for a token, with windows beside it."""
    place = tmp_path_factory.mktemp("budget")
    save_windows(tiny_windows(), place / "windows.safetensors")
    sizes = {"num_experts": 8, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    everywhere = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return saved(tiny_model("qwen3_moe", **sizes, **everywhere), place / "source")


def structured(source: Path, output: Path, **options: Any) -> list[dict[str, Any]]:
    """The steps of a cut."""
    file = source.parent / "windows.safetensors"
    options = {"effort": "fast", "calibration": file, **options}
    secateur.structure(source, output=output, **options)
    found: list[dict[str, Any]] = json.loads((output / "secateur" / "steps.json").read_text())
    return found


def test_a_loss_is_a_power_of_the_share() -> None:
    losses = CutLosses({"0": [0.0, 3.0, 1.0]}, {"0.fc2": [1.0, 4.0], "1.fc2": [2.0, 8.0]})
    found = [losses.of_units(share) for share in (0.0, 0.25, 0.375, 0.5)]
    factor = choices.COSTS[1]
    assert found == pytest.approx([0.0, 3 * factor, 12 * 0.75**2 * factor, 12 * factor])
    assert losses.of_units(0.5, "1.*") == 8.0 * factor
    assert losses.of_experts({0: (1,)}) == choices.COSTS[0]
    assert CutLosses({}, {}).of_units(0.5) == 0.0


def test_units_are_removed_whole_and_the_others_make_up_for_them() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(200, 16), torch.randn(5, 16)
    inputs[:, 3] *= 0.01
    readers = readers_of(tiny_model("llama"), NEURONS)
    (how,) = readers.values()
    known = {"gram": inputs.T @ inputs}
    view: Any = SimpleNamespace(
        weights={"model.layers.0.mlp.down_proj": weight, "model.layers.0.mlp.up_proj": weight},
        solved=lambda name, own, share: (
            how.solve(weight, how.solver.prepare(known), known, share).weight
        ),
    )
    ((name, ways),) = without_units(view, readers).items()
    assert name == "model.layers.0.mlp.down_proj"
    for share, count in (("0.25", 4), ("0.5", 8)):
        now = weight + ways[share]
        gone = (now == 0).all(0)
        assert int(gone.sum()) == count
        assert gone[3]
        best = torch.linalg.lstsq(inputs[:, ~gone], inputs @ weight.T).solution.T
        assert (inputs[:, ~gone] @ (now[:, ~gone] - best).T).norm() < 0.05 * inputs.norm()


def test_one_backward_scores_experts_as_their_own_does(source: Path, tmp_path: Path) -> None:
    """And the divergence of neurons is there beside it."""
    target = CheckpointTarget(open_weights(source), None, torch.device("cpu"))
    windows = load_windows(source.parent / "windows.safetensors")
    alone = divergence_scores(target, windows, tmp_path / "own", Silent(), fast=False)
    context: Any = SimpleNamespace(
        source=source, windows_file=source.parent / "windows.safetensors", progress=Silent(),
        scratch=lambda name: tmp_path,
        recipe=build_recipe(
            StructureRecipe,
            {"model": str(source), "output": "out", "keep_parameters": 0.5, "effort": "fast",
             "fast_matmuls": False},
        ),
    )  # fmt: skip
    found = choices._survey_cuts(context, build_skeleton(source))
    for layer, scores in alone.items():
        assert found.experts[str(layer)] == pytest.approx(scores.tolist(), rel=1e-5)
    readers = {name.rpartition(".")[2] for name in found.units}
    assert readers == {"down_proj", "o_proj"}
    assert all(0 <= quarter <= half for quarter, half in found.units.values())


@pytest.mark.parametrize("free", ["experts", "neurons"])
def test_what_costs_least_goes_and_counts_are_exact(
    free: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.0 if free == "experts" else 1.0] * 8
    losses = CutLosses({"0": scores, "1": scores}, {})
    monkeypatch.setattr(choices, "_survey_cuts", lambda context, model: losses)
    monkeypatch.setattr(CutLosses, "of_units", lambda self, share, reader="*": share)
    steps = structured(source, tmp_path / "out", keep_parameters=0.6)
    assert [step["step"] for step in steps] == ["experts"] * (free == "experts") + ["width"]
    assert steps[-1]["after"]["decoder"] <= 0.6 * steps[0]["before"]["decoder"]
    sizes = sizes_of(build_skeleton(tmp_path / "out"))
    if free == "experts":
        assert steps[0]["by"] == "divergence"
        assert max(sizes.experts) < 8
    else:
        assert (max(sizes.experts), max(sizes.expert_neurons) < 32) == (8, True)


@pytest.mark.parametrize("layers", [None, 1])
def test_the_experts_of_a_list_stay(layers: int | None, source: Path, tmp_path: Path) -> None:
    """The list has the numbers of the uncut model."""
    kept = {"0": [0, 3, 5, 6], "1": [1, 3, 5, 7]}
    listed = tmp_path / "experts.json"
    listed.write_text(json.dumps(kept))
    options = {} if layers is None else {"keep_layers": layers}
    steps = structured(source, tmp_path / "out", experts_list=listed, **options)
    order = steps[0]["cut"]["layers"] if layers else range(2)
    (step,) = (step for step in steps if step["step"] == "experts")
    assert step["by"] == "list"
    assert step["cut"]["experts"] == {str(new): kept[str(old)] for new, old in enumerate(order)}
    loaded = secateur.load(tmp_path / "out")
    assert loaded.config.num_experts == 4
    assert logits(loaded, IDS).isfinite().all()


BAD = {
    '{"0": [0, 1, 2], "9": [0, 1, 2]}': "9",
    '{"0": [0, 1, 99]}': "99",
    '{"0": [0]}': "1",
    '{"0": "all"}': "list",
}


@pytest.mark.parametrize("content", BAD)
def test_a_list_that_cannot_be_kept_is_refused(content: str, source: Path, tmp_path: Path) -> None:
    listed = tmp_path / "experts.json"
    listed.write_text(content)
    with pytest.raises(RecipeError, match=BAD[content]):
        structured(source, tmp_path / "out", experts_list=listed)
    assert not (tmp_path / "out").exists()


def test_least_squares_of_experts_are_in_the_plan(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = CheckpointTarget(open_weights(source), None, torch.device("cpu"))
    few, many = (mixture_bytes(target, tokens) for tokens in (1000, 2000))
    # inputs of two experts for each token, as wide as the stream, and twice its residual
    hidden = target.model.config.hidden_size
    assert many - few >= 1000 * (2 * hidden * target.dtype.itemsize + 2 * hidden * 4)
    monkeypatch.setattr(cut_steps, "mixture_bytes", lambda target, tokens: 2**60)
    with pytest.raises(MemoryBudgetError, match="least squares of experts"):
        structured(source, tmp_path / "out", experts=4, effort="balanced")
