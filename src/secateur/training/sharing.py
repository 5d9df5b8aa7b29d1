"""Loads a checkpoint in several processes. Each reads its part, and none loads all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.models.checkpoint import CheckpointReader
from secateur.models.opening import load_whole
from secateur.models.skeleton import build_skeleton
from secateur.models.stored_parameters import StoredModel, aliases
from secateur.training.process_group import ProcessGroup


def load(
    folder: Path,
    processes: ProcessGroup,
    *,
    dtype: torch.dtype | None = None,
    apart: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """Load a transformers model in eval mode, and divide it if there are several processes.

    A single process loads the whole model. Several processes read the decoder layers one at a time,
    and each keeps its part. So a process holds at most its part of the model and one layer.

    Args:
        folder: the checkpoint.
        processes: the processes.
        dtype: dtype of the parameters; None keeps the stored one.
        apart: see `ProcessGroup.shard`.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: a parameter is not stored.
    """
    if processes.ranks == 1:
        return load_whole(
            folder, processes.device, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model = build_skeleton(folder, trust_remote_code=trust_remote_code, opened=False)
    stored = StoredModel(model, CheckpointReader(folder))
    names = {group[0]: group for group in aliases(model)}

    def fill(unit: nn.Module) -> None:
        own = {id(p) for p in unit.parameters() if p.is_meta}
        for name, group in names.items():
            if id(model.get_parameter(name)) not in own:
                continue
            value = stored.read(name).to(processes.device, dtype)
            parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
            for alias in group:
                owner, _, leaf = alias.rpartition(".")
                model.get_submodule(owner)._parameters[leaf] = parameter

    for name, buffer in model.named_buffers():
        if name in stored.group_of:
            buffer.copy_(stored.read(name))
    processes.shard(model, fill, apart=apart)
    return model
