"""Makes the candidates of a fit as real models, and measures them as they run.

`secateur prune` prunes, and `secateur compress` rounds, heals and packs. Both go through the layers
in order, so every linear is fitted to the inputs that it has in the model that is made. The same
options, as steps of a chain, are the recipe of the winner. Windows that choose made no model, and
windows that judge chose none.

The survey, the first model and the judgement are always made. Between them, what does not fit into
the time any more is dropped: further candidates, healing. A phase is expected to take as long as
the same one took. What was measured is kept in files, so a resumed run decides the same.

Speed and memory come from processes of their own, as in `secateur bench`: the packed winner and the
source as dense int8 take turns. The memory is that of a process with a short text, and the KV cache
of the rest of the context is added.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor

from secateur.calibration.documents import check_text
from secateur.calibration.run_windows import WindowReader
from secateur.engine.search.candidate_evaluator import (
    DENSE,
    CandidateEvaluator,
    FitnessCache,
    cut_windows,
)
from secateur.engine.stream.hidden_states import STATES_BYTES, EmbeddingAndHead
from secateur.engine.stream.layerwise import LayerwiseReader
from secateur.evaluation.perplexity import LossComparison
from secateur.evaluation.speed import Speed, take_turns
from secateur.models.checkpoint import CheckpointReader
from secateur.models.counting import counted
from secateur.models.opening import refuse_quantized
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint
from secateur.models.targets import CheckpointTarget
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe, FitRecipe
from secateur.recipes.options import Recipe, bytes_of
from secateur.recipes.prune import ChainRecipe, PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.shared import texts_of
from secateur.recipes.structure import StructureRecipe
from secateur.reporting.cards import made_again, shown_place
from secateur.reporting.fit import FitCheck, FitFinalist, FitLoss
from secateur.reporting.models import CompressResult
from secateur.runs.environment import choose_device
from secateur.runs.folder import NOTES, STATE
from secateur.runs.output import write_json, write_text
from secateur.runtime.formats import BITS, BLOCKS, GRID_BITS, WeightFormat
from secateur.runtime.load import load
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.sparsity.evolution import Candidate
from secateur.steps.compress import Compress
from secateur.steps.fitting.problem import (
    EMBEDDINGS,
    GROUP,
    Costs,
    FitProblem,
    Formats,
    costs_of,
    embedded,
)
from secateur.steps.runner import RunContext, Step, carry_out, step_of

T = TypeVar("T")

RECIPE, WINDOWS, EXPERTS = "recipe.yaml", "windows.safetensors", "experts.json"

TRIMMING = "trimming.yaml"
"""The recipe that makes the model that is fitted, where tokens have gone."""

LESS = 0.95
"""A mix has zeros only if it is predicted to lose less than so much of what the best one without
zeros loses: predictions err by more than a smaller gain."""

TRIES = (LESS, LESS, math.inf, math.inf)
"""A mix is chosen again if it became larger than predicted; at last, zeros need no gain."""

HEALABLE = 1.3
"""With a bound on the loss, smaller candidates that exceed it by at most so much are healed too."""

HEALING: Mapping[str, Any] = {"epochs": 1, "hidden": 3.0}
"""How a rounded model learns: the predictions and the last hidden states of the dense one. The text
itself it does not learn, so that a dense model which knows the text too little stays the aim."""

TIMING_ERROR = 0.05
"""How far a speed-up may be off when it is measured again; a bound is kept up to here."""

PROMPT_TOKENS, NEW_TOKENS, ROUNDS, MOST_SECONDS = 32, 16, 15, 90.0


def open_model(recipe: FitRecipe, source: LocalCheckpoint) -> PackableCheckpoint:
    """The dense model of a recipe whose texts are there, and its matrices that can be packed."""
    for text in texts_of(recipe.calibration.source):
        check_text(text)
    refuse_quantized(source.folder)
    return PackableCheckpoint.open(source.folder)


def trimming_of(recipe: FitRecipe) -> StructureRecipe:
    """The recipe that removes the tokens that the text of a fit never needs."""
    options = {
        "model": recipe.model,
        "output": f"{recipe.output}-trimmed",
        "trust_remote_code": recipe.trust_remote_code,
        "vocabulary": recipe.vocabulary,
        "calibration": {"source": recipe.calibration.source, "field": recipe.calibration.field},
    }
    return build_recipe(StructureRecipe, options)


@dataclass(frozen=True)
class BuiltCandidate:
    """A model that was made.

    Attributes:
        sparse: the model before rounding; the source where nothing was pruned.
        packed: the model, packed: what is measured.
        formats: how every unit is stored.
        row: its numbers, for the result.
    """

    sparse: Path
    packed: Path
    formats: Formats
    row: FitFinalist

    @property
    def rise(self) -> float:
        """Of the loss, cautiously, where the recipe bounds it."""
        assert self.row.rise is not None
        return self.row.rise


def best_of(candidates: Sequence[BuiltCandidate], bound: float | None = None) -> BuiltCandidate:
    """The candidate that diverges least from the dense model.

    Args:
        candidates: that were made.
        bound: on the rise of the loss. With one it is the smallest candidate within the bound, or
            the one whose loss rises least where none is.
    """
    if bound is None:
        return min(candidates, key=lambda one: one.row.last)
    within = [one for one in candidates if one.rise <= bound]
    smallest = min(within, key=lambda one: one.row.file_bytes, default=None)
    return smallest or min(candidates, key=lambda one: one.rise)


class FitBench:
    """A dense model, with what makes candidates of it and measures them.

    Args:
        recipe: of the fit.
        model: the dense model, and its matrices that can be packed.
        costs: what it pays with, within the bounds of the recipe.
        run: the run that this is a part of.

    Attributes:
        target: the layers of the dense model, one at a time.
        work: folder for models, windows and measured values.
        cut: the options of `structure` that make the model from that of the recipe; None where it
            is that model.
        time: the time that is left.
        windows_file: the windows that make models, and those that heal them.
        choosing: measures losses on the windows that choose.
        chosen: measures divergences on the same windows.
        judging: measures them on windows that judge the result.

    Raises:
        RecipeError: there are fewer windows than purposes.
    """

    def __init__(
        self, recipe: FitRecipe, model: PackableCheckpoint, costs: Costs, run: RunContext
    ) -> None:
        self.recipe, self.model, self.costs, self.run = recipe, model, costs, run
        self.source, self.progress, self.work = run.source, run.progress, run.folder.work
        self.cut: Mapping[str, Any] | None = None
        self.time = TimeBudget(recipe.minutes, self.work / "pace.json", run.meter.started)
        self.target = self.opened(model.reader)
        files = [self.work / f"{name}.safetensors" for name in ("fitted", "chosen", "judged")]
        config = self.target.model.config
        WindowReader.of_folder(self.source.folder, config).save_parts(
            str(recipe.calibration.source), recipe.calibration, files,
            "make models, choose among them and judge", self.progress, recipe.tokens_to_heal,
        )  # fmt: skip
        self.windows_file = files[0]
        self.choosing, self.judging = (
            LossComparison(self.target, file, self.progress) for file in files[1:]
        )
        self.chosen = DivergenceComparison(
            self.target, self.choosing.windows, self.work / "measured-chosen.jsonl", self.progress
        )

    def of_cut(self, name: str, options: Mapping[str, Any]) -> FitBench:
        """The same windows and judges, for models made of a cut of the model.

        Args:
            name: for people, and of its folder.
            options: of `structure`.
        """
        other = copy.copy(self)
        other.cut = {**options, "calibration": {"source": str(self.windows_file)}}
        recipe = build_recipe(StructureRecipe, {**other.cut, **self.named})
        label, place = Labelled(self.progress, name), self.work / "cuts" / name.replace(" ", "-")
        with self.time.phase("cutting"):
            folder = self._part(step_of("structure"), recipe, self.source, place, label)
        other.source = replace(self.source, folder=folder)
        other.model = PackableCheckpoint.open(folder)
        other.costs = costs_of(self.recipe, other.model, self.progress)
        return other

    # -- candidates --------------------------------------------------------------------------------

    def mix(self, name: str, problem: FitProblem) -> tuple[BuiltCandidate | None, FitProblem]:
        """Make the best mix within the bounds; None if there is none that keeps them.

        Returns:
            The candidate, and the problem after all that were made.
        """
        most = limit = problem.costs.kinds[0].limit
        seen = set[Candidate]()
        for less in TRIES:
            own = problem.limited(limit)
            candidate = own.mix(less)
            if candidate is None or candidate in seen:
                continue
            seen.add(candidate)
            made, own = self.made(name, own, candidate)
            problem = replace(problem, scale=own.scale)
            if made.row.file_bytes <= most:
                return made, problem
            limit -= made.row.file_bytes - most
        return None, problem

    def made(
        self, name: str, problem: FitProblem, candidate: Candidate
    ) -> tuple[BuiltCandidate, FitProblem]:
        """Make a candidate, unless an earlier run has, and measure it.

        Args:
            name: for people.
            problem: that it is an answer to.
            candidate: the formats of all units.

        Returns:
            The candidate, and the problem with what it has lost.
        """
        predicted = problem.base + problem.knapsack.predicted(candidate)
        made = self.build(name, problem.formats(candidate), predicted)
        return made, problem.after(made.row)

    def build(self, name: str, formats: Formats, predicted: float = 0.0) -> BuiltCandidate:
        """Make a model with some formats, unless an earlier run has, and measure it.

        Args:
            name: for people.
            formats: of all linears, and of the embeddings.
            predicted: its divergence.
        """
        place, label = self._place(formats), Labelled(self.progress, f"a model, {name}")
        with self.time.phase("making"):
            sparse = self._pruned(formats, place, label)
            packed = self._compressed(sparse, formats, place / "packed", label)
            size = self.costs.files.finish(packed, self.progress)
            divergence = self.divergence(packed)
        row = FitFinalist(name, size, predicted, divergence, rise=self.rise(packed))
        return BuiltCandidate(sparse, packed, formats, row)

    def healed(self, candidates: Sequence[BuiltCandidate]) -> list[BuiltCandidate]:
        """The candidates, and those that may win after they have learned from the dense model.

        One that is worse then, or too large, because fewer weights round to zero, stays as it was.
        """
        bound, found = self.recipe.max_loss_increase, list[BuiltCandidate]()
        best = best_of(candidates, bound)
        for one in candidates:
            may_win = one is best or (
                bound is not None
                and one.row.file_bytes < best.row.file_bytes
                and one.rise <= HEALABLE * bound
            )
            heals = self.recipe.tokens_to_heal and may_win
            if heals and self.time.allows("healing", "healing"):
                one = self._healed(one)
            found.append(one)
        return found

    def _healed(self, candidate: BuiltCandidate) -> BuiltCandidate:
        formats, row = candidate.formats, candidate.row
        label = Labelled(self.progress, f"healing the model, {row.name}")
        output = self._place(formats) / "healed"
        with self.time.phase("healing"):
            packed = self._compressed(candidate.sparse, formats, output, label, heals=True)
            size = self.costs.files.finish(packed, self.progress)
            divergence = self.divergence(packed)
        if divergence >= row.divergence or size > self.costs.kinds[0].limit:
            return candidate
        rise = self.rise(packed)
        row = replace(row, file_bytes=size, healed=divergence, rise=rise)
        return replace(candidate, packed=packed, row=row)

    def _place(self, formats: Formats) -> Path:
        """The folder of a model, by its formats."""
        lines = "\n".join(f"{linear} {stored.name}" for linear, stored in sorted(formats.items()))
        lines += "" if self.cut is None else f"\n{self.source.folder.name}"
        return self.work / "mixes" / f"{crc32(lines.encode()):08x}"

    def _pruned(self, formats: Formats, place: Path, progress: Progress) -> Path:
        """The model before rounding: a pruned one, or the source where nothing is pruned."""
        place.mkdir(parents=True, exist_ok=True)
        options = _prune_options(self.recipe, self._linears(formats), str(self.windows_file))
        if options is None:
            return self.source.folder
        recipe = build_recipe(PruneRecipe, {**options, **self.named})
        label = Labelled(progress, "pruning")
        return self._part(step_of("prune"), recipe, self.source, place / "pruned", label)

    def _compressed(
        self,
        sparse: Path,
        formats: Formats,
        output: Path,
        progress: Progress,
        *,
        heals: bool = False,
    ) -> Path:
        """A model rounded and packed; if it heals, it learns from the dense one before."""
        teacher = self.recipe.model
        if self.recipe.vocabulary is not None:  # only that one has the same tokens
            teacher = str(self.run.source.folder)
        options = self._compress_options(
            formats, str(self.windows_file), teacher if heals else None
        )
        recipe = build_recipe(CompressRecipe, {**options, **self.named})
        source = replace(self.source, folder=sparse)
        return self._part(_CompressBeside, recipe, source, output, Labelled(progress, "rounding"))

    @property
    def named(self) -> dict[str, Any]:
        """What records and cards of candidates name: the model and the output of the fit."""
        own = self.recipe
        named = {"model": own.model, "output": str(own.output)}
        return {**named, "trust_remote_code": own.trust_remote_code}

    def _part(
        self,
        kind: type[Step[Any, Any]],
        recipe: Recipe,
        source: LocalCheckpoint,
        at: Path,
        progress: Progress,
    ) -> Path:
        """Carry out a step as a part of this run, unless an earlier run has."""
        if not at.exists():
            carry_out(kind, recipe, progress, resume=True, at=at, source=source)
        return at

    def pack(self, winner: BuiltCandidate) -> CompressResult:
        """Put the packed winner into the folder of the run, with the recipe that makes it again."""
        recipe, folder = self.recipe, self.run.folder
        text, heals = f"{recipe.output}/{NOTES}/{WINDOWS}", winner.row.healed is not None
        shutil.copytree(winner.packed, folder.fresh_model(), dirs_exist_ok=True)
        (folder.notes / STATE).unlink(missing_ok=True)
        shutil.copyfile(self.windows_file, folder.notes / WINDOWS)
        prune = _prune_options(recipe, self._linears(winner.formats), text)
        structure = None if self.cut is None else {**self.cut, "calibration": {"source": text}}
        if structure and "experts_list" in structure:
            shutil.copyfile(structure["experts_list"], folder.notes / EXPERTS)
            structure["experts_list"] = f"{recipe.output}/{NOTES}/{EXPERTS}"
        before = {"structure": structure, "prune": prune}
        steps = [{verb: options} for verb, options in before.items() if options is not None]
        trimming = None if recipe.vocabulary is None else trimming_of(recipe)
        model = recipe.model if trimming is None else str(trimming.output)
        compress = self._compress_options(winner.formats, text, model if heals else None)
        steps.append({"compress": compress})
        chain = {**self.named, "model": model, "output": f"{recipe.output}-again", "steps": steps}
        again = dump_recipe(build_recipe(ChainRecipe, chain))
        write_text(folder.notes / RECIPE, again)
        card, place = folder.model / "README.md", shown_place(str(recipe.output))
        sections = [card.read_text(encoding="utf-8").rstrip()]
        if trimming is not None:
            first = dump_recipe(trimming)
            write_text(folder.notes / TRIMMING, first)
            sections.append(made_again("structure", first, f"{place}-trimmed"))
        sections.append(made_again("chain", again, f"{place}-again"))
        write_text(card, "\n\n".join(sections) + "\n")
        packed: CompressResult = step_of("compress").result(folder.model)
        return packed.model_copy(update={"output": folder.output})

    def _linears(self, formats: Formats) -> dict[str, WeightFormat]:
        """The formats of the linears alone."""
        return {name: one for name, one in formats.items() if name in self.costs.shapes}

    def _compress_options(self, formats: Formats, text: str, teacher: str | None) -> dict[str, Any]:
        """The options of `compress` that give every unit its values; with a teacher it heals."""
        recipe, linears = self.recipe, self._linears(formats)
        wanted = {name: stored.values for name, stored in linears.items()}
        common = Counter(wanted.values()).most_common(1)[0][0]
        others = {name: values for name, values in wanted.items() if values != common}
        ends = {n: one.values for n, one in formats.items() if n in self.costs.outer}
        options: dict[str, Any] = {"values": common, "overrides": {**others, **ends}}
        if EMBEDDINGS in formats:
            options["embeddings"] = embedded(formats[EMBEDDINGS])
        values = {*wanted.values(), *ends.values(), options.get("embeddings", common)}
        if GRID_BITS.keys() & values:
            options["group_size"] = GROUP
        rounded = {*BITS, *BLOCKS} & {*wanted.values(), *ends.values()}
        if rounded or GRID_BITS.keys() & values or teacher:
            options |= {"calibration": {"source": text}, **shared_options(recipe)}
        if teacher is not None:
            learning = {**HEALING, "tokens": recipe.tokens_to_heal, "teacher": teacher}
            options["distillation"] = learning
        return options

    # -- measurements ------------------------------------------------------------------------------

    def divergence(self, folder: Path) -> float:
        """The divergence of a packed model on the windows that choose: as it runs in the kernels,
        or as the target's file has it.
        """
        back, name = self.read_back(folder), self._name_of(folder)
        return self.chosen.of(back, name) if back else self.chosen.running(folder, name)

    def rise(self, folder: Path) -> float | None:
        """The cautious rise of the loss of a packed model; None where the recipe bounds none.

        A bound on the mean and its standard error usually holds on other windows too.
        """
        if self.recipe.max_loss_increase is None:
            return None

        def cautious() -> float:
            mean, error = self.increase(self.choosing, folder)
            return mean + (error or 0.0)

        return self.chosen.once(f"the loss of {self._name_of(folder)}", cautious)

    def increase(self, windows: LossComparison, folder: Path) -> tuple[float, float | None]:
        """The rise of the loss of a packed model, and its standard error, on some windows."""
        back = self.read_back(folder)
        return windows.increase(
            LayerwiseReader(back, STATES_BYTES, self.progress) if back else load(folder)
        )

    def read_back(self, folder: Path) -> CheckpointTarget | None:
        """A model as the target's file has it; None if the packed folder is that file."""
        reader = self.costs.files.read_back(folder, self.model)
        return None if reader is None else self.opened(reader)

    def opened(self, reader: CheckpointReader) -> CheckpointTarget:
        """The layers of a model, in the dtype in which models are compared."""
        device = choose_device(self.recipe.device)
        return CheckpointTarget(reader, None, device, dtype=self.costs.files.dtype)

    def _name_of(self, folder: Path) -> str:
        """A name for a folder among the work of the run, and for the dense model."""
        inside = folder.is_relative_to(self.work)
        return "-".join(folder.relative_to(self.work).parts) if inside else "dense"

    def speedup(self, folder: Path, number: int) -> float | None:
        """How many times as fast as dense int8 a packed model decodes, from a file or timed now.

        Args:
            folder: of the model.
            number: of the measurement.

        Returns:
            None if the recipe has no bound on it, or it cannot be timed.
        """
        if self.recipe.decode_speedup is None:
            return None

        def ratio() -> float | None:
            ours, dense = self.race(folder)
            failed = ours.failure or dense.failure
            return None if failed else ours.tokens_per_second / dense.tokens_per_second

        return self.chosen.once(f"the speed-up, {number}", ratio)

    def race(self, folder: Path) -> list[Speed]:
        """A packed model, and for a speed-up the source as dense int8, timed in turns.

        A model that our loop does not decode runs in transformers.
        """
        bounded = self.recipe.decode_speedup is not None
        dense = [("dense int8", self.source.folder)] if bounded else []
        for backend in ("packed", "packed in transformers"):
            found = take_turns(
                [(backend, folder), *dense],
                prompt=self.judging.windows.flatten()[:PROMPT_TOKENS].tolist(),
                new_tokens=NEW_TOKENS,
                rounds=ROUNDS,
                seconds=MOST_SECONDS,
                progress=self.progress,
            )
            if not found[0].failure:
                break
        return found

    def checks(self, file_bytes: int, loss: FitLoss) -> Iterator[FitCheck]:
        """Compare every bound with what is measured on the packed winner in the run's folder.

        Args:
            file_bytes: of its weight files.
            loss: its loss on text that did not choose, as it runs.
        """
        recipe = self.recipe
        if recipe.max_size is not None:
            most = bytes_of(recipe.max_size)
            yield FitCheck("max_size", most, file_bytes, file_bytes <= most)
        if recipe.max_loss_increase is not None:
            bound, rise, error = recipe.max_loss_increase, loss.loss_increase, loss.standard_error
            yield FitCheck("max_loss_increase", bound, rise, rise <= bound, standard_error=error)
        if recipe.max_inference_memory is not None or recipe.decode_speedup is not None:
            yield from check_running(recipe, self.run.folder.model, self.race)


class DivergenceComparison:
    """Mean KL(dense ‖ model) of the next-token probabilities on some windows, nats per token.

    Args:
        target: the dense model.
        windows: of text.
        file: of the values, so that each is measured once.
        progress: receives every model.
    """

    def __init__(
        self, target: CheckpointTarget, windows: Tensor, file: Path, progress: Progress
    ) -> None:
        self.windows, self.progress = cut_windows(windows, windows.numel()), progress
        self.dense = self._evaluator(target, None)
        self.values = FitnessCache(self.dense, lambda _: (), (), self.windows.numel(), file)

    def of(self, target: CheckpointTarget, name: str) -> float:
        """Of an opened model, which is kept by its name."""
        evaluator = self._evaluator(target, self.dense)
        candidates, rows = [(DENSE,) * len(target.layers)], range(len(self.windows))
        return self.once(name, lambda: evaluator.fitness(candidates, rows)[0])

    def running(self, folder: Path, name: str) -> float:
        """Of a packed model, as it runs in the kernels."""
        return self.once(name, lambda: self._running(folder))

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """A value of a model, from the file or else measured."""
        self.progress.start(f"measuring {name}", 1)
        found: T = self.values.noted(name, measure)
        self.progress.finish()
        return found

    @torch.no_grad()
    def _running(self, folder: Path) -> float:
        model = load(folder)
        self.dense.pass_dense()
        total, device = 0.0, self.dense.outer.target.device
        with self.dense.outside():
            for row, ids in enumerate(self.windows):
                logits = model(input_ids=ids[None]).logits[0]
                total += self.dense.measure(row)(logits.to(device))
        return total / len(self.windows)

    def _evaluator(
        self, target: CheckpointTarget, dense: CandidateEvaluator | None
    ) -> CandidateEvaluator:
        """Passes one model, as it is, through its layers."""
        outer = EmbeddingAndHead(target, self.windows, fast=False)
        return CandidateEvaluator(outer, self.progress, reference=dense)


def check_running(
    recipe: FitRecipe, folder: Path, race: Callable[[Path], Sequence[Speed]]
) -> Iterator[FitCheck]:
    """The bounds on speed and memory of a packed model, by a race as of `FitBench.race`."""
    ours, *others = race(folder)
    failure = next((one.failure for one in (ours, *others) if one.failure), None)
    if recipe.decode_speedup is not None:
        wanted, speedup = recipe.decode_speedup, 0.0
        if failure is None:
            speedup = ours.tokens_per_second / others[0].tokens_per_second
        kept = speedup >= wanted * (1 - TIMING_ERROR)
        yield FitCheck("decode_speedup", wanted, speedup, kept, failure)
    if recipe.max_inference_memory is not None:
        most, held = bytes_of(recipe.max_inference_memory), 0
        if failure is None:
            shape = counted("", build_skeleton(folder))
            # the process that was measured had a short text
            grown = shape.held_bytes(recipe.context_length, "cpu")
            grown -= shape.held_bytes(PROMPT_TOKENS + NEW_TOKENS, "cpu")
            held = ours.resident_bytes + max(0, round(grown))
        kept = failure is None and held <= most
        yield FitCheck("max_inference_memory", most, held, kept, failure)


class _CompressBeside(Compress):
    """Keeps the rounded checkpoint in the folder of its result. The healing run finds it there."""

    @property
    def place(self) -> Path:
        """The folder of all that is made with the same formats."""
        return self.run.folder.output.parent


def _prune_options(recipe: FitRecipe, formats: Formats, text: str) -> dict[str, Any] | None:
    """The options of `prune` that give every linear its sparsity; None if there are no zeros."""
    wanted = {name: stored.sparsity for name, stored in formats.items()}
    if not any(wanted.values()):
        return None
    same = len(set(wanted.values())) == 1
    return {
        "effort": "fast" if recipe.effort == "fast" else "balanced",  # healing comes later
        "allocation": "uniform",  # the knapsack has chosen
        "sparsity": max(wanted.values()) if same else 0.0,
        "overrides": {} if same else {name: share for name, share in wanted.items() if share},
        "calibration": {"source": text},
        **shared_options(recipe),
    }


def shared_options(recipe: FitRecipe) -> dict[str, Any]:
    """The options that all runs take over."""
    memory = recipe.memory.model_dump(exclude_unset=True)
    return {"device": recipe.device, **({"memory": memory} if memory else {})}


class TimeBudget:
    """Measures phases, and says whether there is time for another.

    Args:
        minutes: for the whole fit; None for no limit.
        file: of the times of phases.
        begun: when the fit began, by the clock.
        clock: returns seconds.

    Attributes:
        dropped: what was left out for lack of time, for people.
    """

    def __init__(
        self,
        minutes: float | None,
        file: Path,
        begun: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.end = math.inf if minutes is None else begun + minutes * 60.0
        self.file, self.clock = file, clock
        self.took: dict[str, float] = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        )
        self.dropped: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase; of several with one name, the longest counts."""
        began = self.clock()
        yield
        taken = self.clock() - began
        if taken > self.took.get(name, 0.0):
            self.took[name] = taken
            write_json(self.file, self.took)

    def allows(self, what: str, phase: str) -> bool:
        """Whether there is time for something that takes as long as a phase took; if not, note it.

        A phase that was never measured takes no time.
        """
        if self.clock() + self.took.get(phase, 0.0) <= self.end:
            return True
        if what not in self.dropped:
            self.dropped.append(what)
        return False
