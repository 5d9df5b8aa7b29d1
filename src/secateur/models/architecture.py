"""Which parts of a model can be pruned: its decoder layers, their linears, and who shares an input.

A `Family` is data: the path to the decoder layers, and the linears of a layer, grouped by the input
they share, in the order they run. For a family that the library does not know, the layers are the
longest list of modules with linears, and running one layer shows the groups.

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
| `expert_neurons` | neurons of each expert; those of gate and up in one axis                   |
| `shared_neurons` | neurons of the expert that every token has                                 |
| `layers`    | what a parameter outside the layers holds for each layer: layers × size         |
| `-`         | nothing that can be cut (the vocabulary, one head's own channels)               |

Names joined by `+` are segments one after the other: `queries+keys+keys` of a fused projection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError, CheckpointError, RecipeError
from secateur.models.expert_layout import PROJECTIONS, ExpertLayout, Experts, stored_in_table
from secateur.registry import Registry

Groups = tuple[tuple[str, ...], ...]


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


@dataclass(frozen=True)
class Family:
    """A model family, declared.

    Attributes:
        model_types: `model_type` values of transformers configurations that belong to it.
        layers: the path of the list of decoder layers within the causal language model.
        groups: names of the linears within a decoder layer; those that share an input together.
            Without them a layer of each kind is run to find them.
        writers: linears whose output is added to the residual stream without a change. Empty where
            a norm comes between, or where the writers are unknown.
        experts: where the experts of its layers are; their linears are not in `groups`. None for a
            family without experts.
        couplings: the parameters that must be cut together; None where only whole layers can be
            cut.
        normed_writers: linears whose output passes an RMSNorm before it is added, each with the
            name of that norm.
    """

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    groups: Groups = ()
    writers: tuple[str, ...] = ()
    experts: Experts | None = None
    couplings: Couplings | None = None
    normed_writers: tuple[tuple[str, str], ...] = ()

    def like(self, *model_types: str, **changes: Any) -> Family:
        """A family of the same layout, but for some fields."""
        return replace(self, model_types=model_types, **changes)


families: Registry[Family] = Registry("family", "secateur.models.families", "families")

SPLIT_ATTENTION_GROUPS: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
"""Separate projections of queries, keys and values."""

SPLIT_ATTENTION_GATED_FFN: Groups = (
    *SPLIT_ATTENTION_GROUPS,
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The layout Llama made common: separate projections, gated feed-forward."""

PRE_NORM_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""The linears of that layout that write to the residual stream, where norms come only before."""


@dataclass
class Linear:
    """One prunable matrix, always seen as [out, in].

    Attributes:
        name: full name within the model, without `.weight`.
        module: nn.Linear, or transformers' Conv1D, which stores the transpose.
    """

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the module stores [in, out]."""
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The weight as a view [out, in]."""
        stored: Tensor = self.module.get_parameter("weight").detach()
        return stored.t() if self.transposed else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.weight.shape
        return int(out), int(columns)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Overwrite the weight with values [out, in], cast to the weight's dtype."""
        self.weight.copy_(weight)

    @property
    def has_bias(self) -> bool:
        """Whether the linear has a bias."""
        return getattr(self.module, "bias", None) is not None

    @torch.no_grad()
    def shift(self, by: Tensor) -> None:
        """Add to the bias [out], summed in float32; does nothing without a bias."""
        if self.has_bias:
            bias = self.module.get_parameter("bias")
            bias.copy_(bias.float() + by)


@dataclass(frozen=True)
class Architecture:
    """A model, described.

    Attributes:
        family: name of the declared family, or `generic`.
        layers_path: path of the list of decoder layers.
        groups: linears by shared input, or None where a layer must run to show them.
        writers: linears whose output is added to the residual stream without a change, as far as
            known.
        experts: where the experts of its layers are; None without experts.
        couplings: the parameters that must be cut together, where they are declared.
        normed_writers: linears whose output passes an RMSNorm before it is added, and that norm.
    """

    family: str
    layers_path: str
    groups: Groups | None
    writers: tuple[str, ...] = ()
    experts: Experts | None = None
    couplings: Couplings | None = None
    normed_writers: tuple[tuple[str, str], ...] = ()

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers."""
        return model.get_submodule(self.layers_path)  # type: ignore[return-value]

    def layer_name(self, index: int) -> str:
        """The full name of a decoder layer."""
        return f"{self.layers_path}.{index}"

    def of_expert(self, name: str) -> bool:
        """Whether a linear belongs to an expert, and so sees only the tokens sent to it."""
        return self.experts is not None and self.experts.holds(name)


def linears_of(layer: nn.Module, layer_name: str) -> dict[str, Linear]:
    """All prunable matrices of a decoder layer, by their name within the layer.

    A linear with a single output is a gate (of Qwen's shared expert) and is left out, because no
    other output could share its loss. So are the linears of routers, the coefficients with which
    AltUp mixes the hidden states of a token, and block-diagonal ones (DeepSeek V4), whose inputs
    are divided into groups.
    """
    from transformers.pytorch_utils import Conv1D

    return {
        name: Linear(f"{layer_name}.{name}", module)
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and getattr(module, "out_features", 2) > 1
        and "Grouped" not in type(module).__name__
        and not is_router(layer, name)
        and not mixes_states(layer, name)
    }


def is_router(layer: nn.Module, name: str) -> bool:
    """Whether a module of a decoder layer sends tokens to experts, or is a part of what does.

    It is called `gate` or `router`, or has a class with such a name, and is next to `experts`.
    """
    return any(
        "router" in type(module).__name__.lower()
        or (hasattr(owner, "experts") and part in ("gate", "router"))
        for owner, part, module in _path_to(layer, name)
    )


def _path_to(layer: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The modules on the way to one: owner, name there, module."""
    owner = layer
    for part in filter(None, name.split(".")):
        module = getattr(owner, part)
        yield owner, part, module
        owner = module


def mixes_states(layer: nn.Module, name: str) -> bool:
    """Whether a module of a decoder layer belongs to AltUp (Gemma 3n).

    Its matrices have a row or a column for each of the few hidden states of a token, so a zero
    there would cut a whole state off.
    """
    return any("altup" in type(m).__name__.lower() for _, _, m in _path_to(layer, name))


def stored_linears(
    model: Any, architecture: Architecture, names: Iterable[str]
) -> dict[str, tuple[int, Linear]]:
    """The linears of the decoder layers with their layer's number, by the names of their weights.

    A layer that shares its weights with another need not be stored.
    """
    linears = {
        f"{linear.name}.weight": (index, linear)
        for index, layer in enumerate(architecture.layers(model))
        for linear in linears_of(layer, architecture.layer_name(index)).values()
    }
    # a layer that shares its weights is stored under the name of the other
    absent = linears.keys() - set(names) - _shared_parameters(model, architecture).keys()
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(linears)} matrices of the decoder layers are not stored",
            where=min(absent),
            remedy="the checkpoint is incomplete (download it again), or it stores them in another "
            "form than the modules of transformers have",
        )
    return linears


def _shared_parameters(model: Any, architecture: Architecture) -> dict[str, str]:
    """Parameters of decoder layers that are shared: name → name of the first one.

    In a loaded model the parameters are the same objects. In a skeleton they are separate until
    they are tied, so its class names them.
    """
    prefix = architecture.layers_path + "."
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and name.startswith(prefix):
            found[name] = other
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found.update({name: other for name, other in tied.items() if name.startswith(prefix)})
    return found


def refuse_shared(model: Any, architecture: Architecture) -> None:
    """Refuse decoder layers that share weights with each other.

    Pruning one layer would prune all of them, but the score would use the inputs of only one.
    """
    shared = _shared_parameters(model, architecture)
    if shared:
        name, other = next(iter(shared.items()))
        raise ArchitectureError(
            f"{len(shared)} parameters of decoder layers are shared with other layers; the first "
            f"is that of {other}",
            where=name,
            remedy="pruning layers that share weights is not supported",
        )


def of_unknown_experts(path: str, module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter contains matrices of experts in an unknown layout. Ask of no router."""
    named = "expert" in f"{path}.{type(module).__name__}".lower()
    return named and parameter.ndim > 1 and not isinstance(module, nn.Linear)


def family_of(model: Any) -> Family | None:
    """The declared family of a model; None if there is none."""
    config = getattr(model, "config", None)
    parts = (config, text_config(config))  # a decoder may be a part of the model
    kinds = [getattr(x, "base_model_type", None) or getattr(x, "model_type", None) for x in parts]
    return next(filter(None, map(family_of_type, kinds)), None)


def family_of_type(model_type: str | None) -> Family | None:
    """The declared family of a `model_type` of transformers; None if there is none."""
    known = (families[name] for name in families)
    return next((family for family in known if model_type in family.model_types), None)


def hidden_size(model: Any) -> int:
    """The width of the residual stream, as the embeddings have it."""
    width: int = model.get_input_embeddings().weight.shape[1]
    return width


def vocabulary_of(model: Any) -> int:
    """The number of logits of a model."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else int(model.config.vocab_size)


def refuse_other_sizes(
    sizes: Mapping[str, Callable[[Any], Any]],
    one: Any,
    other: Any,
    roles: tuple[str, str],
    *,
    where: str,
    remedy: str,
) -> None:
    """Refuse a model that has other sizes than another one, which it is compared with.

    Args:
        sizes: functions of a model, by what they count.
        one: a model.
        other: the one that is refused.
        roles: what the message calls the two.
        where: the other one, for the message.
        remedy: what to do.

    Raises:
        RecipeError: names every size that differs.
    """
    found = {what: (size_of(one), size_of(other)) for what, size_of in sizes.items()}
    differing = [f"{a} and {b} {what}" for what, (a, b) in found.items() if a != b]
    if differing:
        raise RecipeError(
            f"{roles[0]} and {roles[1]} are different models: {'; '.join(differing)}",
            where=where,
            remedy=remedy,
        )


def refuse_foreign(model: nn.Module) -> None:
    """Refuse a module that no class of transformers has made, or that has no weights."""
    if not hasattr(model, "config"):
        raise ArchitectureError(
            f"{type(model).__name__} is no causal language model of transformers: it has no "
            "configuration",
            remedy="load one with AutoModelForCausalLM.from_pretrained(DIR), or name its folder",
        )
    if empty := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ArchitectureError(
            f"{len(empty)} parameters of the model have no values: they are on the meta device",
            where=empty[0],
            remedy="load the model into memory, without device_map='meta' or offloading; or name "
            "its folder, which needs memory for one layer",
        )


def text_config(config: Any) -> Any:
    """The text part of a configuration; all of it where it has no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def setting(config: Any, name: str, default: Any = None) -> Any:
    """An entry of a configuration. Where layers differ in it, the one that most layers have.

    transformers raises an error that is no AttributeError when such an entry is read.
    """
    read = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return getattr(config, name, default) if read is None else read(name, default)


FURTHER_COUNTS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules",
)  # fmt: skip
"""How configurations call the number of layers that predict further tokens."""


def further_counts(config: Any) -> dict[str, int]:
    """The numbers of layers that predict further tokens in a configuration, where it names some."""
    found = ((key, setting(text_config(config), key)) for key in FURTHER_COUNTS)
    return {key: int(value) for key, value in found if value}


def _decoder_inside(model: Any, base: str) -> str | None:
    """The path of the decoder of a model that also sees or hears; None for a plain decoder."""
    config = getattr(model, "config", None)
    if config is None or text_config(config) is config:
        return None
    decoder = model.get_decoder()
    path = next(path for path, module in model.named_modules() if module is decoder)
    inner = getattr(decoder, base, None)  # Llama 4 has a causal language model inside
    return f"{path}.{base}" if isinstance(inner, nn.Module) else path


def experts_of(model: Any) -> Experts | None:
    """Where the experts of a model are and how they are stored; None for a dense model.

    The family declares it. Without a family the modules show it, whether opened or fused. Where the
    family and transformers' table differ in stored names, the table is of this very class.
    """
    family = family_of(model)
    experts = family.experts if family else _shown_experts(model)
    table = stored_in_table(model) if experts else PROJECTIONS
    return experts and (experts if table == PROJECTIONS else replace(experts, stored=table))


def _shown_experts(model: Any) -> Experts | None:
    for path, module in model.named_modules():
        own = getattr(module, "layout", None)  # of opened experts
        layout = own if isinstance(own, ExpertLayout) else ExpertLayout.of_class(module)
        if layout is not None:
            return Experts(re.split(r"\.\d+\.", path)[-1], layout=layout)
    return None


def only_embeds(model: Any) -> bool:
    """Whether a model of transformers makes states of tokens, and predicts no next token.

    It is an encoder, or a decoder without its head.
    """
    own = type(model).__module__.startswith("transformers.models.")
    return own and not model.can_generate()


def describe(model: Any) -> Architecture:
    """Describe a causal language model."""
    if only_embeds(model):
        raise ArchitectureError(
            f"{type(model).__name__} makes embeddings and predicts no next token, so only tokens "
            "can be removed from it",
            remedy="secateur structure DIR --vocabulary TEXT --output SMALLER",
        )
    family = family_of(model)
    if family is not None:
        groups, experts, layers = family.groups, family.experts, family.layers
        name, couplings = next(n for n in families if families[n] is family), family.couplings
        base = layers.partition(".")[0]
        inside = _decoder_inside(model, base)
        if inside is not None:
            layers = inside + layers.removeprefix(base)
            couplings = couplings and couplings.inside(inside, base)
        if experts is not None:
            # opened experts are linears of their own
            groups += experts.groups(experts.opened_in(model.get_submodule(layers)))
        writers, normed = family.writers, family.normed_writers
        return Architecture(name, layers, groups, writers, experts, couplings, normed)
    candidates = sorted(_candidate_layers(model), key=lambda c: c[1], reverse=True)
    if not candidates:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of decoder layers made of linear layers",
            remedy="declare its family: see CONTRIBUTING.md, 'Add a model family'",
        )
    path = candidates[0][0]
    refuse_non_decoders(model, model.get_submodule(path))
    return Architecture("generic", path, None, experts=experts_of(model))


def refuse_non_decoders(model: Any, layers: nn.Module) -> None:
    """Refuse encoders and encoder-decoders, whose tokens also see later ones.

    In an encoder no attention is causal. Where the attention modules do not say, the configuration
    may (`is_decoder`).
    """
    config = getattr(model, "config", None)
    remedy = "Secateur works on causal decoders, which predict the next token from those before it"
    # The configuration of a decoder taken out of an encoder-decoder says False; its class knows.
    parts = (config, type(config), text_config(config))
    flags = (getattr(each, "is_encoder_decoder", False) for each in parts)
    if any(flags):
        raise ArchitectureError(
            f"{type(model).__name__} is part of an encoder-decoder, not a causal decoder: its "
            "encoder would not be pruned",
            remedy=remedy,
        )
    causal = {bool(m.is_causal) for m in layers.modules() if hasattr(m, "is_causal")}
    decodes = True in causal if causal else getattr(config, "is_decoder", True)
    if not decodes:
        raise ArchitectureError(
            f"{type(model).__name__} is an encoder, not a causal decoder: its tokens see those "
            "behind them",
            remedy=f"{remedy}; of an encoder only tokens can be removed: structure --vocabulary",
        )


def _candidate_layers(model: Any) -> Iterator[tuple[str, int]]:
    """Lists of modules of the decoder that hold linears: (path, number of weights in linears).

    The modules may be of several classes, as in hybrids. Where a model names its decoder
    (`get_decoder`), towers for pictures or sound are ignored.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    start = next((path for path, module in model.named_modules() if module is decoder), "")
    for path, module in decoder.named_modules(prefix=start):
        if isinstance(module, nn.ModuleList) and len(module):
            weights = {
                # by identity: one module may have two names
                id(linear.module): linear.module.weight.numel()  # type: ignore[operator]
                for child in module
                for linear in linears_of(child, path).values()
                if linear.name != f"{path}."
            }
            if weights:
                yield path, sum(weights.values())


def positions_of(config: Any) -> int | None:
    """The number of positions in a model's configuration; None if it has none."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


_PROBE_TOKENS = 8


def head_alone(model: Any) -> nn.Linear | None:
    """Return the output head if its output is exactly the model's logits, else None.

    Some families scale or cap the output of the head, so the function checks a few tokens.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        return None
    given: list[Tensor] = []
    with torch.no_grad(), head.register_forward_hook(lambda *call: given.append(call[2])):
        # a scale or a cap changes the logits of any token, so a few are enough
        ids = torch.arange(_PROBE_TOKENS, device=head.weight.device) % head.out_features
        logits = model(input_ids=ids[None], use_cache=False).logits
    return head if len(given) == 1 and torch.equal(given[0], logits) else None
