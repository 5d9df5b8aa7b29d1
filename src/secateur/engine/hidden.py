"""How much each channel of the residual stream is used: what norms hand to the linears.

    score_j = Σ over norms n of ‖Y_j^(n)‖₂,   Y^(n) = outputs of norm n over all calibration tokens

Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron), arXiv:2407.14679. Deviation: the L2 norm over all tokens in the place of the mean over a
sequence and the L2 norm over sequences; the norm in front of the output head is left out, since
its outputs are not seen layer by layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from secateur.engine.layer_pass import LayerPass
from secateur.engine.run import Run
from secateur.engine.survey import gather_dense

__all__ = ["hidden_scores"]


@torch.no_grad()
def hidden_scores(run: Run, hidden: int) -> Float32[Tensor, " hidden"]:
    """The scores of all channels, with one decoder layer in memory; higher = keep.

    Args:
        run: whose model and calibration tokens are used; it must select all linears.
        hidden: the width of the residual stream.
    """
    passage, layers = run.passage, run.target.layers
    assert passage is not None
    passage.open(0, dense=False)
    scores = torch.zeros(hidden)
    run.progress.start("hidden channels", len(passage.batches()) * len(layers))
    for index in range(len(layers)):
        with run.target.layer(index) as layer:
            passing = LayerPass(run, index, layer)
            shared = gather_dense(passing, frozenset({"column_norm"}))
        seen = {id(s): s for n, s in shared.items() if reads_stream(run, n, hidden)}
        for statistics in seen.values():
            scores += statistics.value()["column_norm"].cpu()
        if index + 1 < len(layers):
            passage.advance(index + 1)
        passage.forget(index)
    run.progress.finish()
    passage.close()
    return scores


def reads_stream(run: Run, name: str, hidden: int) -> bool:
    """Whether a linear reads what a norm makes of the residual stream."""
    writers = run.target.architecture.writers
    return run.shapes[name][1] == hidden and not any(name.endswith(f".{w}") for w in writers)
