"""A fault between any two file operations of every verb; then the same call again.

    export PYTHONPATH=tests/support
    python tests/runs/everywhere.py [--points few|all] [--json FILE] [CASE …]

Prints what became of the points, and those at which something was lost. A kill and a full disk are
tried before every operation and in the middle of every file that is written, without and with an
old output to replace (`overwrite`). The same call again, with `resume=True` where the verb has it,
must give the bytes of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from cases import CASES, Case, make_sources
from contents import contents, every_byte
from faults import (
    SHIM,
    Ended,
    Operation,
    Point,
    Shim,
    Steps,
    build_shim,
    environment,
    points_of,
    why_not,
)
from fixed_times import use_fixed_times

import secateur
from secateur.progress import Silent
from secateur.sparsity.allocation.search import Search
from secateur.training import distillation

FEW = {(False, False): 4, (False, True): 3, (True, False): 2, (True, True): 1}
"""How many points of a case the tests try: by whether the disk is full, and whether an old output
is replaced."""


IDENTICAL, REFUSED, LOST, DIFFERENT = "identical", "refused", "lost", "different"


@dataclass(frozen=True)
class Trial:
    """One point, and what became of it.

    Attributes:
        case: which.
        replacing: whether an old output was there.
        point: in words.
        full: whether the disk was full, not the process killed.
        verdict: `identical`: the same call again gave the bytes of an uninterrupted run, or they
            were there already. `refused`: it did not, but nothing had been done that could be
            lost. `lost`: it did not, and the work of the stopped run cannot be gone on with; or it
            ended in an error that is none of ours. `different`: it ended well, with other bytes.
        reached: whether the fault was injected.
        gone: neither the old output nor the whole new one is anywhere.
        crashed: a full disk ended the first call in an error that is none of ours.
        left_over: what lies beside the output at the end and does not after an uninterrupted run.
        messages: errors.
    """

    case: str
    replacing: bool
    point: str
    full: bool
    verdict: str
    reached: bool
    gone: bool = False
    crashed: bool = False
    left_over: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What lies there after a fault.

    Attributes:
        finished: the whole new output has its name.
        half: something else has it, and there was no old output.
        gone: neither the old output nor the new one is anywhere.
    """

    finished: bool
    half: bool
    gone: bool


@dataclass
class Bench:
    """A case at work in a folder of its own.

    Attributes:
        shim: which injects.
        name: of the case.
        sources: folder of the models and texts.
        here: the watched folder; the output is made in it.
        replacing: whether an old output is there.
        reference: what an uninterrupted run makes.
        neighbours: what lies beside it then.
    """

    shim: Shim
    name: str
    sources: Path
    here: Path
    replacing: bool
    reference: dict[str, str] = field(default_factory=dict)
    neighbours: set[str] = field(default_factory=set)

    @property
    def case(self) -> Case:
        """The case."""
        return CASES[self.name]

    @property
    def output(self) -> Path:
        """The folder or file that is made."""
        return self.here / self.case.output

    @property
    def old(self) -> Path:
        """The output that is replaced."""
        return self.sources / self.case.old

    def clear(self) -> None:
        """As before the first call."""
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)
        if self.replacing:
            copy: Callable[..., object] = shutil.copytree if self.old.is_dir() else shutil.copyfile
            copy(self.old, self.output)

    def call(self, point: Point | None, **options: bool) -> Ended:
        """Call the verb in a fork."""

        def work(steps: Steps) -> None:
            if self.case.saves:
                assert hasattr(distillation, "SAVE_MINUTES")
                distillation.SAVE_MINUTES = 0.0
            self.case.call(self.sources, self.output, steps, **options)

        return self.shim.attempt(work, self.here, point)

    def measure(self) -> list[Operation]:
        """An uninterrupted run: its operations, and what it makes."""
        self.clear()
        ended = self.call(None, **self.case.anew(self.replacing))
        if ended.how != "done":
            raise SystemExit(f"{self.name}: {ended.message}\n{self.shim.log.read_text()}")
        self.reference = contents(self.output)
        self.neighbours = {x.name for x in self.here.iterdir()}
        return list(ended.operations)

    def is_new(self, folder: Path) -> bool:
        """Whether a folder is what an uninterrupted run makes."""
        return folder.exists() and contents(folder) == self.reference

    def is_old(self, folder: Path) -> bool:
        """Whether a folder is the output that was there before."""
        return folder.exists() and every_byte(folder) == every_byte(self.old)

    def differing(self) -> str:
        """The files of the output that are not those of an uninterrupted run."""
        made = contents(self.output) if self.output.exists() else {}
        names = {*made, *self.reference}
        return ", ".join(sorted(x for x in names if made.get(x) != self.reference.get(x)))

    def look(self) -> Found:
        """What a fault has left."""
        away = self.replacing and not (self.is_new(self.output) or self.is_old(self.output))
        gone = away and not any(self.is_new(x) or self.is_old(x) for x in self.here.iterdir())
        finished = self.is_new(self.output)
        named = self.output.exists() and not self.replacing
        return Found(finished, named and not finished, gone)

    def attempt(self, point: Point) -> Trial:
        """A fault at a point, and the same call again."""
        self.clear()
        anew, retry = self.case.anew(self.replacing), self.case.retry(self.replacing)
        first = self.call(point, **anew)
        found = self.look()
        messages = [first.message] if first.how != "killed" else []
        again = self.call(None, **retry)
        verdict = IDENTICAL if self.is_new(self.output) and not found.half else DIFFERENT
        if found.half:
            messages.append("a half-written folder had the name of the output")
        elif again.how != "done" and not found.finished:
            messages.append(again.message)
            verdict = LOST if first.steps or again.how != "refused" else REFUSED
            if self.call(None, **anew).how != "done":
                messages.append("a call that does not resume fails too")
        elif first.how == "done" and not found.finished:
            verdict = DIFFERENT
        if verdict == DIFFERENT:
            messages.append(f"differs: {self.differing()}")
        neighbours = {x.name for x in self.here.iterdir()} - self.neighbours
        left_over = tuple(sorted(neighbours)) if again.how == "done" else ()
        return Trial(
            self.name,
            self.replacing,
            str(point),
            point.full,
            verdict,
            len(first.operations) > point.operation.number,
            found.gone,
            first.how in ("crashed", "hung"),
            left_over,
            tuple(messages),
        )


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """So many of the points: those about the rename to the output, and others evenly spread."""
    last = [i for i, p in enumerate(points) if p.operation.kind == "rename" and is_output(p)][-1:]
    kept = {i for rename in last for i in (rename - 1, rename, rename + 1) if i < len(points)}
    others = [i for i in range(len(points)) if i not in kept]
    wanted = min(len(others), max(0, count - len(kept)))
    if wanted == 1:
        kept.add(others[len(others) // 2])
    else:
        kept |= {others[i * (len(others) - 1) // max(1, wanted - 1)] for i in range(wanted)}
    return [points[i] for i in sorted(kept)]


def is_output(point: Point) -> bool:
    """Whether an operation is about the folder that a verb makes, and not about what is in it."""
    return "/" not in point.operation.path


def trials(shim: Shim, place: Path, names: Sequence[str], *, few: bool) -> Iterator[Trial]:
    """Try every case, without and with an output to replace.

    Args:
        shim: which injects.
        place: a folder to work in, with the sources.
        names: of the cases.
        few: only so many points of each case as `FEW` says.
    """
    for name in names:
        for replacing in (False, True):
            bench = Bench(shim, name, place / "sources", place / "here", replacing)
            operations = bench.measure()
            for full in (False, True):
                there = points_of(operations, full=full)
                if few:
                    there = spread(there, FEW[full, replacing] * CASES[name].weight)
                for point in there:
                    yield bench.attempt(point)


def warm_up() -> None:
    """Import whatever forks will need, so that none of them has to, and make slow choices small.

    Threads are limited by the environment only: after `torch.set_num_threads` a fork that has not
    made its own pool yet fails now and then.
    """
    for module in pkgutil.walk_packages(secateur.__path__, "secateur."):
        last = module.name.rpartition(".")[2]
        if last not in ("__main__", "_native") and ".plugins." not in module.name:
            importlib.import_module(module.name)
    for name in ("transformers.models.llama.modeling_llama", "tokenizers", "matplotlib.pyplot"):
        importlib.import_module(name)
    small = Search(generations=2, offspring=2, stages=((2, 40), (1, 80)))
    Search.__init__.__defaults__ = tuple(getattr(small, x.name) for x in fields(Search))
    use_fixed_times()


def main() -> None:
    """Try every point and print what became of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--points", choices=["few", "all"], default="all", help="how many points are tried"
    )
    parser.add_argument("--json", type=Path, help="file that gets a line for every point")
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if why_not():
        parser.exit(1, f"{why_not()}\n")
    with tempfile.TemporaryDirectory(prefix="secateur-faults-") as scratch:
        place = Path(scratch).resolve()
        if SHIM not in os.environ:
            again = [sys.executable, *sys.argv]
            sys.exit(subprocess.run(again, env=environment(build_shim(place))).returncode)
        warm_up()
        shim = Shim(place)
        made = shim.attempt(lambda _: make_sources(place / "sources"), place / "nothing")
        if made.how != "done":
            parser.exit(1, shim.log.read_text())
        # once here, so that forks find its registries and tables filled
        CASES["prune"].call(place / "sources", place / "warm" / "out", Silent())
        gc.collect()
        gc.freeze()  # or the first collection in a fork copies every page that holds an object
        found = []
        for trial in trials(shim, place, args.cases or [*CASES], few=args.points == "few"):
            found.append(trial)
            if args.json:
                with args.json.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(trial)) + "\n")
    for key, count in Counter((x.case, x.full, x.verdict) for x in found).items():
        print(count, *key)
    for trial in found:
        if trial.verdict != IDENTICAL or trial.gone or trial.crashed or trial.left_over:
            print(trial)


if __name__ == "__main__":
    main()
