"""Secateur: the open toolkit for pruning large language models.

    import secateur

    report = secateur.prune("smollm2-135m", method="wanda", sparsity=0.5, output="pruned",
                            calibration="boolq-calibration", windows=64, sequence_length=512)
    evaluation = secateur.evaluate("pruned", text="boolq-held-out")
    print(report.sparsity, evaluation.perplexity)

Names are imported when they are first used, so that `import secateur` costs nothing.
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

from secateur.runtime.registration import register_with_transformers

if TYPE_CHECKING:
    from secateur.errors import SecateurError
    from secateur.progress import ProgressBar
    from secateur.runtime.kernels.library import kernel_info
    from secateur.runtime.load import load
    from secateur.runtime.semi_structured.load import load_semi_structured
    from secateur.sparsity.allocation import allocations
    from secateur.sparsity.methods import compose
    from secateur.sparsity.refinements import refinements
    from secateur.sparsity.scores import scores
    from secateur.sparsity.solvers import solvers
    from secateur.training.lora import merge
    from secateur.workflows.advise import advise
    from secateur.workflows.chain import chain
    from secateur.workflows.compress.pack import compress
    from secateur.workflows.compress.unpack import decompress
    from secateur.workflows.export import export
    from secateur.workflows.fit.run import fit
    from secateur.workflows.import_model import import_model
    from secateur.workflows.judge.bench import bench
    from secateur.workflows.judge.diagnose import diagnose
    from secateur.workflows.judge.evaluate import evaluate
    from secateur.workflows.judge.generate import generate
    from secateur.workflows.judge.inspect import inspect
    from secateur.workflows.prune.composition import methods
    from secateur.workflows.prune_and_pack import prune
    from secateur.workflows.push import push
    from secateur.workflows.report import report
    from secateur.workflows.structure.run import structure
    from secateur.workflows.sweep.run import sweep
    from secateur.workflows.train.callback import SecateurCallback
    from secateur.workflows.train.checkpoint import train

__version__ = "0.1.0"

__all__ = [
    "ProgressBar",
    "SecateurCallback",
    "SecateurError",
    "__version__",
    "advise",
    "allocations",
    "bench",
    "chain",
    "compose",
    "compress",
    "decompress",
    "diagnose",
    "evaluate",
    "export",
    "fit",
    "generate",
    "import_model",
    "inspect",
    "kernel_info",
    "load",
    "load_semi_structured",
    "merge",
    "methods",
    "prune",
    "push",
    "refinements",
    "report",
    "scores",
    "solvers",
    "structure",
    "sweep",
    "train",
]

HOMES = {
    "ProgressBar": "secateur.progress",
    "SecateurCallback": "secateur.workflows.train.callback",
    "SecateurError": "secateur.errors",
    "advise": "secateur.workflows.advise",
    "allocations": "secateur.sparsity.allocation",
    "bench": "secateur.workflows.judge.bench",
    "chain": "secateur.workflows.chain",
    "compose": "secateur.sparsity.methods",
    "compress": "secateur.workflows.compress.pack",
    "decompress": "secateur.workflows.compress.unpack",
    "diagnose": "secateur.workflows.judge.diagnose",
    "evaluate": "secateur.workflows.judge.evaluate",
    "export": "secateur.workflows.export",
    "fit": "secateur.workflows.fit.run",
    "generate": "secateur.workflows.judge.generate",
    "import_model": "secateur.workflows.import_model",
    "inspect": "secateur.workflows.judge.inspect",
    "kernel_info": "secateur.runtime.kernels.library",
    "load": "secateur.runtime.load",
    "load_semi_structured": "secateur.runtime.semi_structured.load",
    "merge": "secateur.training.lora",
    "methods": "secateur.workflows.prune.composition",
    "prune": "secateur.workflows.prune_and_pack",
    "push": "secateur.workflows.push",
    "refinements": "secateur.sparsity.refinements",
    "report": "secateur.workflows.report",
    "scores": "secateur.sparsity.scores",
    "solvers": "secateur.sparsity.solvers",
    "structure": "secateur.workflows.structure.run",
    "sweep": "secateur.workflows.sweep.run",
    "train": "secateur.workflows.train.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    import importlib

    if name not in HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    found = getattr(importlib.import_module(HOMES[name]), name)
    if isinstance(found, FunctionType):
        found = importlib.import_module("secateur.recipes.keywords").naming_keywords(found)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return __all__


register_with_transformers()
