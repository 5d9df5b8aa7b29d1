"""A budget in, a model out: the bound holds, zeros and values are those of the levels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import secateur
from secateur.calibration.windows import load_windows, save_windows
from secateur.engine.search.knapsack import Knapsack
from secateur.engine.search.stored_levels import FitSearch
from secateur.errors import RecipeError
from secateur.evaluation.perplexity import LossComparison, LossIncrease
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Silent
from secateur.recipes.options import bytes_of
from secateur.runtime.install import open_checkpoint
from secateur.runtime.packed import PackedCheckpoint
from secateur.steps.fitting.storage_formats import FINER, LEVELS
from tiny import save_tiny
from zoo import tiny_windows

OPTIONS = {"effort": "fast", "generations": 2, "offspring": 3}


class Labels(Silent):
    """The labels of all work."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self, label: str, steps: int) -> None:
        self.seen.append(label)


@pytest.fixture(scope="module")
def labels() -> Labels:
    """The work of the fit in `place`."""
    return Labels()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, labels: Labels) -> Path:
    """Two models, windows, and a fit of the first."""
    place = tmp_path_factory.mktemp("fit")
    for name, layers in (("dense", 2), ("shallow", 1)):
        save_tiny(place / name, num_hidden_layers=layers, hidden_size=64, intermediate_size=128)
    save_windows(tiny_windows(12, 24), place / "windows.safetensors")
    secateur.fit(
        place / "dense", output=place / "small", max_size="75KiB",
        calibration=place / "windows.safetensors", progress=labels, **OPTIONS,
    )  # fmt: skip
    return place


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "secateur" / "fit.json").read_text())
    return found


def test_the_bound_holds_and_the_size_was_predicted(place: Path) -> None:
    size = sum(file.stat().st_size for file in (place / "small").glob("*.safetensors"))
    found = result_of(place / "small")
    assert size <= bytes_of("75KiB")
    linears = sum(
        entry.size_bytes
        for name, entry in PackedCheckpoint(place / "small").entries.items()
        if "layers." in name and "norm" not in name and not name.endswith("bias")
    )
    assert found["winner"]["file_bytes"] == found["costs"][0]["rest"] + linears
    assert size <= found["winner"]["file_bytes"]


def test_every_candidate_that_was_made_is_a_finalist(place: Path, labels: Labels) -> None:
    made = {x.partition(": ")[0].removeprefix("making ") for x in labels.seen if "making" in x}
    assert len(made) > 1
    names = [one["name"] for one in result_of(place / "small")["finalists"]]
    assert sorted(names) == sorted({*made, "the best single technique"})


def test_every_linear_is_stored_as_the_result_says(place: Path) -> None:
    packed = PackedCheckpoint(place / "small")
    kinds = {kind.name: kind for kind in (*LEVELS, *FINER)}
    for name, chosen in result_of(place / "small")["kind_of"].items():
        layout, kind = packed.layouts.get(name), kinds[chosen]
        values = "bfloat16" if layout is None else layout.values
        assert values == kind.values, name
        weight = open_checkpoint(place / "small").read(f"{name}.weight")
        zeros = 1 - float(torch.count_nonzero(weight)) / weight.numel()
        assert zeros >= kind.sparsity - 0.02, name
        if kind.sparsity == 0 and kind.values == "bfloat16":
            dense = CheckpointReader(place / "dense").read(f"{name}.weight")
            assert torch.equal(weight, dense.bfloat16().to(weight.dtype))


def test_the_winner_is_the_best_that_was_made_and_no_worse_than_any_single(place: Path) -> None:
    found = result_of(place / "small")
    budget = bytes_of("75KiB") - found["costs"][0]["rest"]
    singles = [p["divergence"] for p in found["singles"] if p["cost"][0] <= budget]
    (single,) = (x for x in found["finalists"] if x["name"] == "the best single technique")
    assert single["mixed"] == min(singles)
    assert found["winner"]["divergence"] <= single["divergence"]
    for single in found["singles"][1:]:  # the survey is corrected by them
        assert single["predicted"] == pytest.approx(max(single["divergence"], 0.0), rel=1e-6)
    assert found["winner"]["divergence"] == min(x["divergence"] for x in found["finalists"])
    assert all(one["file_bytes"] <= bytes_of("75KiB") for one in found["finalists"])
    assert "the best single technique" in {one["name"] for one in found["finalists"]}


def test_no_cut_is_tried_where_none_can_help(place: Path) -> None:
    """The random model hardly changes by rounding."""
    found = result_of(place / "small")
    assert found["winner"]["divergence"] < 0.1
    assert found["branches"] == []


def test_the_recipe_makes_the_same_model_again(place: Path) -> None:
    recipe = place / "small" / "secateur" / "recipe.yaml"
    options = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    options["output"] = place / "again"
    secateur.chain(options.pop("model"), **options)
    for notes in (place / "small" / "README.md", *recipe.parent.glob("*.json")):
        assert ".partial" not in notes.read_text(encoding="utf-8"), notes.name
    files = sorted(file.name for file in (place / "small").glob("*.safetensors"))
    assert files
    for file in files:
        first, second = (place / folder / file for folder in ("small", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_the_search_also_begins_near_single_levels() -> None:
    search = FitSearch.__new__(FitSearch)
    search.names, search.levels = ["a", "b", "c"], [None, None, None]  # type: ignore[list-item]
    rises = ((0.0, 0.1, 0.9), (0.0, 0.5, 0.9), (0.0, 0.1, 0.2))
    search.knapsack = Knapsack((((8.0,), (4.0,), (2.0,)),) * 3, rises)
    # 12 is all of the middle one; within 10 one linear has to go on, the one that loses the least
    assert (1, 1, 2) in search.between((10.0,))
    assert all(search.knapsack.total(x) <= (10.0,) for x in search.between((10.0,)))
    assert search.between((100.0,)) == []


def test_the_packed_model_loads_and_generates(place: Path) -> None:
    model = secateur.load(place / "small")
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(logits).all()


def test_the_smallest_model_within_a_loss(place: Path) -> None:
    found = secateur.fit(
        place / "shallow", output=place / "within", max_loss_increase=0.01, structure=False,
        calibration=place / "windows.safetensors", **OPTIONS,
    )  # fmt: skip
    largest = max(point.cost[0] for point in found.singles)
    assert found.winner.file_bytes < found.costs[0].rest + largest
    (check,) = found.checks
    assert check.option == "max_loss_increase"
    assert check.kept is (check.measured <= 0.01)
    assert f"± {check.standard_error:.4f}" in check.found


def test_the_promised_loss_is_what_evaluate_says_of_the_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On windows that did not choose, with activations rounded as the kernels do."""
    (tmp_path / "text.txt").write_text("replaced by the windows")
    judged = load_windows(place / "windows.safetensors")[-2:]
    monkeypatch.setattr(
        "secateur.evaluation.perplexity.evaluation_windows", lambda *_, **__: judged
    )
    found = secateur.evaluate(
        place / "small", dense=place / "dense", text=tmp_path / "text.txt", sequence_length=24
    )
    loss = result_of(place / "small")["losses"]["winner"]
    assert found.protocol["activations"] == "int8 g64"
    assert loss["loss_increase"] == pytest.approx(found.divergence[0].loss_change, abs=1e-4)
    error = found.divergence[0].loss_change_standard_error
    assert loss["standard_error"] == pytest.approx(error, abs=1e-4)


def test_a_model_that_loses_too_much_is_searched_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the search estimates does not count: the packed model is measured, and steps back."""
    bounds, original = [], FitSearch.smallest_within

    def smallest_within(search: FitSearch, losses: Any, aim: Any, bound: float) -> float:
        bounds.append(bound)
        return original(search, losses, aim, 0.01) + 3000 * len(bounds)

    def increase(judge: LossComparison, folder: Path) -> LossIncrease:
        return LossIncrease(0.012 if len(bounds) == 1 else 0.009, 0.0, 1)

    monkeypatch.setattr(FitSearch, "smallest_within", smallest_within)
    monkeypatch.setattr(LossComparison, "increase", increase)
    secateur.fit(
        place / "shallow", output=place / "again-within", max_loss_increase=0.01, structure=False,
        calibration=place / "windows.safetensors", **OPTIONS,
    )  # fmt: skip
    assert bounds == pytest.approx([0.01, 0.008])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_size": "1KiB"}, "no level fits into 1KiB"),
        ({"max_size": "9GB"}, "fits into 9GB as it is"),
        ({"max_size": "big"}, "a number with a unit"),
        ({}, "^give a bound"),
        ({"max_loss_increase": 0.0}, "must be more than 0"),
        ({"max_size": "1GB", "generations": -1}, "generations"),
    ],
)
def test_impossible_bounds_are_refused_before_any_work(
    place: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        secateur.fit(
            place / "dense", output=place / "no", calibration=place / "windows.safetensors",
            **options,
        )  # fmt: skip
    assert not (place / "no").exists()
    assert not (place / "no.partial").exists()


def test_too_few_windows_are_refused(place: Path) -> None:
    save_windows(tiny_windows(2, 24), place / "two.safetensors")
    with pytest.raises(RecipeError, match="2 windows cannot make levels"):
        secateur.fit(
            place / "dense", output=place / "no", max_size="100KiB",
            calibration=place / "two.safetensors",
        )  # fmt: skip
