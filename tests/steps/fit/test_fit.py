"""A budget in, a model out: the bound holds, zeros and values are those that were chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import load_windows, save_windows
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Silent
from secateur.recipes.options import bytes_of
from secateur.runtime.install import open_checkpoint
from secateur.runtime.packed import PackedCheckpoint
from secateur.sparsity.solvers.obs import OBS
from secateur.steps.fitting import bench
from secateur.steps.fitting.bench import FitBench
from secateur.steps.fitting.problem import FORMATS

OPTIONS = {"effort": "fast"}


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
        place / "dense", output=place / "small", max_size="65KiB",
        calibration=place / "windows.safetensors", progress=labels, **OPTIONS,
    )  # fmt: skip
    return place


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "secateur" / "fit.json").read_text())
    return found


def test_the_bound_holds_and_the_size_is_that_of_the_files(place: Path) -> None:
    size = sum(file.stat().st_size for file in (place / "small").glob("*.safetensors"))
    assert size == result_of(place / "small")["winner"]["file_bytes"] <= bytes_of("65KiB")


def test_every_candidate_that_was_made_is_a_finalist(place: Path, labels: Labels) -> None:
    made = {
        x.partition(": ")[0].removeprefix("a model, ")
        for x in labels.seen
        if x.startswith("a model")
    }
    assert made
    names = [one["name"] for one in result_of(place / "small")["finalists"]]
    assert sorted(names) == sorted(made)


def test_every_linear_is_stored_as_the_result_says(place: Path) -> None:
    packed = PackedCheckpoint(place / "small")
    kinds = {kind.name: kind for kind in FORMATS}
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


def test_the_winner_is_the_best_that_was_made(place: Path) -> None:
    found = result_of(place / "small")
    assert found["winner"]["divergence"] == min(x["divergence"] for x in found["finalists"])
    assert all(one["file_bytes"] <= bytes_of("65KiB") for one in found["finalists"])


@pytest.mark.parametrize(("least", "zeros"), [(0.0, False), (2.0, True)])
def test_zeros_are_chosen_only_where_they_promise_enough(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, zeros: bool
) -> None:
    monkeypatch.setattr(bench, "TRIES", (least,))
    found = secateur.fit(
        place / "shallow", output=tmp_path / "small", max_size="21KiB",
        calibration=place / "windows.safetensors", **OPTIONS,
    )  # fmt: skip
    assert len(found.finalists) == 1
    assert any("zeros" in kind for kind in found.kind_of.values()) == zeros


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


def test_a_healed_winner_is_made_again_by_its_recipe(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FitBench.divergence

    def divergence(self: FitBench, folder: Path) -> float:
        return real(self, folder) + (0.0 if folder.name == "healed" else 1.0)

    healed = FitBench.healed

    def heal(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(OBS, "solve")  # what was rounded is not rounded again
            return healed(*args)

    monkeypatch.setattr(FitBench, "divergence", divergence)
    monkeypatch.setattr(FitBench, "healed", heal)
    found = secateur.fit(
        place / "shallow", output=tmp_path / "small", max_size="29KiB", effort="fast",
        heal_tokens=240, calibration=str(write_text(tmp_path)), windows=12, sequence_length=24,
    )  # fmt: skip
    assert found.winner.healed is not None
    assert found.winner.healed < found.winner.divergence
    assert found.packed.rounding["distillation"]["tokens"] >= 240
    options = yaml.safe_load((tmp_path / "small" / "secateur" / "recipe.yaml").read_text())
    learning = options["steps"][-1]["compress"]["distillation"]
    assert learning["tokens"] == 240
    assert learning["teacher"] == str(place / "shallow")
    secateur.chain(options.pop("model"), **{**options, "output": tmp_path / "again"})
    for file in (tmp_path / "small").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def write_text(folder: Path) -> Path:
    """Windows that make models, and more that heal them."""
    windows = tiny_windows(22, 24)
    save_windows(windows, folder / "text.safetensors", extra=10)
    return folder / "text.safetensors"


def test_the_smallest_model_within_a_loss(place: Path) -> None:
    found = secateur.fit(
        place / "shallow", output=place / "within", max_loss_increase=0.01,
        calibration=place / "windows.safetensors", **OPTIONS,
    )  # fmt: skip
    assert found.winner.file_bytes < max(point.file_bytes for point in found.frontier)
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
    loss = result_of(place / "small")["loss"]
    assert found.protocol["activations"] == "int8 g64"
    assert loss["loss_increase"] == pytest.approx(found.divergence[0].loss_change, abs=1e-4)
    error = found.divergence[0].loss_change_standard_error
    assert loss["standard_error"] == pytest.approx(error, abs=1e-4)


def test_without_time_one_model_is_made(place: Path, tmp_path: Path) -> None:
    found = secateur.fit(
        place / "shallow", output=tmp_path / "quick", max_loss_increase=0.01, minutes=1e-4,
        calibration=place / "windows.safetensors", heal_tokens=64, **OPTIONS,
    )  # fmt: skip
    assert {"healing"} <= set(found.dropped) <= {"healing", "another size"}
    assert len(found.finalists) == 1
    assert (tmp_path / "quick" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_size": "1KiB"}, "1KiB"),
        ({"max_size": "9GB"}, "9GB"),
        ({"max_size": "big"}, "max_size='big'"),
        ({}, "bound"),
        ({"max_loss_increase": 0.0}, "max_loss_increase=0.0"),
        ({"max_size": "1GB", "heal_tokens": -1}, "heal_tokens"),
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
    with pytest.raises(RecipeError, match="2 windows"):
        secateur.fit(
            place / "dense", output=place / "no", max_size="100KiB",
            calibration=place / "two.safetensors",
        )  # fmt: skip
