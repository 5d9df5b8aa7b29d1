"""While a layer computes on another device, the next one is read; on the CPU it is not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from zoo import tiny_model

from secateur.engine.stream.targets import CheckpointTarget, ReadAhead, walk_layers
from secateur.errors import CheckpointError
from secateur.models.checkpoint import CheckpointReader


class Logged(CheckpointReader):
    """Says what was read, and by which thread."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.log: list[tuple[str, str]] = []

    def read(self, name: str) -> Tensor:
        self.log.append((name, threading.current_thread().name))
        return super().read(name)

    def layers(self, thread: str) -> set[str]:
        """The layers of which a thread has read something."""
        return {name.split(".")[2] for name, by in self.log if thread in by and "layers" in name}


def target(folder: Path, device: str) -> CheckpointTarget:
    tiny_model("llama").save_pretrained(folder)
    return CheckpointTarget(Logged(folder), None, torch.device(device))


def test_the_next_layer_is_read_while_one_computes(tmp_path: Path) -> None:
    """The meta device stands for a GPU: it computes nothing, but it is not the host."""
    found = target(tmp_path, "meta")
    reader = found.reader
    assert isinstance(reader, Logged)
    names = {n.split("layers.0.")[1] for n in found.stored.values() if "layers.0." in n}
    for number, _ in walk_layers(found):
        if number == 2:
            assert found.ahead is None  # no layer follows
            continue
        assert found.ahead is not None
        for begun in found.ahead.coming.values():
            begun.result()
        early = {n.split(f"layers.{number + 1}.")[-1] for n, by in reader.log if "ahead" in by}
        assert names <= early
    assert reader.layers("MainThread") == {"0"}
    assert reader.layers("read ahead") == {"1", "2"}
    assert len(reader.log) == len({name for name, _ in reader.log})  # nothing twice


def test_a_loop_that_ends_early_keeps_nothing(tmp_path: Path) -> None:
    found = target(tmp_path, "meta")
    for _ in walk_layers(found):
        break
    assert found.ahead is None


def test_a_cpu_reads_layer_by_layer(tmp_path: Path) -> None:
    found = target(tmp_path, "cpu")
    assert isinstance(found.reader, Logged)
    for _, layer in walk_layers(found):
        assert all(torch.isfinite(p).all() for p in layer.parameters())
        assert found.ahead is None
    assert found.reader.layers("read ahead") == set()


def test_values_and_errors_are_those_of_reading(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    name, other = [n for n in reader.entries if "layers.1." in n][:2]
    ahead = ReadAhead(reader, [name])
    for asked in (name, name, other):  # begun, given away already, not begun
        assert torch.equal(ahead.read(asked), reader.read(asked))

    def fails(name: str) -> Tensor:
        raise CheckpointError(f"{name} is damaged")

    reader.read = fails  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="is damaged"):
        ReadAhead(reader, [name]).read(name)
    dropped = ReadAhead(reader, [name])
    dropped.drop()
    assert dropped.coming == {}
