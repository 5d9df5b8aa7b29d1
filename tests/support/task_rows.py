"""Rows of every task in the schema of the hub, small enough for a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

LM_EVAL = {
    "arc_challenge": "arc/arc_challenge",
    "arc_easy": "arc/arc_easy",
    "boolq": "super_glue/boolq/default",
    "hellaswag": "hellaswag/hellaswag",
    "lambada_openai": "lambada/lambada_openai",
    "openbookqa": "openbookqa/openbookqa",
    "piqa": "piqa/piqa",
    "sciq": "sciq/sciq",
    "winogrande": "winogrande/default",
}
"""The files of the tasks in lm-eval."""

WORDS = ["stone", "river", "lamp", "cloud", "paper", "glass", "wheel", "chair"]


def choices(number: int, count: int = 4) -> dict[str, Any]:
    """The choices of an ARC question and the letter of the right one."""
    texts = [f"the {WORDS[(number + k) % 8]} {k}" for k in range(count)]
    letters = "ABCDE"[:count]
    return {
        "choices": {"text": texts, "label": [*letters]},
        "answerKey": letters[number % count],
    }


def row(task: str, n: int) -> dict[str, Any]:
    """One row of a task."""
    word, other = WORDS[n % 8], WORDS[(n + 3) % 8]
    return {
        "hellaswag": {
            "activity_label": "Cooking",
            "ctx_a": f"A {word} lies there {n}.",
            "ctx_b": "it",
            "endings": [f"{w} is {n}" for w in WORDS[:4]],
            "label": str(n % 4),
        },
        "piqa": {"goal": f"lift {word} {n}", "sol1": "by hand", "sol2": other, "label": n % 2},
        "winogrande": {
            "sentence": f"The {word} hit the {other} because _ fell {n}.",
            "option1": word,
            "option2": other,
            "answer": str(1 + n % 2),
        },
        "boolq": {"passage": f"A {word}.", "question": f"is it {n}", "label": n % 2},
        "arc_easy": {"question": f"Which {word} {n}?", **choices(n)},
        "arc_challenge": {"question": f"Which {word} {n}?", **choices(n, 3 + n % 3)},
        "openbookqa": {"question_stem": f"The {word} {n} is", **choices(n)},
        "sciq": {
            "question": f"What {n}?",
            "support": f"{word} text",
            "correct_answer": word,
            "distractor1": other,
            "distractor2": "this one",
            "distractor3": "that",
        },
        "lambada_openai": {"text": f"he saw the {word} {n} and then the {other}"},
    }[task]


def write_task(folder: Path, task: str, count: int = 6, *, shots: int = 0) -> Path:
    """A task of lm-eval in a folder, with rows of its own; `shots` more are for examples."""
    folder.mkdir(exist_ok=True)
    files = {"validation": folder / f"{task}.jsonl"}
    if shots:
        files["train"] = folder / f"{task}.train.jsonl"
    for file, numbers in zip(files.values(), (range(count), range(shots)), strict=False):
        file.write_text("".join(json.dumps(row(task, n)) + "\n" for n in numbers))
    held = {
        "include": str(Path(lm_eval.tasks.__file__).parent / f"{LM_EVAL[task]}.yaml"),
        "task": task,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        "training_split": None,
        "validation_split": None,
        "test_split": "validation",  # as the split of examples: then no item is its own
        "fewshot_split": [*files][-1],
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(held))
    return folder
