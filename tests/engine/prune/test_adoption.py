"""Neurons that experts adopt, against ridge regressions that are solved anew for each of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from slow import slow_but
from torch import Tensor
from zoo import WITH_EXPERTS, tiny_model, tiny_windows

from secateur.engine.prune import routers
from secateur.engine.prune.routers import RouterTuning, adopt
from secateur.engine.prune.tasks import Settings
from secateur.models.architecture import describe
from secateur.models.experts import opened_experts
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.runs.ledger import Ledger
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.surgery import cut_model

DAMPING = 0.01
ADOPT = ("gpt_oss", "llama4")
"""Families of which a tiny model adopts; others are exact on these few tokens without."""
NOT_ADDED = {"gemma4", "nemotron_h", "deepseek_v4"}
"""A norm, a projection or a mixing of streams follows their experts."""


def of(expert: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gate row, up row and down column of each neuron, in float64."""
    gate, up, down = (x.weight.detach().double() for x in expert.children())
    return list(zip(gate, up, down.T, strict=True))


def value(neuron: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """What a neuron of Mixtral gives."""
    return torch.nn.functional.silu(x @ neuron[0]) * (x @ neuron[1])


def ridge(z: Tensor, wanted: Tensor, anchor: Tensor, damping: Tensor) -> tuple[Tensor, float]:
    """The best columns [neurons, hidden], and their loss."""
    rows = torch.cat([z, damping.sqrt() * torch.eye(z.shape[1], dtype=z.dtype)])
    right = torch.cat([wanted, damping.sqrt() * anchor])
    best = torch.linalg.lstsq(rows, right).solution
    return best, float((right - rows @ best).square().sum())


def adopted_slowly(
    own: list[Any], others: list[Any], x: Tensor, weights: Tensor, left: Tensor
) -> tuple[list[Any], Tensor]:
    """The neurons that stay and their columns, by one regression for each that could go."""
    n = len(own)

    def gain(neuron: Any) -> float:
        z = value(neuron, x) * weights[:, 0]
        return float((z @ left).square().sum() / z.square().sum())

    offered = sorted(sorted(range(len(others)), key=lambda i: -gain(others[i]))[:n])
    pool = own + [others[i] for i in offered]
    z = torch.stack([value(neuron, x) for neuron in pool], 1) * weights
    anchor = torch.cat([torch.stack([neuron[2] for neuron in own]), torch.zeros(n, left.shape[1])])
    wanted, damping = left + z @ anchor, DAMPING * z.square().sum() / (2 * n)
    costs = []
    for neuron in range(2 * n):
        z_without = torch.where(torch.arange(2 * n) == neuron, 0.0, z)
        best, loss = ridge(z_without, wanted, anchor, damping)
        # the column that goes is 0, and not its anchor as a zero input would have it
        costs.append(loss + float(damping * anchor[neuron].square().sum()))
        assert best.isfinite().all()
    stays = sorted(sorted(range(2 * n), key=lambda i: -costs[i])[:n])
    return [pool[i] for i in stays], ridge(z[:, stays], wanted, anchor[stays], damping)[0]


@pytest.mark.parametrize("seed", range(3))
def test_an_expert_adopts_what_regressions_choose(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    model: Any = tiny_model("mixtral")
    with torch.no_grad(), opened_experts(model):
        experts = model.model.layers[0].mlp.experts
        for parameter in experts.parameters():  # 8 neurons stay: they go in one batch
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
        narrow = [narrowed(expert, 8) for expert in (experts[0], experts[2], experts[3])]
        kept, *removed = narrow
        x = torch.randn(300, 32, generator=draw)
        weights = torch.rand(300, 1, generator=draw) + 0.1
        left = torch.randn(300, 32, generator=draw) * 0.2
        for expert in removed:
            left += weights * sum(torch.outer(value(q, x.double()), q[2]) for q in of(expert))
        left = left.float()
        others = [neuron for expert in removed for neuron in of(expert)]
        chosen, columns = adopted_slowly(
            of(kept), others, x.double(), weights.double(), left.double()
        )
        before = sum(torch.outer(value(q, x.double()), q[2]) for q in of(kept))
        after = adopt(kept, removed, experts.activation[0], x, weights, left, DAMPING)
        now = of(kept)
        ours = {tuple(q[0].tolist()): q[2] for q in now}
        assert {*ours} == {tuple(q[0].float().double().tolist()) for q in chosen}
        for neuron, column in zip(chosen, columns, strict=True):
            torch.testing.assert_close(
                ours[tuple(neuron[0].tolist())], column, rtol=1e-3, atol=1e-4
            )
        change = weights * (before - sum(torch.outer(value(q, x.double()), q[2]) for q in now))
        torch.testing.assert_close(after.double(), left + change, rtol=1e-4, atol=1e-4)


def narrowed(expert: Any, neurons: int) -> Any:
    """A copy of an expert with its first neurons."""
    found = copy.deepcopy(expert)
    for name, linear in found.named_children():
        weight = linear.weight
        weight = weight[:, :neurons] if name == "down_proj" else weight[:neurons]
        linear.weight = torch.nn.Parameter(weight.clone())
    return found


def test_two_halves_of_experts_become_a_whole_one() -> None:
    """Half of the neurons of both do nothing, so one expert can do what both do."""
    model: Any = tiny_model("mixtral")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad(), opened_experts(model):
        experts = model.model.layers[0].mlp.experts
        kept, other = experts[0], experts[1]
        half = kept.down_proj.weight.shape[1] // 2
        for expert, dead in ((kept, slice(half, None)), (other, slice(0, half))):
            expert.down_proj.weight[:, dead] = 0
        x = torch.randn(500, 32, generator=draw)
        left = sum(torch.outer(value(q, x.double()), q[2]) for q in of(other)).float()
        after = adopt(kept, [other], experts.activation[0], x, torch.ones(500, 1), left, 1e-6)
    assert after.norm() < 0.02 * left.norm()


@pytest.mark.parametrize(
    "family",
    slow_but(ADOPT, [name for name in WITH_EXPERTS if name not in NOT_ADDED]),
)
def test_rows_come_from_experts_of_the_uncut_model(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of gate and up, with its bias, is one of the same expert or of a removed one."""
    monkeypatch.setattr(routers, "STEPS", 1)
    windows = tiny_windows(2, 24).repeat(8, 1)
    dense = tiny_model(family)
    layers = range(len(describe(dense).layers(dense)))
    counts = {i: n for i, n in enumerate(sizes_of(dense).experts) if n}
    kept = {i: (0, 2, 3, 5) if n == 6 else (0, 2, 4) for i, n in counts.items()}
    with torch.no_grad():
        for index, own in kept.items():
            down = experts_of(dense, index).down_proj
            down[[e for e in range(len(down)) if e not in own]] *= 10
    left, ledger = copy.deepcopy(cut_model(dense, Cut(experts=kept))), Ledger()
    with opened_experts(dense), opened_experts(left):
        RouterTuning(
            ModelTarget(dense), ModelTarget(left), layers, windows,
            Settings(), ledger, Silent(), kept=kept, fixed=(),
        ).execute()  # fmt: skip
        adopted = 0
        for index, own in kept.items():
            whole, cut = (experts_of(model, index) for model in (dense, left))
            gone = [whole[e] for e in range(len(whole)) if e not in own]
            for expert, number in zip(cut, own, strict=True):
                known = [signed(e) for e in (whole[number], *gone)]
                for place, row in enumerate(signed(expert)):
                    (source,) = (i for i, e in enumerate(known) if (e == row).all(1).any())
                    adopted += source > 0
                    assert source or torch.equal(known[0][place], row)
    errors = [own for layer in ledger.layers if (own := layer.reconstruction)]
    assert len(errors) == len(counts)
    assert all(own["after_adoption"] <= own["after_refit"] for own in errors)
    assert adopted or family not in ADOPT


def experts_of(model: Any, index: int) -> Any:
    """The experts of a layer."""
    family = describe(model)
    return family.layers(model)[index].get_submodule(family.experts.module)


def signed(expert: Any) -> Tensor:
    """What tells a neuron: its rows before the activation and their biases."""
    *first, _ = expert.children()
    parts = [p.detach().view(len(p), -1) for linear in first for p in linear.parameters()]
    return torch.cat(parts, 1)
