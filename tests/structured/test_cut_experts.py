"""Experts removed from every family that has them: router, corrections and groups follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuts import cut_on_disk, cut_quietly, logits
from safetensors.torch import load_file
from same_logits import assert_same_logits
from slow import slow_but
from tiny import saved
from torch.overrides import TorchFunctionMode
from zoo import MIXTURES, WITH_EXPERTS, tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError
from secateur.models.architecture import describe, text_config
from secateur.models.opening import load_whole
from secateur.models.skeleton import quiet_transformers
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.surgery import cut_checkpoint, cut_model

FORMS = ("gpt_oss", "llama4", "deepseek_v3", "nemotron_h", "granitemoe", "step3p7 experts")
IDS = tiny_windows(2, 9, seed=5)
CPU = torch.device("cpu")


def kept_of(model: Any) -> dict[int, tuple[int, ...]]:
    """Some experts of every layer that has any, as many of each group."""
    counts = enumerate(sizes_of(model).experts)
    return {i: (0, 2, 3, 5) if n == 6 else (0, 2, 4) for i, n in counts if n}


@pytest.mark.parametrize("family", slow_but(FORMS, WITH_EXPERTS))
def test_experts_are_removed_with_their_rows(family: str, tmp_path: Path) -> None:
    """What plain transformers loads holds the kept experts, rows and corrections, in order."""
    model: Any = tiny_model(family)
    kept = kept_of(model)
    counted, smaller = cut_on_disk(model, Cut(experts=kept), tmp_path, varied="error")
    assert not counted.varied
    expected = logits(cut_model(model, Cut(experts=kept)), IDS)
    assert_same_logits(logits(smaller.eval(), IDS), expected)
    experts: Any = describe(model).experts
    assert getattr(text_config(smaller.config), experts.count) == len(next(iter(kept.values())))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    after = dict(smaller.named_parameters()) | dict(smaller.named_buffers())
    assert after.keys() == before.keys()
    changed = set()
    for name, now in after.items():
        was = before[name]
        if was.shape != now.shape:
            axis = next(
                i for i, (a, b) in enumerate(zip(was.shape, now.shape, strict=True)) if a != b
            )
            layer = int(name.split(".layers.")[1].split(".")[0])
            was = was.index_select(axis, torch.tensor(kept[layer]))
            changed.add(name.rpartition(".")[2])
        if name.endswith("tid2eid"):
            was = by_hand(was, kept[int(name.split(".layers.")[1].split(".")[0])])
        assert torch.equal(now, was), name
    corrections = {
        n.rpartition(".")[2] for n, x in before.items() if x.shape in ((5,), (6,), (1, 5))
    }
    assert changed >= {"down_proj", "weight"} | corrections
    tensors = {
        n.rpartition(".experts.")[2] for n in load_file(tmp_path / "source" / "model.safetensors")
    }
    left = {n.rpartition(".experts.")[2] for n in load_file(tmp_path / "out" / "model.safetensors")}
    assert left <= tensors  # fused where the source is fused, one by one where it is not


def by_hand(table: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    """The experts of each token after a cut: lost ones are replaced by the next free ones."""
    rows = []
    for token, chosen in enumerate(table.tolist()):
        row = [kept.index(e) if e in kept else None for e in chosen]
        for place, number in enumerate(row):
            if number is None:
                turns = ((token + place + turn) % len(kept) for turn in range(len(kept)))
                row[place] = next(other for other in turns if other not in row)
        rows.append(row)
    return torch.tensor(rows)


def test_experts_stored_by_projection_stay_so(tmp_path: Path) -> None:
    """In one tensor for the gates of all experts, one for the ups, and one for the downs."""
    model: Any = tiny_model("step3p7 experts")
    kept = [1, 2, 3]
    cut_on_disk(model, Cut(layers=(0, 2), experts={2: tuple(kept)}), tmp_path)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("source", "out"))
    for name in ("gate_proj", "up_proj", "down_proj", "gate"):
        was = before[f"model.layers.2.moe.{name}.weight"]
        assert torch.equal(after[f"model.layers.1.moe.{name}.weight"], was[kept])
    assert not any(".layers.2." in name and "vision" not in name for name in after)


WITH_CORRECTIONS = ("glm4_moe", "glm4_moe_lite", "deepseek_v3", "dots1", "minimax_m2", "minimax_m3",
                    "lfm2_moe", "hy_v3")  # fmt: skip
SPARSER: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1},
    "llama4": {"moe_layers": [0, 1, 2]},
    "nemotron_h": {"layers_block_type": ["moe", "full_attention", "moe"]},
}
"""Entries with which more than one layer has experts."""


class WithoutExperts(TorchFunctionMode):
    """Logits of routers in which some experts have no chance; their corrections are low as well."""

    def __init__(self, model: Any, kept: dict[int, tuple[int, ...]]) -> None:
        super().__init__()
        path, self.gone = describe(model).experts.router, {}
        for layer, numbers in kept.items():
            block = describe(model).layers(model)[layer]
            gone = [e for e in range(sizes_of(model).experts[layer]) if e not in numbers]
            self.gone[id(block.get_submodule(path).weight)] = gone
            for name, tensor in (*block.named_parameters(), *block.named_buffers()):
                if name.endswith(("correction_bias", "expert_bias")):
                    tensor.detach()[..., gone] = -10.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            out[..., self.gone.get(id(args[1]), [])] = -torch.inf
        return out


@pytest.mark.parametrize("family", slow_but((*WITH_CORRECTIONS, "gemma4"), MIXTURES))
def test_layers_keep_different_numbers_of_experts(family: str, tmp_path: Path) -> None:
    """The cut model, in memory and loaded, computes what the whole one does without the others."""
    model: Any = tiny_model(family, **SPARSER.get(family, {}))
    kept = kept_of(model)
    del kept[min(kept)]  # the first layer with experts keeps all
    counted, loaded = cut_on_disk(model, Cut(experts=kept), tmp_path)
    assert counted.varied
    found = [cut_quietly(model, Cut(experts=kept)), loaded, secateur.load(tmp_path / "out")]
    found = [logits(each.eval(), IDS) for each in found]
    with WithoutExperts(model, kept):
        expected = logits(model, IDS)
    for each in found:
        assert_same_logits(each, expected)


def test_groups_of_experts_stay_even() -> None:
    model = tiny_model("deepseek_v3")
    uneven = {(0, 1, 2, 3, 4): "3, 2", (0, 1, 2): "3, 0", (0, 3): "1, 1"}
    for kept, found in uneven.items():
        with pytest.raises(RecipeError, match=rf"\[{found}\] .* 2 groups"):
            cut_model(model, Cut(experts={1: kept, 2: kept}))


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4", "llama4", "step3p7 experts"])
def test_structure_chooses_experts_by_reap(family: str, tmp_path: Path) -> None:
    """As many of each group; Llama 4 weighs inputs, so outputs count as they are."""
    source = saved(tiny_model(family), tmp_path / "source")
    save_windows(tiny_windows(), tmp_path / "windows.safetensors")
    secateur.structure(
        source, output=tmp_path / "out", experts=4, calibration=tmp_path / "windows.safetensors"
    )
    assert {n for n in sizes_of(load_whole(tmp_path / "out", CPU)).experts if n} == {4}


def test_experts_that_are_stored_fused(tmp_path: Path) -> None:
    model: Any = tiny_model("mixtral")
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source", save_original_format=False)
    counted = cut_checkpoint(tmp_path / "source", Cut(experts=dict.fromkeys(range(3), (1, 3))),
                          tmp_path / "out")  # fmt: skip
    assert not counted.varied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 2
    with quiet_transformers():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = cut_model(model, Cut(experts=dict.fromkeys(range(3), (1, 3))))
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_fewer_experts_than_a_token_wants_are_refused() -> None:
    with pytest.raises(RecipeError, match="each token needs 2"):
        cut_model(tiny_model("mixtral"), Cut(experts={0: (1,)}))
