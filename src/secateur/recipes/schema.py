"""The fields of a recipe, their defaults, and what each means."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic import Strict as Strictness

__all__ = ["MAX_SEED", "Calibration", "Distill", "Memory", "PruneRecipe", "Reconstruct", "Texts"]


class Strict(BaseModel):
    """Unknown keys are errors, not silence; a recipe does not change once made.

    A value has to be of the type of its field: `"0.5"` is text and no number, and 1 is not true. A
    whole number is a number. Numbers are finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Texts = Annotated[tuple[str, ...], Strictness(False)]
"""Several texts; YAML has lists where Python has tuples."""

MAX_SEED = 2**63 - 1
"""The largest that every generator takes."""


class Calibration(Strict):
    """Which text the statistics are gathered on."""

    source: str = Field(
        "c4",
        description="JSONL or text file, folder of texts, hub data set, named text, "
        "or a safetensors file of windows",
    )
    field: str = Field("text", description="the field of a JSONL line that holds the text")
    samples: int = Field(128, gt=0, description="number of windows")
    sequence_length: int | None = Field(
        None, gt=1, description="tokens per window; 2048, or less if the model is shorter"
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the choice of windows")
    packing: Literal["concatenate", "random-crop"] = Field(
        "concatenate",
        description="join documents and cut, or crop long documents at random as the papers do",
    )
    generated: int = Field(
        0, ge=0, description="windows more, which the dense model writes as it goes on from these"
    )


class Memory(Strict):
    """How much memory the run may take."""

    budget_gib: float | None = Field(
        None, gt=0, description="peak resident memory in GiB; default four fifths of what is free"
    )
    activations: Literal["auto", "memory", "disk"] = Field(
        "auto", description="where hidden states wait"
    )
    micro_batch_tokens: int = Field(2048, gt=0, description="tokens that pass a layer at once")


class Reconstruct(Strict):
    """How a pruned layer is tuned to give the dense layer's outputs."""

    passes: int = Field(
        0, ge=0, description="passes over the calibration windows for each layer; 0: not at all"
    )
    learning_rate: float = Field(1e-3, gt=0, lt=1, description="of the first step")
    remask: bool = Field(True, description="whether the mask may change while a layer is tuned")


class Distill(Strict):
    """How the whole pruned model learns from the dense one."""

    epochs: int = Field(0, ge=0, description="times it sees the calibration windows; 0: not at all")
    peak_learning_rate: float | None = Field(
        None, gt=0, lt=1, description="the highest; 0.25 / hidden size if not given"
    )
    next_token: float = Field(
        0.0, ge=0, le=1, description="share of the next token's loss beside the dense model's word"
    )


class PruneRecipe(Strict):
    """One pruning run."""

    model: str = Field(description="hub id, folder, GGUF file, or named sample")
    output: str | None = Field(None, description="folder for the pruned model; must not exist")
    effort: Literal["fast", "balanced", "best"] | None = Field(
        None,
        description="a preset: fills in what is not given; balanced if no method is given either",
    )
    method: str | None = Field(
        None, description="a famous name: `secateur methods` lists them; default: the preset's"
    )
    score: str | None = Field(None, description="score, for a composition of your own")
    solver: str | None = Field(None, description="solver, for a composition of your own")
    refine: str | None = Field(None, description="refinement of the score's mask, such as swaps")
    parameters: dict[str, int | float] = Field(
        default_factory=dict, description="of the score, the solver and the refinement"
    )
    asymmetric: bool = Field(
        False,
        description="fit the outputs of the dense model on dense inputs, not each matrix's own",
    )
    asymmetric_damping: float = Field(
        0.2, ge=0, description="how strongly the fit is drawn towards the dense weights"
    )
    fast_matmuls: bool = Field(
        False,
        description="calibration's forwards in bfloat16 where the processor is faster at it",
    )
    reconstruction: Reconstruct = Field(default_factory=lambda: Reconstruct())
    distillation: Distill = Field(default_factory=lambda: Distill())
    sparsity: float | None = Field(None, description="fraction of zeros, 0 to 1")
    pattern: str = Field("unstructured", description="unstructured, N:M, or block as ROWSxCOLUMNS")
    scope: Literal["row", "layer", "global"] | None = Field(
        None, description="the set within which scores compete; default: as the method's paper"
    )
    allocation: str = Field(
        "uniform",
        description="how much each linear loses: uniform, owl, layer-sensitivity, global or search",
    )
    include: Texts = Field(("*",), description="globs of linears to prune")
    exclude: Texts = Field((), description="globs of linears to leave dense")
    overrides: dict[str, float] = Field(
        default_factory=dict, description="sparsity by glob, for exceptions"
    )
    sequential: Literal["group", "layer"] = Field(
        "group",
        description="gather statistics group by group in one pass, or layer by layer in two",
    )
    on_collapse: Literal["stop", "warn"] = Field(
        "warn", description="what to do when a pruned linear has lost its output: stop or warn"
    )
    calibration: Calibration = Field(default_factory=lambda: Calibration())
    memory: Memory = Field(default_factory=lambda: Memory())
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of weights dequantized from GGUF; other sources keep theirs"
    )
    trust_remote_code: bool = Field(
        False, description="let code that comes with the checkpoint run"
    )
