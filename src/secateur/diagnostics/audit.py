"""The sparsity audit: reads a saved checkpoint again and counts.

The audit trusts no value of the run. It reads every matrix from the files. Its zeros must contain a
set of zeros that the pattern allows, of the target size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import VerificationError
from secateur.models.architecture import describe
from secateur.models.at_rest import AssembledReader
from secateur.models.checkpoint import QUANT_METHOD
from secateur.models.inventory import inventory, stored_shapes, summary, weights_of
from secateur.models.opening import form_of, open_weights
from secateur.models.skeleton import build_skeleton, model_names, stored_names
from secateur.progress import Progress, Silent
from secateur.runs.records import RunResult, SkippedMatrix
from secateur.sparsity.patterns import Pattern, misplaced, recognised

if TYPE_CHECKING:
    from secateur.runtime.install import DenseView


@dataclass(frozen=True)
class LinearCount:
    """The zeros of one stored matrix."""

    name: str
    shape: tuple[int, int]
    zeros: int
    weights: int
    misplaced: int = 0
    """Nonzero weights where the pattern needs zeros."""
    layout: dict[str, Any] | None = None
    """How a compressed checkpoint stores the matrix; None if it is stored dense."""
    found: str | None = None
    """The pattern that its zeros follow: N:M, unstructured or dense; None if nobody looked."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.weights


def zero_share(linears: Iterable[LinearCount]) -> float:
    """The fraction of zeros in some matrices; 0 without any."""
    zeros, weights = 0, 0
    for linear in linears:
        zeros, weights = zeros + linear.zeros, weights + linear.weights
    return zeros / weights if weights else 0.0


@dataclass(frozen=True)
class Audit:
    """The zeros of a checkpoint.

    Attributes:
        linears: every stored matrix of the decoder layers, including experts with an unknown
            layout.
        parameters: all parameters of the model, embeddings included.
        file_bytes: size of the weight files.
        zeros: among all parameters.
        left: matrices that cannot be pruned, and why.
        compressed: whether this is a compressed checkpoint, and whether an archive.
    """

    linears: list[LinearCount]
    parameters: int
    file_bytes: int
    zeros: int = 0
    left: list[SkippedMatrix] = field(default_factory=list)
    family: str = ""
    num_hidden_layers: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    compressed: str | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the matrices of the decoder layers."""
        return zero_share(self.linears)

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros among all parameters."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def result(self) -> RunResult:
        """The counts that the manifest of the model keeps."""
        return RunResult(
            decoder_sparsity=self.sparsity,
            model_sparsity=self.model_sparsity,
            parameters=self.parameters,
            file_bytes=self.file_bytes,
        )

    @property
    def misplaced(self) -> list[LinearCount]:
        """Matrices that break their pattern."""
        return [x for x in self.linears if x.misplaced]

    def to_json(self) -> dict[str, Any]:
        """All counts."""
        return {
            **{name: getattr(self, name) for name in FIGURES},
            "decoder_sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "left": [left.to_json() for left in self.left],
            "linears": [{**asdict(x), "sparsity": x.sparsity} for x in self.linears],
        }


FIGURES = ("family", "num_hidden_layers", "parameters", "file_bytes", "dtypes", "compressed")
"""The fields that stand in JSON as they are."""


def audit_checkpoint(
    folder: Path,
    pattern_of: Callable[[str], Pattern] | None = None,
    sparsity_of: Mapping[str, float] | None = None,
    *,
    find_patterns: bool = False,
    progress: Progress | None = None,
) -> Audit:
    """Count the zeros of every stored tensor, one tensor in memory at a time.

    A compressed checkpoint is unpacked for this, so the counts are those of the weights in use.

    Args:
        folder: a checkpoint, compressed or not.
        pattern_of: the pattern that the zeros of a linear must contain; None to count only.
        sparsity_of: the sparsity of each linear by name, for the pattern.
        find_patterns: whether to find the pattern that the zeros of each matrix follow.
        progress: receives a step for every tensor.
    """
    progress = progress or Silent()
    view = _view_of(folder)
    reader = open_weights(folder) if view is None else view
    model = build_skeleton(folder)
    architecture = describe(model)
    names = model_names(model, reader)
    stored_names(model, reader)  # refuses shapes that do not match the configuration
    matrices = {
        m.name: m for m in inventory(model, architecture, names, stored_shapes(reader.entries))
    }
    counts, zeros = [], 0
    progress.start("counting zeros", len(reader.entries))
    # matrices in the order of the model, so that the record has it too; then all others
    for stored in [*matrices, *(reader.entries.keys() - matrices.keys())]:
        progress.step(note=stored)
        tensor = reader.read(stored)
        if tensor.is_floating_point():  # a table of token ids has no parameters
            zeros += tensor.numel() - int(torch.count_nonzero(tensor))
        matrix = matrices.get(stored)
        if matrix is None or not matrix.is_decoder_matrix:
            continue
        name = matrix.full_name
        target = (sparsity_of or {}).get(name, 0.0)
        # a linear that stays dense follows no pattern
        pattern = pattern_of(name) if pattern_of and target else None
        weight = matrix.seen(tensor)
        counted = count(name, weight, pattern, target)
        if find_patterns:
            counted = replace(counted, found=recognised(weight))
        if view is not None:
            counted = replace(counted, layout=view.layout_of(stored))
        counts.append(counted)
    progress.finish()
    packed = None if view is None else view.packed
    dtypes: dict[str, int] = {}
    files = reader.stored if isinstance(reader, AssembledReader) else packed or reader
    for entry in files.entries.values():
        dtype = str(entry.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + entry.size_bytes
    return Audit(
        counts,
        parameters=sum(prod(shape) for shape in stored_shapes(reader.entries).values()),
        file_bytes=sum(file.stat().st_size for file in reader.files),
        zeros=zeros,
        left=summary(weights_of(matrices.values())),
        family=architecture.family,
        num_hidden_layers=len(architecture.layers(model)),
        dtypes=dtypes,
        compressed=None if packed is None else "archive" if packed.archive else "packed",
    )


def _view_of(folder: Path) -> DenseView | None:
    """The dense tensors of a compressed checkpoint; None if it is not compressed."""
    if form_of(folder) != QUANT_METHOD:
        return None
    from secateur.runtime.install import DenseView  # only here, a run that prunes needs the runtime
    from secateur.runtime.packed import PackedCheckpoint

    return DenseView(PackedCheckpoint(folder))


def count(name: str, weight: Tensor, pattern: Pattern | None, sparsity: float) -> LinearCount:
    """Count one matrix."""
    out, columns = weight.shape
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    wrong = 0 if pattern is None else misplaced(pattern, weight, sparsity)
    return LinearCount(name, (out, columns), zeros, weight.numel(), wrong)


def verify(audit: Audit) -> None:
    """Refuse a checkpoint whose zeros do not follow the pattern.

    Raises:
        VerificationError: names the worst matrix.
    """
    if audit.misplaced:
        worst = max(audit.misplaced, key=lambda x: x.misplaced)
        raise VerificationError(
            f"{len(audit.misplaced)} matrices break their pattern; in the worst one "
            f"{worst.misplaced} of {worst.weights} weights are not zero and should be",
            where=worst.name,
            remedy="the files were changed after pruning, or this is a fault in secateur",
        )
