"""Recipes that are no recipes, or that say something else than they seem to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.errors import RecipeError
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.recipe_files import dump_recipe, read_recipe_file, read_yaml, write_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)

FILES: list[tuple[bytes, str]] = [
    (bytes(range(256)), "utf-8"),
    ("model: m".encode("utf-16"), "utf-8"),
    (b"model: \x00", "not YAML"),
    (b"a: " + b"[" * 20_000, "not YAML"),
    (b"".join(b" " * n + b"a:\n" for n in range(1000)), "not YAML"),
    (BOMB.encode(), "aliases"),
    (b"a: &a\n  b: *a\n", "aliases"),
    (b"model: m\nsparsity: 0.5\nsparsity: 0.9\n", "'sparsity' is given twice"),
    (b"model: m\ncalibration: {seed: 1, 'seed': 2}\n", "'seed' is given twice"),
    (b"1: m\n", "a key is not text"),
    (b"[a]: m\n", "a key is not text"),
    (b"- model\n", "mapping"),
    (b"", "mapping"),
    (b"a: !!timestamp x\n", "not YAML"),
    (b"a: 2001-99-99\n", "not YAML"),
    (b"a: !!python/object/apply:os.getcwd []\n", "not YAML"),
    (b"a: " + b"9" * 5000, "not YAML"),
]


@pytest.mark.parametrize(("content", "what"), FILES)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=what) as error:
        read_recipe_file(file)
    assert error.value.where == str(file)
    assert len(str(error.value)) < 2000  # 9⁸ aliases printed 226 MB


@pytest.mark.parametrize("verb", ["prune", "structure", "train", "chain"])
def test_every_verb_reads_recipes_so(refused, tmp_path: Path, verb: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(BOMB.encode())
    refused(verb, tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\0")
    refused(verb, tmp_path / "recipe.yaml", "-o", tmp_path / "out")


@pytest.mark.parametrize("assignment", ["a={[", "a=" + "[" * 5000, "memory.max_memory='2 apples'"])
def test_assignments_that_are_no_values(refused, assignment: str, tmp_path: Path) -> None:
    refused("prune", "m", "-o", tmp_path / "out", "--sparsity", "0.5", "--set", assignment)


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": "0.5"},
        {"sparsity": True},
        {"sparsity": math.nan},
        {"sparsity": math.inf},
        {"asymmetric": 1},
        {"asymmetric": "yes"},
        {"calibration": {"windows": 4.0}},
        {"calibration": {"windows": "4"}},
        {"calibration": {"seed": 10**22}},
        {"overrides": {"*": "0.5"}},
        {"method_parameters": {"damping": "0.1"}},
        {"include": "*"},
        {"include": [5]},
        {"pattern": 24},
    ],
)
def test_values_of_another_type(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"should|must|unknown|twice"):
        build_recipe(PruneRecipe, {"model": "m", "sparsity": 0.5, **fields})


def test_values_that_yaml_writes_in_its_own_way() -> None:
    read = read_yaml(
        "{model: m, pattern: 2:4, sparsity: 0, asymmetric_damping: 1e-3, include: [a, b],\n"
        "fast_matmuls: yes, calibration: {seed: 010, windows: 1_000}}"
    )
    recipe = build_recipe(PruneRecipe, read)
    assert recipe.pattern == "2:4"  # YAML 1.1 reads 124
    assert recipe.asymmetric_damping == 1e-3  # and this as text
    assert recipe.include == ("a", "b")
    assert recipe.fast_matmuls is True
    assert recipe.calibration.seed == 10  # and this as 8
    assert recipe.calibration.windows == 1000


@pytest.mark.parametrize(
    "value",
    ["2:4", "1e-3", "0.5", "010", "09", "0o7", "yes", "null", "", "1_0", ".5", "a: b", 1e-5],
)
def test_what_is_written_is_read_the_same_by_both(value: object) -> None:
    text = write_yaml({"key": value})
    assert read_yaml(text) == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


def test_a_resolved_recipe_is_read_again() -> None:
    recipe = build_recipe(PruneRecipe, {"model": "1e5", "method": "wanda", "pattern": "2:4"})
    assert build_recipe(PruneRecipe, read_yaml(dump_recipe(recipe))) == recipe


def test_sections_that_are_no_sections(refused, tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text("model: m\nsparsity: 0.5\ncalibration: 5\n")
    assert "keys and values" in refused("prune", file, "--windows", 4, "-o", out)
    assert "calibration=5: " in refused("prune", file, "-o", out)


@pytest.mark.parametrize(
    "text", ["model: 5\noutput: o\nsteps: []", "model: m\noutput: [o]\nsteps: 7"]
)
def test_chains_whose_names_are_none(refused, tmp_path: Path, text: str) -> None:
    (tmp_path / "chain.yaml").write_text(text)
    refused("chain", tmp_path / "chain.yaml")
