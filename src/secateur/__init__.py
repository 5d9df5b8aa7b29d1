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
    from secateur.steps.bench import bench
    from secateur.steps.chain import chain
    from secateur.steps.compress import compress
    from secateur.steps.diagnose import diagnose
    from secateur.steps.evaluate import evaluate
    from secateur.steps.export import export
    from secateur.steps.fit import fit
    from secateur.steps.generate import generate
    from secateur.steps.import_model import import_model
    from secateur.steps.inspect import inspect
    from secateur.steps.methods import methods
    from secateur.steps.prune import prune
    from secateur.steps.structure.run import structure
    from secateur.steps.sweep import sweep
    from secateur.steps.train import train
    from secateur.steps.unpack import decompress
    from secateur.training.callback import SecateurCallback
    from secateur.training.lora import merge

    advise: Any  # the last three are apart from the core, which does not import them
    push: Any
    report: Any

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
    "SecateurCallback": "secateur.training.callback",
    "SecateurError": "secateur.errors",
    "advise": "secateur.advisor.advise",
    "allocations": "secateur.sparsity.allocation",
    "bench": "secateur.steps.bench",
    "chain": "secateur.steps.chain",
    "compose": "secateur.sparsity.methods",
    "compress": "secateur.steps.compress",
    "decompress": "secateur.steps.unpack",
    "diagnose": "secateur.steps.diagnose",
    "evaluate": "secateur.steps.evaluate",
    "export": "secateur.steps.export",
    "fit": "secateur.steps.fit",
    "generate": "secateur.steps.generate",
    "import_model": "secateur.steps.import_model",
    "inspect": "secateur.steps.inspect",
    "kernel_info": "secateur.runtime.kernels.library",
    "load": "secateur.runtime.load",
    "load_semi_structured": "secateur.runtime.semi_structured.load",
    "merge": "secateur.training.lora",
    "methods": "secateur.steps.methods",
    "prune": "secateur.steps.prune",
    "push": "secateur.publishing.push",
    "refinements": "secateur.sparsity.refinements",
    "report": "secateur.report_page.report",
    "scores": "secateur.sparsity.scores",
    "solvers": "secateur.sparsity.solvers",
    "structure": "secateur.steps.structure.run",
    "sweep": "secateur.steps.sweep",
    "train": "secateur.steps.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    import importlib

    if name not in HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(HOMES[name]), name)
    except ModuleNotFoundError as error:
        if not HOMES[name].startswith(f"{error.name}."):
            raise
        raise AttributeError(f"secateur.{name} needs {error.name}, which is missing") from error
    if isinstance(found, FunctionType):
        found = importlib.import_module("secateur.recipes.keywords").naming_keywords(found)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return __all__


register_with_transformers()
