"""Checks in the log of a training whether the learning rate was too high.

    best  = the lowest median of 20 losses in a row
    last  = the median of the last 20
    noise = 1.48 · median |loss − the median of the 20 around it|, at least 1 % of best
    risen : last > best + 6 · noise

If the loss rises by much more than its noise and does not fall again, the step size was too large.
If it becomes NaN or infinite, the training has failed.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from secateur.diagnostics.findings import finding
from secateur.errors import SourceError
from secateur.runs.records.measured import Finding

WINDOW = 20
DEVIATIONS = 6.0
LEAST_NOISE = 0.01
TO_SIGMA = 1.4826
"""Times the median absolute deviation is the standard deviation of normal noise."""


@dataclass(frozen=True)
class LoggedStep:
    """One line of the log.

    Attributes:
        step: its number.
        loss: of the training.
        learning_rate: None if it is unknown.
    """

    step: int
    loss: float
    learning_rate: float | None = None


def read_log(file: Path) -> list[LoggedStep]:
    """Read a log: one JSON object per line, with `loss`, and `step` and `learning_rate` if known.

    Lines without a loss (for example of an evaluation) are skipped.

    Raises:
        SourceError: there is no such file, a line is not JSON, or no line has a loss.
    """
    if not file.is_file():
        raise SourceError("there is no such training log", where=str(file))
    steps: list[LoggedStep] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "loss" in row:
                loss, rate = row["loss"], row.get("learning_rate")
                steps.append(
                    LoggedStep(
                        int(row.get("step", len(steps))),
                        math.nan if loss is None else float(loss),  # null: NaN or infinite
                        None if rate is None else float(rate),
                    )
                )
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"the line is not a step of a training: {error}",
                where=f"{file}:{number}",
                remedy='one JSON object a line: {"step": 1, "loss": 2.5, "learning_rate": 1e-4}',
            ) from None
    if not steps:
        raise SourceError(
            "no line of the training log has a loss",
            where=str(file),
            remedy='one JSON object a line: {"step": 1, "loss": 2.5, "learning_rate": 1e-4}',
        )
    return steps


def check_training(steps: list[LoggedStep], where: str) -> list[Finding]:
    """Look for a loss that is not finite, or that has risen for good.

    Args:
        steps: in order.
        where: the file of the log.
    """
    lost = next((s for s in steps if not math.isfinite(s.loss)), None)
    if lost is not None:
        evidence = f"the loss is {lost.loss}{_rate_text(lost)}"
        return [finding("training-not-finite", f"{where}, step {lost.step}", evidence)]
    risen = _risen_for_good([s.loss for s in steps])
    if risen is None:
        return []
    place, best, last, noise = risen
    step = steps[place]
    evidence = (
        f"from here on the loss stays above its best: {best:.3g} before, {last:.3g} at the "
        f"end, with a noise of only {noise:.2g}{_rate_text(step)}"
    )
    return [finding("learning-rate-too-high", f"{where}, step {step.step}", evidence)]


def _risen_for_good(losses: list[float]) -> tuple[int, float, float, float] | None:
    """Where the loss starts to rise for good: (place, best, last, noise); None if it does not."""
    window = min(WINDOW, len(losses) // 2)
    if window < 3:
        return None
    medians = [statistics.median(losses[i : i + window]) for i in range(len(losses) - window + 1)]
    half = window // 2
    around = [medians[min(max(0, i - half), len(medians) - 1)] for i in range(len(losses))]
    noise = TO_SIGMA * statistics.median(
        abs(loss - middle) for loss, middle in zip(losses, around, strict=True)
    )
    place = min(range(len(medians)), key=lambda i: medians[i])
    best, last = medians[place], medians[-1]
    noise = max(noise, LEAST_NOISE * abs(best))
    limit = best + DEVIATIONS * noise
    if last <= limit:
        return None
    begin = len(medians) - 1
    while begin > place and medians[begin - 1] > limit:
        begin -= 1
    return begin + half, best, last, noise


def _rate_text(step: LoggedStep) -> str:
    """The learning rate of a step, if it is known."""
    return "" if step.learning_rate is None else f"; the learning rate is {step.learning_rate:g}"
