"""The text that statistics are gathered on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.recipes.section import CALIBRATION, MAX_SEED, Flag, Section

TEXT = (
    "JSONL or text file, folder of texts, hub data set, named text, or safetensors file of windows."
)


class CalibrationText(Section):
    """Where the calibration text comes from."""

    group: ClassVar[str] = CALIBRATION

    source: Annotated[str, Flag("calibration", value="TEXT")] = Field(
        "c4",
        description=f"Calibration text: {TEXT} Or several with weights: code.jsonl=2,math.jsonl=1.",
    )


class CalibrationWindows(Section):
    """How windows are cut from a text."""

    group: ClassVar[str] = CALIBRATION

    field: str = Field("text", description="The field of a JSONL line that holds the text.")
    windows: int = Field(128, gt=0, description="Number of calibration windows.")
    sequence_length: Annotated[
        int | None, Flag(default="2048, or the model's length if that is shorter")
    ] = Field(None, gt=1, description="Tokens per window.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed that chooses the windows.")
    packing: Literal["concatenate", "random-crop"] = Field(
        "concatenate",
        description="concatenate joins all documents and cuts them into windows. random-crop takes "
        "each window from a random place of a random document, as the papers do.",
    )


class Calibration(CalibrationWindows, CalibrationText):
    """The text that statistics are gathered on."""

    generated_windows: int = Field(
        0, ge=0, description="Extra calibration windows that the dense model generates."
    )
