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
from typing import Any

from secateur.runtime.registration import register_with_transformers

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
    "draft",
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

TABLE = "secateur.recipes."

HOMES = {
    "ProgressBar": "secateur.progress",
    "SecateurCallback": "secateur.training.callback",
    "SecateurError": "secateur.errors",
    "allocations": "secateur.sparsity.allocation",
    "compose": "secateur.sparsity.methods",
    "kernel_info": "secateur.runtime.kernels.library",
    "load": "secateur.runtime.load",
    "load_semi_structured": "secateur.runtime.semi_structured",
    "merge": "secateur.training.lora",
    "refinements": "secateur.sparsity.refinements",
    "scores": "secateur.sparsity.scores",
    "solvers": "secateur.sparsity.solvers",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home. Functions of verbs come from the table of verbs."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    if name in HOMES:
        found = getattr(importlib.import_module(HOMES[name]), name)
    elif (verb := name.removesuffix("_model")) in importlib.import_module(f"{TABLE}verbs").VERBS:
        found = importlib.import_module(f"{TABLE}keywords").public_function(verb)
    else:
        raise AttributeError(f"secateur.{name} needs a package that is missing")
    if isinstance(found, FunctionType):
        found = importlib.import_module(f"{TABLE}keywords").naming_keywords(found)
    return found


def __dir__() -> list[str]:
    """The public names."""
    return __all__


register_with_transformers()
