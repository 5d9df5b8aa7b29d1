"""Loads a folder of the export `semi-structured`, for sparse tensor cores or expanded.

On GPUs of compute capability 8.x torch multiplies by CUTLASS, and up to 4 tokens our Triton kernel
multiplies where Triton is installed: then the time is that of reading the weights, and it reads 9
bits of 16. Later GPUs multiply by cuSPARSELt alone, whose form of a matrix has 9 bits too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import CheckpointError, KernelError
from secateur.models.checkpoint import TensorEntry, read_header
from secateur.models.skeleton import build_skeleton, refuse_missing
from secateur.runtime.kernels.linear import InferenceLinear
from secateur.runtime.semi_structured import layout
from secateur.runtime.semi_structured.layout import FILE_NAME, StoredParts

PARTS = ("packed", "meta", "columns")
CAPABILITY = (8, 0)
"""The first generation of GPUs with sparse tensor cores: Ampere."""


def load_semi_structured(
    folder: str | Path, device: str | torch.device = "cuda", *, expand: bool = False
) -> Any:
    """Load a folder that `secateur export --to semi-structured` wrote, in eval mode.

    Args:
        folder: of the export.
        device: where the model goes.
        expand: make all linears dense, which works on any device.

    Returns:
        A transformers model. `save_pretrained` needs `expand=True`.

    Raises:
        KernelError: the device has no sparse tensor cores, and `expand` is False.
        CheckpointError: the file is damaged, or does not fit the configuration.
    """
    from safetensors import safe_open

    folder, device = Path(folder), torch.device(device)
    file = folder / FILE_NAME
    if not file.is_file():
        raise CheckpointError(
            f"there is no {FILE_NAME}",
            where=str(folder),
            remedy="make the folder with `secateur export MODEL --to semi-structured`",
        )
    if not expand:
        refuse_device(device)
    entries = read_header(file)
    dtypes = (entry.dtype for entry in entries.values() if entry.dtype.is_floating_point)
    model = build_skeleton(folder, dtype=next(dtypes, torch.bfloat16), alone=True)
    sparse = sorted(n.removesuffix(".meta") for n in entries if n.endswith(".meta"))
    # their files are read part by part, when each linear is made
    held = {f"{name}.{part}" for name in sparse for part in PARTS}
    owners: dict[str, Any] = dict(model.named_modules())
    with safe_open(file, framework="pt", device=str(device)) as opened:
        values = {name: opened.get_tensor(name) for name in entries.keys() - held}
        _put(model, values, file)
        for name in sparse:
            parts = _read_parts(name, owners.get(name), opened, entries, file)
            if expand:
                _put(model, {f"{name}.weight": parts.dense}, file)
            else:
                model.set_submodule(name, SparseLinear(parts, owners[name].bias))
    model.tie_weights()
    missing = [name for name, x in model.named_parameters() if x.device.type == "meta"]
    refuse_missing(missing, {}, folder)
    # Parameters were read onto the device; only the buffers of the skeleton are not there yet.
    for module in model.modules():
        held = module._buffers
        held.update({n: b.to(device) for n, b in held.items() if b is not None})
    if sparse and not expand:
        from secateur.runtime.quantizer import refuse_saving

        refuse_saving(model)
    return model.requires_grad_(False).eval()


def refuse_device(device: torch.device) -> None:
    """Refuse a device without sparse tensor cores, or whose product torch lacks.

    Raises:
        KernelError: it has none.
    """
    has = device.type == "cuda" and torch.cuda.is_available()
    if not has or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise KernelError(
            f"{device} has no sparse tensor cores",
            remedy="name an NVIDIA GPU from Ampere on (A100, RTX 30); or pass expand=True for a "
            "dense model; on a CPU, use `secateur compress` and `secateur.load`",
        )
    if not reads_parts(device) and not torch.backends.cusparselt.is_available():
        raise KernelError(
            f"torch {torch.__version__} has no cuSPARSELt, which multiplies 2:4 on {device}",
            remedy="install a torch with cuSPARSELt; or pass expand=True for a dense model",
        )


def _read_parts(
    name: str, linear: Any, opened: Any, entries: Mapping[str, TensorEntry], file: Path
) -> StoredParts:
    """The parts of a linear."""
    found = {p: entries[f"{name}.{p}"] for p in PARTS if f"{name}.{p}" in entries}
    specs = {f"{name}.{p}": (entry.dtype, entry.shape) for p, entry in found.items()}
    fits = (
        isinstance(linear, nn.Linear)
        and "packed" in found
        and found["packed"].dtype in layout.VALUES
    )
    if fits:
        split = "columns" in found
        lifted = found["columns"].shape[0] if split else linear.in_features
        dtype = found["packed"].dtype
        fits = specs == layout.part_specs(name, linear.out_features, lifted, dtype, split=split)
    if fits:
        tensors = {p: opened.get_tensor(f"{name}.{p}") for p in found}
        parts = StoredParts(linear.in_features, **tensors)
        columns = parts.columns
        if columns is None or bool(((columns >= 0) & (columns < linear.in_features)).all()):
            return parts
    raise _unfit(f"{name} is stored as 2:4 parts that do", file)


def _unfit(what: str, file: Path) -> CheckpointError:
    said = f"{what} not fit the model of config.json"
    return CheckpointError(said, where=str(file), remedy="copy or make the folder again")


def _put(model: Any, values: Mapping[str, Tensor], file: Path) -> None:
    """Put stored tensors in their places in the model."""
    try:
        unknown = model.load_state_dict(values, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise _unfit(f"{' '.join(str(error).split())[:200]} does", file) from None
    if unknown:
        raise _unfit(f"{unknown[0]} does", file)


FEW = 4
"""The most tokens of our kernel."""


class SparseLinear(InferenceLinear):
    """y = x Wᵀ + b by torch on sparse tensor cores; for inference.

    Where torch reads the parts as they are stored, our kernel reads them too, for a few tokens.
    Elsewhere torch has another form of W, which is held alone.

    Args:
        parts: W [out, in].
        bias: b [out], or None.
    """

    def __init__(self, parts: StoredParts, bias: Tensor | None) -> None:
        super().__init__((len(parts.packed), parts.in_features), bias, parts.packed.dtype)
        self.columns, self.wide = parts.columns, as_torch_multiplies(parts)
        shared = reads_parts(parts.packed.device)
        self.few = FEW if shared and find_spec("triton") is not None else 0
        self.held: tuple[Tensor, ...] = (
            (parts.packed, parts.meta) if shared else (self.wide.packed,)
        )

    def affine(self, x: Tensor) -> Tensor:
        """The product for activations [tokens, in] of the dtype of W, with the bias."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        if len(x) > self.few:
            return functional.linear(layout.lifted(x, self.columns), self.wide, self.bias)
        from secateur.runtime.kernels.gpu.two_of_four_kernel import multiply_two_of_four

        y = multiply_two_of_four(x, *self.held, columns=self.columns)
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        """The memory of W."""
        beside = 0 if self.columns is None else self.columns.nbytes
        return sum(part.nbytes for part in self.held) + beside


def reads_parts(device: torch.device) -> bool:
    """Whether torch multiplies the parts as they are stored: its CUTLASS is built for 8.x only."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 8


def as_torch_multiplies(parts: StoredParts) -> Any:
    """The wide matrix as torch multiplies it: the parts themselves for CUTLASS, or cuSPARSELt's."""
    from torch import sparse

    with warnings.catch_warnings():  # torch warns once that its interface is a prototype
        warnings.simplefilter("ignore")
        if not reads_parts(parts.packed.device):
            return sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(parts.wide)
        shape = torch.Size((len(parts.packed), 2 * parts.packed.shape[1]))
        return sparse.SparseSemiStructuredTensorCUTLASS(
            shape, parts.packed, parts.meta, None, None, None
        )
