"""Adapters on pruned models: what is trained is what is merged, and zeros stay zeros."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch
from pydantic import ValidationError
from zoo import matrices, tiny_model, tiny_windows, weight_of, zeros_of

from secateur.errors import RecipeError, VerificationError
from secateur.models.skeleton import quiet_transformers
from secateur.recipes.train import LoraOptions
from secateur.training.lora import attach, merge

FAMILIES = ["llama", "gpt2", "phi3", "opt", "generic"]


def pruned_model(family: str, sparsity: float = 0.6):
    """A tiny model with random zeros in all matrices of its layers."""
    model = tiny_model(family)
    random = torch.Generator().manual_seed(3)
    for matrix in matrices(model).values():
        weight = weight_of(matrix)
        weight[torch.rand(weight.shape, generator=random) < sparsity] = 0.0
    return model


def trained(adapted, steps: int = 8):
    """A few steps of Adam on next tokens; the loss of each."""
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    windows, losses = tiny_windows(samples=4), []
    for _ in range(steps):
        loss = adapted(input_ids=windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapted.eval()
    return losses


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=tiny_windows(seed=9)).logits


def same_zeros(before, after) -> bool:
    return all(bool((after[name] | ~zeros).all()) for name, zeros in before.items())


@pytest.mark.parametrize(
    ("family", "dtype", "near"),
    [*((family, torch.float32, 1e-4) for family in FAMILIES), ("llama", torch.bfloat16, 0.1)],
)
def test_merging_keeps_zeros_and_function(family, dtype, near):
    model = pruned_model(family).to(dtype)
    before, plain = zeros_of(model), logits_of(model)
    adapted = attach(model, LoraOptions(rank=4))
    assert torch.equal(logits_of(adapted), plain)  # B begins as zeros
    losses = trained(adapted)
    assert losses[-1] < losses[0]
    function = logits_of(adapted)
    assert not torch.allclose(function, plain, atol=1e-2)
    merged = merge(adapted)
    torch.testing.assert_close(logits_of(merged), function, rtol=near, atol=near)
    after = zeros_of(merged)
    assert before.keys() == after.keys()
    assert same_zeros(before, after)


def test_the_function_is_that_of_the_masked_sum():
    model = pruned_model("llama")
    weights = {n: weight_of(m).clone() for n, m in matrices(model).items()}
    adapted = attach(model, LoraOptions(rank=4, alpha=12.0))
    trained(adapted)
    oracle = tiny_model("llama")
    for name, matrix in matrices(oracle).items():
        adapter = adapted.get_base_model().get_submodule(name)
        a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
        full = weights[name] + 12.0 / 4 * (b @ a).detach()
        weight_of(matrix).copy_(full * (weights[name] != 0))
    torch.testing.assert_close(logits_of(adapted), logits_of(oracle), rtol=1e-4, atol=1e-4)


def test_peft_itself_merges_and_unmerges_with_the_mask():
    model = pruned_model("gpt2")
    before = zeros_of(model)
    adapted = attach(model, LoraOptions(rank=2))
    trained(adapted)
    function = logits_of(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits_of(adapted), function, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits_of(adapted), function, rtol=1e-4, atol=1e-4)
    assert same_zeros(before, zeros_of(adapted.merge_and_unload(safe_merge=True)))


def test_saved_adapters_come_back(tmp_path):
    model = pruned_model("llama")
    fresh, before = copy.deepcopy(model), zeros_of(model)
    adapted = attach(model, LoraOptions(rank=3))
    trained(adapted)
    adapted.save_pretrained(tmp_path)
    again = attach(fresh, LoraOptions(rank=3))
    again.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits_of(again), logits_of(adapted))
    assert same_zeros(before, zeros_of(merge(again)))


def test_peft_loads_what_was_saved_as_the_same_function(tmp_path):
    """Of a dense model the mask holds everything, so a plain adapter is the same function."""
    import peft

    dense = tiny_model("llama")
    how = LoraOptions(rank=3, alpha=12.0, dropout=0.25, targets=("q_proj", "mlp.*"))
    adapted = attach(copy.deepcopy(dense), how)
    trained(adapted)
    function = logits_of(adapted)
    assert not torch.allclose(function, logits_of(dense), atol=1e-2)
    adapted.save_pretrained(tmp_path)
    with quiet_transformers():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(dense), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(loaded), function)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12.0, 0.25)
    names = {name.rpartition(".")[2] for name in config.target_modules}
    assert names == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    torch.testing.assert_close(logits_of(merge(adapted)), function, rtol=1e-4, atol=1e-4)


def test_dropout_falls_on_the_inputs_alone_in_training():
    adapted = attach(pruned_model("llama"), LoraOptions(rank=4, dropout=0.5))
    trained(adapted)
    function = logits_of(adapted)
    assert torch.equal(function, logits_of(adapted))
    adapted.train()
    assert not torch.equal(function, logits_of(adapted))
    adapted.eval()
    torch.testing.assert_close(logits_of(merge(adapted)), function, rtol=1e-4, atol=1e-4)


def test_globs_choose_linears():
    model = pruned_model("llama")
    how = LoraOptions(targets=("*.self_attn.*", "mlp.*"), exclude=("*.mlp.down_proj",))
    adapted = attach(model, how)
    tuned = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name in tuned)
    linears = {name.split(".lora_")[0].split(".")[-1] for name in tuned}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_a_filled_zero_is_found():
    adapted = attach(pruned_model("llama"))
    name, adapter = next(
        (n, m) for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")
    )
    hole = (~adapter.kept).nonzero()[0]
    adapter.base_layer.weight.data[tuple(hole)] = 1.0
    with pytest.raises(VerificationError, match="1 pruned") as raised:
        merge(adapted)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")],
)
def test_refuses_numbers_out_of_range(options, said):
    with pytest.raises(ValidationError, match=said):
        LoraOptions(**options)


def test_refuses_globs_that_leave_nothing():
    with pytest.raises(RecipeError, match="exclude"):
        attach(pruned_model("llama"), LoraOptions(exclude=("*",)))


def test_without_peft_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RecipeError, match=r"pip install '\.\[lora\]'"):
        attach(pruned_model("llama"))
