"""How much memory a run may use, and on which device it runs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.recipes.section import MEMORY, Flag, Section, matching
from secateur.recipes.sizes import Size, bytes_of

BUDGET = (
    "Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of this "
    "process. A run that needs more does not start."
)
FREE = "4/5 of the free memory"


class Memory(Section):
    """How much memory the run may use."""

    group: ClassVar[str] = MEMORY

    max_memory: Annotated[Size | None, Flag(value="SIZE", default=FREE)] = Field(
        None, description=BUDGET
    )
    activations: Annotated[Literal["auto", "gpu", "memory", "disk"], Flag(advanced=True)] = Field(
        "auto",
        description="Where to store hidden states between layers: memory of the GPU, of the host, "
        "or disk; auto uses the first in which they fit.",
    )
    micro_batch_tokens: Annotated[int, Flag(advanced=True)] = Field(
        2048, gt=0, description="Tokens in one forward of a layer."
    )

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes; None for the default."""
        return None if self.max_memory is None else bytes_of(self.max_memory)


class RemoteCode(Section):
    """Whether code from the checkpoint may run."""

    group: ClassVar[str] = MEMORY

    trust_remote_code: bool = Field(
        False, description="Allow Python code that comes with the checkpoint."
    )


class Device(RemoteCode):
    """Where a run computes, and whether code from the checkpoint may run."""

    device: Annotated[str, matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")] = Field(
        "auto", description="Where to compute: auto, cpu, cuda or cuda:N."
    )


class GgufDtype(Section):
    """The number format of weights that are dequantized."""

    group: ClassVar[str] = MEMORY

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Flag(default="float32; other sources keep theirs"),
    ] = Field(None, description="Type for the weights of a GGUF file.")
