"""What all parts of a fit share: the dense model, its calibration windows, the time that is left.

The survey, the first model and the judgement are always made. Between them, what does not fit into
the time any more is dropped: further candidates, cuts, healing. A phase is expected to take as long
as the same one took; the times are kept in a file, so a resumed run knows them too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from secateur.engine.stream.targets import CheckpointTarget
from secateur.evaluation.perplexity import LossComparison
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Progress
from secateur.recipes.compress import FitRecipe
from secateur.runs.environment import choose_device
from secateur.runs.output import write_json
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.compress import split_text
from secateur.steps.fitting.costs import Costs


class TimeBudget:
    """Measures phases, and says whether there is time for another.

    Args:
        minutes: for the whole fit; None for no limit.
        file: of the times of phases.
        begun: when the fit began, by the clock.
        clock: returns seconds.

    Attributes:
        dropped: what was left out for lack of time, for people.
    """

    def __init__(
        self,
        minutes: float | None,
        file: Path,
        begun: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.end = math.inf if minutes is None else begun + minutes * 60.0
        self.file, self.clock = file, clock
        self.took: dict[str, float] = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        )
        self.dropped: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase; of several with one name, the longest counts."""
        began = self.clock()
        yield
        taken = self.clock() - began
        if taken > self.took.get(name, 0.0):
            self.took[name] = taken
            write_json(self.file, self.took)

    def expected(self, *names: str) -> float:
        """Seconds of phases together; one that was never measured takes none."""
        return sum(self.took.get(name, 0.0) for name in names)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - self.clock()

    def allows(self, what: str, seconds: float) -> bool:
        """Whether there is time for something; if not, note that it is dropped."""
        if seconds <= self.left:
            return True
        if what not in self.dropped:
            self.dropped.append(what)
        return False


@dataclass(frozen=True)
class FitContext:
    """What a fit works on.

    Attributes:
        recipe: the recipe.
        source: the dense model.
        target: its layers, one at a time.
        model: the same, and its matrices that can be packed.
        costs: what the model pays with, and how much of it.
        time: the time that is left.
        work: folder for models, windows and measured values.
        calibration_file: file of the windows that make models, and of those that heal them.
        choosing: measures packed folders on the windows that choose.
        judging: measures them on windows that judge the result.
        progress: receives every step.
    """

    recipe: FitRecipe
    source: LocalCheckpoint
    target: CheckpointTarget
    model: PackableCheckpoint
    costs: Costs
    time: TimeBudget
    work: Path
    calibration_file: Path
    choosing: LossComparison
    judging: LossComparison
    progress: Progress

    @property
    def has_experts(self) -> bool:
        """Whether some linears are experts."""
        return any(map(self.target.architecture.of_expert, self.model.linears))

    @classmethod
    def prepare(
        cls,
        recipe: FitRecipe,
        source: LocalCheckpoint,
        model: PackableCheckpoint,
        costs: Costs,
        time: TimeBudget,
        work: Path,
        progress: Progress,
    ) -> FitContext:
        """Cut the calibration text into windows, unless an earlier run has.

        Raises:
            RecipeError: there are fewer windows than purposes.
        """
        device, trust = choose_device(recipe.device), recipe.trust_remote_code
        target = CheckpointTarget(model.reader, None, device, trust_remote_code=trust)
        purposes = "make models, choose among them and judge"
        text = split_text(recipe, target, work, purposes, progress, recipe.tokens_to_heal)
        return cls(recipe, source, target, model, costs, time, work, *text, progress)
