"""Measures the models of a fit: divergence, loss, accuracy, speed and memory.

Divergence and loss that choose are measured on other windows than those that made the levels.

    accuracy kept = Σ accuracy of the model / Σ accuracy of the dense model

The sums go over tasks, and both models answer the same items. The accuracy is `acc` of lm-eval: the
right answer is the likeliest one.

Speed and memory come from processes of their own, as in `secateur bench`: the packed winner and the
source as dense int8 take turns. The memory is that of a process with a short text, and the KV cache
of the rest of the context is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.choose.candidate_evaluator import CandidateEvaluator, FitnessCache, fingerprint
from secateur.engine.choose.knapsack import Cost
from secateur.engine.choose.stored_levels import FitLevel, FitSearch, StoredVariants
from secateur.engine.stream.embedding_and_head import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.evaluation.speed import Speed, take_turns
from secateur.evaluation.tasks import PreparedTask, prepare_tasks, run_tasks
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton
from secateur.progress import Labelled, Progress
from secateur.recipes.fit import FitRecipe
from secateur.recipes.sizes import bytes_of
from secateur.reporting.results.fit import FitCheck, FitLoss
from secateur.runtime.load import load
from secateur.sparsity.evolution import Candidate
from secateur.workflows.advise import counted
from secateur.workflows.fit.build_models import Kinds, packed
from secateur.workflows.fit.context import Ground
from secateur.workflows.judge.perplexity import load_model

TIMING_ERROR = 0.05
"""How far a speed-up may be off when it is measured again; a bound is kept up to here."""


PROMPT_TOKENS, NEW_TOKENS, ROUNDS, MOST_SECONDS = 32, 16, 15, 90.0


BISECTIONS = 6


METRIC = "acc"


class Yardstick:
    """Measures divergences: mean KL(dense ‖ model) of the next-token probabilities, nats per token.

    The models may have other layers and widths than the dense one, but its vocabulary. What was
    measured is kept in files.

    Args:
        ground: of the fit.
        windows: token ids [windows, length].
        name: of the windows, for the files.
    """

    def __init__(self, ground: Ground, windows: Tensor, name: str) -> None:
        self.ground, self.windows, self.name = ground, windows, name
        self.dense = self.evaluator(ground.target, None)

    def divergence(self, folder: Path) -> float:
        """The divergence of a model as it is, which is not packed."""
        device, trust = self.ground.target.device, self.ground.recipe.trust_remote_code
        target = CheckpointTarget(CheckpointReader(folder), None, device, trust_remote_code=trust)
        evaluator = self.evaluator(target, self.dense)
        versions = ("dense",) * len(target.layers)
        rows = range(len(self.windows))
        return self.kept(folder, lambda: evaluator.fitness([versions], rows)[0])

    def packed(self, sparse: Path, folder: Path, kinds: Kinds) -> tuple[Path, float]:
        """Pack a model that was made, and measure it as it runs.

        Args:
            sparse: the model before rounding.
            folder: the model.
            kinds: how every linear is stored.

        Returns:
            The packed folder and its divergence.
        """
        ground, source = self.ground, replace(self.ground.source, folder=sparse)
        output = ground.work / "packed" / self.name_of(folder)
        packed(ground.recipe, source, folder, kinds, output, ground.progress)
        return output, self.kept(output, lambda: self.running(output))

    @torch.no_grad()
    def running(self, folder: Path) -> float:
        """The divergence of a packed model in the kernels."""
        model = load(folder, trust_remote_code=self.ground.recipe.trust_remote_code)
        self.dense.pass_dense()
        total = 0.0
        with self.dense.outside():
            for row, ids in enumerate(self.windows):
                logits = model(input_ids=ids[None]).logits[0]
                total += self.dense.measure(row)(logits.to(self.ground.target.device))
        return total / len(self.windows)

    def kept(self, folder: Path, measure: Callable[[], float]) -> float:
        """A value of a model, from its file or else measured."""
        name = self.name_of(folder)
        file = self.ground.work / "measured" / f"{self.name}-{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        told = fingerprint(self.dense.outer, self.windows.numel(), "divergence", ())
        values = FitnessCache(self.dense, lambda _: (), file, {**told, "model": name})
        self.ground.progress.start(f"measuring {name}", 1)
        found: float = values.noted("divergence", measure)
        self.ground.progress.finish()
        return found

    def name_of(self, folder: Path) -> str:
        """A name for a folder among the work of the run, and for the dense model."""
        work = self.ground.work
        return "-".join(folder.relative_to(work).parts) if folder.is_relative_to(work) else "dense"

    def evaluator(
        self, target: CheckpointTarget, dense: CandidateEvaluator | None
    ) -> CandidateEvaluator:
        """Passes one model, as it is, through its layers."""
        outer = EmbeddingAndHead(target, self.windows)
        variants = StoredVariants(outer, (), ())
        return CandidateEvaluator(outer, variants, "divergence", self.ground.progress, dense)


@dataclass(frozen=True)
class LossMeter:
    """The loss of candidates on some windows.

    Attributes:
        fitness: measures, or reads what was measured.
        tokens: of the windows.
        linears: how many a candidate has.
    """

    fitness: FitnessCache
    tokens: int
    linears: int

    @classmethod
    def on(
        cls,
        windows: Tensor,
        ground: Ground,
        names: Sequence[str],
        levels: Sequence[FitLevel],
        file: Path,
    ) -> LossMeter:
        """A meter on windows.

        Args:
            windows: token ids [windows, length].
            ground: of the fit.
            names: of the linears; a candidate has a level for each.
            levels: the levels; 0 is the model itself.
            file: of the measured values.
        """
        outer = EmbeddingAndHead(ground.target, windows)
        variants = StoredVariants(outer, names, [one.level for one in levels])
        told = fingerprint(outer, windows.numel(), "loss", names)
        evaluator = CandidateEvaluator(outer, variants, "loss", ground.progress)
        measure = FitnessCache(evaluator, variants.versions, file, told)
        return cls(measure, windows.numel(), len(names))

    @torch.no_grad()
    def loss(self, candidate: Candidate) -> float:
        """The mean loss of the next token, in nats."""
        (found,) = self.fitness([candidate], self.tokens, 0)
        return found

    def rise(self, candidate: Candidate) -> float:
        """The loss above that of the model itself."""
        return self.loss(candidate) - self.loss((0,) * self.linears)


def smallest_within(
    search: FitSearch, meter: LossMeter, bound: float, aim: Cost, progress: Progress
) -> float:
    """The smallest size found, by bisection, whose loss rises by no more than a bound.

    Args:
        search: after the survey; its predictions choose a candidate for each cost.
        meter: on the windows that choose.
        bound: in nats per token.
        aim: the other budgets, and the largest size.
        progress: receives every measured size.

    Returns:
        Bytes of all linears.
    """
    low, high = search.knapsack.least[0], min(aim[0], search.knapsack.most[0])
    progress.start("finding the smallest size", BISECTIONS)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        candidate = search.knapsack.best((middle, *aim[1:]))
        rise = math.inf if candidate is None else meter.rise(candidate)
        low, high = (low, middle) if rise <= bound else (middle, high)
        progress.step(note=f"{middle / 2**20:.1f} MiB of linears: {rise:+.4f}")
    progress.finish()
    return high


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


def checks_of(
    ground: Ground, made: Path, file_bytes: int, loss: FitLoss, tasks: Sequence[PreparedTask]
) -> tuple[FitCheck, ...]:
    """Every bound beside what was measured.

    Args:
        ground: of the fit.
        made: folder of the packed winner.
        file_bytes: of its weight files.
        loss: its loss on text that did not choose, measured on the packed winner as it runs.
        tasks: for the accuracy; none if it has no bound.
    """
    recipe = ground.recipe
    found = []
    if recipe.max_size is not None:
        most = bytes_of(recipe.max_size)
        found.append(FitCheck("max_size", most, file_bytes, file_bytes <= most))
    if recipe.max_loss_increase is not None:
        bound, rise = recipe.max_loss_increase, loss.loss_increase
        error = loss.standard_error
        found.append(
            FitCheck("max_loss_increase", bound, rise, rise <= bound, standard_error=error)
        )
    if recipe.max_inference_memory is not None or recipe.decode_speedup is not None:
        found += checks_of_running(ground, made)
    if recipe.min_accuracy_kept is not None:
        found.append(check_of_accuracy(ground, made, recipe.min_accuracy_kept, tasks))
    return tuple(found)


def check_of_accuracy(
    ground: Ground, made: Path, least: float, tasks: Sequence[PreparedTask]
) -> FitCheck:
    """The accuracy that is kept."""
    recipe, progress = ground.recipe, ground.progress
    dense = accuracy(ground.reader.folder, tasks, recipe, progress, "dense")
    if not dense:
        failure = "the dense model answers none of the questions right"
        return FitCheck("min_accuracy_kept", least, 0.0, kept=False, failure=failure)
    kept = accuracy(made, tasks, recipe, progress, "winner") / dense
    return FitCheck("min_accuracy_kept", least, kept, kept >= least)


def checks_of_running(ground: Ground, made: Path) -> list[FitCheck]:
    """The bounds on speed and memory."""
    recipe, found = ground.recipe, []
    ours, *others = raced(ground, made)
    failure = next((one.failure for one in (ours, *others) if one.failure), None)
    if recipe.decode_speedup is not None:
        wanted, speedup = recipe.decode_speedup, 0.0
        if failure is None:
            speedup = ours.tokens_per_second / others[0].tokens_per_second
        kept = speedup >= wanted * (1 - TIMING_ERROR)
        found.append(FitCheck("decode_speedup", wanted, speedup, kept, failure))
    if recipe.max_inference_memory is not None:
        most, held = bytes_of(recipe.max_inference_memory), 0
        if failure is None:
            shape = counted("", build_skeleton(made, trust_remote_code=recipe.trust_remote_code))
            grown = shape.cache_bytes(recipe.context_length)
            grown -= shape.cache_bytes(PROMPT_TOKENS + NEW_TOKENS)
            held = ours.resident_bytes + max(0, round(grown))
        kept = failure is None and held <= most
        found.append(FitCheck("max_inference_memory", most, held, kept, failure))
    return found


def speedup_of(ground: Ground, made: Path) -> float | None:
    """How many times as fast as dense int8 a packed winner decodes; None if it cannot be timed."""
    ours, dense = raced(ground, made)
    if ours.failure or dense.failure:
        return None
    return ours.tokens_per_second / dense.tokens_per_second


def raced(ground: Ground, made: Path) -> list[Speed]:
    """The packed winner, and for a speed-up the source as dense int8, timed in turns.

    A model that our loop does not decode runs in transformers.
    """
    found = in_turns(ground, "packed", made)
    return in_turns(ground, "packed in transformers", made) if found[0].failure else found


def in_turns(ground: Ground, contender: str, made: Path) -> list[Speed]:
    """A contender on the packed winner, and dense int8 where a speed-up is bounded."""
    contenders = [(contender, made)]
    if ground.recipe.decode_speedup is not None:
        contenders.append(("dense int8", ground.reader.folder))
    return take_turns(
        contenders,
        prompt=ground.judged.flatten()[:PROMPT_TOKENS].tolist(),
        new_tokens=NEW_TOKENS,
        rounds=ROUNDS,
        seconds=MOST_SECONDS,
        progress=ground.progress,
    )
