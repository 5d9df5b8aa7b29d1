"""The time that a fit may take: what phases took, and which further ones still fit.

Levels are always made, and the winner is always packed and judged. Between them, what does not fit
any more is dropped: first generations of the search, then cuts, further finalists, the frontier.
A phase is expected to take as long as the same or a like one took; the times are kept in a file, so
a resumed run knows them too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.runs.atomic import write_json

MINUTE = 60.0


class Pace:
    """Measures phases, and says whether there is time for another.

    Args:
        minutes: for the whole fit; None for no limit.
        file: of the times of phases.
        begun: when the fit began, by the clock.
        clock: returns seconds.

    Attributes:
        dropped: what was left out for lack of time, in words.
    """

    def __init__(
        self,
        minutes: float | None,
        file: Path,
        begun: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.end = math.inf if minutes is None else begun + minutes * MINUTE
        self.file, self.clock = file, clock
        self.took: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
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
