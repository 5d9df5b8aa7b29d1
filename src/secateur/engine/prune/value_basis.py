"""The basis of the value heads: a rotation that makes values and outputs easier to prune.

A value head h and the query heads q that read it are two linears in a row, since attention only
averages values over tokens. So any rotation R_h between them leaves the model the same:

    V_h ← R_h V_h,   b_h ← R_h b_h,   O_q ← O_q R_hᵀ for every q that reads h

But it moves energy between weights, and in some bases more of them can be spared. R_h minimises the
error that zeros in both would cost by the rule of Optimal Brain Surgeon,

    log Σ_pruned V²_ij / [G⁻¹]_jj + log Σ_pruned O²_ij / [H⁻¹]_jj

with G and H the second moments of the inputs of both; H turns with R. The sums run over the weights
that the pattern takes: those of the smallest terms. Adam learns R as (I + S)⁻¹(I − S) of a
skew-symmetric S. It starts from the stored basis or from the channels of a head by their energy
(the eigenvectors of V diag(G⁻¹)⁻¹ Vᵀ), whichever has the smaller error.

The layer turns before its statistics are gathered, so targets and dense copies refer to the turned
layer. The same inputs give the same rotation, so a run that goes on repeats it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.calibration.statistics.gram import Gram
from secateur.engine.prune.tasks import LinearTask, Tasks, gathering
from secateur.engine.stream.calibration_stream import LayerInputs
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.halted_forwards import HaltingForwards
from secateur.models.architecture import Linear, linears_of
from secateur.parallel.ranks import Ranks
from secateur.precision import exact_matmuls
from secateur.sparsity.hessian import inverse_factor

log = logging.getLogger(__name__)

TOKENS = 16
"""So many tokens are read for each input channel of the output projection."""

_STEPS, _RATE, _BETAS = 20, 0.01, (0.7, 0.95)  # of Adam
_DAMPING = 0.01
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_DENSE = 0.99  # a matrix with fewer weights that are not zero has been pruned before


@dataclass(frozen=True)
class ValueHeads:
    """The value heads of an attention, between two linears.

    Attributes:
        values: makes the values, one head after the other.
        output: reads them, one query head after the other.
        size: channels of a head.
    """

    values: Linear
    output: Linear
    size: int

    @property
    def heads(self) -> int:
        """The number of value heads."""
        return self.values.shape[0] // self.size

    def value_rows(self) -> Tensor:
        """The weight of the values, [heads, size, in]."""
        return self.values.weight.unflatten(0, (self.heads, self.size))

    def output_columns(self) -> Tensor:
        """The weight of the output, [heads, query heads of each, out, size]."""
        split = self.output.weight.unflatten(1, (self.heads, -1, self.size))
        return split.permute(1, 2, 0, 3)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that turn."""
        biases = [self.values.module.get_parameter("bias")] if self.values.has_bias else []
        return [*(x.module.get_parameter("weight") for x in (self.values, self.output)), *biases]

    def turn(self, rotation: Tensor) -> None:
        """Rotate every head, in float64.

        Args:
            rotation: [heads, size, size].
        """
        turning = rotation.double()
        self.values.assign((turning @ self.value_rows().double()).flatten(0, 1))
        if self.values.has_bias:
            bias = self.values.module.get_parameter("bias")
            rows = bias.detach().double().view(self.heads, self.size, 1)
            bias.data.copy_((turning @ rows).flatten())
        turned = self.output_columns().double() @ turning.mT[:, None]
        self.output.assign(turned.permute(2, 0, 1, 3).flatten(1))


def value_heads(layer: nn.Module, linears: Mapping[str, Linear], tasks: Tasks) -> list[ValueHeads]:
    """The value heads of a layer whose two linears are both pruned now, and were not before.

    Args:
        layer: a decoder layer.
        linears: its linears, by their names in it.
        tasks: the task of each.
    """
    found = []
    for name, values in linears.items():
        parent, _, own = name.rpartition(".")
        output = linears.get(f"{parent}.o_proj")
        size = getattr(layer.get_submodule(parent), "head_dim", None)
        if own != "v_proj" or output is None or not isinstance(size, int):
            continue
        whole = values.shape[0] % size == 0 and output.shape[1] % values.shape[0] == 0
        if whole and all(_pruned_first(x, tasks) for x in (values, output)):
            found.append(ValueHeads(values, output, size))
    return found


def _pruned_first(linear: Linear, tasks: Tasks) -> bool:
    nonzeros = linear.weight.count_nonzero() / linear.weight.numel()
    return tasks[linear.name].sparsity > 0 and bool(nonzeros > _DENSE)


def change_basis(
    layer: nn.Module, name: str, tasks: Tasks, inputs: LayerInputs, ranks: Ranks
) -> list[str]:
    """Learn the rotations of the value heads of a layer, and turn it.

    Args:
        layer: the dense layer.
        name: its full name.
        tasks: the task of each linear.
        inputs: hidden states of the calibration windows of this process.
        ranks: the processes that share the windows; all call this.

    Returns:
        The full names of biases that have changed.
    """
    if gathering(tasks).backward:
        log.warning("%s keeps its value heads: gradients were gathered before", name)
        return []
    found = value_heads(layer, linears_of(layer, name), tasks)
    if not found:
        log.info("%s has no value heads to turn", name)
    turned = [heads for heads in found if _turn(layer, heads, tasks, inputs, ranks)]
    if len(turned) < len(found):
        log.info("%s keeps its value heads: more than an average is between v and o", name)
    return [f"{heads.values.name}.bias" for heads in turned if heads.values.has_bias]


def _turn(
    layer: nn.Module, heads: ValueHeads, tasks: Tasks, inputs: LayerInputs, ranks: Ranks
) -> bool:
    """Turn value heads by learned rotations. Return whether the layer has the same outputs.

    There may be more between values and output than an average over tokens: a gate, or a norm with
    weights; or later layers read the values too. Then the heads get their weights back.
    """
    grams = gather(heads, layer, inputs, ranks)
    rotation = learn_rotations(heads, grams, tasks[heads.values.name], tasks[heads.output.name])
    ranks.share(rotation, 0)
    before = [x.detach().clone() for x in heads.parameters()]
    probes = inputs.batches[:1]  # none in a process without windows
    dense = [_outputs(layer, inputs, batch) for batch in probes]
    heads.turn(rotation)
    moved = [
        (_outputs(layer, inputs, batch) - old).norm() / (old - inputs.read(batch)).norm()
        for batch, old in zip(probes, dense, strict=True)
    ]
    most = _TOLERANCE[heads.values.weight.dtype]
    same = all(ranks.gather(all(bool(x <= most) for x in moved)))
    if not same:
        for parameter, old in zip(heads.parameters(), before, strict=True):
            parameter.data.copy_(old)
    return same


def _outputs(layer: nn.Module, inputs: LayerInputs, batch: slice) -> Tensor:
    return call_layer(layer, inputs.read(batch), inputs.call(batch)).float()


def gather(
    heads: ValueHeads, layer: nn.Module, inputs: LayerInputs, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The second moments of the inputs of both linears.

    A forward ends at the output projection, and only the first windows pass.
    """
    linears = (heads.values, heads.output)
    device = heads.values.weight.device
    grams = [Gram(x.shape, device) for x in linears]
    left = -(-TOKENS * heads.output.shape[1] // ranks.count)
    for batch in inputs.batches:
        if left <= 0:
            break
        forward = partial(_outputs, layer, inputs, batch)
        halting = HaltingForwards([[x] for x in linears], [forward], None, inputs.matmuls)
        with closing(halting):
            for gram in grams:
                _, x = halting.advance(0)
                with exact_matmuls(device):
                    gram.update(x.reshape(-1, x.shape[-1]))
        left -= x.shape[:-1].numel()
    for gram in grams:
        ranks.total(gram.total)
    return grams[0].value(), grams[1].value()


def error_of(
    heads: ValueHeads, grams: tuple[Tensor, Tensor], values: LinearTask, output: LinearTask
) -> Callable[[Tensor], Tensor]:
    """What returns the error of rotations [heads, size, size], as a logarithm.

    Args:
        heads: the value heads.
        grams: the second moments of the inputs of values and output, float32.
        values: the task of the values.
        output: that of the output.
    """
    rows, columns = heads.value_rows().float(), heads.output_columns().float()
    spread = inverse_factor(grams[0], _DAMPING)[0].square().sum(0)  # the diagonal of G⁻¹
    factor = inverse_factor(grams[1], _DAMPING)[0].unflatten(1, (*columns.shape[:2], heads.size))
    # UᵀU = H⁻¹, and the columns of a head have the same products in a square matrix
    factor = torch.linalg.qr(factor.permute(1, 2, 0, 3))[1]

    def error(rotation: Tensor) -> Tensor:
        back = rotation.mT[:, None]
        own = (rotation @ rows).square() / spread
        read = (columns @ back).square() / (factor @ back).square().sum(-2, keepdim=True)
        read = read.permute(2, 0, 1, 3).flatten(1)
        return _pruned(own.flatten(0, 1), values).log() + _pruned(read, output).log()

    return error


@torch.enable_grad()
def learn_rotations(
    heads: ValueHeads, grams: tuple[Tensor, Tensor], values: LinearTask, output: LinearTask
) -> Tensor:
    """Learn the rotation of every head, [heads, size, size]; arguments as of `error_of`."""
    error = error_of(heads, grams, values, output)
    eye = torch.eye(heads.size, device=grams[0].device)
    spread = inverse_factor(grams[0], _DAMPING)[0].square().sum(0)
    weighted = heads.value_rows().float() / spread.sqrt()
    energies = torch.linalg.eigh(weighted @ weighted.mT)[1].mT
    start = min(eye.expand_as(energies), energies, key=lambda x: float(error(x)))
    free = torch.zeros_like(start).requires_grad_()
    adam = torch.optim.Adam([free], lr=_RATE, betas=_BETAS)

    def rotation() -> Tensor:
        skew = free - free.mT
        return torch.linalg.solve(eye + skew, eye - skew) @ start

    for _ in range(_STEPS):
        adam.zero_grad()
        error(rotation()).backward()
        adam.step()
    return rotation().detach().contiguous()


def _pruned(scores: Tensor, task: LinearTask) -> Tensor:
    """The sum of the scores [out, in] that the pattern takes."""
    kept = task.method.pattern.mask(scores.detach(), task.sparsity)
    return scores.masked_fill(kept, 0.0).sum()
