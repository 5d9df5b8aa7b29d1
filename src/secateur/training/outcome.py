"""What a training did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Outcome"]


@dataclass
class Outcome:
    """What a training did; its progress while it runs.

    Attributes:
        step: of the optimizer.
        tokens: read by all processes together.
        seconds: of all runs together, with validation and saving.
        validations: (step, mean loss in nats per token) before the first step and during the run.
        best_step: whose weights the model has at the end; None without validation.
        best_loss: of the validation windows there.
        best_kept: weights that the masks kept there, where hooks may change masks; else −1.
        stopped: why it ended: `steps`, `minutes` or `patience`.
        log: a line for every step: step, loss, learning_rate, gradient_norm.
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
        """All but the log, as JSON values."""
        facts = {k: v for k, v in vars(self).items() if k != "log"}
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {**facts, "best_loss": best}

    def take(self, facts: dict[str, Any]) -> None:
        """Continue from saved facts."""
        for key in self.facts().keys() & facts.keys():
            setattr(self, key, facts[key])
        self.validations = [(int(step), loss) for step, loss in self.validations]
        self.best_loss = math.inf if self.best_loss is None else self.best_loss
