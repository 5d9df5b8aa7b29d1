"""What `push` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table
from secateur.reporting.wording import binary_size


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
