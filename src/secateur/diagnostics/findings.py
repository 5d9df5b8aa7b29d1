"""A finding of a diagnosis: what, how severe, where, the evidence, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first: an error is proven, a warning is likely, a note is worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        id: the kind; docs/diagnosis.md has an entry for each.
        severity: how severe.
        where: the tensor, layer or file.
        evidence: the measured numbers.
        remedy: what to do about it.
    """

    id: str
    severity: Severity
    where: str
    evidence: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        """All fields."""
        return asdict(self)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The same findings, the worst first."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def listed(items: Sequence[object], most: int = 8) -> str:
    """The first items in one line, and the number of the others."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more
