"""Compressed folders in vLLM: which form their matrices have in memory, and how they are read.

A folder whose matrices are all int4, int3 or int2 in groups of one size stays in 4 bits: its
integers and scales become those of compressed-tensors (w4a16), which vLLM's own kernels multiply.
This drops no bit and rounds no activation. On a GPU, matrices of other folders stay in the bitmask
format where that is faster (`bitmask.py`). All others become dense, one matrix at a time.

Linears of vLLM whose weight stays in the bitmask format in the memory of a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from secateur.plugins.vllm.reading import FOUR_BIT_DTYPES, ends_of, folder_of, four_bits, tensors_of
from secateur.runtime.load import gpu_matrix, values_of
from secateur.runtime.packed import QUANT_METHOD, PackedCheckpoint


class PackedQuantization(QuantizationConfig):
    """The `quantization_config` of a compressed folder, as vLLM sees it.

    Attributes:
        inner: how vLLM multiplies matrices that stay in 4 bits; None where none does.
        packed: the folder, when it is known.
        choices: how matrices of each kind are multiplied that stay in the bitmask format.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = None
        self.packed: PackedCheckpoint | None = None
        self.choices: Choices = {}

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
        packed = self.packed = PackedCheckpoint(folder_of(model_name, revision))
        ends = ends_of(packed)
        scheme = four_bits(packed, torch.bfloat16, ends)
        if scheme is not None:
            plain = {n.removesuffix(".weight") for n in packed.order if n.endswith(".weight")}
            ignored = tuple(sorted({*plain, *ends, "lm_head"}))
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
        if not isinstance(layer, LinearBase):
            return None
        merged, found = self.packed_modules_mapping, None
        if self.packed is not None:
            found = _bitmask_linear(self.packed, prefix, merged, self.choices)
        return found or UnquantizedLinearMethod()


class FolderLoader(DefaultModelLoader):
    """Reads a folder of secateur, compressed or not."""

    def download_model(self, model_config: Any) -> None:
        """Fetch a model of the hub."""
        folder_of(model_config.model, model_config.revision)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, under the name that the dense checkpoint has for it."""
        self.counter_before_loading_weights = time.perf_counter()
        folder = folder_of(model_config.model, model_config.revision)
        methods = (getattr(module, "quant_method", None) for module in model.modules())
        held = [m.owners for m in methods if isinstance(m, BitmaskLinear)]  # read their own
        besides = frozenset(f"{owner}.weight" for owners in held for owner in owners)
        yield from tensors_of(folder, model_config.dtype, besides=besides)


Choices = dict[tuple[object, ...], Any]
"""How matrices of each kind are multiplied, once it was measured."""


def _bitmask_linear(
    packed: PackedCheckpoint, prefix: str, merged: Mapping[str, Sequence[str]], choices: Choices
) -> BitmaskLinear | None:
    """How a layer of vLLM is multiplied; None if its weight becomes dense.

    It becomes dense on a CPU, where several GPUs share it, without Triton, and where a stored
    matrix is dense or matrices that vLLM merges have different kinds of values.
    """
    parent, _, leaf = prefix.rpartition(".")
    owners = [f"{parent}.{part}" for part in merged.get(leaf, [leaf])]
    layouts = [packed.layouts[owner] for owner in owners if owner in packed.layouts]
    sparse = len(layouts) == len(owners) and all(x.format != "dense" for x in layouts)
    if not (sparse and runs_here() and len({values_of(x) for x in layouts}) == 1):
        return None
    return BitmaskLinear(packed, owners, choices)


def runs_here() -> bool:
    """Whether there is one GPU of NVIDIA, and Triton."""
    alone = get_tensor_model_parallel_world_size() == 1
    return bool(current_platform.is_cuda()) and alone and find_spec("triton") is not None


class BitmaskLinear(LinearMethodBase):
    """Multiplies stored matrices, one below the other, with the Triton kernel.

    The matrices are read from the folder when vLLM has loaded all other weights, so vLLM never has
    a dense one. Kinds of matrices that are faster dense become dense then.

    Args:
        packed: the folder.
        owners: names of the matrices.
        choices: of all layers.
    """

    def __init__(self, packed: PackedCheckpoint, owners: Sequence[str], choices: Choices) -> None:
        super().__init__()
        self.packed, self.owners, self.choices = packed, tuple(owners), choices
        self.dtype = torch.bfloat16
        self.linear: nn.Module | None = None
        self.dense: Tensor | None = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Nothing is made yet; vLLM says here in which dtype it computes."""
        self.dtype = params_dtype

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read the matrices, and measure if they are the first of their kind."""
        from secateur.runtime.kernels.gpu.linear import GpuLinear, measured

        device = torch.device(current_platform.device_type)
        matrix = gpu_matrix(self.packed, self.owners, device)
        kind = (matrix.shape, values_of(self.packed.layouts[self.owners[0]]))
        if kind not in self.choices:
            self.choices[kind] = measured(matrix, self.dtype)
        choice = self.choices[kind]
        if choice.gain >= 1:
            self.linear = GpuLinear(matrix, None, choice.kernel_up_to)
        else:
            self.dense = matrix.dense(self.dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product and its bias."""
        if self.dense is not None:
            return functional.linear(x, self.dense, bias)
        assert self.linear is not None, "vLLM multiplies before it has loaded all weights"
        y: Tensor = self.linear(x)
        return y if bias is None else y + bias
