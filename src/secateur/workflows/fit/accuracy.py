"""How much of the dense model's accuracy on a set of tasks a model keeps.

    kept = Σ accuracy of the model / Σ accuracy of the dense model

The sums go over tasks, and both models answer the same items. The accuracy is `acc` of lm-eval: the
right answer is the likeliest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.evaluation.tasks import PreparedTask, prepare_tasks, run_tasks
from secateur.progress import Labelled, Progress
from secateur.recipes.fit import FitRecipe
from secateur.workflows.judge.perplexity import load_model

METRIC = "acc"


def prepared_tasks(recipe: FitRecipe) -> list[PreparedTask]:
    """The tasks with their requests; none if the accuracy has no bound.

    Raises:
        RecipeError: a task is unknown.
        SourceError: its rows cannot be read.
    """
    if recipe.min_accuracy_kept is None:
        return []
    return prepare_tasks(recipe.tasks, source=recipe.task_data, limit=recipe.limit)


def accuracy(
    folder: Path, tasks: Sequence[PreparedTask], recipe: FitRecipe, progress: Progress, name: str
) -> float:
    """The mean accuracy over tasks.

    Args:
        folder: of the model, packed or not.
        tasks: to evaluate.
        recipe: gives the device.
        progress: receives every request.
        name: of the model, for the progress.
    """
    model, tokenizer = load_model(str(folder), recipe.device, recipe.trust_remote_code)
    scores = run_tasks(model, tokenizer, tasks, Labelled(progress, name))
    found = [score.value for score in scores if score.metric == METRIC]
    return sum(found) / len(found)
