"""How much faster several processes solve a decoder layer with ALPS: counted, not measured.

    python -m benchmarks.speed.sharing

Operations of the busiest process, as the code divides the work: rows of a linear by `row_shares`,
the inverses of a gram one to each process in turn, and linears of experts by `owners`. A product
of [m, k] and [k, n] has 2 m k n operations; an inverse of n columns 2.3 n³ (Cholesky, then
`cholesky_inverse`). For comparison, `linears` gives each linear to one process, by `owners`. Masks,
sums between processes and files do not count, nor grams and forwards, which windows divide evenly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from benchmarks.hardware import keep
from benchmarks.stored import Rows

from secateur.parallel.ranks import owners
from secateur.recipes.prune import presets
from secateur.sparsity.shared_rows import row_shares
from secateur.sparsity.shifted_inverse import ShiftedInverse
from secateur.sparsity.solvers.alps import ALPS

MEASURES = ("src/secateur/sparsity/shared_rows.py", "src/secateur/parallel/ranks.py")
MINUTES = 1
COUNTS = (1, 2, 4, 8)


class Group(NamedTuple):
    """Linears [out, in] that share an input of `columns`; so many such groups arrive together."""

    columns: int
    rows: tuple[int, ...]
    experts: int = 1


MODELS = {
    "Llama 3 8B": [
        Group(4096, (4096, 1024, 1024)), Group(4096, (4096,)), Group(4096, (14336, 14336)),
        Group(14336, (4096,)),
    ],
    "Llama 3 70B": [
        Group(8192, (8192, 1024, 1024)), Group(8192, (8192,)), Group(8192, (28672, 28672)),
        Group(28672, (8192,)),
    ],
    "Qwen3 30B-A3B": [
        Group(2048, (4096, 512, 512)), Group(4096, (2048,)), Group(2048, (768, 768), 128),
        Group(768, (2048,), 128),
    ],
}  # fmt: skip


def work_of(own: ALPS, group: Group) -> tuple[list[float], list[float], float]:
    """Operations for each inverse of a gram, for each linear, and for the targets of all.

    ADMM takes all its iterations. Asymmetric fitting solves for the targets in every process.
    """
    low, high = own.rho, own._rho(own.iterations)
    shifts = len(ShiftedInverse(torch.empty(0, group.columns), low, high).shifts)
    cube, square = group.columns**3, group.columns**2
    # B₀A twice, one in each iteration, the refit's residual and steps, two energies of half a one
    products = 2 + own.iterations + 1 + -(-own.refit_steps // 2) + 1
    # outputs are fitted for one linear, inputs for several
    targets = cube / 3 + 2 * square * (group.rows[0] if len(group.rows) == 1 else group.columns)
    return [2.3 * cube] * shifts, [2 * products * rows * square for rows in group.rows], targets


def busiest(own: ALPS, group: Group, count: int, *, by_rows: bool) -> float:
    """Operations of the process that has most of them, for groups that arrive together."""
    inverses, solves, targets = work_of(own, group)
    if by_rows and group.experts == 1:
        shares = [row_shares(rows, count)[0].stop / rows for rows in group.rows]  # none is larger
        turns = sum(inverses[::count])  # one to each process in turn
        return targets + turns + sum(x * y for x, y in zip(shares, solves, strict=True))
    owned, most = owners(solves * group.experts, count), 0.0
    for rank in range(count):
        mine = [place for place, owner in enumerate(owned) if owner == rank]
        grams = len({place // len(solves) for place in mine})
        most = max(
            most, grams * (sum(inverses) + targets) + sum(solves[i % len(solves)] for i in mine)
        )
    return most


def main() -> None:
    """Count, and keep the table."""
    own, rows = ALPS(**presets["balanced"]["method_parameters"]), []
    for model, groups in MODELS.items():
        for divided in ("linears", "rows"):
            found = [
                sum(busiest(own, group, count, by_rows=divided == "rows") for group in groups)
                for count in COUNTS
            ]
            rows.append(
                {"model": model, "divided": divided, "times": [found[0] / x for x in found]}
            )
            print(rows[-1])
    keep("sharing", {"counted": "operations", "processes": COUNTS, "method": "balanced"}, rows)


def speedups(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """How many times faster, by the number of processes."""
    columns = ["model", "divided", *(f"{count} processes" for count in COUNTS[1:])]
    found = [[x["model"], x["divided"], *(f"{n:.1f}" for n in x["times"][1:])] for x in rows]
    return columns, found


TABLES = {"speedups": speedups}

if __name__ == "__main__":
    main()
