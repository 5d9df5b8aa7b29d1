"""Describes a model without changing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import RecipeError
from secateur.progress import Progress

if TYPE_CHECKING:
    from secateur.recipes.measure import InspectRecipe
    from secateur.reporting.diagnose import InspectResult
    from secateur.reporting.gguf_files import InspectFileResult


def inspect(
    model: str | Path,
    *,
    layer: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> InspectResult | InspectFileResult:
    """Report family, sizes, linears and the stored zeros of a model.

    Of a GGUF file the header alone is read: architecture, sizes, types, and what `structure` can
    cut. With `layer` the file is expanded to a checkpoint, and its weights are read.

    Args:
        model: hub id, folder, GGUF file or named sample.
        layer: list the linears of this decoder layer; None for a line for each layer.
        trust_remote_code: whether code that comes with the checkpoint may run.
        progress: receives every step.

    Raises:
        RecipeError: the model has no such layer.
        CheckpointError: the model is damaged or incomplete.
    """
    place = Path(model).expanduser()
    if layer is None and place.suffix == ".gguf" and place.is_file():
        from secateur.exporting.gguf.cut import cuttable
        from secateur.models.gguf_file import GGUFSource
        from secateur.reporting.gguf_files import FileCounts, InspectFileResult

        file = GGUFSource.read(place)
        return InspectFileResult(model=str(model), counts=FileCounts.of(file), cuts=cuttable(file))
    from secateur.diagnostics.audit import audit_checkpoint
    from secateur.diagnostics.findings import read_claims
    from secateur.engine.prune.coverage import silent_experts
    from secateur.models.sources import resolve
    from secateur.reporting.diagnose import InspectResult

    source = resolve(
        str(model), trust_remote_code=trust_remote_code, values=False, progress=progress
    )
    folder = source.folder
    audit = audit_checkpoint(folder, progress=progress)
    layers = audit.num_hidden_layers
    if layer is not None and not 0 <= layer < layers:
        raise RecipeError(
            f"there is no decoder layer {layer}: the model has {layers}",
            where="--layer",
            remedy=f"use a number from 0 to {layers - 1}, or leave --layer out for all",
        )
    silent = silent_experts(read_claims(folder).unseen)
    return InspectResult(model=str(model), audit=audit, layer=layer, silent=silent)


def inspect_recipe(recipe: InspectRecipe, progress: Progress) -> InspectResult | InspectFileResult:
    """Carry out a recipe."""
    return inspect(**dict(recipe), progress=progress)
