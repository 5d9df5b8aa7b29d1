"""Sections that several recipes have: output and call, memory and device, text, recovery."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic import Strict as Strictness

from secateur.errors import RecipeError
from secateur.recipes.options import (
    MAX_SEED,
    Conflict,
    Flag,
    Heading,
    Section,
    Size,
    bytes_of,
    matching,
    text_alone,
)

ONE = "give one of the two"
"""The remedy for two options that say the same, or the opposite."""


def _enough(size: int | str | None) -> int | str | None:
    """The same size, if a program could ever run in it."""
    if size is not None and bytes_of(size) < 2**20:
        raise ValueError(f"must be at least 1MiB, and is {bytes_of(size)} bytes; 6GiB has its unit")
    return size


class MemoryLimit(Section):
    """How much memory the run may use."""

    group = Heading.MEMORY

    max_memory: Annotated[
        Size | None, AfterValidator(_enough), Flag(value="SIZE", default="4/5 of the free memory")
    ] = None
    """Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of this
    process. A run that needs more does not start."""

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes; None for the default."""
        return None if self.max_memory is None else bytes_of(self.max_memory)


class Memory(MemoryLimit):
    """How much memory the run may use, and for what."""

    group = Heading.MEMORY

    activations: Annotated[Literal["auto", "gpu", "memory", "disk"], Flag(advanced=True)] = "auto"
    """Where to store hidden states between layers: memory of the GPU, of the host, or disk; auto
    uses the first in which they fit."""
    micro_batch_tokens: Annotated[int, Flag(advanced=True)] = Field(2048, gt=0)
    """Tokens in one forward of a layer."""


class RemoteCode(Section):
    """Whether code from the checkpoint may run."""

    group = Heading.MEMORY

    trust_remote_code: bool = False
    """Allow Python code that comes with the checkpoint."""


class Place(Section):
    """Where to compute."""

    group = Heading.MEMORY

    device: Annotated[str, matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")] = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""


class Device(Place, RemoteCode):
    """Where a run computes, and whether code from the checkpoint may run."""


class GgufDtype(Section):
    """The number format of weights that are dequantized."""

    group = Heading.MEMORY

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Flag(default="float32; other sources keep theirs"),
    ] = None
    """Type for the weights of a GGUF file."""


class OutputFolder(Section):
    """Where to write the result."""

    group = Heading.OUTPUT

    output: Annotated[str | None, Flag(short="-o", value="DIR", default="required")] = None
    """Folder for the new model. It must not exist."""


class Overwriting(Section):
    """What to do with an existing output."""

    group = Heading.OUTPUT

    overwrite: bool = False
    """Replace an existing output folder."""


class Resuming(Overwriting):
    """What to do with a stopped run."""

    conflicts = (
        Conflict("resume", "restart", "one continues a stopped run, the other discards it", ONE),
    )

    resume: bool = False
    """Resume a stopped run, or start if there is none. A finished one is shown."""
    restart: bool = False
    """Discard a stopped run and start again."""


class Planning(Resuming):
    """What to do with a stopped run, or whether to plan one only."""

    dry_run: bool = False
    """Check the options and show what the run would need. Reads no weights, and writes nothing."""


TEXT = (
    "JSONL or text file, folder of texts, hub data set, named text, or safetensors file of windows."
)


DEFAULT_TEXT = "c4"
"""The text for calibration and training, where none is named and the model brings none."""

OR_OWN = f"{DEFAULT_TEXT}, or the text that a sample brings"


class CalibrationText(Section):
    """Where the calibration text comes from."""

    group = Heading.CALIBRATION

    source: Annotated[
        str, Flag("calibration", value="TEXT", default=OR_OWN, own_text="calibrate")
    ] = Field(
        DEFAULT_TEXT,
        description=f"Calibration text: {TEXT} Or several with weights: code.jsonl=2,math.jsonl=1.",
    )


def parts_of(source: str) -> tuple[tuple[str, float], ...]:
    """The texts that a source names, each with its weight; 1 where none is given.

    The name of a file that exists is one text, whatever characters it has.

    Raises:
        RecipeError: a text has no name, is named twice, or its weight is not above 0.

    Example:
        >>> from secateur.recipes.shared import parts_of
        >>> parts_of("code.jsonl=2,c4")
        (('code.jsonl', 2.0), ('c4', 1.0))
    """
    if ("," not in source and "=" not in source) or Path(source).expanduser().exists():
        return ((source, 1.0),)
    found: dict[str, float] = {}
    for part in source.split(","):
        name, has_weight, written = part.strip().rpartition("=")
        name = name if has_weight else written
        try:
            weight = float(written) if has_weight else 1.0
        except ValueError:
            weight = -1.0
        if not name or name in found or not 0 < weight < float("inf"):
            what = "names a text twice" if name in found else "is no text with a weight above 0"
            raise RecipeError(
                f"{part.strip()!r} {what}",
                where="calibration",
                remedy="write texts with commas between them, each with =WEIGHT if you like: "
                "code.jsonl=2,math.jsonl=1",
            )
        found[name] = weight
    return tuple(found.items())


def texts_of(source: str) -> list[str]:
    """The texts that a source names, without their weights."""
    return [name for name, _ in parts_of(source)]


class CalibrationWindows(Section):
    """How windows are cut from a text."""

    group = Heading.CALIBRATION

    field: str = "text"
    """The field of a JSONL line that holds the text. Lines without it may hold conversations
    (`messages`, `conversations`), which the model's chat template writes."""
    windows: int = Field(128, gt=0)
    """Number of calibration windows."""
    sequence_length: Annotated[
        int | None, Flag(default="2048, or the model's length if that is shorter")
    ] = Field(None, gt=1)
    """Tokens per window."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed that chooses the windows."""
    packing: Literal["concatenate", "random-crop"] = "concatenate"
    """concatenate joins all documents and cuts them into windows. random-crop takes each window
    from a random place of a random document, as the papers do."""


class Calibration(CalibrationWindows, CalibrationText):
    """The text that statistics are gathered on."""

    generated_windows: int = Field(0, ge=0)
    """Extra calibration windows that the dense model generates."""


class Reconstruct(Section):
    """How each pruned layer is tuned to reproduce the dense layer's outputs."""

    group = Heading.RECOVERY

    passes: Annotated[int, Flag("tune_passes")] = Field(0, ge=0)
    """Tune each layer after pruning, in this many passes over the calibration windows, to reproduce
    the dense layer's outputs. 0: no tuning."""


DISTILLING: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    (
        "distill_tokens",
        "distill_teacher",
        "distill_learning_rate",
        "distill_next_token",
        "distill_hidden",
        "distill_sweep_windows",
    ),
    ("distill_epochs",),
)
"""What the options of the distillation need, as in `Recipe.needs`."""


class Distill(Section):
    """How the whole pruned model learns from the dense model."""

    group = Heading.RECOVERY

    epochs: Annotated[int, Flag("distill_epochs")] = Field(0, ge=0)
    """Train the new model to match the dense model, in this many epochs over the calibration
    windows. 0: no distillation."""
    tokens: Annotated[int, Flag("distill_tokens")] = Field(0, ge=0)
    """An epoch of the distillation reads at least this many tokens: the calibration windows, then
    more windows of the same text. 0: the calibration windows alone."""
    teacher: Annotated[str | None, Flag("distill_teacher", value="MODEL", default="the source")] = (
        None
    )
    """Model to learn from, such as the one that was pruned: hub id, folder or named sample. It may
    have more or wider layers, and has the same vocabulary."""
    peak_learning_rate: Annotated[
        float | None, Flag("distill_learning_rate", default="chosen by short trials")
    ] = Field(None, gt=0, lt=1)
    """Highest learning rate of the distillation. The default is 0.25 / hidden size · √(tokens in a
    window / 2048), or less if that is better in short trials."""
    next_token: Annotated[float, Flag("distill_next_token")] = Field(0.0, ge=0, le=1)
    """Share of the next-token loss, 0 to 1; the rest is the divergence from the dense model."""
    hidden: Annotated[float, Flag("distill_hidden")] = Field(0.0, ge=0)
    """Weight of the distance between the outputs of the last decoder layer in both models; 0:
    none."""
    sweep_windows: Annotated[
        int | None, Flag("distill_sweep_windows", default="0 if both models fit, else 16")
    ] = Field(None, ge=0)
    """Distill with one decoder layer in memory, in sweeps over this many windows: all layers
    forward, then all layers backward. 0: both whole models in memory."""


class TaskData(Section):
    """Where the data of tasks come from."""

    group = Heading.HOW

    task_data: Annotated[str | None, Flag(value="DIR", default="lm-eval's own")] = None
    """Folder of tasks in lm-eval's YAML files, whose data may be local."""


MEASURED_ON = {"loops": "SHARE", "divergence": "NATS", "loss": "NATS"}
"""What `--must-keep` can measure on a text, and the unit of its limit."""

ON_TEXTS = " or ".join(f"{kind}@TEXT:{unit}" for kind, unit in MEASURED_ON.items())


@dataclass(frozen=True)
class Bound:
    """What the result of a run must keep of its source, or else it is not published.

    | written               | holds if the result                                             |
    |-----------------------|-----------------------------------------------------------------|
    | `TASK:SHARE`          | has at least this share of the source's score in a task         |
    | `loops:SHARE`         | loops in at most this share of the texts that the source writes |
    |                       | without looping, after prompts of secateur                      |
    | `loops@TEXT:SHARE`    | the same, after beginnings of passages of a text                |
    | `divergence@TEXT:NATS`| has at most this KL(source ‖ result) per token of a text        |
    | `loss@TEXT:NATS`      | loses at most so much more per token of a text                  |

    Attributes:
        written: by the user.
        kind: one of `MEASURED_ON`, or task.
        name: of the task, or the text; empty for the prompts of secateur.
        limit: the share, or nats per token.
    """

    written: str
    kind: str
    name: str
    limit: float

    @classmethod
    def read(cls, written: str) -> Bound:
        """A bound as the user writes it.

        Raises:
            ValueError: it is none.

        Example:
            >>> from secateur.recipes.shared import Bound
            >>> bound = Bound.read("divergence@code.jsonl:0.1")
            >>> bound.kind, bound.name, bound.limit
            ('divergence', 'code.jsonl', 0.1)
        """
        what, _, number = written.strip().rpartition(":")
        kind, at, name = what.partition("@")
        shares = kind not in MEASURED_ON or kind == "loops"
        if kind not in MEASURED_ON and not at:
            kind, name = "task", what
        if kind not in ("task", *MEASURED_ON) or not (name or (what == "loops")):
            raise ValueError(f"must be TASK:SHARE, loops:SHARE or {ON_TEXTS}")
        limit, most = float(number), 1.0 if shares else math.inf
        if not 0 <= limit <= most or (limit == 0 and kind != "loops"):
            raise ValueError(f"must end with a number above 0 and at most {most:g}, not {number}")
        return cls(written, kind, name, limit)

    @property
    def on_text(self) -> bool:
        """Whether its name is that of a text."""
        return self.kind != "task" and self.name != ""


class Gate(TaskData):
    """What the result must keep, before it gets its name."""

    group = Heading.OUTPUT

    must_keep: Annotated[
        Annotated[
            tuple[Annotated[str, AfterValidator(lambda bound: Bound.read(bound).written)], ...],
            Strictness(False),
        ],
        BeforeValidator(text_alone),
        Flag(commas=True, value="WHAT:LIMIT"),
    ] = ()
    """Publish the result only if it keeps this of MODEL, separated by commas: TASK:SHARE of the
    score in a task of lm-eval (gsm8k:0.97), loops:SHARE of texts that begin to repeat (loops:0.01),
    divergence@TEXT:NATS and loss@TEXT:NATS per token of a text (divergence@code.jsonl:0.1).
    Otherwise the exit code is 3, and --resume with other bounds needs no work again."""
    must_keep_items: Annotated[
        int | None, Flag(default="all items of a task, 64 windows of a text")
    ] = Field(None, gt=0)
    """Judge on this many items of each task, windows of each text, and prompts, from the start."""


GATED = dict.fromkeys(("must_keep_items", "task_data"), ("must_keep",))
"""What the options of the gate need, as in `Recipe.needs`."""


def trial_steps(steps: int) -> int:
    """Return how many of a distillation's steps a trial of its learning rate has.

    Example:
        >>> from secateur.recipes.shared import trial_steps
        >>> trial_steps(128), trial_steps(2048)
        (16, 64)
    """
    return max(1, min(64, steps // 8))


class PlanFor(Section):
    """What a plan is for."""

    group = Heading.MEMORY

    processes: Annotated[int | None, Flag(default="one")] = Field(None, gt=0)
    """With --dry-run: plan one of so many processes on this machine. torchrun starts them."""
