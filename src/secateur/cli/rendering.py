"""Print results to stdout. Everything else goes to stderr."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from secateur.reporting.tables import Result

stdout = Console()
stderr = Console(stderr=True)


def print_result(result: Result, *, as_json: bool) -> None:
    """Write a result to stdout: tables for people, or one JSON document."""
    if as_json:
        _print_json(result.to_json())
    else:
        result.show()


def _print_json(value: Any) -> None:
    """Write one JSON document to stdout."""
    print(json.dumps(value, indent=2))
