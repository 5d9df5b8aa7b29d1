"""Lists what a model stores, tensor by tensor: what can be pruned, and why the rest cannot.

Counts use stored tensors, not modules. A module may occur twice and be stored once. A stored tensor
may belong to no visible module: experts that transformers fuses, a tower for pictures, a layer that
predicts further tokens. So every floating-point tensor of two or more dimensions is either the
weight of a linear that can be pruned, or it has a reason why not.

Layers that predict further tokens (MTP) are found by their names:

    model.layers.N.…   N counts on from the decoder layers: DeepSeek V3, GLM-4.5 and later,
                       MiniMax-M2, Step 3.5
    mtp.layers.N.…     Qwen3-Next, Qwen3.5, Nemotron-H; also model.mtp_layers.N (MiMo),
                       model.mtp_block.N (ERNIE 4.5) and the like
    mtp.…              what serves all of them

Within such a layer, its decoder layer has the names of every other one. Beside it stand norms and a
projection for the last hidden state and the embedding of the next token, and perhaps a table and a
head of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

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
from secateur.models.expert_layout import Experts
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


_APART = re.compile(r"(?:^|\.)mtp\w*(?=\.|$)")
"""What holds these layers where they are not in the list of decoder layers."""


class FurtherPlace(NamedTuple):
    """Where a name lies within a layer that predicts further tokens.

    Attributes:
        layer: its number, from 0.
        inner: the name within the layer.
        span: where the name has the number of the layer.
        listed: whether this number counts on from the decoder layers.
    """

    layer: int
    inner: str
    span: tuple[int, int]
    listed: bool


@dataclass(frozen=True)
class FurtherLayers:
    """Finds layers that predict further tokens by the names of tensors and modules.

    Attributes:
        leaf: the last name of the list of decoder layers.
        depth: how many decoder layers there are.
        others: the names of what owns other lists of this name, such as a vision tower.
    """

    leaf: str
    depth: int
    others: frozenset[str]

    @classmethod
    def of(cls, model: Any, architecture: Architecture) -> FurtherLayers:
        """Those of a model, loaded or a skeleton."""
        *_, owner, leaf = ["", *architecture.layers_path.split(".")]
        names = [["", *name.split(".")] for name, _ in model.named_modules()]
        others = frozenset(name[-2] for name in names if name[-1] == leaf) - {owner}
        return cls(leaf, len(architecture.layers(model)), others)

    def holds(self, name: str) -> bool:
        """Whether a name belongs to them, or to what serves all of them."""
        return _APART.search(name) is not None or self.place(name) is not None

    def listed(self, name: str) -> re.Match[str] | None:
        """Where a name has the number in the list of layers (group 1), and what follows (2)."""
        found = re.search(rf"(?:^|\.){re.escape(self.leaf)}\.(\d+)(?:\.(.+)|\*|$)", name)
        owner = name[: found.start()].rpartition(".")[2] if found else ""
        return None if _APART.search(name) or owner in self.others else found

    def place(self, name: str) -> FurtherPlace | None:
        """Where a name lies within one of them; None for any other name."""
        apart = _APART.search(name)
        own = re.compile(r"(?:layers\.)?(\d+)(?:\.(.+)|\*|$)")
        found = own.match(name, apart.end() + 1) if apart else self.listed(name)
        number = int(found[1]) - (0 if apart else self.depth) if found else -1
        if found is None or number < 0:
            return None
        return FurtherPlace(number, found[2] or "", found.span(1), not apart)

    def experts(self, experts: Experts, names: Iterable[str]) -> dict[int, dict[int, list[str]]]:
        """The matrices of each expert of these layers, by the numbers of both.

        Args:
            experts: of the decoder layers.
            names: of tensors, where each expert has its own (`Experts.split`).
        """
        found: dict[int, dict[int, list[str]]] = {}
        for name in names:
            place, expert = self.place(name), experts.place_of(name)
            if place and expert and experts.stored_linear(name):
                found.setdefault(place.layer, {}).setdefault(int(expert[1]), []).append(name)
        return found
