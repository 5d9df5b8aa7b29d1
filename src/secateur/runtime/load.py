"""Loads a compressed checkpoint as a transformers model whose linears stay packed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from secateur.allocator import reused_pages
from secateur.errors import CheckpointError, KernelError, install_extra
from secateur.models.experts import OpenExperts
from secateur.models.opening import computed_dtype, load_whole
from secateur.models.skeleton import build_skeleton, quiet_transformers
from secateur.runtime.generation_config import generation_config
from secateur.runtime.install import install
from secateur.runtime.linear import IntegerLinear, PackedEmbedding, PackedLinear
from secateur.runtime.on_gpu import install_on_gpu
from secateur.runtime.packed import PackedCheckpoint, is_packed


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

    Activations that meet integers are rounded to int8 in groups of 256, as the folder says,
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
        KernelError: there is no such GPU, or no Triton.
    """
    folder, device = Path(folder), torch.device(device)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            "there is no config.json",
            where=str(folder),
            remedy="name a folder that `secateur compress` or transformers has written",
        )
    if not is_packed(folder):
        return load_whole(folder, device, dtype=dtype, trust_remote_code=trust_remote_code)
    packed = PackedCheckpoint(folder)
    dtype = dtype or computed_dtype(folder)
    model = build_skeleton(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    if device.type == "cuda" and kernels and not expand:
        refuse_gpu(device)
    with reused_pages():  # release the memory of measuring and unpacking
        if device.type == "cuda" and kernels and not expand:
            install_on_gpu(model, packed, dtype, device)
        else:
            install(model, packed, dtype, expand=expand, kernels=kernels)
            if device.type != "cpu":
                model.to(device)
    model.config.dtype = dtype
    settle_saving(model)
    with quiet_transformers():
        settings = generation_config(folder)
    if settings is not None:
        model.generation_config = settings
    return model.eval()


def refuse_gpu(device: torch.device) -> None:
    """Refuse a GPU that cannot run the kernels.

    Raises:
        KernelError: there is none, or Triton is missing.
    """
    has_triton = find_spec("triton") is not None
    if torch.cuda.is_available() and has_triton:
        return
    what = "Triton is not installed" if torch.cuda.is_available() else f"there is no {device} here"
    raise KernelError(
        what,
        remedy=f"{install_extra('gpu')}; or pass expand=True for a dense model, or load it on "
        "the CPU",
    )


def settle_saving(model: Any) -> None:
    """Make `save_pretrained` write a dense model, and refuse a packed one.

    For packed modules transformers would write a checkpoint without weights. For opened experts it
    cannot restore the names.
    """
    from secateur.runtime.quantizer import refuse_saving

    unwritable = (IntegerLinear, PackedLinear, PackedEmbedding, OpenExperts)
    on_gpu = "GpuLinear"  # by its name: importing it needs Triton
    if any(isinstance(x, unwritable) or type(x).__name__ == on_gpu for x in model.modules()):
        refuse_saving(model)
    else:
        del model.config.quantization_config
