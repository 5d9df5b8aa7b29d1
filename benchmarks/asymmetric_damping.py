"""Which damping the solvers need after an asymmetric fit: the fit's own, or their usual one.

    python benchmarks/asymmetric_damping.py --text TEXT [--windows 24] [--sparsities 0.5 0.6]

SmolLM2-135M as the effort `balanced` prunes it, with one sparsity for all linears. `fit` is λ of
W* = (TX̂ᵀ + λW)(G + λI)⁻¹, as a fraction of the mean diagonal of G, and `solver` the damping with
which the writers to the residual stream are pruned after it. With equal numbers, what is solved is
‖T − ŴX̂‖² + λ‖W − Ŵ‖². Judged on windows of another text, by the divergence from the dense model,
and by the loss window by window beside the first row.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import secateur
from hardware import heading, keep, markdown

WRITERS = ("*.o_proj", "*.down_proj")
DAMPINGS = ((0.2, 0.01), (0.2, 0.2), (0.01, 0.01), (0.05, 0.05))
"""λ of the fit, and of the solver."""


def main() -> None:
    """Prune with each pair of dampings, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--judged", type=int, default=32)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5])
    args = parser.parse_args()
    print(heading())
    rows = []
    for sparsity in args.sparsities:
        with tempfile.TemporaryDirectory() as place:
            for fit, solver in DAMPINGS:
                output = Path(place) / f"{fit}-{solver}"
                result = secateur.prune(
                    args.model, output=output, sparsity=sparsity, effort="balanced",
                    allocation="uniform", calibration=args.calibration, windows=args.windows,
                    sequence_length=args.length, asymmetric_damping=fit,
                    method_overrides={glob: {"damping": solver} for glob in WRITERS},
                )  # fmt: skip
                judging = {
                    "text": args.text, "windows": args.judged, "sequence_length": args.length
                }  # fmt: skip
                beside = secateur.evaluate(output, dense=args.model, **judging).record
                first = Path(place) / "-".join(map(str, DAMPINGS[0]))
                paired = secateur.evaluate(output, dense=first, **judging).record.divergence[0]
                moved = beside.divergence[0]
                rows.append({
                    "sparsity": sparsity, "fit": fit, "solver": solver,
                    "perplexity": beside.perplexity[0].perplexity,
                    "divergence": moved.kl, "divergence_error": moved.kl_standard_error,
                    "loss_beside_first": paired.loss_change,
                    "loss_beside_first_error": paired.loss_change_standard_error,
                    "seconds": result.manifest.cost.seconds,
                })  # fmt: skip
                print(rows[-1], flush=True)
    texts = {"calibration": Path(args.calibration).name, "text": Path(args.text).name}
    print(f"written to {keep('asymmetric-damping', {**vars(args), **texts}, rows)}")
    print(
        markdown(
            ["zeros", "λ of the fit", "of the solver", "perplexity", "divergence", "loss beside"],
            [
                [
                    f"{row['sparsity']:.0%}",
                    f"{row['fit']:g}",
                    f"{row['solver']:g}",
                    f"{row['perplexity']:.2f}",
                    f"{row['divergence']:.4f} ± {row['divergence_error']:.4f}",
                    f"{row['loss_beside_first']:+.4f} ± {row['loss_beside_first_error']:.4f}",
                ]
                for row in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
