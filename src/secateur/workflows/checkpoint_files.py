"""What a converted checkpoint takes over from its source besides the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.models.checkpoint import INDEX_NAMES, copied_files, note_links
from secateur.runs.evaluation import FILE_NAME as EVALUATION
from secateur.runs.evaluation import read_evaluation
from secateur.runs.folder import NOTES
from secateur.runs.output import cannot_write

__all__ = ["carry_over"]

MEASURED = (EVALUATION, "diagnosis.json", "bench.json", "compression.json")
"""Notes of what was measured of weights and files; all others say how they were made."""


def carry_over(
    source: Path, target: Path, config: Mapping[str, Any], *, same_weights: bool
) -> None:
    """Copy tokenizer, licence and the records of the pruning run; write the configuration.

    What was measured of the source is left behind. Only its evaluation comes along where the
    weights are the same, every result marked with the model that it was measured on. A diagnosis
    and a bench are also about the files, so they have to be made again.

    Args:
        source: a checkpoint.
        target: the folder of the new one.
        config: its configuration.
        same_weights: whether the new one has the weights of the source, number for number.

    Raises:
        MemoryBudgetError: the disk is full.
        CheckpointError: the evaluation of the source cannot be read.
    """
    notes = source / NOTES
    inherited = None
    if same_weights and (notes / EVALUATION).is_file():
        inherited = read_evaluation(notes / EVALUATION).inherited()
    try:
        note_links(copied_files(source))
        for file in copied_files(source):
            if file.name not in ("config.json", *INDEX_NAMES):
                shutil.copyfile(file, target / file.name)
        if notes.is_dir() and any(file.name not in MEASURED for file in notes.iterdir()):
            shutil.copytree(
                notes,
                target / NOTES,
                # notes of earlier steps lie deeper, and stay true of those
                ignore=lambda folder, _: MEASURED if Path(folder) == notes else (),
                dirs_exist_ok=True,
            )
        (target / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise cannot_write(error, target) from error
    if inherited is not None:
        (target / NOTES).mkdir(exist_ok=True)
        inherited.save(target / NOTES / EVALUATION)
