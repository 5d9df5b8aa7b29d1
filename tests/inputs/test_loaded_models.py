"""Calls on loaded models refuse what they would ignore, and modules that are no models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from zoo import config_of, tiny_windows

import secateur
from secateur.errors import ArchitectureError, RecipeError
from secateur.training.lora import attach

USELESS: list[dict[str, Any]] = [
    {"compress": "int8"}, {"compress": {"values": "int8"}}, {"resume": True}, {"restart": True},
    {"overwrite": True}, {"output": "o"}, {"dry_run": True}, {"keep_format": True},
    {"device": "cpu"}, {"dtype": "float16"}, {"trust_remote_code": True}, {"max_memory": "4GiB"},
    {"memory": {"activations": "disk"}}, {"processes": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_config(config_of("llama"))


@pytest.mark.parametrize("options", USELESS, ids=str)
def test_prune_refuses_what_a_loaded_model_cannot_use(
    model: LlamaForCausalLM, options: dict[str, Any]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecipeError, match="|".join([*options, "activations"])):
        secateur.prune(model, method="magnitude", sparsity=0.5, **options)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("option", ["windows", "sequence_length"])
def test_windows_of_a_tensor_are_not_cut_again(model: LlamaForCausalLM, option: str) -> None:
    with pytest.raises(RecipeError, match=f"`{option}` would change nothing"):
        secateur.prune(
            model, method="wanda", sparsity=0.5, calibration=tiny_windows(), **{option: 3}
        )


def test_options_that_are_off_are_no_options(model: LlamaForCausalLM) -> None:
    assert secateur.prune(model, method="magnitude", sparsity=0.25, resume=False).sparsity > 0.2


def test_evaluate_refuses_what_it_would_ignore(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`device`"):
        secateur.evaluate(model, tokenizer=tiny_tokenizer(), text="t.txt", device="cpu")
    with pytest.raises(RecipeError, match="checkpoint"):
        secateur.evaluate(tmp_path, tokenizer=tiny_tokenizer(), text="t.txt")
    with pytest.raises(RecipeError, match="checkpoint"):
        secateur.prune(tmp_path, output=tmp_path / "o", sparsity=0.5, tokenizer=tiny_tokenizer())


def test_wrapped_models_are_refused_by_what_wraps_them() -> None:
    model = AutoModelForCausalLM.from_config(config_of("llama"))
    prune = partial(secateur.prune, sparsity=0.5, method="magnitude")
    with pytest.raises(ArchitectureError, match=r"torch\.compile(?s:.*)_orig_mod"):
        prune(torch.compile(model, backend="eager"))
    with pytest.raises(RecipeError, match="LlamaForCausalLM"):
        secateur.merge(model)
    adapted = attach(model)
    for wrapped in (adapted, adapted.get_base_model()):
        with pytest.raises(ArchitectureError, match=r"secateur\.merge"):
            prune(wrapped)
    assert prune(secateur.merge(adapted)).sparsity > 0.4


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama"))
    for verb in (
        partial(secateur.prune, sparsity=0.5, method="magnitude"),
        partial(secateur.evaluate, tokenizer=tiny_tokenizer(), text="t.txt"),
    ):
        with pytest.raises(ArchitectureError, match="meta device"):
            verb(model)


def test_a_module_that_is_no_model() -> None:
    with pytest.raises(ArchitectureError, match="Linear"):
        secateur.prune(nn.Linear(3, 3), sparsity=0.5, method="magnitude")
    with pytest.raises(ArchitectureError, match="Linear"):
        secateur.evaluate(nn.Linear(3, 3), tokenizer=tiny_tokenizer(), text="t.txt")
