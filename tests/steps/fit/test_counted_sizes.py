"""The bytes that a fit counts, beside the files of small models."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur
from runtime.packed_models import pruned_folder
from secateur.progress import Silent
from secateur.recipes.compress import FitRecipe
from secateur.runtime.formats import WeightFormat
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting.problem import EMBEDDINGS, costs_of


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize(
    ("values", "embeddings"), [("int8", "int8"), ("int4", "int4"), ("int2", "int3")]
)
def test_headers_are_counted(
    tmp_path: Path, values: str, embeddings: str, sparsity: float, shards: int
) -> None:
    """Never too little, and at most 55 bytes too much for a matrix: digits of places in it."""
    sizes = {"head_dim": 16, "tie_word_embeddings": True}
    model = pruned_folder(tmp_path / "model", sparsity=sparsity, shards=shards, **sizes)
    how = {"values": values, "group_size": 64} if values != "int8" else {"values": values}
    secateur.compress(model, output=tmp_path / "packed", embeddings=embeddings, **how)
    written = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    opened = PackableCheckpoint.open(model)
    recipe = FitRecipe(model=str(model), output=str(tmp_path / "fit"), max_size="1GiB")
    costs = costs_of(recipe, opened, Silent())
    stored, counted = WeightFormat(values, 0.0), costs.rest[0]
    for name in costs.units:
        kept = None if name == EMBEDDINGS else 1 - opened.zero_fractions.get(name, 0.0)
        counted += costs.of(name, stored, kept)[0]
    assert 0 <= counted - written <= 55 * len(costs.units)
    assert counted < 1.05 * written
