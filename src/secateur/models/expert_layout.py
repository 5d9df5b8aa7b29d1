"""How the experts of a mixture are laid out: in the tensors of transformers, and in a checkpoint.

The one module that knows layouts. Everything else asks it which tensors there are, for the linears
of an expert as views of them, and where a checkpoint stores them.

transformers holds all experts of a layer in two tensors and multiplies with slices of them. The
forms differ in four ways:

| form        | gate and up in one tensor          | seen as gate [neurons, hidden]           |
|-------------|------------------------------------|------------------------------------------|
| standard    | [experts, 2 · neurons, hidden]     | [e, :neurons]                            |
| transposed  | [experts, hidden, 2 · neurons]     | [e, :, :neurons], transposed             |
| interleaved | gate and up take turns             | every second one from the first          |
| no gate     | `up_proj` [experts, neurons, hidden] | there is none                          |

Each expert may have biases. A checkpoint stores the same tensors, or gate, up and down of all
experts in a tensor each, or those of every expert alone, under names of its own. The same code
makes the views of parameters in memory and of tensors in a file, since a view of a tensor on the
meta device tells offset, shape and strides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.models.checkpoint import CheckpointReader, TensorEntry, damaged

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

    @classmethod
    def of_class(cls, module: nn.Module) -> ExpertLayout | None:
        """The form that a class of transformers says it has (`use_experts_implementation`).

        None where it says nothing, or has a form that is not described here.
        """
        names = ("has_gate", "is_transposed", "is_concatenated", "has_bias")
        if any(not hasattr(module, name) for name in names):
            return None
        if getattr(module, "has_post_expert_norm", False):
            return None
        gated, transposed, concatenated, biased = (bool(getattr(module, name)) for name in names)
        layout = cls(gated, transposed, gated and not concatenated, biased)
        return layout if layout.fits(shapes_of(module)) else None

    @property
    def tensors(self) -> Mapping[str, tuple[str, ...]]:
        """The linears whose matrices, or biases, each tensor holds, by the name of the tensor."""
        first = {"gate_up_proj": PROJECTIONS[:2]} if self.gated else {"up_proj": ("up_proj",)}
        weights = {**first, "down_proj": ("down_proj",)}
        biases = {f"{name}_bias": linears for name, linears in weights.items()}
        return weights | (biases if self.biased else {})

    @property
    def projections(self) -> tuple[str, ...]:
        """The linears of an expert, down last."""
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    def fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether tensors of these names and shapes have this form."""
        if set(shapes) != set(self.tensors) or len(shapes["down_proj"]) != 3:
            return False
        # this tensor shows both sizes, and all others follow from them
        count, *sides = shapes["down_proj"]
        hidden, neurons = reversed(sides) if self.transposed else sides
        expected: dict[str, tuple[int, ...]] = {}
        for name, linears in self.tensors.items():
            down = linears == ("down_proj",)
            rows, columns = (hidden, neurons) if down else (len(linears) * neurons, hidden)
            matrix = (columns, rows) if self.transposed else (rows, columns)
            expected[name] = (count, rows) if name.endswith("_bias") else (count, *matrix)
        return {name: tuple(shape) for name, shape in shapes.items()} == expected

    def apart(self, name: str, tensor: Tensor) -> list[dict[str, Tensor]]:
        """One tensor of all experts, as views of it.

        Args:
            name: of the tensor, one of `tensors`; or a linear whose matrices are in one tensor.
            tensor: [experts, …].

        Returns:
            For each expert the views of its matrices [out, in] or biases [out], by names such as
            `gate_proj.weight`.
        """
        bias = name.endswith("_bias")
        if self.transposed and not bias:
            tensor = tensor.transpose(1, 2)  # [experts, in, out] → [experts, out, in]
        linears = self.tensors.get(name, (name,))
        count, rows = len(linears), tensor.shape[1] // len(linears)
        views = [
            tensor[:, i::count] if self.interleaved else tensor[:, i * rows : (i + 1) * rows]
            for i in range(count)
        ]
        kind = "bias" if bias else "weight"
        return [
            {f"{linear}.{kind}": own for linear, own in zip(linears, each, strict=True)}
            for each in zip(*views, strict=True)
        ]

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the linears of the first tensor compute [tokens, neurons], as that tensor does."""
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)  # gate 0, up 0, gate 1, up 1, …
        return torch.cat((gate, up), dim=-1)


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a module's own parameters."""
    return {name: p.shape for name, p in module.named_parameters(recurse=False)}


StoredPart = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, int] | None]
"""A tensor of a checkpoint that holds a part of a parameter of fused experts: its name as the model
would call it, the axes of the parameter that it has, its shape, and the number of its expert before
and after a cut; None for a tensor of all experts."""


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
        width: the name that it has for the number of neurons of an expert.
        shared_width: the name that it has for the number of neurons of the shared expert; empty
            where that is a multiple of the other experts' number.
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
    width: str = "moe_intermediate_size"
    shared_width: str = ""
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

    def axes(self, *, stream: str = "hidden") -> Mapping[str, tuple[str, ...]]:
        """The axes of the router and of experts as transformers holds them, a layer's together.

        Of a router they are those of its `weight`; its bias and its correction have the first.

        Args:
            stream: the axis of what experts read and write; `-` where it is a latent space.
        """
        axes: dict[str, tuple[str, ...]] = {self.router: ("experts", "hidden")}
        for name, linears in self.layout.tensors.items():
            down = linears == ("down_proj",)
            matrix = (stream, "expert_neurons") if down else ("expert_neurons", stream)
            own = matrix[:1] if name.endswith("_bias") else matrix
            own = own[::-1] if self.layout.transposed else own
            axes[f"{self.module}.{name}"] = ("experts", *own)
        return axes

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

    def fewest(self, config: Any) -> int:
        """How few experts a layer can have: what a token chooses, in the groups that are open.

        Two are needed to rate a group.
        """
        chosen, groups = self.per_token(config) or 1, self.divided(config)
        open_groups = getattr(config, "topk_group", None) or groups
        return chosen if groups == 1 else groups * max(2, -(-chosen // open_groups))

    def holds(self, name: str) -> bool:
        """Whether a linear, under any of its names, belongs to an expert."""
        return re.search(rf"(^|\.){re.escape(self.module)}\.\d+\.", name) is not None

    def place_of(self, name: str) -> re.Match[str] | None:
        """Where a stored name has the number of an expert: group 1."""
        where = re.escape(self.module.rpartition(".")[2])
        return re.search(rf"\.{where}\.(\d+)(?=\.|$)", name)

    def stored_linear(self, name: str) -> str | None:
        """The linear whose weight a checkpoint stores alone under a name; None for other names."""
        called = dict(zip(self.stored, PROJECTIONS, strict=True))
        place = self.place_of(name)
        leaf = place and re.fullmatch(r"\.(\w+)\.weight", name[place.end() :])
        return called.get(leaf[1]) if leaf else None

    def renamings(self) -> Mapping[str, str]:
        """Patterns in stored names of linears, and what replaces them; as in transformers."""
        where = re.escape(self.module.rpartition(".")[2])
        alone = {
            rf"(\.{where}\.\d+)\.{stored}\.": rf"\1.{name}."
            for stored, name in zip(self.stored, PROJECTIONS, strict=True)
            if stored != name
        }
        if not self.stacked:
            return alone
        stacked = rf"\.{re.escape(self.stacked)}\.({'|'.join(PROJECTIONS)})\.weight"
        return {**alone, stacked: rf".{self.module}.\1"}

    def split(self, reader: CheckpointReader, names: Mapping[str, str]) -> None:
        """Show experts that are stored fused as single tensors, named like those stored alone.

        Args:
            reader: the checkpoint.
            names: the model's name for each stored tensor.
        """
        called = dict(zip(PROJECTIONS, self.stored, strict=True))
        found: dict[str, dict[str, str]] = {}
        for stored in list(reader.entries):
            owner, _, leaf = names[stored].rpartition(".")
            fused = leaf in self.layout.tensors or leaf in self.layout.projections
            if fused and owner.endswith("." + self.module):
                found.setdefault(owner, {})[leaf] = stored
        for owner, tensors in found.items():
            shapes = {leaf: reader.entries[stored].shape for leaf, stored in tensors.items()}
            if shapes.keys() == self.layout.tensors.keys() and not self.layout.fits(shapes):
                raise CheckpointError(
                    f"the experts of {owner} are stored in another form than transformers holds "
                    "them: "
                    + ", ".join(f"{leaf} {list(shape)}" for leaf, shape in sorted(shapes.items())),
                    where=str(reader.entries[min(tensors.values())].file),
                    remedy="save the model anew with transformers: "
                    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
                )
            for leaf, stored in tensors.items():
                # a checkpoint may have another prefix than the model
                place = stored.removesuffix(f".{leaf}") if stored.endswith(f".{leaf}") else owner
                entry = reader.entries[stored]
                meta = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                views = {}
                for number, own in enumerate(self.layout.apart(leaf, meta)):
                    for part, view in own.items():
                        linear, _, kind = part.partition(".")
                        views[f"{place}.{number}.{called[linear]}.{kind}"] = view
                reader.split(stored, views)

    def parts(
        self, name: str, shape: Sequence[int], kept: Sequence[int] | None, stored: Collection[str]
    ) -> Iterator[StoredPart]:
        """The stored tensors that hold a parameter of fused experts; none for other parameters.

        Args:
            name: of the parameter.
            shape: after a cut.
            kept: the numbers of the experts that stay; None for all.
            stored: the names of what is stored, as the model would call it.
        """
        owner, _, leaf = name.rpartition(".")
        linears = self.layout.tensors.get(leaf, ())
        if not linears or not owner.endswith(f".{self.module}"):
            return
        halves = [f"{owner}.{linear}" for linear in linears]
        if len(halves) > 1 and halves[0] in stored:
            for half in halves:
                rows = shape[1] // len(halves)
                yield half, tuple(range(len(shape))), (shape[0], rows, *shape[2:]), None
            return
        matrix = (2, 1) if self.layout.transposed else (1, 2)
        axes = (1,) if leaf.endswith("_bias") else matrix
        apart = self.layout.apart(leaf, torch.empty(tuple(shape), device="meta"))
        for new, old in enumerate(range(shape[0]) if kept is None else kept):
            for part, view in apart[new].items():
                yield f"{owner}.{old}.{part}", axes, tuple(view.shape), (old, new)


def stored_in_table(model: Any) -> tuple[str, str, str]:
    """What transformers' table calls gate, up and down where they are stored alone."""
    found = dict(zip(PROJECTIONS, PROJECTIONS, strict=True))
    parts = {**ExpertLayout().tensors, **ExpertLayout(gated=False).tensors}
    for converter in _converters(model):
        # gate, up and down of all experts, from as many patterns as the fused tensor holds
        sources = [pattern for pattern in converter.source_patterns if "*" in pattern]
        made = parts.get(converter.target_patterns[0].rpartition(".")[2], ())
        if len(converter.target_patterns) == 1 and len(made) == len(sources):
            found |= {m: s.split(".")[-2] for m, s in zip(made, sources, strict=True)}
    return tuple(found.values())  # type: ignore[return-value]


def loads_one_by_one(model: Any) -> bool:
    """Whether transformers fuses experts that a checkpoint of this class stores one by one."""
    patterns = (pattern for one in _converters(model) for pattern in one.source_patterns)
    return any(re.search(r"experts\.\*\.", pattern) for pattern in patterns)


def _converters(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightConverter)]


class FusedExperts(CheckpointReader):
    """Shows experts that are stored one by one as the fused tensors of their class."""

    def __init__(
        self,
        reader: CheckpointReader,
        names: Mapping[str, str],
        layout: ExpertLayout,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.reader, self.layout = reader, layout
        self.folder, self.files = reader.folder, reader.files
        stored = {name: key for key, name in names.items()}
        self.parts: dict[str, dict[str, str]] = {}
        self.entries = dict(reader.entries)
        for fused, shape in shapes.items():
            owner, _, leaf = fused.rpartition(".")
            views = self.views(leaf, torch.empty(shape, device="meta"))
            parts = {part: stored.get(f"{owner}.{part}", "") for part in views}
            if not all(parts.values()):
                raise damaged(f"it does not contain all experts of {owner}", reader.folder)
            first = reader.entries[next(iter(parts.values()))]
            for part in parts.values():
                del self.entries[part]
            self.entries[fused] = TensorEntry.made(first.file, first.dtype, shape)
            self.parts[fused] = parts

    def views(self, leaf: str, tensor: Tensor) -> dict[str, Tensor]:
        """The matrices of experts within a fused tensor, by names such as `3.up_proj.weight`."""
        apart = enumerate(self.layout.apart(leaf, tensor))
        return {f"{e}.{part}": view for e, own in apart for part, view in own.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        if name not in self.parts:
            return self.reader.read(name)
        entry = self.entries[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for part, view in self.views(name.rpartition(".")[2], whole).items():
            view.copy_(self.reader.read(self.parts[name][part]))
        return whole
