"""`secateur diagnose`: check that a model is healthy and has the zeros that it claims."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command
from secateur.errors import RecipeError

if TYPE_CHECKING:
    from secateur.recipes.measure import DiagnoseRecipe


def _run(recipe: DiagnoseRecipe) -> Any:
    """Diagnose with a progress bar, or show what this machine can speed up."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.judge.diagnose import check_target
    from secateur.workflows.judge.diagnose import diagnose as run_diagnosis

    if recipe.machine and recipe.model is not None:
        raise RecipeError(
            "--machine looks at this machine and at no model",
            remedy=f"leave {recipe.model} out, or leave --machine out: the model's result says it",
        )
    if recipe.machine:
        return check_target()
    options = {key: value for key, value in recipe if key != "machine"}
    with show_progress() as progress:
        return run_diagnosis(**options, progress=progress)


def _check(recipe: DiagnoseRecipe) -> None:
    """Refuse a call without a model."""
    if recipe.model is None and not recipe.machine:
        raise RecipeError(
            "MODEL: missing",
            where="secateur diagnose",
            remedy="name a model, or give --machine to see what this machine can speed up",
        )


def _exit_code(result: Any) -> int:
    """3 if a finding is an error."""
    count = getattr(result, "count", None)
    return 3 if count and count("error") else 0


diagnose = command("diagnose", _run, exit_code=_exit_code, check=_check)
