"""Whole models on cuda: layer by layer, allocations, refits, cuts, judging; from disk too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import CUTS
from pretended import OnCuda
from safetensors.torch import load_file
from zoo import tiny_model, tiny_windows, zeros_of

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.prune.refit import Refit
from secateur.engine.prune.tasks import Settings
from secateur.engine.search.depth import choose_depth
from secateur.evaluation.divergence import divergence
from secateur.evaluation.perplexity import perplexity
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import methods
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.surgery import cut_model

pytestmark = pytest.mark.filterwarnings("ignore::secateur.structured.surgery.VariedSizesWarning")

WINDOWS = tiny_windows(samples=4, length=16)
FAMILIES = ["llama", "gpt2", "phi3", "qwen2_moe"]


def pruned_on_both(family: str = "llama", **options: Any) -> None:
    """Prune in place on the CPU and on cuda: the same zeros, or nearly."""
    here, there = (tiny_model(family, num_hidden_layers=2) for _ in range(2))
    there.to("cuda")
    for model in (here, there):
        secateur.prune(
            model, calibration=WINDOWS, **{"sparsity": 0.5, "micro_batch_tokens": 32, **options}
        )
    assert all(isinstance(p, OnCuda) for p in there.parameters())
    found = zeros_of(there.cpu())
    for name, expected in zeros_of(here).items():
        # sums in another order; ALPS, which iterates, carries that to a few more weights
        assert float((found[name] == expected).float().mean()) > 0.95, name


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", n) for n in methods), *((f, "sparsegpt") for f in FAMILIES[1:])],
)
def test_prune(family: str, name: str) -> None:
    pruned_on_both(family, method=name)


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("name", list(allocations))
def test_allocation(name: str) -> None:
    pruned_on_both(method="wanda", allocation=name)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sparsegpt", "asymmetric": True},
        {"method": "wanda", "refine": "swaps"},
        {"score": "wanda", "solver": "bias"},
        {"method": "wanda", "sequential": "layer"},
        {"method": "wanda", "scope": "global"},
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "sparsegpt", "fast_matmuls": True},
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_prune_with(options: dict[str, Any]) -> None:
    pruned_on_both(**options)


def test_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {"method": "wanda", "reconstruction": {"passes": 1}}
    model = tiny_model("llama").to("cuda")
    secateur.prune(model, calibration=WINDOWS, sparsity=0.5, **tuned)  # in bfloat16
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: False)
    pruned_on_both(**tuned)


def saved(folder: Path, family: str = "llama") -> dict[str, Any]:
    """A model and windows on disk, and how to run on cuda."""
    tiny_model(family).save_pretrained(folder / "source")
    save_windows(WINDOWS, folder / "windows.safetensors")
    return {
        "output": folder / "out",
        "calibration": folder / "windows.safetensors",
        "device": "cuda",
    }


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "taylor", "obd"])
def test_prune_a_checkpoint(name: str, tmp_path: Path) -> None:
    options = saved(tmp_path)
    secateur.prune(tmp_path / "source", method=name, sparsity=0.5, **options)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", {"method": "sparsegpt"}),
        ("mixtral", {"method": "sparsegpt", "asymmetric": True}),
    ],
)
def test_hidden_states_may_be_anywhere(
    family: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights; on the GPU, none of them and no halted forward ever leaves it."""
    moved: list[str] = []
    monkeypatch.setattr(
        "secateur.engine.stream.halted_forwards.ActivationOffload.store",
        lambda self, forward: moved.append(""),
    )
    made = {}
    options = {**saved(tmp_path, family), **how}
    for place in ("gpu", "auto"):
        options["output"] = tmp_path / place
        secateur.prune(
            tmp_path / "source", sparsity=0.5, activations=place,
            micro_batch_tokens=16, **options,
        )  # fmt: skip
    assert not moved
    monkeypatch.undo()
    for place in ("memory", "disk"):
        options["output"] = tmp_path / place
        secateur.prune(
            tmp_path / "source", sparsity=0.5, activations=place,
            micro_batch_tokens=16, **options,
        )  # fmt: skip
    for place in ("gpu", "auto", "memory", "disk"):
        made[place] = load_file(tmp_path / place / "model.safetensors")
        assert all(torch.equal(x, made["gpu"][name]) for name, x in made[place].items()), place


@pytest.mark.parametrize(
    "options",
    [
        {"ffn": 0.75, "kv_groups": 0.5},
        {"keep_layers": 2},
        {"hidden_size": 24},
        {"keep_layers": 2, "hidden_size": 24},
    ],
    ids=str,
)
def test_structure_a_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    secateur.structure(tmp_path / "source", **saved(tmp_path), **options)


@pytest.mark.parametrize("name", list(CUTS))
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_cut(family: str, name: str) -> None:
    model = tiny_model(family).to("cuda")
    cut = CUTS[name](sizes_of(model))
    left = cut_model(model, cut)
    assert all(isinstance(p, OnCuda) for p in left.parameters())
    expected = cut_model(tiny_model(family), cut)(input_ids=WINDOWS).logits
    torch.testing.assert_close(left(input_ids=WINDOWS.to("cuda")).logits.cpu(), expected)


@pytest.mark.parametrize(
    "cut", [Cut(layers=(0, 2)), Cut(hidden=tuple(range(1, 25)))], ids=["layers", "hidden"]
)
def test_refit(cut: Cut) -> None:
    dense = tiny_model("llama").to("cuda")
    left = copy.deepcopy(cut_model(dense, cut))
    layers = range(3) if cut.layers is None else cut.layers
    Refit(
        ModelTarget(dense), ModelTarget(left), layers, WINDOWS, Settings(),
        Ledger(), Silent(), channels=cut.hidden,
    ).execute()  # fmt: skip
    assert all(isinstance(p, OnCuda) for p in left.parameters())


@pytest.mark.parametrize("method", ["influence", "angular", "greedy"])
def test_depth(method: str, tmp_path: Path) -> None:
    target = ModelTarget(tiny_model("llama").to("cuda"))
    choose_depth(target, WINDOWS, 1, tmp_path, Silent(), method=method)


def test_perplexity_and_divergence() -> None:
    dense, other = tiny_model("llama").to("cuda"), tiny_model("llama", seed=1).to("cuda")
    here = perplexity(tiny_model("llama"), WINDOWS).perplexity
    assert perplexity(dense, WINDOWS).perplexity == pytest.approx(here, rel=1e-4)
    divergence(other, dense, WINDOWS)
