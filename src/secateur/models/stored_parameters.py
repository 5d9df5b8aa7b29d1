"""Where the parameters of a model are in a checkpoint: which stored tensors make each of them.

Experts are stored one by one or fused, under names of the family. Here either form is shown as the
other one.

Most other parameters are stored unchanged, under the same or an older name. Some consist of several
stored tensors (the experts of a layer, one after the other), or share one (queries, keys and
values). transformers has a table of such conversions. This module applies it to one parameter at a
time, so that reading a model, or writing a trained one, never needs all of it in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.errors import ArchitectureError, CheckpointError
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
    """What transformers' table calls gate, up and down where they are stored alone."""
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
    """Show experts that are stored fused as single tensors, named like those stored one by one."""
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


@dataclass(frozen=True)
class Group:
    """Stored tensors, and the parameters or buffers that consist of exactly these.

    Attributes:
        stored: names in the checkpoint, in the order of joining.
        patterns: the pattern of `converter` that each of them matches.
        names: in the model.
        converter: converts one into the other; None where one tensor is one parameter.
    """

    stored: tuple[str, ...]
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    converter: Any = None


class StoredModel:
    """The parameters of a model, in a checkpoint.

    Args:
        model: as transformers builds it, experts not opened; parameters may be on the meta device.
        reader: the checkpoint.

    Raises:
        CheckpointError: a parameter is not stored, or has another shape than in the model.
        ArchitectureError: a conversion of transformers cannot be undone, so a trained model could
            not be written.
    """

    def __init__(self, model: Any, reader: CheckpointReader) -> None:
        self.model, self.reader = model, reader
        model.tie_weights()  # parameters built on the meta device are not tied yet
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.groups = list(self._grouped())
        self.group_of = {name: group for group in self.groups for name in group.names}
        self.aliases: dict[str, tuple[str, ...]] = {}
        for names in aliases(model):
            self.aliases |= dict.fromkeys(names, names)
            self._check_stored(names)

    def read(self, name: str) -> Tensor:
        """A parameter by any of its names, whole, in the stored dtype, on the CPU."""
        names = self.aliases.get(name, (name,))
        known = next(n for n in names if n in self.group_of)
        group = self.group_of[known]
        return self._made(group, {s: self.reader.read(s) for s in group.stored})[known]

    def written(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors of new values, with one group in memory.

        Args:
            values: maps one of the names of a parameter to its new value; a parameter without one
                keeps its stored value. A mapping that reads its values on access keeps memory
                small.

        Yields:
            Stored name and tensor, of the stored shape. Its dtype is that of the value.
        """
        for group in self.groups:
            found = {n: self._one_of(n, values) for n in group.names}
            if not any(found.values()):
                continue
            whole = {n: values[key] if key else self.read(n) for n, key in found.items()}
            yield from self._undone(group, whole).items()

    def _one_of(self, name: str, values: Mapping[str, Any]) -> str | None:
        """The name under which a parameter has a new value."""
        return next((n for n in self.aliases.get(name, (name,)) if n in values), None)

    def _check_stored(self, names: tuple[str, ...]) -> None:
        if not any(name in self.group_of for name in names):
            raise CheckpointError(
                f"the checkpoint does not contain {names[0]}",
                where=str(self.reader.folder),
                remedy="the file is incomplete, or of another model than config.json says",
            )

    def _grouped(self) -> Iterator[Group]:
        """All groups, each tested on the meta device in both directions."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model)
        renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
        converters = [x for x in mapping if isinstance(x, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        prefix, known = self.model.base_model_prefix, dict(self.model.state_dict())
        found: dict[str, list[tuple[str, str | None]]] = {}
        for stored in sorted(self.reader.entries, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
            if name not in known and stored in known:
                name, pattern = stored, None
            if name in known:
                found.setdefault(name, []).append((stored, pattern))
        # The inverse of the conversions needs to know which of them were applied.
        self.model._weight_conversions = [x for x in mapping if x.was_used()]
        for name, parts in found.items():
            names = tuple(stored for stored, _ in parts)
            patterns = tuple(pattern for _, pattern in parts if pattern is not None)
            if not patterns:
                yield self._plain(name, names[-1])
            else:
                yield self._tried(Group(names, patterns, (name,), by_pattern[patterns[0]]))

    def _plain(self, name: str, stored: str) -> Group:
        """A group of one tensor that is one parameter."""
        entry = self.reader.entries[stored]
        if entry.shape != self.shapes[name]:
            raise CheckpointError(
                f"{stored}: shape {entry.shape} is stored, config.json asks for "
                f"{self.shapes[name]}",
                where=str(entry.file),
                remedy="the configuration and the weights are of different models",
            )
        return Group((stored,), (), (name,))

    def _tried(self, group: Group) -> Group:
        """A conversion, with the names of all its results; refused if it cannot be undone."""
        entries = {s: self.reader.entries[s] for s in group.stored}
        meta = {s: torch.empty(e.shape, dtype=e.dtype, device="meta") for s, e in entries.items()}
        try:
            made = self._made(group, meta)
            back = self._undone(group, made)
        except Exception as error:  # whatever a conversion of transformers raises
            raise self._cannot(group, f"{type(error).__name__}: {error}") from error
        if {n: tuple(t.shape) for n, t in made.items()} != {n: self.shapes.get(n) for n in made}:
            raise self._cannot(group, f"its results {', '.join(made)} have other shapes")
        if {s: tuple(t.shape) for s, t in back.items()} != {s: e.shape for s, e in entries.items()}:
            raise self._cannot(group, "the inverse gives other tensors than the stored ones")
        return Group(group.stored, group.patterns, tuple(made), group.converter)

    def _cannot(self, group: Group, why: str) -> ArchitectureError:
        return ArchitectureError(
            f"transformers converts {len(group.stored)} stored tensors, and this conversion "
            f"cannot be undone one parameter at a time: {why}",
            where=group.stored[0],
            remedy="save the model anew with transformers and train that: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
        )

    def _made(self, group: Group, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert stored tensors to parameters."""
        if group.converter is None:
            return {group.names[0]: stored[group.stored[0]]}
        converter = deepcopy(group.converter)
        for name, pattern in zip(group.stored, group.patterns, strict=True):
            converter.add_tensor(group.names[0], name, pattern, stored[name])
        made = converter.convert(group.names[0], model=self.model, config=self.model.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}

    def _undone(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert parameters back to stored tensors."""
        if group.converter is None:
            return {group.stored[0]: values[group.names[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.model, dict(values)))


def aliases(model: torch.nn.Module) -> list[tuple[str, ...]]:
    """All names of each parameter: more than one where it is tied."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return [tuple(names) for names in found.values()]
