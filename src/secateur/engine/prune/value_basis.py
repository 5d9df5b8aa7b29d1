"""The basis of the value heads: a change of channels that makes values and outputs easier to prune.

A value head h and the query heads q that read it are two linears in a row, since attention only
averages values over tokens. So any invertible matrix M_h between them leaves the model the same:

    V_h ← M_h V_h,   b_h ← M_h b_h,   O_q ← O_q M_h⁻¹ for every q that reads h

But it moves energy between weights, and in some bases more of them can be spared. M_h minimises the
error that zeros in both would cost by the rule of Optimal Brain Surgeon, in units of the output,

    Σ_pruned ‖o_i‖² V²_ij / [G⁻¹]_jj + Σ_pruned O²_ij / [H⁻¹]_jj

with o_i the columns of O that read row i of V, and G and H the second moments of the inputs of
both; H changes with M. The sums run over the weights that the pattern takes: those of the smallest
terms. M_h = D A exp(T) B with rotations A, B and a diagonal T, so that the condition number without
D is at most `CONDITION`. D gives the columns o_i one norm, so that a solver that sees V alone
counts errors of all its rows as the output does. Adam learns A and B as (I + S)⁻¹(I − S) of
skew-symmetric S.

The layer changes before its statistics are gathered, so targets and dense copies refer to the
changed layer. The same inputs give the same matrices, so a run that goes on repeats them.
"""

from __future__ import annotations

import logging
import math
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
from secateur.engine.stream.targets import Target
from secateur.models.architecture import Linear, linears_of
from secateur.parallel.ranks import Ranks
from secateur.precision import exact_matmuls
from secateur.sparsity.hessian import FACTOR_SQUARES, inverse_factor

log = logging.getLogger(__name__)

TOKENS_PER_CHANNEL, LEAST_TOKENS = 16, 8192
"""Tokens that are read for each input channel of the output projection, and at least."""

CONDITION = 10.0
"""Bound of the condition number."""

STEPS = 20
"""Steps of Adam."""

_RATE, _BETAS = 0.03, (0.9, 0.95)
_COPIES = 9  # of both weights, for the error and its gradient
_TINY = 1e-30
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

    @property
    def tokens(self) -> int:
        """The number of tokens whose inputs are read."""
        return max(TOKENS_PER_CHANNEL * self.output.shape[1], LEAST_TOKENS)

    @property
    def working_bytes(self) -> int:
        """The most memory that learning the basis takes, with the second moments of both inputs."""
        (rows, inputs), (out, read) = self.values.shape, self.output.shape
        squares = inputs**2 + read**2 + FACTOR_SQUARES * max(inputs, read) ** 2
        return 4 * (squares + _COPIES * (rows * inputs + out * read))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that change."""
        biases = [self.values.module.get_parameter("bias")] if self.values.has_bias else []
        return [*(x.module.get_parameter("weight") for x in (self.values, self.output)), *biases]

    def change(self, basis: Tensor) -> None:
        """Change the channels of every head, in float64.

        Args:
            basis: an invertible matrix for each head, [heads, size, size].
        """
        exact = basis.double()
        self.values.assign((exact @ self.value_rows().double()).flatten(0, 1))
        if self.values.has_bias:
            bias = self.values.module.get_parameter("bias")
            rows = bias.detach().double().view(self.heads, self.size, 1)
            bias.data.copy_((exact @ rows).flatten())
        columns = self.output_columns().double() @ torch.linalg.inv(exact)[:, None]
        self.output.assign(columns.permute(2, 0, 1, 3).flatten(1))


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
        both = (values, output)
        # the weights of a skeleton are unknown
        known = [x.weight for x in both if not x.weight.is_meta]
        dense = all(x.count_nonzero() > _DENSE * x.numel() for x in known)
        if whole and dense and all(tasks[x.name].sparsity > 0 for x in both):
            found.append(ValueHeads(values, output, size))
    return found


def all_value_heads(target: Target, tasks: Tasks) -> list[ValueHeads]:
    """The value heads of the whole model whose basis a run may learn."""
    if gathering(tasks).backward:
        return []
    named = [(x, target.architecture.layer_name(i)) for i, x in enumerate(target.layers)]
    return [heads for x, name in named for heads in value_heads(x, linears_of(x, name), tasks)]


def change_basis(
    layer: nn.Module, name: str, tasks: Tasks, inputs: LayerInputs, ranks: Ranks
) -> list[str]:
    """Learn the basis of the value heads of a layer, and change it.

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
        log.info("%s has no value heads to change", name)
    changed = [heads for heads in found if _change(layer, heads, tasks, inputs, ranks)]
    if len(changed) < len(found):
        log.info("%s keeps its value heads: more than an average is between v and o", name)
    return [f"{heads.values.name}.bias" for heads in changed if heads.values.has_bias]


def _change(
    layer: nn.Module, heads: ValueHeads, tasks: Tasks, inputs: LayerInputs, ranks: Ranks
) -> bool:
    """Give value heads a learned basis. Return whether the layer has the same outputs.

    There may be more between values and output than an average over tokens: a gate, or a norm with
    weights; or later layers read the values too. Then the heads get their weights back.
    """
    grams = gather(heads, layer, inputs, ranks)
    basis = learn_basis(heads, grams, tasks[heads.values.name], tasks[heads.output.name])
    ranks.share(basis, 0)
    before = [x.detach().clone() for x in heads.parameters()]
    probes = inputs.batches[:1]  # none in a process without windows
    dense = [_outputs(layer, inputs, batch) for batch in probes]
    heads.change(basis)
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
    left = -(-heads.tokens // ranks.count)
    for batch in inputs.batches:
        if left <= 0:
            break
        # `advance` enters the context of the matmuls: a halted forward must not leave one later
        forward = partial(_outputs, layer, inputs, batch)
        halting = HaltingForwards([[x] for x in linears], [forward], None, inputs.matmuls)
        with closing(halting):
            for gram in grams:
                arrival = halting.advance(0)
                assert arrival is not None  # no forward ends before the output projection
                x = arrival[1]
                with exact_matmuls(device):
                    gram.update(x.reshape(-1, x.shape[-1]))
        left -= x.shape[:-1].numel()
    for gram in grams:
        ranks.total(gram.total)
    return grams[0].value(), grams[1].value()


def error_of(
    heads: ValueHeads, grams: tuple[Tensor, Tensor], values: LinearTask, output: LinearTask
) -> Callable[[Tensor, Tensor], Tensor]:
    """What returns the error of a basis: of its matrices and their inverses, [heads, size, size].

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

    def error(basis: Tensor, inverse: Tensor) -> Tensor:
        back = inverse[:, None]
        squares = (columns @ back).square()
        own = (basis @ rows).square() / spread * squares.sum((1, 2))[..., None]
        read = squares / (factor @ back).square().sum(-2, keepdim=True)
        read = read.permute(2, 0, 1, 3).flatten(1)
        return _pruned(own.flatten(0, 1), values) + _pruned(read, output)

    return error


@torch.enable_grad()
def learn_basis(
    heads: ValueHeads,
    grams: tuple[Tensor, Tensor],
    values: LinearTask,
    output: LinearTask,
    steps: int = STEPS,
) -> Tensor:
    """Learn the matrix of every head, [heads, size, size]; arguments as of `error_of`."""
    error = error_of(heads, grams, values, output)
    columns = heads.output_columns().float()
    shape = (heads.heads, heads.size)
    left, right = (columns.new_zeros(*shape, heads.size).requires_grad_() for _ in range(2))
    stretch = columns.new_zeros(shape).requires_grad_()
    adam = torch.optim.Adam([left, right, stretch], lr=_RATE, betas=_BETAS)

    def basis() -> tuple[Tensor, Tensor]:
        outer, inner = _rotation(left), _rotation(right)
        factors = (stretch.tanh() * (math.log(CONDITION) / 2)).exp()
        inverse = inner.mT / factors[:, None] @ outer.mT
        norms = (columns @ inverse[:, None]).square().sum((1, 2)).sqrt()
        norms = (norms / norms.mean().clamp_min(_TINY)).clamp(1 / CONDITION, CONDITION)
        return norms[..., None] * (outer * factors[:, None] @ inner), inverse / norms[:, None]

    for _ in range(steps):
        adam.zero_grad()
        error(*basis()).clamp_min(_TINY).log().backward()
        adam.step()
    return basis()[0].detach().contiguous()


def _rotation(free: Tensor) -> Tensor:
    skew, eye = free - free.mT, torch.eye(free.shape[-1], device=free.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def _pruned(scores: Tensor, task: LinearTask) -> Tensor:
    """The sum of the scores [out, in] that the pattern takes."""
    kept = task.method.pattern.mask(scores.detach(), task.sparsity)
    return scores.masked_fill(kept, 0.0).sum()
