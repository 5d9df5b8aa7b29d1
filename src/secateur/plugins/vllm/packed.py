"""Compressed folders in vLLM: which form their matrices have in memory, and how they are read.

A folder whose matrices are all int4 or int3 in groups of one size stays in 4 bits: its integers and
scales become those of compressed-tensors (w4a16), which vLLM's own kernels multiply. This drops no
bit and rounds no activation. All other folders become dense, one matrix at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from secateur.exporting.compressed_tensors import CPU_MULTIPLE, Scheme
from secateur.models.sources import resolve
from secateur.quantization.groups import GroupGrid
from secateur.runtime.dense_view import DenseView, open_checkpoint
from secateur.runtime.packed import QUANT_METHOD, PackedCheckpoint, is_packed

__all__ = ["FolderLoader", "PackedQuantization", "four_bits", "tensors_of"]

FOUR_BIT_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes in which vLLM's kernels multiply 4 bits."""


class PackedQuantization(QuantizationConfig):
    """The `quantization_config` of a compressed folder, as vLLM sees it.

    Attributes:
        inner: how vLLM multiplies matrices that stay in 4 bits; None where all become dense.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = None

    def get_name(self) -> str:
        """The name in `config.json`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of a computation."""
        return [torch.float32, *FOUR_BIT_DTYPES]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedQuantization:
        """Before the folder is known."""
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Look into the folder."""
        packed = PackedCheckpoint(folder_of(model_name, revision))
        scheme = four_bits(packed, torch.bfloat16)
        if scheme is not None:
            plain = {n.removesuffix(".weight") for n in packed.order if n.endswith(".weight")}
            ignored = tuple(sorted({*plain, "lm_head"}))
            self.inner = CompressedTensorsConfig.from_config(scheme.to_json(ignored))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as the model of vLLM does."""
        if self.inner is not None:
            self.inner.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How a layer is multiplied."""
        if self.inner is not None and torch.get_default_dtype() in FOUR_BIT_DTYPES:
            self.inner.packed_modules_mapping = self.packed_modules_mapping
            return self.inner.get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class FolderLoader(DefaultModelLoader):
    """Reads a folder of secateur, compressed or not."""

    def download_model(self, model_config: Any) -> None:
        """Fetch a model of the hub."""
        folder_of(model_config.model, model_config.revision)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, under the name that the dense checkpoint has for it."""
        self.counter_before_loading_weights = time.perf_counter()
        yield from tensors_of(
            folder_of(model_config.model, model_config.revision), model_config.dtype
        )


def folder_of(model: str, revision: str | None) -> Path:
    """The folder of a model: itself, or a download of the hub."""
    return resolve(f"{model}@{revision}" if revision else model).folder


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
    scheme = four_bits(packed, dtype)
    view = DenseView(packed, computed=dtype)
    for name in view.entries:
        owner = name.removesuffix(".weight")
        weight = view.read(name)
        if scheme is not None and owner in packed.layouts and name != owner:
            grid = GroupGrid(scheme.bits, packed.layouts[owner].group or 0)
            codes, scales = grid.quantize(weight)
            yield from scheme.tensors(owner, codes, scales.values.to(dtype))
        else:
            yield name, weight


def four_bits(packed: PackedCheckpoint, dtype: torch.dtype) -> Scheme | None:
    """How the matrices of a folder stay in 4 bits; None if they cannot."""
    layouts = packed.layouts.values()
    groups = {layout.group or 0 for layout in layouts}
    if dtype not in FOUR_BIT_DTYPES or len(groups) != 1 or 0 in groups:
        return None
    group = groups.pop()
    whole = all(
        layout.shape[1] % group == 0 and not any(side % CPU_MULTIPLE for side in layout.shape)
        for layout in layouts
    )
    if not whole or any(layout.transposed for layout in layouts):
        return None
    return Scheme(4, packed=True, group=group, activations=None, scale=dtype)
