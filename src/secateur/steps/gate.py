"""`--must-keep`: a result that has not kept enough of its source does not get its name.

    work is whole ─► result and source are measured ─► records, card ─► one rename
                                             └─► a bound is broken: exit code 3, the work stays

`recipes.shared.Bound` lists what can be bounded. The result is evaluated as it will be published,
and its source beside it. What was measured stays in the work folder, so a resumed run with other
limits measures nothing again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from secateur.calibration.documents import check_text, read_text
from secateur.engine.stream.hidden_states import STATES_BYTES
from secateur.engine.stream.layerwise import LayerwiseReader
from secateur.errors import RecipeError, SourceError, VerificationError
from secateur.evaluation.generation import DEGENERATE, KINDS, PROMPTS
from secateur.evaluation.perplexity import fingerprint
from secateur.evaluation.tasks import PreparedTask, prepare_tasks
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.measure import EvaluateRecipe
from secateur.recipes.shared import Bound, MemoryLimit, texts_of
from secateur.reporting.cards import with_measurements, without_folders
from secateur.reporting.fields import blocks_of, filled
from secateur.runs.folder import content_of
from secateur.runs.measured import FILE_NAME, EvaluationRecord, SampleRecord, TaskRecord
from secateur.runs.measured import KINDS as RESULTS
from secateur.runs.output import write_json, write_text
from secateur.runs.records import MustKeep, parsed
from secateur.steps.evaluate import run_evaluation

WINDOWS = 64
"""So many windows or beginnings of a text are read, if the recipe says nothing else."""

NUMBERS = "judged.json"
"""What was measured, by what it depends on."""

PASSAGE, BEGINNING = 1000, 160
"""Characters of a passage, and of its beginning, which is the prompt."""

LINE = "{bound}: {value:.4f}< ± {standard_error:.4f}> {measure}"
"""A bound in an error."""


@dataclass(frozen=True)
class Judge:
    """The bounds of a recipe, with all that they name.

    Attributes:
        recipe: of a run.
        bounds: what its result must keep.
        tasks: of each bound with a task, by the name in the bound.
    """

    recipe: Any
    bounds: tuple[Bound, ...]
    tasks: dict[str, list[PreparedTask]]

    @classmethod
    def of(cls, recipe: Any) -> Judge:
        """Check that all texts are there, and read the data of all tasks.

        Raises:
            RecipeError: a task is unknown, or a text has made the result.
            SourceError: a text does not exist, or the data of a task cannot be read.
        """
        how, bounds = recipe.gate, tuple(map(Bound.read, recipe.gate.must_keep))
        made_it = {os.path.realpath(text) for text in texts_of(recipe.calibration.source)}
        trims = getattr(recipe, "vocabulary", None) or getattr(recipe, "vocabulary_size", None)
        for bound in (bound for bound in bounds if bound.on_text):
            check_text(bound.name)
            made = os.path.exists(bound.name) and os.path.realpath(bound.name) in made_it
            if made or (trims and bound.kind != "loops"):
                raise RecipeError(
                    "a text that made the result cannot judge it"
                    if made
                    else "with fewer tokens the result reads a text as other tokens",
                    where=f"--must-keep {bound.written}",
                    remedy="name a text that is no calibration text" if made else "bound tasks",
                )
        asked = {"folder": how.task_data, "limit": how.must_keep_items}
        tasks = {x.name: prepare_tasks([x.name], **asked) for x in bounds if x.kind == "task"}
        return cls(recipe, bounds, tasks)

    def work(self, step: Any) -> None:
        """Run a step, or take the work of a stopped run, and judge the result.

        Raises:
            VerificationError: a bound is broken; with all numbers. The work stays.
        """
        folder, file = step.run.folder, step.run.folder.work / "made.json"
        made = json.loads(file.read_bytes()) if file.exists() else {}
        settled, card = json.loads(json.dumps(step.settled())), folder.model / "README.md"
        if made.get("settled") != settled:
            (folder.work / NUMBERS).unlink(missing_ok=True)
            step.work()
            made = {"settled": settled, "card": card.read_text(encoding="utf-8")}
            write_json(file, made)  # the last: the work is whole
        else:
            step.run.ranks.once(lambda: None)  # the other processes have nothing to do
        folder.whole = True
        rows = [*map(_row, self.bounds, self.measured(step))]
        numbers = [row.to_json() for row in rows]
        if broken := [row for row in rows if not row.holds]:
            lines = (f"\n    {'kept' if x.holds else 'BROKEN'}: {filled(LINE, x)}" for x in rows)
            error = VerificationError(
                f"{len(broken)} of {len(rows)} bounds of --must-keep are broken:{''.join(lines)}",
                where=str(folder.partial),
                remedy="the model waits there: --resume with other limits publishes it by the same "
                "numbers; --restart discards it",
            )
            error.measured = numbers
            raise error
        record = folder.notes / step.measured_in
        write_json(record, {**json.loads(record.read_bytes()), "must_keep": numbers})
        section = {"What it had to keep": blocks_of("MustKeep", {"must_keep": rows})}
        write_text(card, without_folders(with_measurements(made["card"], section)))

    def measured(self, step: Any) -> list[EvaluationRecord]:
        """What the result of a step and its source score for each bound, from a file or measured.

        Both are opened once for all bounds, and again only for other prompts.
        """
        folder, how = step.run.folder, self.recipe.gate
        file, data = folder.work / NUMBERS, how.task_data and content_of(how.task_data)
        found = json.loads(file.read_bytes()) if file.exists() else {}
        shared = how.must_keep_items, data, self.recipe.calibration.sequence_length
        names = (content_of(x.name) if x.on_text else x.name for x in self.bounds)
        keys = [
            fingerprint([_kind(x), n, *shared]) for x, n in zip(self.bounds, names, strict=True)
        ]
        asked = dict(zip(keys, self.bounds, strict=True))
        while missing := {key: x for key, x in asked.items() if key not in found}:
            found |= self._evaluated(step, missing)
            write_json(file, found)
        records = [parsed(EvaluationRecord, json.dumps(found[key]), str(file)) for key in keys]
        for record in records:
            record.add_to(folder.notes / FILE_NAME)
        return records

    def _evaluated(self, step: Any, missing: Mapping[str, Bound]) -> dict[str, Any]:
        """The parts of one evaluation, by the keys of bounds; of those with prompts the first."""
        recipe, how = self.recipe, self.recipe.gate
        texts, loops, tasks = (
            [key for key, bound in missing.items() if _kind(bound) == own]
            for own in ("text", "loops", "task")
        )
        prepared = {x.name: x for key in tasks for x in self.tasks[missing[key].name]}
        prompts = [x for key in loops[:1] for x in _prompts(missing[key].name)]
        evaluation = EvaluateRecipe(
            model=str(recipe.output or step.run.place),
            dense=recipe.model,
            text=tuple(missing[key].name for key in texts),
            windows=how.must_keep_items or WINDOWS,
            sequence_length=recipe.calibration.sequence_length,
            generation=bool(loops),
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
            memory=MemoryLimit(max_memory=recipe.memory.max_memory),
        )
        writes = bool(loops) or any(one.writes for one in prepared.values())
        with _result_of(step, writes=writes) as (model, tokenizer):
            made = run_evaluation(
                evaluation, step.run.progress, model=model, dense=step.run.source.folder,
                tokenizer=tokenizer, prompts=prompts[: how.must_keep_items],
                tasks=[*prepared.values()],
            ).record  # fmt: skip
        pairs = zip(texts, made.perplexity, made.divergence, strict=True)
        parts: dict[str, Any] = {key: {"perplexity": [x], "divergence": [y]} for key, x, y in pairs}
        parts |= {key: {"generation": made.generation} for key in loops[:1]}
        for key in tasks:
            own = {x.name for x in self.tasks[missing[key].name]}
            parts[key] = {"tasks": [one for one in made.tasks if one.task in own]}
        none: dict[str, Any] = {kind: [] for kind in RESULTS}
        return {k: made.model_copy(update=none | part).to_json() for k, part in parts.items()}


def _kind(bound: Bound) -> str:
    """What is measured for a bound: a text, a task or loops."""
    return bound.kind if bound.kind in ("task", "loops") else "text"


@contextmanager
def _result_of(step: Any, *, writes: bool) -> Iterator[tuple[Any, Any]]:
    """The folder that a step has made; or what reads its file, and the tokenizer."""
    target, folder = step.read_back(), step.run.folder.model
    if target is None:
        yield folder, None
    elif not writes:
        yield LayerwiseReader(target, STATES_BYTES, step.run.progress), load_tokenizer(folder)
    else:
        with ExitStack() as stack:
            stack.enter_context(target.outside())
            for number in range(len(target.layers)):
                stack.enter_context(target.layer(number))
            yield target.model, load_tokenizer(folder)


def _prompts(text: str) -> tuple[str, ...]:
    """What models continue: beginnings of passages of a text, or the prompts of secateur."""
    if not text:
        return (*PROMPTS, *(prompt for own in KINDS.values() for prompt in own))
    whole = read_text(text).text
    if not isinstance(whole, str):
        raise SourceError("conversations are no prompts", where=text, remedy="name a plain text")
    found = (whole[n : n + BEGINNING] for n in range(0, len(whole) - PASSAGE // 2, PASSAGE))
    return tuple(one.rpartition(" ")[0] or one for one in found)[:WINDOWS]


def _row(bound: Bound, record: EvaluationRecord) -> MustKeep:
    """A bound beside what was measured.

    Raises:
        RecipeError: the source has nothing that could be kept.
    """
    if bound.kind == "task":
        found = _kept_score(record.tasks)
    elif bound.kind == "loops":
        found = _loops(record.generation[0].samples)
    else:
        [one], name = record.divergence, "kl" if bound.kind == "divergence" else "loss_change"
        error = getattr(one, f"{name}_standard_error")
        found = getattr(one, name), error, f"nats per token, {one.tokens:,} tokens"
    if found is None:
        raise RecipeError(
            "the source itself answers nothing right, or loops in every text: there is nothing to "
            "keep",
            where=f"--must-keep {bound.written}",
            remedy="add --resume, and leave this bound out",
        )
    value, error, measure = found
    return MustKeep(
        bound=bound.written,
        value=value,
        standard_error=error,
        measure=measure,
        protocol_id=record.results[-1].protocol_id,
        holds=value >= bound.limit if bound.kind == "task" else value <= bound.limit,
    )


Found = tuple[float, float | None, str]
"""A value, its standard error, and what it is."""


def _kept_score(every: list[TaskRecord]) -> Found | None:
    """The share of a score that is left, in the metric in which the source scores highest.

    The tasks of a group count by their items. The standard error is that of the difference of
    pairs, over the score of the source.
    """

    def mean(metric: str, field: str) -> float:
        own = [one for one in every if one.metric == metric]
        return sum(x.items * getattr(x, field) for x in own) / sum(x.items for x in own)

    metric = max((one.metric for one in every), key=lambda name: mean(name, "reference_value"))
    own, dense = mean(metric, "value"), mean(metric, "reference_value")
    tasks = [one for one in every if one.metric == metric]
    count = sum(one.items for one in tasks)
    error = math.hypot(*(one.items * (one.difference_standard_error or 0.0) for one in tasks))
    words = f"of the source's {metric}: {own:.4f} of {dense:.4f}, {count:,} items"
    return (own / dense, error / count / dense, words) if dense else None


def _loops(samples: list[SampleRecord]) -> Found | None:
    """The share of texts that loop in the result, of those that do not loop in the source."""
    sound = [
        float(x.degenerate)
        for x in samples
        if (x.reference_repetition or 0.0) <= DEGENERATE and (x.reference_text or "").strip()
    ]
    words = f"of {len(sound)} texts that do not loop in the source, of {len(samples)}"
    return (mean_of(sound), standard_error(sound), words) if sound else None
