"""Installs a compressed checkpoint in a model: packed modules replace dense ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.models.open_experts import OpenExperts
from secateur.models.skeleton import assign, fill_buffers, refuse_missing, stored_names
from secateur.quantization.groups import Scales
from secateur.runtime.dense_view import DenseView
from secateur.runtime.formats import Layout, bitmask_parts, formats
from secateur.runtime.formats.kept import decode_values
from secateur.runtime.kernels.dispatch import choose, kind_of
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.linear import PackedEmbedding, PackedLinear, ReadLinear
from secateur.runtime.packed import PackedCheckpoint

__all__ = ["install", "matrix_of"]

WORTH_IT = 0.9
"""A packed matrix stays packed unless a dense one is faster by more than this."""

READ = ".dt_proj"
"""The ends of paths of linears that Mamba 1 never calls: it multiplies by their weight."""


def matrix_of(parts: Mapping[str, Tensor], layout: Layout) -> KernelMatrix:
    """Checked parts of a matrix, in the form for the kernels."""
    if layout.grid is not None:
        return matrix_of_codes(parts, layout, layout.grid.group)
    if layout.format == "dense":
        return KernelMatrix(parts["weight"], scale=parts.get("weight_scale"))
    bits = bitmask_parts(parts, layout)
    return KernelMatrix(
        bits["compressed"],
        bitmask=bits["bitmask"],
        scale=bits.get("weight_scale"),
        columns=layout.shape[1],
    )


def matrix_of_codes(parts: Mapping[str, Tensor], layout: Layout, group: int) -> KernelMatrix:
    """`matrix_of` for int4 and int3."""
    scales = Scales(parts["weight_exponent"], parts["weight_scale"])
    if layout.format == "dense":
        codes = decode_values(parts["weight"], layout, layout.shape[1])
        return KernelMatrix.of_codes(codes, scales, group)
    mask, values = formats[layout.format].kept(parts, layout)
    codes = torch.zeros(layout.shape, dtype=torch.int8)
    codes.numpy()[mask.numpy()] = values.numpy()
    return KernelMatrix.of_codes(codes, scales, group, mask)


def install(
    model: Any,
    packed: PackedCheckpoint,
    dtype: torch.dtype,
    *,
    expand: bool = False,
    matrices_only: bool = False,
) -> list[str]:
    """Fill a skeleton from a compressed checkpoint.

    Args:
        model: a transformers model with parameters on meta, built from the configuration, with its
            experts opened.
        packed: the checkpoint.
        dtype: what the model computes in.
        expand: fill the existing dense modules, as always happens without kernels.
        matrices_only: install only packed matrices. The caller loads the rest and must not find
            dense modules of packed matrices; so without kernels, packed modules hold them expanded.

    Returns:
        The paths of the packed modules; their stored names may differ.

    Raises:
        CheckpointError: a file is damaged, or does not fit the configuration.
    """
    view = DenseView(packed, dtype)
    kernels = kernel_info().tier != "none"
    expand = expand or not (kernels or matrices_only)
    shared: dict[str, KernelMatrix] = {}
    embedding_at = path_of(model, model.get_input_embeddings())
    head_at = path_of(model, model.get_output_embeddings())
    names = stored_names(model, view)
    tied = f"{head_at}.weight" not in names and bool(model.config.tie_word_embeddings)
    head = f"{head_at}.weight" if tied else ""
    needed = (name for name, _ in model.named_parameters() if name != head)
    refuse_missing(needed, names, packed.folder)
    for parameter, stored in names.items():
        path, owner = parameter.rpartition(".")[0], stored.removesuffix(".weight")
        layout = packed.layouts.get(owner) if stored.endswith(".weight") else None
        if layout is None or expand:
            if layout is not None or not matrices_only:
                assign(model, parameter, view.read(stored).to(dtype))
            continue
        parts = packed.parts(owner)
        rows_alone = layout.format == "dense" and layout.grid is None  # as an embedding reads them
        if path.endswith(READ):
            matrix = KernelMatrix(view.read(stored).to(dtype))
        elif kernels and (path != embedding_at or rows_alone):
            matrix = matrix_of(parts, layout)
        else:
            matrix = KernelMatrix(formats[layout.format].unpack(parts, layout).to(dtype))
        shared[path] = matrix
        replace(model, path, packed_module(model, path, path == embedding_at, matrix, dtype))
    if not matrices_only:
        fill_buffers(model, view)
    if head_at and tied:
        tie_head(model, embedding_at, head_at, shared.get(embedding_at))
    settle(model, dtype)
    keep_dtype(model, dtype)
    for module in model.modules():
        if isinstance(module, OpenExperts):
            module.call_idle = False
    return list(shared)


def packed_module(
    model: Any, path: str, is_embedding: bool, matrix: KernelMatrix, dtype: torch.dtype
) -> nn.Module:
    """The replacement for a module whose weight is stored packed.

    Raises:
        CheckpointError: the module is neither a linear nor the embedding.
    """
    from transformers.pytorch_utils import Conv1D

    old = model.get_submodule(path)
    if is_embedding:
        # Gemma's embedding multiplies its output; others have no such attribute
        factor = getattr(old, "scalar_embed_scale", getattr(old, "embed_scale", None))
        return PackedEmbedding(matrix, dtype, None if factor is None else float(factor))
    if not isinstance(old, (nn.Linear, Conv1D)):
        raise CheckpointError(
            f"{path} is stored packed, and is a {type(old).__name__}; only linears and the "
            "embedding can stay packed",
            remedy="use `secateur decompress` and load the result",
        )
    return (ReadLinear if path.endswith(READ) else PackedLinear)(matrix, old.bias)


def path_of(model: Any, sought: nn.Module | None) -> str:
    """The name of a module within a model; empty if it is not in the model."""
    return next((name for name, module in model.named_modules() if module is sought), "")


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Replace a module by another."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner) if owner else model, leaf, module)


def tie_head(model: Any, embedding_at: str, head_at: str, matrix: KernelMatrix | None) -> None:
    """Make the head share the matrix of the embedding."""
    if matrix is None:
        weight = model.get_submodule(embedding_at).weight
        model.get_submodule(head_at).weight = weight
        return
    bias = getattr(model.get_submodule(head_at), "bias", None)
    replace(model, head_at, PackedLinear(matrix, bias))
    # transformers has nothing to tie any more
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def keep_dtype(model: Any, dtype: torch.dtype) -> None:
    """Give a model without parameters an empty one, because transformers reads its dtype off them.

    OLMo's norms have no weights, so a packed OLMo may have no parameter at all.
    """
    if not any(p.is_floating_point() for p in model.parameters()):
        empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        model.register_parameter("no_weights", empty)


def settle(model: Any, dtype: torch.dtype) -> None:
    """Measure each kind of packed linear once, and choose the faster way.

    A kind that is clearly faster dense is made dense, so a packed model is not slower than an
    unpacked one.
    """
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if kernel_info().tier == "none":
        for module in linears:
            module.kernel_up_to, module.blocks = 0, False
        return
    kinds: dict[tuple[object, ...], list[PackedLinear]] = defaultdict(list)
    for module in linears:
        kinds[kind_of(module.matrix, activations(dtype))].append(module)
    for modules in kinds.values():
        choice = choose([m.matrix for m in modules], activations(dtype))
        if choice.gain < WORTH_IT and modules[0].matrix.mask is not None:
            for module in modules:
                module.matrix = module.matrix.dense(dtype)
            choice = choose([m.matrix for m in modules], activations(dtype))
        for module in modules:
            module.kernel_up_to, module.blocks = choice.kernel_up_to, choice.blocks


def activations(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the kernels' activations for a model of this dtype."""
    return torch.float32 if dtype == torch.float16 else dtype
