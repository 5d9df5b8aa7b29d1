"""Writes the float32 weights of a training into a checkpoint, with one tensor in memory."""

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
from secateur.models.opening import load_whole
from secateur.models.skeleton import build_skeleton
from secateur.models.stored_parameters import StoredModel
from secateur.progress import Progress
from secateur.recipes.train import TrainRecipe
from secateur.training.masks import Masks, is_shared, local, rows_of
from secateur.workflows.train.adapters import merged


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
    recipe: TrainRecipe, source: Path, masks: Masks, final: Path, made: Path, progress: Progress
) -> None:
    """Write a copy of the source with the new values of the trained parameters.

    The copy has the names, shapes, dtypes and files of the source. Tensors that were not trained
    are the same byte for byte. With adapters the whole model is in memory, as in their training.

    Args:
        recipe: recipe of the training.
        source: the folder of the initial model.
        masks: the zeros of the result.
        final: the file of the final float32 weights.
        made: the folder of the copy.
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
    """Read a trained checkpoint again, one parameter at a time. Each process checks its part.

    Args:
        folder: the checkpoint.
        masks: the zeros of the checkpoint, reduced to this process's part.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        VerificationError: a pruned weight is not zero in the checkpoint.
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
    """The parameters of a checkpoint in the names of the transformers model."""
    skeleton = build_skeleton(folder, trust_remote_code=trust, opened=False)
    return StoredModel(skeleton, CheckpointReader(folder))
