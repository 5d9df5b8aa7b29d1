"""Integers with a scale and a zero for each group of inputs: GPTQ and AWQ.

GPTQ (AutoGPTQ and GPTQModel), F = 32 / bits integers in each word, the lowest first:

    qweight  int32 [in / F, out]; word i / F of a column holds the integers of inputs i, i + 1, …
    qzeros   int32 [groups, out / F]
    scales   float16 or bfloat16 [groups, out]
    g_idx    int32 [in], the group of each input; none: in order

    W[o, i] = (q[i, o] − z[g, o]) · scales[g, o]         g = g_idx[i]

In the layout `gptq` a word of `qzeros` is 0…0001…0001 smaller than the word of its zeros, as one
32-bit number: a zero of 0 borrows from the zero above it. In `gptq_v2` the words are the zeros'.

AWQ (AutoAWQ, version gemm), 8 integers of 4 bits in each word, in the order 0 2 4 6 1 3 5 7:

    qweight  int32 [in, out / 8]
    qzeros   int32 [groups, out / 8]
    scales   float16 [groups, out]

    W[o, i] = (q[i, o] − z[g, o]) · scales[g, o]         g = ⌊i / group size⌋

The layouts are those of `QuantLinear` in github.com/AutoGPTQ/AutoGPTQ and of `packing_utils.py` in
github.com/casper-hansen/AutoAWQ. The product is exact in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import ArchitectureError
from secateur.models import at_rest

ROLES = ("qweight", "qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each 4-bit integer of a word belongs to, the lowest bits first."""


class PostTraining(at_rest.NamedForm):
    """`quant_method: gptq`, with integers of 2, 4 or 8 bits."""

    name: ClassVar[str] = "gptq"

    def assemblies(
        self, source: at_rest.SourceFolder, described: at_rest.Described
    ) -> dict[str, at_rest.Assembly]:
        """Refuses integers of other widths, or packed for one kernel."""
        bits, layout = described.get("bits"), described.get("checkpoint_format", "gptq")
        if bits not in (2, 4, 8) or layout not in ("gptq", "gptq_v2"):
            raise ArchitectureError(
                f"GPTQ of {bits} bits in the layout {layout} is not read",
                where=str(source.folder),
                remedy="2, 4 and 8 bits in the layouts gptq and gptq_v2 are; name the model in "
                "float16 or bfloat16",
            )
        lower = sum(1 << shift for shift in range(0, 32, bits)) if layout == "gptq" else 0
        make = partial(_from_gptq, bits=bits, lower=lower)
        return _assemblies(source, make, bits, rows=True)


class ActivationAware(at_rest.NamedForm):
    """`quant_method: awq`, version gemm."""

    name: ClassVar[str] = "awq"

    def assemblies(
        self, source: at_rest.SourceFolder, described: at_rest.Described
    ) -> dict[str, at_rest.Assembly]:
        """Refuses integers of other widths, or packed for another kernel."""
        bits = described.get("bits", described.get("w_bit"))
        version = str(described.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ArchitectureError(
                f"AWQ of {bits} bits in version {version} is not read",
                where=str(source.folder),
                remedy="4 bits in version gemm are; name the model in float16 or bfloat16",
            )
        return _assemblies(source, _from_awq, 4, rows=False)


def _assemblies(
    source: at_rest.SourceFolder, make: Callable[[at_rest.Parts], Tensor], bits: int, *, rows: bool
) -> dict[str, at_rest.Assembly]:
    """The matrices of a folder; words hold consecutive inputs if `rows`, else outputs."""
    entries = source.reader.entries
    found: dict[str, dict[str, str]] = {}
    for name in entries:
        owner, _, role = name.rpartition(".")
        if role in ROLES and f"{owner}.qweight" in entries:
            found.setdefault(owner, {})[role] = name
    made = {}
    for owner, parts in found.items():
        missing = {"qzeros", "scales"} - parts.keys()
        if missing:
            raise at_rest.damaged(f"there is no {min(missing)} beside it", parts["qweight"])
        shapes = {role: entries[name].shape for role, name in parts.items()}
        shape = _shape_of(shapes, 32 // bits, rows=rows)
        if shape is None or any(entries[parts[x]].dtype != torch.int32 for x in ROLES[:2]):
            raise at_rest.damaged(
                "the parts do not fit each other: "
                + ", ".join(f"{role} {list(size)}" for role, size in sorted(shapes.items())),
                parts["qweight"],
            )
        name = f"{owner}.weight"
        made[name] = at_rest.Assembly(parts, shape, source.dtype, f"int{bits} in groups", make)
    at_rest.refuse_empty(made, f"int{bits} in groups", source)
    return made


def _shape_of(
    shapes: Mapping[str, tuple[int, ...]], factor: int, *, rows: bool
) -> tuple[int, int] | None:
    """The shape [out, in] of a matrix; None if its parts do not fit each other."""
    if any(len(shapes[role]) != 2 for role in ROLES[:3]):
        return None
    groups, outputs = shapes["scales"]
    high, wide = shapes["qweight"]
    inputs = high * factor if rows else high
    fits = wide == outputs if rows else wide * factor == outputs
    ordered = shapes.get("g_idx", (inputs,)) == (inputs,)
    grouped = groups > 0 and (inputs % groups == 0 or "g_idx" in shapes)
    whole = fits and ordered and grouped and shapes["qzeros"] == (groups, outputs // factor)
    return (outputs, inputs) if whole and outputs % factor == 0 else None


def _from_gptq(parts: at_rest.Parts, bits: int, lower: int) -> Tensor:
    """A matrix [out, in] of GPTQ, float64, whose words of zeros are stored `lower`."""
    # [in / F, out, F] → [in, out]: a word holds inputs that follow each other
    integers = at_rest.unpacked(parts["qweight"], bits).transpose(1, 2).flatten(0, 1)
    words = (parts["qzeros"].to(torch.int64) + lower).to(torch.int32)  # modulo 2³²
    zeros = at_rest.unpacked(words, bits).flatten(1)  # [groups, out]
    groups, inputs = len(zeros), len(integers)
    order = parts.get("g_idx")
    if order is None:
        order = torch.arange(inputs) // (inputs // groups)
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise at_rest.damaged(f"an input names a group that is not one of {groups}", "g_idx")
    order = order.to(torch.int64)
    scales = parts["scales"].to(torch.float64)
    return ((integers - zeros[order]).to(torch.float64) * scales[order]).t()


def _from_awq(parts: at_rest.Parts) -> Tensor:
    """A matrix [out, in] of AWQ, float64."""
    place = torch.tensor(AWQ_ORDER).argsort()  # where a word has its first output, its second, …
    integers, zeros = (
        at_rest.unpacked(parts[role], 4)[..., place].flatten(1) for role in ("qweight", "qzeros")
    )
    size = len(integers) // len(zeros)
    spread = (integers - zeros.repeat_interleave(size, 0)).to(torch.float64)
    return (spread * parts["scales"].to(torch.float64).repeat_interleave(size, 0)).t()


at_rest.stored_forms.register(PostTraining.name)(PostTraining())
at_rest.stored_forms.register(ActivationAware.name)(ActivationAware())
