"""The blocks of matrices in types of llama.cpp, beside the checkpoint that has their numbers.

Scales and codes cannot be found again from the numbers, so a run that rounds keeps both. A file for
each decoder layer lies in `secateur/blocks`. The blocks of a matrix count only while they give its
numbers: a later run that changes the matrix need not know of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from secateur.quantization.blocks import Blocks
from secateur.runs.output import write_bytes, writing

FOLDER = Path("secateur") / "blocks"
"""Where they are, in the folder of a checkpoint."""

TRANSPOSED = " transposed"
"""Follows the type of a matrix that the checkpoint stores as [in, out]."""


class StoredBlocks(NamedTuple):
    """A matrix [out, in] as a GGUF file stores it.

    Attributes:
        type: a name in `quantization.blocks.TYPES`.
        packed: uint8 [out, bytes of a row].
        transposed: whether the checkpoint stores it as [in, out].
    """

    type: str
    packed: Tensor
    transposed: bool = False

    @property
    def blocks(self) -> Blocks:
        """Codes and scales."""
        return Blocks.decode(self.type, self.packed)

    @property
    def stored(self) -> Tensor:
        """The numbers as a checkpoint stores them, float32."""
        values = self.blocks.values
        return values.t() if self.transposed else values

    def recoded(self, stored: Tensor) -> StoredBlocks:
        """The nearest codes of other numbers with the same scales."""
        weight = stored.t() if self.transposed else stored
        return self._replace(packed=self.blocks.recoded(weight).encode())


class BlockFiles:
    """The files of a checkpoint with blocks.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    @cached_property
    def places(self) -> dict[str, Path]:
        """The file of each matrix, by its stored name."""
        from safetensors import safe_open

        found = dict[str, Path]()
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        return found

    def read(self, name: str) -> StoredBlocks | None:
        """The blocks of a matrix; None if there are none."""
        from safetensors import safe_open

        if name not in self.places:
            return None
        with safe_open(self.places[name], "pt") as opened:
            type, transposed, _ = opened.metadata()[name].partition(TRANSPOSED)
            return StoredBlocks(type, opened.get_tensor(name), bool(transposed))

    def write(self, file: str, blocks: Mapping[str, StoredBlocks]) -> None:
        """Write the blocks of some matrices, completely or not at all."""
        from safetensors.torch import save

        types = {name: one.type + TRANSPOSED * one.transposed for name, one in blocks.items()}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            content = save({name: one.packed for name, one in blocks.items()}, types)
            write_bytes(self.folder / f"{file}.safetensors", content)
        self.__dict__.pop("places", None)

    def recode(self, read: Callable[[str], Tensor]) -> None:
        """Give every matrix the nearest codes of its numbers, with the scales that it has.

        Args:
            read: returns a matrix as the checkpoint stores it.
        """
        for file in sorted({*self.places.values()}):
            new = dict[str, StoredBlocks]()
            for name in (name for name, place in self.places.items() if place == file):
                old = self.read(name)
                assert old is not None
                new[name] = old.recoded(read(name))
                del old  # it maps the file, which Windows then does not replace
            self.write(file.stem, new)
