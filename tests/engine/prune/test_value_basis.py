"""A learned basis of the value heads: the dense model stays the same, and zeros cost less."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import slow_but
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny
from torch import nn
from zoo import tiny_model, tiny_windows

import secateur
from oracles.value_basis import basis_error
from secateur import precision
from secateur.engine.plan_memory import BASIS
from secateur.engine.prune import value_basis
from secateur.engine.prune.tasks import LinearTask
from secateur.engine.prune.value_basis import ValueHeads, error_of, learn_basis, value_heads
from secateur.engine.stream.halted_forwards import LiveTensors
from secateur.models.architecture import Linear, describe, linears_of
from secateur.sparsity.methods import Method, compose

HEADS, READERS, SIZE, HIDDEN = 2, 2, 4, 10


def bases(heads: int, size: int, seed: int = 0) -> torch.Tensor:
    """Random matrices whose condition number is 4."""
    random = torch.randn(2 * heads, size, size, generator=torch.Generator().manual_seed(seed))
    rotations = torch.linalg.qr(random)[0]
    return rotations[:heads] * torch.linspace(0.5, 2, size) @ rotations[heads:]


def example() -> tuple[ValueHeads, tuple[torch.Tensor, torch.Tensor], list[LinearTask]]:
    torch.manual_seed(0)
    values = Linear("v", nn.Linear(HIDDEN, HEADS * SIZE))
    output = Linear("o", nn.Linear(HEADS * READERS * SIZE, HIDDEN))
    inputs = [torch.randn(60, x.shape[1]) @ torch.randn(x.shape[1], x.shape[1])
              for x in (values, output)]  # fmt: skip
    method = compose("sparsegpt", "unstructured")
    tasks = [LinearTask(x.name, x.shape, method, 0.5) for x in (values, output)]
    grams = (inputs[0].t() @ inputs[0], inputs[1].t() @ inputs[1])
    return ValueHeads(values, output, SIZE), grams, tasks


def test_the_error_is_that_of_single_weights() -> None:
    heads, grams, tasks = example()
    error = error_of(heads, grams, *tasks)
    for basis in (torch.eye(SIZE).expand(HEADS, -1, -1), bases(HEADS, SIZE)):
        slow = basis_error(heads.values.weight, heads.output.weight, grams, basis, 0.5)
        assert float(error(basis, torch.linalg.inv(basis))) == pytest.approx(slow, rel=1e-3)


def test_a_learned_basis_has_a_smaller_error() -> None:
    heads, grams, tasks = example()
    found = learn_basis(heads, grams, *tasks)
    columns = heads.output_columns() @ torch.linalg.inv(found)[:, None]
    norms = columns.square().sum((1, 2))
    torch.testing.assert_close(norms, norms.mean().expand_as(norms), rtol=1e-4, atol=0)
    weights = heads.values.weight, heads.output.weight
    stored = basis_error(*weights, grams, torch.eye(SIZE).expand_as(found), 0.5)
    assert basis_error(*weights, grams, found, 0.5) < 0.9 * stored


def changed_basis(model: nn.Module) -> int:
    """Change all value heads at random. Return how many attentions have."""
    architecture, count = describe(model), 0
    for index, layer in enumerate(architecture.layers(model)):
        linears = linears_of(layer, architecture.layer_name(index))
        method = compose("sparsegpt", "unstructured")
        tasks = {x.name: LinearTask(x.name, x.shape, method, 0.5) for x in linears.values()}
        for heads in value_heads(layer, linears, tasks):
            heads.change(bases(heads.heads, heads.size, index))
            count += 1
    return count


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mixtral"])
def test_the_dense_model_stays_the_same(family: str) -> None:
    model, windows = tiny_model(family), tiny_windows()
    other = copy.deepcopy(model)
    assert changed_basis(other) == len(describe(model).layers(model))
    with torch.no_grad():
        torch.testing.assert_close(
            other(windows).logits, model(windows).logits, rtol=1e-5, atol=1e-5
        )


def options(**more: Any) -> dict[str, Any]:
    return {"method": "sparsegpt", "sparsity": 0.5, "asymmetric": True, **more}


def pruned(family: str, **more: Any) -> nn.Module:
    model = tiny_model(family)
    secateur.prune(model, **options(calibration=tiny_windows(8), **more))
    return model


@pytest.mark.parametrize("family", slow_but(["qwen3_next"], ["qwen3_next", "gpt2"]))
def test_where_more_than_an_average_is_between_nothing_turns(family: str) -> None:
    models = pruned(family), pruned(family, value_basis="learned")
    both = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    assert [name for (name, plain), own in both if not torch.equal(plain, own)] == []


@pytest.mark.parametrize("family", slow_but(["gemma3n_text shared"], ["gemma3n_text shared"]))
def test_values_that_later_layers_read_do_not_turn(family: str) -> None:
    dense, windows = tiny_model(family), tiny_windows(8)
    own = copy.deepcopy(dense)
    secateur.prune(own, method="magnitude", sparsity=0.01, calibration=windows,
                   value_basis="learned")  # fmt: skip
    with torch.no_grad():
        expected, found = dense(windows).logits, own(windows).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_magnitude_run_turns_too() -> None:
    calls = {"calibration": tiny_windows(8), "method": "magnitude", "sparsity": 0.5}
    plain, own = tiny_model("qwen2"), tiny_model("qwen2")
    secateur.prune(plain, **calls)
    secateur.prune(own, **calls, value_basis="learned")
    changed = {
        name.rpartition("layers.")[2].partition(".")[2]
        for (name, one), two in zip(plain.named_parameters(), own.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert changed == {f"self_attn.{x}" for x in ("v_proj.weight", "v_proj.bias", "o_proj.weight")}


def test_solvers_compute_exactly_after_fast_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is stopped half-way leaves no context of bfloat16 behind."""
    monkeypatch.setattr(precision, "_fast_bfloat16", lambda device: True)
    solve, seen = Method.solve, []

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return solve(*args, **more)

    monkeypatch.setattr(Method, "solve", watched)
    pruned("qwen2", value_basis="learned", fast_matmuls=True)
    assert seen
    assert not any(seen)


def test_a_resumed_run_turns_the_same_way(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen2")
    dense = load_file(source / "model.safetensors")
    biases = {
        name: torch.randn(x.shape) for name, x in dense.items() if name.endswith("v_proj.bias")
    }
    save_file({**dense, **biases}, source / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    given = options(calibration=str(text), windows=6, sequence_length=32, value_basis="learned")
    secateur.prune(source, output=tmp_path / "whole", **given)
    with pytest.raises(StoppedError):
        secateur.prune(source, output=tmp_path / "again", progress=StopAt("pruning", 3), **given)
    secateur.prune(source, output=tmp_path / "again", resume=True, **given)
    whole, again = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "again"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not any(torch.equal(whole[name], old) for name, old in biases.items())


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 128, "head_dim": 32},
        {"hidden_size": 64, "head_dim": 64, "num_key_value_heads": 1},
        {"hidden_size": 256, "head_dim": 16, "num_key_value_heads": 4},
    ],
)
def test_learning_takes_no_more_memory_than_is_planned(
    sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text, peaks = save_tiny(tmp_path / "model", **sizes), tmp_path / "text.txt", []
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    given = options(calibration=str(text), windows=6, sequence_length=32, sparsity=0.5)
    plain = secateur.prune(source, dry_run=True, **given).plan
    plan = secateur.prune(source, dry_run=True, **given, value_basis="learned").plan
    change = value_basis._change

    def measured(layer: nn.Module, *rest: Any) -> bool:
        with LiveTensors([*layer.parameters(), *layer.buffers()], find_peak=True) as live:
            changed = change(layer, *rest)
        peaks.append(live.peak_bytes)
        return changed

    monkeypatch.setattr(value_basis, "_change", measured)
    secateur.prune(source, output=tmp_path / "out", **given, value_basis="learned")
    assert len(peaks) == plan.num_hidden_layers
    assert plain.sizes["basis"] == 0
    most = plan.sizes["basis"] + plan.sizes["forward"]
    assert 0.4 * most < max(peaks) <= most
    assert [*plain.seconds_of_parts] == ["pruning"]
    assert [*plan.seconds_of_parts] == ["pruning", "learning the value basis"]
    assert plan.seconds_of_parts["learning the value basis"][0] > 0
    assert most < plan.phases[BASIS] <= plan.peak_bytes
