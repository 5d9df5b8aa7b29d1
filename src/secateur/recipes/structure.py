"""The recipe of `secateur structure`: how much to keep, and how to choose it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations, product
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from secateur.recipes import shared
from secateur.recipes.options import (
    Conflict,
    Flag,
    Heading,
    Recipe,
    Section,
    Size,
    bytes_of,
)
from secateur.recipes.prune import Effort, Fitting


def _number_or_fraction(value: int | float) -> int | float:
    """The same value, unless it is a float outside 0 to 1."""
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError("must be a whole number, or a fraction between 0 and 1")
    return value


def numbers_in(text: str) -> tuple[int, ...]:
    """The numbers of a list with ranges.

    Example:
        >>> from secateur.recipes.structure import numbers_in
        >>> numbers_in("0-2, 7")
        (0, 1, 2, 7)
    """
    if not re.fullmatch(r"(\d{1,5}(-\d{1,5})?(,(?!$)|$))+", bare := text.replace(" ", "")):
        raise ValueError("must be numbers and ranges with commas between them: 0-11,14,16-31")
    ends = (part.split("-") for part in bare.split(","))
    return tuple(number for own in ends for number in range(int(own[0]), int(own[-1]) + 1))


def _listed(text: str) -> str:
    """The same text, unless it is no list of numbers."""
    numbers_in(text)
    return text


Kept = Annotated[int | float, AfterValidator(_number_or_fraction)]
"""A number of units to keep, or a fraction of them (a float of at most 1)."""


def _tokens_loss_or_bytes(value: Any) -> Any:
    """The same value, if it is a number of tokens, a share of a text, or a size with its unit."""
    unit = isinstance(value, str) and not value.strip().isdecimal() and bytes_of(value) > 0
    share = isinstance(value, float) and 0 < value < 1
    if not (unit or share or (isinstance(value, int) and value > 0)):
        raise ValueError(
            "must be a number of tokens, a share of the text between 0 and 1 that may be lost, or "
            "bytes of the weight files with their unit, such as 2GiB"
        )
    return value


VocabularySize = Annotated[int | float | str, BeforeValidator(_tokens_loss_or_bytes)]
"""How much of a vocabulary stays: a number of tokens; a float, the share of the text's tokens that
may be lost; or bytes of the weight files, with their unit."""

TARGETS = ("keep_parameters", "max_size", "decode_latency")
"""Options that say how much of the whole model is to remain, and leave open what goes."""
NARROWING = ("kv_groups", "query_heads", "ffn", *TARGETS)
"""Options that cut heads or neurons."""
WIDTHS = ("kv_groups", "query_heads", "ffn", "hidden_size", *TARGETS)
"""Options that cut within layers, by a score."""
BY_HAND = ("experts_list", "layers_list")
"""Options that name the units that stay."""
CUTS = ("keep_layers", "experts", *BY_HAND, *WIDTHS, "vocabulary", "vocabulary_size")
"""Options that cut."""

Counted = Flag(value="NUMBER", default="all")

ExpertsBy = Literal["reap", "divergence", "frequency", "aimer", "imatrix", "random"]


class Depth(Section):
    """How to select decoder layers."""

    by: Annotated[Literal["influence", "angular", "greedy"], Flag("depth_by")] = "influence"
    """How to select layers: by block influence, angular distance, or greedy removal."""


class _WhatToCut(Section):
    """The model, and how many of its units stay."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."""
    keep_layers: Annotated[Kept | None, Counted] = Field(None, gt=0)
    """Decoder layers to keep: a number, or a fraction such as 0.8."""
    experts: Annotated[Kept | None, Counted] = Field(None, gt=0)
    """Experts to keep in each layer: a number or a fraction."""
    experts_list: Annotated[str | None, Flag(value="FILE", default="chosen by a score")] = None
    """Experts to keep, by number: a JSON file such as {"0": [1, 2, 5], "1": [0, 3]}, by layer."""
    layers_list: Annotated[
        Annotated[str, AfterValidator(_listed)] | None, Flag(value="LIST", default="chosen")
    ] = None
    """Decoder layers to keep, by number, such as 0-11,14,16-31. For a GGUF file as output."""
    hidden_size: Annotated[Kept | None, Counted] = Field(None, gt=0)
    """Channels of the residual stream to keep: a number or a fraction."""
    kv_groups: Annotated[Kept | None, Counted] = Field(None, ge=0)
    """KV groups (with their query heads) to keep in each layer: a number or a fraction."""
    query_heads: Annotated[Kept | None, Counted] = Field(None, gt=0)
    """Query heads to keep in each KV group: a number or a fraction. The KV cache keeps its size."""
    ffn: Annotated[Kept | None, Counted] = Field(None, ge=0)
    """FFN neurons to keep in each layer: a number or a fraction. In a mixture, neurons of each
    expert; a shared expert and dense layers keep the same share."""
    vocabulary: Annotated[str | None, Flag(value="TEXT", default="all tokens stay")] = None
    """Remove the tokens that this text never needs from tokenizer, embedding and head: JSONL or
    text file, folder of texts, hub data set or named text. Or several with weights:
    de.jsonl=2,code.jsonl=1."""
    vocabulary_size: Annotated[
        VocabularySize | None, Flag(value="SIZE", default="all that the text has")
    ] = None
    """Keep the most frequent tokens of the text; without --vocabulary, of the calibration text: at
    most a number (16384), as many as the weight files may have bytes for (2GiB), or so many that
    this share of the text's tokens is lost (0.01)."""
    keep_parameters: Annotated[float | None, Flag(value="FRACTION", default="all")] = Field(
        None, gt=0, lt=1
    )
    """Fraction of the decoder's parameters to keep. Experts, KV groups and FFN neurons are cut
    until it is reached."""
    max_size: Annotated[Size | None, Flag(value="SIZE", default="no limit")] = None
    """Largest size of the weight files, such as 90MiB. Experts, KV groups and FFN neurons are cut
    until they fit."""
    decode_latency: Annotated[float | None, Flag(value="FRACTION", default="no limit")] = Field(
        None, gt=0, lt=1
    )
    """Largest time per token, as a fraction of the uncut model's, measured on this machine in
    transformers at batch 1. KV groups and FFN neurons are cut until it is met."""
    whole_first: int = Field(0, ge=0)
    """Number of first decoder layers that keep all heads and neurons."""
    whole_last: int = Field(0, ge=0)
    """Number of last decoder layers that keep all heads and neurons."""
    multiple: int = Field(1, ge=1)
    """Round the FFN width, and the number of tokens, to a multiple of this number."""


class _HowToCut(Section):
    """How to select units, and how to adjust the weights that read them."""

    effort: Annotated[Effort | None, Flag(default="balanced, if no score is given")] = None
    """Preset: fast, balanced, thorough or best. It fills in the options that you do not give."""
    score: Annotated[str | None, Flag(advanced=True)] = None
    """Score that selects the units to remove."""
    solver: Annotated[str | None, Flag(advanced=True)] = None
    """Solver that adjusts the weights that read the removed units."""
    method_parameters: Annotated[
        dict[str, int | float], Flag(value="NAME=NUMBER", advanced=True)
    ] = Field(default_factory=dict)
    """Parameters of the score and the solver."""
    allocation: Annotated[str | None, Flag(default="uniform")] = None
    """How to divide the cut among the layers: uniform, owl, layer-sensitivity, divergence, global
    or search."""
    experts_by: ExpertsBy = "reap"
    """How to select experts: by REAP; by the divergence that their removal makes, which takes a
    backward pass; by how often they are chosen; by their weights alone (aimer); by an importance
    matrix; or at random."""
    imatrix: Annotated[str | None, Flag(value="FILE")] = None
    """The importance matrix of a GGUF file, by llama.cpp: .gguf or .dat."""
    experts_scope: Literal["layer", "global"] = "layer"
    """Where experts compete: within their layer, or in the whole model, so that layers keep
    different numbers."""
    depth: Depth = Depth()


_BALANCED: Mapping[str, Any] = {
    "score": "wanda",
    "solver": "alps",
    "method_parameters": {"iterations": 15, "growth": 1.6},
    "asymmetric": True,
    "fast_matmuls": True,
}
structure_presets: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {"score": "wanda", "solver": "least-squares", "fast_matmuls": True},
        "balanced": _BALANCED,
        "thorough": {
            **_BALANCED,
            "distillation": {"epochs": 1, "next_token": 0.5, "tokens": 65_536},
        },
        "best": {
            "score": "wanda",
            "solver": "alps",
            "method_parameters": {"iterations": 30, "growth": 1.3},
            "asymmetric": True,
            "fast_matmuls": True,
            "calibration": {"generated_windows": 256},
            "distillation": {"epochs": 1, "next_token": 0.5, "tokens": 262_144},
        },
    }
)
"""The recipe values of each effort, for structured cuts."""


class _Output(Section):
    """Where to write the result."""

    group = Heading.OUTPUT

    output: Annotated[str | None, Flag(short="-o", value="DIR", default="required")] = None
    """Folder for the new model. It must not exist. If MODEL is a GGUF file, it may be one too: the
    file itself is cut, and its bytes are copied."""


class StructureRecipe(
    # pydantic lists the fields of the last base first
    shared.Device,
    shared.GgufDtype,
    Fitting,
    _HowToCut,
    _WhatToCut,
    _Output,
    Recipe,
):
    """One structured cut."""

    presets = structure_presets
    run = shared.Planning
    needs: ClassVar = {
        "depth_by": ("keep_layers", *TARGETS),
        **dict.fromkeys(("experts_by", "imatrix"), ("experts",)),
        "experts_scope": ("experts", "keep_parameters", "max_size"),
        **dict.fromkeys(("score", "solver", "allocation"), WIDTHS),
        "multiple": (*WIDTHS, "vocabulary", "vocabulary_size"),
        **dict.fromkeys(("whole_first", "whole_last"), NARROWING),
        **shared.DISTILLING,
        **shared.GATED,
    }
    conflicts = (
        Conflict(
            "",
            "",
            "the recipe cuts nothing",
            "say what to keep: --keep-layers 24, --ffn 0.75, --kv-groups 0.67, --hidden-size 0.9, "
            "--experts 0.5, --vocabulary TEXT, or --keep-parameters 0.75 of the decoder's",
            unless=" or ".join(CUTS),
        ),
        *(
            Conflict(*pair, "these are two targets", shared.ONE)
            for pair in combinations(TARGETS, 2)
        ),
        Conflict("experts", "experts_list", "both say which experts stay", shared.ONE),
        Conflict("keep_layers", "layers_list", "both say which layers stay", shared.ONE),
        Conflict(
            "experts_by=imatrix", "imatrix=None", "there is nothing to read", "add --imatrix FILE"
        ),
        *(
            Conflict("imatrix", f"experts_by={by}", "nothing reads it", "leave one of them out")
            for by in get_args(ExpertsBy)
            if by != "imatrix"
        ),
        *(
            Conflict(target, width, "both set how many heads and neurons stay", shared.ONE)
            for target, width in product(TARGETS, ("kv_groups", "ffn"))
        ),
        Conflict("distill_hidden", "hidden_size", "it compares states of equal widths", shared.ONE),
        *(
            Conflict(
                whole,
                "query_heads",
                "all layers must have equally many query heads in a KV group, so no layer can keep "
                "all",
                "leave --whole-first and --whole-last out, or --query-heads",
            )
            for whole in ("whole_first", "whole_last")
        ),
    )

    distillation: shared.Distill = shared.Distill()
    calibration: shared.Calibration = shared.Calibration()
    memory: shared.Memory = shared.Memory()
    gate: shared.Gate = shared.Gate()
