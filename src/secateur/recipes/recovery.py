"""How a pruned or cut model recovers within the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.section import RECOVERY, Flag, Section


class Reconstruct(Section):
    """How each pruned layer is tuned to reproduce the dense layer's outputs."""

    group: ClassVar[str] = RECOVERY

    passes: Annotated[int, Flag("tune_passes")] = Field(
        0,
        ge=0,
        description="Tune each layer after pruning, in this many passes over the calibration "
        "windows, to reproduce the dense layer's outputs. 0: no tuning.",
    )
    learning_rate: Annotated[float, Flag("tune_learning_rate")] = Field(
        1e-3, gt=0, lt=1, description="Learning rate of the first tuning step."
    )
    remask: Annotated[bool, Flag("tune_remask")] = Field(
        True, description="Let the mask change while a layer is tuned."
    )


DISTILLING: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    (
        "distill_tokens",
        "distill_learning_rate",
        "distill_next_token",
        "distill_sweep_windows",
    ),
    ("distill_epochs",),
)
"""What the options of the distillation need, as in `Recipe.needs`."""


class Distill(Section):
    """How the whole pruned model learns from the dense model."""

    group: ClassVar[str] = RECOVERY

    epochs: Annotated[int, Flag("distill_epochs")] = Field(
        0,
        ge=0,
        description="Train the new model to match the dense model, in this many epochs over the "
        "calibration windows. 0: no distillation.",
    )
    tokens: Annotated[int, Flag("distill_tokens")] = Field(
        0,
        ge=0,
        description="An epoch of the distillation reads at least this many tokens: the calibration "
        "windows, then more windows of the same text. 0: the calibration windows alone.",
    )
    peak_learning_rate: Annotated[
        float | None, Flag("distill_learning_rate", default="chosen by short trials")
    ] = Field(
        None,
        gt=0,
        lt=1,
        description="Highest learning rate of the distillation. The default is 0.25 / hidden size "
        "· √(tokens in a window / 2048), or less if that is better in short trials.",
    )
    next_token: Annotated[float, Flag("distill_next_token")] = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the next-token loss, 0 to 1; the rest is the divergence from the "
        "dense model.",
    )
    sweep_windows: Annotated[
        int | None, Flag("distill_sweep_windows", default="0 if both models fit, else 16")
    ] = Field(
        None,
        ge=0,
        description="Distill with one decoder layer in memory, in sweeps over this many windows: "
        "all layers forward, then all layers backward. 0: both whole models in memory.",
    )
