"""Rows of every task in the schema of the hub, small enough for a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        "lambada": {"text": f"he saw the {word} {n} and then the {other}"},
    }[task]


def write_rows(folder: Path, task: str, count: int = 6, *, stem: str | None = None) -> Path:
    """A JSONL file of a task in a folder."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{stem or task}.jsonl"
    file.write_text("".join(json.dumps(row(task, n)) + "\n" for n in range(count)))
    return file
