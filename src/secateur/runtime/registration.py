"""Lets `AutoModelForCausalLM.from_pretrained` read compressed folders once secateur is imported.

transformers has no entry point for quantizers, and importing it takes a second that `import
secateur` shall not cost. So a finder waits until somebody imports transformers' table of
quantizers, and enters ours right after.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["register_with_transformers"]

TABLE = "transformers.quantizers.auto"


class After(importlib.abc.Loader):
    """Loads a module as its own loader would, and enters our quantizer afterwards."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then ours."""
        self.loader.exec_module(module)
        enter()


class Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing but the one module it waits for, and that only once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of the awaited module with a loader that goes on with ours."""
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = After(spec.loader)
        return spec


def enter() -> None:
    """Import the module that enters our quantizer."""
    importlib.import_module("secateur.runtime.quantizer")


def register_with_transformers() -> None:
    """Enter the quantizer now if transformers is loaded, else as soon as it is."""
    if TABLE in sys.modules:
        enter()
    elif not any(isinstance(finder, Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting())
