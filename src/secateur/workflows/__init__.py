"""Workflows: the only place where the rooms are wired together.

The Python API and the command line call the same functions: `prune`, `plan`, `evaluate`, `judge`,
`compress`, `decompress`, `generate`, `bench`, `diagnose`, `sweep`,
`report`, `structure`, `retrain`, `distill`.
"""

from secateur.reporting.compression_report import CompressionReport, DecompressionReport
from secateur.reporting.prune_report import PruneReport
from secateur.reporting.training_report import TrainingReport
from secateur.workflows.benching import bench
from secateur.workflows.chaining import ChainReport, Link, chain
from secateur.workflows.compressing import compress
from secateur.workflows.decompressing import decompress
from secateur.workflows.diagnosing import diagnose
from secateur.workflows.evaluating import Evaluation, evaluate
from secateur.workflows.generating import Generation, generate
from secateur.workflows.inspecting import inspect_model
from secateur.workflows.judging import judge
from secateur.workflows.pruning import plan, plan_recipe, prune, run_recipe
from secateur.workflows.reporting import report
from secateur.workflows.retraining import distill, retrain, run_training
from secateur.workflows.structuring import StructureReport, structure, structure_recipe
from secateur.workflows.sweep_plan import SweepPlan
from secateur.workflows.sweeping import sweep

__all__ = [
    "ChainReport",
    "CompressionReport",
    "DecompressionReport",
    "Evaluation",
    "Generation",
    "Link",
    "PruneReport",
    "StructureReport",
    "SweepPlan",
    "TrainingReport",
    "bench",
    "chain",
    "compress",
    "decompress",
    "diagnose",
    "distill",
    "evaluate",
    "generate",
    "inspect_model",
    "judge",
    "plan",
    "plan_recipe",
    "prune",
    "report",
    "retrain",
    "run_recipe",
    "run_training",
    "structure",
    "structure_recipe",
    "sweep",
]
