"""Heads and neurons: the run that prunes, with whole columns for a pattern.

What reads the heads (the output projection) and the neurons (the down projection) loses whole
columns, chosen and made up for layer by layer on pruned activations, as any linear of a pruning
run. What made those columns is then read by nobody, and is cut away with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from secateur.engine.progress import Progress
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure_schema import StructureRecipe
from secateur.sparsity.exact_count import pruned_count
from secateur.sparsity.patterns import Pattern, parse_pattern
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, Sizes, consumers, sizes_of, unit_width
from secateur.structured.surgery import cut_from_zeros
from secateur.workflows.preparing import prepare
from secateur.workflows.pruning import run_prepared
from secateur.workflows.structure_plan import Aim

__all__ = ["narrow"]

LEVEL = 0.05
"""The fraction of a layer's neurons that a level of a searched allocation is worth, about."""


def narrow(
    recipe: StructureRecipe,
    aim: Aim,
    folder: Path,
    output: Path,
    windows: Path,
    progress: Progress,
) -> tuple[Cut, dict[str, Any], Path]:
    """Choose heads and neurons and refit what reads them.

    Args:
        recipe: how.
        aim: how much.
        folder: the model.
        output: takes the same model with columns of zeros.
        windows: calibration tokens, saved.
        progress: told of every step.

    Returns:
        What is kept, how it was chosen, and `output`.
    """
    values = {
        "model": str(folder),
        "output": str(output),
        "score": recipe.score,
        "solver": recipe.solver,
        "parameters": recipe.solver_parameters,
        "sparsity": 0.0,
        "allocation": recipe.allocation or "uniform",
        "asymmetric": recipe.asymmetric,
        "fast_matmuls": recipe.fast_matmuls,
        "calibration": {"source": str(windows), "seed": recipe.calibration.seed},
        "memory": recipe.memory.model_dump(),
        "device": recipe.device,
        "trust_remote_code": recipe.trust_remote_code,
    }
    resumes = (output.with_name(output.name + ".partial") / "secateur" / "layers.jsonl").exists()
    if not output.exists():
        prepared = prepare(build_recipe(values), output.with_name(output.name + ".partial"))
        model = prepared.target.model
        sizes, readers = sizes_of(model), consumers(model)
        patterns = {
            f"*.{name}": parse_pattern(pattern_text(sizes, kind, recipe.multiple))
            for kind, name in readers.items()
        }
        starts = {f"*.{readers[k]}": s for k, s in shares(aim, sizes, model).items() if k in readers}
        wanted = {glob for glob, share in starts.items() if share > 0 or aim.joint is not None}
        prepared = replace(
            prepared,
            selection=replace(prepared.selection, include=tuple(sorted(wanted)), starts=starts),
            patterns=patterns,
            costs=costs_of(prepared.target.architecture.layer_name, readers, sizes, model),
        )
        run_prepared(prepared, progress, resume=resumes)
    reader = CheckpointReader(output)
    return cut_from_zeros(reader, trust_remote_code=recipe.trust_remote_code), {
        "score": recipe.score,
        "solver": recipe.solver,
        "allocation": recipe.allocation or "uniform",
    }, output


def pattern_text(sizes: Sizes, kind: str, multiple: int) -> str:
    """The pattern of the linear that reads units of a kind."""
    together = multiple if kind == "neurons" else 1
    return f"*x{unit_width(sizes, kind)}" + (f"/{together}" if together > 1 else "")
