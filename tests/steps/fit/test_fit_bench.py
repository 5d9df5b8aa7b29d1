"""Whole models against the dense one, compared with a direct computation in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.search.candidate_evaluator import divergence_from
from secateur.evaluation.perplexity import LossComparison
from secateur.models.checkpoint import CheckpointReader
from secateur.models.sources import resolve
from secateur.models.targets import CheckpointTarget
from secateur.progress import Silent
from secateur.recipes.compress import FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.runs.environment import Meter
from secateur.runs.folder import RunFolder
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting.bench import FitBench
from secateur.steps.fitting.problem import costs_of
from secateur.steps.runner import RunContext


@torch.no_grad()
def logits_of(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(windows).logits.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_divergence_has_no_floor_with_a_large_vocabulary(noise: float) -> None:
    draw = torch.Generator().manual_seed(0)
    dense = 3 * torch.randn(64, 49152, generator=draw) + 5
    other = dense + noise * torch.randn(dense.shape, generator=draw)
    p, q = (x.double().log_softmax(-1) for x in (dense, other))
    found = divergence_from(dense)(other) / len(dense)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=5e-6)


@pytest.mark.parametrize("start", [0, 2])
def test_the_loss_of_the_dense_model_is_that_of_transformers(tmp_path: Path, start: int) -> None:
    """Exactly, though it passes through layer by layer: no rough products."""
    save_tiny(tmp_path / "dense", num_hidden_layers=2)
    windows = tiny_windows(4, 16)
    target = CheckpointTarget(CheckpointReader(tmp_path / "dense"), None, torch.device("cpu"))
    logits, first = logits_of(tmp_path / "dense", windows), max(1, start)
    wanted = [
        float(cross_entropy(one[first - 1 : -1], ids[first:]))
        for one, ids in zip(logits, windows, strict=True)
    ]
    save_windows(windows, tmp_path / "windows.safetensors", start=[1] * start)
    found = LossComparison(target, tmp_path / "windows.safetensors", Silent()).dense()
    assert found == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def test_a_packed_model_is_measured_as_it_runs(tmp_path: Path) -> None:
    """KL from the dense model to the packed one in the kernels, activations rounded."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    save_tiny(tmp_path / "dense", **sizes)
    windows, folder = tiny_windows(24, 16), tmp_path / "dense"
    save_windows(windows, tmp_path / "windows.safetensors")
    text = {"calibration": {"source": str(tmp_path / "windows.safetensors")}}
    recipe = build_recipe(
        FitRecipe, {"model": str(folder), "output": "x", "max_size": "1MiB", **text}
    )
    model, run = PackableCheckpoint.open(folder), RunFolder(tmp_path / "out", "fit")
    work = run.work
    work.mkdir(parents=True)
    bench = FitBench(
        recipe, model, costs_of(recipe, model, Silent()),
        RunContext(run, resolve(str(folder)), Silent(), Meter.start()),
    )  # fmt: skip
    secateur.compress(folder, output=work / "packed", values="int4", embeddings="int8")
    packed, windows = work / "packed", windows[16:20]  # that choose
    found = bench.divergence(packed)
    assert (work / "measured-chosen.jsonl").exists()
    dense = logits_of(folder, windows)
    other = secateur.load(packed)(windows).logits.double()
    each = kl_div(other.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none")
    assert found == pytest.approx(float(each.sum(-1).mean()), rel=0.02)
