"""`prune --compress`: two steps, one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.runtime.packed import is_packed


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and windows, in which commands run."""
    save_tiny(tmp_path / "m")
    save_windows(tiny_windows(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS = {"method": "wanda", "sparsity": 0.5, "calibration": "w.safetensors"}


def weights(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("values", ["int8", "int4", "int3", "int2"])
def test_one_call_gives_what_two_calls_give(place: Path, values: str) -> None:
    report = secateur.prune("m", output="both", compress=values, **OPTIONS)
    secateur.prune("m", output="half", **OPTIONS)
    packed = secateur.compress("half", output="small", values=values)
    assert weights(place / "both") == weights(place / "small")
    assert is_packed(place / "both")
    assert report.sparsity == 0.5
    assert report.output == place / "both"
    assert report.compression is not None
    assert report.compression.file_bytes == packed.file_bytes
    assert report.compression.formats == packed.formats


@pytest.mark.parametrize("values", [None, "int8"])
def test_the_recipe_of_a_run_makes_the_same_model_again(
    place: Path, request: pytest.FixtureRequest, values: str | None
) -> None:
    secateur.prune("m", output="first", compress=values, **OPTIONS)
    command = request.getfixturevalue("secateur")
    done = command("prune", place / "first" / "secateur" / "recipe.yaml", "--output", "again")
    assert done.code == 0, done.err
    assert weights(place / "again") == weights(place / "first")


def test_notes_and_card_are_about_the_whole_command(place: Path) -> None:
    secateur.prune("m", output="both", compress="int8", **OPTIONS)
    recipe = (place / "both" / "secateur" / "recipe.yaml").read_text()
    found = yaml.safe_load(recipe)
    assert found["compress"] == "int8"
    assert found["output"] == "both"
    card = (place / "both" / "README.md").read_text()
    assert recipe.rstrip() in card
    assert 'secateur.load("both")' in card
    assert "01-prune" not in card
    assert "02-compress" not in card
    manifest = json.loads((place / "both" / "secateur" / "manifest.json").read_text())
    assert manifest["source"]["name"] == "m"
    again = place / "both" / "secateur" / "recipe.yaml"
    from secateur.recipes.prune import PruneRecipe
    from secateur.recipes.reading import build_recipe
    from secateur.recipes.recipe_files import read_recipe_file

    build_recipe(PruneRecipe, read_recipe_file(again))


def test_the_command_shows_both_in_json(place: Path, secateur) -> None:
    done = secateur(
        "prune", "m", "--method", "wanda", "--sparsity", "0.5", "--calibration", "w.safetensors",
        "--compress", "int8", "-o", "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["result"]["decoder_sparsity"] == 0.5
    assert found["compression"]["file_bytes"] < found["result"]["file_bytes"]
    assert found["output"].endswith("out")
    wrong = secateur("prune", "m", "--sparsity", "0.5", "--compress", "int1", "-o", "other")
    assert wrong.code == 2
    assert "--compress int1" in wrong.err


def test_a_stop_while_packing_loses_no_pruning(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.steps.compress.Compress.work", stop)
        with pytest.raises(KeyboardInterrupt):
            secateur.prune("m", output="out", compress="int8", **OPTIONS)
    with monkeypatch.context() as patch:  # the pruning is not repeated
        patch.setattr("secateur.steps.prune.Prune.work", stop)
        report = secateur.prune("m", output="out", compress="int8", resume=True, **OPTIONS)
    assert report.compression is not None
    secateur.prune("m", output="whole", compress="int8", **OPTIONS)
    assert weights(place / "out") == weights(place / "whole")
