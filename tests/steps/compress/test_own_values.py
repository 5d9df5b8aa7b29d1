"""Linears with values of their own: rounded in one run, each to its grid, and packed as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.install import open_checkpoint
from secateur.runtime.packed import PackedCheckpoint

OWN = {"*.down_proj": "int8", "*.layers.1.*": "int3", "*.o_proj": "bfloat16"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model and windows."""
    place = tmp_path_factory.mktemp("own")
    save_tiny(place / "dense", num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    save_windows(tiny_windows(8, 24), place / "windows.safetensors")
    secateur.prune(
        place / "dense", output=place / "pruned", method="magnitude", sparsity=0.5,
        overrides={"*.0.mlp.*": 0.25},
    )  # fmt: skip
    return place


def expected(linear: str) -> str:
    """The values of a linear: the last match of OWN counts, and int4 is for all others."""
    if linear.endswith("o_proj"):
        return "bfloat16"
    if ".layers.1." in linear:
        return "int3"
    return "int8" if linear.endswith("down_proj") else "int4"


def test_each_linear_has_its_own_values_and_keeps_its_zeros(place: Path) -> None:
    secateur.compress(
        place / "pruned", output=place / "small", values="int4", overrides=OWN,
        calibration=place / "windows.safetensors",
    )  # fmt: skip
    layouts = PackedCheckpoint(place / "small").layouts
    before, after = CheckpointReader(place / "pruned"), open_checkpoint(place / "small")
    linears = [n.removesuffix(".weight") for n in before.entries if n.endswith("_proj.weight")]
    assert {expected(linear) for linear in linears} == {"int8", "int4", "int3", "bfloat16"}
    for linear in linears:
        values = expected(linear)
        layout = layouts.get(linear)
        assert ("bfloat16" if layout is None else layout.values) == values
        old, new = before.read(f"{linear}.weight"), after.read(f"{linear}.weight")
        assert not new[old == 0].any()
        if values == "bfloat16":
            assert torch.equal(new, old.bfloat16().to(new.dtype))


def test_one_run_rounds_to_several_grids(place: Path) -> None:
    secateur.prune(
        place / "dense", output=place / "grids", method="sparsegpt", sparsity=0.0,
        method_parameters={"bits": 4}, method_overrides={"*.down_proj": {"bits": 3}},
        calibration=place / "windows.safetensors",
    )  # fmt: skip
    reader = CheckpointReader(place / "grids")
    for name in reader.entries:
        if name.endswith("_proj.weight"):
            weight = reader.read(name)
            groups = weight.reshape(-1, min(64, weight.shape[1]))
            most = max(len(group.abs().unique()) for group in groups)
            assert (most <= 5) if "down_proj" in name else (5 < most <= 9), name


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("compress", {"values": "int4", "overrides": {"*.nothing": "int8"}}, "no linear matches"),
        ("compress", {"values": "int4", "overrides": {"*": "int5"}}, "unknown values 'int5'"),
        ("compress", {"values": "bfloat16", "overrides": {"*": "float32"}}, "helps to round"),
        (
            "prune",
            {"method": "sparsegpt", "sparsity": 0.5, "method_overrides": {"*.no": {"bits": 3}}},
            "no linear matches",
        ),
        (
            "prune",
            {"method": "sparsegpt", "sparsity": 0.5, "method_overrides": {"*": {"bitz": 3}}},
            "bitz",
        ),
    ],
)
def test_own_values_that_make_no_sense_are_refused(
    place: Path, verb: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        getattr(secateur, verb)(
            place / "pruned", output=place / "no", calibration=place / "windows.safetensors",
            **options,
        )  # fmt: skip
    assert not (place / "no").exists()
    assert not (place / "no.partial").exists()
