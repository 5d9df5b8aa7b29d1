"""The fields of the recipes of `secateur retrain` and `secateur distill`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from secateur.recipes.schema import MAX_SEED, Strict, Texts

__all__ = [
    "DistillRecipe",
    "GradualOptions",
    "IterativeOptions",
    "LoraOptions",
    "PruningOptions",
    "RetrainRecipe",
    "aim_alone",
    "rank_alone",
]


class LoraOptions(Strict):
    """Low-rank adapters that are trained instead of the weights, and merged at the end."""

    rank: int = Field(16, gt=0, description="of the product that is added to a weight")
    alpha: float | None = Field(
        None, gt=0, description="the product is scaled by alpha / rank; 2 · rank if not given"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' inputs")
    include: Texts = Field(("*",), description="globs over names of linears")
    exclude: Texts = Field((), description="of those, these are left alone")


class PruningOptions(Strict):
    """Pruning while a model is trained: how much, and which weights."""

    sparsity: float | None = Field(
        None, gt=0, lt=1, description="fraction of zeros at the end; leave it out for N:M"
    )
    pattern: str = Field("unstructured", description="the allowed zeros: unstructured, N:M, blocks")
    scope: Literal["row", "layer", "global"] | None = Field(
        None, description="the set within which weights compete; the pattern's own if not given"
    )
    score: str = Field("magnitude", description="the score that ranks weights")
    windows: int = Field(
        16, gt=0, description="windows of the text for scores and gradients that need text"
    )


class GradualOptions(PruningOptions):
    """Gradual pruning: every few steps of the training a few more zeros."""

    schedule: str = Field("cubic", description="how sparsity rises: cubic, linear, geometric, …")
    every: int = Field(10, gt=0, description="steps between new masks")
    begin: float = Field(0.0, ge=0, le=1, description="share of the steps before the first masks")
    end: float = Field(0.75, ge=0, le=1, description="share of the steps with changing masks")
    regrowth: float = Field(
        0.0, ge=0, lt=1, description="fraction of the kept weights exchanged by gradient each time"
    )


class IterativeOptions(PruningOptions):
    """Iterative pruning: prune a part, train, prune the next part."""

    rounds: int = Field(4, gt=0, description="number of rounds; one training each")
    schedule: str = Field(
        "geometric",
        description="sparsity after each round; geometric prunes the same fraction of the "
        "remaining weights each time",
    )
    rewind: Literal["none", "rate", "weights"] = Field(
        "rate",
        description="what goes back before each training: nothing, the learning rate, or the "
        "weights and the rate (lottery tickets)",
    )
    rewind_step: int = Field(0, ge=0, description="the step of one training to go back to")


def text_alone(value: Any) -> Any:
    """`text: c4` is one text."""
    return (value,) if isinstance(value, str) else value


def tuple_of(value: Any) -> Any:
    """YAML has lists where Python has tuples."""
    return tuple(value) if isinstance(value, list) else value


def rank_alone(value: Any) -> Any:
    """`lora: 16` is a rank."""
    return {"rank": value} if isinstance(value, int) and not isinstance(value, bool) else value


def aim_alone(value: Any) -> Any:
    """`gradual: 0.8` is a sparsity, `gradual: '2:4'` a pattern; `iterative` likewise."""
    if isinstance(value, str):
        try:
            return {"sparsity": float(value)}
        except ValueError:
            return {"pattern": value}
    return {"sparsity": value} if isinstance(value, float) else value


class RetrainRecipe(Strict):
    """One training with the masks held."""

    model: str = Field(description="hub id, folder or named sample: pruned, cut or dense")
    output: str | None = Field(None, description="folder for the trained model; must not exist")
    text: Annotated[Texts, BeforeValidator(text_alone)] = Field(
        ("c4",),
        min_length=1,
        description="what is trained on, as for calibration; of several, as many windows of each",
    )
    field: str = Field("text", description="the field of a JSONL line that holds the text")
    sequence_length: int | None = Field(
        None, gt=1, description="tokens per window; 512, or less if the model is shorter"
    )
    windows: int = Field(4096, gt=0, description="of the text at most; read again if used up")
    batch: int = Field(4, gt=0, description="windows in a step of the optimizer")
    steps: int | None = Field(None, gt=0, description="of the optimizer")
    minutes: float | None = Field(None, gt=0, description="to train, instead of steps")
    epochs: float = Field(1.0, gt=0, description="over the windows, where neither is given")
    learning_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the highest; if not given, 0.25 / hidden size · √(tokens in a step / 2048)",
    )
    warm_up: float = Field(0.05, ge=0, lt=1, description="share of the run")
    clip: float = Field(1.0, ge=0, description="norm that gradients are cut to; 0: not at all")
    optimizer: str = Field("AdamW", description="a class of torch.optim")
    optimizer_options: dict[str, bool | int | float | list[float]] = Field(
        default_factory=dict, description="its arguments besides the learning rate"
    )
    rates: dict[str, float] = Field(
        default_factory=dict,
        description="times the learning rate, by globs of parameter names; 0 freezes",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="layer i of L learns at the rate times layer_decay^(L - 1 - i), embeddings at "
        "layer_decay^L; `rates` come after it",
    )
    micro_batch: int | None = Field(
        None, gt=0, description="windows in one forward; about 2048 tokens if not given"
    )
    gradient_checkpointing: bool = Field(
        False, description="run layers again in the backward: a third slower, far less memory"
    )
    fast_matmuls: bool = Field(
        True, description="products in bfloat16 where the processor is faster at it"
    )
    lora: Annotated[LoraOptions | None, BeforeValidator(rank_alone)] = Field(
        None, description="adapters of this rank are trained, and nothing else"
    )
    gradual: Annotated[GradualOptions | None, BeforeValidator(aim_alone)] = Field(
        None, description="prune a little every few steps, up to this sparsity or N:M"
    )
    iterative: Annotated[IterativeOptions | None, BeforeValidator(aim_alone)] = Field(
        None,
        description="prune in rounds up to this sparsity or N:M; each round trains for `steps`",
    )
    mask: str | None = Field(
        None, description="file of masks, or folder of a pruned model; the model's zeros if None"
    )
    regrow: bool = Field(
        False, description="let weights come back that are zero in the model but not in the mask"
    )
    validation: str | None = Field(
        None, description="text to watch; windows of the training text are held out if None"
    )
    validation_windows: int = Field(16, ge=0, description="how many; 0: watch nothing")
    validations: int = Field(10, gt=0, description="in the run, besides the one before it")
    patience: int = Field(
        0, ge=0, description="stop after so many validations without a new best; 0: never"
    )
    save_minutes: float = Field(5.0, ge=0, description="between saves to go on from")
    tensorboard: str | None = Field(None, description="folder that takes curves; none if None")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the choice and the order of windows")
    memory_budget_gib: float | None = Field(
        None,
        gt=0,
        description="refuse to begin if the device that computes (the GPU, or the process on a "
        "CPU) needs more; default four fifths of what is free there",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(
        False, description="let code that comes with the checkpoint run"
    )


class DistillRecipe(RetrainRecipe):
    """One training in which a pruned or cut model learns from a larger one."""

    teacher: str | None = Field(
        None, description="hub id, folder or named sample; the model that was pruned if None"
    )
    kind: Literal["forward", "reverse", "symmetric"] = Field(
        "forward", description="KL(teacher ‖ student), KL(student ‖ teacher), or half of each"
    )
    temperature: float = Field(1.0, gt=0, description="of both; gradients are scaled by its square")
    next_token: float = Field(0.0, ge=0, le=1, description="share of the plain loss")
    hidden: float = Field(0.0, ge=0, description="weight of the loss of hidden states; 0: none")
    kept_layers: Annotated[tuple[int, ...], BeforeValidator(tuple_of)] | None = Field(
        None, description="which layers of the teacher the student has; spread evenly if None"
    )
    top_k: int | None = Field(
        None, gt=0, description="write down the teacher's most likely tokens first, so many"
    )
    teacher_file: str | None = Field(
        None, description="where that file is, or is to be; else it is removed at the end"
    )
