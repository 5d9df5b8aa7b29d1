"""The curves that TensorBoard shows of a running training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError, install_extra


class TensorBoardLog:
    """Curves in a folder that `tensorboard --logdir FOLDER` shows.

    Args:
        folder: folder of the curves; it may hold curves of other runs.
        step: the step at which the training resumes. Points of later steps are dropped.

    Raises:
        RecipeError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise RecipeError(
                "curves need the package tensorboard, which is not installed",
                remedy=install_extra("tensorboard"),
            ) from missing
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each named curve at a step of the optimizer."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the points that are still in memory."""
        self.writer.close()
