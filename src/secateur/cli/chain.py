"""`secateur chain`: several verbs one after the other, written in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.errors import RecipeError

__all__ = ["chain"]


def chain(
    recipe: Annotated[
        str, typer.Argument(help="YAML: model, output, and steps, each a verb with its options.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for the last model.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped chain.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what a stopped chain left.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Cut, prune, train and compress in one go, with one account of what is left."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.recipes.reading import read_recipe_file
    from secateur.workflows.chain import chain as run_chain

    values = read_recipe_file(Path(recipe))
    place = output or values.get("output")
    unknown = sorted(values.keys() - {"model", "output", "steps"})
    missing = [name for name in ("model", "steps") if name not in values]
    if unknown or missing or place is None:
        raise RecipeError(
            f"{unknown[0]}: unknown key" if unknown else f"{(missing or ['output'])[0]}: missing",
            where=recipe,
            remedy="a chain has a model, an output and steps: a list of verbs with options",
        )
    if not isinstance(values["model"], str) or not isinstance(place, str):
        raise RecipeError(
            "model and output are names", where=recipe, remedy="put them in quotes if need be"
        )
    with show_progress() as progress:
        report = run_chain(
            values["model"],
            output=place,
            steps=values["steps"] or [],
            resume=resume,
            restart=restart,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print_result(report, as_json=as_json)
