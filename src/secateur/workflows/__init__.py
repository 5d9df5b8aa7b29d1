"""Workflows: the only place where the rooms are wired together.

The Python API and the command line call the same functions: `prune`, `plan`, `evaluate`.
"""

from secateur.reporting.prune_report import PruneReport
from secateur.workflows.evaluating import Evaluation, evaluate
from secateur.workflows.inspecting import inspect_model
from secateur.workflows.pruning import plan, plan_recipe, prune, run_recipe

__all__ = [
    "Evaluation",
    "PruneReport",
    "evaluate",
    "inspect_model",
    "plan",
    "plan_recipe",
    "prune",
    "run_recipe",
]
