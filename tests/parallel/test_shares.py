"""How work is divided among processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny
from trained import source_text

from secateur.engine.prepared import choose_plan, prepare
from secateur.errors import RecipeError
from secateur.models.sources import resolve
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, owners, rows_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9))
def test_every_window_has_one_process_and_the_last_are_idle_first(
    windows: int, largest: int, ranks: int
) -> None:
    if windows < ranks:
        with pytest.raises(RecipeError, match=f"{ranks} processes have only {windows}"):
            micro_batches(windows, largest, ranks)
        return
    cut = micro_batches(windows, largest, ranks)
    shares = [rows_of(rank, cut, ranks) for rank in range(ranks)]
    read = [row for share in shares for batch in share for row in range(batch.start, batch.stop)]
    assert read == list(range(windows))
    assert all(0 < batch.stop - batch.start <= largest for batch in cut)
    numbers = [len(share) for share in shares]
    assert numbers[0] == max(numbers)
    assert max(numbers) - min(numbers) <= 1
    assert cut == micro_batches(windows, largest)
    if len(cut) < ranks:
        assert numbers[len(cut) :] == [0] * (ranks - len(cut))


def test_the_busiest_process_has_at_most_a_third_more_than_the_best() -> None:
    costs = [4096**3, 4096**2 * 1024, 4096**2 * 1024, 4096**3, 4096**2 * 11008, 4096**2 * 11008]
    costs.append(11008**2 * 4096)
    for ranks in (1, 2, 3, 7, 9):
        found = owners(costs, ranks)
        busy = [
            sum(c for c, own in zip(costs, found, strict=True) if own == r) for r in range(ranks)
        ]
        best = max(max(costs), sum(costs) / ranks)
        assert max(busy) <= 4 / 3 * best
    assert owners([1, 1, 1], 3) == [0, 1, 2]
    assert owners([], 2) == []


def test_the_first_process_has_the_host_to_itself_when_it_distills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(source_text()[:20_000])
    text = {"source": str(tmp_path / "text.txt"), "windows": 8, "sequence_length": 32}
    values = {"model": str(tmp_path / "dense"), "output": "x", "device": "cpu", "calibration": text}
    recipe = build_recipe(PruneRecipe, {**values, "effort": "thorough", "sparsity": 0.5})
    prepared = prepare(recipe, resolve(str(tmp_path / "dense")), only_plan=True)
    free = SimpleNamespace(available=16 * 2**30, total=16 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("secateur.engine.plan_memory.distilling_bytes", lambda *_: 10 * 2**30)
    for ranks in (ALONE, Ranks(count=2, here=2)):
        plan, activations = choose_plan(prepared, prepared.tasks(), recipe.memory, ranks)
        assert (plan.sweep_windows, activations) == (0, "memory")
        assert plan.peak_bytes > 10 * 2**30
