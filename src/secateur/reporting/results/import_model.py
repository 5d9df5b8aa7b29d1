"""What `import` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from secateur.reporting.results.layers import layer_of
from secateur.reporting.results.next_steps import after_a_dense_folder
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table
from secateur.runs.records import Import, ImportedMatrix


@dataclass(frozen=True, repr=False)
class ImportResult(Result):
    """Where the zeros of an imported model are.

    Attributes:
        output: the folder of the model.
        record: where the model came from, and each matrix.
        parameters: of the whole model.
    """

    output: Path
    record: Import
    parameters: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the matrices of the decoder layers."""
        return self.record.sparsity

    @property
    def patterns(self) -> dict[str, int]:
        """The number of matrices with each pattern; `dense` has no zeros worth mentioning."""
        return dict(Counter(matrix.pattern for matrix in self.record.matrices).most_common())

    @property
    def dense(self) -> tuple[str, ...]:
        """The matrices that have no zeros."""
        return tuple(x.name for x in self.record.matrices if x.pattern == "dense")

    @property
    def rounded(self) -> tuple[str, ...]:
        """The matrices whose exact values the dtype of the model cannot hold."""
        return tuple(x.name for x in self.record.matrices if x.rounded)

    def to_json(self) -> dict[str, Any]:
        """The folder and the record."""
        return {
            "output": str(self.output),
            "parameters": self.parameters,
            "patterns": self.patterns,
            **self.record.to_json(),
        }

    def facts(self) -> list[tuple[str, str]]:
        """What was found, as names and values."""
        record = self.record
        stored = Counter(x.stored_as for x in record.matrices if x.stored_as)
        zeros = f"{record.sparsity:.2%}" if record.sparsity else "none: nothing has been pruned"
        rows = [
            ("kind of source", record.kind),
            ("matrices stored as", counted(stored) or "plain tensors"),
            ("zeros in the decoder's matrices", zeros),
            ("patterns", counted(self.patterns)),
        ]
        if 0 < len(self.dense) < len(record.matrices):
            rows.append(("stayed dense", shortened(self.dense)))
        if stored:
            exact = sum(1 for x in record.matrices if x.stored_as and not x.rounded)
            rows.append(("stored without rounding", f"{exact} of {stored.total()} matrices"))
        if record.masks is not None:
            rows.append(("masks", record.masks["name"]))
        if record.adapter is not None:
            rows.append(("adapter", f"{record.adapter['name']} ({record.adapter['kind']})"))
        if record.dropped:
            rows.append(("not part of the model", shortened(record.dropped)))
        rows += [("note", note) for note in record.notes]
        return [*rows, ("time", f"{record.seconds:.1f} s")]

    def layers(self) -> Table:
        """A line for each decoder layer."""
        by_layer: dict[int, list[ImportedMatrix]] = {}
        for matrix in self.record.matrices:
            by_layer.setdefault(layer_of(matrix.name), []).append(matrix)
        rows = []
        for index, matrices in sorted(by_layer.items()):
            weights = sum(prod(x.shape) for x in matrices)
            share = sum(x.zeros for x in matrices) / weights
            found = counted(Counter(x.pattern for x in matrices))
            rows.append((str(index), str(len(matrices)), f"{share:.2%}", found))
        return Table.of("decoder layers", ("layer", "matrices", "zeros", "patterns"), rows)

    def blocks(self) -> Sequence[Block]:
        """What was found, then all layers."""
        return [
            Table.facts("imported", self.facts()),
            self.layers(),
            *after_a_dense_folder(self.output, self.sparsity),
        ]


def counted(counts: dict[Any, int] | Counter[Any]) -> str:
    """Words with their counts."""
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def shortened(names: Iterable[str], shown: int = 4) -> str:
    """The number of names, and the first of them."""
    known = list(names)
    return f"{len(known)}: {', '.join(known[:shown])}{', …' if len(known) > shown else ''}"
