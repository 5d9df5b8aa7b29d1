"""Loads a compressed checkpoint as a transformers model whose linears stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.allocator import reused_pages
from secateur.errors import CheckpointError
from secateur.models.open_experts import OpenExperts
from secateur.models.skeleton import build_skeleton, quiet_transformers
from secateur.models.whole import load_whole
from secateur.runtime.dense_view import computed_dtype
from secateur.runtime.generation_config import generation_config
from secateur.runtime.install import install
from secateur.runtime.linear import PackedEmbedding, PackedLinear
from secateur.runtime.packed import PackedCheckpoint, is_packed

__all__ = ["load"]


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    expand: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint, compressed or not, on the CPU and in eval mode.

    Every file is verified first. Kernels multiply packed matrices without expanding them. Without
    kernels (`secateur.kernel_info()`) the matrices are expanded here.

    Args:
        folder: written by `secateur compress` or transformers.
        dtype: of the computation; None for the one in `config.json`. float32 with bfloat16 values
            is exact, and needs no more memory for packed matrices.
        expand: fill plain dense linears instead, to train or to compare.
        trust_remote_code: whether model code that comes with the checkpoint may run.

    Returns:
        A transformers model; `generate` and all other methods work as usual. `save_pretrained`
        writes a dense checkpoint if all modules are dense, and raises CheckpointError if any is
        packed.

    Raises:
        CheckpointError: a file is damaged, or does not fit the configuration.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            "there is no config.json",
            where=str(folder),
            remedy="name a folder that `secateur compress` or transformers has written",
        )
    if not is_packed(folder):
        return load_whole(
            folder, torch.device("cpu"), dtype=dtype, trust_remote_code=trust_remote_code
        )
    packed = PackedCheckpoint(folder)
    dtype = dtype or computed_dtype(folder)
    model = build_skeleton(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    with reused_pages():  # release the memory of measuring and unpacking
        install(model, packed, dtype, expand=expand)
    model.config.dtype = dtype
    settle_saving(model)
    with quiet_transformers():
        settings = generation_config(folder)
    if settings is not None:
        model.generation_config = settings
    return model.eval()


def settle_saving(model: Any) -> None:
    """Make `save_pretrained` write a dense model, and refuse a packed one.

    For packed modules transformers would write a checkpoint without weights. For opened experts it
    cannot restore the names.
    """
    from secateur.runtime.quantizer import PackedConfig, PackedQuantizer

    unwritable = (PackedLinear, PackedEmbedding, OpenExperts)
    if any(isinstance(module, unwritable) for module in model.modules()):
        model.hf_quantizer = PackedQuantizer(PackedConfig())
    else:
        del model.config.quantization_config
