"""How much memory a run may use, and on which device it runs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.recipes.section import MEMORY, Flag, Section

__all__ = ["BUDGET", "FREE", "Device", "GgufDtype", "Memory", "RemoteCode"]

BUDGET = (
    "Peak memory allowed, in GiB: of the GPU if the run computes there, else of this process. A "
    "run that needs more does not start."
)
FREE = "4/5 of the free memory"


class Memory(Section):
    """How much memory the run may use."""

    group: ClassVar[str] = MEMORY

    budget_gib: Annotated[float | None, Flag("memory_budget_gib", default=FREE)] = Field(
        None, gt=0, description=BUDGET
    )
    activations: Literal["auto", "memory", "disk"] = Field(
        "auto", description="Where hidden states wait for the next layer."
    )
    micro_batch_tokens: int = Field(
        2048, gt=0, description="Tokens that pass through a layer at once."
    )


class RemoteCode(Section):
    """Whose code a run may run."""

    group: ClassVar[str] = MEMORY

    trust_remote_code: bool = Field(
        False, description="Let code that comes with the checkpoint run."
    )


class Device(RemoteCode):
    """Where a run computes, and whose code it may run."""

    device: str = Field("auto", description="Where to compute: auto, cpu, cuda or cuda:N.")


class GgufDtype(Section):
    """The number format of weights that are dequantized."""

    group: ClassVar[str] = MEMORY

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Flag(default="float32; other sources keep theirs"),
    ] = Field(None, description="Type of weights dequantized from GGUF.")
