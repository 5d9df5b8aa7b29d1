"""What `export`, `import` and `push` return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from secateur.exporting import Exported
from secateur.reporting.results.next_steps import after_a_dense_folder, layer_of
from secateur.reporting.tables import Block, Line, Result, Table, binary_size
from secateur.runs.records import Import, ImportedMatrix


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """The files of an export.

    Attributes:
        target: the name of the target.
        type: how matrices are stored.
        output: the folder of the files.
        files: their names.
        exported: sizes, types and zeros.
        seconds: wall time.
    """

    target: str
    type: str
    output: Path
    files: tuple[str, ...]
    exported: Exported
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "target": self.target,
            "type": self.type,
            "output": str(self.output),
            "files": list(self.files),
            **asdict(self.exported),
            "seconds": self.seconds,
        }

    def blocks(self) -> Sequence[Block]:
        """One table, then the notes."""
        made = self.exported
        types = ", ".join(f"{count} {name}" for name, count in sorted(made.types.items()))
        share = made.zeros / made.weights if made.weights else 0.0
        rows = [
            ("files", ", ".join(str(self.output / name) for name in self.files)),
            ("size", binary_size(made.file_bytes)),
            ("tensors", types),
            ("zeros in the matrices", f"{share:.2%}"),
            ("zeros kept exactly", f"{made.zeros_kept:,} of {made.zeros:,}"),
            ("time", f"{self.seconds:.1f} s"),
        ]
        rows += [("note", note) for note in made.notes]
        return [Table.facts(f"exported to {self.target}, {self.type}", rows)]


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
        record = self.record.to_json()
        found = {name: record.pop(name) for name in ("sparsity", "matrices")}
        return {
            "output": str(self.output),
            "parameters": self.parameters,
            "patterns": self.patterns,
            **record,
            **found,
        }

    def facts(self) -> list[tuple[str, str]]:
        """What was found, as names and values."""
        record = self.record
        stored = Counter(x.stored_as for x in record.matrices if x.stored_as)
        zeros = f"{record.sparsity:.2%}" if record.sparsity else "none: nothing has been pruned"
        rows = [
            ("kind of source", record.kind),
            ("matrices stored as", _counted(stored) or "plain tensors"),
            ("zeros in the decoder's matrices", zeros),
            ("patterns", _counted(self.patterns)),
        ]
        if 0 < len(self.dense) < len(record.matrices):
            rows.append(("stayed dense", _shortened(self.dense)))
        if stored:
            exact = sum(1 for x in record.matrices if x.stored_as and not x.rounded)
            rows.append(("stored without rounding", f"{exact} of {stored.total()} matrices"))
        if record.masks is not None:
            rows.append(("masks", record.masks["name"]))
        if record.adapter is not None:
            rows.append(("adapter", f"{record.adapter['name']} ({record.adapter['kind']})"))
        if record.dropped:
            rows.append(("not part of the model", _shortened(record.dropped)))
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
            found = _counted(Counter(x.pattern for x in matrices))
            rows.append((str(index), str(len(matrices)), f"{share:.2%}", found))
        return Table.of("decoder layers", ("layer", "matrices", "zeros", "patterns"), rows)

    def blocks(self) -> Sequence[Block]:
        """What was found, then all layers."""
        return [
            Table.facts("imported", self.facts()),
            self.layers(),
            *after_a_dense_folder(self.output, self.sparsity),
        ]


def _counted(counts: dict[Any, int] | Counter[Any]) -> str:
    """Words with their counts."""
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _shortened(names: Iterable[str], shown: int = 4) -> str:
    """The number of names, and the first of them."""
    known = list(names)
    return f"{len(known)}: {', '.join(known[:shown])}{', …' if len(known) > shown else ''}"


@dataclass(frozen=True, repr=False)
class PushResult(Result):
    """What was published, or would be.

    Attributes:
        repo: the repository.
        private: whether it is private.
        branch: the branch; None for the main one.
        files: sizes in bytes by name.
        left_out: files of the folder that are not published.
        zeros: the fraction of zeros found in the decoder's matrices.
        card: the text of the card.
        notes: what a user must know, one sentence each.
        address: of the commit; None if nothing was sent.
    """

    repo: str
    private: bool
    branch: str | None
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    zeros: float
    card: str
    notes: tuple[str, ...]
    address: str | None

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {**asdict(self), "total_bytes": sum(self.files.values())}

    def blocks(self) -> Sequence[Block]:
        """What it is, the files, and for a dry run the card."""
        rows = [
            ("repository", f"{self.repo} ({'private' if self.private else 'public'})"),
            ("branch", self.branch or "main"),
            ("zeros in the decoder's matrices", f"{self.zeros:.2%}"),
            ("size", binary_size(sum(self.files.values()))),
            ("left out", ", ".join(self.left_out) or "nothing"),
            *(("note", note) for note in self.notes),
            ("sent", self.address or "nothing: this was a dry run"),
        ]
        files = [(name, f"{size:,}") for name, size in self.files.items()]
        shown: list[Block] = [
            Table.facts("published" if self.address else "would be published", rows),
            Table.of("files", ("name", "bytes"), files),
        ]
        return shown if self.address else [*shown, Line(self.card)]
