"""Counts what a cut removes: parameters by kind, key-value cache, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.models.layer_cache import layer_caches
from secateur.models.layout import Couplings
from secateur.structured.cut import Cut
from secateur.structured.design import Design, design
from secateur.structured.edits import parameters_of

UNCUT_BYTES = 2
"""Bytes cached for each token in place of a removed attention sub-block."""


@dataclass(frozen=True)
class Counts:
    """The parts of a model, counted. Tied weights count once.

    Attributes:
        attention: parameters of attention sub-blocks, without norms.
        ffn: parameters of dense feed-forwards.
        experts: parameters of mixtures of experts, with routers.
        norms: parameters of norms.
        embeddings: parameters of embeddings, head and their projections.
        other: all other parameters.
        decoder: all parameters of the decoder layers.
        kv_cache_bytes_per_token: what one token adds to the caches of all layers, in the model's
            dtype; layers with a sliding window stop growing at the window.
        file_bytes: bytes of all tensors, without file headers.
    """

    attention: int
    ffn: int
    experts: int
    norms: int
    embeddings: int
    other: int
    decoder: int
    kv_cache_bytes_per_token: int
    file_bytes: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.attention + self.ffn + self.experts + self.norms + self.embeddings + self.other


@dataclass(frozen=True)
class Accounting:
    """Before and after a cut.

    Attributes:
        before: the uncut model.
        after: the cut one.
        varied: whether the result needs its own code to load.
    """

    before: Counts
    after: Counts
    varied: bool

    @property
    def removed(self) -> float:
        """The removed fraction of all parameters."""
        return 1 - self.after.parameters / self.before.parameters

    @property
    def decoder_removed(self) -> float:
        """The removed fraction of the parameters of the decoder layers."""
        return 1 - self.after.decoder / self.before.decoder


def accounting(model: Any, cut: Cut, *, pad: bool = False) -> Accounting:
    """Count what a cut would remove, without making a tensor.

    Args:
        model: loaded or a skeleton.
        cut: what is kept.
        pad: as for the cut.

    Raises:
        RecipeError: the cut is impossible.
    """
    return account(design(model, cut, pad=pad))


def account(made: Design) -> Accounting:
    """Count what a design removes."""
    model = made.uncut
    there = parameters_of(model)
    sources = {n: there[edit.source] for n, edit in made.edits.items() if edit.source in there}
    before = [(n, p, p.numel() * p.itemsize, p.numel()) for n, p in there.items()]
    after = [
        (n, p, p.numel() * sources[n].itemsize, p.numel())
        for n, p in parameters_of(made.skeleton).items()
    ]
    return Accounting(
        _counts(model, made, before), _counts(made.skeleton, made, after), made.varied
    )


def _counts(model: Any, made: Design, parameters: Iterable[tuple[str, Tensor, int, int]]) -> Counts:
    """Count a model."""
    from secateur.models.varied import NoAttention

    prefix = made.architecture.layers_path + "."
    found: Counter[str] = Counter()
    for name, parameter, size, values in parameters:
        inner = name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else None
        module = model.get_submodule(name.rpartition(".")[0])
        found[_kind_of(inner, module, parameter, made.architecture.couplings)] += values
        found["decoder"] += values if inner is not None else 0
        found["file_bytes"] += size
    named = {name: found[name] for name in Counts.__dataclass_fields__}
    removed = sum(isinstance(module, NoAttention) for module in model.modules())
    values = sum(cache.values for cache in layer_caches(model))
    cache = values * model.dtype.itemsize + removed * UNCUT_BYTES
    return Counts(**(named | {"kv_cache_bytes_per_token": cache}))


def _kind_of(
    inner: str | None, module: nn.Module, parameter: Tensor, couplings: Couplings | None
) -> str:
    """The kind of a parameter."""
    if "Norm" in type(module).__name__:
        return "norms"
    if inner is None:
        return "embeddings" if parameter.ndim == 2 or couplings is None else "other"
    if couplings is None:
        return "other"
    axes = couplings.layer.get(inner) or couplings.layer.get(inner.rpartition(".")[0], ())
    if "state" in axes:
        return "other"
    if inner.startswith(f"{couplings.attention}."):
        return "attention"
    if "experts" in axes:
        return "experts"
    return "ffn" if inner.startswith(tuple(f"{x}." for x in couplings.ffn)) else "other"
