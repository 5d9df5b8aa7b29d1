"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

__all__ = ["argument", "option", "switch"]


def argument(help: str) -> Any:
    """A positional argument."""
    return Parameter(help=help, show_default=False)


def option(*names: str, help: str) -> Any:
    """A flag with a value."""
    return Parameter(
        name=names or None, help=help, negative=(), show_default=True, allow_repeating=True
    )


def switch(help: str) -> Any:
    """A flag that is on, off (`--no-…`) or not given."""
    return Parameter(help=help, show_default=False, allow_repeating=True)


CalibrationSource = Annotated[
    str | None,
    option(
        "--calibration",
        help="JSONL or text file, folder, hub data set, named text, or safetensors windows. [c4]",
    ),
]
Windows = Annotated[int | None, option(help="Calibration windows. [128]")]
SequenceLength = Annotated[
    int | None, option(help="Tokens per window. [2048, or the model's length]")
]
Seed = Annotated[int | None, option(help="Seed of the choice of windows. [0]")]
Packing = Annotated[str | None, option(help="concatenate or random-crop.")]
Field = Annotated[str | None, option("--field", help="Field of a JSONL line that holds the text.")]
Budget = Annotated[
    float | None,
    option(
        "--memory-budget-gib",
        help="Peak memory allowed: of the GPU with --device cuda, else of this process. "
        "[4/5 of what is free]",
    ),
]
ActivationsPlace = Annotated[str | None, option("--activations", help="auto, memory or disk.")]
MicroBatch = Annotated[int | None, option(help="Tokens that pass a layer at once. [2048]")]
Device = Annotated[str | None, option(help="auto, cpu, cuda or cuda:N.")]
TrustRemoteCode = Annotated[
    bool, option("--trust-remote-code", help="Let code in the checkpoint run.")
]
Json = Annotated[bool, option("--json", help="The result as JSON on stdout.")]
