"""What a fit works on: the dense model, its matrices, and the windows of calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import CheckpointReader
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Progress
from secateur.recipes.fit import FitRecipe
from secateur.workflows.compress.packable import PackableMatrix
from secateur.workflows.compress.window_parts import save_parts
from secateur.workflows.fit.costs import Costs
from secateur.workflows.fit.pace import Pace
from secateur.workflows.judge.increase import LossJudge
from secateur.workflows.prune.prepare import choose_device

SHARE = 6
"""One calibration window in so many chooses, and one in so many judges the result."""


@dataclass(frozen=True)
class Ground:
    """What a fit works on.

    Attributes:
        recipe: the recipe.
        source: the dense model.
        reader: reads it.
        target: its layers, one at a time.
        matrices: that can be packed, by stored name.
        costs: what the model pays with, and how much of it.
        pace: the time that is left.
        work: folder for levels, windows and measured values.
        fitted: file of the windows that make levels.
        choosing: measures packed folders on the windows that choose.
        judging: measures them on windows that judge the result.
        progress: receives every step.
    """

    recipe: FitRecipe
    source: LocalCheckpoint
    reader: CheckpointReader
    target: CheckpointTarget
    matrices: Mapping[str, PackableMatrix]
    costs: Costs
    pace: Pace
    work: Path
    fitted: Path
    choosing: LossJudge
    judging: LossJudge
    progress: Progress

    @property
    def searched(self) -> Tensor:
        """The windows that choose [windows, length]."""
        return self.choosing.windows

    @property
    def judged(self) -> Tensor:
        """The windows that judge the result [windows, length]."""
        return self.judging.windows

    @classmethod
    def prepared(
        cls,
        recipe: FitRecipe,
        source: LocalCheckpoint,
        reader: CheckpointReader,
        matrices: Mapping[str, PackableMatrix],
        costs: Costs,
        pace: Pace,
        work: Path,
        progress: Progress,
    ) -> Ground:
        """Cut the calibration text into windows, unless an earlier run has.

        Raises:
            RecipeError: there are fewer windows than purposes.
        """
        device, trust = choose_device(recipe.device), recipe.trust_remote_code
        target = CheckpointTarget(reader, None, device, trust_remote_code=trust)
        files = [work / f"{name}.safetensors" for name in ("fitted", "searched", "judged")]
        text = recipe.calibration
        save_parts(
            text.source, text, target, files, SHARE,
            "make levels, choose among them and judge", progress, trust_remote_code=trust,
        )  # fmt: skip
        choosing, judging = (
            LossJudge(target, x, progress, trust_remote_code=trust) for x in files[1:]
        )
        return cls(
            recipe,
            source,
            reader,
            target,
            matrices,
            costs,
            pace,
            work,
            files[0],
            choosing,
            judging,
            progress,
        )

    @property
    def stored(self) -> dict[str, str]:
        """The stored name of every linear, by its own name."""
        return {matrix.linear: name for name, matrix in self.matrices.items() if matrix.prunable}
