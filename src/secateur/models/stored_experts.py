"""Experts in a checkpoint: stored one by one, or fused, under the names of the family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from secateur.errors import CheckpointError
from secateur.models.architecture import experts_of
from secateur.models.checkpoint import CheckpointReader
from secateur.models.expert_layout import PROJECTIONS, Experts

__all__ = ["expert_renamings", "split_stored", "stored_experts_of", "stored_in_table"]


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
    return {
        rf"(\.{where}\.\d+)\.{stored}\.": rf"\1.{name}."
        for stored, name in zip(experts.stored, PROJECTIONS, strict=True)
        if stored != name
    }


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
        if leaf in experts.layout.names and owner.endswith("." + experts.module):
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
