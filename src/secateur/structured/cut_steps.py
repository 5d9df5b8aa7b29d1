"""The steps of a structured cut. Each step turns one model folder into a smaller one.

    depth ─► experts ─► routers ─► hidden ─► refit ─► query heads ─► heads and neurons

The last two choose units with a run of `secateur prune` (`choices.py`).

A step's folder is complete, or it does not exist, so a killed run resumes after the last finished
step. The refit comes after a cut of layers or channels: it fits the remaining linears to the uncut
model. Routers are tuned after a cut of experts.

Several processes share the survey of experts (`choices.py`).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.engine.plan import PRUNING, Need, fitting_plan, memory_budget
from secateur.engine.plan_memory import PrunePlan, plan_run
from secateur.engine.prune.refit import Refit
from secateur.engine.prune.routers import RouterTuning, mixture_bytes
from secateur.engine.prune.tasks import Selection, Settings, tasks_of
from secateur.models.at_rest import AssembledReader
from secateur.models.checkpoint import PatchedCopy
from secateur.models.opening import copy_of, open_weights
from secateur.models.targets import CheckpointTarget
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.structure import StructureRecipe
from secateur.runs.ledger import Ledger
from secateur.runs.output import whole_folder, write_json
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import compose
from secateur.structured.cut import Cut
from secateur.structured.cut_plan import CutPlan
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint

if TYPE_CHECKING:
    from secateur.engine.prepared import Prepared

STEP = "step.json"
"""The file that a step writes into the folder of its model."""

REFIT, ROUTERS = "refit", "routers"
"""The steps that fit weights, and their folders."""

FEWER = "use fewer --windows, or --effort fast, which tunes nothing"
"""What to do where experts cannot be fitted."""


ChangeOfRun = Callable[["Prepared"], "Prepared"]
"""Changes a run of `secateur prune` that is ready."""


@dataclass(frozen=True)
class CutContext:
    """The inputs that all steps share.

    Attributes:
        recipe: recipe of the cut.
        plan: of the cut, in units.
        source: the folder of the uncut model.
        windows: calibration tokens [samples, sequence_length].
        windows_file: the file of these windows.
        device: the device for the work on layers.
        work: the folder that holds a folder for each step.
        progress: receives every step.
        prune: carries out a pruning: its recipe, and a change of what is prepared.
        ranks: the processes that share surveys; this one is the first.
    """

    recipe: StructureRecipe
    plan: CutPlan
    source: Path
    windows: Tensor
    windows_file: Path
    device: torch.device
    work: Path
    progress: Progress
    prune: Callable[[PruneRecipe, ChangeOfRun], None]
    ranks: Ranks = ALONE

    def target(self, folder: Path, output: PatchedCopy | None = None) -> CheckpointTarget:
        """Open a model folder to read, or with a copy that receives new weights."""
        return CheckpointTarget(open_weights(folder), output, self.device)

    def scratch(self, name: str) -> Path:
        """The folder for the intermediate files of a step."""
        folder = self.work / f"{name}-notes"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def kept(self, step: str, kind: str) -> Sequence[int] | None:
        """The units of one kind that an earlier step kept; None for all."""
        made = self.work / step
        return read_notes(made)["cut"][kind] if made.exists() else None


Found = tuple[Cut, dict[str, Any], Path]
"""What a choice finds: the units to keep, its record, and the folder with the kept weights (the
model's own if they did not change)."""

Choice = Callable[[CutContext, Path], Found]
"""Chooses units of the model in a folder."""

CutStep = Callable[[CutContext, Path], tuple[Path, dict[str, Any]]]
"""Turns the model in a folder into a smaller one; returns its folder and the notes."""


def read_notes(made: Path) -> dict[str, Any]:
    """The notes in the folder of a finished step."""
    found: dict[str, Any] = json.loads((made / STEP).read_text(encoding="utf-8"))
    return found


def cut_step(
    context: CutContext, folder: Path, *, name: str, choose: Choice
) -> tuple[Path, dict[str, Any]]:
    """Choose and cut, unless an earlier run did. Return the new folder and its notes.

    Args:
        context: the inputs of all steps.
        folder: the model before the step.
        name: depth, experts, hidden, queries or width.
        choose: the rule of choice.
    """
    made = context.work / name
    if not made.exists():
        cut, how, kept = choose(context, folder)
        with whole_folder(made) as partial, warnings.catch_warnings():
            # the result reports once that layers differ
            warnings.simplefilter("ignore", VariedSizesWarning)
            found = cut_checkpoint(kept, cut, partial, progress=context.progress)
            notes = {"step": name, "cut": cut.to_json(), **how, **found.to_json()}
            write_json(partial / STEP, notes)
        if kept != folder:
            shutil.rmtree(kept)
    return made, read_notes(made)


def fit_step(context: CutContext, folder: Path, *, name: str) -> tuple[Path, dict[str, Any]]:
    """Fit the weights of a cut model to those of the uncut one, layer by layer.

    A killed run resumes after the last layer in its ledger. Sizes stay.

    Args:
        context: the inputs of all steps.
        folder: the model before the step.
        name: `REFIT`, which fits linears to the outputs of the uncut model; or `ROUTERS`, which
            tunes routers and experts to the model before the cut of experts.
    """
    made, partial = context.work / name, context.work / f"{name}.partial"
    if not made.exists():
        reader, uncut = open_weights(folder), context.source
        copy, depth = copy_of(reader, partial), context.work / "depth"
        if name == ROUTERS:
            uncut = depth if depth.exists() else uncut
            if isinstance(reader, AssembledReader):
                copy = PatchedCopy(reader.stored, partial)  # what is in fewer bits stays so
        dense, cut = context.target(uncut), context.target(folder, copy)
        settings = _fit_settings(context, dense, name)
        ledger, done = Ledger(context.scratch(name) / "layers.jsonl"), 0
        if ledger.begun:
            done = ledger.resume()
        else:
            copy.create(context.progress)
            ledger.begin()
        layers: Sequence[int] = range(len(dense.layers))
        shared = context.windows, settings, ledger, context.progress
        notes = read_notes(folder)
        if name == ROUTERS:
            kept = {int(layer): own for layer, own in notes["cut"]["experts"].items()}
            own, fixed = cut.reader, set[str]()
            if isinstance(own, AssembledReader):
                fixed = {n for n, x in cut.stored.items() if own.owner.get(x, x) in own.made}
            RouterTuning(dense, cut, layers, *shared, fixed=fixed, kept=kept).execute(done)
        else:
            layers = context.kept("depth", "layers") or layers
            hidden = context.kept("hidden", "hidden")
            Refit(dense, cut, layers, *shared, channels=hidden).execute(done)
        by = "dense outputs" if name == ROUTERS else "least squares"
        record = {"step": name, "by": by, "varied": notes["varied"]}
        record |= dict.fromkeys(("before", "after"), notes["after"])
        errors = {str(x.layer): x.reconstruction for x in ledger.layers if x.reconstruction}
        write_json(partial / STEP, record | ({"errors": errors} if errors else {}))
        partial.rename(made)
    return made, read_notes(made)


def _fit_settings(context: CutContext, dense: CheckpointTarget, name: str) -> Settings:
    """Settings with hidden states on disk if memory cannot hold them."""
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
            work=context.scratch(name),
        )

    mixture = mixture_bytes(dense, context.windows.numel()) if name == ROUTERS else 0
    fit = Need("mixture", mixture, (PRUNING,), "least squares of experts", FEWER)

    def planned(activations: str) -> PrunePlan:
        plan = plan_run(dense, tasks, context.windows, settings(activations), uniform)
        return replace(plan, needs=(*plan.needs, fit))

    # Memory first, disk if that is too much, unless the recipe says which.
    budget = memory_budget(memory.max_bytes, dense.device)
    return settings(fitting_plan(planned, dense.device, memory.activations, budget)[1])
