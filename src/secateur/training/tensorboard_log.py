"""What TensorBoard shows of a training, while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError

__all__ = ["TensorBoardLog"]


class TensorBoardLog:
    """Curves in a folder that `tensorboard --logdir FOLDER` shows.

    Args:
        folder: of the curves; it may hold curves of other runs.
        step: where the training resumes; points of later steps are dropped.

    Raises:
        RecipeError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise RecipeError(
                "curves need the package tensorboard, which is not installed",
                remedy="pip install 'secateur[tensorboard]'",
            ) from missing
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves, by their names, at a step of the optimizer."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self.writer.close()
