"""Loads a compressed checkpoint as a transformers model whose linear layers stay packed.

On a GPU, matrices of integers stay integers, with their zeros. Pruned matrices of floats stay in
the bitmask format where that is faster for one token than torch's dense product; others are dense.
Every kind of matrix is measured once. Activations that meet integers are rounded on every way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.machine import reused_pages
from secateur.models import skeleton
from secateur.models.configuration import trusted_folder
from secateur.models.experts import OpenExperts
from secateur.models.opening import computed_dtype, load_whole
from secateur.models.targets import CheckpointTarget
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
    kernels (`secateur.kernel_info()`; on a GPU without Triton) torch multiplies them, expanded.

    Activations that meet integers are rounded to int8 in groups of 64, as the folder says,
    whatever multiplies them: numbers are the same to the order of sums, and on a GPU to the
    rounding of `dtype` where torch multiplies. Only `expand` rounds none.

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
    on_gpu = device.type == "cuda" and kernels and not expand and find_spec("triton") is not None
    with reused_pages():  # release the memory of measuring and unpacking
        if on_gpu:
            install_on_gpu(model, packed, dtype, device)
        else:
            here = device.type == "cpu"
            install.install(model, packed, dtype, expand=expand, kernels=kernels and here)
            if not here:
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
    model: Any,
    packed: PackedCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    only: tuple[str, ...] = ("",),
    choices: dict[tuple[object, ...], KernelChoice] | None = None,
) -> None:
    """Fill a skeleton from a compressed checkpoint, and move it to a device.

    Args:
        model: a transformers model with parameters on meta, its experts opened.
        packed: the checkpoint.
        dtype: what the model computes in.
        device: a GPU; the CPU only with Triton's interpreter.
        only: beginnings of the names of parameters to fill.
        choices: by kind of matrix, what earlier calls have measured; receives more.

    Raises:
        CheckpointError: a file is damaged, or does not fit the configuration.
    """
    from secateur.runtime.kernels.gpu.bitmask import GpuBitmask
    from secateur.runtime.kernels.gpu.integers import GpuIntegers
    from secateur.runtime.kernels.gpu.linear import GpuLinear, GpuMatrix, measured

    # Everything is put together on the CPU. One move at the end then keeps tied weights tied.
    view = install.DenseView(packed, dtype)
    names, embedding_at, head = install.places_of(model, view)
    head_module = None
    choices = {} if choices is None else choices

    def choice_of(matrix: GpuMatrix) -> KernelChoice:
        """The choice for a kind of matrix: they take the same time, so one of them is measured."""
        if matrix.kind not in choices:
            choices[matrix.kind] = measured(matrix, dtype, device)
        return choices[matrix.kind]

    def linear_of(owner: str, layout: Layout, bias: Tensor | None = None) -> InferenceLinear | None:
        """The fastest linear of a packed matrix; None if that is a dense one."""
        product = inference.product_of(layout, device)
        if product is None and layout.format == "dense" and not layout.integers:
            return None
        parts = packed.parts(owner)
        if product is not None:
            return product.linear(parts, layout, bias, device)
        if layout.integers:
            integers = GpuIntegers.of(install.integers_of(parts, layout), device)
            return GpuLinear(integers, bias, choice_of(integers).kernel_up_to)
        floats = GpuBitmask.of(*formats[layout.format].kept(parts, layout), device)
        choice = choice_of(floats)
        faster = choice.speedup_over_dense >= 1
        return GpuLinear(floats, bias, choice.kernel_up_to) if faster else None

    for parameter, stored in names.items():
        if not parameter.startswith(only):
            continue
        path, owner = parameter.rpartition(".")[0], stored.removesuffix(".weight")
        layout = packed.layouts.get(owner) if stored.endswith(".weight") else None
        module = model.get_submodule(path)
        if layout is not None and path != embedding_at and not path.endswith(install.READ):
            install.check_replaceable(module, path)
            linear = linear_of(owner, layout, module.bias)
            if linear is not None:
                install.replace(model, path, linear)
                continue
        if layout is not None and layout.integers and path == embedding_at and head:
            head_module = linear_of(owner, layout)
        skeleton.assign(model, parameter, view.read(stored).to(dtype))
    skeleton.fill_buffers(model, view)
    if head:
        install.tie_head(model, embedding_at, head, head_module)
    model._apply(lambda x: x if x.is_meta else x.to(device))


class PackedTarget(CheckpointTarget):
    """A compressed checkpoint whose layers compute as `install` fills them, one layer in memory.

    Embedding and head stay in memory, packed, from the first `outside` on.

    Args:
        packed: the checkpoint.
        device: where it computes; without Triton torch does on a GPU.
    """

    def __init__(self, packed: PackedCheckpoint, device: torch.device) -> None:
        dtype = computed_dtype(packed.folder)
        super().__init__(install.DenseView(packed), None, device, dtype=dtype)
        self.packed = packed
        # layers are empty now, and have no module that rounds
        self.model.rounds_inputs = packed.activations is not None
        path = f"{self.architecture.layers_path}."
        own = (name for name, _ in self.model.named_parameters())
        self.ends = tuple(name for name in own if not name.startswith(path))
        install.finish(self.model, dtype)
        self.by_triton = device.type == "cuda" and find_spec("triton") is not None
        self.choices: dict[tuple[object, ...], KernelChoice] = {}

    def filled(self, module: nn.Module, *only: str) -> None:
        """Fill parameters of a module, and move it to the device."""
        what = self.model, self.packed, self.dtype
        if self.by_triton:
            install_on_gpu(*what, self.device, only=only, choices=self.choices)
            return
        install.install(*what, kernels=self.device.type == "cpu", only=only)
        install.settle(module, self.dtype)
        module._apply(lambda x: x if x.is_meta else x.to(self.device))

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embedding, final norm and head, filled once."""
        if self.ends:
            self.filled(self.model, *self.ends)
            self.ends = ()
        yield

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The layer, filled on entry and emptied on exit."""
        layer, dense = self.layers[index], dict(self.layers[index].named_modules())
        self.filled(layer, f"{self.architecture.layer_name(index)}.")
        try:
            yield layer
        finally:
            for name, module in dense.items():
                if layer.get_submodule(name) is not module:
                    install.replace(layer, name, module)
            skeleton.empty(layer)
