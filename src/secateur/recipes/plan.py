"""The recipe of `secateur plan`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.prune import PruneRecipe
from secateur.recipes.section import MEMORY, Flag, Section, matching

__all__ = ["PlanRecipe"]


class ClusterMachines(Section):
    """The machines of a plan on paper."""

    group: ClassVar[str] = MEMORY

    gpus: Annotated[int | None, Flag(default="plan for this machine")] = Field(
        None,
        gt=0,
        description="Plan on paper for machines with so many GPUs. The model is then a well-known "
        "shape such as llama-3.1-70b.",
    )
    nodes: int = Field(1, gt=0, description="How many such machines.")
    gpu: str = Field(
        "h100-80gb", description="What a GPU is: a100-80gb, h100-80gb, h200, l40s or rtx-4090."
    )
    network: Annotated[
        str, Flag(value="RATE"), matching(r"\d+(\.\d+)?Gb", "a rate such as 400Gb")
    ] = Field(
        "400Gb",
        description="Bits a second of the network of one machine, such as 400Gb.",
    )


class PlanRecipe(PruneRecipe):
    """One pruning run that is planned and not carried out."""

    machines: ClusterMachines = Field(default_factory=lambda: ClusterMachines())
