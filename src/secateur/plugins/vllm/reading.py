"""The tensors that vLLM gets from a folder: dense ones, or 4-bit integers as they are stored."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor

from secateur.exporting.compressed_tensors import CPU_MULTIPLE, Scheme
from secateur.models.skeleton import build_skeleton, stored_names
from secateur.models.sources import resolve
from secateur.runtime.install import DenseView, open_checkpoint, path_of
from secateur.runtime.packed import PackedCheckpoint, is_packed

FOUR_BIT_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes in which vLLM's kernels multiply 4 bits."""


def folder_of(model: str, revision: str | None) -> Path:
    """The folder of a model: itself, or a download of the hub."""
    return resolve(f"{model}@{revision}" if revision else model, values=False).folder


def tensors_of(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder, verified, as vLLM takes them.

    Args:
        folder: compressed or not.
        dtype: of the computation.

    Raises:
        CheckpointError: damaged.
    """
    if not is_packed(folder):
        reader = open_checkpoint(folder)
        yield from ((name, reader.read(name)) for name in reader.entries)
        return
    packed = PackedCheckpoint(folder)
    dense = ends_of(packed)
    scheme = four_bits(packed, dtype, dense)
    view = DenseView(packed, computed=dtype)
    for name in view.entries:
        owner = name.removesuffix(".weight")
        stored = view.integers(name) if scheme is not None and owner not in dense else None
        if scheme is not None and stored is not None:
            _, codes, scale = stored
            yield from scheme.tensors(owner, codes, scale.to(dtype))
        else:
            yield name, view.read(name)


def ends_of(packed: PackedCheckpoint) -> frozenset[str]:
    """Embedding and head as they are stored: vLLM takes them dense."""
    model = build_skeleton(packed.folder)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    stored = stored_names(model, DenseView(packed))
    found = (stored.get(f"{path_of(model, end)}.weight", "") for end in ends)
    return frozenset(name.removesuffix(".weight") for name in found if name)


def four_bits(packed: PackedCheckpoint, dtype: torch.dtype, dense: Container[str]) -> Scheme | None:
    """How the linears of a folder stay in 4 bits; None if they cannot.

    Args:
        packed: the folder.
        dtype: in which vLLM computes.
        dense: what vLLM takes dense, from `ends_of`.
    """
    layouts = [layout for name, layout in packed.layouts.items() if name not in dense]
    groups = {layout.group or 0 for layout in layouts}
    if dtype not in FOUR_BIT_DTYPES or len(groups) != 1 or 0 in groups:
        return None
    group = groups.pop()
    # vLLM's kernels on CPUs take no other sides, and a half group would need a scale of its own
    whole = all(
        layout.shape[1] % group == 0 and not any(side % CPU_MULTIPLE for side in layout.shape)
        for layout in layouts
    )
    if not whole or any(layout.transposed for layout in layouts):
        return None
    return Scheme(4, dtype, group)
