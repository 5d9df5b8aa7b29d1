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

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.search.candidate_evaluator import CandidateEvaluator, FitnessCache
from secateur.engine.search.stored_levels import StoredVariants
from secateur.engine.stream.embedding_and_head import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.evaluation.perplexity import load_model
from secateur.evaluation.speed import Speed, take_turns
from secateur.evaluation.tasks import PreparedTask, prepare_tasks, run_tasks
from secateur.models.checkpoint import CheckpointReader
from secateur.models.shape import counted
from secateur.models.skeleton import build_skeleton
from secateur.progress import Labelled
from secateur.recipes.compress import FitRecipe
from secateur.recipes.options import bytes_of
from secateur.reporting.fit import FitCheck, FitLoss
from secateur.runtime.load import load
from secateur.steps.fit.build_models import Formats, pack_made
from secateur.steps.fit.context import FitContext

TIMING_ERROR = 0.05
"""How far a speed-up may be off when it is measured again; a bound is kept up to here."""

PROMPT_TOKENS, NEW_TOKENS, ROUNDS, MOST_SECONDS = 32, 16, 15, 90.0

METRIC = "acc"


class ModelEvaluator:
    """Measures divergences: mean KL(dense ‖ model) of the next-token probabilities, nats per token.

    The models may have other layers and widths than the dense one, but its vocabulary. What was
    measured is kept in a file.

    Args:
        context: of the fit.
        windows: token ids [windows, length].
        name: of the windows, for the file.
    """

    def __init__(self, context: FitContext, windows: Tensor, name: str) -> None:
        self.context, self.windows = context, windows
        self.dense = self._evaluator(context.target, None)
        file = context.work / f"measured-{name}.jsonl"
        self.values = FitnessCache(self.dense, lambda _: (), (), windows.numel(), file)

    def divergence(self, folder: Path) -> float:
        """The divergence of a model as it is, which is not packed."""
        device, trust = self.context.target.device, self.context.recipe.trust_remote_code
        target = CheckpointTarget(CheckpointReader(folder), None, device, trust_remote_code=trust)
        evaluator = self._evaluator(target, self.dense)
        versions = ("dense",) * len(target.layers)
        rows = range(len(self.windows))
        return self._once(folder, lambda: evaluator.fitness([versions], rows)[0])

    def packed(self, sparse: Path, folder: Path, formats: Formats) -> tuple[Path, float]:
        """Pack a model that was made, and measure it as it runs.

        Args:
            sparse: the model before rounding.
            folder: the model.
            formats: how every linear is stored.

        Returns:
            The packed folder and its divergence.
        """
        output = self.context.work / "packed" / self._name_of(folder)
        pack_made(self.context, sparse, folder, formats, output)
        return output, self._once(output, lambda: self._running(output))

    @torch.no_grad()
    def _running(self, folder: Path) -> float:
        """The divergence of a packed model in the kernels."""
        model = load(folder, trust_remote_code=self.context.recipe.trust_remote_code)
        self.dense.pass_dense()
        total = 0.0
        with self.dense.outside():
            for row, ids in enumerate(self.windows):
                logits = model(input_ids=ids[None]).logits[0]
                total += self.dense.measure(row)(logits.to(self.context.target.device))
        return total / len(self.windows)

    def _once(self, folder: Path, measure: Callable[[], float]) -> float:
        """A value of a model, from the file or else measured."""
        name = self._name_of(folder)
        self.context.progress.start(f"measuring {name}", 1)
        found: float = self.values.noted(name, measure)
        self.context.progress.finish()
        return found

    def _name_of(self, folder: Path) -> str:
        """A name for a folder among the work of the run, and for the dense model."""
        work = self.context.work
        return "-".join(folder.relative_to(work).parts) if folder.is_relative_to(work) else "dense"

    def _evaluator(
        self, target: CheckpointTarget, dense: CandidateEvaluator | None
    ) -> CandidateEvaluator:
        """Passes one model, as it is, through its layers."""
        outer = EmbeddingAndHead(target, self.windows)
        variants = StoredVariants(outer, (), ())
        return CandidateEvaluator(outer, variants, "divergence", self.context.progress, dense)


def prepared_tasks(recipe: FitRecipe) -> list[PreparedTask]:
    """The tasks with their requests; none if the accuracy has no bound.

    Raises:
        RecipeError: a task is unknown.
        SourceError: its rows cannot be read.
    """
    if recipe.min_accuracy_kept is None:
        return []
    return prepare_tasks(recipe.tasks, source=recipe.task_data, limit=recipe.limit)


def check_bounds(
    context: FitContext,
    made: Path,
    file_bytes: int,
    loss: FitLoss,
    tasks: Sequence[PreparedTask],
) -> tuple[FitCheck, ...]:
    """Compare every bound with what is measured.

    Args:
        context: of the fit.
        made: folder of the packed winner.
        file_bytes: of its weight files.
        loss: its loss on text that did not choose, measured on the packed winner as it runs.
        tasks: for the accuracy; none if it has no bound.
    """
    recipe = context.recipe
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
        found += check_running(context, made)
    if recipe.min_accuracy_kept is not None:
        found.append(_check_accuracy(context, made, recipe.min_accuracy_kept, tasks))
    return tuple(found)


def _check_accuracy(
    context: FitContext, made: Path, least: float, tasks: Sequence[PreparedTask]
) -> FitCheck:
    def accuracy(folder: Path, name: str) -> float:
        recipe = context.recipe
        model, tokenizer = load_model(str(folder), recipe.device, recipe.trust_remote_code)
        scores = run_tasks(model, tokenizer, tasks, Labelled(context.progress, name))
        found = [score.value for score in scores if score.metric == METRIC]
        return sum(found) / len(found)

    dense = accuracy(context.source.folder, "dense")
    if not dense:
        failure = "the dense model answers none of the questions right"
        return FitCheck("min_accuracy_kept", least, 0.0, kept=False, failure=failure)
    kept = accuracy(made, "winner") / dense
    return FitCheck("min_accuracy_kept", least, kept, kept >= least)


def check_running(context: FitContext, made: Path) -> list[FitCheck]:
    """The bounds on speed and memory."""
    recipe, found = context.recipe, []
    ours, *others = race(context, made)
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


def speedup_of(context: FitContext, made: Path) -> float | None:
    """How many times as fast as dense int8 a packed winner decodes; None if it cannot be timed."""
    ours, dense = race(context, made)
    if ours.failure or dense.failure:
        return None
    return ours.tokens_per_second / dense.tokens_per_second


def race(context: FitContext, made: Path) -> list[Speed]:
    """The packed winner, and for a speed-up the source as dense int8, timed in turns.

    A model that our loop does not decode runs in transformers.
    """
    found = _in_turns(context, "packed", made)
    return _in_turns(context, "packed in transformers", made) if found[0].failure else found


def _in_turns(context: FitContext, backend: str, made: Path) -> list[Speed]:
    """A backend on the packed winner, and dense int8 where a speed-up is bounded."""
    timed = [(backend, made)]
    if context.recipe.decode_speedup is not None:
        timed.append(("dense int8", context.source.folder))
    return take_turns(
        timed,
        prompt=context.judging.windows.flatten()[:PROMPT_TOKENS].tolist(),
        new_tokens=NEW_TOKENS,
        rounds=ROUNDS,
        seconds=MOST_SECONDS,
        progress=context.progress,
    )
