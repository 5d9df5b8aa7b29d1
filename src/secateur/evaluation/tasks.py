"""Zero-shot and few-shot tasks, by log-likelihoods or by written answers, through lm-eval.

The harness (EleutherAI's lm-evaluation-harness) finds the tasks, reads their data, makes the
prompts and scores the answers. This module adds what one needs to interpret a score: its standard
error, the score of guessing, and the id of a protocol that covers the content of every request.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

from secateur.errors import RecipeError, SourceError, first_line
from secateur.evaluation.perplexity import computed_by, fingerprint, protocol_id
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.hub import hub_or_cache
from secateur.models.skeleton import quiet_transformers
from secateur.models.tokenizer import Tokenizer
from secateur.progress import Progress, Silent
from secateur.runs.measured import Score

FEWSHOT_SEED = 1234
METRICS = ("acc", "acc_norm", "exact_match")


class TaskScore(Score):
    """A score with its protocol.

    Attributes:
        protocol: everything that the score depends on besides the model.
        protocol_id: the id of the protocol.
        outcomes: 1 or 0 for each item, for paired comparisons.
    """

    protocol: dict[str, Any]
    protocol_id: str
    outcomes: tuple[float, ...]


@dataclass(frozen=True)
class PreparedTask:
    """A task with its requests built. Everything that can fail before the model runs is done.

    Attributes:
        name: name of the task.
        task: lm-eval's object with its requests.
        limit: number of items, from the start; None for all.
        protocol: everything that its scores depend on besides the model.
    """

    name: str
    task: Any
    limit: int | None
    protocol: Mapping[str, Any]

    @property
    def writes(self) -> bool:
        """Whether the model answers with texts; otherwise its log-likelihoods are the answer."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")


def prepare_tasks(
    names: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> list[PreparedTask]:
    """Find tasks, read their data and build their requests.

    Args:
        names: names of tasks, or of groups of them, in lm-eval.
        folder: holds the tasks, as lm-eval's YAML files; None for those that come with it.
        limit: number of items of each task, from the start; None for all.
        shots: number of solved examples before each question; None for the task's own number.

    Raises:
        RecipeError: a task is unknown, or has neither log-likelihoods nor texts to compare.
        SourceError: the data of a task cannot be read.
    """
    if not names:
        return []
    with quiet_harness():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        for name in names:
            if name not in manager.all_tasks:
                near = get_close_matches(name, manager.all_tasks) or manager.all_tasks[:8]
                raise RecipeError(
                    f"lm-eval has no task {name!r}",
                    where=folder,
                    remedy=f"did you mean {', '.join(near)}?",
                )
        found = _loaded(manager, names)
        return [_prepared_task(name, task, limit, shots) for name, task in found.items()]


def _loaded(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks by name, with their data sets."""
    with hub_or_cache() as reason:
        try:
            tasks: dict[str, Any] = manager.load(list(names))["tasks"]
        except Exception as error:  # each loader of data fails in its own way
            raise SourceError(
                f"the data of {', '.join(names)} cannot be read: {reason or first_line(error)}",
                remedy="check the network; or --task-data FOLDER, with tasks whose data is local",
            ) from error
    return tasks


def _prepared_task(name: str, task: Any, limit: int | None, shots: int | None) -> PreparedTask:
    """A task with its requests."""
    kinds, scored = ("multiple_choice", "loglikelihood", "generate_until"), {*task.aggregation()}
    if task.OUTPUT_TYPE not in kinds or not scored & {*METRICS}:
        raise RecipeError(
            f"the task {name} asks for {task.OUTPUT_TYPE} and is scored by "
            f"{', '.join(sorted(scored))}; only {', '.join(METRICS)} are computed here",
            remedy="serve the model (`secateur serve`), and let lm-eval ask the server",
        )
    config = task.config
    shots = (config.num_fewshot or 0) if shots is None else shots
    split = config.test_split or config.validation_split
    shots_from = config.fewshot_split or config.training_split or split
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    # hides the progress bar that lm-eval shows while it builds prompts
    with contextlib.redirect_stderr(io.StringIO()):
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    protocol = {
        "dataset": f"{config.dataset_path} {config.dataset_name or ''}".strip(),
        "split": split,
        "items_in_split": len(task.eval_docs),
        "task": name,
        "items": len({request.doc_id for request in task.instances}),
        "shots": shots,
        "shots_from": shots_from if shots else None,
        "harness": f"lm-eval {version('lm_eval')}",
        "task_version": str(task.VERSION),
        "request": task.OUTPUT_TYPE,
        "requests": fingerprint([list(request.args) for request in task.instances]),
    }
    return PreparedTask(name, task, limit, protocol)


def run_tasks(
    model: Any, tokenizer: Tokenizer, prepared: Sequence[PreparedTask], progress: Progress | None
) -> list[TaskScore]:
    """Evaluate a model on tasks.

    Args:
        model: a transformers causal language model, dense, pruned or packed; or what reads one.
        tokenizer: the model's tokenizer.
        prepared: tasks from `prepare_tasks`.
        progress: receives every request.

    Returns:
        For each task its metrics, in the order in which the task reports them.
    """
    progress = progress or Silent()
    scores: list[TaskScore] = []
    with quiet_harness():
        from secateur.evaluation.harness import HarnessModel

        asked = HarnessModel(model, tokenizer, progress.step)
        for one in prepared:
            requests = one.task.instances
            progress.start(one.name, len(requests))
            answer = asked.written if one.writes else asked.loglikelihood
            found: Sequence[Any] = answer(requests, disable_tqdm=True)
            progress.finish()
            for request, response in zip(requests, found, strict=True):
                request.resps, request.filtered_resps = [response], {}
            scores += _scored(one, {**one.protocol, **computed_by(model)})
    return scores


def _scored(one: PreparedTask, protocol: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The metrics of a task with answered requests. lm-eval decides which answers are right."""
    task, outcomes, guesses = one.task, defaultdict[str, list[float]](list), list[float]()
    task.apply_filters()
    by_item = defaultdict[int, list[Any]](list)
    for request in task.instances:
        by_item[request.doc_id].append(request)
    filters = task.instances[0].filtered_resps
    for number, document in task.doc_iterator(rank=0, limit=one.limit, world_size=1):
        requests = sorted(by_item[number], key=lambda request: request.idx)
        for kept in filters:  # a task that reads texts may read them in several ways
            found = task.process_results(document, [r.filtered_resps[kept] for r in requests])
            way = "" if kept == "none" else f",{kept}"
            for metric in METRICS:
                if metric in found:
                    outcomes[f"{metric}{way}"].append(float(found[metric]))
        # items may have different numbers of choices; a text cannot be guessed
        guesses.append(1 / len(requests) if task.OUTPUT_TYPE == "multiple_choice" else 0.0)
    for metric, values in outcomes.items():
        yield TaskScore(
            task=one.name,
            metric=metric,
            value=mean_of(values),
            standard_error=standard_error(values),
            chance=mean_of(guesses),
            items=len(values),
            shots=protocol["shots"],
            protocol=protocol,
            protocol_id=protocol_id("task", protocol),
            outcomes=tuple(values),
        )


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence lm-eval's advice: it is about choices that this module makes, not the user."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with quiet_transformers():
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
