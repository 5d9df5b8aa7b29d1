"""Loads a compressed checkpoint as a transformers model whose linear layers stay packed.

On a GPU, pruned linear layers stay in the bitmask format. Other matrices are dense in the dtype of
the computation. Every kind of matrix is measured once, and is dense too where torch's dense product
is faster for one token. Activations that meet integers are rounded on every way; a dense matrix of
integers keeps them, and torch multiplies in float32.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import KernelError, RecipeError, install_extra
from secateur.machine import reused_pages
from secateur.models import skeleton
from secateur.models.configuration import trusted_folder
from secateur.models.experts import OpenExperts
from secateur.models.opening import computed_dtype, load_whole
from secateur.quantization.groups import Scales
from secateur.runtime import install
from secateur.runtime.formats import Layout, formats
from secateur.runtime.kernels import linear as inference
from secateur.runtime.kernels.dispatch import KernelChoice
from secateur.runtime.kernels.linear import InferenceLinear, PackedEmbedding
from secateur.runtime.packed import PackedCheckpoint, is_packed
from secateur.runtime.sampling import generation_config


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    expand: bool = False,
    kernels: bool = True,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint, compressed or not, in eval mode.

    Every file is verified first. Kernels multiply packed matrices without expanding them. Without
    kernels (`secateur.kernel_info()`) torch multiplies them, expanded. On a GPU, pruned linears
    stay in the bitmask format where that is faster (Triton is needed); others are expanded.

    Activations that meet integers are rounded to int8 in groups of 64, as the folder says,
    whatever multiplies them: numbers are the same to the order of sums. Only `expand` rounds none.

    Args:
        folder: written by `secateur compress` or transformers.
        dtype: of the computation; None for the one in `config.json`. float32 with bfloat16 values
            is exact, and needs no more memory for packed matrices.
        expand: fill plain dense linears instead, to train or to compare. No activation is rounded.
        kernels: False lets torch multiply, also where there are kernels.
        device: the CPU or a GPU.
        trust_remote_code: whether model code that comes with the checkpoint may run.

    Returns:
        A transformers model; `generate` and all other methods work as usual. `save_pretrained`
        writes a dense checkpoint if all modules are dense, and raises CheckpointError if any is
        packed.

    Raises:
        CheckpointError: a file is damaged, or does not fit the configuration.
        KernelError: there is no Triton for a GPU.
        RecipeError: torch knows no such device, or the dtype is none of torch's.
    """
    from secateur.runtime.quantizer import refuse_saving

    try:
        folder, device = trusted_folder(folder, trust_remote_code), torch.device(device)
    except RuntimeError as error:
        raise RecipeError(
            f"there is no device {device!r}", remedy="give 'cpu', 'cuda' or 'cuda:N'"
        ) from error
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise RecipeError(f"dtype is {dtype!r}", remedy="give a dtype, such as torch.bfloat16")
    if not is_packed(folder):
        return load_whole(folder, device, dtype=dtype)
    packed = PackedCheckpoint(folder)
    dtype = dtype or computed_dtype(folder)
    # on meta: every parameter is filled once, from the files
    model = skeleton.build_skeleton(folder, dtype=dtype)
    on_gpu = device.type == "cuda" and kernels and not expand
    if on_gpu and find_spec("triton") is None:
        raise KernelError(
            "Triton is not installed", remedy=f"{install_extra('gpu')}, or expand=True"
        )
    with reused_pages():  # release the memory of measuring and unpacking
        if on_gpu:
            install_on_gpu(model, packed, dtype, device)
        else:
            install.install(model, packed, dtype, expand=expand, kernels=kernels)
            if device.type != "cpu":
                model.to(device)
    model.config.dtype = dtype
    packed_modules = (InferenceLinear, PackedEmbedding, OpenExperts)
    if any(isinstance(x, packed_modules) for x in model.modules()):
        refuse_saving(model)  # transformers would lose weights, or names of experts
    else:
        del model.config.quantization_config
    with skeleton.quiet_transformers():
        settings = generation_config(folder)
    if settings is not None:
        model.generation_config = settings
    return model.eval()


def install_on_gpu(
    model: Any, packed: PackedCheckpoint, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Fill a skeleton from a compressed checkpoint, and move it to a device.

    Args:
        model: a transformers model with parameters on meta, its experts opened.
        packed: the checkpoint.
        dtype: what the model computes in.
        device: a GPU; the CPU only with Triton's interpreter.

    Returns:
        The paths of the linears that stay packed.

    Raises:
        CheckpointError: a file is damaged, or does not fit the configuration.
    """
    from secateur.runtime.kernels.gpu.linear import GpuLinear, measured
    from secateur.runtime.kernels.gpu.matrix import GpuMatrix

    # Everything is put together on the CPU. One move at the end then keeps tied weights tied.
    view = install.DenseView(packed, dtype)
    names, embedding_at, head = install.places_of(model, view)
    head_module = None
    choices: dict[tuple[object, ...], KernelChoice] = {}
    found: list[str] = []

    def linear_of(owner: str, layout: Layout, bias: Tensor | None) -> InferenceLinear | None:
        """The fastest linear of a packed matrix; None if that is a dense one."""
        product = inference.product_of(layout, device)
        if product is not None:
            return product.linear(packed.parts(owner), layout, bias, device)
        if layout.format != "dense":
            parts = packed.parts(owner)
            mask, values = formats[layout.format].kept(parts, layout)
            scale, scales = parts.get("weight_scale"), None
            if layout.grid is not None:
                scale, scales = None, Scales(parts["weight_exponent"], parts["weight_scale"])
            matrix = GpuMatrix.of(
                mask, values, scale=scale, scales=scales, group=layout.group or 0, device=device
            )
            # the matrices of a kind take the same time, so one of them is measured
            share = round(10 * matrix.nonzeros / (matrix.shape[0] * matrix.shape[1]))
            kind = (matrix.shape, matrix.values.dtype, matrix.group, share)
            if kind not in choices:
                with torch.cuda.device_of(matrix.mask):
                    choices[kind] = measured(matrix, dtype)
            if choices[kind].speedup_over_dense >= 1:
                up_to = choices[kind].kernel_up_to
                return GpuLinear(matrix, bias, up_to, rounds_inputs=layout.integers)
        # integers stay integers also where they are dense, so that no number changes
        return install.integers_of(packed.parts(owner), layout, bias) if layout.integers else None

    for parameter, stored in names.items():
        path, owner = parameter.rpartition(".")[0], stored.removesuffix(".weight")
        layout = packed.layouts.get(owner) if stored.endswith(".weight") else None
        module = model.get_submodule(path)
        if layout is not None and isinstance(module, nn.Linear):
            linear = linear_of(owner, layout, module.bias)
            if linear is not None:
                install.replace(model, path, linear)
                found += [] if isinstance(linear, inference.IntegerLinear) else [path]
                continue
        if layout is not None and layout.integers and path == embedding_at and head:
            head_module = install.integers_of(packed.parts(owner), layout)
        skeleton.assign(model, parameter, view.read(stored).to(dtype))
    skeleton.fill_buffers(model, view)
    if head:
        install.tie_head(model, embedding_at, head, head_module)
    model.to(device)
    return found
