"""The recipes of `secateur retrain` and `secateur distill`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from secateur.recipes.memory import BUDGET, FREE, Device
from secateur.recipes.run import OutputFolder, Resuming
from secateur.recipes.section import (
    HOW,
    MAX_SEED,
    MEMORY,
    OUTPUT,
    WHAT_TO_LEARN_FROM,
    Flag,
    Recipe,
    Section,
    Texts,
    text_alone,
)

__all__ = [
    "DistillRecipe",
    "GradualOptions",
    "IterativeOptions",
    "LoraOptions",
    "PruningOptions",
    "RetrainRecipe",
]


class LoraOptions(Section):
    """Low-rank adapters that are trained instead of the weights, and merged at the end."""

    alone: ClassVar[tuple[type, ...]] = (int,)

    rank: int = Field(16, gt=0, description="Rank of the product that is added to a weight.")
    alpha: Annotated[float | None, Flag(default="2 · rank")] = Field(
        None, gt=0, description="The product is scaled by alpha / rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapters' inputs.")
    include: Texts = Field(("*",), description="Names of the linears that get adapters, as globs.")
    exclude: Texts = Field((), description="Names of linears that get none, as globs.")

    @classmethod
    def opened(cls, value: Any) -> Any:
        """A number alone is the rank."""
        return {"rank": value} if isinstance(value, int) and not isinstance(value, bool) else value


class PruningOptions(Section):
    """Pruning while a model is trained: how much, and which weights."""

    alone: ClassVar[tuple[type, ...]] = (float, str)

    sparsity: float | None = Field(
        None, gt=0, lt=1, description="Fraction of zeros at the end; an N:M pattern has its own."
    )
    pattern: str = Field(
        "unstructured", description="Which zeros are allowed: unstructured, N:M, or blocks."
    )
    scope: Literal["row", "layer", "global"] | None = Field(
        None, description="The set of weights that compete; the pattern's own if not given."
    )
    score: str = Field("magnitude", description="The score that selects the weights to prune.")
    windows: int = Field(
        16, gt=0, description="Windows of the text that scores and gradients are taken on."
    )

    @classmethod
    def opened(cls, value: Any) -> Any:
        """A number alone is the sparsity, a text alone the pattern."""
        if isinstance(value, str):
            try:
                return {"sparsity": float(value)}
            except ValueError:
                return {"pattern": value}
        return {"sparsity": value} if isinstance(value, float) else value


class GradualOptions(PruningOptions):
    """Gradual pruning: every few steps of the training a few more zeros."""

    schedule: str = Field(
        "cubic", description="How sparsity rises; `secateur methods` lists the schedules."
    )
    every: int = Field(10, gt=0, description="Steps between new masks.")
    begin: float = Field(
        0.0, ge=0, le=1, description="Share of the steps before the first weights are pruned."
    )
    end: float = Field(
        0.75, ge=0, le=1, description="Share of the steps after which the last weights are pruned."
    )
    regrowth: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the kept weights exchanged by gradient at each new mask.",
    )


class IterativeOptions(PruningOptions):
    """Iterative pruning: prune a part, train, prune the next part."""

    rounds: int = Field(4, gt=0, description="Number of rounds; each is one training.")
    schedule: str = Field(
        "geometric",
        description="Sparsity after each round; geometric prunes the same fraction of the "
        "remaining weights each time.",
    )
    rewind: Literal["none", "rate", "weights"] = Field(
        "rate",
        description="What goes back before each training: nothing, the learning rate, or the "
        "weights and the rate (lottery tickets).",
    )
    rewind_step: int = Field(0, ge=0, description="The step of one training to go back to.")


def tuple_of(value: Any) -> Any:
    """YAML has lists where Python has tuples."""
    return tuple(value) if isinstance(value, list) else value


class TrainingTextSection(Section):
    """The model that learns, and the text that it learns from."""

    group: ClassVar[str] = WHAT_TO_LEARN_FROM

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Pruned, cut or dense model: hub id, folder, named sample, or a recipe "
        "(`*.yaml`)."
    )
    text: Annotated[Texts, BeforeValidator(text_alone), Flag(value="TEXT")] = Field(
        ("c4",),
        min_length=1,
        description="Training text: file, folder, hub data set or named text. Of several texts, "
        "equal parts are used.",
    )
    field: str = Field("text", description="The field of a JSONL line that holds the text.")
    sequence_length: Annotated[
        int | None, Flag(default="512, or the model's length if that is shorter")
    ] = Field(None, gt=1, description="Tokens per window.")
    windows: int = Field(
        4096, gt=0, description="Most windows of the text; they are read again when used up."
    )
    mask: Annotated[str | None, Flag(value="FILE", default="the model's own zeros")] = Field(
        None, description="File of masks, or folder of a pruned model, whose zeros are held."
    )
    validation_text: Annotated[
        str | None, Flag(value="TEXT", default="held-out windows of the training text")
    ] = Field(None, description="Text that the training is validated on.")
    validation_windows: int = Field(
        16, ge=0, description="Windows of the validation; 0 does not validate."
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Seed of the choice and the order of windows."
    )


class Optimisation(Section):
    """How the model is trained."""

    group: ClassVar[str] = HOW

    steps: Annotated[int | None, Flag(default="as many as the epochs need")] = Field(
        None, gt=0, description="Steps of the optimizer."
    )
    minutes: Annotated[float | None, Flag(default="as long as the steps take")] = Field(
        None, gt=0, description="Minutes to train, instead of steps."
    )
    epochs: float = Field(
        1.0, gt=0, description="Epochs over the windows, if neither steps nor minutes are given."
    )
    batch: int = Field(4, gt=0, description="Windows in a step of the optimizer.")
    learning_rate: Annotated[
        float | None, Flag(default="0.25 / hidden size · √(tokens in a step / 2048)")
    ] = Field(None, gt=0, lt=1, description="Highest learning rate.")
    warm_up: float = Field(
        0.05, ge=0, lt=1, description="Share of the run in which the learning rate rises."
    )
    clip: float = Field(
        1.0, ge=0, description="Norm that gradients are clipped to; 0 does not clip."
    )
    optimizer: str = Field("AdamW", description="A class of torch.optim.")
    optimizer_options: Annotated[
        dict[str, bool | int | float | list[float]], Flag(value="NAME=VALUE")
    ] = Field(
        default_factory=dict, description="Arguments of the optimizer besides the learning rate."
    )
    rates: Annotated[dict[str, float], Flag(value="GLOB=FACTOR")] = Field(
        default_factory=dict,
        description="Factors of the learning rate, by names of parameters; 0 freezes.",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Layer i of L learns at the rate times layer_decay^(L - 1 - i), embeddings at "
        "layer_decay^L; `rates` come after it.",
    )
    lora: Annotated[LoraOptions | None, Flag(value="RANK", default="train all weights")] = Field(
        None, description="Train adapters of this rank, and merge them at the end."
    )
    gradual: Annotated[
        GradualOptions | None, Flag(value="SPARSITY", default="the zeros stay as they are")
    ] = Field(
        None, description="Prune a little every few steps, up to this sparsity or N:M pattern."
    )
    iterative: Annotated[
        IterativeOptions | None, Flag(value="SPARSITY", default="the zeros stay as they are")
    ] = Field(
        None,
        description="Prune in rounds up to this sparsity or N:M pattern. Each round trains for "
        "the given steps.",
    )
    regrow: bool = Field(
        False,
        description="Train weights that are zero in the model and kept by the mask.",
    )
    validations: int = Field(
        10, gt=0, description="Validations during the run, besides the one before it."
    )
    patience: Annotated[int, Flag(default="never")] = Field(
        0, ge=0, description="Stop after this many validations without a new best; 0: never."
    )


class TrainingMemorySection(Section):
    """How much memory a training may use."""

    group: ClassVar[str] = MEMORY

    micro_batch_windows: Annotated[int | None, Flag(default="about 2048 tokens")] = Field(
        None, gt=0, description="Windows in one forward."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Run layers again in the backward: a third slower, with far less memory.",
    )
    fast_matmuls: Annotated[bool, Flag(off="exact_matmuls")] = Field(
        True, description="Multiply in bfloat16 where the processor is faster at it."
    )
    memory_budget_gib: Annotated[float | None, Flag(default=FREE)] = Field(
        None, gt=0, description=BUDGET
    )


class TrainingOutput(OutputFolder):
    """What a training writes."""

    group: ClassVar[str] = OUTPUT

    save_minutes: float = Field(
        5.0, ge=0, description="Minutes between the saves that a stopped training resumes from."
    )
    tensorboard: Annotated[str | None, Flag(value="DIR")] = Field(
        None, description="Folder for TensorBoard curves."
    )


class RetrainRecipe(
    # pydantic lists the fields of the last base first
    Device,
    TrainingMemorySection,
    Optimisation,
    TrainingTextSection,
    TrainingOutput,
    Recipe,
):
    """One training that holds the masks."""

    run: ClassVar[type[Section] | None] = Resuming


class DistillRecipe(RetrainRecipe):
    """One training in which a pruned or cut model learns from a larger one."""

    group: ClassVar[str] = WHAT_TO_LEARN_FROM

    teacher: Annotated[str | None, Flag(value="MODEL", default="the model that was pruned")] = (
        Field(None, description="Model to learn from: hub id, folder or named sample.")
    )
    kind: Literal["forward", "reverse", "symmetric"] = Field(
        "forward",
        description="Divergence: forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), "
        "symmetric half of each.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Temperature of both models; gradients are scaled by its square."
    )
    next_token: float = Field(0.0, ge=0, le=1, description="Share of the plain next-token loss.")
    hidden_weight: float = Field(
        0.0, ge=0, description="Weight of the loss of hidden states; 0 leaves it out."
    )
    kept_layers: Annotated[
        Annotated[tuple[int, ...], BeforeValidator(tuple_of)] | None,
        Flag(default="spread evenly", commas=True),
    ] = Field(None, description="Layers of the teacher that the student has.")
    top_k: Annotated[int | None, Flag(default="all, while training")] = Field(
        None,
        gt=0,
        description="Store the teacher's most likely tokens before the training, this many each.",
    )
    teacher_file: Annotated[str | None, Flag(value="FILE", default="removed at the end")] = Field(
        None, description="File that holds the stored teacher, or will hold it."
    )
