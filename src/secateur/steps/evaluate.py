"""Evaluates a model: perplexity, divergence, tasks and texts, compared with a reference."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.engine import plan
from secateur.engine.stream.layerwise import LayerwiseReader
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.evaluation import generation
from secateur.evaluation.divergence import divergence, divergence_of_texts
from secateur.evaluation.perplexity import (
    COMPUTED,
    PerplexityResult,
    Reader,
    WholeReader,
    computed_by,
    fingerprint,
    needs_of_layers,
    needs_of_whole,
    perplexity,
    protocol_id,
    reader_of,
    window_progress,
    windows_of,
)
from secateur.evaluation.tasks import PreparedTask, prepare_tasks, run_tasks
from secateur.evaluation.uncertainty import compare, mean_of
from secateur.models.architecture import positions_of, refuse_foreign
from secateur.models.checkpoint import QUANT_METHOD, shard_files
from secateur.models.hub import own_texts
from secateur.models.opening import EXPANDED, form_of
from secateur.models.targets import CheckpointTarget
from secateur.models.tokenizer import load_tokenizer, tokenizer_for
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress, listener
from secateur.recipes.deploy import Sampling
from secateur.recipes.keywords import recipe_of, refuse_unused, takes_options_of
from secateur.recipes.measure import EvaluateRecipe
from secateur.recipes.verbs import VERBS
from secateur.reporting.evaluate import EvaluateResult
from secateur.runs import measured
from secateur.runs.environment import choose_device, environment
from secateur.runs.folder import NOTES
from secateur.runs.output import check_writable
from secateur.runtime.install import DenseView, open_checkpoint
from secateur.runtime.load import PackedTarget, load
from secateur.steps.runner import source_of

log = logging.getLogger(__name__)

DEFAULT_TEXT = "wikitext2"
"""The default text of an evaluation."""


NOT_COMPARED: dict[str, Any] = dict.fromkeys(measured.Comparison.model_fields)
"""What a score without a reference says about one."""

BY_DENSE = "written by dense"

Source = nn.Module | Reader | Path
"""A loaded model, what reads one, or its folder."""

UNUSED = ("device", "trust_remote_code", "max_memory")
"""Options that loaded models cannot use."""


@dataclass(frozen=True)
class _Judged:
    """A model that is judged.

    Args:
        name: the name that the user gave.
        reader: reads token ids, with the whole model or one layer of it in memory.
        tokenizer: the model's tokenizer.
    """

    name: str
    reader: Reader
    tokenizer: Any


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is judged, not opened yet."""

    name: str
    folder: Path
    place: torch.device

    @property
    def bytes(self) -> int:
        """The size of the whole model in memory. Integers take a byte at most."""
        if not self.layerwise:
            return sum(file.stat().st_size for file in shard_files(self.folder))
        reader = open_checkpoint(self.folder)
        layouts = reader.packed.layouts if isinstance(reader, DenseView) else {}
        integers = {f"{name}.weight" for name, layout in layouts.items() if layout.integers}
        entries = reader.entries.items()
        return sum(prod(x.shape) if name in integers else x.size_bytes for name, x in entries)

    @property
    def layerwise(self) -> bool:
        """Whether layers can be read one after the other: no other library computes with all."""
        return form_of(self.folder) in (None, *EXPANDED, QUANT_METHOD)

    def target(self) -> CheckpointTarget:
        """The model with one layer in memory; a compressed layer computes as it is stored.

        Raises:
            MemoryBudgetError: another library computes, with all of the model.
        """
        if not self.layerwise:
            raise MemoryBudgetError(
                f"{form_of(self.folder)} is judged as a whole, and {self.name} does not fit",
                where=f"{self.bytes / 2**30:.2f} GiB",
                remedy="run `secateur import` on it and judge the result, or raise --max-memory",
            )
        reader = open_checkpoint(self.folder)
        if isinstance(reader, DenseView):
            return PackedTarget(reader.packed, self.place)
        return CheckpointTarget(reader, None, self.place)


def _open(
    asked: Sequence[tuple[str, Source]],
    tokenizer: Any,
    recipe: EvaluateRecipe,
    progress: Progress,
    ranks: Ranks,
    *,
    writes: bool,
) -> list[_Judged]:
    """Open models: whole where all fit in memory, else the last ones layer by layer.

    Memory is estimated before any layer is read. All processes take the same way.

    Args:
        asked: the models by their names.
        tokenizer: of the loaded ones.
        recipe: says where and in how much memory.
        progress: receives the steps.
        ranks: the processes that share the work.
        writes: whether models write texts.

    Raises:
        MemoryBudgetError: the models do not fit, or they write texts and do not fit whole.
    """
    for _, one in asked:
        if isinstance(one, nn.Module):
            refuse_foreign(one)
    place, targets = choose_device(recipe.device), list[CheckpointTarget]()
    needs = list[plan.Need]()
    stored = [Stored(name, one, place) for name, one in asked if isinstance(one, Path)]
    budget = plan.memory_budget(recipe.memory.max_bytes, place, ranks.here)
    on_gpu, why = place.type != "cpu", ""
    for whole in range(len(stored), -1, -1):  # the first so many are whole
        if whole < len(stored):
            targets.insert(0, stored[whole].target())
            needs += needs_of_layers(targets[0], recipe.sequence_length)
        of_whole = needs_of_whole([x.bytes for x in stored[:whole]])
        planned = plan.Plan(plan.with_program([*needs, *of_whole], on_gpu), on_gpu)
        short = [x for x in ranks.gather(stored and budget.shortage(planned)) if x]
        if not short:
            break
        why = why or short[0]
        if writes:
            raise MemoryBudgetError(
                f"texts are written by whole models: {why}",
                remedy="leave out what writes texts (--generation, --kinds, loops, tasks such as "
                "gsm8k), and all else goes layer by layer; or raise --max-memory",
            )
        if not whole:
            raise budget.refusal(planned, f"a model does not fit layer by layer: {short[0]}")
    readers, sizes = list[Reader](), {x.name: x.bytes for x in needs}
    for x in stored[:whole]:
        progress.start(f"{x.name} is read as a whole on {place}: {x.bytes / 2**30:.2f} GiB", 1)
        readers.append(WholeReader(load(x.folder, device=place)))  # kernels multiply a packed one
        progress.finish()
    for x, target in zip(stored[whole:], targets, strict=True):
        layer = sizes["layer"] / 2**30
        log.warning("%s is read layer by layer, %.2f GiB at a time: %s", x.name, layer, why)
        states = sizes["states"] + (budget.computing - planned.peak_bytes) / len(targets)
        readers.append(LayerwiseReader(target, states, progress))
    opened = zip(readers, (load_tokenizer(x.folder) for x in stored), strict=True)
    return [
        _Judged(name, *(next(opened) if isinstance(one, Path) else _loaded(one, tokenizer)))
        for name, one in asked
    ]


def _loaded(one: nn.Module | Reader, tokenizer: Any) -> tuple[Reader, Any]:
    """What reads a loaded model, and its tokenizer."""
    return reader_of(one), tokenizer_for(one, tokenizer)


@takes_options_of(EvaluateRecipe)
def evaluate(
    model: str | Path | nn.Module,
    *,
    dense: str | Path | nn.Module | None = None,
    tokenizer: Any = None,
    prompts: Sequence[str] = generation.PROMPTS,
    progress: Progress | None = None,
    **options: Any,
) -> EvaluateResult:
    """Measure a model. Each number comes with its protocol and uncertainty.

        secateur.evaluate("pruned", text="boolq-held-out").perplexity
        secateur.evaluate(model, tokenizer=tokenizer, text="other.txt").perplexity
        secateur.evaluate("pruned", dense="smollm2-135m", text="wikitext2", tasks=["hellaswag"])

    A folder that `secateur prune` wrote keeps the results in `secateur/evaluation.json`. New
    results replace earlier ones of the same protocol. Other results stay.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model, which
            stays on its device.
        dense: The dense model, likewise. Adds divergence, differences and retention. [none]
        tokenizer: of a loaded model. [the one at the place the model came from]
        prompts: the texts that the model continues.
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The results of this call.

    Raises:
        SecateurError: what, where, and what to do.
    """
    if isinstance(model, nn.Module) and (dense is None or isinstance(dense, nn.Module)):
        refuse_unused(EvaluateRecipe, options, UNUSED, "a loaded model stays as it is")
    if tokenizer is not None and not any(isinstance(x, nn.Module) for x in (model, dense)):
        raise RecipeError("a checkpoint has its own tokenizer", remedy="leave `tokenizer` out")
    own = {"model": _name_of(model), "dense": None if dense is None else _name_of(dense)}
    recipe, _ = recipe_of(EvaluateRecipe, own, options)
    call = {
        "model": model if isinstance(model, nn.Module) else None,
        "dense": dense if isinstance(dense, nn.Module) else None,
        "tokenizer": tokenizer,
        "prompts": prompts,
    }
    showing: Any = partial(nullcontext, listener(progress))
    result: EvaluateResult = VERBS["evaluate"].run(recipe, call, showing)
    return result


def run_evaluation(
    recipe: EvaluateRecipe,
    progress: Progress,
    *,
    model: Source | None = None,
    dense: Source | None = None,
    tokenizer: Any = None,
    prompts: Sequence[str] = generation.PROMPTS,
    tasks: Sequence[PreparedTask] = (),
    ranks: Ranks = ALONE,
) -> EvaluateResult:
    """Carry out a recipe.

    Several processes each open the models, and measure different windows. The first one stores the
    results.

    Args:
        recipe: recipe of the evaluation.
        progress: receives every step.
        model: the model in place of the one that the recipe names.
        dense: the dense model, likewise.
        tokenizer: tokenizer of the loaded models.
        prompts: the texts that the model continues.
        tasks: in place of those that the recipe names.
        ranks: the processes that share the windows.

    Raises:
        RecipeError: several processes, and something other than texts is to be measured.
    """
    if ranks.count > 1 and (recipe.tasks or recipe.generation or recipe.kinds):
        raise RecipeError(
            f"there are {ranks.count} processes, and they share only the windows of texts",
            remedy="leave --tasks, --generation and --kinds out, or start without torchrun",
        )
    if recipe.output is not None:
        check_writable(Path(recipe.output), file=True)
    names = recipe.text
    if not (names or recipe.tasks or tasks or recipe.generation or recipe.kinds):
        texts_of_sample = own_texts(recipe.model) or own_texts(recipe.dense or "")
        names = (texts_of_sample.judge if texts_of_sample else DEFAULT_TEXT,)
    kept, notes = None, Path(recipe.model) / NOTES
    if model is None and notes.is_dir():  # a run folder keeps its results
        kept = notes / measured.FILE_NAME
        if kept.is_file():
            measured.read_evaluation(kept)  # refuse a file to which results cannot be added
    # first, so that a missing task is an error before a model is loaded
    prepared = tasks or prepare_tasks(
        recipe.tasks, folder=recipe.task_data, limit=recipe.limit, shots=recipe.shots
    )
    given = ((recipe.model, model), (recipe.dense, dense))
    named = [(recipe.model_copy(update={"model": name}), one) for name, one in given if name]
    asked = [(own.model, one or source_of(own, progress, ranks).folder) for own, one in named]
    writes = recipe.generation or recipe.kinds or any(one.writes for one in prepared)
    own, *others = _open(asked, tokenizer, recipe, progress, ranks, writes=writes)
    reference = others[0] if others else None
    measure = _Measurement(own, reference, progress, ranks)
    texts = [measure.text(text, recipe.sequence_length, recipe.windows) for text in names]
    generated = [measure.generation(prompts)] if recipe.generation else []
    moved = [divergence for _, divergence in texts if divergence]
    if recipe.kinds and reference is not None:
        moved += measure.kinds(reference)
    record = measured.EvaluationRecord(
        model=own.name,
        perplexity=[perplexity for perplexity, _ in texts],
        divergence=moved,
        tasks=measure.tasks(prepared),
        generation=generated,
    )

    def store() -> None:
        if kept is not None:
            record.add_to(kept)
        if recipe.output is not None:
            record.save(Path(recipe.output))

    ranks.once(store)
    return EvaluateResult(record=record)


def _name_of(model: str | Path | nn.Module) -> str:
    """The name of a model in the records."""
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


@dataclass(frozen=True)
class _Measurement:
    """Measures a model, and compares it with the dense one if there is one."""

    own: _Judged
    dense: _Judged | None
    progress: Progress
    ranks: Ranks

    @property
    def shared(self) -> dict[str, Any]:
        """The dense model and the environment, which every result names."""
        return {
            "reference": self.dense.name if self.dense else None,
            "environment": environment(self.own.reader.device),
        }

    def text(
        self, text: str | Path, sequence_length: int | None, first: int | None
    ) -> tuple[measured.PerplexityRecord, measured.DivergenceRecord | None]:
        """Measure perplexity on a text; with a dense model also its perplexity and the divergence.

        Raises:
            RecipeError: the dense model splits the text into different tokens.
        """
        own, dense = self.own, self.dense
        windows, protocol = windows_of(text, own.reader, own.tokenizer, sequence_length, first)
        start = len(protocol.get("start_tokens", ()))
        how: dict[str, Any] = {"start_tokens": start, "ranks": self.ranks}
        if dense is None:
            with window_progress(self.progress, "perplexity", len(windows)) as report:
                result = perplexity(own.reader, windows, progress=report, **how)
            return self._perplexity(text, result, None, protocol), None
        other, dense_protocol = windows_of(
            text, dense.reader, dense.tokenizer, windows.shape[1], first
        )
        if other.shape != windows.shape or bool((other != windows).any()):
            raise RecipeError(
                f"{own.name} and {dense.name} read {text} as different tokens",
                remedy="name the dense model that this one was pruned from as reference",
            )
        with window_progress(self.progress, "divergence", len(windows)) as report:
            found = divergence(own.reader, dense.reader, windows, progress=report, **how)
        both = protocol | {f"reference_{key}": dense_protocol[key] for key in COMPUTED}
        record = measured.DivergenceRecord(
            text=str(text),
            **found.model_dump(include=set(measured.Divergence.model_fields)),
            protocol=both,
            protocol_id=protocol_id("div", both),
            **self.shared,
        )
        return self._perplexity(text, found.model, found.reference, protocol), record

    def kinds(self, dense: _Judged) -> list[measured.DivergenceRecord]:
        """Compare both models on four kinds of text that the dense model writes."""
        self.progress.start("kinds of text", sum(map(len, generation.KINDS.values())))
        room = positions_of(dense.reader.module.config) or 2048
        tokens = min(generation.NEW_TOKENS, room // 2)
        found = []
        for kind, prompts in generation.prompts_of_kinds(dense.tokenizer).items():
            texts = []
            for number, prompt in enumerate(prompts):
                drawn, ids = Sampling(temperature=1.0, seed=number), prompt[tokens - room :]
                made = generation.continuation(dense.reader.module, ids, tokens, drawn)
                texts.append((torch.cat([ids, torch.tensor(made)]), len(ids)))
                self.progress.step()
            both = {
                "kind": kind,
                "prompts": len(prompts),
                "token_ids": fingerprint([ids.tolist() for ids, _ in texts]),
                "new_tokens": tokens,
                "written_by": "the dense model, at temperature 1",
                **computed_by(self.own.reader),
            }
            both |= {f"reference_{k}": v for k, v in computed_by(dense.reader).items()}
            record = measured.DivergenceRecord(
                text=f"{kind} ({BY_DENSE})",
                **divergence_of_texts(self.own.reader, dense.reader, texts).model_dump(),
                protocol=both,
                protocol_id=protocol_id("div", both),
                **self.shared,
            )
            found.append(record)
        self.progress.finish()
        return found

    def _perplexity(
        self,
        text: str | Path,
        result: PerplexityResult,
        reference: PerplexityResult | None,
        protocol: dict[str, Any],
    ) -> measured.PerplexityRecord:
        return measured.PerplexityRecord(
            text=str(text),
            perplexity=result.perplexity,
            mean_loss=result.mean_loss,
            standard_error=result.standard_error,
            reference_perplexity=reference.perplexity if reference else None,
            protocol=protocol,
            protocol_id=protocol_id("ppl", protocol),
            seconds=result.seconds,
            **self.shared,
        )

    def tasks(self, prepared: Sequence[PreparedTask]) -> list[measured.TaskRecord]:
        """Measure scores of tasks, with the scores of the dense model if there is one."""
        if not prepared:
            return []
        own = run_tasks(self.own.reader, self.own.tokenizer, prepared, self.progress)
        compared: list[dict[str, Any]] = [NOT_COMPARED] * len(own)
        if self.dense is not None:
            dense = run_tasks(self.dense.reader, self.dense.tokenizer, prepared, self.progress)
            compared = [
                compare(score.outcomes, other.outcomes, score.chance).model_dump()
                for score, other in zip(own, dense, strict=True)
            ]
        return [
            measured.TaskRecord(
                **score.model_dump(exclude={"outcomes"}), **comparison, **self.shared
            )
            for score, comparison in zip(own, compared, strict=True)
        ]

    def generation(self, prompts: Sequence[str]) -> measured.GenerationRecord:
        """Generate texts with the model and with the dense model, side by side."""

        def generate(loaded: _Judged) -> list[measured.SampleRecord]:
            return generation.check_generation(
                loaded.reader.module, loaded.tokenizer, prompts=prompts, progress=self.progress
            )

        def beside(
            one: measured.SampleRecord, other: measured.SampleRecord
        ) -> measured.SampleRecord:
            found = {"reference_text": other.text, "reference_repetition": other.repetition}
            return one.model_copy(update=found)

        own = generate(self.own)
        dense = None if self.dense is None else generate(self.dense)
        protocol = generation.generation_protocol(prompts) | computed_by(self.own.reader)
        return measured.GenerationRecord(
            samples=own if dense is None else [*map(beside, own, dense)],
            repetition=mean_of([one.repetition for one in own]),
            degenerate=sum(one.degenerate for one in own),
            reference_repetition=mean_of([one.repetition for one in dense]) if dense else None,
            reference_degenerate=sum(one.degenerate for one in dense) if dense else None,
            protocol=protocol,
            protocol_id=protocol_id("gen", protocol),
            **self.shared,
        )
