"""Installs a compressed checkpoint in a model: packed modules replace dense ones.

A dense checkpoint can be installed too, rounded to int8 on the way, for a model that only decodes.

`DenseView` shows a compressed checkpoint as a dense one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.models.architecture import linears_of
from secateur.models.block_files import StoredBlocks
from secateur.models.checkpoint import CheckpointReader, TensorEntry
from secateur.models.experts import OpenExperts, opened_experts
from secateur.models.opening import computed_dtype, open_weights
from secateur.models.skeleton import assign, fill_buffers, refuse_missing, stored_names
from secateur.quantization.groups import Scales
from secateur.quantization.int8 import quantize_rows
from secateur.runtime.formats import Layout, PartSpec, bitmask_parts, formats
from secateur.runtime.formats.kept import decode_values
from secateur.runtime.kernels import linear as inference
from secateur.runtime.kernels.dispatch import choose, kind_of
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.kernels.linear import InferenceLinear, PackedEmbedding, PackedLinear
from secateur.runtime.kernels.matrix import KernelMatrix, to_large_pages
from secateur.runtime.packed import PackedCheckpoint, is_packed

WORTH_IT = 0.9
"""A packed matrix stays packed unless a dense one is faster by more than this."""

READ = ".dt_proj"
"""The ends of paths of linears that Mamba 1 never calls: it multiplies by their weight."""

READ_ROWS = ("gemma4",)
"""Types of models whose code also reads the weight of the embedding: they put its row of padding
where a picture is."""


def matrix_of(parts: Mapping[str, Tensor], layout: Layout) -> KernelMatrix:
    """Checked parts of a matrix, in the form for the kernels."""
    if layout.grid is not None:
        scales = Scales(parts["weight_exponent"], parts["weight_scale"])
        if layout.format == "dense":
            codes = decode_values(parts["weight"], layout, layout.shape[1])
            return KernelMatrix.of_codes(codes, scales, layout.grid.group)
        mask, values = formats[layout.format].kept(parts, layout)
        # back in their places [out, in]; the kernels' own order of columns is made from that
        codes = torch.zeros(layout.shape, dtype=torch.int8)
        codes.numpy()[mask.numpy()] = values.numpy()
        return KernelMatrix.of_codes(codes, scales, layout.grid.group, mask)
    if layout.format == "dense":
        return KernelMatrix(parts["weight"], scale=parts.get("weight_scale"))
    bits = bitmask_parts(parts, layout)
    return KernelMatrix(
        bits["compressed"],
        bitmask=bits["bitmask"],
        scale=bits.get("weight_scale"),
        columns=layout.shape[1],
    )


def integers_of(
    parts: Mapping[str, Tensor], layout: Layout, bias: Tensor | None = None
) -> inference.IntegerLinear:
    """A linear in torch, of checked parts of a matrix of integers."""
    _, codes, scale = _stored_integers(parts, layout)
    scale = scale[:, 0] if layout.group is None else scale
    return inference.IntegerLinear(codes, scale, layout.group, bias)


def install(
    model: Any,
    packed: PackedCheckpoint,
    dtype: torch.dtype,
    *,
    expand: bool = False,
    kernels: bool = True,
    matrices_only: bool = False,
    only: tuple[str, ...] = ("",),
) -> list[str]:
    """Fill a skeleton from a compressed checkpoint.

    Args:
        model: a transformers model with parameters on meta, built from the configuration, with its
            experts opened.
        packed: the checkpoint.
        dtype: what the model computes in.
        expand: fill the existing dense modules; no activation is rounded.
        kernels: multiply by kernels if there are any; else by torch, which needs integers for the
            same numbers and expands other matrices into the existing modules.
        matrices_only: install only packed matrices. The caller loads the rest and must not find
            dense modules of packed matrices; so without kernels, packed modules hold them expanded.
        only: beginnings of the names of parameters to fill. The caller settles if not all are.

    Returns:
        The paths of the replaced modules; their stored names may differ.

    Raises:
        CheckpointError: a file is damaged, or does not fit the configuration.
    """
    view = DenseView(packed, dtype)
    kernels = kernels and kernel_info().tier != "none"
    replaced, found = kernels or matrices_only, list[str]()
    head_module: InferenceLinear | None = None
    names, embedding_at, tied = places_of(model, view)
    for parameter, stored in names.items():
        if not parameter.startswith(only):
            continue
        path, owner = parameter.rpartition(".")[0], stored.removesuffix(".weight")
        layout = packed.layouts.get(owner) if stored.endswith(".weight") else None
        if layout is None or expand:
            if layout is not None or not matrices_only:
                assign(model, parameter, view.read(stored).to(dtype))
            continue
        parts, old = packed.parts(owner), model.get_submodule(path)
        module: nn.Module | None = None
        if path == embedding_at:
            rows = _rows_of(parts, layout, dtype, kernels)
            if replaced:
                read = model.config.model_type in READ_ROWS
                kind = inference.ReadEmbedding if read else PackedEmbedding
                module = kind(rows, dtype, _factor_of(old))
            if tied and (replaced or layout.integers):
                head_module = PackedLinear(rows)
                if layout.integers and not rows.integers:  # the rows had to be expanded
                    head_module = _linear_of(parts, layout, dtype, kernels)
        elif path.endswith(READ):
            if replaced:
                module = inference.ReadLinear(KernelMatrix(view.read(stored).to(dtype)), old.bias)
        elif replaced or layout.integers:
            check_replaceable(old, path)
            module = _linear_of(parts, layout, dtype, kernels, old.bias)
        if module is None:
            assign(model, parameter, view.read(stored).to(dtype))
        else:
            found.append(path)
            replace(model, path, module)
    if not matrices_only:
        fill_buffers(model, view)
    if tied:
        tie_head(model, embedding_at, tied, head_module)
    if "" in only:
        settle(model, dtype)
        finish(model, dtype)
    return found


def finish(model: Any, dtype: torch.dtype) -> None:
    """What a filled model needs besides its parameters."""
    if not any(p.is_floating_point() for p in model.parameters()):
        # transformers reads the dtype off a parameter, and OLMo's norms have none
        empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        model.register_parameter("no_weights", empty)
    for module in model.modules():
        if isinstance(module, OpenExperts):
            module.call_idle = False


def install_rounded(model: Any, reader: CheckpointReader) -> None:
    """Fill a skeleton from a dense checkpoint, its matrices rounded to int8 one after the other.

    Routers and gates of one output stay as they are stored.

    Args:
        model: a skeleton of a family that `layer_forms.FORMS` names, with its experts opened.
        reader: the checkpoint.

    Raises:
        CheckpointError: the checkpoint does not fit the configuration.
        NumericalError: a weight is NaN or infinite.
    """
    names, embedding_at, tied = places_of(model, reader)
    linears, embedding = _decoded_linears(model), model.get_input_embeddings()
    for parameter in [name for name, _ in model.named_parameters() if name != tied]:
        path, _, part = parameter.rpartition(".")
        value = reader.read(names[parameter])
        if part == "weight" and path == embedding_at:
            packed = PackedEmbedding(rounded(value), torch.bfloat16, _factor_of(embedding))
            replace(model, path, packed)
        elif part == "weight" and path in linears:
            replace(model, path, PackedLinear(rounded(value), linears[path].bias))
        else:
            assign(model, parameter, value)
    fill_buffers(model, reader)
    if tied:
        head = PackedLinear(model.get_input_embeddings().matrix)
        tie_head(model, embedding_at, tied, head)
    to_large_pages(_matrices_in(model))


@contextmanager
def rounded_matrices(model: Any) -> Iterator[None]:
    """Matrices of int8 in the place of those of a loaded model, for a while.

    Args:
        model: of a family that `layer_forms.FORMS` names, on the CPU.
    """
    with opened_experts(model):
        linears = _decoded_linears(model)
        try:
            for path, linear in linears.items():
                matrix = rounded(linear.weight.detach())
                replace(model, path, PackedLinear(matrix, linear.bias))
            to_large_pages(_matrices_in(model))
            yield
        finally:
            for path, linear in linears.items():
                replace(model, path, linear)


def rounded(weight: Tensor) -> KernelMatrix:
    """A matrix [out, in] in 8 bits, with a scale for each row."""
    codes, scale = quantize_rows(weight)
    return KernelMatrix(codes, scale=scale)


def _decoded_linears(model: Any) -> dict[str, Any]:
    """The linears that make up nearly all of the decoding: those of the layers, and the head."""
    head = model.get_output_embeddings()
    layers = enumerate(model.model.layers)
    found = (linears_of(layer, f"model.layers.{index}") for index, layer in layers)
    own: dict[str, Any] = {
        linear.name: linear.module for layer in found for linear in layer.values()
    }
    return {**own, path_of(model, head): head}


def _matrices_in(model: Any) -> Iterator[KernelMatrix]:
    packed = (PackedLinear, PackedEmbedding)
    return (module.matrix for module in model.modules() if isinstance(module, packed))


def places_of(model: Any, reader: CheckpointReader) -> tuple[dict[str, str], str, str]:
    """Where a checkpoint stores the parameters of a skeleton.

    Returns:
        `stored_names`; the path of the embedding; and the parameter of a head that shares the
        embedding's weight and is not stored, else empty.

    Raises:
        CheckpointError: the checkpoint does not fit the configuration.
    """
    names = stored_names(model, reader)
    head = f"{path_of(model, model.get_output_embeddings())}.weight"
    tied = head != ".weight" and head not in names and model.config.tie_word_embeddings
    needed = (name for name, _ in model.named_parameters() if not tied or name != head)
    refuse_missing(needed, names, reader.folder)
    return names, path_of(model, model.get_input_embeddings()), head if tied else ""


def _factor_of(embedding: nn.Module) -> float | None:
    """The factor that Gemma multiplies its embeddings by."""
    factor: Any = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return factor and float(factor)


def _linear_of(
    parts: Mapping[str, Tensor],
    layout: Layout,
    dtype: torch.dtype,
    kernels: bool,
    bias: Tensor | None = None,
) -> InferenceLinear:
    """A linear of checked parts, multiplied by the format's product, our kernels or torch."""
    if kernels and layout.blocks is None:
        product = inference.product_of(layout, torch.device("cpu"))
        if product is not None:
            return product.linear(parts, layout, bias, torch.device("cpu"))
        return PackedLinear(matrix_of(parts, layout), bias)
    if layout.integers:
        return integers_of(parts, layout, bias)
    return PackedLinear(KernelMatrix(formats[layout.format].unpack(parts, layout).to(dtype)), bias)


def _rows_of(
    parts: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype, kernels: bool
) -> KernelMatrix:
    """The matrix of an embedding, whose rows are read alone."""
    if kernels and layout.format == "dense" and layout.blocks is None:
        return matrix_of(parts, layout)
    return KernelMatrix(formats[layout.format].unpack(parts, layout).to(dtype))


def check_replaceable(old: Any, path: str) -> None:
    """Refuse a packed matrix of a module that is no linear."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(old, (nn.Linear, Conv1D)):
        raise CheckpointError(
            f"{path} is stored packed, and is a {type(old).__name__}; only linears and the "
            "embedding can stay packed",
            remedy="use `secateur decompress` and load the result",
        )


def path_of(model: Any, sought: nn.Module | None) -> str:
    """The name of a module within a model; empty if it is not in the model."""
    return next((name for name, module in model.named_modules() if module is sought), "")


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Replace a module by another."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner) if owner else model, leaf, module)


def tie_head(model: Any, embedding_at: str, tied: str, module: InferenceLinear | None) -> None:
    """Give the head the matrix of the embedding: in a module of its own, or as its weight.

    Args:
        model: the model.
        embedding_at: the path of its embedding.
        tied: from `places_of`, not empty.
        module: the head; None to share the weight.
    """
    head_at = tied.removesuffix(".weight")
    old = model.get_submodule(head_at)
    if module is None:
        old.weight = model.get_submodule(embedding_at).weight
        return
    module.bias = getattr(old, "bias", None)
    replace(model, head_at, module)
    # transformers has nothing to tie any more
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def settle(model: Any, dtype: torch.dtype) -> None:
    """Measure each kind of packed linear once, and choose the faster way.

    A kind that is clearly faster dense is made dense, so a packed model is not slower than an
    unpacked one. Integers stay integers, so that no number changes.
    """
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if kernel_info().tier == "none":
        for module in linears:
            module.kernel_up_to = None
        return
    # the kernels know no float16 activations; `PackedLinear.product` gives them float32
    activations = torch.float32 if dtype == torch.float16 else dtype
    kinds: dict[tuple[object, ...], list[PackedLinear]] = defaultdict(list)
    for module in linears:
        kinds[kind_of(module.matrix, activations)].append(module)
    total = sum(module.matrix.nbytes for module in linears)
    for modules in kinds.values():
        others = total - sum(m.matrix.nbytes for m in modules)
        choice = choose([m.matrix for m in modules], activations, others)
        if choice.speedup_over_dense < WORTH_IT and modules[0].matrix.packed:
            for module in modules:
                module.matrix = module.matrix.dense(dtype)
            # another kind now, with its own best number of tokens
            choice = choose([m.matrix for m in modules], activations, others)
        for module in modules:
            module.kernel_up_to = choice.kernel_up_to
    to_large_pages(_matrices_in(model))


Integers = tuple[int, Tensor, Tensor]
"""A matrix of integers with scales: the bits of one, int8 [out, in], float32 [out, groups]."""


def _stored_integers(parts: Mapping[str, Tensor], layout: Layout) -> Integers:
    """The integers of checked parts of a matrix."""
    mask, values = formats[layout.format].kept(parts, layout)
    codes = torch.zeros(layout.shape, dtype=torch.int8).masked_scatter_(mask, values)
    if layout.grid is None:
        return 8, codes, parts["weight_scale"][:, None]
    scales = Scales(parts["weight_exponent"], parts["weight_scale"])
    return layout.grid.bits, codes, scales.values


class DenseView(CheckpointReader):
    """Reads a compressed checkpoint like a dense one: a matrix is unpacked when it is read.

    Names, shapes and dtypes are those of the source checkpoint. Matrices of integers or blocks are
    returned in the dtype that `config.json` names, or in `computed`.

    Args:
        packed: the compressed checkpoint.
        computed: the dtype for matrices of integers or blocks; None for that of `config.json`.

    Attributes:
        entries: the dense tensors; their offsets mean nothing.
    """

    def __init__(self, packed: PackedCheckpoint, computed: torch.dtype | None = None) -> None:
        self.packed, self.folder, self.files = packed, packed.folder, packed.files
        self.computed = computed or computed_dtype(packed.folder)
        self.entries = {}
        for name in packed.order:
            layout = packed.layouts.get(name)
            if layout is None:
                self.entries[name] = _entry_of(packed.entries[name].file, packed.specs[name])
            else:
                file = packed.entries[f"{name}.{packed.parts_of(name)[0]}"].file
                self.entries[f"{name}.weight"] = _entry_of(file, self.dense_spec(layout))

    def dense_spec(self, layout: Layout) -> PartSpec:
        """Dtype and shape of the matrix in the dense checkpoint."""
        dtype = self.computed if layout.coded else layout.dtype
        return PartSpec(dtype, layout.shape[::-1] if layout.transposed else layout.shape)

    def layout_of(self, name: str) -> dict[str, Any] | None:
        """The layout of a dense tensor; None if it is stored unchanged."""
        layout = self.packed.layouts.get(name.removesuffix(".weight"))
        return None if layout is None else layout.to_json()

    def read(self, name: str) -> Tensor:
        """One dense tensor, in memory of its own.

        Raises:
            CheckpointError: damaged.
        """
        owner = name.removesuffix(".weight")
        layout = self.packed.layouts.get(owner)
        if layout is None or owner == name:
            return self.packed.read(name)
        weight = formats[layout.format].unpack(self.packed.parts(owner), layout)
        # integers come in float32, and the dense checkpoint has a narrower dtype
        weight = weight.to(self.entries[name].dtype)
        return weight.t().contiguous() if layout.transposed else weight

    def integers(self, name: str) -> Integers | None:
        """A matrix as it is stored, if it is stored as integers; None for any other tensor.

        The dense matrix in the dtype of the computation may have fewer bits than scale times
        integer.

        Raises:
            CheckpointError: damaged.
        """
        owner = name.removesuffix(".weight")
        layout = self.packed.layouts.get(owner)
        if layout is None or owner == name or not layout.integers:
            return None
        return _stored_integers(self.packed.parts(owner), layout)

    def blocks(self, name: str) -> StoredBlocks | None:
        """The blocks of a matrix that is stored in blocks of llama.cpp; None for any other."""
        owner = name.removesuffix(".weight")
        layout = self.packed.layouts.get(owner)
        if layout is None or owner == name or layout.blocks is None:
            return None
        packed = self.packed.parts(owner)["blocks"]
        return StoredBlocks(layout.values, packed, layout.transposed)

    def mapped(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors one after the other, read, since packed ones cannot be mapped."""
        for name in names:
            yield name, self.read(name)


def _entry_of(file: Path, spec: PartSpec) -> TensorEntry:
    """An entry for a dense tensor that no file contains."""
    return TensorEntry(file, 0, spec.nbytes, spec.dtype, spec.shape)


def open_checkpoint(folder: Path) -> CheckpointReader:
    """A reader of dense tensors for a folder, compressed or stored in any form, or plain.

    Raises:
        CheckpointError: a file is damaged or missing, or the form is not read.
    """
    return DenseView(PackedCheckpoint(folder)) if is_packed(folder) else open_weights(folder)
