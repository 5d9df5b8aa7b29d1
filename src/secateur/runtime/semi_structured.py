"""2:4 matrices in the layout in which torch multiplies them on NVIDIA's sparse tensor cores.

A linear NAME whose weight [out, in] keeps at most 2 of every 4 consecutive weights is stored as

    NAME.packed   the 2 weights of every 4, float16 or bfloat16 [out, in / 2]
    NAME.meta     their places, 2 bits each, in CUTLASS' order, int16 [out, in / 16]

in the file `semi_structured.safetensors`: 9 bits for each weight. transformers does not look for
this name, so it never draws such matrices at random. All other tensors are plain.
`torch.sparse.SparseSemiStructuredTensorCUTLASS` takes both parts as they are, so nothing is encoded
on the GPU, and the dense matrix is never there.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, KernelError
from secateur.models.configuration import transformers_errors
from secateur.models.experts import open_experts
from secateur.models.header import TensorEntry, read_header
from secateur.models.skeleton import quiet_transformers, refuse_missing, without_weights

__all__ = [
    "COLUMNS",
    "FILE_NAME",
    "ROWS",
    "VALUES",
    "decode",
    "encode",
    "is_two_of_four",
    "load_semi_structured",
    "part_specs",
]

FILE_NAME = "semi_structured.safetensors"
ROWS, COLUMNS = 32, 64
"""torch multiplies matrices whose sides are multiples of these."""

VALUES = (torch.bfloat16, torch.float16)
"""The dtypes of weights: float32 has another pattern on these cores (1:2)."""

CAPABILITY = (8, 0)
"""The first generation of GPUs with sparse tensor cores: Ampere."""


def is_two_of_four(weight: Tensor) -> bool:
    """Whether every 4 consecutive weights of a row keep at most 2."""
    if weight.shape[1] % 4:
        return False
    return int(weight.view(len(weight), -1, 4).count_nonzero(2).max()) <= 2


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`packed` and `meta` of a 2:4 matrix [out, in], float16 or bfloat16, on any device."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    return packed, meta


def decode(packed: Tensor, meta: Tensor) -> Tensor:
    """The matrix [out, in] of `packed` and `meta`, on any device: torch's reference."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    dense: Tensor = sparse_semi_structured_to_dense_cutlass(packed, meta)
    return dense


def part_specs(
    name: str, out: int, columns: int, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the two parts of a linear [out, in], by name."""
    return {
        f"{name}.packed": (dtype, (out, columns // 2)),
        f"{name}.meta": (torch.int16, (out, columns // 16)),
    }


def load_semi_structured(
    folder: str | Path, device: str | torch.device = "cuda", *, expand: bool = False
) -> Any:
    """Load a folder that `secateur export --to semi-structured` wrote, in eval mode.

    On a GPU from Ampere on, its linears stay 2:4: torch multiplies them on sparse tensor cores.

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
    entries = read_header(file).entries
    model = empty_model(folder, first_float(entries))
    sparse = {n.removesuffix(".meta") for n in entries if n.endswith(".meta")}
    owners: dict[str, Any] = dict(model.named_modules())
    with safe_open(file, framework="pt", device=str(device)) as opened:
        for name in sparse:
            check_linear(name, owners.get(name), entries, file)
            parts = opened.get_tensor(f"{name}.packed"), opened.get_tensor(f"{name}.meta")
            weight = decode(*parts) if expand else sparse_tensor(*parts)
            owners[name].weight = nn.Parameter(weight, requires_grad=False)
        for name in entries.keys() - {f"{n}.{part}" for n in sparse for part in ("packed", "meta")}:
            put(model, name, opened.get_tensor(name), file)
    model.tie_weights()
    missing = [name for name, x in model.named_parameters() if x.device.type == "meta"]
    refuse_missing(missing, {}, folder)
    for module in model.modules():  # all parameters are on the device already
        module._buffers.update(
            {n: b.to(device) for n, b in module._buffers.items() if b is not None}
        )
    return model.eval()


def refuse_device(device: torch.device) -> None:
    """Refuse a device without sparse tensor cores.

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


def empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder, its experts opened, its parameters on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers(), transformers_errors(folder), without_weights():
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    open_experts(model)
    return model


def first_float(entries: dict[str, TensorEntry]) -> torch.dtype:
    """The dtype of the weights."""
    return next((e.dtype for e in entries.values() if e.dtype.is_floating_point), torch.bfloat16)


def check_linear(name: str, linear: Any, entries: dict[str, TensorEntry], file: Path) -> None:
    """Refuse parts that do not fit the linear of their name.

    Raises:
        CheckpointError: names the linear.
    """
    parts = (f"{name}.packed", f"{name}.meta")
    found = {part: (entries[part].dtype, entries[part].shape) for part in parts if part in entries}
    dtype = found.get(parts[0], (torch.float32, ()))[0]
    fits = isinstance(linear, nn.Linear) and dtype in VALUES
    if not fits or found != part_specs(name, linear.out_features, linear.in_features, dtype):
        raise CheckpointError(
            f"{name} is stored as 2:4 parts that do not fit the model of config.json",
            where=str(file),
            remedy="copy or make the folder again",
        )


def sparse_tensor(packed: Tensor, meta: Tensor) -> Tensor:
    """Both parts as one tensor of torch, which `torch.nn.functional.linear` multiplies."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    with warnings.catch_warnings():  # torch warns once that its interface is a prototype
        warnings.simplefilter("ignore")
        return SparseSemiStructuredTensorCUTLASS(
            torch.Size((packed.shape[0], 2 * packed.shape[1])), packed, meta, None, None, None
        )


def put(model: Any, name: str, value: Tensor, file: Path) -> None:
    """Put a stored tensor in its place in the model.

    Raises:
        CheckpointError: there is no such place, or it has another shape.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        fits = old.shape == value.shape
    except AttributeError:
        fits = False
    if not fits:
        raise CheckpointError(
            f"{name} {list(value.shape)} does not fit the model of config.json",
            where=str(file),
            remedy="copy or make the folder again",
        )
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
