"""Tunes the mixtures of a cut model, layer by layer, after experts were removed.

    inputs of both models ─► dense layer ─► refit, adoption, router, refit ─► the next layer

The target of a layer is the dense layer's output on the dense model's inputs; its inputs are those
that it has in the cut model. All parts minimise the relative error of a token (`output_error`),

    mean_t ‖y_t − ŷ_t‖² / ‖y_t‖²

* **The router.** Its own parameters learn by Adam, through the model's own forward with its own
  choice of experts. Gradients reach the weights of the chosen experts only. A correction that only
  chooses has no gradient, so it stays.
* **The `down_proj` D_e of each expert**, by least squares on the tokens that the router sends to
  it. With a_t its inputs, g_t the router's weight, ω_t = 1 / ‖y_t‖ and r_t = y_t − ŷ_t:

      min over D_e:  Σ_t ω_t² ‖r_t + g_t (D_e⁰ − D_e) a_t‖² + λ ‖D_e − A_e‖²      (`dense_target`)

  A_e is the weight that the cut left. The experts are solved in turn, each with the residuals that
  those before it left, and twice. That approaches the joint solution of all experts (block
  coordinate descent), and only the gram of one expert is in memory. It needs a stream to which the
  mixture adds its output, perhaps times a constant; where a norm or another linear comes first, the
  `down_proj` stay.

* **Neurons of removed experts**, which those that stay adopt instead of their own
  (`adopt`), under the same condition.

Every 8th window is held out. A part that does not lower the error on these windows is taken back.

Paper: Hyeon and Do 2026, "Is Retraining-Free Enough? The Necessity of Router Calibration for
Efficient MoE Compression", arXiv:2603.02217. Deviations: the paper learns from the next-token
predictions of the dense model with the whole cut model in memory, and no expert changes. Here each
layer learns from the dense layer. The distillation of a cut model follows with `thorough` and
`best`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.prune.reconstruction import draw_steps, output_error
from secateur.engine.prune.refit import SideBySide
from secateur.engine.stream.calibration_stream import LayerInputs, OpenStream
from secateur.engine.stream.calls import LayerCall, call_layer
from secateur.engine.stream.layerwise import only_learning
from secateur.machine import full_float32, reused_pages
from secateur.models.architecture import hidden_size
from secateur.models.expert_layout import Experts
from secateur.models.experts import Expert, ExpertActivation, OpenExperts, Sent
from secateur.models.targets import Target
from secateur.registry import float32_bytes
from secateur.runs.records import Layer
from secateur.sparsity.hessian import dense_target
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.solvers.osscar import OSSCAR

HOLD_OUT = 8
"""One of so many windows is held out, and one of fewer. With a single window nothing is tuned."""

STEPS = 200
"""The fewest steps in which a router learns."""

RATE = 0.5
"""The first learning rate of a router times the hidden size; it falls along a half cosine to 0. A
step moves a logit by at most about this."""

SWEEPS, DAMPING = 2, 0.01
"""How often the experts are solved in turn, and λ as a fraction of the gram's mean diagonal."""

FIT_BYTES = 4 << 30
"""Least squares read so many bytes of experts' inputs and residuals at most."""

SAMPLE, BATCHES = 2048, 32
"""So many tokens say which neurons an expert is offered, and half leave in so many batches."""

_PROBE = 64.0


class RouterTuning(SideBySide):
    """The tuning of the mixtures of one cut model; see the module.

    Args, besides those of `SideBySide`:
        kept: the experts of the uncut model that stay, by number of the layer.
        fixed: names of parameters that may not change.
    """

    def __init__(self, *args: Any, kept: Mapping[int, Sequence[int]], fixed: Iterable[str]) -> None:
        super().__init__(*args)
        self.fixed, self.kept = fixed, kept

    @torch.no_grad()
    @full_float32()
    def execute(self, done: int = 0) -> None:
        """Tune every layer of the cut model from number `done` on."""
        count = len(self.layers)
        if done == count:
            return
        with reused_pages():
            dense, cut = self.open(done)
            plan = _Windows.of(len(self.cut.windows), self.cut.windows_at_once)
            for size in {len(own) for own in (*plan.learned, *plan.held_out)}:
                self.cut.outer.calls(size)  # recorded before any layer has its weights
            self.progress.start("tuning routers", 2 * (count - cut.start) * len(cut.batches()))
            for place in range(cut.start, count):
                self._tune_layer(place, dense, cut, plan)
            for opened in (dense, cut):
                opened.hidden.forget(count)
        self.progress.finish()

    def _tune_layer(self, place: int, dense: OpenStream, cut: OpenStream, plan: _Windows) -> None:
        """Tune and record one layer."""
        started, target, errors = time.perf_counter(), self.cut.target, dict[str, float]()
        outputs, inputs = self.inputs(dense, self.layers[place]), self.inputs(cut, place)
        experts = target.architecture.experts
        with self.dense.target.layer(self.layers[place]) as twin, target.layer(place) as layer:
            outputs.pass_through(twin)
            dense.advance(self.layers[place] + 1)
            assert experts is not None
            if experts.module in dict(layer.named_modules()) and plan.held_out:
                one = _MixtureTuning(layer, experts, inputs, outputs, plan)
                every: Any = twin.get_submodule(experts.module)
                kept = self.kept.get(self.layers[place], range(len(every)))
                removed = [each for number, each in enumerate(every) if number not in kept]
                prefix = f"{target.architecture.layer_name(place)}."
                errors = one.execute(removed, {n.removeprefix(prefix) for n in self.fixed})
                target.commit(place, [prefix + name for name in sorted(one.changed)])
            inputs.pass_through(layer)
        cut.advance(place + 1)
        seconds = time.perf_counter() - started
        self.ledger.finish_layer(
            Layer(layer=place, seconds=seconds, linears=(), reconstruction=errors)
        )
        dense.forget_before(self.layers[place] + 1)
        cut.forget_before(place + 1)


def mixture_bytes(target: Target, tokens: int) -> int:
    """What tuning a mixture takes besides two layers and their forwards, at most.

    These are the weights that are taken back, what the least squares read (`FIT_BYTES`), and
    the largest system: the neurons of an expert and as many that it is offered.

    Args:
        target: the uncut model, layers on the meta device.
        tokens: of the calibration.
    """
    described, most = target.architecture.experts, 0
    for layer in target.layers:
        opened: Any = next((m for m in layer.modules() if isinstance(m, OpenExperts)), None)
        if opened is None or described is None:
            continue
        hidden, neurons = opened[0].down_proj.weight.shape
        weights = sum(p.numel() for p in opened.parameters()) * target.dtype.itemsize
        sent = tokens * (described.per_token(target.model.config) or len(opened))
        read = sent * max(hidden, neurons) * target.dtype.itemsize + 2 * tokens * hidden * 4
        # values of the neurons for the tokens of an expert that has twice as many as the mean
        values = 2 * sent // len(opened) * 2 * neurons * 4
        shape = hidden, 2 * neurons
        system = OSSCAR(DAMPING).working_bytes(shape) + float32_bytes((2 * neurons, 2 * neurons))
        most = max(most, weights + min(read, FIT_BYTES) + min(values, FIT_BYTES) + system)
    return most


@dataclass(frozen=True)
class _Windows:
    """The windows of each forward.

    Attributes:
        steps: of the learning router.
        learned: all that are learned from, in micro-batches.
        held_out: all others, in micro-batches; empty if there are too few windows.
    """

    steps: Sequence[Sequence[int]]
    learned: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]

    @classmethod
    def of(cls, count: int, at_once: int) -> _Windows:
        """Divide windows; `at_once` of them are a micro-batch."""
        held = range(min(HOLD_OUT, count) - 1, count if count > 1 else 0, HOLD_OUT)
        own = [number for number in range(count) if number not in held]
        passes = -(-STEPS // -(-len(own) // at_once))
        drawn = draw_steps(len(own), at_once, passes, seed=0)
        return cls(
            [[own[place] for place in places] for places in drawn],
            [own[start : start + at_once] for start in range(0, len(own), at_once)],
            [held[start : start + at_once] for start in range(0, len(held), at_once)],
        )


_Part = tuple[str, Sequence[str], Callable[[], None]]
"""A part of the tuning: its name, the parameters that it changes, the work."""


class _MixtureTuning:
    """The tuning of one layer.

    Args:
        layer: the layer, with its experts opened.
        experts: where they and the router are.
        inputs: the hidden states of the cut model at the layer.
        outputs: those of the dense model behind it.
        plan: the windows of each forward.

    Attributes:
        changed: names of the parameters that have new values.
    """

    def __init__(
        self,
        layer: nn.Module,
        experts: Experts,
        inputs: LayerInputs,
        outputs: LayerInputs,
        plan: _Windows,
    ) -> None:
        self.layer, self.inputs, self.outputs = layer, inputs, outputs
        self.plan, self.changed = plan, set[str]()
        self.rate = RATE / hidden_size(inputs.calibration.target.model)
        module = layer.get_submodule(experts.module)
        assert isinstance(module, OpenExperts)
        self.experts = module
        down, names = experts.layout.projections[-1], dict(layer.named_parameters())
        self.down = [f"{experts.module}.{e}.{down}.weight" for e in range(len(module))]
        self.all = [name for name in names if name.startswith(f"{experts.module}.")]
        of_router = (name for name in names if name.startswith(f"{experts.router}."))
        self.router = [name for name in of_router if names[name].is_floating_point()]

    def execute(self, removed: Sequence[Expert], fixed: set[str]) -> dict[str, float]:
        """Tune the layer. Return its error on the windows that are held out, after each part.

        Args:
            removed: the experts of the uncut layer that went.
            fixed: names of parameters that may not change.
        """
        least, scale = self._error(), None if fixed.intersection(self.all) else self._scale()
        found, parts = {"error_before": least}, list[_Part]()
        if own := [name for name in self.router if name not in fixed]:
            parts = [("router", own, partial(self._learn, own))]
        if scale is not None:
            fit = partial(self._fit, scale)
            parts = [("refit", self.down, fit), *parts, ("refit_again", self.down, fit)]
            if removed:
                parts.insert(1, ("adoption", self.all, partial(self._fit, scale, removed)))
        for part, names, change in parts:
            before = {name: self.layer.get_parameter(name).clone() for name in names}
            change()
            error = self._error()
            if error < least:
                least = error
                self.changed.update(names)
            else:  # also where it is not a number
                for name, value in before.items():
                    self.layer.get_parameter(name).copy_(value)
            found[f"after_{part}"] = least
        return found | {"error_after": least}

    def _example(self, windows: Sequence[int]) -> tuple[Tensor, Tensor, LayerCall]:
        """Inputs, targets and call of some windows."""
        rows = [slice(window, window + 1) for window in windows]
        x, y = (torch.cat([own.read(row) for row in rows]) for own in (self.inputs, self.outputs))
        call = self.inputs.calibration.outer.call(self.inputs.index, windows)
        return x, call.states(y), call

    def _outputs(self, x: Tensor, call: LayerCall) -> Tensor:
        """The hidden states behind the layer."""
        with self.inputs.matmuls():
            return call.states(call_layer(self.layer, x, call))

    def _error(self) -> float:
        """The error on the windows that are held out."""
        total = 0.0
        for windows in self.plan.held_out:
            x, y, call = self._example(windows)
            total += float(output_error(self._outputs(x, call), y)) * len(windows)
        return total / sum(map(len, self.plan.held_out))

    def _learn(self, names: Sequence[str]) -> None:
        """Let the router learn. It computes in the model's dtype and adds up steps in float32."""
        own = [self.layer.get_parameter(name) for name in names]
        exact = [nn.Parameter(p.detach().float().clone()) for p in own]
        optimizer, steps = torch.optim.Adam(exact, lr=self.rate), self.plan.steps
        with only_learning(self.layer, own):
            for step, windows in enumerate(steps):
                x, y, call = self._example(windows)
                with torch.enable_grad():
                    error = output_error(self._outputs(x, call), y)
                if not error.requires_grad:  # no weight depends on the router
                    return
                error.backward()
                for master, p in zip(exact, own, strict=True):
                    master.grad = None if p.grad is None else p.grad.float()
                    p.grad = None
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
                optimizer.step()
                for master, p in zip(exact, own, strict=True):
                    p.copy_(master)

    def _scale(self) -> float | None:
        """The number c in: output of the layer = rest + c · output of the experts; None if none."""
        x, _, call = self._example(self.plan.held_out[0])
        before, seen = self._outputs(x, call).float(), list[Tensor]()

        def enlarge(module: nn.Module, args: object, out: Tensor) -> Tensor:
            seen.append(out)
            return out * (1 + _PROBE)

        with self.experts.register_forward_hook(enlarge):
            change = self._outputs(x, call).float() - before
        # Llama 4 hands every expert all tokens, and adds up what they return
        added = _PROBE * seen[0].float().view(-1, change[..., 0].numel(), seen[0].shape[-1]).sum(0)
        if added.numel() != change.numel():
            return None
        added = added.view_as(change)
        scale = float((change * added).sum() / added.square().sum())
        rest = (change - scale * added).norm()
        return scale if scale and bool(rest < 0.02 * change.norm()) else None

    def _fit(self, scale: float, removed: Sequence[Expert] = ()) -> None:
        """Refit the `down_proj` of all experts in turn, or let them adopt neurons."""
        fit, seen = _DownFit(len(self.experts)), list[tuple[Tensor, Sent]]()
        stage = self.experts.stages[0 if removed else -1]
        watch = stage.register_forward_hook
        for windows in self.plan.learned:
            x, y, call = self._example(windows)
            seen.clear()
            with watch(lambda _, args, __: seen.append((stage.inputs(*args), args[1]))):
                left = y.float() - self._outputs(x, call).float()
            size = y.float().flatten(0, -2).norm(dim=-1, keepdim=True)
            fit.add(seen, left.flatten(0, -2), size.clamp_min(1e-30))
            if fit.bytes > FIT_BYTES:
                break
        if removed:
            fit.adopt(self.experts, removed, scale)
        else:
            fit.solve([self.layer.get_parameter(name) for name in self.down], scale)


class _DownFit:
    """Least squares of the experts in turn.

    Args:
        experts: their number.
    """

    def __init__(self, experts: int) -> None:
        self.of = [list[tuple[Tensor, Tensor, Tensor]]() for _ in range(experts)]
        self.left, self.weights = list[Tensor](), list[Tensor]()
        self.bytes = self.tokens = 0

    def add(self, seen: Sequence[tuple[Tensor, Sent]], left: Tensor, size: Tensor) -> None:
        """Keep what some windows need.

        Args:
            seen: inputs of linears [sent, in], and who receives them.
            left: r of each token, float32 [tokens, hidden].
            size: ‖y‖ of each token, float32 [tokens, 1].
        """
        for x, sent in seen:
            parts = (own.split(sent.counts) for own in (x, sent.rows % len(left), sent.weights))
            for e, inputs, rows, weights in zip(sent.experts, *parts, strict=True):
                self.of[e].append((inputs, rows + self.tokens, weights))
            self.bytes += x.nbytes
        self.left.append(left / size)
        self.weights.append(1 / size)
        self.bytes, self.tokens = self.bytes + left.nbytes, self.tokens + len(left)

    def solve(self, matrices: Sequence[Tensor], scale: float) -> None:
        """Change the matrices [hidden, neurons] in place; those without tokens stay.

        Args:
            matrices: of all experts.
            scale: what the model multiplies the sum of their outputs by.
        """
        anchors = [matrix.detach().clone() for matrix in matrices]
        left = torch.cat(self.left)
        for _ in range(SWEEPS):
            for e, inputs, rows, factors in self._each(scale):
                matrix, z = matrices[e], inputs.float() * factors
                gram, now = z.T @ z, matrix.to(torch.float32, copy=True)
                if gram.any():
                    moments = left[rows].T @ z + now @ gram
                    matrix.copy_(dense_target(gram, moments, anchors[e].float(), DAMPING))
                    left[rows] += z @ (now - matrix.float()).T

    def adopt(self, experts: OpenExperts, removed: Sequence[Expert], scale: float) -> None:
        """Let experts adopt neurons of those that were removed; those without tokens stay.

        Args:
            experts: those that stay; what was added are the inputs of their first linears.
            removed: those that were removed.
            scale: as in `solve`.
        """
        left, (activation,) = torch.cat(self.left), experts.activation
        for e, inputs, rows, factors in self._each(scale):
            expert: Any = experts[e]
            left[rows] = adopt(expert, removed, activation, inputs, factors, left[rows], DAMPING)

    def _each(self, scale: float) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Each expert that has tokens: its number, their inputs, their rows, and c ω g of each."""
        size = torch.cat(self.weights)
        for e, own in enumerate(self.of):
            if own:
                inputs, rows, weights = (torch.cat(parts) for parts in zip(*own, strict=True))
                yield e, inputs, rows, scale * weights.float() * size[rows]


def adopt(
    expert: Expert,
    removed: Sequence[Expert],
    activation: ExpertActivation,
    inputs: Tensor,
    weights: Tensor,
    left: Tensor,
    damping: float,
) -> Tensor:
    """Let an expert that stays adopt neurons of removed ones instead of its own, in place.

    The router sends tokens of removed experts to those that stay. For these tokens let r_t be the
    residual of the layer, ω_t the weight in the error, and g_t what the model multiplies the
    output of the expert by. A neuron q of a removed expert, with the value h_q, alone lowers the
    error by

        ‖Σ_t z_qt ω_t r_t‖² / Σ_t z_qt²,    z_qt = ω_t g_t h_qt

    As many as the expert has, the best on up to `SAMPLE` tokens, are put beside its own. The
    columns of `down_proj` for all of them are least squares (`dense_target`; anchor: those of the
    expert, and 0). The solver `osscar` removes half of them again, in about `BATCHES` batches,
    after each of which the others make up for it. Rows of gate and up, and their biases, go with
    their neurons.

    Merging as in REAM (Jha et al. 2026, arXiv:2604.04356) averages whole experts. Here the better
    neurons stay as they are, and only `down_proj` gets new values.

    Args:
        expert: an expert that stays, with n neurons.
        removed: the experts that were removed; they do not change.
        activation: what experts compute between their linears.
        inputs: x of the tokens that the expert receives, [tokens, in].
        weights: ω g of each, float32 [tokens, 1].
        left: ω r of each, float32 [tokens, hidden].
        damping: λ of the least squares as a fraction of the gram's mean diagonal.

    Returns:
        `left` after the exchange.

    Raises:
        NumericalError: the inputs are not finite, or zero everywhere.
    """
    last, rows = _rows(expert)
    neurons = last.weight.shape[1]
    some, gains = slice(None, None, max(1, -(-len(inputs) // SAMPLE))), []
    for other in removed:
        z = _values(_rows(other)[1], activation, inputs[some]) * weights[some]
        gains.append((left[some].T @ z).square().sum(0) / z.square().sum(0).clamp_min(1e-30))
    order = torch.cat(gains).argsort(descending=True, stable=True)[:neurons]
    offered = torch.zeros(sum(map(len, gains)), dtype=torch.bool, device=order.device)
    parts = offered.index_fill(0, order, True).split([*map(len, gains)])
    # in each linear before the last, its own neurons, then those that it is offered
    pool: _Rows = [
        [
            None
            if own is None
            else torch.cat([own, *(x[part] for x, part in zip(others, parts, strict=True))])
            for own, *others in zip(*pairs, strict=True)
        ]
        for pairs in zip(rows, *(_rows(other)[1] for other in removed), strict=True)
    ]
    z = _values(pool, activation, inputs) * weights
    gram, now = z.T @ z, nn.functional.pad(last.weight.float(), (0, neurons))
    if not gram.any():
        return left
    best = dense_target(gram, left.T @ z + now @ gram, now, damping)
    solver = OSSCAR(damping, max(OSSCAR.batch, neurons // BATCHES))
    found = solver.choose(best, solver.prepare({"gram": gram}), parse_pattern("*x1"), 0.5)
    stays, place = found.mask[0], torch.arange(neurons, device=z.device)
    # what is adopted takes the places of what goes
    place[~stays[:neurons]] = neurons + stays[neurons:].nonzero().flatten()
    for old, new in zip(chain(*rows), chain(*pool), strict=True):
        if old is not None:
            old.copy_(new[place])
    last.weight.copy_(found.weight[:, place])
    return left + z @ now.T - z[:, place] @ last.weight.float().T


_Rows = Sequence[Sequence[Any]]
"""Weight and bias of some neurons, in each linear before the activation."""


def _rows(expert: Expert) -> tuple[Any, _Rows]:
    """The last linear of an expert, and the neurons before it."""
    *first, last = expert.children()
    return last, [(linear.weight, linear.bias) for linear in first]


def _values(rows: _Rows, activation: ExpertActivation, inputs: Tensor) -> Tensor:
    """What neurons give for inputs [tokens, in], float32 [tokens, neurons]."""
    found: Tensor = activation(*(nn.functional.linear(inputs, *pair) for pair in rows))
    return found.float()
