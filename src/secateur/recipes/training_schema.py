"""The fields of the recipes of `secateur retrain` and `secateur distill`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.recipes.schema import Strict

__all__ = ["DistillRecipe", "RetrainRecipe"]


class RetrainRecipe(Strict):
    """One training with the masks held."""

    model: str = Field(description="hub id, folder or named sample: pruned, cut or dense")
    output: str | None = Field(None, description="folder for the trained model; must not exist")
    text: str = Field("c4", description="what is trained on; as for calibration")
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
        None, gt=0, lt=1, description="the highest; 0.25 / hidden size if not given"
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
    micro_batch: int | None = Field(
        None, gt=0, description="windows in one forward; about 2048 tokens if not given"
    )
    gradient_checkpointing: bool = Field(
        False, description="run layers again in the backward: a third slower, far less memory"
    )
    fast_matmuls: bool = Field(
        True, description="products in bfloat16 where the processor is faster at it"
    )
    mask: str | None = Field(
        None, description="file of masks, or folder of a pruned model; the model's zeros if None"
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
    seed: int = Field(0, ge=0, description="of the choice and the order of windows")
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
    kept_layers: tuple[int, ...] | None = Field(
        None, description="which layers of the teacher the student has; spread evenly if None"
    )
    top_k: int | None = Field(
        None, gt=0, description="write down the teacher's most likely tokens first, so many"
    )
    teacher_file: str | None = Field(
        None, description="where that file is, or is to be; else it is removed at the end"
    )
