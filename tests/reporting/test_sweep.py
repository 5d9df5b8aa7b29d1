"""Sweeps of a tiny model: the whole grid, killed and gone on with, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny
from zoo import tiny_windows

from secateur.calibration.windows import save_windows
from secateur.errors import PatternError, RecipeError
from secateur.progress import Progress, Silent
from secateur.recipes.measure import SweepRecipe
from secateur.recipes.reading import build_recipe
from secateur.reporting.sweep import SweepResult
from secateur.runs.measured import Sweep
from secateur.runs.records import read_record
from secateur.steps.runner import carry_out
from secateur.steps.sweep import SweepPoints


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> SweepRecipe:
    """Two methods at two sparsities and one pattern."""
    place = tmp_path_factory.mktemp("given")
    save_windows(tiny_windows(), place / "w.safetensors")
    text = place / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    values = {
        "model": str(save_tiny(place / "model", num_hidden_layers=2)),
        "methods": ("wanda", "sparsegpt"),
        "sparsities": (0.3, 0.6),
        "patterns": ("2:4",),
        "calibration": {"source": str(place / "w.safetensors")},
        "text": (str(text),),
        "text_sequence_length": 16,
    }
    return build_recipe(SweepRecipe, values)


def swept(
    recipe: SweepRecipe,
    output: Path,
    progress: Progress | None = None,
    resume: bool = False,
    **change: object,
) -> SweepResult:
    values = recipe.model_dump(exclude_unset=True) | {"output": str(output)} | change
    made = build_recipe(SweepRecipe, values)
    return carry_out(SweepPoints, made, progress or Silent(), resume=resume)


@pytest.fixture(scope="module")
def whole(
    recipe: SweepRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepResult, Path]:
    """The whole grid, and its folder, which no test changes."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    return swept(recipe, out), out


class KilledAt:
    """Ends the work at a stage of a point, after some steps of it."""

    def __init__(self, stage: str, steps: int = 0) -> None:
        self.stage, self.left, self.here = stage, steps, False

    def start(self, label: str, steps: int) -> None:
        self.here = self.stage in label

    def step(self, count: int = 1, note: str = "") -> None:
        if self.here:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    def finish(self) -> None:
        self.here = False


def measured(folder: Path) -> list[tuple[object, ...]]:
    """What does not depend on time."""
    points = read_record(Sweep, folder / "sweep.json").points
    return [(p.key, p.perplexity, p.excess, p.zeros) for p in points]


def test_the_whole_grid(recipe: SweepRecipe, whole: tuple[SweepResult, Path]) -> None:
    result, out = whole
    assert [p.key for p in result.points] == [
        (method, pattern, sparsity)
        for method in ("wanda", "sparsegpt")
        for pattern, sparsity in (("unstructured", 0.3), ("unstructured", 0.6), ("2:4", 0.5))
    ]
    [text] = recipe.text
    for point in result.points:
        assert point.zeros == pytest.approx(point.sparsity, abs=0.02)
        assert point.excess[text] == pytest.approx(
            math.log(point.perplexity[text] / result.dense[text])
        )
        kept = sorted(p.name for p in (out / point.notes).rglob("*") if p.is_file())
        assert kept == ["evaluation.json", "layers.jsonl", "manifest.json", "recipe.yaml"]
    assert result.sweep.protocol[text]["sequence_length"] == 16
    assert result.sweep.calibration is not None
    assert result.sweep.calibration["source"].endswith("w.safetensors")
    record = json.loads((out / "sweep.json").read_text())
    assert record["schema"] == "secateur.sweep/1"
    assert record == result.to_json()
    assert (out / "sweep.md").read_text().count("| sparsegpt |") == 3
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    drawn = (out / "sweep.svg").read_text()
    assert "<svg" in drawn
    assert drawn.count("<path") > 20


@pytest.mark.parametrize(
    ("stage", "steps"),
    [("dense: perplexity", 0), ("sparsegpt-30: pruning", 1), ("sparsegpt-60: perplexity", 0)],
)
def test_killed_it_goes_on_to_the_same_table(
    recipe: SweepRecipe,
    whole: tuple[SweepResult, Path],
    tmp_path: Path,
    stage: str,
    steps: int,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        swept(recipe, tmp_path / "killed", KilledAt(stage, steps))
    seen = KilledAt("magnitude")
    swept(recipe, tmp_path / "killed", seen, resume=True)
    assert measured(tmp_path / "killed") == measured(whole[1])
    assert [*tmp_path.iterdir()] == [tmp_path / "killed"]
    assert not [*tmp_path.glob("killed/points/*/*.saf*")]


def test_another_sweep_is_refused(recipe: SweepRecipe, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(recipe.text[0]).read_text())
    changes = {"methods": ("magnitude",), "patterns": (), "text": (str(text),)}
    few = recipe.model_copy(update=changes)
    swept(few, tmp_path / "s")
    for change in ({"text_sequence_length": 20}, {"sparsities": (0.3,)}):
        with pytest.raises(RecipeError, match=next(iter(change))):
            swept(few.model_copy(update=change), tmp_path / "s", resume=True)
    text.write_text("another text of the same name. " * 30)
    with pytest.raises(RecipeError, match="text"):
        swept(few, tmp_path / "s", resume=True)


def test_nonsense_is_refused_before_any_work(recipe: SweepRecipe, tmp_path: Path) -> None:
    for change, error in (
        ({"methods": ("wnda",)}, RecipeError),
        ({"methods": ()}, RecipeError),
        ({"patterns": ("4of2",)}, PatternError),
        ({"patterns": ("2:4", "3:5")}, PatternError),  # the shapes do not allow it
        ({"sparsities": (30.0,)}, RecipeError),
    ):
        with pytest.raises(error):
            swept(recipe.model_copy(update=change), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def failing(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Let points with a pattern fail at work."""
    measure = SweepPoints.measure_point

    def measured(run: SweepPoints, key: Any, *rest: Any) -> Any:
        if key[1] == pattern:
            raise PatternError("it failed")
        return measure(run, key, *rest)

    monkeypatch.setattr(SweepPoints, "measure_point", measured)


def test_a_point_that_fails_does_not_stop_the_others(
    secateur, recipe: SweepRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "2:4")
    words = (
        "sweep", recipe.model, "--methods", "wanda", "--sparsities", "0.5", "--patterns", "2:4",
        "--calibration", recipe.calibration.source, "--text", recipe.text[0],
        "--text-sequence-length", 16, "-o", tmp_path / "s",
    )  # fmt: skip
    shown = secateur(*words)
    assert shown.code == 1
    assert "failed: wanda 2:4" in shown.out
    record = json.loads(secateur(*words, "--overwrite", "--json").out)
    assert [p["pattern"] for p in record["points"]] == ["unstructured"]
    assert [f["pattern"] for f in record["failures"]] == ["2:4"]


def test_a_sweep_of_failures_has_no_points(
    recipe: SweepRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "2:4")
    result = swept(recipe, tmp_path / "s", methods=["wanda"], sparsities=[], patterns=["2:4"])
    assert result.points == ()
    assert [failure["pattern"] for failure in result.failures] == ["2:4"]
    assert (tmp_path / "s" / "sweep.md").exists()
    assert "the table: " in str(result)
    assert "next:" not in str(result)
