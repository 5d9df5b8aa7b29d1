"""The schemas of the files that a run writes with a model, for writers and readers alike.

    manifest.json        Manifest       prune, structure
    layers.jsonl         Layer          prune, a line for each decoder layer
    training.json        [Training]     train, an entry for each training
    chain.json           Chain          chain
    compression.json     Compression    compress
    diagnosis.json       DiagnosisRecord      diagnose
    bench.json           Bench          bench
    evaluation.json      EvaluationRecord     evaluate
    import.json          Import         import
    sweep.json           Sweep          sweep
    steps.json           [StepEntry]      structure, an entry for each step

A file is one object, which its writer makes and its readers get back. Keys that are not declared
are errors for a writer; `read_record` ignores them.
"""

from secateur.runs.records.base import AnyRecord, Record, parsed, read_list, read_record
from secateur.runs.records.run import (
    MANIFEST_VERSION,
    Chain,
    ChainStep,
    Compression,
    Cost,
    Counts,
    FormatTotals,
    Import,
    ImportedMatrix,
    Layer,
    LinearRecord,
    Manifest,
    RunResult,
    SkippedMatrix,
    Source,
    StepEntry,
    Structure,
    Training,
)

__all__ = [
    "MANIFEST_VERSION",
    "AnyRecord",
    "Chain",
    "ChainStep",
    "Compression",
    "Cost",
    "Counts",
    "FormatTotals",
    "Import",
    "ImportedMatrix",
    "Layer",
    "LinearRecord",
    "Manifest",
    "Record",
    "RunResult",
    "SkippedMatrix",
    "Source",
    "StepEntry",
    "Structure",
    "Training",
    "parsed",
    "read_list",
    "read_record",
]
