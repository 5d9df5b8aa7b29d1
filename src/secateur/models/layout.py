"""How a family lays out its parameters: what must be cut together, and where experts are.

**Couplings.** A dimension of a decoder is spread over many parameters. An FFN neuron is a row of
two matrices and a column of a third. A KV group is a run of rows in three matrices and of columns
in a fourth. A channel of the residual stream is an entry of nearly every parameter. `Couplings`
describes this as data.

An axis has the name of the units along it:

| name        | along it                                                                        |
|-------------|---------------------------------------------------------------------------------|
| `hidden`    | channels of the residual stream                                                 |
| `embedding` | the same, unless the embedding is narrower and projected                        |
| `queries`   | query heads, those of a KV group together: groups × heads per group × head size |
| `heads`     | one value for each query head                                                   |
| `keys`      | key or value heads: groups × head size                                          |
| `triples`   | query, key and value of one head after another: heads × 3 × head size           |
| `pairs`     | query and gate of one head after another: heads × 2 × head size                 |
| `parts`     | what latent attention computes for each head, of any size: heads × size         |
| `neurons`   | FFN neurons                                                                     |
| `state`     | channels of a state space or a convolution, which are not cut                   |
| `experts`   | experts of a mixture                                                            |
| `layers`    | what a parameter outside the layers holds for each layer: layers × size         |
| `-`         | nothing that can be cut (the vocabulary, one head's own channels)               |

Names joined by `+` are segments one after the other: `queries+keys+keys` of a fused projection.

**Experts.** transformers holds all experts of a layer in two tensors and multiplies with slices of
them. The forms differ in four ways:

| form        | gate and up in one tensor          | seen as gate [neurons, hidden]           |
|-------------|------------------------------------|------------------------------------------|
| standard    | [experts, 2 · neurons, hidden]     | [e, :neurons]                            |
| transposed  | [experts, hidden, 2 · neurons]     | [e, :, :neurons], transposed             |
| interleaved | gate and up take turns             | every second one from the first          |
| no gate     | `up_proj` [experts, neurons, hidden] | there is none                          |

Each expert may have biases. The same code makes the views of parameters in memory and of tensors in
a file, since a view of a tensor on the meta device tells offset, shape and strides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

Axes = Mapping[str, tuple[str, ...]]
"""Axes by name of a module or parameter. Of a linear or an embedding: those of its weight as
[out, in], whatever way it is stored; its bias has the first. Of a norm: the one it runs over."""


@dataclass(frozen=True)
class Couplings:
    """Which parameters of the models of one family must be cut together.

    Attributes:
        layer: axes of modules and parameters, named within a decoder layer.
        outside: axes of those outside the decoder layers, named within the model.
        attention: the module that is the attention sub-block.
        ffn: the modules that make up the FFN sub-block, one or several.
        attention_norms: norms that serve the attention sub-block alone and go with it.
        ffn_norms: norms that serve the FFN sub-block alone and go with it.
        neurons_key: what the configuration calls the number of FFN neurons; empty if it does not
            say it.
        attributes: attributes of modules that hold a size, by module and attribute, as a quantity:
            `heads`, `groups`, `queries` (heads × head size), `neurons`, `experts` or `hidden`.
            An attribute `config.x` is a value the module reads from the model's configuration.
        norm_offset: what a norm adds to its stored weight (1 for Gemma, which stores w - 1).
        scaled_embedding: embeddings are multiplied by the square root of the hidden size.
        with_neurons: entries of the configuration that another number of neurons needs too.
        alike: why all layers must keep the same sizes; empty where they may differ.
        fixed: kinds of units that cannot be cut (`groups`, `neurons`, `hidden`), and why.
    """

    layer: Axes
    outside: Axes
    attention: str = "self_attn"
    ffn: tuple[str, ...] = ("mlp",)
    attention_norms: tuple[str, ...] = ()
    ffn_norms: tuple[str, ...] = ()
    neurons_key: str = "intermediate_size"
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    with_neurons: Mapping[str, Any] = field(default_factory=dict)
    alike: str = ""
    fixed: Mapping[str, str] = field(default_factory=dict)

    def inside(self, path: str, base: str) -> Couplings:
        """The couplings of the same decoder inside a larger model.

        Args:
            path: of the decoder in that model.
            base: its name where it is the whole model.
        """
        outside = {
            path + name.removeprefix(base) if name.startswith(f"{base}.") else name: axes
            for name, axes in self.outside.items()
        }
        return replace(self, outside=outside)

    def plus(self, axes: Axes, **changes: Any) -> Couplings:
        """The same with axes of more modules of a layer, and with other fields changed."""
        return replace(self, layer={**self.layer, **axes}, **changes)

    def consumer(self, axis: str) -> str | None:
        """The linear of a layer whose input columns are the units along `axis`."""
        found = (n for n, axes in self.layer.items() if len(axes) == 2 and axes[1] == axis)
        return next(found, None)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The linears of an opened expert."""


@dataclass(frozen=True)
class ExpertLayout:
    """The form in which the experts of a layer are fused.

    Attributes:
        gated: the tensor `gate_up_proj` holds gate and up; without a gate it is `up_proj`.
        transposed: matrices are stored as [in, out].
        interleaved: gate and up take turns along the neurons; otherwise all of gate come first.
        biased: there are `gate_up_proj_bias` (or `up_proj_bias`) and `down_proj_bias`.
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    @property
    def weights(self) -> tuple[str, str]:
        """The names of the two tensors of matrices."""
        return ("gate_up_proj" if self.gated else "up_proj"), "down_proj"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        biases = tuple(f"{name}_bias" for name in self.weights)
        return self.weights + (biases if self.biased else ())

    @property
    def projections(self) -> tuple[str, ...]:
        """The linears of an expert."""
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    def fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether tensors of these names and shapes have this form."""
        if set(shapes) != set(self.names):
            return False
        first, down = (shapes[name] for name in self.weights)
        if len(first) != 3 or len(down) != 3:
            return False
        count, *sides = down
        hidden, neurons = reversed(sides) if self.transposed else sides
        rows = (2 if self.gated else 1) * neurons
        expected = {
            self.weights[0]: (count, hidden, rows) if self.transposed else (count, rows, hidden),
            self.weights[1]: tuple(down),
        }
        if self.biased:
            expected |= dict(zip(self.names[2:], ((count, rows), (count, hidden)), strict=True))
        return {name: tuple(shape) for name, shape in shapes.items()} == expected

    def apart(self, name: str, tensor: Tensor) -> list[dict[str, Tensor]]:
        """One tensor of all experts, as views of it.

        Args:
            name: of the tensor, one of `names`.
            tensor: [experts, …].

        Returns:
            For each expert the views of its matrices [out, in] or biases [out], by names such as
            `gate_proj.weight`.
        """
        bias = name.endswith("_bias")
        kind = "bias" if bias else "weight"
        if self.transposed and not bias:
            tensor = tensor.transpose(1, 2)
        if name.removesuffix("_bias") != "gate_up_proj":
            return [{f"{name.removesuffix('_bias')}.{kind}": own} for own in tensor]
        gate, up = (tensor[:, part] for part in self.halves(tensor.shape[1]))
        return [
            {f"gate_proj.{kind}": g, f"up_proj.{kind}": u} for g, u in zip(gate, up, strict=True)
        ]

    def halves(self, rows: int) -> tuple[slice, slice]:
        """The rows of gate and of up."""
        if self.interleaved:
            return slice(0, None, 2), slice(1, None, 2)
        return slice(0, rows // 2), slice(rows // 2, None)


@dataclass(frozen=True)
class Experts:
    """Where the experts of a family are, what they are called, and how they are stored.

    Attributes:
        module: path of the experts within a decoder layer; a layer without it is dense.
        router: path of the module within a decoder layer that routes.
        stored: names of gate, up and down below each expert where a checkpoint stores them alone.
        stacked: the module within a decoder layer in whose `gate_proj.weight`, `up_proj.weight` and
            `down_proj.weight` a checkpoint stores those of all experts, [experts, out, in] each;
            empty where it stores them alone, or as transformers holds them.
        count: the name that the configuration has for the number of experts of a layer.
        chosen: the name that it has for the number of experts of each token.
        layout: how transformers fuses them.
        scaled_inputs: the model multiplies the input of an expert by the router's weight, instead
            of the output. Every expert is called with all tokens, and those that are not sent to it
            are zero (Llama 4).
    """

    module: str = "mlp.experts"
    router: str = "mlp.gate"
    stored: tuple[str, str, str] = PROJECTIONS
    stacked: str = ""
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    scaled_inputs: bool = False

    def groups(self, experts: int) -> tuple[tuple[str, ...], ...]:
        """The linears of so many experts by shared input, as in `Family.groups`."""
        *first, down = self.layout.projections
        return tuple(
            group
            for e in range(experts)
            for group in (
                tuple(f"{self.module}.{e}.{name}" for name in first),
                (f"{self.module}.{e}.{down}",),
            )
        )

    def axes(self, *, stream: str = "hidden") -> Axes:
        """The axes of the router and of experts as transformers holds them, a layer's together.

        Of a router they are those of its `weight`; its bias and its correction have the first.

        Args:
            stream: the axis of what experts read and write; `-` where it is a latent space.
        """
        first, down = self.layout.weights
        into, out = ("-", stream), (stream, "-")
        if self.layout.transposed:
            into, out = out, into
        return {
            self.router: ("experts", "hidden"),
            f"{self.module}.{first}": ("experts", *into),
            f"{self.module}.{down}": ("experts", *out),
            f"{self.module}.{first}_bias": ("experts", "-"),
            f"{self.module}.{down}_bias": ("experts", stream),
        }

    def sizes(self, *of_router: str) -> Mapping[str, Mapping[str, str]]:
        """The attributes in which router and experts keep their sizes, for `Couplings.attributes`.

        Args:
            of_router: attributes of the router that hold the hidden size.
        """
        router = {"num_experts": "experts", **dict.fromkeys(of_router, "hidden")}
        return {self.module: {"num_experts": "experts"}, self.router: router}

    def opened_in(self, layers: nn.Module) -> int:
        """The most experts that a decoder layer has as modules; 0 where they are fused."""
        found = [m for n, m in layers.named_modules() if n.endswith("." + self.module)]
        return max((len(m) for m in found if isinstance(m, nn.ModuleList)), default=0)

    def per_token(self, config: Any) -> int | None:
        """How many experts a token is sent to at most; None if the configuration does not say."""
        chosen = getattr(config, self.chosen, None)
        return max(chosen) if isinstance(chosen, list) else chosen

    def divided(self, config: Any) -> int:
        """The number of groups of experts, in their order; 1 where the router knows no groups."""
        return getattr(config, "n_group", None) or 1

    def holds(self, name: str) -> bool:
        """Whether a linear, under any of its names, belongs to an expert."""
        return re.search(rf"(^|\.){re.escape(self.module)}\.\d+\.", name) is not None


def flagged_layout(module: nn.Module) -> ExpertLayout | None:
    """The form that a class of transformers says it has (`use_experts_implementation`).

    None where it says nothing, or has a form that `ExpertLayout` does not describe.
    """
    names = ("has_gate", "is_transposed", "is_concatenated", "has_bias")
    if any(not hasattr(module, name) for name in names):
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None
    gated, transposed, concatenated, biased = (bool(getattr(module, name)) for name in names)
    layout = ExpertLayout(gated, transposed, gated and not concatenated, biased)
    shapes = {name: p.shape for name, p in module.named_parameters(recurse=False)}
    return layout if layout.fits(shapes) else None
