"""A bound on the time of a token, on SmolLM2-135M: what `secateur fit` predicts and measures.

    python -m benchmarks.speed.fit_speed --calibration c4.jsonl --work DIR [--speedups 1.5 2]

For each speed-up over dense int8, `secateur fit --decode-speedup` with the preset `fast`, so that
nothing is healed: speed does not depend on the weights. A row holds every correction, the speed-up
at the end, and how the linears are stored. A speed-up that no model reaches has no model: its row
holds what the refusal says.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.hardware import add, heading
from benchmarks.stored import known_rows

from secateur import fit
from secateur.errors import RecipeError

MEASURES = ("src/secateur/steps/fitting",)

MIB = 2**20


def row_of(args: argparse.Namespace, speedup: float) -> dict[str, Any]:
    """Fit and measure."""
    try:
        found = fit(
            "smollm2-135m", output=args.work / f"speedup-{speedup:g}", decode_speedup=speedup,
            effort="fast", calibration=args.calibration, windows=64, sequence_length=512,
            resume=True,
        )  # fmt: skip
    except RecipeError as error:
        return {"asked": speedup, "refused": f"{error.what}; {error.remedy}"}
    return {
        "asked": speedup,
        "corrections": [asdict(one) for one in found.corrections],
        "reached": found.checks[0].measured,
        "mib": found.packed.file_bytes / MIB,
        "divergence": found.winner.divergence,
        "linears": dict(Counter(found.kind_of.values())),
    }


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
    args = parser.parse_args()
    print(heading())
    args.work.mkdir(parents=True, exist_ok=True)
    for speedup in args.speedups:
        if speedup not in [row["asked"] for row in known_rows("fit-speed")]:
            row = row_of(args, speedup)
            add("fit-speed", {"protocol": __doc__}, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
