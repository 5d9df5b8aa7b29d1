"""Rounds the output head to a grid of integers so that its errors compensate each other on a text.

A pruning run rounds the layers, with the inputs that the rounded model has. The head comes after
all of them, and may also be the embedding, so it is rounded alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.calibration.statistics.gram import Gram
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.machine import fast_matmuls
from secateur.models.block_files import BlockFiles, StoredBlocks
from secateur.models.checkpoint import CheckpointReader
from secateur.models.targets import CheckpointTarget, walk_layers
from secateur.progress import Progress
from secateur.recipes.compress import CompressRecipe
from secateur.runs.output import whole_folder
from secateur.runtime.formats import GRID_BITS, fitting
from secateur.runtime.install import path_of
from secateur.runtime.storage_plan import DEFAULT_GROUP
from secateur.sparsity.solvers.obs import OBS

LOOKED_UP = 0.1
"""How much a squared error of a row counts, as a fraction of the mean square of an input of the
head, where the row is also looked up."""

SOLVED_AT_ONCE = 2**22
"""Weights of the head that are solved at the same time; the solver has nine copies in float32."""


@torch.no_grad()
def round_head(
    recipe: CompressRecipe,
    target: CheckpointTarget,
    gram_of: Callable[[], Tensor],
    folder: Path,
    progress: Progress,
) -> dict[str, CheckpointReader]:
    """Round the output head so that the errors of its weights compensate each other on a text.

    Where it is tied, its matrix is also the embedding, and then errors of the weights count
    themselves too: with the gram G of the head's inputs, tr((W − Ŵ)(G + λI)(W − Ŵ)ᵀ) is small.
    Resume or reuse an earlier run.

    Args:
        recipe: gives values and group: integers on a grid of groups, or a type of llama.cpp.
        target: the model.
        gram_of: returns G, as `head_gram` does.
        folder: for the rounded matrix.
        progress: receives every part of the head.

    Returns:
        What reads the rounded matrix, by its stored name.
    """
    output_head: Any = target.model.get_output_embeddings()
    tied = f"{path_of(target.model, output_head)}.weight" not in target.stored
    matrix = target.model.get_input_embeddings() if tied else output_head
    name = target.stored[f"{path_of(target.model, matrix)}.weight"]
    if not folder.exists():
        gram = gram_of()
        if tied:
            # G + λI, with λ in the unit of G's diagonal
            gram = gram + LOOKED_UP * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        weight, group = target.reader.read(name), recipe.group_size or DEFAULT_GROUP
        values = fitting(recipe.embeddings, weight.shape[1])
        solver = OBS(bits=GRID_BITS.get(values, values), group=group)
        prepared = solver.prepare({"gram": gram})
        # exact for any grid of groups; blocks need float32
        rounded = torch.empty_like(weight, dtype=torch.bfloat16 if values in GRID_BITS else None)
        blocks: list[Tensor] = []
        # rows are independent once the gram is factored
        parts = weight.split(max(1, SOLVED_AT_ONCE // weight.shape[1]))
        progress.start("rounding the head", len(parts))
        for part, out in zip(parts, rounded.split(len(parts[0])), strict=True):
            everything = torch.ones_like(part, dtype=torch.bool, device=gram.device)
            own = part.to(gram.device)
            solution = solver.solve(own, prepared, everything)
            out.copy_(solution.weight)
            blocks += [] if solution.blocks is None else [solution.blocks.cpu()]
            progress.step()
        progress.finish()
        with whole_folder(folder) as unfinished:
            save_file({name: rounded}, unfinished / "model.safetensors")
            if blocks:
                found = StoredBlocks(values, torch.cat(blocks))
                BlockFiles(unfinished).write("head", {name: found})
    return {name: CheckpointReader(folder)}


def head_gram(target: CheckpointTarget, windows: Tensor, progress: Progress) -> Tensor:
    """G = XᵀX of the inputs X of the output head on windows of text, float32 [hidden, hidden]."""
    outer, head = EmbeddingAndHead(target, windows), target.model.get_output_embeddings()
    gram = Gram((head.out_features, head.in_features), target.device)
    progress.start("reading what enters the head", len(windows))
    for rows in outer.parts(range(len(windows)), 2):
        hidden = outer.embedded(rows)
        for number, layer in walk_layers(target):
            hidden = [outer.run(number, layer, one) for one in hidden]
        # the hook sees what enters the head: hidden states after the last norm
        hook = head.register_forward_pre_hook(lambda _, x: gram.update(x[0].flatten(0, -2)))
        with hook, outer.outside(), fast_matmuls(target.device):
            for row, states in zip(rows, hidden, strict=True):
                outer.head(row, states)
        progress.step(len(rows))
    progress.finish()
    return gram.value()
