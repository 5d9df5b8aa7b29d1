"""The step after a cut of layers or channels: refits the remaining linears to the uncut model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.engine.memory_budget import fitting_plan
from secateur.engine.plan import Plan, plan_run
from secateur.engine.prune.refit import Refit, can_refit
from secateur.engine.prune.selection import Selection
from secateur.engine.prune.settings import Settings
from secateur.engine.prune.tasks import tasks_of
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import Architecture
from secateur.models.copies import copy_of
from secateur.models.opening import open_weights
from secateur.recipes.structure import StructureRecipe
from secateur.runs.atomic import write_json
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import compose
from secateur.workflows.structure.cut_plan import CutPlan
from secateur.workflows.structure.step_context import NOTES, StepContext


def refits(recipe: StructureRecipe, aim: CutPlan, architecture: Architecture) -> bool:
    """Whether the recipe enables this step, and the step can help."""
    channels = aim.keep_hidden is not None
    chosen = recipe.asymmetric and (channels or aim.drop_layers > 0)
    return chosen and can_refit(architecture, channels=channels)


class RefitStep:
    """Fits linears to the outputs of the uncut model. Sizes stay the same."""

    name = "refit"

    def carry_out(self, context: StepContext, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Refit into a new folder, unless an earlier run did. Return the folder and its notes.

        A killed refit resumes after the last layer in its ledger.
        """
        made = context.work / self.name
        if not made.exists():
            partial = context.work / f"{self.name}.partial"
            copy = copy_of(open_weights(folder), partial)
            written = context.scratch(self.name) / "layers.jsonl"
            ledger, done = Ledger(written), 0
            if ledger.begun:
                done = ledger.resume()
            else:
                copy.create(context.progress)
                ledger.begin()
            self.refit(context, context.target(folder, copy), ledger).execute(done)
            notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            record = dict.fromkeys(("before", "after"), notes["after"])
            record |= {"step": self.name, "by": "least squares", "varied": notes["varied"]}
            write_json(partial / NOTES, record)
            partial.rename(made)
        return made, json.loads((made / NOTES).read_text(encoding="utf-8"))

    def refit(self, context: StepContext, cut: CheckpointTarget, ledger: Ledger) -> Refit:
        """Return the refit of the model that the previous steps left."""
        dense = context.target(context.source)
        layers = kept(context, "depth", "layers") or range(len(dense.layers))
        return Refit(
            dense,
            cut,
            layers,
            kept(context, "hidden", "hidden"),
            context.windows,
            settings_of(context, dense),
            ledger,
            context.progress,
        )


def kept(context: StepContext, step: str, kind: str) -> Sequence[int] | None:
    """Return the units of one kind that the earlier steps kept; None for all."""
    notes = context.work / step / NOTES
    if not notes.exists():
        return None
    found: Sequence[int] = json.loads(notes.read_text(encoding="utf-8"))["cut"][kind]
    return found


def settings_of(context: StepContext, dense: CheckpointTarget) -> Settings:
    """Return the settings, with hidden states on disk if memory cannot hold them.

    Raises:
        MemoryBudgetError: there is not enough memory even with hidden states on disk.
    """
    memory = context.recipe.memory
    # a run that fits writers to the uncut model needs the same: two layers and their forwards
    tasks = tasks_of(dense, Selection(), compose("wanda", "unstructured"), 0.5)
    uniform = allocations["uniform"]()

    def settings(activations: str) -> Settings:
        return Settings(
            asymmetric=True,
            fast_matmuls=context.recipe.fast_matmuls,
            micro_batch_tokens=memory.micro_batch_tokens,
            activations=activations,
            work=context.scratch(RefitStep.name),
        )

    def planned(activations: str) -> Plan:
        return plan_run(dense, tasks, context.windows, settings(activations), 0, uniform, 0)

    return settings(
        fitting_plan(
            planned,
            dense.device,
            max_memory=memory.max_bytes,
            activations=memory.activations,
        )[1]
    )
