"""Reads every tensor of a checkpoint once: is it finite, which weights and lines are zero?

One tensor is in memory at a time. For each matrix it keeps counts, and for each row and column
whether it is all zero; dead heads and neurons follow from these.

Impossible values are findings: NaN, Inf, and matrices that have shrunk to almost zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.diagnostics.audit import count
from secateur.diagnostics.findings import Claims
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import not_finite
from secateur.models.inventory import StoredMatrix
from secateur.runs.records import Finding


@dataclass(frozen=True)
class LinearHealth:
    """One stored matrix of a decoder layer.

    Attributes:
        name: its full name.
        layer: the number of its decoder layer.
        kind: its name within the layer.
        shape: (out, in).
        zeros: the number of zero weights.
        misplaced: nonzero weights where the claimed pattern needs zeros.
        size: root mean square of the weights that are not zero.
        known: False for experts in an unknown layout, which were not pruned.
        dead_rows: bool [out], outputs whose weights are all zero.
        dead_columns: bool [in], inputs that no weight reads.
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]
    zeros: int
    misplaced: int
    size: float
    known: bool
    dead_rows: Tensor
    dead_columns: Tensor

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint.

    Attributes:
        linears: the matrices of the decoder layers.
        not_finite: the number of NaN or infinite values, by tensor, if there are any.
        tensors: the number of tensors read.
    """

    linears: list[LinearHealth]
    not_finite: dict[str, tuple[int, int]]
    tensors: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the matrices of the decoder layers."""
        weights = sum(x.shape[0] * x.shape[1] for x in self.linears)
        return sum(x.zeros for x in self.linears) / weights

    def of_layer(self, index: int) -> dict[str, LinearHealth]:
        """The matrices of one decoder layer, by their name within it."""
        return {x.kind: x for x in self.linears if x.layer == index}


def layer_sparsity(weights: Weights) -> dict[int, float]:
    """The fraction of zeros in the matrices of each decoder layer."""
    found = {}
    for index in dict.fromkeys(x.layer for x in weights.linears):
        same = [x for x in weights.linears if x.layer == index]
        found[index] = sum(x.zeros for x in same) / sum(x.shape[0] * x.shape[1] for x in same)
    return found


def look_at_weights(
    target: CheckpointTarget, claims: Claims, on_tensor: Callable[[str], None]
) -> Weights:
    """Read every tensor of a checkpoint.

    Args:
        target: the checkpoint.
        claims: contains the pattern and sparsity that each matrix should have.
        on_tensor: called after every tensor with its name.
    """
    reader = target.reader
    matrices = {matrix.name: matrix for matrix in target.matrices()}
    linears, damaged = [], {}
    for stored in [*matrices, *(reader.entries.keys() - matrices.keys())]:
        tensor = reader.read(stored)
        bad = not_finite(tensor)
        if bad:
            damaged[stored] = bad, tensor.numel()
        matrix = matrices.get(stored)
        if matrix is not None and matrix.is_decoder_matrix:
            linears.append(_health_of(matrix, matrix.seen(tensor), claims))
        on_tensor(stored)
    return Weights(linears, damaged, len(target.reader.entries))


def _health_of(matrix: StoredMatrix, weight: Tensor, claims: Claims) -> LinearHealth:
    """Count one matrix [out, in]."""
    assert matrix.layer is not None
    name = matrix.full_name
    claim = claims.linears.get(name)
    counted = count(name, weight, claims.pattern, claim.target if claim else 0.0)
    nonzero = weight != 0
    kept = counted.weights - counted.zeros
    size = (weight.float().square().sum(dtype=torch.float64) / max(1, kept)).sqrt()
    return LinearHealth(
        name,
        matrix.layer,
        matrix.kind,
        counted.shape,
        counted.zeros,
        counted.misplaced,
        float(size),
        matrix.linear is not None,
        ~nonzero.any(dim=1),
        ~nonzero.any(dim=0),
    )


VANISHED = 1e-3
"""Relative to the median size of the same matrix in all layers; in SmolLM2 the least is 0.3."""


def check_values(weights: Weights) -> list[Finding]:
    """Tensors that are not finite, and linears far smaller than the same in other layers."""
    found = [
        Finding(
            "not-finite",
            "error",
            name,
            f"{bad} of {total} values are NaN or infinite",
            "the file is damaged or the run overflowed: get the model again, or prune again in "
            "float32 or bfloat16",
        )
        for name, (bad, total) in weights.not_finite.items()
    ]
    for kind in dict.fromkeys(x.kind for x in weights.linears):
        same = [x for x in weights.linears if x.kind == kind]
        usual = statistics.median(x.size for x in same)
        found += [
            Finding(
                "weights-vanished",
                "warning",
                x.name,
                f"its weights are {x.size:.2g} large (root mean square of those that are not "
                f"zero), the same matrix is {usual:.2g} in the median layer",
                "the layer adds almost nothing: compare it with the dense model (--dense REF), "
                "and prune again with an override for it",
            )
            for x in same
            if x.size < VANISHED * usual
        ]
    return found
