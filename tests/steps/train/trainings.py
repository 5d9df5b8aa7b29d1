"""What the tests of `train` share: where a training begins, how it is called and stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from torch import Tensor
from trained import source_text

import secateur
from secateur.training.loop import Loop


def make_place(folder: Path, dtype: torch.dtype = torch.float32, **pruning: Any) -> Path:
    """A dense model, one pruned from it by magnitude, and a text."""
    save_tiny(folder / "dense", dtype=dtype)
    secateur.prune(folder / "dense", output=folder / "pruned", method="magnitude", **pruning)
    (folder / "text.txt").write_text(source_text()[:60_000])
    return folder


def train_in(place: Path, output: Path, model: str | Path = "pruned", **options: Any) -> Any:
    """By the Python API, on the text of a place, with a model of it or another one."""
    options.setdefault("text", str(place / "text.txt"))
    return secateur.train(place / model, output=output, **options)


def tensors(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds."""
    return load_file(folder / "model.safetensors")


def matrices(folder: Path) -> dict[str, Tensor]:
    """The weights of the decoder's linears."""
    return {n: t for n, t in tensors(folder).items() if n.endswith("proj.weight")}


def assert_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """A key is pressed in this block before a step of the training."""
    plain = Loop.step

    def failing(self: Loop) -> None:
        if self.outcome.step == step:
            raise KeyboardInterrupt
        plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            yield
