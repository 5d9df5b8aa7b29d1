"""A verb of the command line: it counts the files of a folder."""

from __future__ import annotations

from pathlib import Path

from secateur.progress import Progress
from secateur.recipes.options import Recipe
from secateur.reporting.fields import Result

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


class CountResult(Result):
    """The number of files."""

    files: int

    view = """
        -
            files | {files}
    """


def count(recipe: CountRecipe, progress: Progress) -> CountResult:
    """Count."""
    names = [file.name for file in Path(recipe.model).iterdir()]
    return CountResult(files=sum(recipe.hidden or not name.startswith(".") for name in names))
