"""The recipe of `secateur prune` and `secateur plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from secateur.recipes.calibration import Calibration
from secateur.recipes.memory import Device, GgufDtype, Memory
from secateur.recipes.presets import presets
from secateur.recipes.recovery import Distill, Reconstruct
from secateur.recipes.run import OutputFolder, Resuming
from secateur.recipes.section import OUTPUT, WHAT_TO_PRUNE, Flag, Recipe, Section, Texts

__all__ = ["Effort", "Fitting", "PruneRecipe"]

Effort = Literal["fast", "balanced", "best"]
"""The names of the presets."""


class WhatToPrune(Section):
    """Which weights become zero."""

    group: ClassVar[str] = WHAT_TO_PRUNE

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."
    )
    sparsity: Annotated[float | None, Flag(default="the pattern's own")] = Field(
        None, description="Fraction of zeros, 0 to 1."
    )
    pattern: str = Field(
        "unstructured",
        description="Which zeros are allowed: unstructured, N:M (N kept of M), or blocks as "
        "ROWSxCOLUMNS.",
    )
    include: Annotated[Texts, Flag(value="GLOB")] = Field(
        ("*",), description="Names of the linears to prune."
    )
    exclude: Annotated[Texts, Flag(value="GLOB")] = Field(
        (), description="Names of linears that stay dense."
    )
    overrides: Annotated[dict[str, float], Flag(value="GLOB=SPARSITY")] = Field(
        default_factory=dict, description="Another sparsity for some linears; 0 keeps them dense."
    )


class HowToPrune(Section):
    """The method, and where it puts the zeros."""

    effort: Annotated[Effort | None, Flag(default="balanced, if no method is given")] = Field(
        None, description="A preset, which fills in what is not given: fast, balanced or best."
    )
    method: str | None = Field(None, description="A method by name; `secateur methods` lists them.")
    score: str | None = Field(None, description="A score, to compose a method.")
    solver: str | None = Field(None, description="A solver, to compose a method.")
    refine: str | None = Field(None, description="Improve the mask before solving: swaps.")
    method_parameters: Annotated[dict[str, int | float], Flag(value="NAME=NUMBER")] = Field(
        default_factory=dict, description="Parameters of the score, the solver and the refinement."
    )
    scope: Annotated[
        Literal["row", "layer", "global"] | None, Flag(default="as in the method's paper")
    ] = Field(None, description="The set of weights that compete: row, layer or global.")
    allocation: str = Field(
        "uniform",
        description="How sparsity is spread over the linears: uniform, owl, layer-sensitivity, "
        "global or search.",
    )
    asymmetric_damping: float = Field(
        0.2, ge=0, description="How strongly the asymmetric fit is pulled to the dense weights."
    )
    sequential: Literal["group", "layer"] = Field(
        "group",
        description="Gather statistics group by group in one pass, or layer by layer in two as "
        "the papers do.",
    )
    on_collapse: Literal["stop", "warn"] = Field(
        "warn", description="What to do if a pruned linear has lost its output: stop or warn."
    )


class Fitting(Section):
    """How weights are fitted to the calibration text."""

    asymmetric: Annotated[bool, Flag(off="symmetric")] = Field(
        False,
        description="asymmetric fits the outputs of the dense model; symmetric fits each linear's "
        "own outputs.",
    )
    fast_matmuls: Annotated[bool, Flag(off="exact_matmuls")] = Field(
        False, description="Calibrate in bfloat16 where the processor is faster at it."
    )


class Compress(Section):
    """How the pruned model is compressed, if it is."""

    group: ClassVar[str] = OUTPUT
    alone: ClassVar[tuple[type, ...]] = (str,)

    values: Annotated[
        Literal["auto", "keep", "bfloat16", "float16", "float32", "int8"] | None,
        Flag("compress", default="not compressed", value="VALUES"),
    ] = Field(
        None,
        description="Also compress the result, as `secateur compress --values VALUES` does: auto, "
        "keep, bfloat16, float16, float32 or int8.",
    )
    embeddings: Annotated[Literal["auto", "int8"], Flag("compress_embeddings")] = Field(
        "auto", description="auto keeps embedding and head as they are. int8 stores them so."
    )

    @classmethod
    def opened(cls, value: Any) -> Any:
        """`compress: int8` names the values."""
        return {"values": value} if isinstance(value, str) else value


class PruneRecipe(
    # pydantic lists the fields of the last base first
    Device,
    GgufDtype,
    Fitting,
    HowToPrune,
    WhatToPrune,
    OutputFolder,
    Recipe,
):
    """One pruning run."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = presets
    run: ClassVar[type[Section] | None] = Resuming

    reconstruction: Reconstruct = Field(default_factory=lambda: Reconstruct())
    distillation: Distill = Field(default_factory=lambda: Distill())
    calibration: Calibration = Field(default_factory=lambda: Calibration())
    memory: Memory = Field(default_factory=lambda: Memory())
    compress: Compress = Field(default_factory=lambda: Compress())
