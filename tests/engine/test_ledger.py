"""The ledger survives torn lines and refuses to continue another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.engine.ledger import Ledger
from secateur.errors import RecipeError


def test_a_torn_line_is_dropped_and_done_again(tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    first = Ledger(file, {"sparsity": 0.5})
    first.begin()
    first.finish_layer(0, [{"name": "a"}], 1.0)
    first.finish_layer(1, [{"name": "b"}], 1.0)
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        again = Ledger(file, {"sparsity": 0.5})
        assert again.resume() == 1
        assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
        again.finish_layer(1, [{"name": "b"}], 1.0)
        assert file.read_bytes() == whole
        file.write_bytes(whole)


def test_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    Ledger(file, {"sparsity": 0.5, "method": "wanda"}).begin()
    with pytest.raises(RecipeError, match=r"sparsity: 0.5 then, 0.6 now"):
        Ledger(file, {"sparsity": 0.6, "method": "wanda"}).resume()


def test_an_empty_ledger_starts_anew(tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    file.write_bytes(b'{"fingerpr')
    assert Ledger(file, {"a": 1}).resume() == 0
    assert Ledger(file, {"a": 1}).resume() == 0
