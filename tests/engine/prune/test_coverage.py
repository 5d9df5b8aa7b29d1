"""A run counts the tokens of every matrix, and fails if it passed over one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny
from torch import nn
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.prune.coverage import reach, silent_experts
from secateur.engine.prune.layer import OpenLayer
from secateur.errors import VerificationError
from secateur.runs.records import Layer, LinearRecord


def line(*records: tuple[str, int | None], unseen: tuple[str, ...] = ()) -> Layer:
    linears = tuple(
        LinearRecord(
            name=name, shape=(8, 8), asked=0.5, pruned=0, zeros=0, error=None, lost=None,
            seconds=0.0, tokens=tokens,
        )
        for name, tokens in records
    )  # fmt: skip
    return Layer(layer=0, seconds=0.0, linears=linears, unseen=unseen)


def test_what_was_reached_is_counted() -> None:
    layers = [line(("a", 12), ("b", 3)), line(("c", 12), unseen=("d", "e"))]
    assert reach(layers, ["a", "b", "c"]) == {"matrices": 5, "pruned": 3, "fewest_tokens": 3}
    without_inputs = reach([line(("a", None), ("b", None))], ["a", "b"])
    assert without_inputs == {"matrices": 2, "pruned": 2, "fewest_tokens": None}


@pytest.mark.parametrize(("layers", "name"), [
    ([line(("a", 12))], "b"),
    ([line(("a", 12), ("b", 0))], "b"),
    ([line(("a", 12), ("b", None))], "b"),
])  # fmt: skip
def test_a_matrix_without_a_count_ends_the_run(layers: list[Any], name: str) -> None:
    with pytest.raises(VerificationError, match="1 matrices") as error:
        reach(layers, ["a", "b"])
    assert error.value.where == name


def test_experts_are_numbered_by_layer() -> None:
    places = ("11.mlp.experts.3", "2.mlp.experts.10", "11.mlp.experts.0", "11.mlp.experts.3")
    names = [f"model.layers.{place}.up_proj" for place in places]
    assert silent_experts(names) == {"2": [10], "11": [0, 3]}


@pytest.mark.parametrize("sequential", ["group", "layer"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_every_matrix_has_its_tokens(method: str, sequential: str) -> None:
    """Those of attention all of them, those of experts together the router's choices."""
    model: nn.Module = tiny_model("qwen2_moe")
    report = secateur.prune(
        model, method=method, sparsity=0.5, calibration=tiny_windows(6, 20), sequential=sequential
    )
    counts = {r.name: r.tokens for layer in report.layers for r in layer.linears}
    if method == "magnitude":
        assert set(counts.values()) == {None}
        return
    for name, tokens in counts.items():
        if ".experts." not in name:
            assert tokens == 6 * 20, name
    for projection in ("gate_proj", "up_proj", "down_proj"):
        of = [t for n, t in counts.items() if n.startswith("model.layers.0.mlp.experts.")
              and n.endswith(projection)]  # fmt: skip
        assert sum(of) == 6 * 20 * 2


def test_a_run_that_passes_over_a_matrix_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would if a model computed something without calling its linears."""
    source = save_tiny(tmp_path / "source", "llama")
    plain = OpenLayer.pruned_groups

    def without_down(opened: OpenLayer) -> Any:
        groups = plain(opened)
        return groups[:-1] if opened.index == 1 else groups

    monkeypatch.setattr(OpenLayer, "pruned_groups", without_down)
    save_windows(tiny_windows(), tmp_path / "windows.safetensors")
    with pytest.raises(VerificationError, match="passed over") as error:
        secateur.prune(
            source, output=tmp_path / "out", method="wanda", sparsity=0.5,
            calibration=tmp_path / "windows.safetensors",
        )  # fmt: skip
    assert error.value.where == "model.layers.1.mlp.down_proj"
    assert not (tmp_path / "out").exists()
