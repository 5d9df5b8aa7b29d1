"""The damping of asymmetric fitting is chosen by tokens that the fit has not seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow import slow_but
from torch import Tensor, nn
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.statistics import Gathering
from secateur.engine.prune import asymmetric
from secateur.engine.prune.asymmetric import (
    DAMPINGS,
    HeldOutStatistics,
    TargetStatistics,
    choose_dampings,
)
from secateur.engine.prune.tasks import LinearTask
from secateur.models.architecture import Linear
from secateur.sparsity.methods import compose

ROWS, INPUTS, OUT, BATCHES = 40, 12, 6, 3


def example(noise: float, seed: int) -> tuple[nn.Linear, list[Tensor], list[Tensor]]:
    """A linear, its inputs in the pruned model, and the outputs of the dense one plus noise."""
    random = torch.Generator().manual_seed(seed)
    linear = nn.Linear(INPUTS, OUT, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(OUT, INPUTS, generator=random))
    mix = torch.randn(INPUTS, INPUTS, generator=random) / 3
    dense = [torch.randn(ROWS, INPUTS, generator=random) @ mix for _ in range(BATCHES)]
    inputs = [x + 0.3 * torch.randn(x.shape, generator=random) @ mix for x in dense]
    outputs = [x @ linear.weight.detach().t() for x in dense]
    return linear, inputs, [y + noise * torch.randn(y.shape, generator=random) for y in outputs]


def gathered(
    linear: nn.Linear,
    inputs: list[Tensor],
    outputs: list[Tensor],
    kind: type[TargetStatistics] = TargetStatistics,
) -> Any:
    sources, device = Gathering.of(["gram"]).forward, torch.device("cpu")
    seen = kind(sources, [Linear("x", linear)], device, OUT)
    for x, y in zip(inputs, outputs, strict=True):
        seen.add(x, y)
    return seen


def slow_choice(linear: nn.Linear, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """In float64, from the tokens themselves; half of the weights of a row are pruned by size."""
    cut = ROWS - ROWS // 4
    x = torch.cat([x[:cut] for x in inputs]).double()
    y = torch.cat([y[:cut] for y in outputs]).double()
    weight, errors = linear.weight.detach().double(), {}
    for damping in DAMPINGS:
        shift = damping * (x * x).sum(0).mean() * torch.eye(INPUTS, dtype=torch.float64)
        fitted = torch.linalg.solve(x.t() @ x + shift, (y.t() @ x + weight @ shift).t()).t()
        score = fitted.abs() * x.norm(dim=0)
        lost = score.argsort(dim=1)[:, : INPUTS // 2]
        fitted = fitted.scatter(1, lost, 0.0)
        errors[damping] = sum(
            float((b[cut:].double() - a[cut:].double() @ fitted.t()).square().sum())
            for a, b in zip(inputs, outputs, strict=True)
        )
    return min(errors, key=errors.__getitem__)


def test_the_choice_is_that_of_the_tokens_themselves() -> None:
    task = LinearTask("x", (OUT, INPUTS), compose("wanda", "unstructured", scope="row"), 0.5)
    found = set()
    for noise in (0.0, 3.0):
        for seed in range(4):
            linear, inputs, outputs = example(noise, seed)
            seen = gathered(linear, inputs, outputs, HeldOutStatistics)
            seen.running |= {"column_norm": norms(linear, inputs, 0, ROWS - ROWS // 4)}
            seen.held.running |= {"column_norm": norms(linear, inputs, ROWS - ROWS // 4, ROWS)}
            chosen = choose_dampings(seen, [Linear("x", linear)], {"x": task}, lambda _: {}, True)
            assert chosen["x"] == slow_choice(linear, inputs, outputs)
            found.add(chosen["x"])
    assert len(found) > 1  # text decides


def norms(linear: nn.Linear, inputs: list[Tensor], start: int, stop: int) -> Any:
    from secateur.calibration.statistics import statistics

    norm = statistics["column_norm"]((OUT, INPUTS), torch.device("cpu"))
    for x in inputs:
        norm.update(x[start:stop])
    return norm


def test_held_out_tokens_come_back() -> None:
    linear, inputs, outputs = example(1.0, 0)
    plain, seen = (
        gathered(linear, inputs, outputs),
        gathered(linear, inputs, outputs, HeldOutStatistics),
    )
    assert (seen.tokens, seen.held.tokens) == (90, 30)
    seen.take_in()
    assert seen.tokens == plain.tokens == 120
    torch.testing.assert_close(seen.value()["gram"], plain.value()["gram"])
    torch.testing.assert_close(seen.cross.value(), plain.cross.value())


@pytest.mark.parametrize("family", slow_but(["gemma3"], ["llama", "gpt2", "gemma3", "mixtral"]))
def test_one_value_to_choose_from_is_that_value(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "sparsegpt", "sparsity": 0.5, "calibration": tiny_windows(6),
               "asymmetric": True, "micro_batch_tokens": 48}  # fmt: skip
    plain, chosen, free = (tiny_model(family) for _ in range(3))
    secateur.prune(plain, **options, asymmetric_damping=0.4)
    monkeypatch.setattr(asymmetric, "DAMPINGS", (0.4,))
    secateur.prune(chosen, **options, choose_damping=True)
    monkeypatch.setattr(asymmetric, "DAMPINGS", (0.01, 10.0))
    secateur.prune(free, **options, choose_damping=True)
    pairs = zip(plain.parameters(), chosen.parameters(), free.parameters(), strict=True)
    far = 0
    for one, two, three in pairs:
        assert (one - two).norm() <= 1e-3 * one.norm()
        far += int((one - three).norm() > 1e-3 * one.norm())
    assert far
