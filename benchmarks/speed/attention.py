"""Attention while training: torch's fused kernel beside two products and a softmax, in bfloat16.

    python -m benchmarks.speed.attention

Protocol: shapes of SmolLM2-135M (9 query heads on 3 KV heads, 64 wide), one causal window; forward
and backward, the least of `--rounds` rounds that take turns. Then the gradient of the next-token
loss of the model's decoder layers over one window of BoolQ text, ‖g − exact‖ / ‖exact‖, exact being
float32 throughout. It needs a processor that multiplies bfloat16.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from torch.nn.functional import scaled_dot_product_attention

from secateur.calibration.documents import read_text
from secateur.machine import exact_matmuls, fast_dtype, fast_matmuls
from secateur.models.attention import WrittenOut
from secateur.models.opening import load_whole
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.timing import alternate, seconds_of
from secateur.training.batches import Batch
from secateur.training.objectives import next_token

MEASURES = ("src/secateur/models/attention.py",)

CPU = torch.device("cpu")
LENGTHS = (128, 256, 512, 1024, 2048)
KERNELS: dict[str, type[AbstractContextManager[Any]]] = {
    "fused": nullcontext,
    "written": WrittenOut,
}


def timed(length: int, rounds: int) -> dict[str, Any]:
    """One length, both ways."""
    shapes = [(1, heads, length, 64) for heads in (9, 3, 3)]
    inputs = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.bfloat16)

    def once() -> None:
        out = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, inputs, upstream)

    def seconds(kernel: type[AbstractContextManager[Any]]) -> float:
        with kernel():
            return seconds_of(once)

    least: list[float] = alternate([*KERNELS.values()], seconds, min, turns=rounds)
    named = zip(KERNELS, least, strict=True)
    return {"length": length, **{f"{name}_ms": 1e3 * found for name, found in named}}


def gradients() -> dict[str, float]:
    """How far the gradients of both ways are from those in float32."""
    folder = resolve("smollm2-135m").folder
    model = load_whole(folder, CPU)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers" in name)
    ids = load_tokenizer(folder)(read_text("boolq-held-out").text)["input_ids"][:512]
    objective, found = next_token(model), {}
    matmuls = {"exact": exact_matmuls, **dict.fromkeys(KERNELS, fast_matmuls)}
    for name, precision in matmuls.items():
        with precision(CPU), KERNELS.get(name, nullcontext)(), torch.enable_grad():
            objective(model, Batch(torch.tensor([ids]), (0,))).backward()
        given = [p.grad for p in model.parameters() if p.grad is not None]
        found[name] = torch.cat([g.flatten() for g in given])
        model.zero_grad()
    exact = found.pop("exact")
    return {name: ((g - exact).norm() / exact.norm()).item() for name, g in found.items()}


def main() -> None:
    """Time both, compare their gradients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(heading())
    if fast_dtype(CPU) is None:
        raise SystemExit("this processor does not multiply bfloat16 itself: nothing to compare")
    torch.manual_seed(0)
    rows = [timed(length, rounds) for length in LENGTHS]
    apart = gradients()
    keep("attention", {"rounds": rounds, "gradient_apart": apart}, rows)
    lines = [
        [str(r["length"]), *(f"{r[f'{name}_ms']:.1f}" for name in KERNELS),
         f"{r['fused_ms'] / r['written_ms']:.2f}"]
        for r in rows
    ]  # fmt: skip
    print(markdown(["tokens", "fused, ms", "written out, ms", "ratio"], lines))
    print("gradient apart from float32:", {name: f"{x:.4f}" for name, x in apart.items()})


if __name__ == "__main__":
    main()
