"""What a cut removes, counted: parameters by kind, key-value cache, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.models.couplings import Couplings
from secateur.structured.cut import Cut, Sizes
from secateur.structured.design import Design, design, kept_count
from secateur.structured.edits import parameters_of

__all__ = ["Accounting", "Counts", "account", "accounting"]

UNCUT_BYTES = 2
"""What is cached of each token in the place of an attention sub-block that is gone."""


@dataclass(frozen=True)
class Counts:
    """What a model consists of. Tied weights count once.

    Attributes:
        attention: parameters of attention sub-blocks, norms apart.
        ffn: of dense feed-forwards.
        experts: of mixtures of experts, routers with them.
        norms: of norms.
        embeddings: of embeddings, head and their projections.
        other: of anything else.
        decoder: of the decoder layers, everything in them.
        kv_cache_bytes_per_token: keys and values of one token in all layers, in the model's dtype;
            layers with a sliding window stop growing at it.
        file_bytes: of all tensors; headers of files are not counted.
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
        """All of them."""
        return self.attention + self.ffn + self.experts + self.norms + self.embeddings + self.other


@dataclass(frozen=True)
class Accounting:
    """Before and after a cut.

    Attributes:
        before: the uncut model.
        after: the cut one.
        varied: whether the result takes code of its own to load.
    """

    before: Counts
    after: Counts
    varied: bool

    @property
    def removed(self) -> float:
        """The fraction of all parameters that is gone."""
        return 1 - self.after.parameters / self.before.parameters

    @property
    def decoder_removed(self) -> float:
        """The fraction of the parameters of the decoder layers that is gone."""
        return 1 - self.after.decoder / self.before.decoder


def accounting(model: Any, cut: Cut, *, pad: bool = False) -> Accounting:
    """What a cut would remove; no tensor is made.

    Args:
        model: loaded or a skeleton.
        cut: what is kept.
        pad: as for the cut itself.

    Raises:
        RecipeError: the cut is impossible.
    """
    return account(design(model, cut, pad=pad))


def account(made: Design) -> Accounting:
    """What a design removes."""
    model = made.uncut
    kept = [kept_count(made, layer, "groups") for layer in made.layers]
    there = parameters_of(model)
    sources = {name: there[edit.source] for name, edit in made.edits.items()}
    before = [(n, p, p.numel() * p.itemsize, p.numel()) for n, p in there.items()]
    after = [
        (n, p, p.numel() * sources[n].itemsize, p.numel())
        for n, p in parameters_of(made.skeleton).items()
    ]
    return Accounting(
        counts(model, made, before, made.sizes.groups),
        counts(made.skeleton, made, after, kept),
        made.varied,
    )


def counts(
    model: Any,
    made: Design,
    parameters: Iterable[tuple[str, Tensor, int, int]],
    groups: Iterable[int],
) -> Counts:
    """Count a model.

    Args:
        model: with its modules in place.
        made: the design, for the description of the family.
        parameters: name, parameter, bytes and number of values of each.
        groups: KV groups of each layer.
    """
    prefix = made.architecture.layers_path + "."
    found: Counter[str] = Counter()
    for name, parameter, size, values in parameters:
        inner = name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else None
        module = model.get_submodule(name.rpartition(".")[0])
        found[kind_of(inner, module, parameter, made.architecture.couplings)] += values
        found["decoder"] += values if inner is not None else 0
        found["file_bytes"] += size
    named = {name: found[name] for name in Counts.__dataclass_fields__}
    cache = sum(cache_bytes(made.sizes, count, model.dtype.itemsize) for count in groups)
    return Counts(**(named | {"kv_cache_bytes_per_token": cache}))


def cache_bytes(sizes: Sizes, groups: int, itemsize: int) -> int:
    """Bytes that one token takes in the key-value cache of one layer."""
    return 2 * groups * sizes.head_dim * itemsize if groups else UNCUT_BYTES


def kind_of(
    inner: str | None, module: nn.Module, parameter: Tensor, couplings: Couplings | None
) -> str:
    """What a parameter counts as.

    Args:
        inner: its name within a decoder layer; None outside.
        module: that holds it.
        parameter: itself.
        couplings: of its family.
    """
    if "Norm" in type(module).__name__:
        return "norms"
    if inner is None:
        return "embeddings" if parameter.ndim == 2 or couplings is None else "other"
    if couplings is None:
        return "other"
    if inner.startswith(f"{couplings.attention}."):
        return "attention"
    axes = couplings.layer.get(inner) or couplings.layer.get(inner.rpartition(".")[0], ())
    if "experts" in axes:
        return "experts"
    return "ffn" if inner.startswith(tuple(f"{x}." for x in couplings.ffn)) else "other"
