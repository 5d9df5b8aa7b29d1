"""Tuning of routers and experts after a cut, against whole forwards and plain least squares."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from at_rest import in_float8, raw, stored_tensors
from slow import slow_but
from stopped_stage import StopAt, StoppedError
from tiny import saved
from torch import Tensor
from zoo import WITH_EXPERTS, tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.prune import routers
from secateur.engine.prune.routers import RouterTuning
from secateur.engine.prune.tasks import Settings
from secateur.models.architecture import describe
from secateur.models.experts import Sent, opened_experts
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.runs.ledger import Ledger
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.surgery import cut_model

WINDOWS = tiny_windows(2, 24).repeat(8, 1)
"""Those that are held out are among the others, so that what is learned must help."""
HELD_OUT = WINDOWS[7::8]
NOT_ADDED = {"gemma4", "nemotron_h", "deepseek_v4"}
"""A norm, a projection or a mixing of streams follows their experts. Routers learn alone."""


def tuned(dense: Any, left: Any, **options: Any) -> list[dict[str, float]]:
    """Tune in place; the errors of every layer."""
    ledger, layers = Ledger(), range(len(describe(dense).layers(dense)))
    with opened_experts(dense), opened_experts(left):
        RouterTuning(
            ModelTarget(dense), ModelTarget(left), layers, WINDOWS, Settings(), ledger, Silent(),
            **{"kept": {}, "fixed": (), **options},
        ).execute()  # fmt: skip
    return [layer.reconstruction for layer in ledger.layers]


@torch.no_grad()
def error(dense: Any, left: Any, index: int) -> float:
    """The mean relative error of a layer's outputs for a token, from whole forwards."""
    states = []
    for model in (dense, left):
        seen: list[Any] = []
        layer = describe(model).layers(model)[index]
        handle = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        model(input_ids=HELD_OUT, use_cache=False)
        handle.remove()
        states.append(seen[0][0] if isinstance(seen[0], tuple) else seen[0])
    # [windows, tokens, streams, hidden] of a model with several streams
    wanted, found = (x.flatten(2) for x in states)
    return float(((wanted - found).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize(
    "family",
    slow_but(("qwen3_moe", "gpt_oss", "llama4", "deepseek_v3", "nemotron_h"), WITH_EXPERTS),
)
def test_no_layer_gets_worse_on_windows_that_are_held_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "STEPS", 60 if family in NOT_ADDED else 8)
    dense = tiny_model(family)
    counts = {i: n for i, n in enumerate(sizes_of(dense).experts) if n}
    kept = {i: (0, 2, 3, 5) if n == 6 else (0, 2, 4) for i, n in counts.items()}
    left = copy.deepcopy(cut_model(dense, Cut(experts=kept)))
    first, last = min(counts), len(sizes_of(dense).experts) - 1
    weights = {n: p.clone() for n, p in left.named_parameters()}
    before = error(dense, left, first)
    errors = tuned(dense, left)
    assert [i for i, own in enumerate(errors) if own] == [*counts]
    assert errors[first]["error_before"] == pytest.approx(before, rel=1e-3)
    assert errors[first]["error_after"] == pytest.approx(error(dense, left, first), rel=1e-3)
    if last in counts:
        assert errors[last]["error_after"] == pytest.approx(error(dense, left, last), rel=1e-3)
    for own in filter(None, errors):
        assert own["error_after"] <= own["error_before"]
        assert ("after_refit" in own) == (family not in NOT_ADDED)
    assert errors[first]["error_after"] < before or before < 1e-9
    experts: Any = describe(dense).experts
    for name, parameter in left.named_parameters():
        learns = f".{experts.router}." in name or name.endswith("experts.down_proj")
        assert learns or torch.equal(parameter, weights[name]), name


def test_a_router_finds_back_to_the_dense_one() -> None:
    """All experts stay, and a router was halved: the least error is 0, and it is known where."""
    dense = tiny_model("mixtral")
    router = dense.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        router *= 30
    left = copy.deepcopy(dense)
    with torch.no_grad():
        left.model.layers[0].mlp.gate.weight /= 2
    before = error(dense, left, 0)
    errors = tuned(dense, left, fixed={"model.layers.0.mlp.experts.0.down_proj.weight"})
    assert errors[0]["error_after"] == pytest.approx(error(dense, left, 0), rel=1e-3)
    assert error(dense, left, 0) < 0.05 * before


def sent_to(experts: Tensor, weights: Tensor) -> Sent:
    """The tokens of each expert, for experts [tokens, chosen] and their weights."""
    order = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=4).tolist()
    rows, none = order // experts.shape[1], torch.empty(0)
    return Sent(range(4), counts, rows, weights.flatten()[order, None], none, 0)


def test_experts_in_turn_approach_the_joint_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all experts at once, in float64, by torch.linalg.lstsq; an unseen expert stays."""
    monkeypatch.setattr(routers, "SWEEPS", 200)
    monkeypatch.setattr(routers, "DAMPING", 0.0)
    draw = torch.Generator().manual_seed(0)
    tokens, neurons, hidden, scale = 120, 5, 3, 0.7
    chosen = torch.rand(tokens, 3, generator=draw).topk(2).indices  # never the last expert
    weights = torch.rand(tokens, 2, generator=draw) + 0.2
    size = torch.rand(tokens, 1, generator=draw) + 0.5
    left = torch.randn(tokens, hidden, generator=draw)
    matrices = [torch.randn(hidden, neurons, generator=draw) for _ in range(4)]
    were, fit, columns = [m.clone() for m in matrices], routers._DownFit(4), []
    for rows in (slice(0, 50), slice(50, tokens)):
        sent = sent_to(chosen[rows], weights[rows])
        x = torch.randn(len(sent.rows), neurons, generator=draw)
        fit.add([(x, sent)], left[rows], size[rows])
        own = torch.zeros(len(left[rows]), 4, neurons, dtype=torch.float64)
        numbers = torch.arange(4).repeat_interleave(torch.tensor(sent.counts))
        own[sent.rows, numbers] = (x * sent.weights).double()
        columns.append(own)
    fit.solve(matrices, scale)
    z = scale * torch.cat(columns)[:, :3].flatten(1) / size
    joint = torch.linalg.lstsq(z, left.double() / size).solution.view(3, neurons, hidden)
    for e in range(3):
        torch.testing.assert_close(
            (matrices[e] - were[e]).double(), joint[e].T, rtol=1e-3, atol=1e-3
        )
    assert torch.equal(matrices[3], were[3])


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What a cut has recorded."""
    found: list[dict[str, Any]] = json.loads((folder / "secateur" / "steps.json").read_text())
    return found


def test_routers_follow_a_cut_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "STEPS", 8)
    source = saved(tiny_model("qwen3_moe"), tmp_path / "source")
    save_windows(WINDOWS, tmp_path / "windows.safetensors")
    names = {}
    for name, options in {
        "plain": {}, "fast": {"effort": "fast"}, "aimer": {"experts_by": "aimer"},
    }.items():  # fmt: skip
        secateur.structure(
            source, output=tmp_path / name, experts=4,
            calibration=tmp_path / "windows.safetensors", **options,
        )  # fmt: skip
        names[name] = [step["step"] for step in steps_of(tmp_path / name)]
    assert names == {"plain": ["experts", "routers"], "fast": ["experts"], "aimer": ["experts"]}
    errors = steps_of(tmp_path / "plain")[1]["errors"]
    assert {*errors} == {"1"}  # the others are dense
    assert errors["1"]["error_after"] < errors["1"]["error_before"]


@pytest.mark.parametrize("steps", slow_but((3,), (2, 3, 5)))
def test_a_stopped_tuning_resumes_to_the_same_bytes(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the first, the second and the last of three layers, each with two passes."""
    monkeypatch.setattr(routers, "STEPS", 8)
    source = saved(tiny_model("mixtral"), tmp_path / "source")
    save_windows(WINDOWS, tmp_path / "windows.safetensors")

    def run(name: str, **options: Any) -> dict[str, Tensor]:
        secateur.structure(
            source, output=tmp_path / name, experts=3, effort="fast", asymmetric=True,
            calibration=tmp_path / "windows.safetensors", **options,
        )  # fmt: skip
        return stored_tensors(tmp_path / name)

    with pytest.raises(StoppedError):
        run("out", progress=StopAt("tuning routers", steps))
    resumed, whole = run("out", resume=True), run("whole")
    assert resumed.keys() == whole.keys()
    assert not [n for n in whole if not torch.equal(raw(resumed[n]), raw(whole[n]))]
    assert steps_of(tmp_path / "out")[1]["errors"] == steps_of(tmp_path / "whole")[1]["errors"]


def test_experts_in_float8_keep_their_bytes(tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3_moe", moe_intermediate_size=32)
    save_windows(WINDOWS, tmp_path / "windows.safetensors")
    for effort in ("fast", "balanced"):
        secateur.structure(
            folder, output=tmp_path / effort, experts=4, effort=effort,
            calibration=tmp_path / "windows.safetensors",
        )  # fmt: skip
    fast, balanced = (stored_tensors(tmp_path / x) for x in ("fast", "balanced"))
    assert fast.keys() == balanced.keys()
    changed = {n for n in fast if not torch.equal(raw(fast[n]), raw(balanced[n]))}
    assert changed == {"model.layers.1.mlp.gate.weight"}
