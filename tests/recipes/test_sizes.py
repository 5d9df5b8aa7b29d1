"""Sizes with units: one parser for every option that is a number of bytes."""

from __future__ import annotations

import pytest

from secateur.errors import RecipeError
from secateur.recipes.deploy import ServeRecipe
from secateur.recipes.options import bytes_of, options_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe, recipe_from_flags
from secateur.recipes.recipe_files import dump_recipe, read_yaml
from secateur.recipes.verbs import VERBS, imported


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("90MiB", 90 * 2**20),
        ("4 gb", 4 * 10**9),
        ("1.5KiB", 1536),
        ("123", 123),
        (123, 123),
        ("6e9", 6 * 10**9),
        ("500MB", 5 * 10**8),
        ("1TiB", 2**40),
        ("7B", 7),
    ],
)
def test_sizes_are_read(size: int | str, count: int) -> None:
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["6G", "-1", "MiB", "much", "6 apples", "1e999", "nan", "0x10"])
def test_what_is_no_size_is_refused_with_the_units(size: str) -> None:
    with pytest.raises(RecipeError, match="KiB, MiB, GiB"):
        recipe_from_flags(PruneRecipe, {"model": "m", "max_memory": size})


@pytest.mark.parametrize("size", ["0", 0, -1, True, [1], 1.5])
def test_numbers_that_are_no_size_are_refused(size: object) -> None:
    with pytest.raises(RecipeError, match="max_memory"):
        build_recipe(PruneRecipe, {"model": "m", "memory": {"max_memory": size}})


def test_a_recipe_keeps_what_was_written() -> None:
    for given, count in (("6GiB", 6 * 2**30), (6 * 10**9, 6 * 10**9), (6e9, 6 * 10**9)):
        recipe = build_recipe(PruneRecipe, {"model": "m", "memory": {"max_memory": given}})
        assert recipe.memory.max_bytes == count
        again = build_recipe(PruneRecipe, read_yaml(dump_recipe(recipe), "recipe"))
        assert again.memory.max_bytes == count
    assert bytes_of(build_recipe(ServeRecipe, {"model": "m", "prefix_cache": 0}).prefix_cache) == 0


def test_every_size_has_a_unit_of_its_own_choice() -> None:
    """No option counts MiB or GiB; the memory of a run has one name in every verb."""
    for verb in VERBS.values():
        names = {option.name for option in options_of(imported(verb.recipe))}
        assert not [name for name in names if name.endswith(("_mib", "_gib", "_mb", "_gb"))]
        if {"activations", "gradient_checkpointing"} & names:
            assert "max_memory" in names
