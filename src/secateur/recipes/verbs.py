"""The verbs: name, summary, recipe and function. Imports nothing slow, so that `--help` is instant.

The core has the verbs of `verbs.ini`. Packages of `APART` have one each, and nothing of the core
imports them: without the package there is no such verb. A verb of somebody else's package is an
entry point:

    [project.entry-points."secateur.verbs"]
    shear = "package:VERB"          # fields of `Verb`

Entry points are read only for a word that is no verb here, because that takes as long as `--help`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from configparser import ConfigParser
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import RecipeError
from secateur.parallel.launched import Launched
from secateur.progress import Progress, Silent

if TYPE_CHECKING:
    from secateur.parallel.ranks import Ranks

Showing = Callable[[], AbstractContextManager[Progress]]
"""Makes what shows the progress, in the process that shows it."""

STAGES = ("Make a smaller model", "Run a model", "Measure a model", "Publish a model")
"""The headings of `secateur --help`."""

APART = ("secateur.serving", "secateur.advisor", "secateur.report_page", "secateur.publishing")
"""Packages that may be missing. Each has the fields of its verb in `VERB`."""

FLAGS = {"streams", "only_command"}
"""Fields that are true where `verbs.ini` names them."""


@dataclass(frozen=True)
class Verb:
    """One verb of the command line, and its function in Python.

    Attributes:
        name: the name on the command line.
        stage: the heading that lists it.
        summary: one sentence for the list of verbs.
        recipe: the place of its recipe class, `package.module:name`.
        step: the place of its step: a class for the runner, or a function that takes the recipe,
            a progress and the options of the call; with `ranks`, several processes share its work.
            Its docstring is that of the Python function.
        plan: the place of the function for a dry run, which takes the same.
        function: the place of the Python function, if `step` alone does not make it.
        more: further sentences for the help of the verb.
        streams: whether it prints by itself; its step then takes `as_json` instead of a progress.
        only_command: whether there is no Python function.
        after: the verb of the core that `secateur --help` lists before it.
    """

    name: str
    stage: str
    summary: str
    recipe: str
    step: str
    plan: str = ""
    function: str = ""
    more: str = ""
    streams: bool = False
    only_command: bool = False
    after: str = ""

    @property
    def python(self) -> str:
        """The name of the function: that of the verb, unless Python has that word itself."""
        return f"{self.name}_model" if iskeyword(self.name) else self.name

    @property
    def in_python(self) -> bool:
        """Whether there is a Python function."""
        return bool(self.function) or not (self.streams or self.only_command)

    def run(
        self, recipe: Any, call: Mapping[str, Any], showing: Showing, *, command: bool = False
    ) -> Any:
        """Carry out a recipe, or plan it only.

        The first process does everything that one process does: it checks the recipe, opens the
        folder, and writes the result. The others do the `share` of the step, or the same function.
        They wait until the first one sends them something, so whatever it refuses is refused before
        any work. An error of one process ends all.

        Args:
            recipe: its recipe; all processes have the same.
            call: the options of the call.
            showing: makes what shows the progress, in the first process.
            command: whether it is a command, which the launched processes share. A function in
                Python works alone, unless all of them call it.

        Returns:
            The result. A command has none in a process that is not the first.

        Raises:
            SecateurError: what, where, and what to do.
        """
        options = dict(call)
        step, dry_run = imported(self.step), options.pop("dry_run", False)
        launched = self._launched(step, recipe, dry_run) if command else Launched()
        if command:  # so a GPU that has served small blocks still has room for a large one
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        if self.streams:  # it prints while it works, so there is no progress to show
            with _on_device_of(recipe):
                return step(recipe, **options)
        if dry_run:
            with showing() as progress:
                return imported(self.plan)(recipe, progress, options)
        work, share = step, _share_of(step)
        ranks: Ranks | None = None
        if hasattr(step, "caller"):  # a class for the runner
            work = partial(imported("secateur.steps.runner:carry_out"), step)
            ranks = None if command else step.caller(recipe)
        if launched.count > 1:
            ranks = imported("secateur.parallel.processes:joined")(recipe.device)
        with _on_device_of(recipe), ranks or nullcontext():
            if ranks and not ranks.first:
                made = share and share(recipe, ranks)
                return None if command else made
            with showing() as progress:
                return work(recipe, progress, **options, **({"ranks": ranks} if ranks else {}))

    def _launched(self, step: Any, recipe: Any, dry_run: bool) -> Launched:
        """The processes that were launched for a command.

        Raises:
            RecipeError: there are several, and the verb works in one, or an option of the recipe.
        """
        if "WORLD_SIZE" not in os.environ:
            return Launched()
        launched = Launched.read(os.environ)
        if launched.count > 1:
            # torch would print the stack of every connection that closes
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            option = step.alone(recipe) if hasattr(step, "alone") else ""
            option = "--dry-run" if dry_run else option
            if option or _share_of(step) is None:
                words = f"secateur {self.name} {option}".rstrip()
                raise RecipeError(
                    f"`{words}` works in one process only, and there are {launched.count}",
                    remedy="start it without torchrun"
                    + ", or leave this option to a second run" * (option not in ("", "--dry-run")),
                )
        return launched


def _on_device_of(recipe: Any) -> AbstractContextManager[Any]:
    """A context in which the GPU that a recipe names by its number is the current one.

    Kernels are launched there, its peak is measured, and "cuda" without a number means it.
    """
    device = getattr(recipe, "device", "cpu")
    if not device.startswith("cuda:"):
        return nullcontext()
    found: AbstractContextManager[Any] = imported("secateur.runs.environment:current")(device)
    return found


def _share_of(step: Any) -> Callable[[Any, Ranks], Any] | None:
    """What a process does that is not the first; None if a step works in one process."""
    if isinstance(step, type):
        share: Callable[[Any, Ranks], Any] | None = getattr(step, "share", None)
        return share
    if "ranks" not in signature(step).parameters:
        return None
    return lambda recipe, ranks: step(recipe, Silent(), ranks=ranks)


def imported(place: str) -> Any:
    """Import and return the object at `package.module:name`.

    Raises:
        RecipeError: it is in a package of `APART` that is missing.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in APART:
            raise
        raise RecipeError(
            f"this needs {error.name}, which is not installed",
            remedy="install the whole package: pip install secateur-llm",
        ) from error


def _listed() -> list[Verb]:
    """The verbs of the core and of the packages that are there, in the order of `--help`."""
    table = ConfigParser(interpolation=None)
    table.read(Path(__file__).with_name("verbs.ini"), "utf-8")
    found = []
    for name in table.sections():
        fields: Any = {key: " ".join(text.split()) for key, text in table[name].items()}
        found.append(Verb(name, **fields | dict.fromkeys(FLAGS & fields.keys(), True)))
    for package in APART:
        try:
            verb = Verb(**importlib.import_module(package).VERB)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
        else:
            found.insert(1 + [each.name for each in found].index(verb.after), verb)
    return found


VERBS = {verb.name: verb for verb in _listed()}
"""All verbs, in the order of `secateur --help`."""


def look_for(name: str) -> None:
    """Add a verb of an installed package to the verbs, if there is one of this name."""
    from importlib.metadata import entry_points

    for plug_in in entry_points(group="secateur.verbs", name=name):
        VERBS[name] = Verb(**plug_in.load())
