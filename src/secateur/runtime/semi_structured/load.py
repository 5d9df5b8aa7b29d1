"""Loads a folder of the export `semi-structured`, for sparse tensor cores or expanded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, KernelError
from secateur.models.configuration import transformers_errors
from secateur.models.experts import open_experts
from secateur.models.header import TensorEntry, read_header
from secateur.models.skeleton import quiet_transformers, refuse_missing, without_weights
from secateur.runtime.kernels.gpu.timing import Fastest
from secateur.runtime.semi_structured.layout import FILE_NAME, VALUES, StoredParts, part_specs
from secateur.runtime.semi_structured.linear import chosen_linear, measured

PARTS = ("packed", "meta", "columns")
CAPABILITY = (8, 0)
"""The first generation of GPUs with sparse tensor cores: Ampere."""


def load_semi_structured(
    folder: str | Path, device: str | torch.device = "cuda", *, expand: bool = False
) -> Any:
    """Load a folder that `secateur export --to semi-structured` wrote, in eval mode.

    On a GPU from Ampere on, each kind of matrix is timed once: dense, and on sparse tensor cores by
    CUTLASS and cuSPARSELt, for 1 to 4096 tokens. A linear takes the fastest way for its number of
    tokens, and is dense if sparse is never faster.

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
    sparse = sorted(n.removesuffix(".meta") for n in entries if n.endswith(".meta"))
    held = {f"{name}.{part}" for name in sparse for part in PARTS}
    owners: dict[str, Any] = dict(model.named_modules())
    choices: dict[tuple[object, ...], Fastest] = {}
    with safe_open(file, framework="pt", device=str(device)) as opened:
        for name in entries.keys() - held:
            put(model, name, opened.get_tensor(name), file)
        for name in sparse:
            linear: Any = owners.get(name)
            parts = read_parts(name, linear, opened, entries, file)
            if expand:
                linear.weight = nn.Parameter(parts.dense, requires_grad=False)
                continue
            kind = (parts.packed.shape, parts.in_features)
            if kind not in choices:
                choices[kind] = measured(parts)
            model.set_submodule(name, chosen_linear(parts, linear.bias, choices[kind]))
    model.tie_weights()
    missing = [name for name, x in model.named_parameters() if x.device.type == "meta"]
    refuse_missing(missing, {}, folder)
    for module in model.modules():  # all parameters are on the device already
        module._buffers.update(
            {n: b.to(device) for n, b in module._buffers.items() if b is not None}
        )
    if choices:
        from secateur.runtime.quantizer import refuse_saving

        refuse_saving(model)
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


def read_parts(
    name: str, linear: Any, opened: Any, entries: Mapping[str, TensorEntry], file: Path
) -> StoredParts:
    """The parts of a linear.

    Args:
        name: of the linear.
        linear: the module of this name; None if there is none.
        opened: reads tensors of the file by name.
        entries: of the file.
        file: for messages.

    Raises:
        CheckpointError: the parts do not fit the linear.
    """
    found = {p: entries[f"{name}.{p}"] for p in PARTS if f"{name}.{p}" in entries}
    told = {f"{name}.{p}": (entry.dtype, entry.shape) for p, entry in found.items()}
    fits = isinstance(linear, nn.Linear) and "packed" in found and found["packed"].dtype in VALUES
    if fits:
        split = "columns" in found
        lifted = found["columns"].shape[0] if split else linear.in_features
        dtype = found["packed"].dtype
        fits = told == part_specs(name, linear.out_features, lifted, dtype, split=split)
    if fits:
        tensors = {p: opened.get_tensor(f"{name}.{p}") for p in found}
        parts = StoredParts(linear.in_features, **tensors)
        if parts.columns is None or in_range(parts.columns, linear.in_features):
            return parts
    raise CheckpointError(
        f"{name} is stored as 2:4 parts that do not fit the model of config.json",
        where=str(file),
        remedy="copy or make the folder again",
    )


def in_range(columns: Tensor, in_features: int) -> bool:
    """Whether all are columns of the weight."""
    return bool(((columns >= 0) & (columns < in_features)).all())


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
