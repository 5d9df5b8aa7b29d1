"""Experts by the divergence that their removal makes, beside loops written from the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from zoo import MIXTURES, config_of, tiny_model, tiny_windows

from secateur.engine.search.expert_divergence import Listed, divergence_scores, removal_scores
from secateur.engine.search.experts import best_experts
from secateur.engine.search.sensitivity import drawn
from secateur.errors import ArchitectureError
from secateur.models.experts import opened_experts
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_model

CHOSEN = 2
RULES = ("normalised", "shares", "alone")


def mixture(rule: str, logits: Tensor, outputs: Tensor, kept: set[int]) -> tuple[Tensor, set[int]]:
    """What a mixture returns for one token, and the experts that it chooses."""
    left = sorted(kept, key=lambda e: -float(logits[e]))
    chosen, score = left[:CHOSEN], logits.sigmoid() if rule == "alone" else logits.exp()
    total = {
        "normalised": sum(float(score[e]) for e in chosen),
        "shares": sum(float(score[e]) for e in kept),
        "alone": 1.0,
    }[rule]
    return sum(float(score[e]) / total * outputs[e] for e in chosen), set(chosen)  # type: ignore[return-value]


def slow_scores(rule: str, logits: Tensor, outputs: Tensor, fisher: Tensor) -> list[float]:
    """One expert after the other goes, each time the one that adds least."""
    tokens, count = logits.shape
    kept, scores, highest = set(range(count)), [0.0] * count, 0.0

    def loss(token: int, own: set[int]) -> float:
        change = mixture(rule, logits[token], outputs[token], own)[0]
        change = change - mixture(rule, logits[token], outputs[token], set(range(count)))[0]
        return float(change @ fisher @ change) / 2 / tokens

    for _ in range(count - CHOSEN + 1):
        added = dict.fromkeys(kept, 0.0)
        for token in range(tokens):
            for expert in mixture(rule, logits[token], outputs[token], kept)[1]:
                added[expert] += loss(token, kept - {expert}) - loss(token, kept)
        if len(kept) == CHOSEN:
            break
        worst = min(added, key=lambda e: added[e])
        highest = max(highest, added[worst])
        scores[worst] = highest
        kept.remove(worst)
    for expert in kept:
        scores[expert] = max(highest, added[expert])
    return scores


@pytest.mark.parametrize("rule", RULES)
def test_experts_go_one_after_another(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, count, width = 40, 7, 5
    logits = torch.randn(tokens, count, generator=generator)
    outputs = torch.randn(tokens, count, width, generator=generator)
    root = torch.randn(width, width, generator=generator)
    fisher = root @ root.T
    order = logits.argsort(-1, descending=True)
    score = logits.sigmoid() if rule == "alone" else logits.softmax(-1)
    gates = score.gather(1, order)
    weights = gates[:, :CHOSEN]
    if rule == "normalised":
        weights = 1.0 * weights / weights.sum(-1, keepdim=True)
    listed = outputs.gather(1, order[..., None].expand_as(outputs))
    shares = score if rule == "shares" else None
    found = removal_scores(
        Listed(order, gates, weights, listed @ fisher @ listed.mT, shares), count
    )
    expected = torch.tensor(slow_scores(rule, logits, outputs, fisher), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(set(found.tolist())) > 3


WINDOWS = tiny_windows(4, 16)
QUICK = ("mixtral", "olmoe", "gpt_oss", "llama4", "minimax_m2", "gemma4", "nemotron_h", "lfm2_moe")
ROUTERS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in MIXTURES
    if name not in ("phimoe", "deepseek_v4")  # whose number of chosen experts is fixed
]
ONE_GROUP = {"n_group": 1, "topk_group": 1}
"""A single expert cannot be cut out of a model with groups."""


def tiny_mixture(family: str) -> Any:
    config = config_of(family)
    return tiny_model(family, **(ONE_GROUP if getattr(config, "n_group", None) else {}))


def passed(model: Any, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the experts of a layer return [tokens, out], the logits, and what the router chose."""
    owner = model.model.layers[layer]
    experts = next(m for n, m in owner.named_modules() if n.split(".")[-1] == "experts")
    kept: list[Any] = []
    handle = experts.register_forward_hook(lambda m, args, out: kept.append((args, out)))
    logits = model(input_ids=WINDOWS, use_cache=False).logits
    handle.remove()
    (args, out) = kept[0]
    return out, logits, args[1] if len(args) > 1 else None


def summed(out: Tensor) -> Tensor:
    """The outputs for each token; in Llama 4 every expert returns one for all tokens."""
    return out.view(-1, WINDOWS.numel(), out.shape[-1]).sum(0)


def drawn_loss(logits: Tensor) -> Tensor:
    """Σ −log p(y) with y drawn from p, one generator for each window."""
    total = logits.new_zeros(())
    for number, own in enumerate(logits):
        random = torch.Generator().manual_seed(number)
        draws = torch.rand(len(own), 1, generator=random, dtype=torch.float64)
        labels = drawn(own.detach().softmax(-1), draws)[:, 0]
        total = total + cross_entropy(own, labels, reduction="sum")
    return total


@pytest.mark.parametrize("family", ROUTERS)
def test_the_first_expert_to_go_is_measured_by_cutting_each(family: str, tmp_path: Path) -> None:
    """The cut model routes by itself; the gradients are those of the whole model."""
    model = tiny_mixture(family)
    with opened_experts(model):
        found = divergence_scores(ModelTarget(model), WINDOWS, tmp_path, Silent(), fast=False)
    layer, scores = min(found.items())  # no layer before it is changed by a cut
    count = len(scores)
    out, logits, choice = passed(model, layer)
    (gradient,) = torch.autograd.grad(drawn_loss(logits), out)
    gradient = gradient[: WINDOWS.numel()]
    fisher = gradient.T @ gradient / len(gradient)
    costs = []
    for expert in range(count):
        own = tuple(e for e in range(count) if e != expert)
        cut = cut_model(model, Cut(experts=dict.fromkeys(found, own)))
        with torch.no_grad():
            change = summed(passed(cut, layer)[0]) - summed(out)
        if choice is not None:
            change = change * (choice == expert).any(-1, keepdim=True)
        costs.append(float(((change @ fisher) * change).sum(-1).mean() / 2))
    if family != "gemma4":
        assert int(scores.argmin()) == min(range(count), key=costs.__getitem__)
    # Gemma 4 scales the weights of experts after it has divided them by their sum
    assert float(scores.min()) == pytest.approx(min(costs), rel=0.1 if family == "gemma4" else 2e-3)


@pytest.mark.filterwarnings("ignore::secateur.structured.surgery.VariedSizesWarning")
def test_scores_follow_the_real_divergence(tmp_path: Path) -> None:
    """Experts are removed from the whole model one by one, and KL(dense ‖ cut) is measured."""
    model: Any = tiny_model("mixtral", num_local_experts=12)
    with torch.no_grad():  # some experts matter more than others
        for layer in model.model.layers:
            for expert in range(12):
                layer.mlp.experts.down_proj[expert] *= 1.35 ** (expert * 5 % 12) / 8
    with opened_experts(model):
        found = divergence_scores(ModelTarget(model), WINDOWS, tmp_path, Silent(), fast=False)
    with torch.no_grad():
        dense = model(input_ids=WINDOWS).logits.log_softmax(-1)
        for layer, scores in found.items():
            real = []
            for expert in range(12):
                own = tuple(e for e in range(12) if e != expert)
                cut: Any = cut_model(model, Cut(experts={layer: own}))
                p = cut(input_ids=WINDOWS).logits.log_softmax(-1)
                real.append(float(kl_div(p, dense, log_target=True, reduction="sum")))
            ranks = torch.stack(
                [x.argsort().argsort().double() for x in (scores, torch.tensor(real))]
            )
            assert float(torch.corrcoef(ranks)[0, 1]) > 0.7, layer


def test_a_killed_survey_goes_on_where_it_was(tmp_path: Path) -> None:
    model = tiny_mixture("mixtral")

    class Killed(Silent):
        def step(self, *args: Any, note: str = "", **rest: Any) -> None:
            if (tmp_path / "killed/divergence-0001.json").exists():
                raise KeyboardInterrupt

    with opened_experts(model):
        target = ModelTarget(model)
        whole = divergence_scores(target, WINDOWS, tmp_path / "whole", Silent())
        with pytest.raises(KeyboardInterrupt):
            divergence_scores(target, WINDOWS, tmp_path / "killed", Killed())
        files = {f: f.read_bytes() for f in (tmp_path / "killed").glob("divergence-*.json")}
        assert len(files) == 2
        again = divergence_scores(target, WINDOWS, tmp_path / "killed", Silent())
    assert all(torch.equal(again[layer], own) for layer, own in whole.items())
    assert all(file.read_bytes() == own for file, own in files.items())


def test_a_router_that_chooses_one_after_another_is_refused(tmp_path: Path) -> None:
    model = tiny_model("phimoe")
    with opened_experts(model), pytest.raises(ArchitectureError, match="PhimoeTopKRouter"):
        divergence_scores(ModelTarget(model), WINDOWS, tmp_path, Silent())
    router: Any = model.model.layers[2].mlp.router
    assert router.top_k == 2


def test_nats_compete_as_they_are() -> None:
    """Multiples of the mean of a layer would leave both layers the same number."""
    scores = {0: torch.tensor([1.0, 2.0, 3.0, 4.0]), 1: torch.tensor([0.1, 0.2, 0.3, 0.4])}
    kept = best_experts(scores, 3, 2, scope="global", nats=True)
    assert kept == {0: (0, 1, 2, 3), 1: (2, 3)}
