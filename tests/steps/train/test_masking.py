"""Zeros that a training holds, and masks that would lose some."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_tokenizer
from trainings import make_place, train_in
from zoo import SIZES

import secateur
from secateur.errors import RecipeError, SourceError
from secateur.models.skeleton import quiet_transformers
from secateur.training.masks import Masks

MATRIX = "model.layers.0.mlp.down_proj.weight"


train = partial(train_in, steps=2, windows=16, validation_windows=0)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("masking"), sparsity=0.5)


def test_masks_without_a_zero_are_refused(places: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not one zero"):
        train(places, tmp_path / "out", mask=str(places / "dense"))
    ones = torch.ones_like(load_file(places / "pruned" / "model.safetensors")[MATRIX])
    save_file({MATRIX: ones.bool()}, tmp_path / "ones.safetensors")
    with pytest.raises(RecipeError, match="mask"):
        train(places, tmp_path / "file", mask=str(tmp_path / "ones.safetensors"))


def test_masks_of_a_pruned_folder_are_held(places: Path, tmp_path: Path) -> None:
    done = train(places, tmp_path / "out", places / "dense", mask=str(places / "pruned"))
    assert done.sparsity == pytest.approx(0.5)


def test_masks_of_another_model_are_refused(places: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "narrow", intermediate_size=32)
    with pytest.raises(RecipeError, match="32"):
        train(places, tmp_path / "a", mask=str(tmp_path / "narrow"))
    save_tiny(tmp_path / "shallow", num_hidden_layers=2)
    with pytest.raises(RecipeError, match=r"model\.layers\.2"):
        train(places, tmp_path / "b", mask=str(tmp_path / "shallow"))
    save_tiny(tmp_path / "opt", "opt")
    with pytest.raises(RecipeError, match="in both"):
        train(places, tmp_path / "c", mask=str(tmp_path / "opt"))
    save_file({"nobody": torch.zeros(2, dtype=torch.bool)}, tmp_path / "odd.safetensors")
    with pytest.raises(RecipeError, match="nobody"):
        train(places, tmp_path / "d", mask=str(tmp_path / "odd.safetensors"))
    save_file({MATRIX: torch.zeros(2)}, tmp_path / "floats.safetensors")
    with pytest.raises(SourceError, match=MATRIX):
        train(places, tmp_path / "e", mask=str(tmp_path / "floats.safetensors"))


def test_masks_that_hold_fewer_zeros_than_there_are(places: Path, tmp_path: Path) -> None:
    stored = load_file(places / "pruned" / "model.safetensors")
    Masks({MATRIX: stored[MATRIX] != 0}).save(tmp_path / "one.safetensors")
    mask = str(tmp_path / "one.safetensors")
    with pytest.raises(RecipeError, match=r"20 matrices .* 50\.0%"):
        train(places, tmp_path / "no", mask=mask)


def deepseek(folder: Path) -> Path:
    """A tiny DeepSeek-V3, whose experts transformers holds in one tensor; half of it is zero."""
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, moe_intermediate_size=24, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("model.layers") and weight.ndim >= 2:
                weight.mul_(torch.rand_like(weight) < 0.5)
    with quiet_transformers():
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize("gradual", [None, {"sparsity": 0.8, "every": 1}])
def test_experts_in_one_tensor_keep_their_zeros(
    family: str, gradual: Any, places: Path, tmp_path: Path
) -> None:
    if family == "deepseek_v3":
        pruned = deepseek(tmp_path / "pruned")
    else:
        dense, pruned = save_tiny(tmp_path / "dense", family), tmp_path / "pruned"
        secateur.prune(dense, output=pruned, method="magnitude", sparsity=0.5)
    train(places, tmp_path / "out", pruned, gradual=gradual, learning_rate=1e-2)
    before, after = (load_file(x / "model.safetensors") for x in (pruned, tmp_path / "out"))
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in experts)
    filled = {n: int(after[n][before[n] == 0].count_nonzero()) for n in before if "layers" in n}
    assert not any(filled[n] for n in filled if before[n].ndim >= 2)
