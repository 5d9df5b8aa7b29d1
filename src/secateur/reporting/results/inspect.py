"""What `inspect` returns for a checkpoint: its parts, and where its zeros are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.diagnostics.audit import Audit, LinearCount
from secateur.reporting.results.compress import stored_as
from secateur.reporting.results.layers import layer_of
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table, by_layer, not_pruned
from secateur.reporting.wording import binary_size


@dataclass(frozen=True, repr=False)
class InspectResult(Result):
    """The parts of a model, and where its zeros are.

    Attributes:
        model: the name from the user.
        audit: the counts.
        layer: the decoder layer whose linears are listed; None lists all layers.
        silent: experts that got no calibration token when the model was pruned, by layer.
    """

    model: str
    audit: Audit
    layer: int | None = None
    silent: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All counts."""
        silent = {layer: list(numbers) for layer, numbers in self.silent.items()}
        return {"model": self.model, **self.audit.to_json(), "silent_experts": silent}

    def blocks(self) -> Sequence[Block]:
        """The whole model, then all layers or the linears of one layer."""
        audit = self.audit
        zeros, weights = (sum(getattr(x, k) for x in audit.linears) for k in ("zeros", "weights"))
        rows = [
            ("family", audit.family),
            ("decoder layers", str(audit.num_hidden_layers)),
            ("parameters", f"{audit.parameters:,}"),
            ("weight files", binary_size(audit.file_bytes)),
            ("stored as", ", ".join(f"{k} ({binary_size(v)})" for k, v in audit.dtypes.items())),
            ("zeros in decoder matrices", share_of(zeros, weights)),
            ("zeros in all parameters", share_of(audit.zeros, audit.parameters)),
            ("cannot be pruned", not_pruned(audit.left)),
        ]
        if self.silent:
            rows.append(("experts without calibration tokens", by_layer(self.silent)))
        if audit.compressed:
            rows.insert(4, ("compressed", audit.compressed))
        whole = Table.facts(self.model, rows)
        return [whole, self.layers() if self.layer is None else self.linears(self.layer)]

    def layers(self) -> Table:
        """A line for each decoder layer; one for all that follow each other and do not differ."""
        by_layer: dict[int, list[LinearCount]] = {}
        for linear in self.audit.linears:
            by_layer.setdefault(layer_of(linear.name), []).append(linear)
        same = itertools.groupby(
            sorted(by_layer), lambda index: (index >= 0, cells(by_layer[index]))
        )
        rows = [(numbers(list(found)), *row) for (_, row), found in same]
        columns = ("layer", "matrices", "weights", "zeros", "fewest zeros", "most zeros")
        return Table.of("decoder layers (--layer N lists the linear layers of one)", columns, rows)

    def linears(self, layer: int) -> Table:
        """A line for each linear of a layer."""
        packed = bool(self.audit.compressed)
        linears = [x for x in self.audit.linears if layer_of(x.name) == layer]
        stored = ("stored as",) if packed else ()
        return Table.of(
            f"linear layers of decoder layer {layer}",
            ("name", "out", "in", "zeros", *stored),
            [linear_row(x, packed=packed) for x in linears],
        )


def linear_row(linear: LinearCount, *, packed: bool) -> tuple[str, ...]:
    """The counts of one linear."""
    out, columns = linear.shape
    kind = "as it is" if linear.layout is None else stored_as(linear.layout)
    stored = (kind,) if packed else ()
    return linear.name, str(out), str(columns), f"{linear.sparsity:.2%}", *stored


def cells(linears: Sequence[LinearCount]) -> tuple[str, ...]:
    """The counts of one decoder layer."""
    weights = sum(x.weights for x in linears)
    least = min(linears, key=lambda x: x.sparsity)
    most = max(linears, key=lambda x: x.sparsity)
    differ = least.sparsity < most.sparsity
    return (
        str(len(linears)),
        f"{weights:,}",
        f"{sum(x.zeros for x in linears) / weights:.2%}",
        f"{least.sparsity:.2%} {short(least.name)}" if differ else "",
        f"{most.sparsity:.2%} {short(most.name)}" if differ else "",
    )


def numbers(layers: Sequence[int]) -> str:
    """The numbers of layers that follow each other."""
    first, last = layers[0], layers[-1]
    return "shared" if first < 0 else str(first) if first == last else f"{first} to {last}"


def share_of(zeros: int, weights: int) -> str:
    """Zeros as a share and as a count."""
    return f"{zeros / weights if weights else 0:.2%} ({zeros:,} of {weights:,})"


def short(name: str) -> str:
    """The last part of a name."""
    return name.removesuffix(".weight").rpartition(".")[2]
