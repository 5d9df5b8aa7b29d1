"""The recipes of `compress`, `decompress`, `fit` and `draft`: the verbs that pack."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.recipes import shared
from secateur.recipes.options import Conflict, Flag, Heading, Recipe, Section, Size
from secateur.recipes.prune import Effort, Embeddings, Values


class _RoundingSource(Section):
    """Where the text for rounding comes from, if any is used."""

    group = Heading.CALIBRATION

    source: Annotated[
        str | None, Flag("calibration", value="TEXT", default="none", own_text="calibrate")
    ] = Field(
        None,
        description="Text on which rounded weights compensate each other's rounding errors: "
        f"{shared.TEXT} auto: {shared.OR_OWN}.",
    )


class _RoundingText(shared.CalibrationWindows, _RoundingSource):
    """The calibration text for rounding."""


class _WhatToCompress(Section):
    """The model, and how its weights are stored."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Folder, hub id, GGUF file, named sample, or a recipe (`*.yaml`)."""
    format: str = "auto"
    """auto chooses the smallest format for each matrix. bitmask, n-of-m or dense uses that format,
    or dense where dense is smaller."""
    values: Values = "auto"
    """How to store the weights. auto stores float32 as bfloat16 and keeps other types. keep keeps
    every type and loses nothing. Or name a type: bfloat16, float16, float32, int8, int4, int3,
    int2; or one of llama.cpp: q2_k to q6_k, iq4_nl, iq4_xs, q4_0, q4_1, q5_0, q5_1, q8_0."""
    to: Literal["folder", "gguf"] = "folder"
    """What to write: folder, a packed model; or gguf, one file for llama.cpp with values of its
    types."""
    group_size: Annotated[int | None, Flag(default="64")] = None
    """How many consecutive weights of a row share a scale in int4, int3 and int2: 32, 64 or 128.
    Smaller groups lose less and need 8 / SIZE bits more per weight."""
    overrides: Annotated[dict[str, str], Flag(value="GLOB=VALUES")] = Field(default_factory=dict)
    """Own values for some linear layers, by name; the last match counts. Embedding and head have
    own values by their whole names."""
    embeddings: Embeddings = "auto"
    """How to store embedding and output head: one matrix if they are tied, else two. auto rounds
    both to int8 beside linear layers of integers if they are a tenth of the model or more, and else
    keeps them, as keep does. Beside types of llama.cpp auto stores the head as q6_k and an
    embedding of its own in their type, as llama.cpp does. int4 and int3 have the groups of
    --group-size; with --calibration the head's weights compensate each other's errors."""
    archive: bool = False
    """Also compress the files with zstandard. Loading decodes them."""


class CompressRecipe(shared.Device, _WhatToCompress, shared.OutputFolder, Recipe):
    """One compression."""

    run = shared.Resuming
    conflicts = tuple(
        Conflict(option, "to=gguf", "a GGUF file stores every weight, as it is", shared.ONE)
        for option in ("archive", "format")
    )
    needs: ClassVar = {
        **dict.fromkeys(
            (
                *("field", "windows", "sequence_length", "seed", "packing"),
                *("max_memory", "activations", "micro_batch_tokens", "device"),
                "distill_epochs",
            ),
            ("calibration",),
        ),
        **shared.DISTILLING,
    }

    distillation: shared.Distill = shared.Distill()
    calibration: _RoundingText = _RoundingText()
    memory: shared.Memory = shared.Memory()


class DecompressRecipe(shared.OutputFolder, Recipe):
    """One decompression."""

    group = Heading.WHAT
    run = shared.Overwriting

    model: Annotated[str, Flag(value="MODEL")]
    """Folder or hub id of a compressed model."""


class FitText(shared.CalibrationWindows, shared.CalibrationText):
    """The text that models are made with, and that chooses among them."""


class _WhatToFit(Section):
    """The model, and the bounds."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Folder, hub id, GGUF file or named sample."""
    max_size: Annotated[Size | None, Flag(value="SIZE", default="any")] = None
    """Largest size of the weight files, such as 90MiB or 4GB. The result is the best one found that
    fits."""
    max_inference_memory: Annotated[Size | None, Flag(value="SIZE", default="any")] = None
    """Most memory of a process that runs the result: weights, KV cache of --context-length, and
    working memory."""
    context_length: int = Field(2048, ge=1)
    """Tokens of prompt and answer together, for --max-inference-memory."""
    decode_speedup: Annotated[float | None, Flag(value="X", default="any")] = Field(None, gt=0)
    """How many times as fast as dense int8 the result decodes at least, on this machine, one
    sequence at a time."""
    max_loss_increase: Annotated[float | None, Flag(value="NATS", default="any")] = Field(
        None, gt=0
    )
    """Most that the loss of the next token may rise, in nats. Without a size, the result is the
    smallest one found within it."""
    structure: bool = False
    """Also try fewer experts and fewer FFN neurons in more bits."""
    vocabulary: Annotated[str | None, Flag(value="TEXT", default="all tokens stay")] = None
    """First remove the tokens that this text never needs; what they take is spent on the rest."""
    target: Literal["cpu", "llama.cpp"] = "cpu"
    """What runs the result; only what it can store and speed up is used: cpu (our formats and
    kernels), or llama.cpp (a GGUF file beside the packed model)."""
    like: Annotated[str | None, Flag(value="FILE", default="none")] = None
    """A GGUF file of the same model, by whatever converter and quantizer. The result is this file
    with better codes in the same types, or an error where they are not better."""


class HowToSearch(Section):
    """How models are made and healed."""

    group = Heading.HOW

    effort: Effort = "balanced"
    """The preset that prunes, and that decides how much is healed."""
    heal_tokens: Annotated[int | None, Flag(value="N", default="by --effort")] = Field(None, ge=0)
    """Tokens of the calibration text on which the best models learn from the dense one, on their
    own grids and masks. 0: none. By --effort: fast 0, balanced 65,536, thorough 131,072, best
    262,144."""
    minutes: Annotated[float | None, Flag(value="N", default="no limit")] = Field(None, gt=0)
    """Time budget in minutes. If it runs short, candidates and healing are left out; the result
    says what."""


TOKENS_TO_HEAL = {"fast": 0, "balanced": 65_536, "thorough": 131_072, "best": 262_144}


class FitRecipe(shared.Device, HowToSearch, _WhatToFit, shared.OutputFolder, Recipe):
    """One fit."""

    run = shared.Planning
    needs: ClassVar = {"context_length": ("max_inference_memory",), **shared.GATED}
    conflicts = (
        Conflict(
            "",
            "",
            "give a bound",
            "give one or more of --max-size, --max-inference-memory, --decode-speedup and "
            "--max-loss-increase; or --like FILE",
            unless="max_size or max_inference_memory or decode_speedup or max_loss_increase or "
            "like",
        ),
        Conflict(
            "structure",
            "max_loss_increase",
            "the smallest size is looked for with all experts and neurons",
            "give --max-size instead",
        ),
        *(
            Conflict("like", other, "the types of the file decide the size", shared.ONE)
            for other in (
                *("max_size", "max_inference_memory", "decode_speedup", "max_loss_increase"),
                *("target", "structure", "vocabulary"),
            )
        ),
        *(
            Conflict(
                bound,
                "target",
                "it needs times and memory of an engine, and only those of cpu are measured here",
                "give --target cpu, or bounds on size and loss",
            )
            for bound in ("max_inference_memory", "decode_speedup")
        ),
    )

    calibration: FitText = FitText()
    memory: shared.Memory = shared.Memory()
    gate: shared.Gate = shared.Gate()

    @property
    def tokens_to_heal(self) -> int:
        """Tokens on which the best models learn."""
        return TOKENS_TO_HEAL[self.effort] if self.heal_tokens is None else self.heal_tokens


class _WhatToDraft(Section):
    """The model that a draft is made of, and the one that it proposes to."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Folder, hub id, GGUF file or named sample: the parent. The draft is made from its weights."""
    runs_as: Annotated[str | None, Flag(value="FOLDER", default="MODEL")] = None
    """Folder of the same model as it runs, if it is packed: the draft is measured and timed beside
    it."""
    mtp: bool = False
    """Make no model, but use the layers that predict further tokens (MTP) of the model itself:
    measure what they bring, and choose the tokens that they propose."""
    head: bool = False
    """Train a head that reads the hidden states of the model, in place of a smaller model. It
    learns on --heal-tokens tokens, of which the model writes most. By --effort: fast 131,072,
    balanced 524,288, thorough 1,048,576, best 2,097,152."""


TOKENS_OF_HEADS = {"fast": 2**17, "balanced": 2**19, "thorough": 2**20, "best": 2**21}


class DraftRecipe(shared.Device, HowToSearch, _WhatToDraft, shared.OutputFolder, Recipe):
    """One draft."""

    run = shared.Planning
    conflicts = tuple(
        Conflict("mtp", name, "no model is made", "leave one of them out")
        for name in ("runs_as", "heal_tokens", "minutes", "head")
    )

    calibration: FitText = FitText()
    memory: shared.Memory = shared.Memory()

    @property
    def tokens_to_learn(self) -> int:
        """Tokens on which a head learns."""
        return TOKENS_OF_HEADS[self.effort] if self.heal_tokens is None else self.heal_tokens

    @property
    def fitted(self) -> FitRecipe:
        """How models are made on the way: as by a fit whose seconds are counted."""
        shared = FitRecipe.model_fields.keys() & DraftRecipe.model_fields.keys()
        given = {name: getattr(self, name) for name in shared}
        return FitRecipe(**given, decode_speedup=1.0)
