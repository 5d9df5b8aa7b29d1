"""A fault between any two file operations of every verb; then the same call again.

    PYTHONPATH=tests/support python tests/runs/everywhere.py [--points few|all] [--twice]
                                                     [--json FILE] [CASE …]

Prints, for every verb, how many points were tried and what was left. A kill and a full disk are
tried before every operation and in the middle of every file that is written; with an old output to
replace (`overwrite`), all points at the beginning and at the end and every fourth between. The same
call again, with `resume=True` where the verb has it, must give the bytes of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
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
from outcomes import DIFFERENT, IDENTICAL, LOST, REFUSED, Trial, faults_table, table

import secateur
from secateur.progress import Silent
from secateur.sparsity.allocation.search import Search
from secateur.steps.fitting import candidates
from secateur.training import distillation

OUTPUT = "out"


FEW = {(False, False): 4, (False, True): 3, (True, False): 2, (True, True): 1}
"""How many points of a case the tests try: by whether the disk is full, and whether an old output
is replaced."""


@dataclass(frozen=True)
class Found:
    """What lies there after a fault.

    Attributes:
        finished: the whole new output has its name.
        half: something else has it, and there was no old output.
        away: neither the old output nor the new one has its name.
        gone: neither is anywhere.
    """

    finished: bool
    half: bool
    away: bool
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
        steps: how often such a run reports progress.
        operations: of such a run.
    """

    shim: Shim
    name: str
    sources: Path
    here: Path
    replacing: bool
    reference: dict[str, str] = field(default_factory=dict)
    neighbours: set[str] = field(default_factory=set)
    steps: int = 0
    operations: int = 0

    @property
    def case(self) -> Case:
        """The case."""
        return CASES[self.name]

    @property
    def output(self) -> Path:
        """The folder that is made."""
        return self.here / OUTPUT

    def clear(self) -> None:
        """As before the first call."""
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)
        if self.replacing:
            shutil.copytree(self.sources / "old", self.output)

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
        self.reference, self.steps = contents(self.output), ended.steps
        self.operations = len(ended.operations)
        self.neighbours = {x.name for x in self.here.iterdir()}
        return list(ended.operations)

    def is_new(self, folder: Path) -> bool:
        """Whether a folder is what an uninterrupted run makes."""
        return folder.is_dir() and contents(folder) == self.reference

    def is_old(self, folder: Path) -> bool:
        """Whether a folder is the output that was there before."""
        return folder.is_dir() and every_byte(folder) == every_byte(self.sources / "old")

    def differing(self) -> str:
        """The files of the output that are not those of an uninterrupted run."""
        made = contents(self.output) if self.output.is_dir() else {}
        names = {*made, *self.reference}
        return ", ".join(sorted(x for x in names if made.get(x) != self.reference.get(x)))

    def look(self) -> Found:
        """What a fault has left."""
        away = self.replacing and not (self.is_new(self.output) or self.is_old(self.output))
        gone = away and not any(self.is_new(x) or self.is_old(x) for x in self.here.iterdir())
        finished = self.is_new(self.output)
        named = self.output.exists() and not self.replacing
        return Found(finished, named and not finished, away, gone)

    def attempt(self, point: Point, *, twice: bool = False) -> Trial:
        """A fault at a point, and the same call again; `twice`: killed once more before that."""
        self.clear()
        anew, retry = self.case.anew(self.replacing), self.case.retry(self.replacing)
        first = self.call(point, **anew)
        found = [self.look()]
        messages = [first.message] if first.how != "killed" else []
        if twice:
            left = max(1, self.operations - len(first.operations))
            drawn = random.Random(point.operation.number).randrange(left)
            second = self.call(Point(Operation(drawn, "any", 0, 0, ""), False, False), **retry)
            messages += [] if second.how in ("killed", "done") else [second.message]
            found.append(self.look())
        finished, half = found[-1].finished, any(x.half for x in found)
        again = self.call(None, **retry)
        verdict = IDENTICAL if self.is_new(self.output) and not half else DIFFERENT
        if half:
            messages.append("a half-written folder had the name of the output")
        elif again.how != "done" and not finished:
            messages.append(again.message)
            verdict = LOST if first.steps or again.how != "refused" else REFUSED
            if self.call(None, **anew).how != "done":
                messages.append("a call that does not resume fails too")
        elif first.how == "done" and not found[0].finished:
            verdict = DIFFERENT
        if verdict == DIFFERENT:
            messages.append(f"differs: {self.differing()}")
        neighbours = {x.name for x in self.here.iterdir()} - self.neighbours
        left_over = tuple(sorted(neighbours)) if again.how == "done" else ()
        repeated = max(0, first.steps + again.steps - self.steps) if not finished else 0
        return Trial(
            self.name,
            self.replacing,
            str(point),
            point.full,
            verdict,
            len(first.operations) > point.operation.number,
            any(x.gone for x in found),
            any(x.away for x in found),
            first.how in ("crashed", "hung"),
            left_over,
            first.steps,
            min(repeated, first.steps),
            tuple(messages),
        )


def chosen(points: Sequence[Point], operations: Sequence[Operation], stride: int) -> list[Point]:
    """The points of the first and the last stage of the work, and every so manyth between."""
    stages = [x.stage for x in operations]
    ends = {min(stages), max(stages)}
    between = [p for p in points if p.operation.stage not in ends]
    kept = set(between[stride // 2 :: stride])
    return [p for p in points if p.operation.stage in ends or p in kept]


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


def trials(
    shim: Shim, place: Path, names: Sequence[str], *, few: bool, stride: int, twice: bool
) -> Iterator[Trial]:
    """Try every case, without and with an output to replace.

    Args:
        shim: which injects.
        place: a folder to work in, with the sources.
        names: of the cases.
        few: only so many points of each case as `FEW` says.
        stride: of all points between begin and end, every so manyth; a quarter of them where an
            output is replaced.
        twice: kill the call that follows on a fault, too.
    """
    for name in names:
        for replacing in (False, True):
            bench = Bench(shim, name, place / "sources", place / "here", replacing)
            operations = bench.measure()
            for full in (False, True):
                there = points_of(operations, full=full)
                if few:
                    there = spread(there, FEW[full, replacing] * CASES[name].weight)
                else:
                    there = chosen(there, operations, 4 * stride if replacing else stride)
                for point in there:
                    yield bench.attempt(point, twice=twice)


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
    candidates.WORTH = -1.0  # so that a fit of a random model tries a cut
    candidates.STRUCTURED_CANDIDATES = candidates.STRUCTURED_CANDIDATES[1:2]


def main() -> None:
    """Try every point and print what became of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--points", choices=["few", "all"], default="all", help="how many points are tried"
    )
    parser.add_argument("--read", type=Path, nargs="+", help="print the table of such files")
    parser.add_argument(
        "--stride", type=int, default=1, help="every so manyth point only between begin and end"
    )
    parser.add_argument("--twice", action="store_true", help="kill the call that follows, too")
    parser.add_argument("--json", type=Path, help="file that gets a line for every point")
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if args.read:
        lines = [x for file in args.read for x in file.read_text(encoding="utf-8").splitlines()]
        print_tables([Trial(**json.loads(x)) for x in lines])
        return
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
        for trial in trials(
            shim,
            place,
            args.cases or [*CASES],
            few=args.points == "few",
            stride=args.stride,
            twice=args.twice,
        ):
            found.append(trial)
            if args.json:
                with args.json.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(trial)) + "\n")
            if sys.stderr.isatty():
                print(f"\r{len(found)} {trial.case}", end=" " * 20, file=sys.stderr)
    print_tables(found)


def print_tables(found: Sequence[Trial]) -> None:
    """The counts, and what went wrong."""
    print(f"secateur {secateur.__version__}, torch {torch.__version__}\n")
    print(table(found))
    print("\nNot survived, or told by an error that is none of ours:\n")
    print(faults_table(found) or "none")


if __name__ == "__main__":
    main()
