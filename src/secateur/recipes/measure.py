"""The recipes of the verbs that measure: `evaluate`, `bench`, `inspect`, `diagnose`, `advise`,
`sweep` and `report`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic import Strict as Strictness

from secateur.recipes import shared
from secateur.recipes.options import Conflict, Flag, Heading, Recipe, Section, Texts, text_alone
from secateur.recipes.prune import Sparsity
from secateur.recipes.shared import (
    Calibration,
    Device,
    Memory,
    OutputFolder,
    Place,
    RemoteCode,
    Resuming,
)


class _HowToMeasure(Section):
    """How much to measure, and on which data."""

    group = Heading.HOW

    sequence_length: Annotated[
        int | None, Flag(default="2048, or the model's length if that is shorter")
    ] = Field(None, gt=1)
    """Tokens per window."""
    windows: Annotated[int | None, Flag(default="all")] = Field(None, gt=0)
    """Evaluate only this many windows of each text, from its start."""
    limit: Annotated[int | None, Flag(default="all")] = Field(None, gt=0)
    """Evaluate only this many items of each task, from its start."""
    shots: Annotated[
        int | None, Flag(aliases=("num_fewshot",), default="the task's own, mostly 0")
    ] = Field(None, ge=0)
    """Number of solved examples before each question."""


class _EvaluationOutput(Section):
    """Where the result is written."""

    group = Heading.OUTPUT

    output: Annotated[str | None, Flag(short="-o", value="FILE")] = None
    """JSON file for the results of this call. An existing file is replaced."""


class EvaluateRecipe(Device, _HowToMeasure, shared.TaskData, _EvaluationOutput, Recipe):
    """One evaluation."""

    group = Heading.WHAT
    needs: ClassVar = {
        **dict.fromkeys(("task_data", "limit", "shots"), ("tasks",)),
        "kinds": ("dense",),
    }
    conflicts = tuple(
        Conflict(
            name,
            "tasks or generation or kinds",
            "windows are cut from texts, and none is measured",
            "name the text (wikitext2, or a file), or leave it out",
            unless="text",
        )
        for name in ("windows", "sequence_length")
    )

    model: Annotated[str, Flag(value="MODEL")]
    """Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."""
    dense: Annotated[str | None, Flag(value="MODEL")] = None
    """The dense model. Adds divergence, differences and retention: how far the model is from it,
    and how much of its quality is kept."""
    text: Annotated[
        Texts,
        BeforeValidator(text_alone),
        Flag(
            value="TEXT",
            default="wikitext2, or the text that a sample brings, if nothing else is measured",
        ),
    ] = ()
    """Text for the perplexity: file, named text or hub data set; may be repeated."""
    tasks: Annotated[Texts, BeforeValidator(text_alone), Flag(commas=True)] = ()
    """Tasks of lm-eval, separated by commas: hellaswag,piqa."""
    generation: bool = False
    """Continue a few prompts, and count repetitions in the texts."""
    kinds: bool = False
    """Also compare on prose, code, chat and lists, which the dense model writes: how often it would
    accept the tokens of this model as its draft."""
    memory: shared.MemoryLimit = shared.MemoryLimit()


Contender = Literal[
    "packed",
    "packed in transformers",
    "dense bf16",
    "dense int8",
    "torch bf16",
    "torch int8",
    "all",
]
"""The ways to run a model that `bench` compares, and `all` for each of them."""


class _TimedRounds(Section):
    """How many tokens and rounds are timed."""

    group = Heading.HOW

    prompt_tokens: int = Field(32, ge=1)
    """Tokens in the prompt."""
    new_tokens: Annotated[int | None, Flag(default="8, or 64 with a draft")] = Field(None, ge=2)
    """Tokens to generate in each round."""
    rounds: int = Field(5, ge=1)
    """Largest number of rounds. After 30 seconds and two rounds no other one begins."""


class BenchRecipe(Place, _TimedRounds, Recipe):
    """One timing."""

    group = Heading.WHAT
    conflicts = tuple(
        Conflict(
            name,
            "draft",
            "a draft is timed on texts of four kinds, in our own loop",
            "time other ways to run the model in a call of their own",
        )
        for name in ("contenders", "gguf", "prompt_tokens", "rounds")
    )

    model: Annotated[str, Flag(value="MODEL")]
    """Folder (compressed or not), hub id or named sample."""
    contenders: Annotated[
        Annotated[tuple[Contender, ...], Strictness(False)] | None,
        Flag(commas=True, default="packed, dense bf16, dense int8, torch bf16"),
    ] = None
    """Ways to run the model, separated by commas: packed, packed in transformers, dense bf16, dense
    int8, torch bf16, torch int8; or all. On a GPU packed in transformers and torch bf16 run."""
    gguf: Annotated[Texts, Flag(value="FILE")] = ()
    """Also time this GGUF file in llama.cpp (needs the extra llamacpp); may be repeated."""
    draft: Annotated[str | None, Flag(value="DRAFT", default="none")] = None
    """Time the model as it is, with this draft and without, on prompts of four kinds: prose, code,
    chat, lists; at temperature 0 and 1."""


class InspectRecipe(RemoteCode, Recipe):
    """One inspection."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Hub id, folder, GGUF file or named sample."""
    layer: Annotated[int | None, Flag(default="a line for each layer")] = Field(None, ge=0)
    """List the linear layers of this decoder layer. A GGUF file is expanded for it."""


class _TextForDiagnosis(Section):
    """What both models read."""

    group = Heading.HOW

    text: Annotated[str, Flag(value="TEXT")] = "boolq-held-out"
    """Text that both models read: a text, or a safetensors file of windows."""
    windows: int = Field(8, gt=0)
    """Number of windows of that text."""
    sequence_length: Annotated[
        int | None, Flag(default="256, or the model's length if that is shorter")
    ] = Field(None, gt=1)
    """Tokens per window."""


class DiagnoseRecipe(Device, _TextForDiagnosis, Recipe):
    """One diagnosis."""

    group = Heading.WHAT
    needs = dict.fromkeys(("text", "windows", "sequence_length"), ("dense",))
    model: Annotated[str, Flag(value="MODEL")]
    """Folder (compressed or not), hub id, GGUF file or named sample."""
    dense: Annotated[str | None, Flag(value="MODEL")] = None
    """The dense model. Compares both models layer by layer."""


class _WhatToServe(Section):
    """The model, the hardware and the requests."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Hub id, folder (config.json is enough), named sample, or a well-known shape such as
    llama-3.1-8b."""
    hardware: str = "this-machine"
    """What it runs on, such as h100-80gb, rtx-4090, m4-24gb, strix-halo-128gb, laptop-cpu,
    this-machine, or a name from --facts."""
    prompt_tokens: int = Field(250, ge=1, le=10**8)
    """Tokens in a prompt."""
    new_tokens: int = Field(250, ge=1, le=10**8)
    """Tokens of an answer."""
    batch: Annotated[int | None, Flag(default="as many as pay")] = Field(None, gt=0, le=2**16)
    """Sequences at once."""


class AdviseRecipe(RemoteCode, _WhatToServe, Recipe):
    """One advice."""

    group = Heading.HOW

    token_ms: Annotated[float | None, Flag(default="any")] = Field(None, gt=0)
    """Most milliseconds between two tokens of an answer."""
    quality_loss: float = Field(0.01, ge=0, lt=1)
    """The fraction of the task accuracy that may be lost."""
    gpu_hours: float = Field(24.0, ge=0)
    """Most GPU hours for making the model."""
    usd_per_hour: Annotated[float | None, Flag(default="from the facts")] = Field(
        None, ge=0, le=1e6
    )
    """What you pay for the device."""
    facts: Annotated[str | None, Flag(value="FILE", default="the built-in ones")] = None
    """YAML with your own hardware, prices, losses or shapes."""


class _SweepTexts(Section):
    """The texts that every point is evaluated on."""

    group = Heading.HOW

    text: Annotated[
        Texts,
        BeforeValidator(text_alone),
        Flag(value="TEXT", default="wikitext2, or the text that a sample brings", own_text="judge"),
    ] = ("wikitext2",)
    """Text to evaluate on; may be repeated."""
    text_sequence_length: Annotated[
        int | None, Flag(default="2048, or the model's length if that is shorter")
    ] = Field(None, gt=1)
    """Tokens per evaluation window."""
    text_windows: Annotated[int | None, Flag(default="all")] = Field(None, gt=0)
    """Evaluate only this many windows of each text, from its start."""


class _WhatToSweep(Section):
    """The model, and the points."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."""
    methods: Annotated[Texts, Flag(commas=True)] = ()
    """Methods, scores or presets (fast, balanced, thorough, best), separated by commas."""
    sparsities: Annotated[
        tuple[Sparsity, ...], Strictness(False), Flag(commas=True, value="X")
    ] = ()
    """Fractions of zeros, separated by commas, such as 0.3,0.5,0.7."""
    patterns: Annotated[Texts, Flag(commas=True)] = ()
    """Patterns to try as well, separated by commas, such as 2:4,4:8."""


class SweepRecipe(Device, _SweepTexts, _WhatToSweep, OutputFolder, Recipe):
    """One sweep."""

    group = Heading.OUTPUT
    run = Resuming

    calibration: Calibration = Calibration()
    memory: Memory = Memory()


class _WhatToReport(Section):
    """The runs to show."""

    group = Heading.WHAT

    runs: Annotated[Texts, Flag(value="DIR")] = Field(min_length=1)
    """Run folders, compressed or not; folders of sweeps, fits and drafts."""


class ReportRecipe(_WhatToReport, Recipe):
    """One page."""

    group = Heading.OUTPUT

    output: Annotated[str, Flag(short="-o", value="FILE")] = "report.html"
    """The HTML file to write."""
    plots: bool = False
    """Also write every chart as PNG and SVG, into a folder beside the page."""
    card: Annotated[str | None, Flag(value="FILE")] = None
    """Also write a Markdown model card with all measurements (for one run only)."""
