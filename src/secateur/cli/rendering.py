"""How results look on a terminal: sizes and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from secateur.models.inventory import Left

__all__ = [
    "gib",
    "mib",
    "not_pruned",
    "print_json",
    "print_table",
    "stderr",
    "stdout",
]

stdout = Console()
stderr = Console(stderr=True)


def gib(size: float) -> str:
    """A size in GiB."""
    return f"{size / 2**30:.2f} GiB"


def mib(size: float) -> str:
    """A size in MiB."""
    return f"{size / 2**20:,.0f} MiB"


def not_pruned(left: Sequence[Left]) -> str:
    """Matrices that are not pruned, one sort a line."""
    return "\n".join(one.told() for one in left) or "nothing"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 1
) -> None:
    """A table on stdout; columns from number `numbers` on are aligned right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < numbers else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    stdout.print(table)
