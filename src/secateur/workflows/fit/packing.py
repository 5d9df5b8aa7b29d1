"""Packs the winner of a fit, and writes the recipe that makes it again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace

from secateur.recipes.chain import ChainRecipe
from secateur.recipes.reading import build_recipe, dump_recipe
from secateur.reporting.results.compress import CompressResult
from secateur.runs.atomic import write_text
from secateur.runs.folder import NOTES, RunFolder
from secateur.workflows.compress.pack import pack_into
from secateur.workflows.compress.rounding import told_of
from secateur.workflows.fit.finalists import Finalist
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.making import chosen_values, packing_recipe, steps_of

RECIPE, WINDOWS = "recipe.yaml", "windows.safetensors"


def pack_winner(
    folder: RunFolder, ground: Ground, winner: Finalist, begun: float
) -> CompressResult:
    """Pack the winner into the folder of the run, with its recipe.

    Args:
        folder: of the run, opened.
        ground: of the fit.
        winner: what is packed.
        begun: when the run began, for the record.
    """
    recipe = ground.recipe
    text = f"{recipe.output}/{NOTES}/{WINDOWS}"
    steps = steps_of(recipe, winner.kinds, text)
    if winner.cut:
        [[verb, given]] = winner.cut.items()
        steps.insert(0, {verb: {**given, "calibration": {"source": text}}})
    ends = {"model": recipe.model, "output": recipe.output}
    rounding = told_of(winner.folder) if "calibration" in steps[-1]["compress"] else {}
    if rounding:
        rounding["calibration"] = {**rounding["calibration"], "source": text}
    chosen = chosen_values(recipe, winner.folder, winner.kinds, rounding)
    source = replace(ground.source, folder=winner.sparse)
    compress = packing_recipe(recipe, winner.kinds)
    report = pack_into(folder, compress, source, chosen, ground.progress, begun)
    shutil.copyfile(ground.fitted, folder.notes / WINDOWS)
    if winner.cut:
        shutil.copytree(winner.base / NOTES, folder.notes / "steps" / "structure")
    chain = {
        **ends,
        "output": f"{recipe.output}-again",
        "steps": steps,
        "trust_remote_code": recipe.trust_remote_code,
    }
    write_text(folder.notes / RECIPE, dump_recipe(build_recipe(ChainRecipe, chain)))
    places = {str(ground.fitted): text}
    places |= {str(one): str(recipe.output) for one in (winner.sparse, winner.folder, winner.base)
               if one != ground.reader.folder}  # fmt: skip
    name_the_result(folder, places)
    return report


def name_the_result(folder: RunFolder, places: Mapping[str, str]) -> None:
    """Replace places among the work of the run by those of the result, in the card and notes."""
    notes = [file for file in folder.notes.rglob("*") if file.suffix in (".json", ".yaml")]
    for file in (folder.model / "README.md", *notes):
        text = file.read_text(encoding="utf-8")
        for work, result in places.items():
            text = text.replace(work, result)
        write_text(file, text)
