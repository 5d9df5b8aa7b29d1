"""Our way to a task score beside lm-eval's own, item for item: `docs/evaluation.md`.

    python -m benchmarks.quality.tasks                          # five tasks, the first 100 items of each
    python -m benchmarks.quality.tasks --tasks hellaswag sciq       # more; what is there already is kept

lm-eval loads the checkpoint by itself (`simple_evaluate`, `hf`, float32, batches of one) and reads
the same Arrow files by its own configuration (`dataset_path: arrow`); nothing of secateur runs on
its side. Compared are the outcome of every item, and the log-likelihood of every request.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import lm_eval
from benchmarks.hardware import heading, keep, markdown
from benchmarks.quality.local_tasks import TASKS, write_tasks
from benchmarks.stored import known_rows
from lm_eval.tasks import TaskManager

from secateur.evaluation.tasks import prepare_tasks, run_tasks
from secateur.models.cache import cache_folder
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.load import load

MEASURES = ("src/secateur/evaluation/tasks.py", "src/secateur/evaluation/harness.py")
MINUTES = 6

FIVE = ("winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge")


def scores(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Scores beside lm-eval's own."""
    lines = [
        [
            row["task"],
            score["metric"],
            f"{score['value']:.3f} ± {score['standard_error']:.3f}",
            f"{score['lm_eval_value']:.3f}",
            f"{score['chance']:.2f}",
            str(score["items_that_differ"]),
        ]
        for row in rows
        for score in row["scores"]
    ]
    return ["task", "metric", "secateur", "lm-eval", "chance", "items that differ"], lines


TABLES = {"scores": scores}


def theirs(name: str, tasks: Path, folder: Path, limit: int) -> dict[str, Any]:
    """lm-eval alone: samples of a task."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options: dict[str, Any] = {"tasks": [name], "batch_size": 1, "limit": limit}
    options["task_manager"] = manager
    options |= {"num_fewshot": 0, "bootstrap_iters": 0}
    loaded = {"pretrained": str(folder), "dtype": "float32"}
    return lm_eval.simple_evaluate(model="hf", model_args=loaded, device="cpu", **options)


def compare(name: str, folder: Path, limit: int) -> dict[str, Any]:
    """Both ways on one task."""
    started = time.perf_counter()
    tasks = write_tasks(cache_folder() / "tasks", name)
    (prepared,) = prepare_tasks([name], folder=str(tasks), limit=limit)
    model, tokenizer = load(folder), load_tokenizer(folder)
    scores = run_tasks(model, tokenizer, [prepared], None)
    ours_seconds = time.perf_counter() - started
    ours = [request.resps[0][0] for request in prepared.task.instances]
    del model
    started = time.perf_counter()
    found = theirs(name, tasks, folder, limit)
    theirs_seconds = time.perf_counter() - started
    samples = found["samples"][name]
    asked = [tuple(args) for sample in samples for args in sample["arguments"]]
    assert asked == [request.args for request in prepared.task.instances], "other requests"
    likelihoods = [response[0][0] for sample in samples for response in sample["resps"]]
    return {
        "task": name,
        "protocol_id": scores[0].protocol_id,
        "protocol": dict(scores[0].protocol),
        "requests": len(ours),
        "largest_log_likelihood_difference": max(
            abs(a - float(b)) for a, b in zip(ours, likelihoods, strict=True)
        ),
        "seconds": ours_seconds,
        "lm_eval_seconds": theirs_seconds,
        "scores": [
            {
                "metric": score.metric,
                "value": score.value,
                "standard_error": score.standard_error,
                "chance": score.chance,
                "lm_eval_value": found["results"][name][f"{score.metric},none"],
                "items_that_differ": sum(
                    outcome != sample[score.metric]
                    for outcome, sample in zip(score.outcomes, samples, strict=True)
                ),
            }
            for score in scores
        ],
    }


def main() -> None:
    """Compare, task by task; each is kept as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="*", default=FIVE, choices=TASKS)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--name", default="tasks")
    args = parser.parse_args()
    print(heading())
    folder = resolve(args.model).folder
    protocol = {"model": args.model, "limit": args.limit, "shots": 0, "dtype": "float32"}
    rows = known_rows(args.name, protocol)
    for name in args.tasks:
        if any(row["task"] == name for row in rows):
            continue
        rows.append(compare(name, folder, args.limit))
        keep(args.name, protocol, rows)
        ours, other = rows[-1]["seconds"], rows[-1]["lm_eval_seconds"]
        print(f"{name}: {ours:.0f} s, lm-eval {other:.0f} s", flush=True)
    print(markdown(*scores(rows)))


if __name__ == "__main__":
    main()
