"""The steps of a structured cut. Each step turns one model folder into a smaller one.

    depth ─► experts ─► hidden ─► refit ─► query heads ─► heads and neurons

A step's folder is complete, or it does not exist, so a killed run resumes after the last finished
step.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.engine.choose.depth import DepthSettings, Dropped, choose_depth
from secateur.engine.choose.experts import ExpertChoice, ExpertUse, expert_use, kept_experts
from secateur.engine.choose.hidden import hidden_scores
from secateur.engine.choose.merged_experts import merge_experts
from secateur.engine.prune.settings import Settings
from secateur.engine.stream.walk import walk_layers
from secateur.models.architecture import describe
from secateur.models.copies import copy_of
from secateur.models.open_experts import OpenExperts
from secateur.recipes.structure import StructureRecipe
from secateur.runs.atomic import whole_folder
from secateur.structured.cut import Cut
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint
from secateur.workflows.prune.order import digest_of, give
from secateur.workflows.structure.cut_plan import CutPlan
from secateur.workflows.structure.learned import choose_learned
from secateur.workflows.structure.narrow import Narrowing
from secateur.workflows.structure.refit import RefitStep, refits
from secateur.workflows.structure.shared_survey import SurveyOrder
from secateur.workflows.structure.step_context import NOTES, StepContext


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


def steps_of(recipe: StructureRecipe, aim: CutPlan, model: Any) -> list[Step | RefitStep]:
    """Return the steps that a plan needs, in order. The model is the uncut skeleton."""
    if recipe.learned is not None:
        return [Step("learned", choose_learned)]
    found: list[Step | RefitStep] = []
    if aim.drop_layers:
        found.append(Step("depth", choose_layers))
    if aim.keep_experts is not None:
        found.append(Step("experts", choose_experts))
    if aim.keep_hidden is not None:
        found.append(Step("hidden", choose_hidden))
    if refits(recipe, aim, describe(model)):
        found.append(RefitStep())
    if aim.keep_queries is not None:
        found.append(Step("queries", choose_queries))
    if aim.narrows:
        found.append(Step("width", choose_width))
    return found


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
    give(SurveyOrder(str(context.windows_file), digest_of(target.reader)), context.ranks)
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
