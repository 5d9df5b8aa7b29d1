"""The recipe of `secateur sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field
from pydantic import Strict as Strictness

from secateur.recipes.calibration import TEXT
from secateur.recipes.cluster import Cluster
from secateur.recipes.memory import Device
from secateur.recipes.prune import Sparsity
from secateur.recipes.section import (
    CALIBRATION,
    HOW,
    MAX_SEED,
    OUTPUT,
    WHAT,
    Flag,
    Recipe,
    Section,
    Texts,
    text_alone,
)

LENGTH = "2048, or the model's length if that is shorter"


class Points(Section):
    """The model, and the methods, sparsities and patterns to try."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."
    )
    methods: Annotated[Texts, Flag(commas=True)] = Field(
        (), description="Methods or presets (fast, balanced, best), separated by commas."
    )
    sparsities: Annotated[tuple[Sparsity, ...], Strictness(False), Flag(commas=True, value="X")] = (
        Field((), description="Fractions of zeros, separated by commas, such as 0.3,0.5,0.7.")
    )
    patterns: Annotated[Texts, Flag(commas=True)] = Field(
        (), description="Patterns to try as well, separated by commas, such as 2:4,4:8."
    )


class SweepCalibration(Section):
    """The calibration text of all points."""

    group: ClassVar[str] = CALIBRATION

    calibration: Annotated[str, Flag(value="TEXT")] = Field(
        "c4", description=f"Calibration text: {TEXT}"
    )
    windows: int = Field(128, gt=0, description="Number of calibration windows.")
    sequence_length: Annotated[int | None, Flag(default=LENGTH)] = Field(
        None, gt=1, description="Tokens per calibration window."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed that chooses the windows.")


class SweepTexts(Section):
    """The texts that every point is evaluated on."""

    group: ClassVar[str] = HOW

    text: Annotated[Texts, BeforeValidator(text_alone), Flag(value="TEXT")] = Field(
        ("wikitext2",), description="Text to evaluate on; may be repeated."
    )
    text_sequence_length: Annotated[int | None, Flag(default=LENGTH)] = Field(
        None, gt=1, description="Tokens per evaluation window."
    )
    text_windows: Annotated[int | None, Flag(default="all")] = Field(
        None, gt=0, description="Evaluate only this many windows of each text, from its start."
    )


class SweepOutput(Section):
    """What a sweep writes."""

    group: ClassVar[str] = OUTPUT

    output: Annotated[str | None, Flag(short="-o", value="DIR", default="required")] = Field(
        None, description="Folder of the sweep. The same folder again resumes a stopped sweep."
    )
    keep_models: bool = Field(False, description="Keep the weights of every point.")


class SweepRecipe(Device, SweepTexts, SweepCalibration, Points, SweepOutput, Recipe):
    """One sweep."""

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"ray_processes": ("ray",)}

    cluster: Cluster = Field(default_factory=Cluster)
