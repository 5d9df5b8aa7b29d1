"""What became of the points at which a fault was injected, and tables of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
        away: neither is under its own name.
        crashed: a full disk ended the first call in an error that is none of ours.
        left_over: what lies beside the output at the end and does not after an uninterrupted run.
        steps_done: how often the stopped run reported progress.
        steps_repeated: how often the work was reported again.
        messages: errors.
    """

    case: str
    replacing: bool
    point: str
    full: bool
    verdict: str
    reached: bool
    gone: bool = False
    away: bool = False
    crashed: bool = False
    left_over: tuple[str, ...] = ()
    steps_done: int = 0
    steps_repeated: int = 0
    messages: tuple[str, ...] = ()

    @property
    def survived(self) -> bool:
        """Whether nothing was lost, nothing is wrong, and nothing lies about."""
        whole = self.verdict in (IDENTICAL, REFUSED)
        return whole and not (self.gone or self.left_over)


COLUMNS = {
    "points": lambda x: True,
    "bit-identical": lambda x: x.verdict == IDENTICAL,
    "refused, nothing lost": lambda x: x.verdict == REFUSED,
    "work lost": lambda x: x.verdict == LOST,
    "silently different": lambda x: x.verdict == DIFFERENT,
    "old output gone": lambda x: x.gone,
    "old output not in place": lambda x: x.away,
    "traceback": lambda x: x.crashed,
    "left over": lambda x: bool(x.left_over),
    "survived": lambda x: x.survived,
}


def table(found: Sequence[Trial]) -> str:
    """How many points of each verb had which fate, as Markdown."""
    kinds = sorted({(x.full, x.replacing) for x in found})
    lines = []
    for full, replacing in kinds:
        fault = "Full disk" if full else "Killed"
        lines += [
            "",
            f"{fault}, {'an old output is replaced' if replacing else 'a new output'}:",
            "",
        ]
        lines += [" | ".join(["| case", *COLUMNS, "steps repeated |"])]
        lines += ["|" + "---|" * (len(COLUMNS) + 2)]
        rows = [x for x in found if (x.full, x.replacing) == (full, replacing) and x.reached]
        for name in [*dict.fromkeys(x.case for x in rows), "all"]:
            mine = [x for x in rows if name in (x.case, "all")]
            counts = [str(sum(map(test, mine))) for test in COLUMNS.values()]
            done, again = (
                sum(x.steps_done for x in mine), sum(x.steps_repeated for x in mine)
            )  # fmt: skip
            share = f"{again / done:.0%}" if done else "–"
            lines.append(" | ".join([f"| {name}", *counts, f"{share} |"]))
    return "\n".join(lines).strip()


def faults_table(found: Sequence[Trial]) -> str:
    """The points that were not survived, the same ones of a case together."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for x in found:
        if x.survived and not x.crashed:
            continue
        kind = [x.verdict, *(n for n in ("gone", "crashed") if getattr(x, n))]
        kind += [f"left over: {', '.join(x.left_over)}"] if x.left_over else []
        key = f"{x.case}{', replacing' if x.replacing else ''}: {', '.join(kind)}"
        key += f": {'; '.join(t[:160] for t in x.messages if t)}"
        counts[key] += 1
        first.setdefault(key, x.point)
    return "\n".join(f"{n:4d} × {key}\n       first: {first[key]}" for key, n in counts.items())
