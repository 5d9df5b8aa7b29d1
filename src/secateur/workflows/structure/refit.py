"""The step after layers or channels went: what stayed is refitted beside the uncut model."""

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
from secateur.models.checkpoint import CheckpointReader, PatchedCopy
from secateur.recipes.structure import StructureRecipe
from secateur.runs.atomic import write_json
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import compose
from secateur.workflows.structure.cut_plan import CutPlan
from secateur.workflows.structure.step_context import NOTES, StepContext

__all__ = ["RefitStep", "refits"]


def refits(recipe: StructureRecipe, aim: CutPlan, architecture: Architecture) -> bool:
    """Whether a cut has this step: the recipe turns it on, and it can help."""
    channels = aim.keep_hidden is not None
    chosen = recipe.asymmetric and (channels or aim.drop_layers > 0)
    return chosen and can_refit(architecture, channels=channels)


class RefitStep:
    """Linears are fitted to what the uncut model computes; the sizes stay."""

    name = "refit"

    def carry_out(self, context: StepContext, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Refit into a new folder, unless an earlier run has; returns it and its notes.

        A killed refit resumes behind the last layer in its ledger.
        """
        made = context.work / self.name
        if not made.exists():
            partial = context.work / f"{self.name}.partial"
            copy = PatchedCopy(CheckpointReader(folder), partial)
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
        """The refit of what the steps before this one left."""
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
    """What an earlier step left of one kind of unit; None for all."""
    notes = context.work / step / NOTES
    if not notes.exists():
        return None
    found: Sequence[int] = json.loads(notes.read_text(encoding="utf-8"))["cut"][kind]
    return found


def settings_of(context: StepContext, dense: CheckpointTarget) -> Settings:
    """How the work is done; hidden states wait on disk if memory would not hold them.

    Raises:
        MemoryBudgetError: not even then is there enough.
    """
    memory = context.recipe.memory
    # it holds what a run does that fits writers to the uncut model: two layers, their forwards
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
            budget_gib=memory.budget_gib,
            activations=memory.activations,
        )[1]
    )
