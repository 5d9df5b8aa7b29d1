"""The pruning that chooses heads and neurons: which linears lose columns, and what a unit costs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.stream.targets import ModelTarget
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.structured.choices import UnitSelection, width_selection
from secateur.structured.cut import sizes_of
from secateur.structured.cut_plan import plan_cut, unit_costs
from secateur.structured.surgery import VariedSizesWarning


def selection(family: str, **options: object) -> UnitSelection:
    """What a recipe would prune of a tiny model."""
    target = ModelTarget(tiny_model(family))
    recipe = build_recipe(StructureRecipe, {"model": "m", "output": "o", **options})
    return width_selection(target, recipe, plan_cut(recipe, target.model))


@pytest.mark.parametrize("multiple", [1, 2])
def test_a_group_costs_as_many_neurons_as_have_its_parameters(multiple: int) -> None:
    model = tiny_model("llama")
    params = unit_costs(sizes_of(model), model)
    found = selection("llama", ffn=0.75, kv_groups=0.5, multiple=multiple).costs
    groups = {cost for name, cost in found.items() if name.endswith("o_proj")}
    neurons = {cost for name, cost in found.items() if name.endswith("down_proj")}
    assert neurons == {multiple}
    (group,) = groups
    assert group == pytest.approx(params["groups"] / params["neurons"], rel=0.15)
    assert group % multiple == 0


def test_only_the_linears_of_kinds_that_are_cut_have_patterns() -> None:
    cut = selection("llama", kv_groups=0.5)
    assert [*cut.shares] == [*cut.patterns] == ["*.self_attn.o_proj"]


@pytest.mark.parametrize("family", ["qwen3_next", "mixtral"])
def test_groups_of_a_model_whose_neurons_are_all_in_experts(family: str, tmp_path: Path) -> None:
    """Its layers have no `mlp.down_proj`, which nothing asks to cut."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    save_windows(tiny_windows(4), tmp_path / "windows.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VariedSizesWarning)
        result = secateur.structure(
            tmp_path / "dense", output=tmp_path / "cut", kv_groups=0.5,
            calibration=tmp_path / "windows.safetensors",
        )  # fmt: skip
    before, after = result.manifest.structure.before, result.manifest.structure.after
    assert after.attention < before.attention
    assert after.ffn == before.ffn
