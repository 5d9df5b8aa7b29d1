"""`secateur demo`: prune, pack, time, evaluate and report a real model, without a hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from secateur.progress import Labelled
from secateur.recipes.keywords import public_function
from secateur.recipes.verbs import imported
from secateur.reporting.evaluate import DemoResult
from secateur.steps.evaluate import evaluate
from secateur.steps.prune import prune

if TYPE_CHECKING:
    from secateur.progress import Progress
    from secateur.recipes.prune import DemoRecipe

MODEL = "smollm2-135m"
CALIBRATION, JUDGING = "boolq-calibration", "boolq-held-out"
BACKENDS = ("packed", "dense int8", "dense bf16", "torch bf16")
"""The timed backends: the packed model, our kernels on dense weights, and torch."""
PAGE = "report.html"
PROMPTS = (
    "The Eiffel Tower is a famous landmark in",
    "Once upon a time, in a village by the sea, there lived an old woman who",
)


def run_demo(recipe: DemoRecipe, listener: Progress) -> DemoResult:
    """Run the four steps, then write the report.

    The dense model in int8 is judged beside the pruned one: it is what a user would take instead.
    Its speed is that of the contender `dense int8`; its files are deleted.
    """
    bench, compress = public_function("bench"), public_function("compress")
    folder = Path(recipe.output)
    pruned = prune(
        MODEL,
        output=folder,
        effort=recipe.effort,
        sparsity=recipe.sparsity,
        calibration=CALIBRATION,
        windows=recipe.windows,
        sequence_length=512,
        compress="int8",
        progress=Labelled(listener, "1 of 4, prune and pack"),
        restart=True,
        overwrite=(folder / PAGE).is_file(),  # only what a demo made
    )
    timed = bench(
        folder,
        contenders=BACKENDS,
        prompt_tokens=16,
        new_tokens=32,
        rounds=3,
        progress=Labelled(listener, "2 of 4, time"),
    )
    held_out: dict[str, Any] = {
        "text": JUDGING,
        "sequence_length": 512,
        "windows": recipe.text_windows,
    }
    judged = evaluate(
        folder,
        dense=MODEL,
        generation=True,
        prompts=PROMPTS,
        progress=Labelled(listener, "3 of 4, judge"),
        **held_out,
    )
    listener = Labelled(listener, "4 of 4, the dense model in int8")
    with TemporaryDirectory() as scratch:
        output = Path(scratch) / "int8"
        rounded = compress(MODEL, output=output, values="int8", progress=listener)
        rounded_judged = evaluate(output, progress=listener, **held_out)
    page = imported("secateur.report_page.report:report")([folder], folder / PAGE).page
    return DemoResult(MODEL, pruned, timed, judged, rounded, rounded_judged, page)
