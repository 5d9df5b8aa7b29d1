"""What another basis of the inputs would bring to rounding: single matrices of SmolLM2-135M.

    python -m benchmarks.quality.input_bases [--layers 3 15 27]

W x = (W B) (B⁻¹ x): the matrix W B is rounded in groups of 64 by sweep and descent, with the gram
of B⁻¹ x. The error is ‖(W − Ŵ)X‖² / ‖WX‖² on inputs that calibrated nothing, the mean over layers.

* `none`: B is the identity.
* `scales`: B is diagonal, the mean |x| of each input to the power of α (AWQ, arXiv:2306.00978);
  α is the one of 0.15, 0.3 and 0.5 with the least error on the calibration inputs.
* `Hadamard`: a Hadamard matrix for each 64 consecutive inputs, as wide as the groups.
* `rotation`: a random rotation of all inputs (as QuaRot's, arXiv:2404.00456).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from benchmarks.hardware import keep, markdown
from benchmarks.quality.refits import LINEARS, grams_of
from scipy.linalg import hadamard
from torch import Tensor

from secateur.calibration.windows import WindowPlan, make_windows
from secateur.evaluation.perplexity import load_model
from secateur.models.hub import sample_text
from secateur.sparsity.hessian import relative_output_error
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.solvers.obs import OBS

MEASURES = ("src/secateur/quantization",)

GROUP = 64
POWERS = (0.15, 0.3, 0.5)


def bases(gram: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Bases B of inputs with a gram, by name."""
    size = len(gram)
    yield "none", torch.eye(size)
    amplitude = gram.diagonal().sqrt()
    for power in POWERS:
        scale = (amplitude / amplitude.mean()).clamp_min(1e-4) ** power
        yield f"scales {power}", (scale / scale.log().mean().exp()).diag()
    block = torch.tensor(hadamard(GROUP), dtype=torch.float32) / GROUP**0.5
    yield "Hadamard", torch.block_diag(*[block] * (size // GROUP))
    random = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    yield "rotation", torch.linalg.qr(random)[0]


def rounded(weight: Tensor, gram: Tensor, basis: Tensor, bits: int) -> Tensor:
    """A matrix [out, in], rounded in a basis of its inputs and turned back."""
    inverse = basis.inverse()
    solver, turned = OBS(bits=bits, group=GROUP), weight @ basis
    prepared = solver.prepare({"gram": inverse @ gram @ inverse.t()})
    everything = torch.ones_like(weight, dtype=torch.bool)
    return solver.solve(turned, prepared, everything).weight @ inverse


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[3, 15, 27])
    args = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m", "cpu", trust_remote_code=False)
    linears = {
        f"model.layers.{layer}.{name}": model.get_submodule(f"model.layers.{layer}.{name}")
        for layer in args.layers
        for name in LINEARS
    }
    plan = WindowPlan(windows=24, sequence_length=512)
    grams, others = (
        grams_of(model, linears, make_windows(sample_text(text), tokenizer, plan))
        for text in ("boolq-calibration", "boolq-held-out")
    )
    rows = []
    for kind in LINEARS:
        for bits in (4, 3, 2):
            errors: dict[str, list[float]] = {}
            for name in (name for name in linears if name.endswith(kind)):
                weight, scales = linears[name].weight.detach(), dict[float, float]()
                for basis_name, basis in bases(grams[name]):
                    made = rounded(weight, grams[name], basis, bits)
                    error = relative_output_error(weight, made, others[name])
                    if basis_name.startswith("scales"):
                        scales[relative_output_error(weight, made, grams[name])] = error
                        continue
                    errors.setdefault(basis_name, []).append(error)
                errors.setdefault("scales", []).append(scales[min(scales)])
            means = {name: sum(found) / len(found) for name, found in errors.items()}
            rows.append({"linear": kind, "bits": bits, **means})
            print(rows[-1], flush=True)
    keep("input-bases", {"layers": args.layers, "see": "benchmarks/quality/input_bases.py"}, rows)
    names = ("none", "scales", "Hadamard", "rotation")
    lines = [
        [row["linear"], f"{row['bits']}", *(f"{row[name]:.5f}" for name in names)] for row in rows
    ]
    print(markdown(["linear", "bits", *names], lines))


if __name__ == "__main__":
    main()
