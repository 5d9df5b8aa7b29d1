"""Scores of channels: every read of the residual stream counts once, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import CONFIGS, PLAIN_MIXTURES, tiny_model, tiny_windows

from oracles.hidden import channel_scores
from secateur.engine.prune.tasks import Settings
from secateur.engine.search.channels import hidden_scores
from secateur.errors import ArchitectureError, NumericalError
from secateur.models.architecture import describe
from secateur.models.experts import opened_experts
from secateur.models.targets import ModelTarget
from secateur.progress import Silent

WINDOWS = tiny_windows()
DECLARED = [family for family in (*CONFIGS, *PLAIN_MIXTURES) if family != "generic"]


def scores_of(model, work: Path) -> torch.Tensor:
    work.mkdir(exist_ok=True)
    with opened_experts(model):
        settings = Settings(micro_batch_tokens=40, fast_matmuls=False, work=work)
        width = model.config.hidden_size
        return hidden_scores(ModelTarget(model), WINDOWS, settings, width, Silent())


@pytest.mark.parametrize("family", DECLARED)
def test_scores_are_those_of_the_formula(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    layers = describe(model).layers(model)
    expected = channel_scores(model, family, layers, WINDOWS)
    torch.testing.assert_close(scores_of(model, tmp_path), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "olmo2"])
def test_what_only_attention_sees_does_not_count(family: str, tmp_path: Path) -> None:
    """Values scaled up and the output projection scaled down leave every output as it was."""
    model = tiny_model(family)
    before = scores_of(model, tmp_path / "before")
    with torch.no_grad():
        for layer in describe(model).layers(model):
            attention = layer.self_attn
            attention.v_proj.weight[:8] *= 100.0
            if attention.v_proj.bias is not None:
                attention.v_proj.bias[:8] *= 100.0
            heads = 16 if family == "olmo2" else 8  # two query heads share a value
            writer = attention.o_proj if family == "olmo2" else attention.out_proj
            writer.weight[:, :heads] /= 100.0
    torch.testing.assert_close(scores_of(model, tmp_path / "after"), before, rtol=1e-3, atol=1e-3)


def test_a_family_without_couplings_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="'generic'"):
        scores_of(tiny_model("generic"), tmp_path)


def test_an_overflow_names_the_layer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 1e30
    with pytest.raises(NumericalError, match=r"model\.layers\.1"):
        scores_of(model, tmp_path)
