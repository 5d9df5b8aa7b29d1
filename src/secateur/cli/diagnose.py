"""`secateur diagnose`: is the model sound, and is it what it claims to be?"""

from __future__ import annotations

import sys
from typing import Annotated

from secateur.cli import options as o
from secateur.errors import RecipeError

__all__ = ["diagnose"]


def diagnose(
    model: Annotated[
        str | None,
        o.argument(help="Folder, compressed or not; hub id, GGUF file or named sample."),
    ] = None,
    *,
    dense: Annotated[
        str | None, o.option(help="The dense model: its layers are compared, one by one.")
    ] = None,
    text: Annotated[
        str, o.option(help="What both read: a text, or a safetensors file of windows.")
    ] = "boolq-held-out",
    windows: Annotated[int, o.option(help="Windows of that text.")] = 8,
    sequence_length: Annotated[
        int | None, o.option(help="Tokens per window. [256, or the model's length]")
    ] = None,
    training_log: Annotated[
        str | None,
        o.option(help="Log of a retraining: JSON lines with step, loss, learning_rate."),
    ] = None,
    target: Annotated[
        bool, o.option("--target", help="Only say what this machine can speed up.")
    ] = False,
    device: Annotated[str, o.option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Check zeros, values, units and layers; exit code 3 if something is proven wrong."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.judge.diagnose import check_target
    from secateur.workflows.judge.diagnose import diagnose as run_diagnosis

    if target:
        print_result(check_target(), as_json=as_json)
        return
    if model is None:
        raise RecipeError(
            "no model to diagnose", remedy="secateur diagnose DIR, or secateur diagnose --target"
        )
    with show_progress() as progress:
        found = run_diagnosis(
            model,
            dense=dense,
            text=text,
            windows=windows,
            sequence_length=sequence_length,
            training_log=training_log,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print_result(found, as_json=as_json)
    if found.count("error"):
        sys.exit(3)
