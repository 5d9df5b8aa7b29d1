"""The steps of a structured cut. Each step turns one model folder into a smaller one.

    depth ─► experts ─► hidden ─► refit ─► query heads ─► heads and neurons

The last two choose units with a run of `secateur prune` (`width.py`).

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
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.documents import read_documents, texts_of
from secateur.engine.plan import fitting_plan
from secateur.engine.plan_memory import PrunePlan, plan_run
from secateur.engine.prune.refit import Refit
from secateur.engine.prune.tasks import Selection, Settings, tasks_of
from secateur.engine.search.channels import hidden_scores
from secateur.engine.search.depth import DepthSettings, choose_depth
from secateur.engine.search.experts import (
    ExpertChoice,
    ExpertUse,
    expert_use,
    kept_experts,
    merge_experts,
)
from secateur.engine.stream.targets import CheckpointTarget, walk_layers
from secateur.errors import RecipeError
from secateur.models.checkpoint import PatchedCopy
from secateur.models.copies import copy_of
from secateur.models.experts import OpenExperts
from secateur.models.opening import open_weights
from secateur.models.sources import LocalCheckpoint
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress
from secateur.recipes.structure import StructureRecipe
from secateur.runs.atomic import whole_folder, write_json
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import compose
from secateur.structured.cut import Cut
from secateur.structured.cut_plan import CutPlan, trims_vocabulary
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint
from secateur.structured.token_pieces import pieces_of
from secateur.structured.vocabulary import read_tokenizer, token_tables, trim_vocabulary

NOTES = "step.json"
"""The file that a step writes into the folder of its model."""


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
class CutStep:
    """One step, with its rule of choice.

    Attributes:
        name: depth, experts, hidden, queries or width.
        choose: takes the folder of the model. Returns the units to keep, the record of the choice,
            and the folder with the kept weights (the model's own if they did not change).
    """

    name: str
    choose: Callable[[CutContext, Path], tuple[Cut, dict[str, Any], Path]]

    def run(self, context: CutContext, folder: Path) -> tuple[Path, dict[str, Any]]:
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
                notes = {"step": self.name, "cut": cut.to_json(), **how, **found.to_json()}
                (partial / NOTES).write_text(json.dumps(notes), encoding="utf-8")
            if kept != folder:
                shutil.rmtree(kept)
        return made, json.loads((made / NOTES).read_text(encoding="utf-8"))


def check_vocabulary(recipe: StructureRecipe, source: LocalCheckpoint, skeleton: Any) -> None:
    """Refuse what cannot be trimmed, before any work.

    Raises:
        RecipeError: the text is a file of windows, or the size is not smaller.
        ArchitectureError: the tokenizer or the model is of a kind that cannot be trimmed.
    """
    if not trims_vocabulary(recipe):
        return
    pieces_of(read_tokenizer(source.folder), str(source.folder))  # refuses other tokenizers
    rows = token_tables(skeleton).rows
    if any(text.endswith(".safetensors") for text in texts_of(_vocabulary_text(recipe))):
        raise RecipeError(
            "tokens are counted in a text, and this is a file of windows",
            where=_vocabulary_text(recipe),
            remedy="name a text with --vocabulary",
        )
    if any(text.endswith(".safetensors") for text in texts_of(recipe.calibration.source)):
        raise RecipeError(
            "windows of token ids would have other ids after the vocabulary is trimmed",
            where=recipe.calibration.source,
            remedy="calibrate on a text, or trim the vocabulary in a run of its own",
        )
    if recipe.vocabulary_size is not None and recipe.vocabulary_size >= rows:
        raise RecipeError(
            f"the vocabulary has {rows} tokens, the recipe keeps {recipe.vocabulary_size}",
            where="--vocabulary-size",
            remedy="give a smaller number",
        )


def trimmed_source(
    recipe: StructureRecipe, source: LocalCheckpoint, work: Path, progress: Progress
) -> tuple[LocalCheckpoint, list[dict[str, Any]]]:
    """The model with the smaller vocabulary, and the notes of the step.

    It is the first step, so that all later ones see the smaller model. A recipe that removes no
    token gives the source itself, and no notes. The folder is whole or does not exist, so a killed
    run resumes after it.

    Raises:
        RecipeError: fewer tokens than have to stay, or none is removed.
        VerificationError: a text is cut into other tokens than before.
    """
    if not trims_vocabulary(recipe):
        return source, []
    made, text, field = work / "vocabulary", _vocabulary_text(recipe), recipe.calibration.field
    if not made.exists():
        with whole_folder(made) as partial:
            documents = [d for x in texts_of(text) for d in read_documents(x, field=field)]
            found = trim_vocabulary(
                source.folder,
                partial,
                documents,
                recipe.vocabulary_size,
                where=text,
                trust_remote_code=recipe.trust_remote_code,
                progress=progress,
            )
            by = "use in a text" if recipe.vocabulary_size is None else "frequency in a text"
            notes = {"step": "vocabulary", "by": by, "text": text, **found}
            (partial / NOTES).write_text(json.dumps(notes), encoding="utf-8")
    notes = json.loads((made / NOTES).read_text(encoding="utf-8"))
    return replace(source, folder=made), [notes]


def _vocabulary_text(recipe: StructureRecipe) -> str:
    """The text in which tokens are counted."""
    return recipe.vocabulary or recipe.calibration.source


def choose_layers(context: CutContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the decoder layers or sub-blocks to remove."""
    how, sizes, drop = context.recipe.depth, context.plan.sizes, context.plan.drop_layers
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
    cut = Cut(
        layers=tuple(i for i in range(sizes.layers) if i not in dropped.layers),
        groups=dict.fromkeys(dropped.attention, ()),
        neurons=dict.fromkeys(dropped.ffn, ()),
    )
    return cut, notes, folder


def choose_experts(context: CutContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the experts to keep, and merge the others into them if the recipe says so."""
    target, recipe = context.target(folder), context.recipe
    assert context.plan.keep_experts is not None
    tokens = recipe.memory.micro_batch_tokens
    job = SurveyJob(str(context.windows_file), target.reader.tensor_digest)
    context.ranks.once(lambda: asdict(job))
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
    kept = kept_experts(use, context.plan.keep_experts, how)
    if recipe.experts_by == "merge":
        folder = _merge_experts(context, folder, kept, use)
    notes = {
        "by": recipe.experts_by,
        "scope": recipe.experts_scope,
        "use": {str(layer): of_layer.to_json() for layer, of_layer in use.items()},
    }
    return Cut(experts=kept), notes, folder


def _merge_experts(
    context: CutContext,
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


def choose_hidden(context: CutContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the channels of the residual stream to keep: the largest in the outputs of norms."""
    target = context.target(folder)
    assert context.plan.keep_hidden is not None
    settings = Settings(
        micro_batch_tokens=context.recipe.memory.micro_batch_tokens,
        fast_matmuls=context.recipe.fast_matmuls,
        work=context.scratch("hidden"),
    )
    hidden = context.plan.sizes.hidden
    scores = hidden_scores(target, context.windows, settings, hidden, context.progress)
    order = scores.argsort(descending=True, stable=True)[: context.plan.keep_hidden]
    return Cut(hidden=tuple(sorted(order.tolist()))), {"by": "activation norms"}, folder


class RefitStep:
    """Fits linears to the outputs of the uncut model. Sizes stay the same."""

    name = "refit"

    def run(self, context: CutContext, folder: Path) -> tuple[Path, dict[str, Any]]:
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
            cut, dense = context.target(folder, copy), context.target(context.source)
            layers = _kept(context, "depth", "layers") or range(len(dense.layers))
            hidden = _kept(context, "hidden", "hidden")
            settings = _refit_settings(context, dense)
            Refit(
                dense, cut, layers, hidden, context.windows, settings, ledger, context.progress
            ).execute(done)
            notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            record = dict.fromkeys(("before", "after"), notes["after"])
            record |= {"step": self.name, "by": "least squares", "varied": notes["varied"]}
            write_json(partial / NOTES, record)
            partial.rename(made)
        return made, json.loads((made / NOTES).read_text(encoding="utf-8"))


def _kept(context: CutContext, step: str, kind: str) -> Sequence[int] | None:
    """The units of one kind that an earlier step kept; None for all."""
    notes = context.work / step / NOTES
    if not notes.exists():
        return None
    found: Sequence[int] = json.loads(notes.read_text(encoding="utf-8"))["cut"][kind]
    return found


def _refit_settings(context: CutContext, dense: CheckpointTarget) -> Settings:
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
            work=context.scratch(RefitStep.name),
        )

    def planned(activations: str) -> PrunePlan:
        return plan_run(dense, tasks, context.windows, settings(activations), 0, uniform, 0)

    _, activations = fitting_plan(
        planned, dense.device, max_memory=memory.max_bytes, activations=memory.activations
    )
    return settings(activations)


@dataclass(frozen=True)
class SurveyJob:
    """What the other processes need to survey experts.

    Attributes:
        windows: file of the calibration windows, as the first process sees it.
        source: digest of the names, shapes and dtypes of the model's tensors.
    """

    windows: str
    source: str
