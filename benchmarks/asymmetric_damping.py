"""Which damping the solvers need after an asymmetric fit: the fit's own, or their usual one.

    python benchmarks/asymmetric_damping.py [--layers 8] [--windows 16] [--judged 12]

The first layers of SmolLM2-135M as the effort `balanced` prunes them, with one sparsity for all
linears. `fit` is λ of W* = (TX̂ᵀ + λW)(G + λI)⁻¹, as a fraction of the mean diagonal of G, and
`solver` the damping with which the writers to the residual stream are pruned after it. With equal
numbers, what is solved is ‖T − ŴX̂‖² + λ‖W − Ŵ‖². Text: `boolq-calibration`, and `boolq-held-out`
to judge: the loss of the next token, and window by window what it is above that of the first row.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import secateur
from hardware import heading, keep, markdown
from secateur.calibration.windows import WindowPlan, make_windows
from secateur.engine.stream.targets import CheckpointTarget
from secateur.evaluation.perplexity import dense_losses
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.hub import sample_text
from secateur.models.opening import open_weights
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.progress import Silent

WRITERS = ("*.o_proj", "*.down_proj")
DAMPINGS = ((0.2, 0.01), (0.2, 0.2), (0.01, 0.01))
"""λ of the fit, and of the solver."""


def main() -> None:
    """Prune with each pair of dampings, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--judged", type=int, default=12)
    parser.add_argument("--sparsity", type=float, default=0.5)
    args = parser.parse_args()
    print(heading(), flush=True)
    source = resolve(args.model).folder
    plan = WindowPlan(windows=args.judged, sequence_length=args.length)
    windows = make_windows(sample_text("boolq-held-out"), load_tokenizer(source), plan)

    def losses_of(folder: Path) -> list[float]:
        target = CheckpointTarget(open_weights(folder), None, torch.device("cpu"))
        return dense_losses(target, windows, 0, Silent())

    rows, first = [], list[float]()
    with tempfile.TemporaryDirectory() as place:
        for fit, solver in DAMPINGS:
            output = Path(place) / f"{fit}-{solver}"
            secateur.prune(
                args.model,
                output=output,
                include=[f"model.layers.{layer}.*" for layer in range(args.layers)],
                sparsity=args.sparsity,
                effort="balanced",
                allocation="uniform",
                calibration="boolq-calibration",
                windows=args.windows,
                sequence_length=args.length,
                asymmetric_damping=fit,
                method_overrides={glob: {"damping": solver} for glob in WRITERS},
            )
            losses = losses_of(output)
            first = first or losses
            above = [own - other for own, other in zip(losses, first, strict=True)]
            error = standard_error(above) if losses is not first else 0.0
            rows.append(
                {"fit": fit, "solver": solver, "loss": mean_of(losses), "above": mean_of(above)}
                | {"error": error}
            )
            print(rows[-1], flush=True)
    dense = mean_of(losses_of(source))
    print(f"written to {keep('asymmetric-damping', {**vars(args), 'dense_loss': dense}, rows)}")
    lines = []
    for row in rows:
        beside = f"{row['above']:+.4f} ± {row['error']:.4f}"
        lines.append([f"{row['fit']:g}", f"{row['solver']:g}", f"{row['loss']:.4f}", beside])
    print(markdown(["λ of the fit", "of the solver", "loss", "above the first"], lines))
    print(f"the dense model: {dense:.4f}")


if __name__ == "__main__":
    main()
