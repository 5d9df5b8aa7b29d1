"""The contract of a hook: work that the training loop does after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Hook(Protocol):
    """Work after every step. A resumed training restores its state."""

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step.

        Args:
            step: the number of the step, 1 to `steps`.
            steps: number of steps in the plan.
            model: the model in training.
            optimizer: the optimizer of the model.
        """
        ...

    def state(self) -> Mapping[str, Tensor]:
        """The tensors that the hook changes in place, by name.

        The loop saves them with the weights. A resumed training copies the saved values into them.
        """
        ...
