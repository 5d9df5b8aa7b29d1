"""Which units of a model to keep, learned together with the weights that are left.

Every KV group, neuron, layer or channel has a gate, and a Lagrange multiplier for each set of them
drives the number of open ones to the number wanted. What comes out are indices for a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.training.hard_concrete import HardConcrete

__all__ = ["Consumer", "LearnedMasks", "Shape"]

Objective = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Consumer:
    """The linear that reads the units of a sub-block: closing a gate zeroes its input columns.

    Attributes:
        name: within a decoder layer, for example `mlp.down_proj`.
        width: consecutive columns of one unit: 1 for neurons, heads of a group × head size for KV
            groups.
    """

    name: str
    width: int = 1


@dataclass(frozen=True)
class Shape:
    """How many units are to be kept; None leaves a kind alone.

    Minimised over gates and weights, maximised over λ and φ, of each set of gates with open share o
    and target share t:

        loss + Σ λ (o − t) + φ (o − t)²

    where t falls from 1 to the target over the first `warm_up` of the steps.

    Paper: Xia et al. 2023, "Sheared LLaMA: Accelerating Language Model Pre-training via Structured
    Pruning", arXiv:2310.06694. Deviations: the gates' learning rate is 0.1, not 1, which suits
    short runs; their expected number is the probability of being open, whichever gate of another
    kind may cover it.

    Args:
        groups: KV groups in every layer.
        neurons: FFN neurons in every layer.
        layers: decoder layers.
        hidden: channels of the residual stream.
        learning_rate: of Adam on gates and multipliers.
        warm_up: share of all steps.

    Raises:
        RecipeError: nothing is to be learned, or a number is out of range.
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
    """Gates on a model in training: an objective to be wrapped, and a hook of the loop.

    Args:
        model: a causal language model, which gets hooks until `remove`.
        shape: what is wanted.
        consumers: of `groups` and `neurons`, where those have targets.

    Raises:
        RecipeError: a consumer is missing or does not divide into units, a target is more than
            there is, or it is not known what writes to the residual stream.
    """

    def __init__(self, model: Any, shape: Shape, consumers: Mapping[str, Consumer]) -> None:
        self.shape = shape
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
        self.aims = dict.fromkeys(self.sets, 1.0)
        gates = [x.log_alpha for x in self.sets.values()]
        self.down = torch.optim.Adam(gates, lr=shape.learning_rate)
        self.up = torch.optim.Adam([self.multipliers], lr=shape.learning_rate, maximize=True)

    def objective(self, inner: Objective) -> Objective:
        """The loss of a training loop with the multipliers' terms, for gates drawn anew."""

        def gated(model: Any, batch: Any) -> Tensor:
            self.draw()
            loss = inner(model, batch)
            away = [x.open_share() - self.aims[name] for name, x in self.sets.items()]
            apart = torch.stack(away)
            return loss + (self.multipliers * torch.stack([apart, apart**2], 1)).sum()

        return gated

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`: gates go down, multipliers up."""
        self.down.step()
        self.up.step()
        self.down.zero_grad()
        self.up.zero_grad()
        gone = min(1.0, step / max(1.0, self.shape.warm_up * steps))
        self.aims = {name: 1 - gone * (1 - x.target / x.units) for name, x in self.sets.items()}

    def draw(self) -> None:
        """Gates for the forwards to come, drawn, or 0 and 1 once they are settled."""
        self.drawn = {n: x.settled() if self.hard else x.sample() for n, x in self.sets.items()}

    def settle(self) -> dict[str, Any]:
        """Close for good what is not kept; what is, as the fields of a cut.

        Returns:
            `layers` and `hidden` as indices, `groups` and `neurons` as indices by layer, for the
            layers that are kept; only what had a target.
        """
        self.hard = True
        self.draw()
        kept: dict[str, Any] = {}
        for name, gates in self.sets.items():
            kind, _, layer = name.partition(" ")
            if layer:
                kept.setdefault(kind, {})[int(layer)] = gates.kept()
            else:
                kept[kind] = gates.kept()
        staying = kept.get("layers", range(len(self.layers)))
        return {
            kind: {i: units for i, units in value.items() if i in staying}
            if isinstance(value, dict)
            else value
            for kind, value in kept.items()
        }

    def remove(self) -> None:
        """Take the hooks off the model: all gates are open."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    # -- where gates sit ------------------------------------------------------------------------

    def _gate_consumers(self, kind: str, consumers: Mapping[str, Consumer]) -> None:
        """Gates on the input columns of a linear of every layer."""
        if kind not in consumers:
            raise RecipeError(f"which linear reads the {kind}?", remedy=f"give consumers[{kind!r}]")
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
        """A gate on what each layer adds to the residual stream."""
        self.sets["layers"] = HardConcrete(len(self.layers), target, self.device)
        for index, layer in enumerate(self.layers):
            hook = partial(self._times_layer, index=index)
            self.handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def _gate_hidden(self, model: Any, target: int) -> None:
        """Gates on the stream where it begins, and on all that is added to it."""
        writers = self.architecture.writers
        if not writers:
            raise RecipeError(
                f"it is not known what writes to the residual stream of {self.architecture.family}",
                remedy="leave hidden out; families that declare `writers` can have it",
            )
        width = int(model.config.hidden_size)
        self.sets["hidden"] = HardConcrete(width, target, self.device)
        first = partial(self._times_inputs, name="hidden", width=1)
        self.handles.append(self.layers[0].register_forward_pre_hook(first))
        for layer in self.layers:
            for writer in writers:
                linear = layer.get_submodule(writer)
                self.handles.append(linear.register_forward_hook(self._times_outputs))

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
