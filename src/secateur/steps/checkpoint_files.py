"""Copies everything except the weights from a source to a converted checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.models.checkpoint import INDEX_NAMES, copy_others
from secateur.runs.folder import NOTES, STATE
from secateur.runs.measured import FILE_NAME as EVALUATION
from secateur.runs.measured import read_evaluation
from secateur.runs.output import write_json, writing

COMPRESSION = "compression.json"
"""The record of a compression."""

STEPS = "steps.json"
"""The record of the steps of a cut."""

MEASURED = (EVALUATION, "diagnosis.json", "bench.json", COMPRESSION, STATE)
"""Notes that measure the weights and files, or name their run. All others record how they were
made."""


def carry_over(
    source: Path, target: Path, config: Mapping[str, Any], *, same_weights: bool
) -> None:
    """Copy tokenizer, licence and the records of the pruning run, and write the configuration.

    Measurements of the source are not copied. The only exception is its evaluation if the
    weights are the same; each result then names the model it was measured on. A diagnosis and a
    bench also measure the files, so they must be repeated.

    Args:
        source: a checkpoint.
        target: the folder of the new one.
        config: configuration of the new checkpoint.
        same_weights: whether the new checkpoint has exactly the weights of the source.

    Raises:
        MemoryBudgetError: the disk is full.
        CheckpointError: the evaluation of the source cannot be read.
    """
    notes = source / NOTES
    inherited = None
    if same_weights and (notes / EVALUATION).is_file():
        inherited = read_evaluation(notes / EVALUATION).inherited()
    with writing(target):
        copy_others(source, target, ("config.json", *INDEX_NAMES))
        if notes.is_dir() and any(file.name not in MEASURED for file in notes.iterdir()):
            shutil.copytree(
                notes,
                target / NOTES,
                # notes of earlier steps are in subfolders and stay valid for those steps
                ignore=lambda folder, _: MEASURED if Path(folder) == notes else (),
                dirs_exist_ok=True,
            )
        write_json(target / "config.json", config)
    if inherited is not None:
        (target / NOTES).mkdir(exist_ok=True)
        inherited.save(target / NOTES / EVALUATION)
