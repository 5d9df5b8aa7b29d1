"""The plan on paper follows its formulas, and they follow the sizes of real models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from commands import Outcome

import secateur as library
from secateur.advisor.cluster import Machines, PlannedModel, busiest, plan_cluster
from secateur.advisor.facts import read_facts
from secateur.errors import RecipeError

FACTS = read_facts()
TOKENS, LENGTH = 128 * 2048, 2048


def machines(nodes: int, devices: int) -> Machines:
    """Machines with H100 and a network of 400 Gbit/s."""
    return Machines(nodes, devices, FACTS.device("h100-80gb"), FACTS.efficiency["cuda"], 400e9 / 8)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6), ("llama-3.1-405b", 405.9),
        ("qwen3-235b-a22b", 235.1),
    ],
)  # fmt: skip
def test_the_shapes_have_the_published_numbers_of_weights(name: str, billions: float) -> None:
    found = PlannedModel.of(FACTS.shapes[name]).parameters
    assert found == pytest.approx(billions * 1e9, rel=2e-3)


def test_a_dense_model_by_hand() -> None:
    model = PlannedModel.of(FACTS.shapes["llama-3.1-8b"])
    plan = plan_cluster(
        model, machines(4, 8), tokens=TOKENS, length=LENGTH, solver="obs", gram=True
    )
    read, forwards, gathering, sums, solving, weights = plan.phases
    own, d, f = TOKENS / 32, 4096, 14336
    layer = d * d * 2 + 2 * 1024 * d + 3 * d * f
    assert read.read_bytes == 2 * (32 * layer + 2 * 128256 * d)
    assert read.seconds.typical == pytest.approx(read.read_bytes / 50e9)
    flops = 32 * (2 * own * layer + 2 * own * LENGTH * d)
    assert forwards.seconds.typical == pytest.approx(flops / (989e12 * 0.5))
    grams = 3 * d * d + f * f
    assert gathering.seconds.typical == pytest.approx(32 * own * grams / (989e12 / 16 * 0.5))
    assert sums.sent_bytes == pytest.approx(32 * 4 * grams * 2 * 31 / 32)
    assert weights.sent_bytes == 32 * 2 * layer
    # q, k, v are solved side by side, as are gate and up
    steps = [(d, d), (d, d), (f, d), (d, f)]
    work = 32 * sum(4.4 * i**3 + 13 * o * i * i for o, i in steps)
    assert solving.seconds.typical == pytest.approx(work / (989e12 / 16 * 0.5))
    assert plan.host_bytes == 2 * own * d
    assert plan.seconds.low < plan.seconds.typical < plan.seconds.high


def test_one_process_sends_nothing_and_norms_cost_almost_nothing() -> None:
    model = PlannedModel.of(FACTS.shapes["llama-3.1-8b"])
    options = {"tokens": TOKENS, "length": LENGTH, "solver": "zero", "gram": False}
    alone = plan_cluster(model, machines(1, 1), **options)  # type: ignore[arg-type]
    assert all(phase.sent_bytes == 0 for phase in alone.phases)
    many = plan_cluster(model, machines(2, 8), **options)  # type: ignore[arg-type]
    assert many.phases[1].seconds.typical == pytest.approx(alone.phases[1].seconds.typical / 16)
    assert many.phases[3].sent_bytes < 1e-3 * many.phases[5].sent_bytes


def test_a_whole_layer_is_solved_faster_by_more_processes() -> None:
    groups = PlannedModel.of(FACTS.shapes["qwen3-235b-a22b"]).groups
    alone = busiest(groups, 1, (4.4, 13.0), True)
    assert alone == pytest.approx(busiest(groups, 1, (4.4, 13.0), False))
    assert busiest(groups, 32, (4.4, 13.0), True) < alone / 20
    assert busiest(groups, 32, (4.4, 13.0), False) > alone / 8


def test_what_cannot_be_planned_is_refused() -> None:
    model = PlannedModel.of(FACTS.shapes["llama-3.1-8b"])
    with pytest.raises(RecipeError, match="256 processes have only 128"):
        plan_cluster(model, machines(32, 8), tokens=TOKENS, length=LENGTH, solver="obs", gram=True)
    with pytest.raises(RecipeError, match="'admm' on a cluster was not measured"):
        plan_cluster(model, machines(1, 8), tokens=TOKENS, length=LENGTH, solver="admm", gram=True)
    with pytest.raises(RecipeError, match="no well-known shape"):
        library.prune("elsewhere", dry_run=True, gpus=8, sparsity=0.5)


def test_the_verb(secateur: Callable[..., Outcome]) -> None:
    done = secateur(
        "prune", "--dry-run", "qwen3-235b-a22b", "--method", "sparsegpt", "--sparsity", "0.5",
        "--nodes", "4", "--gpus", "8", "--gpu", "h100", "--network", "400Gb",
    )  # fmt: skip
    assert done.code == 0
    assert "in 32 processes on NVIDIA H100 80 GB SXM" in done.out
    assert "437.8" in done.out  # GiB of bfloat16 weights
    wrong = secateur(
        "prune",
        "--dry-run",
        "llama-3.1-8b",
        "--sparsity",
        "0.5",
        "--gpus",
        "8",
        "--network",
        "fast",
    )
    assert wrong.code == 2
