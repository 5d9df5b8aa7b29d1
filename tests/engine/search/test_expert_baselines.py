"""Ways to choose experts beside REAP, and merging instead of removal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.search.experts import (
    ExpertUse,
    best_experts,
    expert_use,
    merge_experts,
    most_similar,
    scores_of,
)
from secateur.errors import RecipeError
from secateur.models.experts import opened_experts
from secateur.models.skeleton import quiet_transformers
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.structured.cut import sizes_of


def used(*scores: float) -> ExpertUse:
    """Experts that got one token each, with these outputs."""
    return ExpertUse(torch.ones(len(scores), dtype=torch.int64), torch.tensor(scores).double())


def test_random_experts_depend_on_the_seed_alone() -> None:
    use = {0: used(1, 2, 3, 4, 5, 6), 1: used(1, 2, 3, 4, 5, 6)}
    choices = [best_experts(scores_of(use, "random", s), 3, 2) for s in range(8)]
    assert choices[0] == best_experts(scores_of(use, "random"), 3, 2)
    assert len({str(c) for c in choices}) > 4
    assert any(c[0] != c[1] for c in choices)


def test_experts_that_compete_in_the_whole_model() -> None:
    """Scores are multiples of their layer's mean, and no layer keeps fewer than a token needs."""
    use = {0: used(10, 10, 10, 10), 1: used(0.8, 0.1, 0.1, 3.0), 2: used(1, 3, 1, 3)}
    kept = best_experts(scores_of(use), 3, 2, scope="global")
    # Layer 1 needs two, of which one is nearly nothing; the free ones go by value over mean:
    # layer 0 has 1, 1; layer 2 has 0.5, 0.5; layer 1 has 0.1, 0.1.
    assert kept == {0: (0, 1, 2, 3), 1: (0, 3), 2: (0, 1, 3)}
    with pytest.raises(RecipeError, match="2 groups of experts"):
        best_experts(scores_of(use), 2, 2, groups=2, scope="global")
    with pytest.raises(RecipeError, match="3 experts"):
        best_experts(scores_of(use), 3, 2, groups=2)


def test_each_group_keeps_its_best() -> None:
    kept = best_experts(scores_of({0: used(9, 8, 7, 1, 3, 2)}), 4, 2, groups=2)
    assert kept == {0: (0, 1, 4, 5)}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_merged_experts_are_averages(family: str) -> None:
    model: Any = tiny_model(family)
    fused = model.model.layers[0].mlp.experts
    before = {n: p.detach().clone() for n, p in fused.named_parameters()}
    router = torch.eye(5, 32)
    router[1], router[3] = router[0] + 0.1 * router[1], router[4] * 2
    assert most_similar(router, (0, 2, 4)) == [0, 0, 2, 4, 4]
    with opened_experts(model):
        opened = model.model.layers[0].mlp.experts
        merge_experts(opened, router, (0, 2, 4), torch.tensor([30, 10, 5, 0, 0]))
    for name, now in fused.named_parameters():
        was = before[name]
        torch.testing.assert_close(now[0], 0.75 * was[0] + 0.25 * was[1])
        for e in (1, 2, 3, 4):  # nobody is merged into 2; 3 and 4 received nothing
            assert torch.equal(now[e], was[e]), (name, e)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_structure_merges_and_leaves_the_source(family: str, tmp_path: Path) -> None:
    """Experts that stay hold the averages; the rows of the router are theirs."""
    model: Any = tiny_model(family)
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source")
    source = (tmp_path / "source" / "model.safetensors").read_bytes()
    save_windows(tiny_windows(), tmp_path / "windows.safetensors")
    secateur.structure(
        tmp_path / "source", output=tmp_path / "out", experts=3, experts_by="merge",
        calibration=tmp_path / "windows.safetensors",
    )  # fmt: skip
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == source
    with quiet_transformers():
        found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    path = "mlp.gate" if family == "mixtral" else "mlp.router"
    with opened_experts(model):
        use = expert_use(ModelTarget(model), tiny_windows(), 2048, Silent())
        for index, kept in best_experts(scores_of(use, "frequency"), 3, 2).items():
            layer = model.model.layers[index]
            router = layer.get_submodule(path).weight.detach()
            merge_experts(layer.mlp.experts, router, kept, use[index].tokens)
            smaller = found.model.layers[index]
            assert torch.equal(smaller.get_submodule(path).weight, router[list(kept)])
    for index, kept in best_experts(scores_of(use, "frequency"), 3, 2).items():
        experts = (m.model.layers[index].mlp.experts for m in (model, found))
        ours, theirs = (dict(e.named_parameters()) for e in experts)
        for name, parameter in theirs.items():
            torch.testing.assert_close(parameter, ours[name][list(kept)])


def test_layers_keep_different_numbers_of_experts(tmp_path: Path) -> None:
    model: Any = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2:] *= 1e-3
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source")
    save_windows(tiny_windows(), tmp_path / "windows.safetensors")
    report = secateur.structure(
        tmp_path / "source", output=tmp_path / "out", experts=3, experts_scope="global",
        calibration=tmp_path / "windows.safetensors",
    ).manifest.structure  # fmt: skip
    assert report.varied
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(sizes_of(smaller).experts) == 9
    assert sizes_of(smaller).experts[1] == 2
