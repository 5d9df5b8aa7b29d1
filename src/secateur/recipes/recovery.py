"""How a pruned or cut model recovers within the same run."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.section import RECOVERY, Flag, Section

__all__ = ["Distill", "Reconstruct"]


class Reconstruct(Section):
    """How a pruned layer is tuned to give the dense layer's outputs."""

    group: ClassVar[str] = RECOVERY

    passes: Annotated[int, Flag("tune_passes")] = Field(
        0,
        ge=0,
        description="Tune each pruned layer in this many passes over the calibration windows; 0 "
        "does not tune.",
    )
    learning_rate: Annotated[float, Flag("tune_learning_rate")] = Field(
        1e-3, gt=0, lt=1, description="Learning rate of the first tuning step."
    )
    remask: Annotated[bool, Flag("tune_remask")] = Field(
        True, description="Let the mask change while a layer is tuned."
    )


class Distill(Section):
    """How the whole pruned model learns from the dense model."""

    group: ClassVar[str] = RECOVERY

    epochs: Annotated[int, Flag("distill_epochs")] = Field(
        0,
        ge=0,
        description="Epochs in which the new model learns from the dense model on the calibration "
        "windows; 0 does not distill.",
    )
    peak_learning_rate: Annotated[
        float | None, Flag("distill_learning_rate", default="0.25 / hidden size")
    ] = Field(None, gt=0, lt=1, description="Highest learning rate of the distillation.")
    next_token: Annotated[float, Flag("distill_next_token")] = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the next-token loss; the rest is the distance from the dense model.",
    )
