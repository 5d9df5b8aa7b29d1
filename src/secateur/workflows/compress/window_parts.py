"""Cuts calibration windows once, and keeps a part of them for each purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.calibration.windows import save_windows
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import RecipeError
from secateur.progress import Progress
from secateur.recipes.calibration import CalibrationWindows
from secateur.workflows.prune.prepare import calibration_windows


def save_parts(
    text: str,
    options: CalibrationWindows,
    target: CheckpointTarget,
    files: Sequence[Path],
    share: int,
    purposes: str,
    progress: Progress,
    *,
    trust_remote_code: bool,
) -> None:
    """Save the windows of a text in several files, unless the last one is there.

    Args:
        text: the text, or a file of ready windows.
        options: how the text is cut.
        target: the model.
        files: of the parts. The first gets most windows, each other one in so many, at least one.
        share: so many.
        purposes: what the parts are for, for the error.
        progress: receives the step.
        trust_remote_code: whether code from the folder of the model may run.

    Raises:
        RecipeError: there are fewer windows than parts.
    """
    if files[-1].exists():
        return
    progress.start("reading calibration text", 1)
    windows, record = calibration_windows(
        text, options, target.reader.folder, target, trust_remote_code=trust_remote_code
    )
    progress.finish()
    count = len(windows)
    if count < len(files):
        found = "one calibration window" if count == 1 else f"{count} windows"
        raise RecipeError(
            f"{found} cannot {purposes}",
            remedy=f"use --windows {len(files)} or more, better 64",
        )
    others = [max(1, count // share)] * (len(files) - 1)
    parts = windows.split([count - sum(others), *others])
    for part, file in zip(parts, files, strict=True):
        save_windows(part, file, start=record.get("start_tokens", ()))
