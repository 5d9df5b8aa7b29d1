"""Scores the channels of the residual stream by how much the sub-blocks read from each.

    score_j = Σ over reads r of ‖Y_j^(r)‖₂,   Y^(r) = the tensor of read r, over all tokens

A read is one tensor that a sub-block takes from the residual stream: the output of the norm before
it or, if there is no norm (OLMo 2), the stream itself. Every read counts once, for any number of
linears that share it: queries, keys and values share one, and so do the router and all experts of a
mixture.

Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron), arXiv:2407.14679, which sums over the outputs of all norms. Deviations: the L2 norm is
over all tokens, while the paper takes it over sequences, each with the mean of its tokens; the norm
before the output head does not count, because its outputs are not part of a layer; norms whose
outputs no sub-block reads (after a sub-block, or within attention) do not count.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from secateur.calibration.statistics import statistics
from secateur.engine.prune.tasks import Settings
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.errors import ArchitectureError, located
from secateur.models.targets import Target
from secateur.progress import Progress


@torch.no_grad()
def hidden_scores(
    target: Target, windows: Tensor, settings: Settings, hidden: int, progress: Progress
) -> Float32[Tensor, " hidden"]:
    """The scores of all channels, with one decoder layer in memory; higher = keep.

    Args:
        target: the model.
        windows: calibration tokens [samples, sequence_length].
        settings: micro-batches, matmuls, and the folder for hidden states.
        hidden: the width of the residual stream.
        progress: receives every step.

    Raises:
        ArchitectureError: the model's family does not declare what reads the residual stream.
        NumericalError: an input of a layer is infinite or not a number.
    """
    layers, architecture = target.layers, target.architecture
    if architecture.couplings is None:
        raise ArchitectureError(
            f"the family {architecture.family!r} does not declare which linears read the residual "
            "stream, so its channels cannot be scored",
            remedy="leave the hidden size as it is, or declare the family's couplings: see "
            "CONTRIBUTING.md, 'Add a model family'",
        )
    declared = architecture.couplings.layer
    calibration = CalibrationStream(
        target, windows, settings.micro_batch_tokens, settings.in_memory, settings.work,
        on_gpu=settings.on_gpu,
    ).open()  # fmt: skip
    scores = torch.zeros(hidden)
    # a reader's input axis is the residual stream. Experts do not count: each reads only some of
    # the tokens that the router reads.
    readers = [
        [name for name, _ in layer.named_modules() if declared.get(name, ())[1:] == ("hidden",)]
        for layer in layers
    ]
    progress.start("hidden channels", len(calibration.batches()) * len(layers))
    for index, layer in calibration.walk():
        step = partial(progress.step, note=f"layer {index}")
        inputs = calibration.layer_inputs(index, step=step)
        modules = [layer.get_submodule(name) for name in readers[index]]
        reads = _StreamReads(modules, hidden, target.device)
        try:
            for batch in inputs.batches:
                reads.begin()
                inputs.pass_one(layer, batch, stores=index + 1 < len(layers))
        finally:
            reads.close()
        with located(architecture.layer_name(index)):
            scores += reads.norms()
    progress.finish()
    return scores


class _StreamReads:
    """Hooks on the readers of a layer that gather the norm of each read.

    Args:
        readers: modules with the input [..., hidden] first.
        hidden: the width of the residual stream.
        device: where the model computes.
    """

    def __init__(self, readers: list[nn.Module], hidden: int, device: torch.device) -> None:
        self.hidden = hidden
        # at most as many reads as readers
        self.totals = [statistics["column_norm"]((hidden, hidden), device) for _ in readers]
        self.seen: list[Tensor] = []
        self.handles = [reader.register_forward_pre_hook(self.before) for reader in readers]

    def begin(self) -> None:
        """Begin a forward. All forwards make their reads in the same order."""
        self.seen = []

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add the input of a reader, unless another reader had the same tensor."""
        read = args[0].reshape(-1, self.hidden)
        # Tensors are kept until the forward ends, so no address is used twice.
        if any(read.data_ptr() == other.data_ptr() for other in self.seen):
            return
        self.totals[len(self.seen)].update(read)
        self.seen.append(read)

    def norms(self) -> Tensor:
        """Σ over the reads of ‖Y_j‖₂, float32 [hidden], on the CPU."""
        total = torch.zeros(self.hidden)
        for statistic in self.totals:
            total += statistic.value().cpu()
        return total

    def close(self) -> None:
        """Remove the hooks, and release the last forward."""
        self.seen = []
        for handle in self.handles:
            handle.remove()
