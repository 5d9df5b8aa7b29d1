"""Linears of vLLM whose weight stays in the bitmask format in the memory of a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.platforms import current_platform

from secateur.runtime.on_gpu import gpu_matrix, values_of
from secateur.runtime.packed import PackedCheckpoint

Choices = dict[tuple[object, ...], Any]
"""How matrices of each kind are multiplied, once it was measured."""


def bitmask_linear(
    packed: PackedCheckpoint, prefix: str, merged: Mapping[str, Sequence[str]], choices: Choices
) -> BitmaskLinear | None:
    """How a layer of vLLM is multiplied; None if its weight becomes dense.

    It becomes dense on a CPU, where several GPUs share it, without Triton, and where a stored
    matrix is dense or matrices that vLLM merges have different kinds of values.

    Args:
        packed: the folder.
        prefix: the name of the layer.
        merged: the stored linears in each that vLLM merges, by the last part of their names.
        choices: shared by all layers.
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


def held_by(model: nn.Module) -> frozenset[str]:
    """The stored weights that a model reads itself, so that vLLM need not load them."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    found = [m.owners for m in methods if isinstance(m, BitmaskLinear)]
    return frozenset(f"{owner}.weight" for owners in found for owner in owners)
