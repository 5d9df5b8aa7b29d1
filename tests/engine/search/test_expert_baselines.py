"""Ways to choose experts beside REAP."""

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
    scores_of,
)
from secateur.errors import RecipeError
from secateur.models.skeleton import quiet_transformers
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
    with pytest.raises(RecipeError, match="3 experts"):
        best_experts(scores_of(use), 3, 2, groups=2)


def test_each_group_keeps_its_best() -> None:
    kept = best_experts(scores_of({0: used(9, 8, 7, 1, 3, 2)}), 4, 2, groups=2)
    assert kept == {0: (0, 1, 4, 5)}
    use = {0: used(9, 8, 7, 6, 6, 7, 8, 9), 1: used(9, 0, 1, 8, 1, 0, 8, 9)}
    kept = best_experts(scores_of(use), 6, 4, groups=2, scope="global")
    assert kept == {0: (0, 1, 2, 3, 4, 5, 6, 7), 1: (0, 3, 6, 7)}


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
