"""The recipe of `secateur train`."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from secateur.recipes import shared
from secateur.recipes.options import (
    MAX_SEED,
    Conflict,
    Flag,
    Heading,
    Recipe,
    Section,
    Texts,
    text_alone,
)


class LoraOptions(Section):
    """Low-rank adapters: they are trained instead of the weights, and merged at the end."""

    alone: ClassVar = {int: "rank"}

    rank: int = Field(16, gt=0)
    """Rank of the matrix that is added to a weight."""
    alpha: Annotated[float | None, Flag("lora_alpha", default="2 · rank")] = Field(None, gt=0)
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[float, Flag("lora_dropout")] = Field(0.0, ge=0, lt=1)
    """Dropout on the inputs of the adapters."""
    targets: Annotated[
        Texts,
        Flag(
            "lora_targets",
            aliases=("target_modules", "lora_target_modules"),
            value="GLOB",
            commas=True,
        ),
    ] = Field(("*",), min_length=1)
    """Names of the linear layers that get adapters, such as q_proj,v_proj."""
    exclude: Annotated[Texts, Flag("lora_exclude", value="GLOB", commas=True)] = ()
    """Names of linear layers that get none."""


class _PruningOptions(Section):
    """Pruning during training: how much, and which weights."""

    alone: ClassVar = {float: "sparsity", str: "pattern"}

    sparsity: float | None = Field(None, gt=0, lt=1)
    """Fraction of zeros at the end. An N:M pattern implies it."""
    pattern: str = "unstructured"
    """Which zeros are allowed: unstructured, N:M, or blocks."""
    scope: Literal["row", "layer", "global"] | None = None
    """The set of weights that compete: row, layer or global."""
    score: str = "magnitude"
    """Score that selects the weights to prune."""
    windows: int = Field(16, gt=0)
    """Windows of the text on which scores and gradients are computed."""

    @classmethod
    def opened(cls, value: Any) -> Any:
        """A text may hold the number."""
        try:
            return super().opened(float(value) if isinstance(value, str) else value)
        except ValueError:
            return super().opened(value)


class GradualOptions(_PruningOptions):
    """Gradual pruning: a few more zeros every few steps of the training."""

    schedule: str = "cubic"
    """How sparsity rises; `secateur methods` lists the schedules."""
    every: int = Field(10, gt=0)
    """Choose a new mask after this many steps."""
    begin: float = Field(0.0, ge=0, le=1)
    """Share of the steps before the first weights are pruned."""
    end: float = Field(0.75, ge=0, le=1)
    """Share of the steps at which the last weights are pruned."""
    regrowth: float = Field(0.0, ge=0, lt=1)
    """Fraction of the kept weights to exchange at each new mask: the lowest are pruned, and those
    with the largest gradients return."""

    @model_validator(mode="after")
    def check_span(self) -> GradualOptions:
        """The end is not before the beginning."""
        if self.begin > self.end:
            raise ValueError(f"begin={self.begin:g} must be at most end={self.end:g}")
        return self


class IterativeOptions(_PruningOptions):
    """Iterative pruning: prune a part, train, prune the next part."""

    rounds: int = Field(4, gt=0)
    """Number of rounds. Each prunes the same fraction of the remaining weights, and trains."""
    rewind: Literal["none", "rate", "weights"] = "rate"
    """What is reset before each training: none, rate (the learning rate), or weights (the weights
    and the rate: lottery tickets)."""
    rewind_step: int = Field(0, ge=0)
    """Reset to this step of a training."""

    @model_validator(mode="after")
    def check_step(self) -> IterativeOptions:
        """A step to go back to needs something that goes back."""
        if self.rewind_step and self.rewind == "none":
            raise ValueError(f"rewind_step={self.rewind_step} changes nothing with rewind=none")
        return self


class _TrainingTextSection(Section):
    """The model to train, and the text to train it on."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Pruned, cut or dense model: hub id, folder, named sample, or a recipe (`*.yaml`)."""
    text: Annotated[
        Texts,
        BeforeValidator(text_alone),
        Flag(value="TEXT", default=shared.OR_OWN, own_text="calibrate"),
    ] = Field((shared.DEFAULT_TEXT,), min_length=1)
    """Training text: file, folder, hub data set or named text. May be repeated; each text then
    gives equally many windows."""
    field: str = "text"
    """The field of a JSONL line that holds the text. Lines without it may hold conversations
    (`messages`, `conversations`) or pairs of `prompt` and `completion`."""
    answers_only: Annotated[
        bool | None, Flag(off="whole_conversations", default="on, where there are answers")
    ] = None
    """Of conversations, learn only what the assistant writes, and of pairs the completion."""
    sequence_length: Annotated[
        int | None, Flag(default="512, or the model's length if that is shorter")
    ] = Field(None, gt=1)
    """Tokens per window."""
    windows: int = Field(4096, gt=0)
    """Largest number of training windows. A longer run repeats them."""
    mask: Annotated[str | None, Flag(value="FILE", default="the model's own zeros")] = None
    """Masks to hold: a file of masks, or the folder of a pruned model."""
    validation_text: Annotated[
        str | None, Flag(value="TEXT", default="held-out windows of the training text")
    ] = None
    """Validation text."""
    validation_windows: int = Field(16, ge=0)
    """Number of validation windows; 0: no validation."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed that chooses the windows and their order."""


class _TrainingLength(Section):
    """How long the model is trained."""

    steps: Annotated[
        int | None, Flag(aliases=("max_steps",), default="as many as the epochs need")
    ] = Field(None, gt=0)
    """Optimizer steps."""
    minutes: Annotated[float | None, Flag(default="as long as the steps take")] = Field(None, gt=0)
    """Minutes to train, instead of steps."""
    epochs: Annotated[float, Flag(aliases=("num_epochs", "num_train_epochs"))] = Field(1.0, gt=0)
    """Epochs over the windows, if neither steps nor minutes are given."""
    batch: Annotated[
        int | None, Flag(default="4, or the next multiple of the number of processes")
    ] = Field(None, gt=0)
    """Windows per optimizer step."""


def _without_rate(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse a second learning rate."""
    if "lr" in options:
        raise ValueError(f"lr={options['lr']}: must be given as --learning-rate alone")
    return options


class OptimizerOptions(Section):
    """The optimizer and its learning rates."""

    learning_rate: Annotated[
        float | None, Flag(default="0.25 / hidden size · √(tokens in a step / 2048)")
    ] = Field(None, gt=0, lt=1)
    """Highest learning rate."""
    warm_up: float = Field(0.05, ge=0, lt=1)
    """Share of the run in which the learning rate rises."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; larger ones are clipped. 0: no clip."""
    optimizer: str = "AdamW"
    """A class of torch.optim."""
    optimizer_options: Annotated[
        dict[str, bool | int | float | list[float]],
        AfterValidator(_without_rate),
        Flag(value="NAME=VALUE", advanced=True),
    ] = Field(default_factory=dict)
    """Other arguments of the optimizer, such as weight_decay."""
    rates: Annotated[dict[str, float], Flag(value="GLOB=FACTOR", advanced=True)] = Field(
        default_factory=dict
    )
    """Learning rate of some parameters, as a factor of the rate; 0 freezes them."""


# pydantic lists the fields of the last base first
class _Optimisation(OptimizerOptions, _TrainingLength):
    """How the model is trained."""

    lora: Annotated[
        LoraOptions | None, Flag(aliases=("lora_r",), value="RANK", default="train all weights")
    ] = None
    """Train low-rank adapters of this rank, and merge them at the end. Another --lora option alone
    means rank 16."""
    gradual: Annotated[
        GradualOptions | None, Flag(value="SPARSITY", default="the zeros stay as they are")
    ] = None
    """Prune gradually during training, up to this sparsity or N:M pattern."""
    iterative: Annotated[
        IterativeOptions | None, Flag(value="SPARSITY", default="the zeros stay as they are")
    ] = None
    """Prune and train in rounds, up to this sparsity or N:M pattern. Each round trains for
    --steps."""
    validations: int = Field(10, gt=0)
    """Number of validations during the run; one more comes before it."""


class _TrainingMemorySection(Section):
    """How the training saves memory and time."""

    group = Heading.MEMORY

    micro_batch_windows: Annotated[
        int | None, Flag(aliases=("micro_batch_size",), default="about 2048 tokens")
    ] = Field(None, gt=0)
    """Windows in one forward."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: a third slower, much less memory."""
    fast_matmuls: Annotated[bool, Flag(off="exact_matmuls", advanced=True)] = True
    """Multiply in bfloat16 on processors where this is faster."""


class _TrainingOutput(shared.OutputFolder):
    """Where the training writes."""

    group = Heading.OUTPUT

    save_minutes: float = Field(5.0, ge=0)
    """Minutes between saves; a stopped run resumes from the last one."""


class _TeacherSection(Section):
    """The model to learn from, and how. Without a teacher the model learns from the text alone."""

    group = Heading.TEACHER

    teacher: Annotated[str | None, Flag(value="MODEL", default="none: learn from the text")] = None
    """Model to learn from, such as the one that was pruned: hub id, folder or named sample."""
    kind: Literal["forward", "reverse", "total_variation"] = "forward"
    """Divergence to minimise: forward is KL(teacher ‖ student), reverse is KL(student ‖ teacher);
    total_variation is what a draft is refused by."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of both models; gradients are scaled by its square."""
    next_token: float = Field(0.0, ge=0, le=1)
    """Share of the next-token loss, 0 to 1; the rest is the divergence."""
    hidden_weight: float = Field(0.0, ge=0)
    """Weight of the hidden-state loss; 0: none."""
    top_k: Annotated[int | None, Flag(default="all, while training")] = Field(None, gt=0)
    """Before the training, store this many of the teacher's most likely tokens for each position,
    and release the teacher."""


class TrainRecipe(
    # pydantic lists the fields of the last base first
    shared.Device,
    _TrainingMemorySection,
    _Optimisation,
    _TeacherSection,
    _TrainingTextSection,
    _TrainingOutput,
    Recipe,
):
    """One training, on text alone or with a teacher. Pruned weights stay zero."""

    run = shared.Planning
    needs: ClassVar = {
        **dict.fromkeys((n for n in _TeacherSection.model_fields if n != "teacher"), ("teacher",)),
    }
    conflicts = (
        *(
            Conflict(
                "lora",
                pruning,
                f"adapters keep the zeros there are, {pruning} pruning makes new ones",
                "prune first, then train adapters",
            )
            for pruning in ("gradual", "iterative")
        ),
        Conflict("gradual", "iterative", "these are two ways to prune", shared.ONE),
        *(
            Conflict(*pair, "must be one of them, the length of the training", shared.ONE)
            for pair in combinations(("steps", "minutes", "epochs"), 2)
        ),
        Conflict(
            "top_k", "hidden_weight", "a teacher that is stored has no hidden states", shared.ONE
        ),
    )

    memory: shared.MemoryLimit = shared.MemoryLimit()
