"""Edits of the stored tensors, which need not be the parameters of the model.

Names are those of the source, with layers and experts numbered anew. A checkpoint may omit the base
model's prefix. Most checkpoints store every expert's linears one by one, where transformers has all
experts of a layer in one parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from secateur.errors import CheckpointError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.inventory import part_outside
from secateur.models.layout import PROJECTIONS
from secateur.models.skeleton import model_names
from secateur.structured.design import Design
from secateur.structured.edits import Edit


def stored_edits(
    made: Design, stored: Mapping[str, str], reader: CheckpointReader
) -> dict[str, Edit]:
    """Edits of stored tensors, by the stored names of the results.

    A tower for pictures may be stored in another form, such as queries, keys and values in one
    matrix. Its tensors are copied.

    Args:
        made: the design.
        stored: from `stored_names` with `split=False`, of the model with its experts opened.
        reader: the checkpoint.

    Raises:
        CheckpointError: a parameter is not stored.
    """
    found: dict[str, Edit] = {}
    beside = copied_parts(made, stored, reader)
    for name, edit in made.edits.items():
        whole = edit.source in stored  # experts may be stored fused, as transformers holds them
        if not whole and part_of(made, edit.source) in beside:
            continue
        for part in [(None, edit)] if whole else apart(made, edit, stored):
            if part[1].source not in stored:
                raise CheckpointError(
                    f"the checkpoint does not contain {part[1].source}",
                    where=str(reader.folder),
                    remedy="the file is incomplete, or of another model than config.json says",
                )
            source = stored[part[1].source]
            target = numbered_anew(made, source, edit.source, name, part[0])
            found[target] = replace(part[1], source=source)
    for names in beside.values():
        for name in names:
            shape = reader.entries[name].shape
            found[name] = Edit(name, (None,) * len(shape), shape)
    return found


def copied_parts(
    made: Design, stored: Mapping[str, str], reader: CheckpointReader
) -> dict[str, list[str]]:
    """Tensors of parts beside the decoder that are stored in another form, by part."""
    found: dict[str, list[str]] = {}
    there = set(stored.values())
    if reader.entries.keys() <= there:
        return found
    for name, own in model_names(made.uncut, reader, split=False).items():
        part = part_of(made, own)
        if name not in there and part:
            found.setdefault(part, []).append(name)
    built = {part_of(made, edit.source) for edit in made.edits.values()}
    return {part: names for part, names in found.items() if part in built}


def part_of(made: Design, name: str) -> str:
    """The part of a model beside its decoder that a parameter belongs to; empty within it."""
    decoder = made.architecture.layers_path.rpartition(".")[0]
    return "" if name.startswith(f"{decoder}.") else part_outside(name, decoder)


def apart(
    made: Design, edit: Edit, stored: Mapping[str, str]
) -> Iterator[tuple[tuple[int, int] | None, Edit]]:
    """The edits of the tensors that hold a parameter, with the expert's old and new number.

    A checkpoint may store gate and up of all experts in a tensor each, or the linears of each
    expert; other parameters are whole.
    """
    owner = edit.source.rpartition(".")[0]
    halves = [f"{owner}.{name}" for name in PROJECTIONS[:2]]
    if not edit.source.endswith(".gate_up_proj") or halves[0] not in stored:
        yield from experts_apart(made, edit)
        return
    count, both, inner = edit.shape
    for half in halves:
        yield None, replace(edit, source=half, shape=(count, both // 2, inner))


def experts_apart(made: Design, edit: Edit) -> Iterator[tuple[tuple[int, int] | None, Edit]]:
    """The edits of each expert's linears, with its old and new number; others unchanged."""
    experts = made.architecture.experts
    owner, _, leaf = edit.source.rpartition(".")
    if experts is None or not owner.endswith(f".{experts.module}"):
        yield None, edit
        return
    if leaf not in experts.layout.names:
        yield None, edit
        return
    whole = made.uncut.get_parameter(edit.source)
    axes = edit.kept[1:]
    if experts.layout.transposed and not leaf.endswith("_bias"):
        axes = axes[::-1]
    kept = range(len(whole)) if edit.kept[0] is None else edit.kept[0].tolist()
    apart = experts.layout.apart(leaf, torch.empty(edit.shape, device="meta"))
    for new, old in enumerate(kept):
        for part, view in apart[new].items():
            yield (old, new), Edit(f"{owner}.{old}.{part}", axes, tuple(view.shape))


def numbered_anew(
    made: Design, stored: str, source: str, target: str, expert: tuple[int, int] | None
) -> str:
    """A stored name with the new number of its layer, and of its expert.

    Args:
        made: the design.
        stored: the name in the uncut checkpoint.
        source: the parameter's name in the uncut model.
        target: its name in the cut one.
        expert: old and new number of the expert.
    """
    prefix = made.architecture.layers_path + "."
    if not source.startswith(prefix):
        return stored
    old, new = (name.removeprefix(prefix).partition(".")[0] for name in (source, target))
    stored = re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", stored, count=1)
    if expert is not None:
        stored = re.sub(rf"\.experts\.{expert[0]}\.", f".experts.{expert[1]}.", stored, count=1)
    return stored
