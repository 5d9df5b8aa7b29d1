"""Learned masks: the model learns which units to keep while its weights train.

Every KV group, neuron, layer or channel has a gate. For each set of gates, two Lagrange multipliers
drive the number of open gates to its target. The result is the indices of a structured cut.

The gates are hard concrete: they can be exactly 0 or 1 and still have gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.training.batches import Batch
from secateur.training.objectives import Objective


@dataclass(frozen=True)
class Consumer:
    """The linear that reads the units of a sub-block. A closed gate zeroes its input columns.

    Attributes:
        name: name within a decoder layer, for example `mlp.down_proj`.
        width: number of consecutive columns of one unit. A neuron has 1; a KV group has its heads ×
            the head size.
    """

    name: str
    width: int = 1


@dataclass(frozen=True)
class Shape:
    """How many units stay. None keeps all units of a kind.

    For each set of gates with open share o and target share t, the weights and gates minimise, and
    λ and φ maximise

        loss + Σ λ (o − t) + φ (o − t)²

    where t falls from 1 to the target over the first `warm_up` of the steps.

    Paper: Xia et al. 2023, "Sheared LLaMA: Accelerating Language Model Pre-training via Structured
    Pruning", arXiv:2310.06694. Deviations: the learning rate of the gates is 0.1, not 1, which
    suits short runs; o counts each set separately, while the paper multiplies the gates of
    different kinds that cover the same weight; kept gates become 1, while the paper multiplies
    their last value into the weights.

    Args:
        groups: number of KV groups in every layer.
        neurons: number of FFN neurons in every layer.
        layers: number of decoder layers.
        hidden: number of channels of the residual stream.
        learning_rate: learning rate of Adam on gates and multipliers.
        warm_up: share of all steps in which t falls.

    Raises:
        RecipeError: no kind has a target, or a number is out of range.
    """

    groups: int | None = None
    neurons: int | None = None
    layers: int | None = None
    hidden: int | None = None
    learning_rate: float = 0.1
    warm_up: float = 0.3

    def __post_init__(self) -> None:
        if {self.groups, self.neurons, self.layers, self.hidden} == {None}:
            raise RecipeError(
                "no kind of unit has a target", remedy="give groups, neurons, layers or hidden"
            )
        if not self.learning_rate > 0 or not 0 <= self.warm_up <= 1:
            raise RecipeError(
                f"learning_rate {self.learning_rate}, warm_up {self.warm_up}",
                remedy="give a positive rate, 0.1 is usual, and a share of the steps",
            )


class LearnedMasks:
    """Gates on a model in training. They wrap the loss (`objective`) and are a hook of the loop.

    The draw of the gates depends only on the seed, the step and the number of the draw in that
    step, so a resumed training draws the same gates.

    Args:
        model: a causal language model; it has forward hooks until `remove`.
        shape: the target numbers of units.
        consumers: the linears that read `groups` and `neurons`, if these have targets.
        seed: seed of the draws.

    Raises:
        RecipeError: a consumer is missing or does not divide into units, a target is out of range,
            or the family does not declare what writes to the residual stream.
    """

    def __init__(
        self, model: Any, shape: Shape, consumers: Mapping[str, Consumer], seed: int = 0
    ) -> None:
        self.shape, self.seed = shape, seed
        self.hard = False
        self.sets: dict[str, HardConcrete] = {}
        self.handles: list[Any] = []
        self.architecture = describe(model)
        self.layers = list(self.architecture.layers(model))
        self.device = next(model.parameters()).device
        self.drawn: dict[str, Tensor] = {}
        for kind in ("groups", "neurons"):
            if getattr(shape, kind) is not None:
                self._gate_consumers(kind, consumers)
        if shape.layers is not None:
            self._gate_layers(shape.layers)
        if shape.hidden is not None:
            self._gate_hidden(model, shape.hidden)
        self.multipliers = torch.zeros(len(self.sets), 2, device=self.device, requires_grad=True)
        self.progress = torch.zeros(2, dtype=torch.int64)
        self.draws = 0
        gates = [x.log_alpha for x in self.sets.values()]
        self.down = _begun(torch.optim.Adam(gates, lr=shape.learning_rate))
        self.up = _begun(
            torch.optim.Adam([self.multipliers], lr=shape.learning_rate, maximize=True)
        )

    def objective(self, inner: Objective) -> Objective:
        """Return the loss with new gates, plus the terms of the multipliers."""

        def gated(model: Any, batch: Batch) -> Tensor:
            self.draw()
            loss, targets = inner(model, batch), self.targets()
            apart = torch.stack([x.open_share() - targets[n] for n, x in self.sets.items()])
            return loss + (self.multipliers * torch.stack([apart, apart**2], 1)).sum()

        return gated

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`: gates go down, multipliers up."""
        self.down.step()
        self.up.step()
        self.down.zero_grad()
        self.up.zero_grad()
        self.progress.copy_(torch.tensor([step, steps]))
        self.draws = 0

    def state(self) -> dict[str, Tensor]:
        """Gates, multipliers, their moments, and the progress of the training."""
        tensors: dict[str, Tensor] = {f"gates/{n}": x.log_alpha for n, x in self.sets.items()}
        tensors |= {"multipliers": self.multipliers, "progress": self.progress}
        owners = {id(tensor): name for name, tensor in tensors.items()}
        for optimizer in (self.down, self.up):
            for parameter, moments in optimizer.state.items():
                name = owners[id(parameter)]
                tensors |= {f"{key}/{name}": value for key, value in moments.items()}
        return tensors

    def targets(self) -> dict[str, float]:
        """The current target for the open share of each set."""
        step, steps = self.progress.tolist()
        gone = min(1.0, step / max(1.0, self.shape.warm_up * steps))
        return {name: 1 - gone * (1 - x.target / x.units) for name, x in self.sets.items()}

    def draw(self) -> None:
        """Draw new gates for the next forwards. Settled gates are 0 and 1."""
        if self.hard:
            self.drawn = {name: gates.settled() for name, gates in self.sets.items()}
            return
        number = (self.seed * 1_000_003 + int(self.progress[0])) * 1_009 + self.draws
        random = torch.Generator().manual_seed(number % 2**63)
        self.drawn = {name: gates.sample(random) for name, gates in self.sets.items()}
        self.draws += 1

    def settle(self) -> dict[str, Any]:
        """Open the kept gates and close the others permanently.

        Returns:
            The fields of a cut: `layers` and `hidden` as indices, `groups` and `neurons` as indices
            by kept layer. Kinds without a target are not in it.
        """
        self.hard = True
        self.draw()
        layers, kept = self.sets.get("layers"), dict[str, Any]()
        staying = range(len(self.layers)) if layers is None else layers.kept()
        for name, gates in self.sets.items():
            kind, _, layer = name.partition(" ")
            if not layer:
                kept[kind] = gates.kept()
            elif int(layer) in staying:
                kept.setdefault(kind, {})[int(layer)] = gates.kept()
        return kept

    def remove(self) -> None:
        """Remove the hooks from the model. All gates are then open."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    # -- where the gates are --------------------------------------------------------------------

    def _gate_consumers(self, kind: str, consumers: Mapping[str, Consumer]) -> None:
        """Put gates on the input columns of a linear in every layer."""
        if kind not in consumers:
            raise RecipeError(
                f"no linear is named that reads the {kind}", remedy=f"give consumers[{kind!r}]"
            )
        consumer, target = consumers[kind], getattr(self.shape, kind)
        for index, layer in enumerate(self.layers):
            linear = layer.get_submodule(consumer.name)
            weight = linear.get_parameter("weight")
            columns = int(weight.shape[1 if isinstance(linear, nn.Linear) else 0])
            if columns % consumer.width:
                raise RecipeError(
                    f"{columns} columns do not divide into {kind} of {consumer.width}",
                    where=f"{self.architecture.layer_name(index)}.{consumer.name}",
                    remedy="heads of a group times head size is the width of a KV group",
                )
            name = f"{kind} {index}"
            self.sets[name] = HardConcrete(columns // consumer.width, target, self.device)
            self.handles.append(
                linear.register_forward_pre_hook(
                    partial(self._times_inputs, name=name, width=consumer.width)
                )
            )

    def _gate_layers(self, target: int) -> None:
        """Put a gate on the term that each layer adds to the residual stream."""
        self.sets["layers"] = HardConcrete(len(self.layers), target, self.device)
        for index, layer in enumerate(self.layers):
            hook = partial(self._times_layer, index=index)
            self.handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def _gate_hidden(self, model: Any, target: int) -> None:
        """Put gates on the start of the residual stream, and on every term added to it."""
        writers = self.architecture.writers
        if not writers or self.architecture.experts is not None:
            raise RecipeError(
                f"the family {self.architecture.family} does not declare all linears that write to "
                "the residual stream, so channels have no gates",
                remedy="leave hidden out",
            )
        width = int(model.config.hidden_size)
        self.sets["hidden"] = HardConcrete(width, target, self.device)
        first = partial(self._times_inputs, name="hidden", width=1)
        self.handles.append(self.layers[0].register_forward_pre_hook(first))
        for layer in self.layers:
            for name, module in layer.named_modules():
                if name in writers:
                    self.handles.append(module.register_forward_hook(self._times_outputs))

    def _times_inputs(
        self, module: nn.Module, inputs: tuple[Any, ...], *, name: str, width: int
    ) -> tuple[Any, ...] | None:
        if name not in self.drawn:
            return None
        gates = self.drawn[name].repeat_interleave(width)
        return (inputs[0] * gates.to(inputs[0].dtype), *inputs[1:])

    def _times_outputs(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        gates = self.drawn.get("hidden")
        return output if gates is None else output * gates.to(output.dtype)

    def _times_layer(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Any, output: Any, *, index: int
    ) -> Any:
        if "layers" not in self.drawn:
            return output
        before = inputs[0] if inputs else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        gate = self.drawn["layers"][index].to(after.dtype)
        mixed = before + gate * (after - before)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def _begun(optimizer: torch.optim.Adam) -> torch.optim.Adam:
    """Return an optimizer that already has its moments; torch makes them at the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


_TEMPERATURE = 2 / 3
_LOW, _HIGH = -0.1, 1.1
_START = 3.0


class HardConcrete(nn.Module):
    """z = clamp(s · (ζ − γ) + γ, 0, 1),  s = σ((log u − log(1 − u) + log α) / β),  u uniform.

        P(z ≠ 0) = σ(log α − β log(−γ / ζ))               β = 2/3, γ = −0.1, ζ = 1.1
        P(z = 1) = σ(log α − β log((1 − γ) / (ζ − 1)))

    Gates begin at log α = 3, where P(z ≠ 0) = 0.990 and P(z = 1) = 0.802.

    Paper: Louizos et al. 2018, "Learning Sparse Neural Networks through L₀ Regularization",
    arXiv:1712.01312.

    Args:
        units: number of gates.
        target: number of gates that stay open at the end.
        device: where the gates are.

    Raises:
        RecipeError: the target is not between 1 and the number of gates.
    """

    def __init__(self, units: int, target: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if not 1 <= target <= units:
            raise RecipeError(
                f"the target keeps {target} of {units} units", remedy=f"give 1 to {units}"
            )
        self.units, self.target = units, target
        self.log_alpha = nn.Parameter(torch.full((units,), _START, device=device))

    def sample(self, random: torch.Generator) -> Float[Tensor, " units"]:
        """Draw the gates of one forward independently.

        Args:
            random: a generator on the CPU, so that the draws are the same on every device.
        """
        tiny = torch.finfo(torch.float32).eps
        u = torch.rand(self.units, generator=random).clamp_(tiny, 1 - tiny)
        u = u.to(self.log_alpha.device)
        s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / _TEMPERATURE)
        return (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def open_share(self) -> Float[Tensor, ""]:
        """The expected share of gates that are not 0; a scalar."""
        return torch.sigmoid(self.log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).mean()

    def kept(self) -> tuple[int, ...]:
        """The `target` units that are open most often, ascending. Ties go to the later unit."""
        return tuple(self._kept_units().tolist())

    def settled(self) -> Float[Tensor, " units"]:
        """Return 1 for the kept units and 0 for the others. This never waits for a GPU."""
        return torch.zeros_like(self.log_alpha).index_fill_(0, self._kept_units(), 1.0)

    @torch.no_grad()
    def _kept_units(self) -> Int64[Tensor, " target"]:
        """Return the indices in ascending order. The sort is stable; `topk` orders ties freely."""
        return self.log_alpha.argsort(stable=True)[self.units - self.target :].sort().values
