"""What a diagnosis finds: what, how bad, where, by what evidence, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["SEVERITIES", "Finding", "Severity", "by_severity", "listed"]

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first. An error is proven wrong, a warning is likely wrong, a note is worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        id: which kind; docs/diagnosis.md has an entry for each.
        severity: how bad.
        where: the tensor, layer or file.
        evidence: what was measured, with the numbers.
        remedy: what can be done about it.
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
    """The items in a line, cut after the first few."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more
