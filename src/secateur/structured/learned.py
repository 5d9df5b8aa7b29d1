"""The step that learns which units stay, together with the weights (Sheared LLaMA).

    windows of every domain ─► gates and weights learn ─► indices of a cut, and trained weights

The target sizes come from the recipe's keep-options. The same surgery makes this cut and all
others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import load_windows, save_windows
from secateur.engine.plan import Need
from secateur.errors import RecipeError, SourceError
from secateur.models.architecture import hidden_size
from secateur.models.opening import load_whole
from secateur.precision import exact_matmuls, fast_matmuls
from secateur.recipes.structure import LearnedOptions
from secateur.recipes.train import TrainRecipe
from secateur.runs.output import whole_folder
from secateur.structured.cut import Cut, consumers, sizes_of, unit_width
from secateur.structured.cut_plan import representative, uniform_cut
from secateur.structured.cut_steps import CutContext
from secateur.structured.design import design
from secateur.training.batches import Batches, DomainLoading, TrainingText
from secateur.training.learned_masks import Consumer, LearnedMasks, Shape
from secateur.training.loop import Loop, mean_loss
from secateur.training.masks import Masks
from secateur.training.objectives import NextToken
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import open_tensors, write_trained
from secateur.training.session import run_loop
from secateur.training.setup import TRAINING, check_memory, training_memory
from secateur.training.training_plan import TrainingPlan
from secateur.types import Windows


def choose_learned(context: CutContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Learn which units to keep. Return the cut, its notes, and the folder of the weights."""
    how, trust = context.recipe.learned, context.recipe.trust_remote_code
    assert how is not None
    work, device = context.scratch("learned"), context.device
    # the loss rises while the gates close, so a rising loss does not end the training
    training = TrainingPlan(
        steps=how.steps,
        learning_rate=how.learning_rate,
        validations=0,
        save_minutes=how.save_minutes,
        diverged=0.0,
    )
    found = _domains_of(context, how, work)
    _check_fits(context, folder, found, training)
    model = load_whole(folder, device, trust_remote_code=trust)
    seed, sizes = context.recipe.calibration.seed, sizes_of(model)
    readers = {
        kind: Consumer(name, unit_width(sizes, kind)) for kind, name in consumers(model).items()
    }
    gates = LearnedMasks(model, _shape_of(context, how), readers, seed)
    next_token = NextToken.of(model)
    loading = _loading_of(found, how, model, next_token, training, seed)
    loop = Loop(
        model,
        Batches(torch.cat(list(found.windows.values())), how.batch, seed, loading),
        gates.objective(next_token),
        Masks.of(model),
        training,
        saved=work,
        hooks=(gates,) if loading is None else (gates, loading),
        progress=context.progress,
        label="learning masks",
    )
    outcome = run_loop(loop)
    cut = Cut(**gates.settle())
    notes: dict[str, Any] = {
        "by": "learned masks",
        "steps": outcome.step,
        "tokens": outcome.tokens,
        "learning_rate": loop.peak,
    }
    if loading is not None:
        notes |= {
            "references": loading.references,
            "losses": loading.losses(model),
            "proportions": loading.proportions,
        }
    made = context.work / "learned-weights"
    shutil.rmtree(made, ignore_errors=True)
    with whole_folder(made) as partial_folder, open_tensors(work / "final.safetensors") as trained:
        write_trained(folder, trained, partial_folder, trust_remote_code=trust)
    return cut, notes, made


def _shape_of(context: CutContext, how: LearnedOptions) -> Shape:
    """The target sizes: the number of units of each kind to keep in every layer."""
    plan, sizes = context.plan, context.plan.sizes
    widths: dict[str, int] = {}
    if plan.narrows:
        model = context.target(context.source).model
        left = design(model, representative(plan)).skeleton
        cut = uniform_cut(plan, left, context.recipe.multiple)
        for kind in ("groups", "neurons"):
            counts = {len(units) for units in getattr(cut, kind).values()}
            if len(counts) > 1:
                raise RecipeError(
                    "learned masks need layers of one size",
                    where=f"{kind} that would stay: {sorted(counts)}",
                    remedy="cut the model without learned",
                )
            if counts:
                widths[kind] = counts.pop()
    return Shape(
        groups=widths.get("groups"),
        neurons=widths.get("neurons"),
        layers=sizes.layers - plan.drop_layers if plan.drop_layers else None,
        hidden=plan.keep_hidden,
        learning_rate=how.mask_learning_rate,
        warm_up=how.target_warm_up,
    )


@dataclass(frozen=True)
class Domains:
    """The text of a step, by domain.

    Attributes:
        windows: token ids [windows, length] to train on.
        held_out: token ids for the losses of the domains; empty if there is only one domain.
    """

    windows: Mapping[str, Windows]
    held_out: Mapping[str, Windows]


def _domains_of(context: CutContext, how: LearnedOptions, work: Path) -> Domains:
    """The windows of calibration and of other domains. A resumed run reads its own files."""
    source = context.recipe.calibration.source
    reader = WindowReader.of_folder(
        context.source,
        context.target(context.source).model.config,
        trust_remote_code=context.recipe.trust_remote_code,
    )
    found: dict[str, Tensor] = {source: context.windows}
    for number, text in enumerate(how.domains):
        file = work / f"domain-{number}.safetensors"
        if not file.exists():
            # as many windows as of the calibration text, of the same length
            length = int(context.windows.shape[1])
            windows, _ = reader.read(text, context.recipe.calibration, length=length)
            save_windows(windows, file)
        found[text] = load_windows(file)
    if len(found) <= len(how.domains):
        raise RecipeError("a domain is named twice", remedy="name each text once")
    unknown = sorted(set(how.references) - set(found))
    if unknown:
        raise RecipeError(
            f"references name {unknown[0]!r}, which is no domain",
            remedy=f"the domains are {', '.join(found)}",
        )
    lengths = {int(windows.shape[1]) for windows in found.values()}
    if len(lengths) > 1:
        raise SourceError(
            f"the domains have windows of {' and '.join(map(str, sorted(lengths)))} tokens",
            remedy="make the windows of one length, or give the texts themselves",
        )
    if not how.domains:
        return Domains(found, {})
    short = [name for name, windows in found.items() if len(windows) <= how.held_out]
    if short:
        raise SourceError(
            f"{short[0]} gives {len(found[short[0]])} windows, and {how.held_out} are held out",
            remedy="name a longer text, or set learned.held_out lower",
        )
    return Domains(
        {name: windows[how.held_out :] for name, windows in found.items()},
        {name: windows[: how.held_out] for name, windows in found.items()},
    )


def _loading_of(
    found: Domains,
    how: LearnedOptions,
    model: Any,
    next_token: NextToken,
    training: TrainingPlan,
    seed: int,
) -> DomainLoading | None:
    """The dynamic batch loading; None if there is only one domain.

    If the recipe gives no reference for a domain, the loss of the uncut model is the reference.
    """
    if not found.held_out:
        return None

    def losses(model: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        matmuls = partial(fast_matmuls if training.fast_matmuls else exact_matmuls, device)
        return {
            name: mean_loss(model, next_token, ids, training.at_once(ids.shape[1]), matmuls)
            for name, ids in found.held_out.items()
        }

    missing = set(found.held_out) - set(how.references)
    references = {**(losses(model) if missing else {}), **how.references}
    return DomainLoading(
        found.windows, references, losses, size=how.batch, every=how.update_every, seed=seed
    )


def _check_fits(context: CutContext, folder: Path, found: Domains, training: TrainingPlan) -> None:
    """Refuse a training that does not fit in memory."""
    target = context.target(folder)
    windows = torch.cat(list(found.windows.values()))
    how = context.recipe.learned
    assert how is not None
    recipe = TrainRecipe(
        model=str(folder), batch=how.batch, trust_remote_code=context.recipe.trust_remote_code
    )
    text, processes = TrainingText(windows, None, {}), ProcessGroup(context.device)
    needed = training_memory(recipe, target, None, text, training, processes)
    tokens = min(training.at_once(windows.shape[1]), how.batch) * windows.shape[1]
    sizes = sizes_of(target.model)
    # The product of an activation and its gates is kept for the backward.
    gated = max(sizes.neurons) + max(sizes.queries) * sizes.head_dim
    gated += 3 * hidden_size(target.model)
    gates = Need("gates", 4 * tokens * gated * sizes.layers, (TRAINING,), "gates")
    needed = replace(needed, needs=(*needed.needs, gates))
    check_memory(needed, context.recipe.memory.max_bytes, context.device)
