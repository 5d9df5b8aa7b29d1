"""The outcome of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """The outcome of a training, or its progress while it runs.

    Attributes:
        step: number of steps of the optimizer.
        tokens: number of tokens that all processes read.
        seconds: duration of all runs together, with validation and saving.
        validations: (step, mean loss in nats per token) before the first step and during the run.
        best_step: the step with the lowest validation loss; None without validation. The model ends
            with its weights.
        best_loss: validation loss at the best step.
        best_kept: number of weights that the masks kept at the best step, if hooks may change
            masks; else −1.
        stopped: the reason for the end: `steps`, `minutes` or `patience`.
        log: one line for every step: step, loss, learning_rate, gradient_norm.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    best_kept: int = -1
    stopped: str = ""
    log: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Everything except the log, as JSON values."""
        facts = {k: v for k, v in vars(self).items() if k != "log"}
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {**facts, "best_loss": best}

    def take(self, facts: dict[str, Any]) -> None:
        """Continue from saved facts."""
        for key in self.facts().keys() & facts.keys():
            setattr(self, key, facts[key])
        self.validations = [(int(step), loss) for step, loss in self.validations]
        self.best_loss = math.inf if self.best_loss is None else self.best_loss
