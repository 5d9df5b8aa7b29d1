"""Which axis of which parameter carries which dimension, and so must be cut together.

A dimension of a decoder is spread over many parameters. An FFN neuron is a row of two matrices and
a column of a third. A KV group is a run of rows in three matrices and of columns in a fourth. A
channel of the residual stream is an entry of nearly every parameter. `Couplings` describes this for
a family, as data.

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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.models.expert_layout import Experts

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
        with_neurons: entries of the configuration that another number of neurons needs besides.
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

    def consumer(self, axis: str) -> str | None:
        """The linear of a layer whose input columns are the units along `axis`."""
        found = (n for n, axes in self.layer.items() if len(axes) == 2 and axes[1] == axis)
        return next(found, None)


SPLIT_ATTENTION: Axes = {
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
}
"""Separate projections, as Llama made them common."""

GATED_FFN: Axes = {
    "mlp.gate_proj": ("neurons", "hidden"),
    "mlp.up_proj": ("neurons", "hidden"),
    "mlp.down_proj": ("hidden", "neurons"),
}
"""A gated feed-forward of three linears."""

PLAIN_FFN: Axes = {"mlp.up_proj": ("neurons", "hidden"), "mlp.down_proj": ("hidden", "neurons")}
"""A feed-forward of two linears."""

FUSED_GATED_FFN: Axes = {
    "mlp.gate_up_proj": ("neurons+neurons", "hidden"),
    "mlp.down_proj": ("hidden", "neurons"),
}
"""A gated feed-forward with gate and up in one linear."""

SHARED_EXPERTS: Axes = {
    "mlp.shared_experts.gate_proj": ("-", "hidden"),
    "mlp.shared_experts.up_proj": ("-", "hidden"),
    "mlp.shared_experts.down_proj": ("hidden", "-"),
}
"""The experts that every token passes, as DeepSeek made them common."""


def expert_axes(experts: Experts, *, stream: str = "hidden") -> Axes:
    """The axes of a router and of experts as transformers holds them, all of a layer together.

    Of a router they are those of its `weight`; its bias and its correction have the first.

    Args:
        experts: of the family.
        stream: the axis of what experts read and write; `-` where it is a latent space.
    """
    first, down = experts.layout.weights
    into, out = ("-", stream), (stream, "-")
    if experts.layout.transposed:
        into, out = out, into
    return {
        experts.router: ("experts", "hidden"),
        f"{experts.module}.{first}": ("experts", *into),
        f"{experts.module}.{down}": ("experts", *out),
        f"{experts.module}.{first}_bias": ("experts", "-"),
        f"{experts.module}.{down}_bias": ("experts", stream),
    }


def sizes_of_experts(experts: Experts, *of_router: str) -> Mapping[str, Mapping[str, str]]:
    """The attributes in which router and experts keep their sizes.

    Args:
        experts: of the family.
        of_router: attributes of the router that hold the hidden size.
    """
    router = {"num_experts": "experts", **dict.fromkeys(of_router, "hidden")}
    return {experts.module: {"num_experts": "experts"}, experts.router: router}


EMBEDDING_AND_HEAD: Axes = {
    "model.embed_tokens": ("-", "hidden"),
    "model.norm": ("hidden",),
    "lm_head": ("-", "hidden"),
}
"""The parameters outside the decoder layers in most families."""

TWO_NORMS: Axes = {"input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",)}
"""One norm before each sub-block."""

HEAD_NORMS: Axes = {"self_attn.q_norm": ("-",), "self_attn.k_norm": ("-",)}
"""Norms over the channels of a head, which all heads share."""

LLAMA_COUPLINGS = Couplings(
    layer={**SPLIT_ATTENTION, **GATED_FFN, **TWO_NORMS},
    outside=EMBEDDING_AND_HEAD,
    attention_norms=("input_layernorm",),
    ffn_norms=("post_attention_layernorm",),
)
"""The couplings of the layout that Llama made common."""
