"""Compressed folders in vLLM: which form their matrices have in memory, and how they are read.

A folder whose matrices are all int4, int3 or int2 in groups of one size stays in 4 bits: its
integers and scales become those of compressed-tensors (w4a16), which vLLM's own kernels multiply.
This drops no bit and rounds no activation. All others become dense, one matrix at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from secateur.plugins.vllm.reading import FOUR_BIT_DTYPES, ends_of, folder_of, four_bits, tensors_of
from secateur.runtime.packed import QUANT_METHOD, PackedCheckpoint


class PackedQuantization(QuantizationConfig):
    """The `quantization_config` of a compressed folder, as vLLM sees it.

    Attributes:
        inner: how vLLM multiplies matrices that stay in 4 bits; None where none does.
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
        ends = ends_of(packed)
        scheme = four_bits(packed, torch.bfloat16, ends)
        if scheme is not None:
            plain = {n.removesuffix(".weight") for n in packed.order if n.endswith(".weight")}
            # `lm_head` also where the head is tied, so not stored: vLLM has a module for it
            ignored = tuple(sorted({*plain, *ends, "lm_head"}))
            self.inner = CompressedTensorsConfig.from_config(scheme.to_json(ignored))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as the model of vLLM does."""
        if self.inner is not None:
            self.inner.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How a layer is multiplied; vLLM asks for every layer while it builds the model."""
        # while it builds, the default dtype of torch is that of the computation
        if self.inner is not None and torch.get_default_dtype() in FOUR_BIT_DTYPES:
            return self._in_four_bits(layer, prefix)
        return _dense(layer)

    def _in_four_bits(self, layer: torch.nn.Module, prefix: str) -> Any:
        """As compressed-tensors multiplies it; a layer that it ignores is dense there too."""
        # q, k and v are one module in vLLM, and only this mapping tells how it is made of three
        self.inner.packed_modules_mapping = self.packed_modules_mapping
        return self.inner.get_quant_method(layer, prefix)


def _dense(layer: torch.nn.Module) -> UnquantizedLinearMethod | None:
    """A dense product for linears; None leaves embeddings and norms to vLLM."""
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class FolderLoader(DefaultModelLoader):
    """Reads a folder of secateur, compressed or not."""

    def download_model(self, model_config: Any) -> None:
        """Fetch a model of the hub."""
        folder_of(model_config.model, model_config.revision)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, under the name that the dense checkpoint has for it."""
        self.counter_before_loading_weights = time.perf_counter()
        folder = folder_of(model_config.model, model_config.revision)
        yield from tensors_of(folder, model_config.dtype)
