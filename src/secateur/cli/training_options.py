"""Options that the verbs of training share, and how they become a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from secateur.recipes.training_schema import RetrainRecipe

__all__ = ["run", "training_recipe"]

AnyRecipe = TypeVar("AnyRecipe", bound="RetrainRecipe")

Student = Annotated[
    str, typer.Argument(help="Hub id, folder, named sample, or a recipe (`*.yaml`).")
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder for the result.")]
Text = Annotated[
    list[str] | None,
    typer.Option(
        help="What to train on; written as for calibration. If repeated, equal parts of each. [c4]"
    ),
]
Minutes = Annotated[float | None, typer.Option(help="To train; the learning rate fits itself.")]
Steps = Annotated[int | None, typer.Option(help="Of the optimizer, instead of minutes.")]
Epochs = Annotated[float | None, typer.Option(help="Over the windows, where neither is given. [1]")]
Windows = Annotated[int | None, typer.Option(help="Of the text, at most. [4096]")]
Length = Annotated[int | None, typer.Option("--sequence-length", help="Tokens per window. [512]")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Windows in a step. [4]")]
MicroBatch = Annotated[int | None, typer.Option(help="Windows in one forward. [about 2048 tokens]")]
Rate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate", help="The highest. [0.25 / hidden size, less for steps of few tokens]"
    ),
]
Optimizer = Annotated[str | None, typer.Option(help="A class of torch.optim. [AdamW]")]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Slower, with far less memory.")
]
Lora = Annotated[
    int | None, typer.Option(help="Train adapters of this rank, and merge them. [train weights]")
]
Gradual = Annotated[
    str | None,
    typer.Option(help="Prune on the way to this sparsity, or to N:M. [masks stay as they are]"),
]
Mask = Annotated[
    str | None,
    typer.Option(help="File of masks, or folder of a pruned model. [the model's own zeros]"),
]
Validation = Annotated[
    str | None, typer.Option(help="Text to watch. [windows held out of the training text]")
]
Patience = Annotated[
    int | None, typer.Option(help="Stop after so many validations without a new best. [never]")
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Refuse to begin if more is needed, on the GPU with --device cuda, else by this "
        "process. [4/5 of what is free]"
    ),
]
Tensorboard = Annotated[str | None, typer.Option(help="Folder for curves. [none]")]
Seed = Annotated[int | None, typer.Option(help="Of the choice and order of windows. [0]")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a stopped training.")]
Restart = Annotated[bool, typer.Option("--restart", help="Discard what a stopped one left.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the recipe, for example `rates={'*norm*': 0}`."),
]

OF_THE_COMMAND = {"model", "assignments", "resume", "restart", "overwrite", "as_json"}


def training_recipe(kind: type[AnyRecipe], given: dict[str, Any]) -> AnyRecipe:
    """The recipe that a verb's arguments describe; options that are None or off say nothing.

    Args:
        kind: of the recipe.
        given: the arguments of the verb, by name.
    """
    from secateur.recipes.reading import assigned, is_recipe_file, read_recipe_file, validated
    from secateur.recipes.training_schema import aim_alone, rank_alone

    model = given["model"]
    values: dict[str, Any] = {"model": model}
    where = None
    if is_recipe_file(model):
        values, where = read_recipe_file(Path(model)), model
    values |= {
        key: value
        for key, value in given.items()
        if key not in OF_THE_COMMAND and value is not None and value is not False
    }
    for key, opened in {"lora": rank_alone, "gradual": aim_alone}.items():
        if key in values:  # so that --set gradual.every=20 finds a section
            values[key] = opened(values[key])
    return validated(kind, assigned(values, tuple(given.get("assignments") or ())), where)


def run(recipe: RetrainRecipe, *, as_json: bool, **options: Any) -> None:
    """Train as a recipe says, and show what was done; in several processes the first one does."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.train.checkpoint import run_training

    if int(os.environ.get("RANK", "0")):
        run_training(recipe, **options)
        return
    with show_progress() as progress:
        report = run_training(recipe, progress, **options)
    print_result(report, as_json=as_json)
