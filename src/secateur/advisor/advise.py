"""Advises on a model without running it: prune, quantize, both, distil, or leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from secateur.advisor.advice import AdviceQuestion, Requirements
from secateur.advisor.capacity import Load, TokenTimes
from secateur.advisor.cluster import Machines, PlannedModel, plan_cluster
from secateur.advisor.facts import GIVEN, THIS_MACHINE, Facts, Hardware, read_facts
from secateur.advisor.options import known_shape, options_for
from secateur.advisor.results import AdviseResult, ClusterPlanResult
from secateur.engine.prune.composition import method_of
from secateur.errors import RecipeError, SourceError
from secateur.evaluation.random_models import WeightFormat
from secateur.evaluation.token_times import time_tokens
from secateur.models.hub import download_model, hub_name, kind_of_name
from secateur.models.shape import ModelShape, counted
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import resolve
from secateur.progress import Progress, listener
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.measure import AdviseRecipe
from secateur.recipes.prune import PruneCall, PruneRecipe
from secateur.recipes.verbs import imported
from secateur.registry import did_you_mean
from secateur.runs.output import check_writable

FREE_SHARE = 0.8
"""The fraction of this machine's memory that a model may take."""


@takes_options_of(AdviseRecipe)
def advise(model: str | Path, *, progress: Progress | None = None, **options: Any) -> AdviseResult:
    """Say what would make a model cheaper to serve, and what that would cost.

    Reads the configuration, no weights. Numbers are measured on this machine, published, or
    estimated by a formula, and say which.

    Args:
        model: hub id, folder, named sample, or a well-known shape such as `llama-3.1-8b`.
        progress: receives the steps when this machine is timed.
        **options: the other options of the recipe.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, _ = recipe_of(AdviseRecipe, {"model": model}, options)
    return advise_recipe(recipe, listener(progress))


def advise_recipe(recipe: AdviseRecipe, progress: Progress) -> AdviseResult:
    """Carry out a recipe."""
    page = None if recipe.html is None else Path(recipe.html)
    if page is not None:
        check_writable(page, file=True)
    facts = read_facts(None if recipe.facts is None else Path(recipe.facts))
    hardware = facts.device(recipe.hardware)
    if recipe.usd_per_hour is not None:
        price = (recipe.usd_per_hour,) * 3
        given = {"usd_per_hour": price, "price_source": GIVEN}
        hardware = hardware.model_copy(update=given)
    shape, config = _shape_of(recipe, facts, progress)
    times, basis = None, f"roofline of the data sheet; {facts.efficiency[hardware.kind].source}"
    if recipe.hardware == THIS_MACHINE:
        times, basis = _times_here(recipe, facts, hardware, shape, config, progress)
    memory = hardware.memory_gib
    total = psutil.virtual_memory().total * FREE_SHARE if memory is None else memory * 2**30
    new_tokens = recipe.answer_tokens()
    load = Load(
        recipe.requests_per_day,
        recipe.tokens_per_request - new_tokens,
        new_tokens,
        recipe.peak,
        recipe.utilisation,
        recipe.latency_p99_ms,
        recipe.first_token_ms,
    )
    need = Requirements(load, recipe.quality_loss, recipe.gpu_hours)
    question = AdviceQuestion(shape, hardware, round(total), facts, need, times)
    answer = question.answer()
    result = AdviseResult(recipe.model, recipe.hardware, question, answer, basis, page)
    if page is not None:
        write = imported("secateur.report_page.report:write_advice")
        write(f"{recipe.model} on {hardware.name}", result, page)
    return result


def _times_here(
    recipe: AdviseRecipe,
    facts: Facts,
    hardware: Hardware,
    shape: ModelShape,
    config: Any,
    progress: Progress,
) -> tuple[dict[str, TokenTimes], str]:
    """Times of every storage of the model on this machine, and how they were found."""
    if config is None:
        raise RecipeError(
            f"{recipe.model} is a well-known shape, and this machine can be timed only with the "
            "configuration of a model",
            where="--hardware",
            remedy=f"name a folder with config.json, or other hardware: "
            f"{', '.join(n for n in facts.hardware if n != THIS_MACHINE)}",
        )
    storages = {
        option.stored: WeightFormat(option.values.name, option.zeros.sparsity)
        for option in options_for(shape, hardware)
    }
    timed, day = time_tokens(config, list(storages.values()), progress)
    times = {stored: TokenTimes(*timed[storage]) for stored, storage in storages.items()}
    return times, f"decoded on this machine with random weights, {day}"


def _shape_of(recipe: AdviseRecipe, facts: Facts, progress: Progress) -> tuple[ModelShape, Any]:
    """The sizes of the model, and its configuration; None for a well-known shape."""
    name = recipe.model
    if name in facts.shapes and kind_of_name(name) is None:
        return known_shape(name, facts.shapes[name]), None
    if kind_of_name(name) is None:
        raise SourceError(
            f"{name!r} is no folder, no hub id (org/name), no sample and no well-known shape",
            where="MODEL",
            remedy=f"check the path; or a shape: {did_you_mean(name, [*facts.shapes])}",
        )
    trusted = recipe.trust_remote_code
    hub = hub_name(name)
    if kind_of_name(name) == "hub" and hub is not None:
        folder = download_model(hub.repo, hub.revision, trusted, False, progress, weights=False)
    elif kind_of_name(name) == "folder":
        folder = Path(name).expanduser()
    else:
        folder = resolve(name, values=False, progress=progress).folder
    model = build_skeleton(folder, trust_remote_code=trusted, alone=True)
    return counted(name, model), model.config


def plan_on_paper(recipe: PruneRecipe, cluster_call: PruneCall) -> ClusterPlanResult:
    """Plan the run of a recipe for a well-known shape on GPUs that are not here."""
    facts = read_facts()
    if recipe.model not in facts.shapes:
        raise RecipeError(
            f"{recipe.model} is no well-known shape, and a plan on paper needs one",
            where="--gpus",
            remedy=f"name one of: {', '.join(facts.shapes)}; or leave out --gpus to plan for this "
            "machine",
        )
    hardware = facts.device(_full_name(cluster_call.gpu, facts))
    method, _ = method_of(recipe)
    length = recipe.calibration.sequence_length or 2048
    assert cluster_call.gpus is not None
    machines = Machines(
        cluster_call.nodes,
        cluster_call.gpus,
        hardware,
        facts.efficiency[hardware.kind],
        float(cluster_call.network.removesuffix("Gb")) * 1e9 / 8,
    )
    plan = plan_cluster(
        PlannedModel.of(facts.shapes[recipe.model]),
        machines,
        tokens=recipe.calibration.windows * length,
        length=length,
        solver=method.solver_name,
        gram="gram" in method.requires or recipe.asymmetric,
        whole_layer=recipe.sequential == "layer",
        asymmetric=recipe.asymmetric,
    )
    return ClusterPlanResult(recipe.model, hardware.name, plan)


def _full_name(gpu: str, facts: Facts) -> str:
    """The name of a GPU in the facts, of which the beginning is enough."""
    found = [name for name in facts.hardware if name.startswith(gpu)]
    return found[0] if len(found) == 1 else gpu
