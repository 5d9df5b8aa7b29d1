"""The ledger survives torn lines."""

from __future__ import annotations

from pathlib import Path

from secateur.runs.ledger import Ledger
from secateur.runs.records import Layer, LinearRecord

LINEAR = LinearRecord(
    name="a", shape=(4, 8), asked=0.5, pruned=16, zeros=16, error=None, lost=None, seconds=0.1
)
FIRST, SECOND = (Layer(layer=number, seconds=1.0, linears=(LINEAR,)) for number in range(2))


def test_a_torn_line_is_dropped_and_done_again(tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    first = Ledger(file)
    assert not first.begun
    first.begin()
    first.finish_layer(FIRST)
    first.finish_layer(SECOND)
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        again = Ledger(file)
        assert again.begun
        assert again.resume() == 1
        assert file.read_bytes() == whole.splitlines(keepends=True)[0]
        again.finish_layer(SECOND)
        assert file.read_bytes() == whole
        assert again.layers == first.layers


def test_an_empty_ledger_starts_anew(tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    file.write_bytes(b'{"layer": 0, "seco')
    assert Ledger(file).resume() == 0
    assert file.read_bytes() == b""
    assert Ledger(file).resume() == 0
