"""`secateur prune`: prunes a checkpoint or a loaded model, and can pack the result.

On a Ray cluster, Ray starts processes that share the work. For a cluster that is not here, the run
of a well-known shape is planned on paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.advisor.cluster import Machines, PlannedModel, plan_cluster
from secateur.advisor.facts import Facts, read_facts
from secateur.calibration.documents import texts_of
from secateur.errors import RecipeError
from secateur.parallel.processes import joined
from secateur.parallel.ranks import ALONE, Ranks
from secateur.parallel.ray_launcher import launch
from secateur.progress import Progress, Silent, listener
from secateur.publishing import without_folders
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.prune import ChainRecipe, PruneCall, PruneRecipe
from secateur.recipes.reading import build_recipe, dump_recipe
from secateur.reporting.advise import ClusterPlanResult
from secateur.reporting.models import CompressResult, PruneResult
from secateur.reporting.plan import PlanResult
from secateur.runs.atomic import write_text
from secateur.runs.environment import choose_device
from secateur.runs.folder import NOTES, check_output
from secateur.runs.records import read_record
from secateur.sparsity.methods import Method
from secateur.steps.chain import checked_steps, run_chain
from secateur.steps.compress.pack import COMPRESSION
from secateur.steps.prune.checkpoint import plan_pruning, report_of, run_recipe
from secateur.steps.prune.composition import method_of, with_method
from secateur.steps.prune.loaded_model import prune_module
from secateur.steps.prune.workers import refuse_several, run_worker

RECIPE = "recipe.yaml"
OF_THE_CHAIN = {"model", "output", "compress", "trust_remote_code"}
"""Keys of the recipe that are not options of its first step."""


@takes_options_of(PruneRecipe)
def prune(
    model: str | Path | nn.Module,
    *,
    method: str | Method | None = None,
    calibration: str | Path | Sequence[str] | Tensor | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult | PlanResult | ClusterPlanResult:
    """Prune a model: a checkpoint into a new folder, or a loaded module in place.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model.
        method: A method by name (`secateur methods` lists them), or what `compose` returned.
        calibration: Calibration text, as a file, folder, hub data set or named text, or as a list
            of texts; for a loaded model also token windows [windows, sequence_length]. [c4]
        tokenizer: of a loaded model, to read text. [the one at the place the model came from]
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The result of the run; with `dry_run` its plan.

    Raises:
        SecateurError: what, where, and what to do.
    """
    options = with_method(method, options)
    if isinstance(model, nn.Module):
        return prune_module(model, calibration, tokenizer, listener(progress), options)
    if tokenizer is not None:
        raise RecipeError(
            "`tokenizer` is for loaded models; a checkpoint has its own",
            remedy="leave it out, or load the model and prune it",
        )
    if options.get("output") is None and not options.get("dry_run"):
        raise RecipeError("`output` is missing: the folder for the pruned model")
    if isinstance(calibration, Tensor):
        raise RecipeError(
            "token windows as a tensor are for loaded models",
            remedy="save them with secateur.calibration.windows.save_windows and pass the file",
        )
    own = {"model": model, "calibration": calibration}
    recipe, call = recipe_of(PruneRecipe, own, options)
    if call.pop("dry_run", False):
        return plan_recipe(recipe, call)
    if recipe.cluster.ray is not None:
        return prune_on_ray(recipe, call)
    return prune_recipe(recipe, listener(progress), **call)


def plan_recipe(recipe: PruneRecipe, call: Mapping[str, Any]) -> PlanResult | ClusterPlanResult:
    """Check a recipe, and show what it would need, on this machine or on paper for others.

    Args:
        recipe: recipe of the pruning.
        call: the other options of the call.

    Raises:
        SecateurError: as the run would.
    """
    packs = recipe.compress.values is not None
    if packs:
        checked_steps(_chain_of(recipe).steps)
    cluster_call = PruneCall(dry_run=True, **call)
    if cluster_call.gpus is not None:
        return _plan_on_paper(recipe, cluster_call)
    plan = plan_pruning(recipe)
    read = recipe.model, *texts_of(recipe.calibration.source)
    check_output(recipe.output, "chain" if packs else "prune", plan.plan.disk_bytes, read, call)
    return plan


def prune_recipe(
    recipe: PruneRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> PruneResult:
    """Carry out a recipe. With `compress`, it runs as a chain of two steps.

    Args:
        recipe: recipe of the pruning.
        progress: receives every step.
        resume: resume a stopped run, or start if there is none.
        restart: discard the files of a stopped run.
        overwrite: replace an existing output folder.
        ranks: the processes that share the work; this one is the first.
    """
    refuse_several(recipe, ranks.count)
    call = {"resume": resume, "restart": restart, "overwrite": overwrite}
    if recipe.compress.values is None:
        return run_recipe(recipe, progress, **call, ranks=ranks)
    output = run_chain(_chain_of(recipe), progress, **call).output
    _name_recipe(recipe, output)
    packed = read_record(CompressResult, output / NOTES / COMPRESSION)
    packed = packed.model_copy(update={"output": output})
    return dataclasses.replace(report_of(output), compression=packed)


def _chain_of(recipe: PruneRecipe) -> ChainRecipe:
    """The chain that prunes and then compresses."""
    options = recipe.model_dump(mode="json", exclude=OF_THE_CHAIN, exclude_none=True)
    values = {
        "model": recipe.model,
        "output": recipe.output,
        "trust_remote_code": recipe.trust_remote_code,
        "steps": [{"prune": options}, {"compress": recipe.compress.model_dump(mode="json")}],
    }
    return build_recipe(ChainRecipe, values)


def _name_recipe(recipe: PruneRecipe, output: Path) -> None:
    """Replace the recipe of the chain by the recipe of the pruning."""
    file, card = output / NOTES / RECIPE, output / "README.md"
    chain, whole = file.read_text(encoding="utf-8"), dump_recipe(recipe)
    text = card.read_text(encoding="utf-8").replace("`secateur chain", "`secateur prune")
    write_text(card, text.replace(without_folders(chain), without_folders(whole)))
    write_text(file, whole)


Showing = Callable[[], AbstractContextManager[Progress]]
"""Makes what shows the progress, in the first process."""


def _silently() -> AbstractContextManager[Progress]:
    """Show no progress."""
    return nullcontext(Silent())


def prune_on_ray(
    recipe: PruneRecipe, call: Mapping[str, bool], showing: Showing = _silently
) -> PruneResult:
    """Carry out a recipe in processes that Ray starts.

    Args:
        recipe: the recipe. All machines see its files under the same names.
        call: `resume`, `restart` and `overwrite`, as `run_recipe` takes them.
        showing: makes what shows the progress.

    Raises:
        SecateurError: as `run_recipe`; and if Ray or its cluster is missing.
    """
    cluster = recipe.cluster
    assert cluster.ray is not None
    refuse_several(recipe, count=cluster.processes or 2)
    on_gpu = recipe.device != "cpu" and choose_device(recipe.device).type == "cuda"
    values = recipe.model_dump(mode="json", exclude={"cluster"})
    work = partial(_do_share, values, dict(call), showing)
    launch(cluster.ray, cluster.processes, on_gpu, work)
    return report_of(Path(recipe.output or "").absolute())


def _do_share(values: dict[str, Any], call: dict[str, bool], showing: Showing) -> None:
    """What one process does."""
    recipe = build_recipe(PruneRecipe, values)
    with joined(recipe.device) as ranks:
        if not ranks.first:
            run_worker(recipe, ranks)
            return
        with showing() as progress:
            run_recipe(recipe, progress, **call, ranks=ranks)


def _plan_on_paper(recipe: PruneRecipe, cluster_call: PruneCall) -> ClusterPlanResult:
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
