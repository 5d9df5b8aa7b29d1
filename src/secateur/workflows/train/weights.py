"""From the float32 weights that a training ends with to a checkpoint, one tensor in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from secateur.errors import VerificationError
from secateur.models.checkpoint import CheckpointReader, PatchedCopy
from secateur.models.skeleton import build_skeleton
from secateur.models.stored import StoredModel
from secateur.models.whole import load_whole
from secateur.progress import Progress
from secateur.recipes.train import RetrainRecipe
from secateur.training.masks import Masks
from secateur.training.parts import is_shared, local, rows_of
from secateur.workflows.train.adapters import merged

__all__ = ["OpenFile", "check_written", "stored_model", "write_trained"]


class OpenFile(Mapping[str, Tensor]):
    """The tensors of an open file, each read on access."""

    def __init__(self, stored: Any) -> None:
        self.stored, self.names = stored, frozenset(stored.keys())

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = self.stored.get_tensor(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_trained(
    recipe: RetrainRecipe, source: Path, masks: Masks, final: Path, made: Path, progress: Progress
) -> None:
    """Write a copy of the source in which what was trained has its new values.

    The copy has the names, shapes, dtypes and files of the source, and what was not trained is
    byte for byte the same. With adapters the model is whole in memory, as it was to train them.

    Args:
        recipe: of the training.
        source: the folder of the model it began with.
        masks: what is zero in the result.
        final: the file of the float32 weights that the training ended with.
        made: takes the copy.
        progress: receives the steps of the copying.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    stored, trust = stored_model(source, recipe.trust_remote_code), recipe.trust_remote_code
    copy = PatchedCopy(stored.reader, made)
    copy.create(progress)
    with safe_open(final, framework="pt") as opened:
        values: Mapping[str, Tensor] = OpenFile(opened)
        if recipe.lora is not None:
            model = load_whole(source, torch.device("cpu"), trust_remote_code=trust)
            values = dict(merged(recipe, model, masks, load_file(final)).named_parameters())
        for name, tensor in stored.written(values):
            copy.write(name, tensor)
    copy.sync()


def check_written(folder: Path, masks: Masks, *, trust_remote_code: bool = False) -> None:
    """Read a trained checkpoint again, one parameter in memory; each process looks at its part.

    Args:
        folder: the checkpoint.
        masks: what is zero in it, as this process has them.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        VerificationError: a pruned weight is not zero in it.
    """
    stored = stored_model(folder, trust_remote_code)
    for name, mask in masks.kept.items():
        rows = rows_of(mask) if is_shared(mask) else slice(None)
        filled = int(stored.read(name)[rows][~local(mask).cpu()].count_nonzero())
        if filled:
            raise VerificationError(
                f"{filled} pruned weights are not zero in the files",
                where=f"{name} in {folder}",
                remedy="the files were changed after they were written, or this is a fault in "
                "secateur; what was trained is still in the work folder",
            )


def stored_model(folder: Path, trust: bool) -> StoredModel:
    """The parameters of a checkpoint, as transformers builds the model."""
    skeleton = build_skeleton(folder, trust_remote_code=trust, opened=False)
    return StoredModel(skeleton, CheckpointReader(folder))
