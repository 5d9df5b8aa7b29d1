"""Where the parameters of a model are in a checkpoint: which stored tensors make each of them.

Most parameters are stored unchanged, under the same or an older name. Some consist of several
stored tensors (the experts of a layer, one after the other), or share one (queries, keys and
values). transformers has a table of such conversions. This module applies it to one parameter at a
time, so that reading a model, or writing a trained one, never needs all of it in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import ArchitectureError, CheckpointError
from secateur.models.checkpoint import CheckpointReader


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
