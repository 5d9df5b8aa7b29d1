"""What a survey predicts of single formats, and the embeddings that it measures."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.models.checkpoint import CheckpointReader
from secateur.reporting.fit import FitFinalist
from secateur.runtime.formats import WeightFormat
from secateur.runtime.storage_plan import MixedReader
from secateur.steps.fitting.problem import EMBEDDINGS, SIZE, CostKind, Costs, FitProblem, UnitLosses

LOSSES = UnitLosses(
    rounded={"a": 0.02, "b": 0.1},
    pruned={"a": 0.03, "b": 0.01},
    coarser={name: {"int8": 0.001, "int4": 0.25, "int3": 1.0, "int2": 4.0} for name in "ab"},
    kept={},
    embeddings={"int8": 0.0, "int4": 0.05, "int3": 0.2},
)


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("a", WeightFormat("bfloat16", 0.0), 0.0),
        ("a", WeightFormat("int3", 0.0), 0.02),
        ("b", WeightFormat("int2", 0.0), 0.4),
        ("a", WeightFormat("bfloat16", 0.5), 0.03),
        ("a", WeightFormat("bfloat16", 0.7), 0.03 * exp(1.8)),
        ("a", WeightFormat("int4", 0.5), 0.03 + 0.75 * 0.005),
        (EMBEDDINGS, WeightFormat("int3", 0.5), 0.2),
        (EMBEDDINGS, WeightFormat("bfloat16", 0.0), 0.0),
    ],
)
def test_what_a_unit_is_predicted_to_lose(name: str, stored: WeightFormat, expected: float) -> None:
    assert LOSSES.rise(name, stored, stored.sparsity) == pytest.approx(expected)


def test_predictions_are_scaled_by_what_was_made() -> None:
    costs = Costs(
        (CostKind(SIZE, 0.0, 1e9),), {"a": (64, 64), "b": (64, 64)}, {"embedding": (64, 64)}
    )
    candidate = (2, 3, 1)  # int4, int3, and embeddings in int8
    problem = FitProblem(costs, LOSSES)
    predicted = problem.knapsack.predicted(candidate)
    assert predicted == pytest.approx(0.005 + 0.1)
    scaled = problem.after(FitFinalist("it", 1, predicted, 0.7 * predicted))
    assert scaled.knapsack.predicted(candidate) == pytest.approx(0.7 * predicted)


@torch.no_grad()
def test_a_mixed_reader_maps_what_it_reads(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", num_hidden_layers=1)
    reader = CheckpointReader(tmp_path / "dense")
    name = "model.embed_tokens.weight"
    other = reader.read(name) + 1
    (tmp_path / "other").mkdir()
    save_file({name: other}, tmp_path / "other" / "model.safetensors")
    mixed = MixedReader.of(reader, {name: CheckpointReader(tmp_path / "other")})
    names = ["model.norm.weight", name]
    found = dict(mixed.mapped(names))
    assert found.keys() == set(names)
    assert torch.equal(found[name], other)
    assert torch.equal(found[name], mixed.read(name))


@torch.no_grad()
def test_the_embeddings_are_measured_in_the_model(tmp_path: Path) -> None:
    """KL from the dense model to the one with the rounded matrix, on the windows that choose."""
    save_tiny(tmp_path / "dense", num_hidden_layers=1, hidden_size=64, tie_word_embeddings=True)
    windows = tiny_windows(12, 24)
    save_windows(windows, tmp_path / "windows.safetensors")
    work = tmp_path / "small.partial" / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.steps.fit._within_bounds", stopped)
        with pytest.raises(KeyboardInterrupt):
            secateur.fit(
                tmp_path / "dense", output=tmp_path / "small", max_size="40KiB", effort="fast",
                calibration=tmp_path / "windows.safetensors",
            )  # fmt: skip
    survey = json.loads((work / "survey.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    dense = model(windows[8:10]).logits.double().log_softmax(-1)
    rounded = CheckpointReader(work / "head-int4").read("model.embed_tokens.weight")
    model.get_input_embeddings().weight.copy_(rounded)
    other = model(windows[8:10]).logits.double().log_softmax(-1)
    expected = kl_div(other, dense, log_target=True, reduction="none").sum(-1).mean()
    assert survey["embeddings"]["int8"] == 0
    assert survey["embeddings"]["int4"] == pytest.approx(float(expected), rel=0.05)
    assert survey["embeddings"]["int4"] > 0
    assert survey["rounded"].keys() == survey["pruned"].keys()
    assert all(0 < survey["kept"][n]["50% zeros, int3"] <= 0.5 for n in survey["rounded"])


def stopped(*_: object) -> None:
    """A run that stops here."""
    raise KeyboardInterrupt
