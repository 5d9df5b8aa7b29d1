"""The contract of every result: data for programs, tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from secateur.reporting.tables import Block, html, plain_text, print_blocks


@runtime_checkable
class Result(Protocol):
    """What a verb returns.

    The command line prints `to_json()` with `--json` and calls `show()` without it. In Python
    `print(result)` and a result as the last line of a cell show the same tables, without colours.
    Its dataclass takes `repr=False`: the fields hold every layer.
    """

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object."""
        ...

    def blocks(self) -> Sequence[Block]:
        """The tables and lines that people read."""
        ...

    def show(self) -> None:
        """Write the tables to stdout."""
        print_blocks(self.blocks())

    def __str__(self) -> str:
        """The tables as text."""
        return plain_text(self.blocks())

    def __repr__(self) -> str:
        """The tables as text, for consoles."""
        return str(self)

    def _repr_html_(self) -> str:
        """The tables as HTML, for notebooks."""
        return html(self.blocks())
