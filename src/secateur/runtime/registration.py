"""Lets `AutoModelForCausalLM.from_pretrained` read secateur's folders once it is imported.

transformers has no entry point for quantizers or models, and importing it takes a second that
`import secateur` must not cost. So a finder waits until a program imports transformers' tables.
Right after that it registers ours: the quantizer of compressed folders, and models whose layers
differ in size.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TABLES = {
    "transformers.quantizers.auto": "secateur.runtime.quantizer",
    "transformers.models.auto.configuration_auto": "secateur.models.varied",
}
"""Modules of transformers to wait for, and our modules that register something in them."""


class After(importlib.abc.Loader):
    """Loads a module with its own loader, and imports ours afterwards."""

    def __init__(self, loader: importlib.abc.Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with its own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then ours."""
        self.loader.exec_module(module)
        importlib.import_module(self.ours)


class Waiting(importlib.abc.MetaPathFinder):
    """Finds only the one module it waits for, and only once."""

    def __init__(self, table: str) -> None:
        self.table = table

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of the awaited module, with a loader that then imports ours."""
        if name != self.table:
            return None
        # first, or the search below would ask this finder again
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = After(spec.loader, TABLES[name])
        return spec


def register_with_transformers() -> None:
    """Register our classes now if transformers is loaded, otherwise when it is."""
    waiting = {finder.table for finder in sys.meta_path if isinstance(finder, Waiting)}
    for table, ours in TABLES.items():
        if table in sys.modules:
            importlib.import_module(ours)
        elif table not in waiting:
            sys.meta_path.insert(0, Waiting(table))
