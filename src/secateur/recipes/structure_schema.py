"""What a structured cut depends on: how much of what is kept, and how it is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from secateur.recipes.schema import Calibration, Distill, Memory, Strict, Texts

__all__ = ["Depth", "Kept", "LearnedOptions", "StructureRecipe", "steps_alone"]

Kept = int | float
"""A number of units, or the fraction of them that is kept (a float of at most 1)."""


class Depth(Strict):
    """How decoder layers, or their two halves, are chosen."""

    by: Literal["influence", "angular", "greedy", "search"] = Field(
        "influence", description="block influence, angular distance, greedy removal, or search"
    )
    units: Literal["layers", "blocks"] = Field(
        "layers", description="whole decoder layers, or attention and FFN sub-blocks by themselves"
    )


class LearnedOptions(Strict):
    """Learned masks: the model learns which units stay while its weights learn."""

    steps: int = Field(400, gt=0, description="steps of the optimizer")
    batch: int = Field(4, gt=0, description="windows in a step")
    learning_rate: float | None = Field(
        None, gt=0, lt=1, description="of the weights; if not given, as for retrain"
    )
    mask_learning_rate: float = Field(0.1, gt=0, description="of the gates and the multipliers")
    target_warm_up: float = Field(
        0.3, ge=0, le=1, description="share of the steps in which the targets fall to their sizes"
    )
    domains: Texts = Field(
        (),
        description="further texts; with the calibration text they are the domains of dynamic "
        "batch loading",
    )
    references: dict[str, float] = Field(
        default_factory=dict,
        description="loss to reach by domain, in nats per token; the uncut model's if not given",
    )
    update_every: int = Field(
        50, ge=0, description="steps between updates of the domains' proportions; 0: never"
    )
    held_out: int = Field(8, gt=0, description="windows of each domain that measure its loss")
    save_minutes: float = Field(5.0, ge=0, description="minutes between saves for --resume")


def steps_alone(value: Any) -> Any:
    """`learned: 400` is a number of steps; the command line writes it as text."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return {"steps": value} if isinstance(value, int) and not isinstance(value, bool) else value


class StructureRecipe(Strict):
    """One structured cut."""

    model: str = Field(description="hub id, folder, GGUF file, or named sample")
    output: str | None = Field(None, description="folder for the smaller model; must not exist")
    effort: Literal["fast", "balanced", "best"] | None = Field(
        None, description="a preset: fills in what is not given; balanced if no score is given"
    )
    keep_layers: Kept | None = Field(None, gt=0, description="decoder layers that stay")
    experts: Kept | None = Field(None, gt=0, description="experts of each layer that stay")
    hidden: Kept | None = Field(None, gt=0, description="channels of the residual stream that stay")
    heads: Kept | None = Field(None, ge=0, description="KV groups with their query heads that stay")
    query_heads: Kept | None = Field(
        None, gt=0, description="query heads of each KV group that stay; keys and values stay too"
    )
    ffn: Kept | None = Field(None, ge=0, description="FFN neurons that stay")
    keep_parameters: float | None = Field(
        None, gt=0, lt=1, description="fraction of the decoder's parameters that stays; heads "
        "and FFN neurons lose the same share"
    )  # fmt: skip
    file_mib: float | None = Field(None, gt=0, description="MiB of weights that may stay, likewise")
    decode_latency: float | None = Field(
        None, gt=0, lt=1, description="fraction of the time per token that may stay, batch 1, as "
        "measured here; likewise"
    )  # fmt: skip
    kv_cache: float | None = Field(
        None, gt=0, lt=1, description="fraction of the KV cache's bytes that stays"
    )
    allocation: str | None = Field(
        None,
        description="how much each layer loses: uniform, owl, layer-sensitivity, global or search",
    )
    whole_first: int = Field(
        0, ge=0, description="decoder layers at the start that keep all heads and neurons"
    )
    whole_last: int = Field(
        0, ge=0, description="decoder layers at the end that keep all heads and neurons"
    )
    multiple: int = Field(1, ge=1, description="FFN neurons are kept in multiples of this number")
    pad: bool = Field(
        False, description="pad layers with zeros to one size, for engines that need it"
    )
    learned: Annotated[LearnedOptions | None, BeforeValidator(steps_alone)] = Field(
        None, description="learn for so many steps which units stay, with the weights"
    )
    depth: Depth = Field(default_factory=lambda: Depth())
    score: str | None = Field(None, description="by which units are chosen")
    solver: str | None = Field(None, description="what becomes of the weights that read them")
    parameters: dict[str, int | float] = Field(
        default_factory=dict, description="of the score and the solver"
    )
    asymmetric: bool = Field(
        False, description="fit the outputs of the dense model on dense inputs"
    )
    fast_matmuls: bool = Field(
        False, description="calibration's forwards in bfloat16 where the processor is faster at it"
    )
    calibration: Calibration = Field(default_factory=lambda: Calibration())
    distillation: Distill = Field(default_factory=lambda: Distill())
    memory: Memory = Field(default_factory=lambda: Memory())
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of weights dequantized from GGUF; other sources keep theirs"
    )
    trust_remote_code: bool = Field(
        False, description="let code that comes with the checkpoint run"
    )
