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

Code that writes a file calls `declared`, which
refuses keys that are not declared here. Code that reads one calls `read_record`, which ignores the
keys of newer releases.
"""

from secateur.runs.records.base import AnyRecord, Record, declared, parsed, read_list, read_record
from secateur.runs.records.measured import (
    Bench,
    DiagnosisRecord,
    Finding,
    LayerState,
    Machine,
    MatrixState,
    PointKey,
    Severity,
    Support,
    Sweep,
    SweepDense,
    SweepPoint,
    TimingEntry,
)
from secateur.runs.records.run import (
    MANIFEST_VERSION,
    Chain,
    ChainStep,
    Compression,
    Cost,
    Counts,
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
    "Bench",
    "Chain",
    "ChainStep",
    "Compression",
    "Cost",
    "Counts",
    "DiagnosisRecord",
    "Finding",
    "Import",
    "ImportedMatrix",
    "Layer",
    "LayerState",
    "LinearRecord",
    "Machine",
    "Manifest",
    "MatrixState",
    "PointKey",
    "Record",
    "RunResult",
    "Severity",
    "SkippedMatrix",
    "Source",
    "StepEntry",
    "Structure",
    "Support",
    "Sweep",
    "SweepDense",
    "SweepPoint",
    "TimingEntry",
    "Training",
    "declared",
    "parsed",
    "read_list",
    "read_record",
]
