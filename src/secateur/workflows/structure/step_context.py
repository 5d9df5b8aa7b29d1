"""The inputs that all steps of a structured cut share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import PatchedCopy
from secateur.models.opening import open_weights
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress
from secateur.recipes.structure import StructureRecipe
from secateur.workflows.structure.cut_plan import CutPlan

NOTES = "step.json"
"""The file that a step writes beside its model."""


@dataclass(frozen=True)
class StepContext:
    """The inputs that all steps share.

    Attributes:
        recipe: recipe of the cut.
        aim: the plan in units.
        source: the folder of the uncut model.
        windows: calibration tokens [samples, sequence_length].
        windows_file: the file of these windows.
        device: the device for the work on layers.
        work: the folder that holds a folder for each step.
        progress: receives every step.
        ranks: the processes that share surveys; this one is the first.
    """

    recipe: StructureRecipe
    aim: CutPlan
    source: Path
    windows: Tensor
    windows_file: Path
    device: torch.device
    work: Path
    progress: Progress
    ranks: Ranks = ALONE

    def target(self, folder: Path, output: PatchedCopy | None = None) -> CheckpointTarget:
        """Open a model folder to read, or with a copy that receives new weights."""
        trust = self.recipe.trust_remote_code
        reader = open_weights(folder)
        return CheckpointTarget(reader, output, self.device, trust_remote_code=trust)

    def scratch(self, name: str) -> Path:
        """The folder for the intermediate files of a step."""
        folder = self.work / f"{name}-notes"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
