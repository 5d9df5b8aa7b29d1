"""Loads a folder of the export `semi-structured`, for sparse tensor cores or expanded.

Each linear layer takes the way to multiply that was measured to be fastest:

| way        | what it does                                                 | tokens |
|------------|--------------------------------------------------------------|--------|
| dense      | torch's dense product                                        | any    |
| CUTLASS    | torch's 2:4 product on sparse tensor cores, by CUTLASS       | any    |
| cuSPARSELt | the same by cuSPARSELt, where torch has it                   | any    |
| Triton     | our kernel on the parts of CUTLASS, without tensor cores     | 1 to 4 |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import CheckpointError, KernelError
from secateur.models.header import TensorEntry, read_header
from secateur.models.skeleton import build_skeleton, refuse_missing
from secateur.runtime.kernels.gpu.linear import Call, Clock, Fastest, race
from secateur.runtime.kernels.linear import InferenceLinear
from secateur.runtime.semi_structured.layout import (
    FILE_NAME,
    VALUES,
    StoredParts,
    lifted,
    part_specs,
)

PARTS = ("packed", "meta", "columns")
CAPABILITY = (8, 0)
"""The first generation of GPUs with sparse tensor cores: Ampere."""


def load_semi_structured(
    folder: str | Path, device: str | torch.device = "cuda", *, expand: bool = False
) -> Any:
    """Load a folder that `secateur export --to semi-structured` wrote, in eval mode.

    On a GPU from Ampere on, each kind of matrix is timed once: dense, and on sparse tensor cores by
    CUTLASS and cuSPARSELt, for 1 to 4096 tokens. A linear takes the fastest one for its number of
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
    dtypes = (entry.dtype for entry in entries.values() if entry.dtype.is_floating_point)
    model = build_skeleton(folder, dtype=next(dtypes, torch.bfloat16), alone=True)
    sparse = sorted(n.removesuffix(".meta") for n in entries if n.endswith(".meta"))
    held = {f"{name}.{part}" for name in sparse for part in PARTS}
    owners: dict[str, Any] = dict(model.named_modules())
    choices: dict[tuple[object, ...], Fastest] = {}
    with safe_open(file, framework="pt", device=str(device)) as opened:
        values = {name: opened.get_tensor(name) for name in entries.keys() - held}
        _put(model, values, file)
        for name in sparse:
            parts = _read_parts(name, owners.get(name), opened, entries, file)
            if expand:
                _put(model, {f"{name}.weight": parts.dense}, file)
                continue
            kind = (parts.packed.shape, parts.in_features)
            if kind not in choices:
                choices[kind] = measured(parts)
            linear = chosen_linear(parts, owners[name].bias, choices[kind])
            model.set_submodule(name, linear)
    model.tie_weights()
    missing = [name for name, x in model.named_parameters() if x.device.type == "meta"]
    refuse_missing(missing, {}, folder)
    for module in model.modules():  # all parameters are on the device already
        held = module._buffers
        held.update({n: b.to(device) for n, b in held.items() if b is not None})
    if choices:
        from secateur.runtime.quantizer import refuse_saving

        refuse_saving(model)
    return model.requires_grad_(False).eval()


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


def _read_parts(
    name: str, linear: Any, opened: Any, entries: Mapping[str, TensorEntry], file: Path
) -> StoredParts:
    """The parts of a linear."""
    found = {p: entries[f"{name}.{p}"] for p in PARTS if f"{name}.{p}" in entries}
    specs = {f"{name}.{p}": (entry.dtype, entry.shape) for p, entry in found.items()}
    fits = isinstance(linear, nn.Linear) and "packed" in found and found["packed"].dtype in VALUES
    if fits:
        split = "columns" in found
        lifted = found["columns"].shape[0] if split else linear.in_features
        dtype = found["packed"].dtype
        fits = specs == part_specs(name, linear.out_features, lifted, dtype, split=split)
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


DENSE, CUTLASS, CUSPARSELT, TRITON = "dense", "CUTLASS", "cuSPARSELt", "Triton"
LIBRARIES = (CUTLASS, CUSPARSELT)
FEW = 4
"""The most tokens of our kernel."""

TRIED = (1, FEW, 16, 64, 256, 1024, 4096)
"""Tokens of a product that are tried: decoding, and prompts."""


@dataclass(frozen=True)
class Form:
    """A weight as a kernel takes it.

    Attributes:
        nbytes: its memory.
        multiply: the product of activations [tokens, in] and the weight, with `bias` [out] or None.
    """

    nbytes: int
    multiply: Callable[[Tensor, Tensor | None], Tensor]


def _by_torch(x: Tensor, bias: Tensor | None, weight: Tensor, columns: Tensor | None) -> Tensor:
    """The product by torch: W itself, or the wide matrix as a tensor of a library."""
    return functional.linear(lifted(x, columns), weight, bias)


def _by_our_kernel(x: Tensor, bias: Tensor | None, parts: StoredParts) -> Tensor:
    """The product with the parts as they are stored."""
    from secateur.runtime.kernels.gpu.two_of_four_kernel import multiply_two_of_four

    y = multiply_two_of_four(x, parts.packed, parts.meta, parts.columns)
    return y if bias is None else y + bias


class SparseLinear(InferenceLinear):
    """y = x Wᵀ + b by the fastest kernel for the number of tokens; for inference.

    Where dense is faster for some numbers of tokens and sparse for others, both forms are held: 25
    bits for each weight of a 2:4 matrix, 29.5 for a 6:8 one. CUTLASS and our kernel share theirs.

    Args:
        parts: W [out, in].
        bias: b [out], or None.
        fastest: which kernel to take.
        forms: the weight for each kernel that `fastest` uses.
    """

    def __init__(
        self, parts: StoredParts, bias: Tensor | None, fastest: Fastest, forms: Mapping[str, Form]
    ) -> None:
        super().__init__((len(parts.packed), parts.in_features), bias, parts.packed.dtype)
        self.fastest, self.forms = fastest, dict(forms)

    def affine(self, x: Tensor) -> Tensor:
        """The product for activations [tokens, in] of the dtype of W, with the bias."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        return self.forms[self.fastest.kernel(len(x))].multiply(x, self.bias)

    @property
    def nbytes(self) -> int:
        """The memory of W in all forms; CUTLASS and our kernel share theirs."""
        sizes = {kernel: form.nbytes for kernel, form in self.forms.items()}
        if CUTLASS in sizes:
            sizes.pop(TRITON, None)
        return sum(sizes.values())

    def extra_repr(self) -> str:
        """Shape and kernels, for printing."""
        kernels = ", ".join(f"{n}: {kernel}" for n, kernel in self.fastest.kernels.items())
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, by tokens: {kernels}"


def chosen_linear(parts: StoredParts, bias: Tensor | None, fastest: Fastest) -> nn.Module:
    """A linear with the forms that it needs; an `nn.Linear` if sparse is never faster."""
    if fastest.used != {DENSE}:
        forms = {kernel: form(kernel, parts) for kernel in sorted(fastest.used)}
        return SparseLinear(parts, bias, fastest, forms)
    plain = nn.Linear(parts.in_features, len(parts.packed), bias is not None, device="meta")
    plain.weight = nn.Parameter(parts.dense, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


def measured(parts: StoredParts, clock: Clock | None = None) -> Fastest:
    """Time all kernels, in turns.

    For many tokens the wide matrix is held in one form, so of several libraries the one that is
    faster for the most tokens takes part.

    Args:
        parts: a matrix of its kind.
        clock: None for the current GPU.
    """
    seconds = kernel_seconds(parts, TRIED, clock)
    last = seconds[TRIED[-1]]
    best = min(last.keys() & set(LIBRARIES), key=lambda kernel: last[kernel], default=DENSE)
    compared = {
        tokens: {kernel: x for kernel, x in taken.items() if kernel in (DENSE, TRITON, best)}
        for tokens, taken in seconds.items()
    }
    return Fastest.of(DENSE, compared)


def kernel_seconds(
    parts: StoredParts, tried: Sequence[int], clock: Clock | None = None
) -> dict[int, dict[str, float]]:
    """Seconds of a product by every kernel that there is, for each number of tokens."""
    forms = {DENSE: form(DENSE, parts)}
    for kernel in other_kernels():
        with suppress(RuntimeError):  # a library does not know this GPU
            forms[kernel] = form(kernel, parts)

    def calls(tokens: int) -> dict[str, Call]:
        like = parts.packed
        x = torch.randn(tokens, parts.in_features, device=like.device).to(like.dtype)
        able = (kernel for kernel in forms if kernel != TRITON or tokens <= FEW)
        return {kernel: lambda kernel=kernel: forms[kernel].multiply(x, None) for kernel in able}

    return race(tried, DENSE, calls, clock)


def other_kernels() -> list[str]:
    """The kernels besides the dense product that this installation has."""
    found = [CUTLASS] + [CUSPARSELT] * torch.backends.cusparselt.is_available()
    return found + [TRITON] * (find_spec("triton") is not None)


def form(kernel: str, parts: StoredParts) -> Form:
    """A weight as a kernel takes it."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    if kernel == DENSE:
        dense = parts.dense
        return Form(dense.nbytes, partial(_by_torch, weight=dense, columns=None))
    if kernel == TRITON:
        return Form(parts.nbytes, partial(_by_our_kernel, parts=parts))
    made: Tensor
    with warnings.catch_warnings():  # torch warns once that its interface is a prototype
        warnings.simplefilter("ignore")
        if kernel == CUSPARSELT:
            made = SparseSemiStructuredTensorCUSPARSELT.from_dense(parts.wide)
        else:
            shape = torch.Size((len(parts.packed), 2 * parts.packed.shape[1]))
            own = parts.packed, parts.meta
            made = SparseSemiStructuredTensorCUTLASS(shape, *own, None, None, None)
    return Form(parts.nbytes, partial(_by_torch, weight=made, columns=parts.columns))
