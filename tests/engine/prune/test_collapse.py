"""A run that destroys the model is reported, and can be stopped."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from zoo import tiny_model, tiny_windows

import secateur
from secateur.engine.prune.layer import lost_energy
from secateur.errors import VerificationError

TOO_MUCH = {"method": "sparsegpt", "sparsity": 0.98}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny model of random weights, in which nothing makes up for what is lost."""
    tiny_model("qwen3").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def lines(ledger: Path) -> list[dict]:
    """The layers of a ledger."""
    return [x for x in map(json.loads, ledger.read_text().splitlines()) if "layer" in x]


def test_a_collapsing_run_is_stopped_and_can_go_on(source, windows, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(VerificationError) as stopped:
        secateur.prune(source, output=out, calibration=windows, on_collapse="stop", **TOO_MUCH)
    assert stopped.value.exit_code == 3
    where = stopped.value.where
    assert where is not None
    index = int(where.removeprefix("model.layers."))
    assert f"{where}." in stopped.value.what
    for option in ("restart", "overrides", "resume", "on_collapse"):
        assert option in str(stopped.value.remedy)
    assert not out.exists()
    done = lines(tmp_path / "out.partial" / "model" / "secateur" / "layers.jsonl")
    assert len(done) == index + 1
    assert all(f"{where}." in name for name in done[-1]["collapsed"])
    assert all(lost > 0.8 for lost in done[-1]["collapsed"].values())
    # what the remedy promises: the finished layers are kept, and the same run goes on
    report = secateur.prune(
        source, output=out, calibration=windows, on_collapse="warn", resume=True, **TOO_MUCH
    )
    assert report.manifest.cost.resumed
    assert set(done[-1]["collapsed"]) <= set(report.manifest.collapsed)
    again = secateur.prune(source, output=tmp_path / "w", calibration=windows, **TOO_MUCH)
    assert again.manifest.collapsed == report.manifest.collapsed
    found = [x for x in secateur.diagnose(out).findings if x.id == "linear-collapse"]
    assert {x.where for x in found} == set(report.manifest.collapsed)


def test_a_warning_is_the_default(source, windows, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        secateur.prune(source, output=tmp_path / "out", calibration=windows, **TOO_MUCH)
    assert "collapsed: model.layers." in caplog.text
    caplog.clear()
    secateur.prune(
        source, output=tmp_path / "fine", calibration=windows, method="sparsegpt", sparsity=0.5
    )
    assert not caplog.text
    assert not any("collapsed" in x for x in lines(tmp_path / "fine" / "secateur" / "layers.jsonl"))


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_a_loaded_model_is_watched_too(method: str) -> None:
    """By the error, and by the estimate."""
    with pytest.raises(VerificationError, match="collapsed"):
        secateur.prune(
            tiny_model("qwen3"), calibration=tiny_windows(), on_collapse="stop", method=method,
            sparsity=0.98,
        )  # fmt: skip


def test_the_estimate_where_no_error_is_measured() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 8), torch.randn(50, 8) * torch.arange(1.0, 9.0)
    mask = torch.rand(6, 8) > 0.6
    power = inputs.square().sum(0)
    lost, total = 0.0, 0.0
    for i in range(6):
        for j in range(8):
            energy = float(weight[i, j] ** 2 * power[j])
            total += energy
            lost += 0.0 if mask[i, j] else energy
    by_norm = lost_energy(weight, mask, {"column_norm": power.sqrt()})
    assert float(by_norm) == pytest.approx(lost / total)
    by_gram = lost_energy(weight, mask, {"gram": inputs.t() @ inputs})
    assert float(by_gram) == pytest.approx(lost / total)
    assert lost_energy(weight, mask, {}) is None
    assert lost_energy(torch.zeros(6, 8), mask, {"column_norm": power.sqrt()}).isnan()
