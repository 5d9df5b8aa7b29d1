"""Tunes a pruned layer to reproduce the outputs of the dense layer. Adam on its parameters θ:

    minimise over θ   mean_t ‖f_θ(x̂)_t − y_t‖² / ‖y_t‖²

where t runs over the tokens of a step, x̂ are the layer's inputs in the pruned model and y the
dense layer's outputs on the dense inputs. The error of each token is divided by the token's
size, because the following norms divide by it. A few tokens have hidden states a thousand times
larger than the others and would otherwise dominate the fit.

Pruned weights keep training as shadow weights: the layer runs with θ ⊙ mask, the
gradient of that product moves all of θ (straight through the mask), and every four steps
the pattern chooses a new mask by |θ| · ‖x̂‖₂ (Wanda's score). A pruned weight starts from its
value before pruning. After 60 % of the steps the mask is fixed.

After: block-wise reconstruction as in BRECQ (Li et al. 2021, arXiv:2102.05426), used for
pruned language models by Wanda++ (Yang et al. 2025, arXiv:2503.04992), among others; the
gradient through the mask as in Zhou et al. 2021, arXiv:2102.04010, without its decay.

So a layer also compensates the losses of the layers before it. All parameters of the layer are
tuned, including norms and biases; none are added. Matrices on a grid stay on it (`RoundedWeight`),
and their masks are fixed from the start. One decoder layer is in memory, with its gradients and the
two moments of Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.plan import layers_by_kind, rehearse_training, weights_of
from secateur.engine.prune.tasks import Settings, Tasks
from secateur.engine.stream.calibration_stream import LayerInputs
from secateur.engine.stream.calls import LayerCall, call_layer, calls_of
from secateur.machine import fast_matmuls
from secateur.models.architecture import Linear
from secateur.models.block_files import StoredBlocks
from secateur.models.targets import Target
from secateur.parallel.ranks import ALONE, Ranks
from secateur.quantization.blocks import BlockGrid, Blocks
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import nearest_rows
from secateur.sparsity.column_sweep import kept_weights, mark_kept
from secateur.sparsity.patterns import Pattern

LEARNING_RATE = 1e-3
"""The learning rate of the first step; it falls to 0 along a half cosine over all steps."""

# Steps between new masks, and the part of the tuning in which masks change.
_CHOOSE_EVERY = 4
_CHOOSING = 0.6


def output_error(output: Tensor, target: Tensor) -> Tensor:
    """mean_t ‖output_t − target_t‖² / ‖target_t‖², a scalar, over all tokens t.

    Args:
        output: [..., hidden], any floating dtype; computed in float32.
        target: the same shape.
    """
    target = target.float()
    error = (output.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


class LayerTuning:
    """The tuning of one pruned layer to the outputs of the dense layer.

    Args:
        layer: the layer.
        tasks: the tasks of its linears, by full name.
        settings: how the work is done.
        inputs: the hidden states of the pruned model at the layer.
        dense: the hidden states of the dense model, behind the layer by the time of `execute`.

    Attributes:
        remasks: whether masks may change: not those of matrices on a grid.
    """

    def __init__(
        self,
        layer: nn.Module,
        tasks: Tasks,
        settings: Settings,
        inputs: LayerInputs,
        dense: LayerInputs,
    ) -> None:
        self.layer, self.tasks, self.inputs, self.dense = layer, tasks, inputs, dense
        self.passes, self.ranks = settings.tune_passes, settings.ranks
        on_grid = any(task.rounded for task in tasks.values())
        self.remasks = not on_grid
        self.shadows: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(self, linear: Linear, weight: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Keep the weight before pruning and its inputs' norms, for masks that may change later."""
        norm = torch.ones(weight.shape[1], device=weight.device)
        if "column_norm" in statistics:
            norm = statistics["column_norm"]
        elif "gram" in statistics:
            norm = statistics["gram"].diagonal().sqrt()
        self.shadows[linear.name] = weight.clone(), norm

    def execute(
        self, pruned: Sequence[Linear], blocks: dict[str, StoredBlocks], *, stores: bool
    ) -> dict[str, float]:
        """Tune the pruned linears. Return the output error of the layer before and after.

        Args:
            pruned: the pruned linears.
            blocks: of those on grids of llama.cpp, by parameter; they get the tuned codes.
            stores: whether the outputs of the tuned layer are stored.
        """
        before = self._output_error(stores=False)
        tuned, rounded = [], []
        for linear in pruned:
            shadow, norm = self.shadows.pop(linear.name, (None, linear.weight.new_ones(1)))
            task = self.tasks[linear.name]
            pattern, grid = task.method.pattern, task.method.solver.grid
            tuned.append(_TunedWeight(linear, shadow, norm, pattern, task.sparsity, bool(grid)))
            if (own := blocks.get(f"{linear.name}.weight")) is not None:
                rounded.append(RoundedWeight(linear, own.blocks))
            elif task.rounded and not isinstance(grid, BlockGrid):
                rounded.append(RoundedWeight(linear, grid))
        stream, index = self.inputs.calibration, self.inputs.index
        count, at_once = len(stream.windows), stream.windows_at_once
        _reconstruct(
            self.layer,
            tuned,
            draw_steps(count, at_once, self.passes, seed=index),
            self._examples,
            on_step=self.inputs.step,
            rounded=rounded,
            ranks=self.ranks,
        )
        for parameter in self.layer.parameters():
            self.ranks.share(parameter, 0)  # so no rounding of theirs can separate the processes
        for one in rounded:
            if (name := f"{one.linear.name}.weight") in blocks:
                stored = one.linear.module.get_parameter("weight")
                blocks[name] = blocks[name].recoded(stored)
        return {"error_before": before, "error_after": self._output_error(stores=stores)}

    def _examples(self, windows: Sequence[int]) -> list[tuple[Tensor, Tensor, LayerCall]]:
        """Inputs, targets and call of some windows: together, or one by one this process's."""
        stream, index = self.inputs.calibration, self.inputs.index
        mine = [w for w in windows if stream.own.start <= w < stream.own.stop]
        rows = [slice(w, w + 1) for w in mine]  # windows of a step are not neighbours
        pairs = [(self.inputs.read(row), self.dense.read(row)) for row in rows]
        if self.ranks.count > 1:
            calls = [stream.outer.call(index, [w]) for w in mine]
            return [(*pair, call) for pair, call in zip(pairs, calls, strict=True)]
        read, targets = zip(*pairs, strict=True)
        return [(torch.cat(read), torch.cat(targets), stream.outer.call(index, mine))]

    def _output_error(self, *, stores: bool) -> float:
        """The mean output error of the layer over all windows. It can also pass on the outputs."""
        total = 0.0
        for batch in self.inputs.batches:
            out, call = self.inputs.outputs(self.layer, batch), self.inputs.call(batch)
            target = call.states(self.dense.read(batch))
            # a mean over the windows of the batch, times their number
            total += float(output_error(call.states(out), target)) * len(out)
            if stores:
                self.inputs.write(batch, out)
        return sum(self.ranks.gather(total)) / len(self.inputs.calibration.windows)


class _TunedWeight:
    """A pruned matrix during tuning.

    Args:
        linear: the pruned matrix.
        shadow: its weights [out, in] before pruning; None keeps the mask fixed.
        norm: ‖x̂‖₂ of each input, float32 [in].
        pattern: which zeros are allowed.
        sparsity: the fraction of zeros.
        on_grid: whether it is rounded, so that a kept weight may be 0.
    """

    def __init__(
        self,
        linear: Linear,
        shadow: Tensor | None,
        norm: Tensor,
        pattern: Pattern,
        sparsity: float,
        on_grid: bool,
    ) -> None:
        self.linear, self.norm = linear, norm
        self.pattern, self.sparsity = pattern, sparsity
        self.parameter = linear.module.get_parameter("weight")
        weight = self.parameter.detach()
        # on a grid, a kept weight may be −0 and a pruned one is +0
        self.mask = kept_weights(weight) if on_grid else weight != 0
        self.full = None if shadow is None else self.turned(shadow)

    def turned(self, matrix: Tensor) -> Tensor:
        """Convert from [out, in] to the module's stored orientation, or back."""
        return matrix.t().contiguous() if self.linear.transposed else matrix

    def begin(self) -> None:
        """Start from the float32 parameter: kept weights as now, pruned ones as shadow weights."""
        if self.full is not None:
            self.full = torch.where(self.mask, self.parameter.detach(), self.full.float())

    def before_step(self, *, choosing: bool) -> None:
        """Give the optimizer the weights and gradients that it may change."""
        gradient = self.parameter.grad
        if gradient is not None and (self.full is None or not choosing):
            gradient *= self.mask  # without moments, a pruned weight stays zero
        if self.full is not None:
            self.parameter.data = self.full

    def after_step(self, *, choose: bool) -> None:
        """Prune the weights of the next forward again."""
        if self.full is None:
            return
        if choose:
            score = self.turned(self.full).abs() * self.norm  # Wanda's, of the shadow weights
            self.mask = self.turned(self.pattern.mask(score, self.sparsity))
        self.parameter.data = self.full * self.mask


def _reconstruct(
    layer: nn.Module,
    pruned: Sequence[_TunedWeight],
    steps: Sequence[Sequence[int]],
    examples: Callable[[Sequence[int]], Sequence[tuple[Tensor, Tensor, LayerCall]]],
    on_step: Callable[[], None],
    rounded: Sequence[RoundedWeight] = (),
    ranks: Ranks = ALONE,
) -> None:
    """Tune a pruned decoder layer in place.

    Several processes take the same steps. Each computes the gradient of its own windows of a step.
    The gradients are summed, so all processes have the same weights after every step.

    Args:
        layer: the layer with its pruned weights; tuned in float32 for any dtype.
        pruned: its pruned matrices.
        steps: the calibration windows of each step.
        examples: returns inputs and targets of the windows of a step, each [windows,
            sequence_length, hidden], and how the layer is called for them. A process returns its
            own windows, one by one.
        on_step: called after every step.
        rounded: the matrices on a grid.
        ranks: the processes.
    """
    on_grid = RoundedWeights(rounded)
    named = {n: p for n, p in layer.named_parameters() if p.is_floating_point()}
    parameters = list(named.values())
    device = parameters[0].device
    with in_float32(layer, named.keys()), on_grid.in_forwards():
        for tuned in pruned:
            tuned.begin()
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
        for step, windows in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
            for inputs, target, call in examples(windows):
                with torch.enable_grad(), fast_matmuls(device):
                    output = call_layer(layer, inputs.float(), call.to(device, torch.float32))
                    error = output_error(call.states(output), call.states(target))
                    # a process's share of the step, so that the sums of gradients are its mean
                    error = error * (len(inputs) / len(windows))
                    error.backward()
            for parameter in parameters if ranks.count > 1 else ():
                if parameter.grad is None:  # of a process without windows in this step
                    parameter.grad = torch.zeros_like(parameter)
                ranks.total(parameter.grad)
            choosing = step < _CHOOSING * len(steps)
            for tuned in pruned:
                tuned.before_step(choosing=choosing)
            optimizer.step()
            optimizer.zero_grad()
            for tuned in pruned:
                tuned.after_step(choose=choosing and step % _CHOOSE_EVERY == _CHOOSE_EVERY - 1)
            on_step()
        on_grid.settle()


def draw_steps(windows: int, size: int, passes: int, seed: int) -> list[list[int]]:
    """Return the windows of every step. Each pass reads all windows once, in its own order.

    Args:
        windows: number of windows.
        size: number of windows in a step; the last step of a pass may have fewer.
        passes: number of passes over all windows.
        seed: seed of the orders.
    """
    draw = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(passes):
        order = torch.randperm(windows, generator=draw).tolist()
        steps += [order[i : i + size] for i in range(0, windows, size)]
    return steps


@contextmanager
def in_float32(module: nn.Module, tuned: Collection[str]) -> Iterator[None]:
    """Hold floating parameters of a module in float32; only tuned ones get gradients.

    Parameters are tracked by name, so a parameter that is replaced in the meantime can be freed.

    Args:
        module: afterwards its parameters have their old dtypes and `requires_grad`, and no
            gradients.
        tuned: names of the parameters that get gradients.
    """
    before = {
        name: (p.dtype, p.requires_grad)
        for name, p in module.named_parameters()
        if p.is_floating_point()
    }
    to_float32(module)
    for name in before:
        module.get_parameter(name).requires_grad_(name in tuned)
    try:
        yield
    finally:
        for name, (dtype, wanted_gradient) in before.items():
            p = module.get_parameter(name)
            p.grad = None
            if p.dtype != dtype:
                p.data = p.data.to(dtype)
            p.requires_grad_(wanted_gradient)


def to_float32(module: nn.Module) -> None:
    """Convert floating parameters of a module to contiguous float32, in place.

    torch's fused Adam reads and writes the memory of a parameter as if it were contiguous. The
    weights of experts that are stored transposed or interleaved are not.
    """
    for p in module.parameters():
        if p.is_floating_point() and not (p.dtype == torch.float32 and p.is_contiguous()):
            p.data = p.data.float().contiguous()


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward; in the backward it is the identity within the grid, and 0 beyond."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: RoundedWeight) -> Tensor:
        """The rounded weight."""
        nearest, beyond = rounded.nearest(weight)
        ctx.save_for_backward(beyond)
        return nearest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the rounded weight, without that of clipped weights."""
        (beyond,) = ctx.saved_tensors
        return gradients[0] if beyond is None else gradients[0].masked_fill(beyond, 0.0), None


class RoundedWeight:
    """A matrix whose forwards see it rounded.

    Args:
        linear: the matrix. Its weights are on the grid; they define the scales of groups.
        grid: the grid, or the blocks of a grid of llama.cpp; None for int8, where the largest
            weight of a row always defines its scale.
    """

    def __init__(self, linear: Linear, grid: GroupGrid | Blocks | None) -> None:
        self.linear, self.grid = linear, grid
        if isinstance(grid, GroupGrid):
            _, scales = grid.quantize(linear.weight)
            self.scale = scales.values

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """A weight in the module's orientation, rounded with the scales.

        Returns:
            The rounded weight, and where it lies beyond the ends of the grid; None for nowhere.
        """
        if self.grid is None:
            return self._turned(nearest_rows(self._turned(weight))), None
        if isinstance(self.grid, Blocks):
            nearest, beyond = self.grid.nearest(self._turned(weight))
        else:
            nearest, beyond = self.grid.nearest(self._turned(weight), self.scale)
        return self._turned(nearest), self._turned(beyond)

    def _turned(self, matrix: Tensor) -> Tensor:
        """Convert from the module's orientation to [out, in], or back."""
        return matrix.t() if self.linear.transposed else matrix

    @torch.no_grad()
    def settle(self) -> None:
        """Round the parameter itself."""
        parameter = self.linear.module.get_parameter("weight")
        kept = kept_weights(parameter)
        parameter.copy_(self.nearest(parameter)[0])
        if self.grid is not None:
            mark_kept(parameter, kept)

    @contextmanager
    def in_forwards(self) -> Iterator[None]:
        """Round in every forward of the module."""
        # A module finds its parameters in this dictionary, whatever it computes with them.
        module, found = self.linear.module, self.linear.module._parameters
        held: list[nn.Parameter] = []

        def enter(module: nn.Module, args: object) -> None:
            held.append(module.get_parameter("weight"))
            found["weight"] = _StraightThrough.apply(held[0], self)

        def leave(module: nn.Module, args: object, output: object) -> None:
            found["weight"] = held.pop()

        leaving = module.register_forward_hook(leave, always_call=True)
        with module.register_forward_pre_hook(enter), leaving:
            try:
                yield
            finally:
                for weight in held:  # an interrupted forward did not leave
                    found["weight"] = weight


class RoundedWeights:
    """All matrices of a training that stay on their grids; a hook of the training loop.

    Args:
        weights: the matrices.
    """

    def __init__(self, weights: Iterable[RoundedWeight]) -> None:
        self.weights = list(weights)

    @contextmanager
    def in_forwards(self) -> Iterator[None]:
        """Round in every forward of the modules."""
        entered = [weight.in_forwards() for weight in self.weights]
        with ExitStack() as stack:
            for context in entered:
                stack.enter_context(context)
            yield

    def settle(self) -> None:
        """Round the parameters themselves."""
        for weight in self.weights:
            weight.settle()

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Round the parameters after the last step."""
        if step == steps:
            self.settle()

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: the scales belong to the model with which the training began."""
        return {}


def tuning_bytes(target: Target, windows: Tensor) -> int:
    """The memory that tuning a layer needs besides the layer, for one micro-batch of windows."""
    hidden, calls = calls_of(target, windows)

    def of(layer: nn.Module, call: LayerCall) -> int:
        weights = 4 * weights_of(layer)
        plain = next(layer.parameters()).dtype == torch.float32
        # gradients, two moments, shadow or rounded weights; float32 copies of other dtypes
        return rehearse_training(layer, hidden, call) + weights * (4 if plain else 5)

    return max(of(target.layers[i], call) for i, call, _ in layers_by_kind(target, calls))
