"""Cuts a checkpoint in a form at rest without touching the bytes of what stays.

A cut of layers or experts removes whole matrices. So the parts of the others are copied, under
names with the new numbers, and the configuration still says how they are stored. Its lists of
modules (those that are not converted) get the new numbers too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from secateur.models.at_rest import DESCRIPTIONS, AssembledReader
from secateur.models.skeleton import renamed
from secateur.structured.design import Design
from secateur.structured.edits import Edit

__all__ = ["part_edits", "renumbered", "renumbered_description"]

PATTERN = "re:"
"""How compressed-tensors marks a name as a regular expression."""


def renumbered(made: Design, name: str) -> str | None:
    """A name of the uncut model, or below it, with the new numbers of its layer and its expert.

    Args:
        made: the design.
        name: of a module or tensor, also without the base model's prefix.

    Returns:
        The name in the cut model; None if its layer or its expert is removed.
    """
    leaf = made.architecture.layers_path.rpartition(".")[2]
    found = re.search(rf"(?:^|\.){leaf}\.(\d+)(?=\.|$)", name)
    if found is None:
        return name
    order = [layer.index for layer in made.layers]
    if int(found[1]) not in order:
        return None
    new = order.index(int(found[1]))
    start, rest = name[: found.start(1)] + str(new), name[found.end(1) :]
    experts = made.architecture.experts
    kept = made.layers[new].experts
    if experts is None or kept is None:
        return start + rest
    where = re.escape(experts.module.rpartition(".")[2])
    inner = re.search(rf"\.{where}\.(\d+)(?=\.|$)", rest)
    if inner is None:
        return start + rest
    places = kept.tolist()
    if int(inner[1]) not in places:
        return None
    return f"{start}{rest[: inner.start(1)]}{places.index(int(inner[1]))}{rest[inner.end(1) :]}"


def part_edits(
    made: Design, edits: Mapping[str, Edit], reader: AssembledReader
) -> dict[str, Edit] | None:
    """Edits of the stored parts, by their names in the cut checkpoint.

    Args:
        made: the design.
        edits: of the dense tensors, from `stored_edits`.
        reader: the source.

    Returns:
        None if the cut changes a matrix that is made of parts, so that it has to be expanded.
    """
    found: dict[str, Edit] = {}
    entries = reader.stored.entries
    shown = {part for parts in reader.splits.values() for part in parts}
    for target, edit in edits.items():
        if edit.source in shown:
            continue
        if edit.source not in reader.made:
            found[target] = edit
            continue
        if edit.scale != 1 or any(kept is not None for kept in edit.kept):
            return None
        for part in reader.made[edit.source].parts.values():
            name = renumbered(made, part)
            assert name is not None
            found[name] = Edit(part, (None,) * len(entries[part].shape), entries[part].shape)
    whole = fused_edits(made, reader)
    if whole is None:
        return None
    found |= whole
    for name in reader.dropped:  # scales of activations: another program may use them
        new = renumbered(made, name)
        if new is not None:
            found[new] = Edit(name, (None,) * len(entries[name].shape), entries[name].shape)
    return found


def fused_edits(made: Design, reader: AssembledReader) -> dict[str, Edit] | None:
    """Edits of tensors that hold all experts of a layer, and of their parts.

    Returns:
        None if more is cut than whole experts, or an expert is not apart in the stored parts.
    """
    by_source = {edit.source: edit for edit in made.edits.values()}
    names = renamed(made.uncut, reader.splits)
    found: dict[str, Edit] = {}
    for stored in reader.splits:
        target, edit = renumbered(made, stored), by_source.get(names[stored])
        if target is None or edit is None:
            continue
        first, *others = edit.kept
        if any(kept is not None for kept in others):
            return None
        assembly = reader.made.get(stored)
        if assembly is not None and not assembly.stacked and first is not None:
            return None
        for part in [stored] if assembly is None else assembly.parts.values():
            name, shape = renumbered(made, part), reader.stored.entries[part].shape
            assert name is not None
            length = shape[0] if first is None else len(first)
            kept = (first, *(None,) * (len(shape) - 1))
            found[name] = Edit(part, kept, (length, *shape[1:]))
    return found


def renumbered_description(
    made: Design, config: Mapping[str, Any], reader: AssembledReader
) -> dict[str, Any]:
    """A configuration whose description of the form names the modules of the cut model.

    Every list of module names is renumbered. A regular expression with numbers in it is replaced by
    the names of the modules that it stands for.

    Args:
        made: the design.
        config: of the cut model, with the description of the uncut one.
        reader: the source.
    """
    modules = sorted({name.rpartition(".")[0] for name in reader.entries})

    def anew(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: anew(inner) for key, inner in value.items()}
        if isinstance(value, list) and all(isinstance(x, str) for x in value):
            return list(dict.fromkeys(new for x in value for new in names_of(made, x, modules)))
        return value

    result = dict(config)
    for key in DESCRIPTIONS:
        if key in result:
            result[key] = anew(result[key])
    text = result.get("text_config")
    if isinstance(text, Mapping):
        found = {key: anew(text[key]) for key in DESCRIPTIONS if key in text}
        result["text_config"] = {**text, **found}
    return result


def names_of(made: Design, name: str, modules: list[str]) -> Iterator[str]:
    """The names in the cut model of what one entry of a list names."""
    if not name.startswith(PATTERN):
        new = renumbered(made, name)
        if new is not None:
            yield new
    elif not re.search(r"\d", name):
        yield name
    else:
        pattern = re.compile(name.removeprefix(PATTERN))
        for module in modules:
            new = renumbered(made, module) if pattern.match(module) else None
            if new is not None:
                yield new
