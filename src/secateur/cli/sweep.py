"""`secateur sweep`: perplexity against sparsity, for several methods."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from secateur.cli import options as o
from secateur.errors import RecipeError

__all__ = ["sweep"]


def sweep(
    model: Annotated[str, o.argument(help="Hub id, folder, GGUF file or named sample.")],
    *,
    methods: Annotated[
        str, o.option(help="Comma-separated: methods, or presets (fast, balanced, best).")
    ],
    output: Annotated[str, o.option("--output", "-o", help="Folder of the sweep.")],
    sparsities: Annotated[
        str, o.option(help="Comma-separated fractions of zeros, such as 0.3,0.5,0.7.")
    ] = "",
    patterns: Annotated[
        str, o.option(help="Comma-separated patterns to try as well, such as 2:4,4:8.")
    ] = "",
    calibration: o.CalibrationSource = None,
    windows: o.Windows = None,
    sequence_length: o.SequenceLength = None,
    seed: o.Seed = None,
    perplexity: Annotated[
        list[str] | None,
        o.option(help="Text to judge on; may be repeated. [wikitext2]"),
    ] = None,
    judge_length: Annotated[
        int | None,
        o.option(help="Tokens of a window to judge on. [2048, or the model's length]"),
    ] = None,
    max_windows: Annotated[
        int | None, o.option(help="Judge on the first windows of each text only.")
    ] = None,
    keep_models: Annotated[
        bool, o.option("--keep-models", help="Leave the weights of every point in place.")
    ] = False,
    device: Annotated[str, o.option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Prune at many sparsities, judge each, draw the curves; the same command again goes on."""
    given: dict[str, Any] = {
        "calibration": calibration,
        "windows": windows,
        "sequence_length": sequence_length,
        "seed": seed,
        "texts": tuple(perplexity) if perplexity else None,
    }
    shares = numbers(sparsities)
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.sweep.plan import SweepPlan
    from secateur.workflows.sweep.run import sweep as run_sweep

    plan = SweepPlan(
        model,
        words(methods),
        shares,
        words(patterns),
        judge_length=judge_length,
        max_windows=max_windows,
        device=device,
        trust_remote_code=trust_remote_code,
        **{key: value for key, value in given.items() if value is not None},
    )
    with show_progress() as progress:
        result = run_sweep(plan, output, keep_models=keep_models, progress=progress)
    print_result(result, as_json=as_json)
    if result.failures:
        sys.exit(1)


def words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[float, ...]:
    """The fractions between commas.

    Raises:
        RecipeError: one is no number.
    """
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise RecipeError(
            f"--sparsities {text!r} are not numbers", remedy="for example --sparsities 0.3,0.5,0.7"
        ) from None
