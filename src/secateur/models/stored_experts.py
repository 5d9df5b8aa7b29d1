"""Experts in a checkpoint: stored one by one, or fused, under the names of the family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.architecture import experts_of
from secateur.models.checkpoint import CheckpointReader
from secateur.models.header import TensorEntry
from secateur.models.layout import PROJECTIONS, ExpertLayout, Experts


def stored_experts_of(model: Any) -> Experts | None:
    """Where the experts of a model are and how they are stored; None for a dense model.

    Where the family and transformers' table differ, the table is of this very class.
    """
    experts = experts_of(model)
    if experts is None:
        return None
    table = stored_in_table(model)
    return experts if table == PROJECTIONS else replace(experts, stored=table)


def expert_renamings(experts: Experts) -> Mapping[str, str]:
    """Patterns in stored names of experts' linears, and what replaces them; as in transformers."""
    where = re.escape(experts.module.rpartition(".")[2])
    alone = {
        rf"(\.{where}\.\d+)\.{stored}\.": rf"\1.{name}."
        for stored, name in zip(experts.stored, PROJECTIONS, strict=True)
        if stored != name
    }
    if not experts.stacked:
        return alone
    stacked = rf"\.{re.escape(experts.stacked)}\.({'|'.join(PROJECTIONS)})\.weight"
    return {**alone, stacked: rf".{experts.module}.\1"}


def stored_in_table(model: Any) -> tuple[str, str, str]:
    """What gate, up and down are called where they are stored alone, as transformers' table says.

    Args:
        model: of transformers, loaded or a skeleton.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = dict(zip(PROJECTIONS, PROJECTIONS, strict=True))
    parts = {"gate_up_proj": PROJECTIONS[:2], "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
    for converter in get_model_conversion_mapping(model):
        if isinstance(converter, WeightConverter):
            sources = [pattern for pattern in converter.source_patterns if "*" in pattern]
            made = parts.get(converter.target_patterns[0].rpartition(".")[2], ())
            if len(converter.target_patterns) == 1 and len(made) == len(sources):
                found |= {m: s.split(".")[-2] for m, s in zip(made, sources, strict=True)}
    return tuple(found.values())  # type: ignore[return-value]


def loads_one_by_one(model: Any) -> bool:
    """Whether transformers fuses experts that a checkpoint of this class stores one by one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(
        isinstance(converter, WeightConverter)
        and any(re.search(r"experts\.\*\.", pattern) for pattern in converter.source_patterns)
        for converter in get_model_conversion_mapping(model)
    )


class FusedExperts(CheckpointReader):
    """A reader that shows experts that are stored one by one as the fused tensors of their class.

    Args:
        reader: stores experts one by one.
        names: the model's name for each stored tensor.
        layout: the form of the class.
        shapes: of the fused parameters, by name.

    Raises:
        CheckpointError: a matrix of an expert is not stored.
    """

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
                raise CheckpointError(
                    f"the checkpoint does not contain all experts of {owner}",
                    where=str(reader.folder),
                    remedy="the files are incomplete: copy or download them again",
                )
            first = reader.entries[next(iter(parts.values()))]
            for part in parts.values():
                del self.entries[part]
            size = torch.Size(shape).numel() * first.dtype.itemsize
            self.entries[fused] = TensorEntry(first.file, 0, size, first.dtype, shape)
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


def split_stored(reader: CheckpointReader, experts: Experts, names: Mapping[str, str]) -> None:
    """Show experts that are stored fused as single tensors, named like those stored one by one.

    Args:
        reader: the checkpoint.
        experts: how the family stores them.
        names: the model's name for each stored tensor.

    Raises:
        CheckpointError: a tensor has another form than the family declares.
    """
    called = dict(zip(PROJECTIONS, experts.stored, strict=True))
    found: dict[str, dict[str, str]] = {}
    for stored in list(reader.entries):
        owner, _, leaf = names[stored].rpartition(".")
        fused = leaf in (*experts.layout.names, *experts.layout.projections)
        if fused and owner.endswith("." + experts.module):
            found.setdefault(owner, {})[leaf] = stored
    for owner, tensors in found.items():
        shapes = {leaf: reader.entries[stored].shape for leaf, stored in tensors.items()}
        complete = set(shapes) == set(experts.layout.names)
        if complete and not experts.layout.fits(shapes):
            first = min(tensors.values())
            raise CheckpointError(
                f"the experts of {owner} are stored in another form than transformers holds them: "
                + ", ".join(f"{leaf} {list(shape)}" for leaf, shape in sorted(shapes.items())),
                where=str(reader.entries[first].file),
                remedy="save the model anew with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
            )
        for leaf, stored in tensors.items():
            place = stored.removesuffix(f".{leaf}") if stored.endswith(f".{leaf}") else owner
            entry = reader.entries[stored]
            meta = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            views = {}
            for number, own in enumerate(experts.layout.apart(leaf, meta)):
                for part, view in own.items():
                    name, _, kind = part.partition(".")
                    views[f"{place}.{number}.{called[name]}.{kind}"] = view
            reader.split(stored, views)
