"""A verb of the command line: it counts the files of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.progress import Progress
from secateur.recipes.options import Recipe
from secateur.reporting.tables import Block, Result, Table

VERB = {
    "name": "quince-count",
    "stage": "Measure a model",
    "summary": "Count the files of a folder.",
    "recipe": "quince.verb:CountRecipe",
    "step": "quince.verb:count",
}


class CountRecipe(Recipe):
    """One count."""

    model: str
    """The folder."""
    hidden: bool = False
    """Count files whose names begin with a dot too."""


@dataclass(frozen=True, repr=False)
class CountResult(Result):
    """The number of files."""

    files: int

    def to_json(self) -> dict[str, Any]:
        """The number."""
        return {"files": self.files}

    def blocks(self) -> list[Block]:
        """One line."""
        return [Table.facts("", [("files", str(self.files))])]


def count(recipe: CountRecipe, progress: Progress) -> CountResult:
    """Count."""
    names = [file.name for file in Path(recipe.model).iterdir()]
    return CountResult(sum(recipe.hidden or not name.startswith(".") for name in names))
