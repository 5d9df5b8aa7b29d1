"""What every step of a structured cut is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import CheckpointReader, PatchedCopy
from secateur.progress import Progress
from secateur.recipes.structure import StructureRecipe
from secateur.workflows.structure.cut_plan import CutPlan

__all__ = ["NOTES", "StepContext"]

NOTES = "step.json"
"""The file that a step leaves beside its model."""


@dataclass(frozen=True)
class StepContext:
    """What every step is given.

    Attributes:
        recipe: of the cut.
        aim: in units.
        source: the folder of the uncut model.
        windows: calibration tokens [samples, sequence_length].
        windows_file: where they are kept.
        device: where layers are worked on.
        work: the folder in which each step has a folder of its own.
        progress: receives every step.
    """

    recipe: StructureRecipe
    aim: CutPlan
    source: Path
    windows: Tensor
    windows_file: Path
    device: torch.device
    work: Path
    progress: Progress

    def target(self, folder: Path, output: PatchedCopy | None = None) -> CheckpointTarget:
        """A model folder, to be looked at, or with a copy that takes new weights."""
        trust = self.recipe.trust_remote_code
        reader = CheckpointReader(folder)
        return CheckpointTarget(reader, output, self.device, trust_remote_code=trust)

    def scratch(self, name: str) -> Path:
        """A folder for what a step notes on its way."""
        folder = self.work / f"{name}-notes"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
