"""The steps of a structured cut. Each step turns one model folder into a smaller one.

    depth ─► experts ─► hidden ─► refit ─► query heads ─► heads and neurons

A step's folder is complete, or it does not exist, so a killed run resumes after the last finished
step. The refit comes after a cut of layers or channels: it fits the remaining linears to the uncut
model.

Several processes share the survey of experts. The first process does everything that one process
does. When it surveys experts, it broadcasts a job; the others open the same model and pass their
own calibration windows through it. All sums are added up. Everything else, which takes seconds, is
done by the first process while the others wait.
"""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.windows import load_windows
from secateur.engine.choose.channels import hidden_scores
from secateur.engine.choose.depth import DepthSettings, Dropped, choose_depth
from secateur.engine.choose.experts import (
    ExpertChoice,
    ExpertUse,
    expert_use,
    kept_experts,
    merge_experts,
)
from secateur.engine.memory_budget import fitting_plan
from secateur.engine.plan import Plan, plan_run
from secateur.engine.prune.refit import Refit, can_refit
from secateur.engine.prune.settings import Settings
from secateur.engine.prune.tasks import Selection, tasks_of
from secateur.engine.stream.targets import CheckpointTarget, walk_layers
from secateur.errors import RecipeError
from secateur.models.architecture import Architecture
from secateur.models.checkpoint import PatchedCopy
from secateur.models.copies import copy_of
from secateur.models.experts import OpenExperts
from secateur.models.opening import open_weights
from secateur.models.sources import resolve
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress, Silent
from secateur.recipes.structure import StructureRecipe, WhatToCut
from secateur.runs.atomic import whole_folder, write_json
from secateur.runs.environment import choose_device
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import compose
from secateur.structured.cut import Cut
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint
from secateur.workflows.prune.workers import broadcast, digest_of, refuse_another_model
from secateur.workflows.structure.cut_plan import CutPlan
from secateur.workflows.structure.width import Narrowing

NOTES = "step.json"
"""The file that a step writes beside its model."""


SHARED = {"model", "experts"}
"""The fields of `WhatToCut` that several processes may fill."""


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


@dataclass(frozen=True)
class Step:
    """One step, with its rule of choice.

    Attributes:
        name: depth, experts, hidden, queries or width.
        choose: takes the folder of the model. Returns the units to keep, the record of the choice,
            and the folder with the kept weights (the model's own if they did not change).
    """

    name: str
    choose: Callable[[StepContext, Path], tuple[Cut, dict[str, Any], Path]]

    def carry_out(self, context: StepContext, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Choose and cut, unless an earlier run did. Return the new folder and its notes."""
        made = context.work / self.name
        if not made.exists():
            cut, how, kept = self.choose(context, folder)
            with whole_folder(made) as partial, warnings.catch_warnings():
                # the result reports once that layers differ
                warnings.simplefilter("ignore", VariedSizesWarning)
                found = cut_checkpoint(
                    kept,
                    cut,
                    partial,
                    pad=context.recipe.pad,
                    trust_remote_code=context.recipe.trust_remote_code,
                    progress=context.progress,
                )
                notes = {"step": self.name, "cut": cut.to_json(), **how, **asdict(found)}
                (partial / NOTES).write_text(json.dumps(notes), encoding="utf-8")
            if kept != folder:
                shutil.rmtree(kept)
        notes = json.loads((made / NOTES).read_text(encoding="utf-8"))
        return made, notes


def choose_layers(context: StepContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the decoder layers or sub-blocks to remove."""
    how, sizes, drop = context.recipe.depth, context.aim.sizes, context.aim.drop_layers
    by_layers = how.units == "layers"
    depth = DepthSettings(
        units=how.units,
        count=drop if by_layers else None,
        share=None if by_layers else drop / sizes.layers,
        method=how.by,
        seed=context.recipe.calibration.seed,
    )
    work = context.scratch("depth")
    dropped = choose_depth(context.target(folder), context.windows, depth, work, context.progress)
    notes = {"by": how.by, "units": how.units, "fitness": dropped.fitness, "scores": dropped.scores}
    return without(dropped, sizes.layers), notes, folder


def without(dropped: Dropped, layers: int) -> Cut:
    """Return the cut without the dropped units."""
    kept = tuple(i for i in range(layers) if i not in dropped.layers)
    return Cut(
        layers=kept,
        groups=dict.fromkeys(dropped.attention, ()),
        neurons=dict.fromkeys(dropped.ffn, ()),
    )


def choose_experts(context: StepContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the experts to keep, and merge the others into them if the recipe says so."""
    target, recipe = context.target(folder), context.recipe
    assert context.aim.keep_experts is not None
    tokens = recipe.memory.micro_batch_tokens
    broadcast(SurveyOrder(str(context.windows_file), digest_of(target.reader)), context.ranks)
    use = expert_use(target, context.windows, tokens, context.progress, context.ranks)
    config, experts = target.model.config, target.architecture.experts
    assert experts is not None
    how = ExpertChoice(
        experts.per_token(config) or 1,
        "frequency" if recipe.experts_by == "merge" else recipe.experts_by,
        experts.divided(config),
        recipe.experts_scope,
        recipe.calibration.seed,
    )
    kept = kept_experts(use, context.aim.keep_experts, how)
    if recipe.experts_by == "merge":
        folder = merged(context, folder, kept, use)
    told = {str(layer): heard.to_json() for layer, heard in use.items()}
    notes = {"by": recipe.experts_by, "scope": recipe.experts_scope, "use": told}
    return Cut(experts=kept), notes, folder


def merged(
    context: StepContext,
    folder: Path,
    kept: Mapping[int, tuple[int, ...]],
    use: Mapping[int, ExpertUse],
) -> Path:
    """Write a copy of a model in which the experts that stay have taken up the others."""
    made = context.work / "merged"
    shutil.rmtree(made, ignore_errors=True)
    with whole_folder(made) as partial:
        target = context.target(folder)
        target.output = copy_of(target.reader, partial)
        target.output.create(context.progress)
        experts = target.architecture.experts
        assert experts is not None
        for index, layer in walk_layers(target, sorted(kept)):
            router = layer.get_submodule(experts.router).get_parameter("weight")
            module = layer.get_submodule(experts.module)
            assert isinstance(module, OpenExperts)
            merge_experts(module, router, kept[index], use[index].tokens)
            prefix = f"{target.architecture.layer_name(index)}.{experts.module}"
            names = (f"{e}.{n}" for e in kept[index] for n, _ in module[e].named_parameters())
            target.commit(index, [f"{prefix}.{name}" for name in names])
    return made


def choose_hidden(context: StepContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the channels of the residual stream to keep: the largest in the outputs of norms."""
    target = context.target(folder)
    assert context.aim.keep_hidden is not None
    settings = Settings(
        micro_batch_tokens=context.recipe.memory.micro_batch_tokens,
        fast_matmuls=context.recipe.fast_matmuls,
        work=context.scratch("hidden"),
    )
    hidden = context.aim.sizes.hidden
    scores = hidden_scores(target, context.windows, settings, hidden, context.progress)
    order = scores.argsort(descending=True, stable=True)[: context.aim.keep_hidden]
    return Cut(hidden=tuple(sorted(order.tolist()))), {"by": "activation norms"}, folder


def choose_queries(context: StepContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the query heads to keep in each KV group, and refit their readers in a folder."""
    assert context.aim.keep_queries is not None
    return narrowing(context, folder, "thinned").thin_groups(context.aim.keep_queries)


def choose_width(context: StepContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the heads and neurons to keep, and refit their readers in a folder."""
    return narrowing(context, folder, "narrowed").narrow(context.aim)


def narrowing(context: StepContext, folder: Path, name: str) -> Narrowing:
    """Return a run that chooses units of a model folder and writes to a folder of this name."""
    output = context.work / name
    return Narrowing(context.recipe, folder, output, context.windows_file, context.progress)


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


def refits(recipe: StructureRecipe, aim: CutPlan, architecture: Architecture) -> bool:
    """Whether the recipe enables this step, and the step can help."""
    channels = aim.keep_hidden is not None
    chosen = recipe.asymmetric and (channels or aim.drop_layers > 0)
    return chosen and can_refit(architecture, channels=channels)


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


@dataclass(frozen=True)
class SurveyOrder:
    """What the other processes need to survey experts.

    Attributes:
        windows: file of the calibration windows, as the first process sees it.
        source: digest of the names, shapes and dtypes of the model's tensors.
    """

    windows: str
    source: str


def follow(recipe: StructureRecipe, ranks: Ranks) -> None:
    """Do the share of one process, which is not the first.

    Args:
        recipe: the recipe; the first process has the same.
        ranks: the processes.

    Raises:
        RecipeError: this process sees other files than the first one.
    """
    while (told := broadcast(None, ranks)) is not None:
        order = SurveyOrder(**told)
        file = Path(order.windows)
        if not file.exists():
            raise RecipeError(
                f"process {ranks.rank} on {socket.gethostname()} does not see the calibration "
                "windows of the run",
                where=order.windows,
                remedy="put --output on a file system that all machines share",
            )
        trust = recipe.trust_remote_code
        source = resolve(recipe.model, dtype=recipe.dtype, trust_remote_code=trust)
        reader = open_weights(source.folder)
        if digest_of(reader) != order.source:
            refuse_another_model(ranks.rank, source.folder)
        target = CheckpointTarget(
            reader, None, choose_device(recipe.device), trust_remote_code=trust
        )
        tokens = recipe.memory.micro_batch_tokens
        expert_use(target, load_windows(file), tokens, Silent(), ranks)


def refuse_several(recipe: StructureRecipe, count: int) -> None:
    """Refuse what several processes cannot share yet.

    Raises:
        RecipeError: names the option.
    """
    if count == 1:
        return
    other = [
        name
        for name, field in WhatToCut.model_fields.items()
        if name not in SHARED and getattr(recipe, name) != field.default
    ]
    if recipe.learned is not None:
        other.append("learned")
    if recipe.distillation.epochs:
        other.append("distill_epochs")
    if recipe.calibration.generated_windows:
        other.append("generated_windows")
    if other:
        option = f"--{other[0].replace('_', '-')}"
        raise RecipeError(
            f"{option} does not work with several processes yet, and there are {count}: they "
            "share only the survey of --experts",
            remedy="start without torchrun, or cut the experts first and the rest in a second run",
        )
