"""What can be asked of a cut, and what is refused before any work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from zoo import CONFIGS, tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.prepared import Prepared, prepare
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.sources import resolve
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.structured.choices import over_width
from secateur.structured.cut import Cut, Sizes, consumers, sizes_of, unit_width
from secateur.structured.cut_plan import plan_cut, unit_costs
from secateur.structured.surgery import VariedSizesWarning, cut_from_zeros, cut_model

IMPOSSIBLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "no layer": ({"layers": ()}, "decoder layers: the cut keeps none"),
    "more layers than there are": ({"layers": (0, 1, 2, 3)}, "the cut keeps 4, but there are 3"),
    "unknown layer": ({"layers": (0, 3)}, "there is no 3, only 0 to 2"),
    "negative layer": ({"layers": (-1, 2)}, "there is no -1"),
    "layer twice": ({"layers": (0, 0, 2)}, "named twice"),
    "layers in another order": ({"layers": (2, 0)}, "not ascending"),
    "no channel": ({"hidden": ()}, "hidden channels: the cut keeps none"),
    "unknown channel": ({"hidden": (5, 32)}, "there is no 32"),
    "unknown group": ({"groups": {1: (2,)}}, "KV groups of layer 1: there is no 2"),
    "group twice": ({"groups": {1: (1, 1)}}, "named twice"),
    "groups of an unknown layer": ({"groups": {7: (0,)}}, "KV groups of layer 7"),
    "query heads of one layer": ({"queries": {0: (0, 2)}}, "layer 1 keeps all, others do not"),
    "query heads of one group": (
        {"queries": dict.fromkeys(range(3), (0, 1, 2))},
        "some KV groups keep 1, some 2",
    ),
    "query heads and groups": (
        {"queries": dict.fromkeys(range(3), (0, 2)), "groups": {0: (1,)}},
        "cannot be cut at once",
    ),
    "no query head": (
        {"queries": dict.fromkeys(range(3), ())},
        "query heads of layer 0: the cut keeps none",
    ),
    "too many neurons": ({"neurons": {0: tuple(range(49))}}, "the cut keeps 49, but there are 48"),
    "unknown neuron": ({"neurons": {0: (48,)}}, "there is no 48"),
    "experts of a dense model": ({"experts": {0: (1,)}}, "experts of layer 0"),
    "no expert": ({"experts": {0: ()}}, "the cut keeps none"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_cuts_are_refused(name: str) -> None:
    record, message = IMPOSSIBLE[name]
    with pytest.raises(RecipeError, match=message) as caught:
        cut_model(tiny_model("llama"), Cut(**record))
    assert caught.value.remedy
    assert caught.value.exit_code == 2


def test_all_faults_are_reported_at_once() -> None:
    cut = Cut(layers=(9,), groups={0: (8,)}, neurons={1: (77,)}, hidden=())
    with pytest.raises(RecipeError) as caught:
        cut_model(tiny_model("llama"), cut)
    assert caught.value.what.count("\n") == 4


def test_layers_whose_index_scales_their_attention_are_not_cut() -> None:
    model = tiny_model("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ArchitectureError, match="index"):
        cut_model(model, Cut(layers=(0, 2)))


def test_sizes_are_read_from_the_modules() -> None:
    assert sizes_of(tiny_model("qwen3")) == Sizes(
        32, 8, 2, (2,) * 3, (48,) * 3, (0,) * 3, ((0, 0),) * 3
    )
    assert sizes_of(tiny_model("gpt2")) == Sizes(
        32, 8, 1, (4,) * 3, (128,) * 3, (0,) * 3, ((0, 0),) * 3
    )


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "generic"])
def test_units_whose_columns_are_zero_are_not_kept(family: str) -> None:
    model = tiny_model(family)
    sizes, named = sizes_of(model), consumers(model)
    path = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
    layers: Any = model.get_submodule(path.get(family, "model.layers"))
    expected = Cut(
        groups={0: tuple(range(1, sizes.groups[0])), 2: ()},
        neurons={1: tuple(range(3, sizes.neurons[1]))},
    )
    with torch.no_grad():
        for kind, layer, count in (("groups", 0, 1), ("groups", 2, 9), ("neurons", 1, 3)):
            module = layers[layer].get_submodule(named[kind])
            columns = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
            columns[:, : count * unit_width(sizes, kind)] = 0
            if count == 9 and module.bias is not None:
                module.bias.zero_()
    assert cut_from_zeros(model) == expected


def test_a_bias_keeps_its_sub_block() -> None:
    model: Any = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight.zero_()
    assert cut_from_zeros(model) == Cut(neurons={1: (0,)})


def over_units(folder: Path, **options: object) -> Prepared:
    """The run that would choose heads and neurons of a tiny model."""
    place = str(save_tiny(folder, "llama"))
    recipe = build_recipe(StructureRecipe, {"model": place, "output": "o", **options})
    pruning = build_recipe(PruneRecipe, {"model": place, "method": "magnitude", "sparsity": 0.5})
    prepared = prepare(pruning, resolve(place), only_plan=True)
    return over_width(prepared, recipe, plan_cut(recipe, prepared.target.model))


@pytest.mark.parametrize("multiple", [1, 2])
def test_a_group_costs_as_many_neurons_as_have_its_parameters(
    multiple: int, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    params = unit_costs(sizes_of(model), model)
    found = over_units(tmp_path, ffn=0.75, kv_groups=0.5, multiple=multiple).costs
    groups = {cost for name, cost in found.items() if name.endswith("o_proj")}
    neurons = {cost for name, cost in found.items() if name.endswith("down_proj")}
    assert neurons == {multiple}
    (group,) = groups
    assert group == pytest.approx(params["groups"] / params["neurons"], rel=0.15)
    assert group % multiple == 0


def test_only_the_linears_of_kinds_that_are_cut_have_patterns(tmp_path: Path) -> None:
    cut = over_units(tmp_path, kv_groups=0.5)
    assert [*cut.selection.include] == [*cut.methods] == ["*.self_attn.o_proj"]


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
