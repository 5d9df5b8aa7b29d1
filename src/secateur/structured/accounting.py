"""Counts what a cut removes: parameters by kind, key-value cache, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.errors import VerificationError
from secateur.models.architecture import Couplings
from secateur.models.checkpoint import CheckpointReader
from secateur.models.counting import layer_caches
from secateur.models.opening import form_of
from secateur.models.skeleton import build_skeleton, parameters_of
from secateur.runs.records import Counts
from secateur.structured.cut import Cut
from secateur.structured.design import Design, design

_UNCUT_BYTES = 2
"""Bytes cached for each token in place of a removed attention sub-block."""

KINDS = ("attention", "ffn", "experts", "norms", "embeddings", "other")
"""The kinds of parameters; each parameter has one."""


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

    def to_json(self) -> dict[str, Any]:
        """The counts by kind, without their sum."""
        before, after = (x.model_dump(exclude={"parameters"}) for x in (self.before, self.after))
        return {"before": before, "after": after, "varied": self.varied}


def accounting(model: Any, cut: Cut) -> Accounting:
    """Count what a cut would remove, without making a tensor.

    Args:
        model: loaded or a skeleton.
        cut: what is kept.

    Raises:
        RecipeError: the cut is impossible.
    """
    return account(design(model, cut))


def account(made: Design) -> Accounting:
    """Count what a design removes."""
    there = parameters_of(made.uncut)
    before = {name: p.itemsize for name, p in there.items()}
    after = {n: before[edit.source] for n, edit in made.edits.items() if edit.source in there}
    return Accounting(
        _counts(made.uncut, made, before), _counts(made.skeleton, made, after), made.varied
    )


def _counts(model: Any, made: Design, itemsizes: Mapping[str, int]) -> Counts:
    """Count a model, whose weights are stored in numbers of these sizes."""
    from secateur.models.varied import NoAttention

    prefix = made.architecture.layers_path + "."
    found: Counter[str] = Counter()
    for name, parameter in parameters_of(model).items():
        values = parameter.numel()
        inner = name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else None
        module = model.get_submodule(name.rpartition(".")[0])
        found[_kind_of(inner, module, parameter, made.architecture.couplings)] += values
        found["decoder"] += values * (inner is not None)
        found["file_bytes"] += values * itemsizes[name]
    # A stand-in for attention caches one number of each token, so that the cache has its length.
    removed = sum(isinstance(module, NoAttention) for module in model.modules())
    values = sum(cache.values for cache in layer_caches(model))
    cache = values * model.dtype.itemsize + removed * _UNCUT_BYTES
    return Counts(
        **{name: found[name] for name in (*KINDS, "decoder", "file_bytes")},
        kv_cache_bytes_per_token=cache,
        parameters=sum(found[kind] for kind in KINDS),
    )


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


def verified(
    skeleton: Any, source: Path, made: Path, promised: Mapping[str, Any], *, trust_remote_code: bool
) -> Accounting:
    """Count the parameters of a written model, and compare them with the notes of the last step.

    Args:
        skeleton: the uncut model.
        source: its folder.
        made: folder of the cut model.
        promised: the notes of the last step.
        trust_remote_code: whether code from the folder may run.

    Raises:
        VerificationError: the numbers differ.
    """
    written = build_skeleton(made, trust_remote_code=trust_remote_code)
    before, after = accounting(skeleton, Cut()).before, accounting(written, Cut()).before
    if form_of(source) is not None:  # in a form at rest, weights take fewer bytes than in memory
        before = before.model_copy(update={"file_bytes": CheckpointReader(source).total_bytes})
        after = after.model_copy(update={"file_bytes": CheckpointReader(made).total_bytes})
    decoder = promised["after"]["decoder"]
    if after.decoder != decoder:
        raise VerificationError(
            f"the decoder has {after.decoder:,} parameters, the cut promised {decoder:,}",
            where=str(made),
            remedy="this is a fault in secateur; please report it",
        )
    return Accounting(before, after, promised["varied"])
