"""What each lever of `secateur fit` gains at one size: the fit without it, before healing.

    python -m benchmarks.quality.fit_levers MODEL --name NAME --calibration TEXT --size MIB --work DIR

A row for all levers, and one without zeros, without int2, without int2 and int3, with embeddings in
int8 alone, and with one format for all linears. Loss in nats above the dense model's, of the packed
winner as it runs, on the calibration windows that neither made nor chose a model (a sixth of 64
windows of 512 tokens), with its standard error over them. If the fit with all levers comes first,
the others take over its survey, and their `seconds` are without it. What healing gains, `fit.py`
shows.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from benchmarks.hardware import add, heading
from benchmarks.stored import known_rows

import secateur
from secateur.engine.search.knapsack import fits
from secateur.runtime.formats import WeightFormat
from secateur.steps import fit
from secateur.steps.fitting import problem
from secateur.steps.fitting.bench import FitBench
from secateur.steps.fitting.problem import FitProblem
from secateur.steps.fitting.survey import survey_model

MEASURES = ("src/secateur/steps/fit.py", "src/secateur/steps/fitting")
PROOF = ("llama/fit", "llama/loss fit")
MINUTES = 27

MIB = 2**20


@dataclass(frozen=True)
class Without:
    """A fit that lacks something.

    Attributes:
        keeps: whether a format takes part.
        embeddings: the values of embedding and head by those of a format.
        one_format: whether all linears have the same.
    """

    keeps: Callable[[WeightFormat], bool] = lambda stored: True
    embeddings: Mapping[str, str] = field(default_factory=lambda: problem.EMBEDDED)
    one_format: bool = False


LEVERS = {
    "all levers": Without(),
    "no zeros": Without(lambda stored: not stored.sparsity),
    "no int2": Without(lambda stored: stored.values != "int2"),
    "no int2, no int3": Without(lambda stored: stored.values not in ("int2", "int3")),
    "embeddings in int8": Without(embeddings={}),
    "one format for all": Without(one_format=True),
}


def best_single(own: FitProblem, less: float) -> tuple[int, ...] | None:
    """The best candidate whose linears have one format."""
    knapsack, count = own.knapsack, range(len(own.costs.formats))
    linears = len(own.costs.units) - 1
    every = [(one,) * linears + (outer,) for one in count for outer in count]
    fitting = [one for one in every if fits(knapsack.total(one), own.costs.aim)]
    return min(fitting, key=knapsack.predicted, default=None)


def row_of(args: argparse.Namespace, label: str) -> dict[str, Any]:
    """The row of a fit without a lever."""
    lever, known = LEVERS[label], args.work / "survey.json"
    formats = tuple(stored for stored in problem.FORMATS if lever.keeps(stored))

    def survey(bench: FitBench) -> FitProblem:
        own = bench.work / known.name
        if known.exists():
            shutil.copy(known, own)
        found = survey_model(bench)
        if lever == Without():  # the others lack something
            shutil.copy(own, known)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem.PackedFolder, "formats", formats)
        patch.setattr(problem, "EMBEDDED", lever.embeddings)
        patch.setattr(fit, "survey_model", survey)
        if lever.one_format:
            patch.setattr(FitProblem, "mix", best_single)
        found = secateur.fit(
            args.model, output=args.work / label.replace(" ", "-").replace(",", ""), resume=True,
            max_size=round(args.size * MIB), calibration=args.calibration, windows=64,
            sequence_length=512, heal_tokens=0,
        )  # fmt: skip
    return {
        "model": args.name, "size": args.size, "contender": label,
        "mib": found.loss.file_bytes / MIB, "loss": found.loss.loss_increase,
        "standard_error": found.loss.standard_error, "seconds": found.seconds,
        "finalists": [asdict(one) for one in found.finalists],
    }  # fmt: skip


def levers(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The divergence of the model that was made without each lever."""
    columns = ["", "MiB", "divergence, nats per token"]
    return columns, [
        [r["contender"], f"{r['mib']:.1f}", f"{r['finalists'][-1]['divergence']:.3f}"] for r in rows
    ]


TABLES = {"levers": levers}


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--size", type=float, required=True, help="MiB")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[*LEVERS], default=[*LEVERS])
    args = parser.parse_args()
    print(heading())
    args.work.mkdir(parents=True, exist_ok=True)
    known = {(r["model"], r["size"], r["contender"]) for r in known_rows("fit-levers")}
    for label in args.only:
        if (args.name, args.size, label) not in known:
            row = row_of(args, label)
            add("fit-levers", {"protocol": "see benchmarks/quality/fit_levers.py"}, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
