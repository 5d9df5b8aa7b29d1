"""Lists what a model stores, tensor by tensor: what can be pruned, and why the rest cannot.

Counts use stored tensors, not modules. A module may occur twice and be stored once. A stored tensor
may belong to no visible module: experts that transformers fuses, a tower for pictures, a layer that
predicts further tokens. So every floating-point tensor of two or more dimensions is either the
weight of a linear that can be pruned, or it has a reason why not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from secateur.models.architecture import (
    Architecture,
    Linear,
    is_router,
    mixes_states,
    of_unknown_experts,
    stored_linears,
)
from secateur.runs.records import SkippedMatrix

EXPERTS = "experts in a layout that is not known"
OUTSIDE = "not in the decoder's layers"
NOT_BUILT = "stored, but no part of the causal language model that transformers builds"
UNKNOWN = "a decoder layer's tensor in a form that is not known"


@dataclass(frozen=True)
class StoredMatrix:
    """A stored tensor of two or more dimensions.

    Attributes:
        name: as it is stored.
        shape: as it is stored.
        layer: the number of its decoder layer; None outside.
        linear: the prunable linear whose weight it is, if any.
        reason: why it cannot be pruned; empty for a linear's.
        part: its part of the model outside the decoder layers, if any; the report names such a part
            once, not tensor by tensor.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    linear: Linear | None
    reason: str = ""
    part: str = ""

    @property
    def weights(self) -> int:
        """How many values it has."""
        return prod(self.shape)

    @property
    def is_decoder_matrix(self) -> bool:
        """Whether it counts among the matrices of the decoder: linears, and unknown experts."""
        return self.linear is not None or self.reason in (EXPERTS, UNKNOWN)

    @property
    def full_name(self) -> str:
        """The linear's name, or the stored name if it is no linear."""
        return self.linear.name if self.linear else self.name.removesuffix(".weight")

    @property
    def kind(self) -> str:
        """Its name within the decoder layer."""
        return re.split(rf"(?:^|\.){self.layer}\.", self.full_name, maxsplit=1)[-1]

    def seen(self, tensor: Tensor) -> Tensor:
        """The stored tensor as a matrix [out, in]; several matrices are stacked by rows."""
        if self.linear is not None:
            return tensor.t() if self.linear.transposed else tensor
        return tensor.flatten(0, -2)


def inventory(
    model: Any,
    architecture: Architecture,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[StoredMatrix]:
    """Every stored floating-point tensor of two or more dimensions.

    Tensors of the decoder layers come first, in the order of the layers and their modules.

    Args:
        model: loaded, or a skeleton.
        architecture: its description.
        names: the model's name for each stored tensor (`skeleton.model_names`).
        shapes: of the floating-point tensors, by stored name.

    Raises:
        CheckpointError: a linear of a decoder layer is not stored.
    """
    linears = stored_linears(model, architecture, names.values())
    place = {name: number for number, name in enumerate(linears)}
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    within = re.compile(re.escape(architecture.layers_path) + r"\.(\d+)\.")
    count = len(architecture.layers(model))
    path = architecture.layers_path
    ends = ((stored, n.removeprefix(path)) for stored, n in names.items() if n in linears)
    # stored names may have another prefix
    path = next((stored.removesuffix(x) for stored, x in ends if stored.endswith(x)), path)
    found = []
    for stored, shape in shapes.items():
        if len(shape) < 2:
            continue
        name = names[stored]
        match = within.match(name)
        inside = int(match[1]) if match and int(match[1]) < count else None
        if name in linears:
            found.append(StoredMatrix(stored, shape, *linears[name]))
        elif name in parameters:
            reason = _reason_of(model, architecture, name, inside=inside is not None)
            part = part_outside(stored, path) if reason == OUTSIDE else ""
            found.append(StoredMatrix(stored, shape, inside, None, reason, part))
        elif inside is not None:
            reason = EXPERTS if "expert" in name else UNKNOWN
            found.append(StoredMatrix(stored, shape, inside, None, reason))
        else:
            part = part_outside(stored, path)
            found.append(StoredMatrix(stored, shape, None, None, NOT_BUILT, part))
    last = len(place)  # what is no linear comes after the linears of its layer
    return sorted(
        found, key=lambda m: (count if m.layer is None else m.layer, place.get(names[m.name], last))
    )


def stored_shapes(entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of floating-point tensors: of a reader's entries, or of named parameters."""
    return {n: tuple(e.shape) for n, e in entries.items() if e.dtype.is_floating_point}


def _reason_of(model: Any, architecture: Architecture, name: str, *, inside: bool) -> str:
    """Why a parameter of two or more dimensions is no linear that can be pruned."""
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    sort = type(module).__name__
    decoder = architecture.layers_path.rpartition(".")[0]
    if isinstance(module, nn.Embedding) and path.startswith(decoder):
        return "embedding"
    if module is model.get_output_embeddings():
        return "output head"
    if not inside:
        return OUTSIDE
    if isinstance(module, _ConvNd):
        return "convolution"
    if "norm" in sort.lower():
        return "norm"
    if name.endswith("bias"):
        return "bias"
    number, _, inner = path.removeprefix(f"{architecture.layers_path}.").partition(".")
    layer = architecture.layers(model)[int(number)]
    if is_router(layer, inner):
        return "router"
    if mixes_states(layer, inner):
        return "coefficients of AltUp"
    parameter = model.get_parameter(name)
    if of_unknown_experts(path, module, parameter):
        return EXPERTS
    if parameter.ndim > 2:
        return UNKNOWN
    return "gate with one output" if isinstance(module, nn.Linear) else f"parameter of {sort}"


def part_outside(name: str, layers_path: str) -> str:
    """The largest part of a model that contains a parameter but not the decoder layers."""
    mine, theirs = name.split("."), layers_path.split(".")
    same = 0
    while same < len(theirs) and same < len(mine) - 1 and mine[same] == theirs[same]:
        same += 1
    return ".".join(mine[: same + 1])


def summary(left: Iterable[tuple[str, str, int]]) -> list[SkippedMatrix]:
    """What is not pruned, in a few lines: one line for tensors whose names differ only in numbers.

    Args:
        left: name, reason and number of weights of each tensor.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for name, reason, weights in left:
        sort = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        groups.setdefault((sort, reason), []).append(weights)
    return [
        SkippedMatrix(names=names, reason=reason, tensors=len(sizes), weights=sum(sizes))
        for (names, reason), sizes in groups.items()
    ]


def weights_of(matrices: Iterable[StoredMatrix]) -> Iterator[tuple[str, str, int]]:
    """The arguments of `summary`, for the matrices that cannot be pruned."""
    for matrix in matrices:
        if matrix.linear is None:
            yield matrix.part or matrix.name, matrix.reason, matrix.weights
