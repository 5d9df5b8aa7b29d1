"""Where several processes share a run."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.section import MEMORY, Flag, Section


class Cluster(Section):
    """The cluster that starts the processes of a run. torchrun needs no options."""

    group: ClassVar[str] = MEMORY

    ray: Annotated[str | None, Flag(value="ADDRESS", default="no cluster")] = Field(
        None,
        description="Work in several processes of a Ray cluster: its address, `auto`, or `local` "
        "for processes on this machine.",
    )
    processes: Annotated[
        int | None,
        Flag("ray_processes", default="the cluster's GPUs, or its machines if it has none"),
    ] = Field(None, gt=0, description="How many processes Ray starts.")
