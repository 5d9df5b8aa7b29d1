"""Options that several verbs share, and how they become a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import RecipeError

if TYPE_CHECKING:
    from secateur.recipes.schema import PruneRecipe

__all__ = ["recipe_from", "values_from"]

ModelArgument = Annotated[
    str, typer.Argument(help="Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`).")
]
Effort = Annotated[
    str | None,
    typer.Option(help="A preset: fast, balanced or best; fills in what is not given. [balanced]"),
]
Method = Annotated[
    str | None, typer.Option(help="A famous name; `secateur methods` lists them. [the preset's]")
]
Refine = Annotated[str | None, typer.Option(help="Better the score's mask first: swaps.")]
Asymmetric = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric/--symmetric",
        help="Fit the dense model's outputs, or each matrix's own. [the preset's]",
    ),
]
FastMatmuls = Annotated[
    bool | None,
    typer.Option(
        "--fast-matmuls/--exact-matmuls",
        help="Calibrate in bfloat16 where the processor is faster at it. [the preset's]",
    ),
]
Passes = Annotated[
    int | None, typer.Option(help="Passes of tuning each pruned layer. [the preset's]")
]
LearningRate = Annotated[float | None, typer.Option(help="Of the tuning. [1e-3]")]
Epochs = Annotated[
    int | None,
    typer.Option(help="Epochs in which the pruned model learns from the dense. [the preset's]"),
]
ScoreName = Annotated[
    str | None, typer.Option("--score", help="A score, for a composition of your own.")
]
SolverName = Annotated[
    str | None, typer.Option("--solver", help="A solver, for a composition of your own.")
]
Sparsity = Annotated[float | None, typer.Option(help="Fraction of zeros, 0 to 1.")]
PatternText = Annotated[
    str | None,
    typer.Option("--pattern", help="unstructured, N:M (N kept of M), or ROWSxCOLUMNS blocks."),
]
Scope = Annotated[str | None, typer.Option(help="Scores compete within: row, layer or global.")]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="How much each linear loses: uniform, owl, layer-sensitivity, global, search. "
        "[uniform]"
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(help="Glob of linears to prune; may be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Glob of linears to leave dense; may be repeated.")
]
Override = Annotated[
    list[str] | None,
    typer.Option(help="GLOB=SPARSITY, for exceptions; may be repeated. 0 keeps dense."),
]
Sequential = Annotated[
    str | None,
    typer.Option(help="group: prune as statistics arrive, one pass. layer: as the papers, two."),
]
OnCollapse = Annotated[
    str | None,
    typer.Option(help="When a pruned linear has lost its output: stop or warn. [warn]"),
]
CalibrationSource = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="JSONL or text file, folder, hub data set, named text, or safetensors windows. [c4]",
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows. [128]")]
Generated = Annotated[
    int | None,
    typer.Option(help="Windows more, which the dense model writes itself. [the preset's]"),
]
SequenceLength = Annotated[
    int | None, typer.Option(help="Tokens per window. [2048, or the model's length]")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the choice of windows. [0]")]
Packing = Annotated[str | None, typer.Option(help="concatenate or random-crop.")]
Field = Annotated[
    str | None, typer.Option("--field", help="Field of a JSONL line that holds the text.")
]
Budget = Annotated[
    float | None, typer.Option("--memory-budget-gib", help="Peak resident memory allowed.")
]
ActivationsPlace = Annotated[
    str | None, typer.Option("--activations", help="auto, memory or disk.")
]
MicroBatch = Annotated[int | None, typer.Option(help="Tokens that pass a layer at once. [2048]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="Of weights dequantized from GGUF. [float32]")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code in the checkpoint run.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the recipe, for example memory.budget_gib=6."),
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]

OF_THE_COMMAND = {"model", "assignments", "override", "resume", "restart", "overwrite", "as_json"}
"""Options that are not fields of the recipe."""

SWITCHES = {"trust_remote_code"}
"""Options that say nothing when they are off."""


def recipe_from(given: dict[str, Any]) -> PruneRecipe:
    """The pruning recipe that a verb's arguments describe; options that are None say nothing.

    Args:
        given: the arguments of the verb, by name.
    """
    from secateur.recipes.reading import build_recipe

    return build_recipe(*values_from(given))


def values_from(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], str | None]:
    """Values of a recipe, `--set` assignments, and the recipe's file, from a verb's arguments."""
    from secateur.recipes.reading import (
        SECTIONS,
        is_recipe_file,
        nested,
        read_recipe_file,
    )

    model = given["model"]
    values: dict[str, Any] = {"model": model}
    where = None
    if is_recipe_file(model):
        values, where = read_recipe_file(Path(model)), model
    options = {
        "budget_gib" if key == "memory_budget_gib" else key: value
        for key, value in given.items()
        if key not in OF_THE_COMMAND and value is not None and (value or key not in SWITCHES)
    }
    if given.get("override"):
        options["overrides"] = dict(parse_override(text) for text in given["override"])
    for key, value in nested(options).items():
        if key in SECTIONS:
            section = values.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(
                    f"{key} is {str(section)[:40]!r}, not keys and values",
                    where=where,
                    remedy=f"write for example '{key}: {{{next(iter(value))}: …}}'",
                )
            section.update(value)
        else:
            values[key] = value
    return values, tuple(given.get("assignments") or ()), where


def parse_override(text: str) -> tuple[str, float]:
    """Read GLOB=SPARSITY.

    Raises:
        RecipeError: it is not written like this.
    """
    glob, equals, number = text.rpartition("=")
    try:
        if equals:
            return glob, float(number)
    except ValueError:
        pass
    raise RecipeError(
        f"--override {text!r} is not GLOB=SPARSITY",
        remedy="for example --override 'model.layers.0.*=0.3'",
    )
