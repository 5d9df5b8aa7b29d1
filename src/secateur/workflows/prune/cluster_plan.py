"""Plans a pruning run on a cluster, on paper."""

from __future__ import annotations

from secateur.advisor.cluster import Machines, PlannedModel, plan_cluster
from secateur.advisor.facts import Facts, read_facts
from secateur.errors import RecipeError
from secateur.recipes.prune import PruneCall, PruneRecipe
from secateur.reporting.results.advise import ClusterPlanResult
from secateur.workflows.prune.composition import method_of


def plan_on_paper(recipe: PruneRecipe, asked: PruneCall) -> ClusterPlanResult:
    """Plan the run of a recipe for a well-known shape on GPUs that are not here.

    Raises:
        RecipeError: the model is no well-known shape, or the GPU or the solver is unknown.
    """
    facts = read_facts()
    if recipe.model not in facts.shapes:
        raise RecipeError(
            f"{recipe.model} is no well-known shape, and a plan on paper needs one",
            where="--gpus",
            remedy=f"name one of: {', '.join(facts.shapes)}; or leave out --gpus to plan for this "
            "machine",
        )
    hardware = facts.device(full_name(asked.gpu, facts))
    method, _ = method_of(recipe)
    length = recipe.calibration.sequence_length or 2048
    assert asked.gpus is not None
    machines = Machines(
        asked.nodes,
        asked.gpus,
        hardware,
        facts.efficiency[hardware.kind],
        float(asked.network.removesuffix("Gb")) * 1e9 / 8,
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


def full_name(gpu: str, facts: Facts) -> str:
    """The name of a GPU in the facts, of which the beginning is enough."""
    found = [name for name in facts.hardware if name.startswith(gpu)]
    return found[0] if len(found) == 1 else gpu
