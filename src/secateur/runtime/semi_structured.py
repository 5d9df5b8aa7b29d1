"""Loads a 2:4 model as torch multiplies it on the sparse tensor cores of NVIDIA GPUs."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import KernelError, PatternError
from secateur.models.architecture import describe, linears_of
from secateur.models.opening import load_whole

log = logging.getLogger(__name__)

ROWS, COLUMNS = 32, 64
"""torch multiplies matrices whose sides are multiples of these."""


def load_semi_structured(
    folder: str | Path,
    device: str | torch.device = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Load a 2:4 model in eval mode, with 9 bits for each weight of its linear layers.

    A linear layer of a decoder layer that is not 2:4, or whose sides are no multiples of 32 × 64,
    stays dense. So do experts that transformers keeps in one tensor. A warning counts them.

    Args:
        folder: a pruned model, as transformers loads it.
        device: a GPU from Ampere on. For a moment it holds the dense model.
        dtype: of the model, bfloat16 or float16.

    Returns:
        A transformers model. It cannot be saved.

    Raises:
        KernelError: the device has no sparse tensor cores, or torch has no product for them.
        PatternError: no linear layer is 2:4.
        CheckpointError: a file is damaged, or does not fit the configuration.
    """
    from secateur.runtime.quantizer import refuse_saving

    device = torch.device(device)
    stored = stored_by_torch(device)
    model = load_whole(Path(folder), device, dtype=dtype)
    architecture = describe(model)
    linears = [
        linear.module
        for index, layer in enumerate(architecture.layers(model))
        for linear in linears_of(layer, architecture.layer_name(index)).values()
    ]
    sparse = [linear for linear in linears if isinstance(linear, nn.Linear) and fits(linear.weight)]
    if not sparse:
        raise PatternError(
            f"none of {len(linears)} linear layers is 2:4, in multiples of {ROWS} × {COLUMNS}",
            where=str(folder),
            remedy="prune the model with --pattern 2:4; secateur.load loads it as it is",
        )
    if len(sparse) < len(linears):
        log.warning("%d of %d linear layers stay dense", len(linears) - len(sparse), len(linears))
    with warnings.catch_warnings():  # torch warns once that its interface is a prototype
        warnings.simplefilter("ignore")
        for linear in sparse:
            weight = stored.from_dense(linear.weight.detach().contiguous())
            linear.weight = nn.Parameter(weight, requires_grad=False)
    refuse_saving(model)
    return model.requires_grad_(False)


def fits(weight: Tensor) -> bool:
    """Whether torch multiplies a weight as 2:4: at most 2 of every 4 in a row are not zero."""
    if weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return False
    return int(weight.detach().view(len(weight), -1, 4).count_nonzero(2).max()) <= 2


def stored_by_torch(device: torch.device) -> Any:
    """The class of torch's 2:4 tensors on a device. CUTLASS is built for 8.x only.

    Raises:
        KernelError: there is none.
    """
    from torch import sparse

    major = 0
    if device.type == "cuda" and torch.cuda.is_available():
        major = torch.cuda.get_device_capability(device)[0]
    if major < 8:
        raise KernelError(
            f"{device} has no sparse tensor cores",
            remedy="name an NVIDIA GPU from Ampere on (A100, RTX 30); elsewhere secateur.load "
            "loads the folder, and `secateur compress` makes it smaller",
        )
    if torch.backends.cusparselt.is_available():
        return sparse.SparseSemiStructuredTensorCUSPARSELT
    if major > 8:
        raise KernelError(
            f"torch {torch.__version__} has no cuSPARSELt, which multiplies 2:4 on {device}",
            remedy="install a torch with cuSPARSELt, or load the folder with secateur.load",
        )
    return sparse.SparseSemiStructuredTensorCUTLASS
