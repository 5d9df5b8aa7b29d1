"""The linears of many experts, solved at once: what each gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import tiny_model, tiny_windows

import secateur
from secateur.engine.prune import layer, tasks
from secateur.errors import NumericalError
from secateur.models.architecture import Linear
from secateur.parallel.ranks import Ranks
from secateur.runs.records import LinearRecord
from secateur.sparsity.methods import Method
from secateur.sparsity.solvers import Solution

FAMILY = "qwen3_moe"


def pruned(monkeypatch: pytest.MonkeyPatch, at_once: int, **options: Any) -> tuple[Any, list[int]]:
    """A mixture, pruned; and the size of each batch."""
    monkeypatch.setattr(tasks, "AT_ONCE_BYTES", {"cpu": at_once})
    solve, sizes = Method.solve, list[int]()

    def watched(method: Method, weight: Any, *args: Any) -> Solution:
        if weight.dim() > 2:
            sizes.append(len(weight))
        return solve(method, weight, *args)

    monkeypatch.setattr(Method, "solve", watched)
    model = tiny_model(FAMILY)
    options = {"sparsity": 0.5, "calibration": tiny_windows(), "on_collapse": "warn"} | options
    result = secateur.prune(model, **options)
    monkeypatch.setattr(Method, "solve", solve)
    return (dict(model.named_parameters()), result), sizes


def told(result: Any) -> list[dict[str, Any]]:
    """What the records of all linears say, in their order, without times."""
    every = [linear for layer in result.layers for linear in layer.linears]
    return [linear.model_dump(exclude={"seconds"}) for linear in every]


@pytest.mark.parametrize("sequential", ["group", "layer"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "sparsegpt"},
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "alps"},
        {"method": "alps", "asymmetric": True, "sequential": "group"},
        {"method": "sparsegpt", "allocation": "divergence"},
        {"score": "wanda", "solver": "admm"},
        {"score": "kept", "solver": "obs"},
    ],
    ids=str,
)
def test_batches_of_experts_are_pruned_as_one_by_one(
    sequential: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sequential": sequential} | options
    (found, result), sizes = pruned(monkeypatch, 2**30, **options)
    (alone, expected), ones = pruned(monkeypatch, 1, **options)
    assert max(sizes) > 1 == max(ones)
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert told(result) == told(expected)


def test_the_expert_at_fault_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch cannot be solved."""
    solve = Method.solve

    def failing(method: Method, weight: Any, *args: Any) -> Solution:
        if bool((weight == 0.125).any()):
            raise NumericalError("a number that nobody likes")
        return solve(method, weight, *args)

    model = tiny_model(FAMILY)
    name = next(n for n, _ in model.named_parameters() if "experts" in n and "down" in n)
    with torch.no_grad():
        model.get_parameter(name)[2, 0, 0] = 0.125
    monkeypatch.setattr(Method, "solve", failing)
    with pytest.raises(NumericalError) as caught:
        secateur.prune(model, method="wanda", sparsity=0.5, calibration=tiny_windows())
    assert caught.value.where is not None
    assert ".experts.2.down_proj" in caught.value.where


class Second(Ranks):
    """The second of two processes. What the first one sends is all 1."""

    def __init__(self) -> None:
        super().__init__(1, 2)
        self.sent: list[tuple[int, torch.dtype, int]] = []

    def share(self, tensor: torch.Tensor, owner: int) -> None:
        """Note what one process sends."""
        self.sent.append((owner, tensor.dtype, tensor.numel()))
        tensor.fill_(1.0) if owner == 0 else None

    def gather(self, value: Any) -> list[Any]:
        """Both know the same."""
        return [value, value]


@pytest.mark.parametrize(("most", "pieces"), [(2**20, 1), (1, 4)])
def test_a_process_sends_its_linears_at_once(
    most: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "_SENT_BYTES", most)
    modules = [torch.nn.Linear(3, 2 + i, bias=False, dtype=torch.bfloat16) for i in range(8)]
    linears = [Linear(f"{i}", module) for i, module in enumerate(modules)]
    before = [module.weight.detach().clone() for module in modules]
    records = [
        LinearRecord(
            name=x.name,
            shape=x.shape,
            asked=0.5,
            pruned=0,
            zeros=0,
            error=None,
            lost=None,
            seconds=0.0,
        )
        for x in linears
    ]
    ranks = Second()
    found = layer._exchanged(linears, {f"{i}": i % 2 for i in range(8)}, records[::-1], ranks)
    assert [record.name for record in found] == [x.name for x in linears]
    assert sorted(owner for owner, *_ in ranks.sent) == [0] * pieces + [1] * pieces
    assert sum(count for *_, count in ranks.sent) == sum(x.numel() for x in before)
    for i, (module, own) in enumerate(zip(modules, before, strict=True)):
        assert torch.equal(module.weight, own if i % 2 else torch.ones_like(own))
