"""How results look on a terminal: sizes, tables, progress."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from secateur.models.inventory import Left

__all__ = [
    "ProgressBar",
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


class ProgressBar:
    """Shows the engine's progress with an estimate of the time left."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def start(self, label: str, steps: int) -> None:
        """A stage begins."""
        self.task = self.bar.add_task(label, total=steps, note="")

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps are done."""
        if self.task is not None:
            self.bar.update(self.task, advance=count, note=note)

    def finish(self) -> None:
        """The stage is over."""
        if self.task is not None:
            total = self.bar.tasks[self.task].total
            self.bar.update(self.task, completed=total, note="")
            self.task = None
