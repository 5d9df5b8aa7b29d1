"""The recipe of `secateur structure`: how much is kept, and how it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from secateur.recipes.calibration import Calibration
from secateur.recipes.memory import Device, GgufDtype, Memory
from secateur.recipes.presets import structure_presets
from secateur.recipes.prune import Effort, Fitting
from secateur.recipes.recovery import Distill
from secateur.recipes.run import OutputFolder, Resuming
from secateur.recipes.section import WHAT_TO_CUT, Flag, Recipe, Section, Texts

__all__ = ["Depth", "Kept", "LearnedOptions", "StructureRecipe"]

Kept = int | float
"""A number of units, or the fraction of them that is kept (a float of at most 1)."""

Counted = Flag(value="NUMBER", default="all")


class Depth(Section):
    """How decoder layers, or their two halves, are selected."""

    by: Annotated[Literal["influence", "angular", "greedy", "search"], Flag("depth_by")] = Field(
        "influence",
        description="How layers are selected: by block influence, angular distance, greedy "
        "removal, or search.",
    )
    units: Annotated[Literal["layers", "blocks"], Flag("depth_units")] = Field(
        "layers",
        description="Remove whole decoder layers, or their attention and FFN blocks separately.",
    )


class LearnedOptions(Section):
    """Learned masks: the model learns which units stay while its weights learn."""

    alone: ClassVar[tuple[type, ...]] = (int,)

    steps: int = Field(400, gt=0, description="Steps of the optimizer.")
    batch: int = Field(4, gt=0, description="Windows in a step.")
    learning_rate: float | None = Field(
        None, gt=0, lt=1, description="Learning rate of the weights; if not given, as for retrain."
    )
    mask_learning_rate: float = Field(
        0.1, gt=0, description="Learning rate of the gates and the multipliers."
    )
    target_warm_up: float = Field(
        0.3, ge=0, le=1, description="Share of the steps in which the targets fall to their sizes."
    )
    domains: Texts = Field(
        (),
        description="Further texts. With the calibration text they are the domains of dynamic "
        "batch loading.",
    )
    references: dict[str, float] = Field(
        default_factory=dict,
        description="Loss to reach by domain, in nats per token; the uncut model's if not given.",
    )
    update_every: int = Field(
        50, ge=0, description="Steps between updates of the domains' proportions; 0: never."
    )
    held_out: int = Field(8, gt=0, description="Windows of each domain that measure its loss.")
    save_minutes: float = Field(
        5.0, ge=0, description="Minutes between the saves that a stopped run resumes from."
    )

    @classmethod
    def opened(cls, value: Any) -> Any:
        """A number alone is the number of steps."""
        return {"steps": value} if isinstance(value, int) and not isinstance(value, bool) else value


class WhatToCut(Section):
    """How many units stay."""

    group: ClassVar[str] = WHAT_TO_CUT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."
    )
    keep_layers: Annotated[Kept | None, Counted] = Field(
        None, gt=0, description="Decoder layers that stay: a number, or a fraction such as 0.8."
    )
    experts: Annotated[Kept | None, Counted] = Field(
        None, gt=0, description="Experts of each layer that stay: a number or a fraction."
    )
    hidden_size: Annotated[Kept | None, Counted] = Field(
        None,
        gt=0,
        description="Channels of the residual stream that stay: a number or a fraction.",
    )
    kv_groups: Annotated[Kept | None, Counted] = Field(
        None,
        ge=0,
        description="KV groups of each layer that stay, with their query heads: a number or a "
        "fraction.",
    )
    query_heads: Annotated[Kept | None, Counted] = Field(
        None,
        gt=0,
        description="Query heads of each KV group that stay: a number or a fraction. The KV cache "
        "keeps its size.",
    )
    ffn: Annotated[Kept | None, Counted] = Field(
        None, ge=0, description="FFN neurons of each layer that stay: a number or a fraction."
    )
    keep_parameters: Annotated[float | None, Flag(value="FRACTION", default="all")] = Field(
        None,
        gt=0,
        lt=1,
        description="Fraction of the decoder's parameters that stays. Heads and FFN neurons lose "
        "the same share.",
    )
    file_mib: Annotated[float | None, Flag(value="MIB", default="no limit")] = Field(
        None, gt=0, description="Largest size of the weight files; heads and FFN neurons are cut."
    )
    decode_latency: Annotated[float | None, Flag(value="FRACTION", default="no limit")] = Field(
        None,
        gt=0,
        lt=1,
        description="Fraction of the time per token that may stay, measured on this machine in "
        "transformers at batch 1. Heads and FFN neurons are cut.",
    )
    kv_cache: Annotated[float | None, Flag(value="FRACTION", default="all")] = Field(
        None, gt=0, lt=1, description="Fraction of the KV cache that stays; KV groups are cut."
    )
    whole_first: int = Field(
        0, ge=0, description="Decoder layers at the start that keep all heads and neurons."
    )
    whole_last: int = Field(
        0, ge=0, description="Decoder layers at the end that keep all heads and neurons."
    )
    multiple: int = Field(1, ge=1, description="Keep FFN neurons in multiples of this number.")
    pad: bool = Field(
        False, description="Pad layers with zeros to one size, for engines that need it."
    )


class HowToCut(Section):
    """How units are selected, and what happens to the weights that read them."""

    effort: Annotated[Effort | None, Flag(default="balanced, if no score is given")] = Field(
        None, description="A preset, which fills in what is not given: fast, balanced or best."
    )
    score: str | None = Field(None, description="The score that selects units.")
    solver: str | None = Field(
        None, description="The solver that refits the weights which read removed units."
    )
    method_parameters: Annotated[dict[str, int | float], Flag(value="NAME=NUMBER")] = Field(
        default_factory=dict, description="Parameters of the score and the solver."
    )
    allocation: Annotated[str | None, Flag(default="uniform")] = Field(
        None,
        description="How the cut is spread over the layers: uniform, owl, layer-sensitivity, "
        "global or search.",
    )
    learned: Annotated[LearnedOptions | None, Flag(value="STEPS", default="not learned")] = Field(
        None, description="Learn in this many steps which units stay, together with the weights."
    )
    depth: Depth = Field(default_factory=lambda: Depth())


class StructureRecipe(
    # pydantic lists the fields of the last base first
    Device,
    GgufDtype,
    Fitting,
    HowToCut,
    WhatToCut,
    OutputFolder,
    Recipe,
):
    """One structured cut."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = structure_presets
    run: ClassVar[type[Section] | None] = Resuming

    distillation: Distill = Field(default_factory=lambda: Distill())
    calibration: Calibration = Field(default_factory=lambda: Calibration())
    memory: Memory = Field(default_factory=lambda: Memory())
