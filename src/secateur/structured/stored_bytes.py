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
from secateur.structured.design import Design
from secateur.structured.edits import Edit

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
        Whole experts can be taken from parts that hold all of a layer.
    """
    found: dict[str, Edit] = {}
    entries = reader.stored.entries
    for target, edit in edits.items():
        assembly = reader.made.get(edit.source)
        if assembly is None:
            found[target] = edit
            continue
        first, *others = edit.kept
        if edit.scale != 1 or any(kept is not None for kept in others):
            return None
        if first is not None and not assembly.stacked:
            return None
        for part in assembly.parts.values():
            name, shape = renumbered(made, part), entries[part].shape
            assert name is not None
            kept = tuple(first if axis == 0 else None for axis in range(len(shape)))
            length = shape[:1] if first is None else (len(first),)
            found[name] = Edit(part, kept, (*length, *shape[1:]))
    for name in reader.dropped:  # scales of activations: another program may use them
        new = renumbered(made, name)
        if new is not None:
            found[new] = Edit(name, (None,) * len(entries[name].shape), entries[name].shape)
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
