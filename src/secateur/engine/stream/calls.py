"""How a model calls its decoder layers, and which linears of a layer share an input.

**Calls.** A recorder replaces every layer for one forward of the whole model, which stops at the
last layer. So masks, rotary tables and all other arguments of a layer are known for any family and
any release of transformers. Most arguments are the same for all windows. Those that depend on the
tokens, such as the per-layer embeddings of Gemma 3n, are marked (`LayerCall.varying`), and each
window gets its own (`hidden_states.TokenValues`).

One tensor with a row for each token goes from layer to layer. In most models it is the hidden
state. Some models have several hidden states for each token, or layers that read keys and values of
an earlier layer: all of it is packed into one tensor (`PackedHiddenStates`), so whatever stores,
shares or differentiates hidden states works with these models as well.

**Layouts.** Hybrids have layers of several kinds: attention, linear attention, convolution, state
space, dense and sparse feed-forward. So each kind has its own groups of linears that share an
input. They are the groups that the family declares, if these hold all linears of the layer.
Otherwise one layer of the kind runs once to find the groups. A checkpoint's layers run without
their weights, on the meta device. So a model that cannot be pruned is refused before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.errors import ArchitectureError, SecateurError
from secateur.models.architecture import Groups, Linear, linears_of
from secateur.models.targets import Target

TOKENS = 64
"""The length of the window for finding linears that share an input."""

States = tuple[Tensor, ...]
Sizes = tuple[tuple[int, int], ...]


class _AfterLastLayer(BaseException):
    """The private signal that ends a recording. No model catches it: it is not an Exception."""


class _OtherShapeError(Exception):
    """The private signal that a model changed the output of a stand-in."""


@dataclass(frozen=True)
class PackedHiddenStates:
    """The columns of the packed tensor [batch, sequence, width]:

        hidden states 1 | … | hidden states n | keys, values of one kind of layer | …

    Attributes:
        hidden: the hidden size.
        stacked: n, if the model hands its layers several hidden states for each token; 0 if it
            hands them [batch, sequence, hidden].
        shared: what one layer computes and later layers read, such as keys and values: by the name
            in the model's dictionary, (heads, head_dim) of each tensor [batch, heads, sequence,
            head_dim]. It is zero until a layer has computed it.
        axis: where the n hidden states are: first, as AltUp has them in Gemma 3n, or third, as
            hyper-connections have them in DeepSeek V4.
    """

    hidden: int
    stacked: int = 0
    shared: Mapping[str, Sizes] = field(default_factory=dict)
    axis: int = 0

    @classmethod
    def of(
        cls, hidden: Tensor, tokens: torch.Size, found: Mapping[str, States], where: str
    ) -> PackedHiddenStates:
        """The columns for a model whose layers take more than one hidden state for each token.

        Args:
            hidden: what its first layer takes.
            tokens: (windows, tokens of a window).
            found: what its layers share.
            where: the model, for the error.

        Raises:
            ArchitectureError: a tensor has no row for each token.
        """
        axis = 0 if hidden.shape[1:3] == tokens else 2
        several = hidden.ndim == 4 and tokens in (hidden.shape[1:3], hidden.shape[:2])
        stacked = hidden.shape[axis] if several else 0
        odd = [] if stacked or hidden.shape[:-1] == tokens else [("hidden states", hidden)]
        shared_ones = [(key, x) for key, tensors in found.items() for x in tensors]
        odd += [(k, x) for k, x in shared_ones if x.ndim != 4 or (x.shape[0], x.shape[2]) != tokens]
        if odd:
            what, x = odd[0]
            raise ArchitectureError(
                f"{where} gives its layers {what} of shape {tuple(x.shape)} for {tokens[0]} "
                f"windows of {tokens[1]} tokens",
                remedy="this family cannot be pruned layer by layer yet",
            )
        shared = {
            key: tuple((x.shape[1], x.shape[3]) for x in tensors) for key, tensors in found.items()
        }
        return cls(hidden.shape[-1], stacked, shared, axis)

    @property
    def width(self) -> int:
        """The number of columns that hidden states take."""
        return max(1, self.stacked) * self.hidden

    def states(self, packed: Tensor) -> Tensor:
        """The columns of the hidden states."""
        return packed[..., : self.width]

    def pack(self, hidden: Tensor, shared: Mapping[str, States]) -> Tensor:
        """One tensor from what a layer returned and what has been shared so far."""
        # → [batch, sequence, stacked · hidden]
        parts = [hidden.movedim(self.axis, 2).flatten(2) if self.stacked else hidden]
        batch, length = parts[0].shape[:2]
        for key, sizes in self.shared.items():
            if key in shared:
                # [batch, heads, sequence, head_dim] → [batch, sequence, heads · head_dim]
                parts += [x.transpose(1, 2).flatten(2) for x in shared[key]]
            else:
                parts.append(parts[0].new_zeros(batch, length, sum(map(prod, sizes))))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0].contiguous()

    def unpack(self, packed: Tensor) -> tuple[Tensor, dict[str, States]]:
        """The hidden states as a layer takes them, and what has been shared so far."""
        hidden = self.states(packed)
        if self.stacked:
            hidden = hidden.unflatten(-1, (self.stacked, self.hidden)).movedim(2, self.axis)
        columns = self.columns(packed)
        shared = {
            key: tuple(
                next(columns).unflatten(-1, size).transpose(1, 2).contiguous() for size in sizes
            )
            for key, sizes in self.shared.items()
        }
        return hidden.contiguous(), shared

    def columns(self, packed: Tensor) -> Iterator[Tensor]:
        """The columns of each shared tensor."""
        start = self.width
        for size in (size for sizes in self.shared.values() for size in sizes):
            yield packed[..., start : start + prod(size)]
            start += prod(size)


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer besides its hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: named arguments.
        in_tuple: whether the model expects the layer's output in a tuple.
        packing: how hidden states are packed with what layers share; None if they are plain.
        varying: arguments that depend on the tokens, each by its place among all arguments, with
            its shape after [batch, sequence]. The ids of the tokens have the shape ().
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_tuple: bool = False
    packing: PackedHiddenStates | None = None
    varying: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerCall:
        """The same call with its tensors on another device, floating ones in another dtype."""

        def moved(place: int, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype if x.is_floating_point() else None)

        return self.changed(moved)

    def changed(self, change: Callable[[int, Any], Any]) -> LayerCall:
        """The same call with other arguments: `change` gets the place and value of each."""
        leaves, form = tree_flatten((self.args, self.kwargs))
        args, kwargs = tree_unflatten([change(i, x) for i, x in enumerate(leaves)], form)
        return replace(self, args=args, kwargs=kwargs)

    def leaves(self) -> list[Any]:
        """All arguments, by place."""
        return tree_flatten((self.args, self.kwargs))[0]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [x for x in self.leaves() if isinstance(x, Tensor)]

    @property
    def columns(self) -> int:
        """How many values of the arguments depend on one token."""
        return sum(_columns_of(shape) for _, shape in self.varying)

    def values(self) -> Tensor:
        """The arguments that depend on the tokens, side by side: [batch, sequence, columns]."""
        found = [(self.leaves()[place], shape) for place, shape in self.varying]
        return torch.cat([x.flatten(2) if shape else _bytes_of(x) for x, shape in found], -1)

    def filled(self, values: Tensor | None) -> LayerCall:
        """The call with other arguments that depend on the tokens; None leaves them out."""
        sizes = [_columns_of(shape) for _, shape in self.varying]
        parts = [None] * len(sizes) if values is None else values.split(sizes, -1)
        new = {
            place: part
            if part is None
            else part.unflatten(-1, shape)
            if shape
            else _number_of(part)
            for (place, shape), part in zip(self.varying, parts, strict=True)
        }
        return self.changed(lambda place, x: new.get(place, x))

    def shares(self) -> bool:
        """Whether the layer gets a dictionary in which layers share tensors."""
        return any(isinstance(x, MutableMapping) for x in self.leaves())

    def sharing(self, shared: MutableMapping[str, States]) -> LayerCall:
        """The call with this dictionary for what layers share."""
        return self.changed(lambda _, x: shared if isinstance(x, MutableMapping) else x)

    def packed(self, hidden: Tensor) -> Tensor:
        """Inputs of the first layer as they travel: [batch, sequence, width]."""
        return hidden if self.packing is None else self.packing.pack(hidden, {})

    def unpacked(self, hidden: Tensor) -> Tensor:
        """The hidden states as the model hands them to its layers."""
        return hidden if self.packing is None else self.packing.unpack(hidden)[0]

    def states(self, hidden: Tensor) -> Tensor:
        """The hidden states [batch, sequence, width] without what layers share."""
        return hidden if self.packing is None else self.packing.states(hidden)


ID_BYTES = 3
"""An id of a token travels as so many bytes, because bfloat16 holds no larger whole numbers."""


def _columns_of(shape: tuple[int, ...]) -> int:
    """How many columns an argument of this shape after [batch, sequence] has."""
    return prod(shape) if shape else ID_BYTES


def _bytes_of(ids: Tensor) -> Tensor:
    """Ids [batch, sequence] as floating columns [batch, sequence, ID_BYTES], lowest byte first."""
    return torch.stack([(ids >> 8 * place) & 255 for place in range(ID_BYTES)], -1).float()


def _number_of(columns: Tensor) -> Tensor:
    """The ids whose bytes these are."""
    places = 256 ** torch.arange(ID_BYTES, device=columns.device)
    return (columns.long() * places).sum(-1)


def call_layer(layer: Callable[..., Any], hidden: Tensor, call: LayerCall) -> Tensor:
    """Run one decoder layer: hidden states in, hidden states out, packed if `call.packing`."""
    if call.packing is None:
        out = layer(hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out
    hidden, shared = call.packing.unpack(hidden)
    own = call.sharing(shared)
    out = layer(hidden, *own.args, **own.kwargs)
    return call.packing.pack(out[0] if isinstance(out, tuple) else out, shared)


class StandIn(nn.Module):
    """Replaces a decoder layer, and has all its attributes.

    Models read attributes of their layers, for example which kind of mask a layer needs.

    Args:
        layer: the layer.
        in_tuple: whether the model expects a tuple.
    """

    def __init__(self, layer: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        vars(self)["stands_for"] = layer  # not as a submodule
        self.in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        """An attribute of the layer, if the stand-in has none of this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["stands_for"], name)

    def answer(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the layer returns them."""
        return (hidden, None) if self.in_tuple else hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states that the layer is given."""
        return self.answer(args[0] if args else kwargs["hidden_states"])


class _Recorded(NamedTuple):
    """What a decoder layer was called with."""

    hidden: Tensor
    call: LayerCall


class _Recorder(StandIn):
    """Stands in for a decoder layer, records its arguments, and returns its input.

    Args:
        layers: all decoder layers of the model.
        index: the number of this one; the forward ends at the last.
        in_tuple: whether the model expects a tuple.
        seen: collects what the layers are called with in one forward. A second shape of hidden
            states shows that the model took a tensor for a tuple.
    """

    def __init__(
        self, layers: nn.ModuleList, index: int, in_tuple: bool, seen: dict[int, _Recorded]
    ) -> None:
        super().__init__(layers[index], in_tuple)
        self.index, self.last, self.seen = index, index + 1 == len(layers), seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call, and return the hidden states."""
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        call = LayerCall(tuple(args[1:]), kwargs, self.in_tuple)
        shapes = {tuple(x.shape) for x in (hidden, *(one.hidden for one in self.seen.values()))}
        if len(shapes) > 1:
            raise _OtherShapeError(f"hidden states of shapes {sorted(shapes)}")
        self.seen[self.index] = _Recorded(hidden, call)
        if self.last:
            raise _AfterLastLayer
        return self.answer(hidden)


@contextmanager
def replaced_layers(layers: nn.ModuleList, stand_ins: list[nn.Module]) -> Iterator[None]:
    """A context in which other modules replace the decoder layers."""
    originals = list(layers)
    try:
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        yield
    finally:
        for index, original in enumerate(originals):
            layers[index] = original


def _record(model: Any, layers: nn.ModuleList, input_ids: Tensor) -> list[_Recorded]:
    """Record one forward of the model up to its last decoder layer.

    Some models expect a tensor from a layer and some a tuple. Both are tried.
    """
    faults: list[Exception] = []
    for in_tuple in (False, True):
        seen: dict[int, _Recorded] = {}
        recorders = [_Recorder(layers, i, in_tuple, seen) for i in range(len(layers))]
        # A tensor first: a model that unpacks it as a tuple hands on another shape or fails.
        with torch.no_grad(), replaced_layers(layers, list(recorders)):
            try:
                model(input_ids=input_ids, use_cache=False)
            except _AfterLastLayer:
                if len(seen) == len(layers):
                    return [seen[index] for index in range(len(layers))]
            except Exception as fault:
                faults.append(fault)
    raise ArchitectureError(
        f"{type(model).__name__} did not call its {len(layers)} decoder layers in a plain "
        f"forward{f' ({in_short(faults[0])})' if faults else ''}",
        remedy="this model is not a plain decoder; it cannot be pruned layer by layer",
    ) from (faults[0] if faults else None)


def in_short(fault: Exception) -> str:
    """An exception as one line of text."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__


def first_inputs(model: Any, layers: nn.ModuleList, input_ids: Tensor) -> Tensor:
    """Return the first decoder layer's input for token ids: [batch, sequence, hidden].

    It is not packed: see `LayerCall.packed`.
    """
    return _record(model, layers, input_ids)[0].hidden


def token_values(
    model: Any, layers: nn.ModuleList, ids: Tensor, index: int, of: LayerCall
) -> Tensor:
    """The arguments of a layer that depend on the tokens: [batch, sequence, columns].

    Args:
        model: the model, with the weights of everything outside its layers.
        layers: its decoder layers.
        ids: token ids.
        index: the number of the layer.
        of: its call, which says what depends on the tokens.
    """
    call = _record(model, layers, ids)[index].call
    return replace(call, varying=of.varying).values()


def token_values_of_all(
    model: Any, layers: nn.ModuleList, ids: Tensor, calls: Sequence[LayerCall]
) -> Tensor:
    """`token_values` of all layers side by side, from one forward."""
    recorded = zip(_record(model, layers, ids), calls, strict=True)
    found = [replace(one.call, varying=call.varying) for one, call in recorded]
    return torch.cat([call.values() for call in found if call.varying], -1)


def layer_calls(model: Any, layers: nn.ModuleList, batches: list[Tensor]) -> list[LayerCall]:
    """How each layer is called, for several batches of equal shape.

    Returns:
        One call per layer. Arguments that depend on the tokens are those of the first batch.

    Raises:
        ArchitectureError: arguments depend on the tokens, but not one by one.
    """
    recorded = [_record(model, layers, batch) for batch in batches]
    calls = [one.call for one in recorded[0]]
    for other in recorded[1:]:
        for index, one in enumerate(other):
            found = _differing(calls[index], one.call, batches[0].shape)
            if found is None:
                raise ArchitectureError(
                    f"decoder layer {index} of {type(model).__name__} is handed values that depend "
                    "on the tokens besides its hidden states, and are not one for each token",
                    remedy="this family cannot be pruned layer by layer yet",
                )
            known = dict(calls[index].varying) | found
            calls[index] = replace(calls[index], varying=tuple(sorted(known.items())))
    hidden = recorded[0][0].hidden
    shared = _shared_states(layers, hidden, calls)
    packing = None
    if hidden.ndim != 3 or shared:  # more than one hidden state for each token
        packing = PackedHiddenStates.of(hidden, batches[0].shape, shared, type(model).__name__)
    return [replace(call, packing=packing) for call in calls]


def _differing(
    one: LayerCall, two: LayerCall, tokens: torch.Size
) -> dict[int, tuple[int, ...]] | None:
    """The arguments that differ between two batches, with their shapes after [batch, sequence].

    None if one of them has another form.
    """
    found = {}
    for place, (a, b) in enumerate(zip(one.leaves(), two.leaves(), strict=True)):
        if isinstance(a, Tensor) and not torch.equal(a, b):  # masks and rotary tables are equal
            # ids of tokens, or floating values for each of them
            if a.shape[:2] != tokens or a.is_floating_point() != (a.ndim > 2):
                return None
            found[place] = tuple(a.shape[2:])
    return found


class _WatchedDict(dict[str, States]):
    """A dictionary for what layers share, which notes what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> States:
        """What a layer has shared under this name."""
        self.read.add(key)
        return super().__getitem__(key)


def _shared_states(
    layers: nn.ModuleList, hidden: Tensor, calls: list[LayerCall]
) -> Mapping[str, States]:
    """What layers compute and later layers read, found by running those that get a dictionary.

    They run on the meta device, so the tensors have shapes but no values.
    """
    shared, meta = _WatchedDict(), torch.device("meta")
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        if not call.shares():
            continue
        own = (*layer.named_parameters(), *layer.named_buffers())
        empty = {name: tensor.to(meta) for name, tensor in own}
        there = call.to(meta).sharing(shared)
        try:
            with torch.no_grad():
                functional_call(layer, empty, (hidden.to(meta), *there.args), there.kwargs)
        except Exception as fault:
            raise ArchitectureError(
                f"decoder layer {index}, a {type(layer).__name__} that may share keys and values "
                f"with other layers, does not run by itself ({in_short(fault)})",
                remedy="this family cannot be pruned layer by layer yet",
            ) from fault
    # what nobody reads need not travel
    return {key: shared[key] for key in shared if key in shared.read}


@dataclass(frozen=True)
class LayerLayout:
    """The linears of one kind of layer, by their names within it.

    Attributes:
        groups: linears that share an input, in the order they run.
        unseen: linears whose input no hook sees, or that get several inputs in one forward. Scores
            and solvers that need inputs cannot use them.
    """

    groups: Groups
    unseen: tuple[str, ...] = ()


def kind_of(layer: nn.Module, call: LayerCall | None = None) -> Hashable:
    """A value that layers of one kind have in common.

    It holds classes, shapes and plain settings of all modules, and with `call` the shapes and plain
    values of the layer's arguments.
    """
    made_of = tuple(
        (
            path,
            type(module),
            tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)),
            tuple(
                (name, value)
                for name, value in sorted(vars(module).items())
                if isinstance(value, (bool, int, str)) and name not in ("layer_idx", "training")
            ),
        )
        for path, module in layer.named_modules()
    )
    if call is None:
        return made_of
    plain = [(k, v) for k, v in call.kwargs.items() if isinstance(v, (bool, int, str, type(None)))]
    shapes = tuple(tuple(t.shape) for t in call.tensors())
    return made_of, shapes, tuple(sorted(plain, key=str))


def layouts(target: Target, length: int) -> list[LayerLayout]:
    """The layout of every decoder layer.

    Args:
        target: the model; layers of a checkpoint stay empty.
        length: length of calibration windows.

    Raises:
        ArchitectureError: a layer cannot run by itself, or the model does not call its layers as
            a plain decoder does.
    """
    declared = [declared_layout(target, layer) for layer in target.layers]
    if all(layout is not None for layout in declared):
        return [layout for layout in declared if layout is not None]
    vocabulary = int(target.model.get_input_embeddings().weight.shape[0])
    # different tokens, so that two inputs of the layer are not equal by chance
    ids = torch.arange(min(length, TOKENS))[None] % vocabulary
    hidden, calls = calls_of(target, ids)
    found: dict[Hashable, LayerLayout] = {}
    result = []
    for index, (layer, known) in enumerate(zip(target.layers, declared, strict=True)):
        kind = kind_of(layer, calls[index])
        if known is None and kind not in found:
            name = target.architecture.layer_name(index)
            found[kind] = _seen_layout(layer, name, hidden, calls[index])
        result.append(known or found[kind])
    return result


def declared_layout(target: Target, layer: nn.Module) -> LayerLayout | None:
    """The groups that the family declares; None if they miss a linear of the layer."""
    if target.architecture.groups is None:
        return None
    there = linears_of(layer, "")
    groups = [[n for n in group if n in there] for group in target.architecture.groups]
    if {name for group in groups for name in group} != set(there):
        return None
    return LayerLayout(tuple(tuple(group) for group in groups if group))


def calls_of(target: Target, windows: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """The first layer's inputs for one micro-batch, and how each layer is called for it."""
    ids = windows.to(target.device)
    with target.outside():
        calls = layer_calls(target.model, target.layers, [ids, ids.flip(1)])
        return calls[0].packed(first_inputs(target.model, target.layers, ids)), calls


def _seen_layout(layer: nn.Module, name: str, hidden: Tensor, call: LayerCall) -> LayerLayout:
    """The layout of a layer, from one forward."""
    linears = linears_of(layer, name)
    device = next(layer.parameters()).device

    def forward() -> None:
        with torch.no_grad():
            call_layer(layer, hidden.to(device), call.to(device))

    try:
        with on_meta(layer) if device.type == "meta" else nullcontext():
            groups = find_groups(list(linears.values()), forward)
    except SecateurError:
        raise
    except Exception as fault:
        raise ArchitectureError(
            f"a {type(layer).__name__} does not run by itself ({in_short(fault)})",
            where=name,
            remedy="this family cannot be pruned layer by layer yet",
        ) from fault
    short = {id(linear.module): n for n, linear in linears.items()}
    named = [tuple(short[id(x.module)] for x in group) for group in groups]
    often = [n for group in named for n in group]  # twice: it gets several inputs in one forward
    unseen = tuple(n for n in linears if often.count(n) != 1)
    kept = (tuple(n for n in group if n not in unseen) for group in named)
    return LayerLayout(tuple(group for group in kept if group), unseen)


@contextmanager
def on_meta(layer: nn.Module) -> Iterator[None]:
    """A context in which the buffers of a layer without weights are on the meta device too."""
    buffers = dict(layer.named_buffers())
    layer.to("meta")
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            path, _, leaf = name.rpartition(".")
            layer.get_submodule(path)._buffers[leaf] = buffer


def input_mark(x: Tensor) -> Hashable:
    """A value that identifies an input in memory: its storage, and its part of the storage."""
    version = 0 if x.is_inference() else x._version  # counts changes in place
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), version


def find_groups(linears: Sequence[Linear], forward: Callable[[], object]) -> list[list[Linear]]:
    """Run a layer once to find the linears that share an input, in the order of their calls.

    Args:
        linears: all linears of the layer.
        forward: runs the layer on a sample of its input.
    """
    arrivals: dict[Hashable, list[Linear]] = {}
    keep: list[Tensor] = []  # the address of a freed input could be reused by another

    def watch(linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            keep.append(args[0])
            arrivals.setdefault(input_mark(args[0]), []).append(linear)

        return before

    with ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.module.register_forward_pre_hook(watch(linear)))
        forward()
    return list(arrivals.values())
