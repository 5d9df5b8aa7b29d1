"""Importance matrices: the sums of squared inputs of matrices that llama.cpp's `imatrix` collects.

They are published beside most GGUF files, in one of two forms.

- A GGUF file: of each matrix, `NAME.in_sum2` [experts, columns] and `NAME.counts` [experts], the
  number of tokens that each expert received. A matrix that is not of experts has one row.
- An older file, often `.dat`: names and sums, each divided by its count and multiplied by a number
  of calls, the same for all experts. So it does not say how often an expert was chosen.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError, SourceError
from secateur.exporting.gguf.llama_cpp import F32, LlamaCpp, Node
from secateur.models.checkpoint import damaged
from secateur.models.gguf_file import MAGIC, GGUFSource
from secateur.progress import Progress, Silent

SUMS, COUNTS = ".in_sum2", ".counts"
LAYER, HEADS = "blk.", ("output.weight", "token_embd.weight")
"""How the names of matrices in layers begin, and the names of a head, its own and a tied one."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs.

    Attributes:
        sums: Σ x² of each input of each matrix, float64 [experts, columns], by the tensor's name.
        counts: the number of tokens in these sums, int64 [experts].
        has_counts: whether counts are of each expert; in the older form they are not.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    has_counts: bool = True

    @classmethod
    def collect(
        cls,
        engine: LlamaCpp,
        windows: Tensor,
        progress: Progress | None = None,
        *,
        head: bool = False,
    ) -> ImportanceMatrix:
        """Collect it as llama.cpp's `imatrix` does: every product with a matrix of the layers.

        Args:
            engine: the file that runs.
            windows: token ids [windows, length].
            progress: receives every window.
            head: collect the inputs of the head too, as with `--process-output`, or of a tied one.
        """
        found, progress = cls({}, {}), progress or Silent()

        def wanted(node: Node) -> bool:
            if node.op not in ("MUL_MAT", "MUL_MAT_ID"):
                return False
            name = node.source(0).name
            own = name.startswith(LAYER) or (head and name in HEADS)
            return own and node.source(1).tensor.type == F32

        progress.start("importance matrix", len(windows))
        for _ in engine.run(windows, wanted, found._add, logits=head):
            progress.step()
        progress.finish()
        return found

    def _add(self, node: Node) -> None:
        """Add the inputs of one product."""
        matrix, inputs = node.source(0), node.source(1).value().double().square()
        name, columns = matrix.name, inputs.shape[-1]
        if node.op == "MUL_MAT_ID":  # inputs [1, tokens, 1 or chosen, columns]
            chosen = node.source(2).value()[0, 0].long()  # [tokens, chosen]
            rows = inputs[0].expand(*chosen.shape, columns).reshape(-1, columns)
            experts = matrix.shape[1]
            sums = torch.zeros(experts, columns, dtype=torch.float64)
            sums.index_add_(0, chosen.flatten(), rows)
            counts = chosen.flatten().bincount(minlength=experts)
        else:  # a stack of matrices of attention, such as those of latent keys, has one count
            stacked = matrix.shape[0] * matrix.shape[1]
            sums = inputs.reshape(-1, stacked, inputs.shape[2], columns).sum((0, 2)).view(1, -1)
            counts = torch.tensor([inputs.numel() // columns // stacked])
        self.sums[name] = self.sums.get(name, 0) + sums
        self.counts[name] = self.counts.get(name, 0) + counts

    @classmethod
    def read(cls, file: Path) -> ImportanceMatrix:
        """Read either form.

        Raises:
            SourceError: there is no such file.
            CheckpointError: the file is damaged, or is no importance matrix.
        """
        if not file.is_file():
            raise SourceError("no such file", where=str(file), remedy="check the path")
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                stream.seek(0)
                return cls._read_old(stream, file)
        stored, found = GGUFSource.read(file).tensors, cls({}, {})
        for name in [x.removesuffix(SUMS) for x in stored if x.endswith(SUMS)]:
            pair = stored[name + SUMS], stored.get(name + COUNTS)
            if pair[1] is None or any(x.type != F32 for x in pair if x):
                raise damaged(f"{name} has no sums and counts in float32", file)
            sums, counts = (torch.from_numpy(x.read().view(np.float32)) for x in pair if x)
            if sums.numel() % counts.numel():
                raise damaged(f"{name} has {sums.numel()} sums of {counts.numel()} matrices", file)
            _check(name, sums, file)
            _check(name, counts, file)
            found.counts[name] = counts.flatten().round().long()
            found.sums[name] = sums.double().view(counts.numel(), -1)
        if not found.sums:
            raise CheckpointError(
                "the file has no sums of squared inputs, so it is no importance matrix",
                where=str(file),
                remedy="name the imatrix file that belongs to the model",
            )
        return found

    @classmethod
    def _read_old(cls, stream: BinaryIO, file: Path) -> ImportanceMatrix:
        found = cls({}, {}, has_counts=False)
        size_bytes = file.stat().st_size

        def number() -> int:
            raw = stream.read(4)
            return int(*struct.unpack("<i", raw)) if len(raw) == 4 else -1

        def some(count: int, each: int, what: str) -> bytes:
            if not 0 < count * each <= size_bytes - stream.tell():
                raise damaged(f"no importance matrix, or a damaged one: {count} {what}", file)
            return stream.read(count * each)

        entries = number()
        if not 0 < entries <= size_bytes // 12:
            raise damaged(f"no importance matrix: it has {entries} entries", file)
        for _ in range(entries):
            name = some(number(), 1, "bytes of a name").decode(errors="replace")
            calls = max(1, number())
            values = some(number(), 4, f"values of {name}")
            found.sums[name] = torch.frombuffer(bytearray(values), dtype=torch.float32).double()[
                None
            ]
            _check(name, found.sums[name], file)
            found.counts[name] = torch.tensor([calls])
        return found

    def write(self, file: Path, length: int, texts: Sequence[str] = ()) -> None:
        """Write the GGUF form.

        Args:
            file: the file to write.
            length: tokens of a window.
            texts: where the windows come from.
        """
        writer = gguf.GGUFWriter(file, "imatrix")
        writer.kv_data[0].clear()  # no architecture
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(gguf.Keys.IMatrix.DATASETS, list(texts) or ["windows of token ids"])
        most = max(int(counts.max()) for counts in self.counts.values())
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, most // length)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, length)
        for name, sums in sorted(self.sums.items()):
            counts = self.counts[name].float()[:, None]
            writer.add_tensor(name + SUMS, sums.float().numpy())
            writer.add_tensor(name + COUNTS, counts.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def means(self) -> dict[str, np.ndarray]:
        """Mean squares for `quantize`; 1 for an expert that received no token, as in llama.cpp."""
        return {
            name: torch.where(counts > 0, sums / counts, 1.0).float().numpy()
            for name, sums in self.sums.items()
            for counts in [self.counts[name][:, None]]
        }


def _check(name: str, values: Tensor, file: Path) -> None:
    """Refuse what is no sum of squares."""
    if not (values.isfinite().all() and (values >= 0).all()):
        raise damaged(f"{name} has values that are no sums of squares", file)
