"""Weights with masks beside them, as torch.nn.utils.prune keeps them in a state dict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from secateur.importing import import_formats
from secateur.models.at_rest import AssembledReader, Assembly, SourceFolder, damaged


def pairs_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The stored names of `original` and `mask` of the masked parameters, by that of the parameter.

    torch.nn.utils.prune stores `P_orig` and `P_mask`, for P such as `layer.weight`. A parameter
    that has only one of the two is listed too.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        start, dot, own = name.rpartition(".")
        if own.endswith("_orig") or own in ("weight_mask", "bias_mask"):
            base = start + dot + own[: -len("_orig")]
            found[base] = {"original": f"{base}_orig", "mask": f"{base}_mask"}
    return found


class TorchPrune:
    """W = W_orig ⊙ mask, the state dict of torch.nn.utils.prune."""

    name: ClassVar[str] = "torch-prune"

    def recognises(self, source: SourceFolder) -> bool:
        """Whether a tensor is one of a pair."""
        return bool(pairs_of(source.reader.entries))

    def open(self, source: SourceFolder) -> AssembledReader:
        """Return the masked weights.

        Raises:
            CheckpointError: a weight or a mask is missing, or they differ in shape.
        """
        made, entries = {}, source.reader.entries
        for name, parts in pairs_of(entries).items():
            missing = [part for part in parts.values() if part not in entries]
            if missing:
                raise damaged(f"there is no {missing[0]}, so {name} cannot be made", source.folder)
            original, mask = (entries[part] for part in parts.values())
            if original.shape != mask.shape:
                what = f"the mask is {list(mask.shape)}, the weight {list(original.shape)}"
                raise damaged(what, parts["mask"])
            made[name] = Assembly(
                parts, original.shape, original.dtype, self.name,
                lambda parts: torch.where(as_mask(parts["mask"]), parts["original"], 0),
            )  # fmt: skip
        return AssembledReader(source.reader, made, source.config)


def as_mask(stored: Tensor) -> Tensor:
    """A stored mask as bools, True = kept.

    Raises:
        CheckpointError: it has another number than 0 and 1.
    """
    kept = stored != 0
    if stored.dtype != torch.bool and not torch.equal(kept.to(stored.dtype), stored):
        raise damaged("a mask has other numbers than 0 and 1", "mask")
    return kept


import_formats.register(TorchPrune.name)(TorchPrune())
