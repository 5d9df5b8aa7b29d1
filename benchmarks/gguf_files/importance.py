"""Importance matrices as llama.cpp's `imatrix` makes them, and its quantizer with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import gguf
import numpy as np
import torch
from torch import Tensor

from secateur.exporting.gguf.expert_scores import COUNTS, SUMS, ImportanceMatrix
from secateur.exporting.gguf.llama_cpp import F32, LlamaCpp, Node, load_llama_cpp

LAYER, HEADS = "blk.", ("output.weight", "token_embd.weight")
"""How the names of matrices in layers begin, and the names of a head, its own and a tied one."""

ALIVE: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
"""What tables of the quantizer point to."""


def collected(engine: LlamaCpp, windows: Tensor, *, head: bool = False) -> ImportanceMatrix:
    """Collect it as llama.cpp does: every product with a matrix of the layers.

    Args:
        engine: the file that runs.
        windows: token ids [windows, length].
        head: collect the inputs of the head too, as with `--process-output`, or of a tied one.
    """
    found = ImportanceMatrix({}, {})

    def wanted(node: Node) -> bool:
        if node.op not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        name = node.source(0).name
        own = name.startswith(LAYER) or (head and name in HEADS)
        return own and node.source(1).tensor.type == F32

    def add(node: Node) -> None:
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
        found.sums[name] = found.sums.get(name, 0) + sums
        found.counts[name] = found.counts.get(name, 0) + counts

    for _ in engine.run(windows, wanted, add, logits=head):
        pass
    return found


def write(matrix: ImportanceMatrix, file: Path, length: int, texts: Sequence[str] = ()) -> None:
    """Write the GGUF form.

    Args:
        matrix: what to write.
        file: the file to write.
        length: tokens of a window.
        texts: where the windows come from.
    """
    writer = gguf.GGUFWriter(file, "imatrix")
    writer.kv_data[0].clear()  # no architecture
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(texts) or ["windows of token ids"])
    most = max(int(counts.max()) for counts in matrix.counts.values())
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, most // length)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, length)
    for name, sums in sorted(matrix.sums.items()):
        counts = matrix.counts[name].float()[:, None]
        writer.add_tensor(name + SUMS, sums.float().numpy())
        writer.add_tensor(name + COUNTS, counts.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def means(matrix: ImportanceMatrix) -> dict[str, np.ndarray]:
    """Mean squares of inputs; 1 for an expert that received no token, as in llama.cpp."""
    return {
        name: torch.where(counts > 0, sums / counts, 1.0).float().numpy()
        for name, sums in matrix.sums.items()
        for counts in [matrix.counts[name][:, None]]
    }


def chosen(
    importance: Mapping[str, np.ndarray] = MappingProxyType({}),
    types: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
) -> dict[str, Any]:
    """Options of `quantize`.

    Args:
        importance: mean squares of the inputs of matrices, by the tensor's name; float32 [columns],
            or [experts, columns].
        types: of tensors whose name has a match of a regular expression, in place of the mix's.
    """
    ffi, _ = load_llama_cpp()
    matrix = ffi.new(
        "struct llama_model_imatrix_data[]", len(importance) + 1
    )  # an empty row ends it
    own = ffi.new("struct llama_model_tensor_override[]", len(types) + 1)
    ALIVE[matrix], ALIVE[own] = [], []
    for row, (name, values) in zip(matrix, importance.items(), strict=False):
        array = np.ascontiguousarray(values, dtype=np.float32)
        ALIVE[matrix] += [text := ffi.new("char[]", name.encode()), array]
        row.name, row.size = text, array.size
        row.data = ffi.cast("const float *", array.ctypes.data)
    for row, (pattern, kind) in zip(own, types.items(), strict=False):
        ALIVE[own].append(text := ffi.new("char[]", pattern.encode()))
        row.pattern, row.type = text, int(kind)
    found = {"imatrix": matrix} if importance else {}
    return found | ({"tt_overrides": own} if types else {})
