"""Trains a checkpoint on text or with a teacher, keeps its zeros, and writes a run folder.

weights     all weights learn, the masks stay                       the default
lora        adapters learn, with the masks in their products; they are merged at the end
gradual     the masks lose weights every few steps
iterative   the masks lose weights in rounds, with a training after each

The result is a copy of the source, into which the float32 weights are written one tensor at a time.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.diagnostics.audit import audit_checkpoint
from secateur.errors import RecipeError
from secateur.models.configuration import read_configuration
from secateur.models.opening import load_whole, refuse_quantized
from secateur.parallel.ranks import Ranks, refuse_another_disk
from secateur.progress import Progress, Silent
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.train import GradualOptions, IterativeOptions, TrainRecipe
from secateur.reporting.cards import training_card
from secateur.reporting.models import TrainResult
from secateur.reporting.plan import TrainPlanResult
from secateur.runs.environment import Meter, choose_device, environment
from secateur.runs.folder import NOTES, check_output
from secateur.runs.output import write_json, write_text
from secateur.runs.records import Cost, Training, read_list
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import Schedule, schedules
from secateur.sparsity.scores import scores
from secateur.steps.checkpoint_files import carry_over
from secateur.steps.runner import RunContext, Step, identity_of, source_of
from secateur.training.batches import Batches
from secateur.training.gradual import Criterion, GradualPruning, Rounds
from secateur.training.loop import Loop, Outcome
from secateur.training.lora import attach, merge
from secateur.training.masks import Masks, masks_in, open_masks
from secateur.training.process_group import ProcessGroup, load
from secateur.training.saved import Hook, check_written, open_tensors, write_trained
from secateur.training.setup import TrainingSetup
from secateur.training.training_plan import TrainingPlan, optimizers

NO_PART = {
    "output",
    "device",
    "save_minutes",
    "learning_rate",
    "memory",
}
"""Fields that may differ in a resumed training. The learning rate is one of them: a training that
diverged can resume from its last save with a lower rate."""

TRAININGS = "training.json"


def plan_training(
    recipe: TrainRecipe, progress: Progress, call: Mapping[str, Any]
) -> TrainPlanResult:
    """Check a recipe and its texts, and show what the training would need.

    Args:
        recipe: recipe of the training.
        progress: receives the reading of the text.
        call: the other options of the call.

    Raises:
        SecateurError: as the training would.
    """
    processes = ProcessGroup.launched(choose_device(recipe.device))
    source = source_of(recipe, progress)
    refuse_quantized(source.folder)
    setup = TrainingSetup.read(recipe, source, processes, progress)
    places = () if setup.teacher is None else (setup.teacher.folder,)
    read = recipe.model, source.folder, recipe.mask, recipe.validation_text, *recipe.text, *places
    check_output(recipe.output, "train", setup.needs.disk_bytes, read, call)
    record, plan = setup.text.record, setup.plan
    return TrainPlanResult(
        objective=_objective_text(recipe),
        text=record["source"],
        windows=record["windows"],
        sequence_length=record["sequence_length"],
        validation_windows=record["validation_windows"],
        steps=plan.steps or None,
        minutes=plan.minutes or None,
        tokens=plan.steps * recipe.batch * record["sequence_length"] or None,
        memory=setup.needs.to_json(),
        disk_bytes=setup.needs.disk_bytes,
    )


class Train(Step[TrainRecipe, TrainResult]):
    """Train a checkpoint into a new folder, with its zeros held at every step.

    It learns from text; with a `teacher` it learns that model's predictions for the text. With
    several processes, only the first one writes, and all return the result.
    """

    verb = "train"

    def __init__(self, recipe: TrainRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        refuse_quantized(run.source.folder)
        read_trainings(run.source.folder / NOTES)  # damage is found before the work
        group = ProcessGroup.of(run.ranks, choose_device(recipe.device))
        self.setup = TrainingSetup.read(recipe, run.source, group, run.progress)
        work = run.folder.work
        run.folder.worth_resuming = lambda: any(
            file.name != "best.safetensors" for file in work.rglob("*.safetensors")
        )

    @classmethod
    def caller(cls, recipe: TrainRecipe) -> ProcessGroup:
        """Those that accelerate or torchrun has started: the function works in all of them."""
        return ProcessGroup.launched(choose_device(recipe.device))

    @classmethod
    def check(cls, recipe: TrainRecipe) -> None:
        """Check the optimizer, the device, and the parts of gradual pruning."""
        plan = TrainingPlan(
            steps=1, optimizer=recipe.optimizer, optimizer_options=recipe.optimizer_options
        )
        plan.make_optimizer([("weight", torch.nn.Parameter(torch.ones(2, 2)))])
        choose_device(recipe.device)
        if recipe.gradual is not None:
            schedules[recipe.gradual.schedule]
        how = recipe.gradual or recipe.iterative
        if how is not None:
            scores[how.score]
            parse_pattern(how.pattern, how.scope)

    @classmethod
    def reads(cls, recipe: TrainRecipe) -> tuple[str | None, ...]:
        """The mask and the texts."""
        return recipe.mask, recipe.validation_text, *recipe.text

    @property
    def disk_bytes(self) -> int:
        """The weights and moments that are saved, and the result."""
        return self.setup.needs.disk_bytes

    def identity(self) -> dict[str, Any]:
        """Everything that affects the trained weights."""
        return {
            **identity_of(self.recipe, NO_PART, self.setup.target.reader.files, self.run.progress),
            "tokens": self.setup.text.record["sha256"],
            "answer_tokens": self.setup.text.record.get("answer_tokens"),
        }

    def settled(self) -> dict[str, Any]:
        """The learning rate, which a stopped training may lower."""
        return {"learning_rate": self.recipe.learning_rate}

    def work(self) -> TrainResult:
        """Train, write the model, and read its zeros again."""
        setup, folder, ranks = self.setup, self.run.folder, self.setup.processes
        if setup.teacher is not None:
            folder.keep_apart(setup.teacher.folder)
        of_others = {"work": str(folder.work), "model": str(folder.model)}
        ranks.once(lambda: of_others)
        masks, outcome, rounds, place = _train(setup, folder.work, self.run.progress)
        training = _record(setup, outcome, rounds, self.run.meter)
        _write(self.run, setup, masks, training, place)
        _check_together(setup, folder.model, masks)
        last = read_trainings(folder.notes)[-1]
        return TrainResult(output=self.run.place, manifest=last)

    @classmethod
    def share(cls, recipe: TrainRecipe, ranks: Ranks) -> TrainResult | None:
        """Train with the first process, which alone writes. All return the result."""
        job = ranks.once(lambda: None)
        output = Path(os.path.abspath(recipe.output or ""))
        if job is None:  # an earlier run has finished everything
            return cls.result(output)
        work, model, silent = Path(job["work"]), Path(job["model"]), Silent()
        if not work.is_dir():
            refuse_another_disk(ranks.rank, work)
        group = ProcessGroup.of(ranks, choose_device(recipe.device))
        setup = TrainingSetup.read(recipe, source_of(recipe, silent), group, silent)
        masks, *_ = _train(setup, work, silent)
        _check_together(setup, model, masks)
        return TrainResult(output=output, manifest=read_trainings(model / NOTES)[-1])

    @classmethod
    def result(cls, output: Path) -> TrainResult:
        """Read the result of a finished training from its notes."""
        return TrainResult(output=output, manifest=read_trainings(output / NOTES)[-1])


def _train(
    setup: TrainingSetup, work: Path, progress: Progress
) -> tuple[Masks, Outcome, list[dict[str, Any]], Path]:
    """Train with all processes. Only the first one writes.

    Returns:
        The zeros of the result, how the training ended, its rounds, and the folder with the final
        weights and the log.
    """
    recipe, text, ranks = setup.recipe, setup.text, setup.processes
    # Weights are not rounded between the rounds of iterative pruning.
    dtype = torch.float32 if ranks.count > 1 or recipe.iterative is not None else None
    model = load(
        setup.source.folder, ranks, dtype=dtype, trust_remote_code=recipe.trust_remote_code
    )
    adapted = adapt(setup, model)
    validation = None
    if text.validation is not None:
        windows = len(text.validation)
        validation = Batches(text.validation, windows, answers=text.validation_answers)
    make_loop = partial(
        Loop,
        adapted.model,
        Batches(text.windows, recipe.batch, recipe.seed, answers=text.answers),
        setup.objective(model, work, progress),
        adapted.held,
        hooks=adapted.hooks,
        validation=validation,
        progress=progress,
        processes=ranks,
    )
    if adapted.rounds is None:
        return adapted.masks, make_loop(setup.plan, saved=work).run(), [], work
    rounds = adapted.rounds.train(make_loop, setup.plan, work / "rounds")
    return adapted.masks, *rounds


def _check_together(setup: TrainingSetup, model: Path, masks: Masks) -> None:
    """Check the written zeros. Every process has a part of the masks."""
    setup.processes.wait()
    check_written(model, masks, trust_remote_code=setup.recipe.trust_remote_code)
    setup.processes.wait()


@dataclass(frozen=True)
class Adapted:
    """A model that is ready for the loop.

    Attributes:
        model: what the loop trains.
        held: the masks that it holds; None if adapters hold them.
        masks: the zeros of the result.
        hooks: work after every step.
        rounds: rounds of iterative pruning; None for one training.
    """

    model: Any
    held: Masks | None
    masks: Masks
    hooks: tuple[Hook, ...] = ()
    rounds: Rounds | None = None


def adapt(setup: TrainingSetup, model: Any) -> Adapted:
    """Prepare a model for the training, in place.

    Args:
        setup: of the training.
        model: the model with its initial weights; it may be sharded.

    Raises:
        RecipeError: the masks do not fit, or adapters or gradual pruning cannot run.
        SourceError: the file of masks holds none.
    """
    recipe = setup.recipe
    how = recipe.gradual or recipe.iterative
    masks = Masks.of(model)
    if recipe.mask is not None:
        masks = masks_in(
            Path(recipe.mask),
            model,
            trust_remote_code=recipe.trust_remote_code,
            regrows=how is not None,  # pruning keeps the zeros itself
            sums=setup.processes.sums,
        )
    if recipe.lora is None and how is None:
        return Adapted(model, masks, masks)
    masks = masks.held_in(model)
    masks.apply(model)
    if recipe.lora is not None:
        return Adapted(attach(model, recipe.lora, recipe.seed).get_base_model(), None, masks)
    opened = open_masks(model)
    # Zeros elsewhere (experts that are stored in one tensor) stay unchanged.
    held = Masks({**Masks.of(model).kept, **opened})
    schedule, criterion = _pruning(recipe, Masks(opened).sparsity, setup.text.windows)
    if recipe.iterative is not None:
        rounds = Rounds(model, opened, schedule, criterion, recipe.iterative)
        return Adapted(model, held, held, rounds=rounds)
    hook = GradualPruning(opened, schedule, criterion, recipe.gradual or GradualOptions())
    return Adapted(model, held, held, (hook,))


def _pruning(recipe: TrainRecipe, sparsity: float, windows: Tensor) -> tuple[Schedule, Criterion]:
    """Return the schedule of the sparsity, and the rule that chooses weights."""
    how = recipe.gradual or recipe.iterative
    assert how is not None
    kind = "iterative" if isinstance(how, IterativeOptions) else "gradual"
    pattern = parse_pattern(how.pattern, how.scope)
    last = how.sparsity if pattern.sparsity is None else pattern.sparsity
    if last is None:
        raise RecipeError(
            f"{kind} pruning needs a sparsity to end at",
            remedy=f"--{kind} 0.8, or --{kind} 2:4",
        )
    if how.sparsity not in (None, last):
        raise RecipeError(
            f"the pattern {how.pattern} has the sparsity {last:g}, not {how.sparsity:g}",
            remedy="leave the sparsity out",
        )
    if sparsity > last:
        raise RecipeError(
            f"{sparsity:.1%} of the weights are zero already, more than {last:.1%}, the sparsity "
            "at the end",
            remedy="give a higher sparsity, or begin with a denser model",
        )
    # rounds prune the same fraction of the remaining weights each time
    schedule: Any = schedules[how.schedule if isinstance(how, GradualOptions) else "geometric"]
    return schedule(last, sparsity), Criterion(scores[how.score](), pattern, windows[: how.windows])


def merged(recipe: TrainRecipe, model: Any, masks: Masks, trained: Mapping[str, Tensor]) -> Any:
    """Return the final model of a training of adapters.

    Args:
        recipe: recipe of the training, with adapters.
        model: the model with its initial weights; it is changed in place.
        masks: the zeros of the result.
        trained: the adapters' parameters by name.
    """
    masks.apply(model)
    adapted = attach(model, recipe.lora)
    for name, value in trained.items():
        adapted.get_base_model().get_parameter(name).data.copy_(value)
    return merge(adapted)


def read_trainings(notes: Path) -> list[Training]:
    """The records of all trainings of a model; none if it was never trained.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = notes / TRAININGS
    return read_list(Training, file) if file.is_file() else []


def _record(
    setup: TrainingSetup, outcome: Outcome, rounds: list[dict[str, Any]], meter: Meter
) -> Training:
    """The record of a finished training."""
    recipe = setup.recipe
    validations = [[step, math.exp(loss)] for step, loss in outcome.validations]
    facts, apart = outcome.facts(), ("validations", "best_kept", "learning_rate")
    return Training(
        source=setup.source.record,
        objective=_objective_text(recipe),
        text=setup.text.record,
        learning_rate=outcome.learning_rate,
        optimizer=optimizers()[recipe.optimizer.lower()].__name__,
        processes=setup.processes.count,
        recipe=recipe.model_dump(mode="json"),
        environment=environment(setup.processes.device),
        planned=setup.needs.to_json(),
        cost=Cost.model_validate({**meter.read(), "training_seconds": outcome.seconds}),
        result={
            **{name: value for name, value in facts.items() if name not in apart},
            "perplexities": validations,
            "perplexity_before": validations[0][1] if validations else None,
            "perplexity_after": math.exp(outcome.best_loss) if validations else None,
            "rounds": rounds,
        },
    )


def _objective_text(recipe: TrainRecipe) -> str:
    """Describe in words the loss of a training, and its pruning."""
    text = "next token"
    if recipe.teacher is not None:
        name = "total variation" if recipe.kind == "total_variation" else f"{recipe.kind} KL"
        text = f"{name}, T = {recipe.temperature:g}"
        if recipe.next_token:
            part = recipe.next_token
            text = f"{1 - part:g} of {text}, {part:g} of next token"
        if recipe.hidden_weight:
            text += f", {recipe.hidden_weight:g} of hidden states"
    if recipe.lora is not None:
        text += f", adapters of rank {recipe.lora.rank}"
    how = recipe.gradual or recipe.iterative
    if how is not None:
        share = parse_pattern(how.pattern, how.scope).sparsity or how.sparsity or 0.0
        text += f", pruned{' gradually' * (recipe.gradual is not None)} to {share:.0%}"
    if isinstance(how, IterativeOptions):
        text += f" in {how.rounds} rounds, rewinding {how.rewind}"
    return text


def _write(
    run: RunContext, setup: TrainingSetup, masks: Masks, training: Training, place: Path
) -> None:
    """Write the model and its notes. `place` has the final weights and the log."""
    recipe, source, folder = setup.recipe, setup.source.folder, run.folder
    made, trust = folder.fresh_model(), recipe.trust_remote_code
    with open_tensors(place / "final.safetensors") as values:
        if recipe.lora is not None:  # the whole model is in memory, as in the training
            model = load_whole(source, torch.device("cpu"), trust_remote_code=trust)
            values = dict(merged(recipe, model, masks, values).named_parameters())
        write_trained(source, values, made, run.progress, trust_remote_code=trust)
    carry_over(source, made, read_configuration(source), same_weights=False)
    audit = audit_checkpoint(made, trust_remote_code=trust, progress=run.progress)
    result = {**training.result, "decoder_sparsity": audit.sparsity}
    training = training.model_copy(update={"result": result})
    trainings = [x.to_json() for x in (*read_trainings(folder.notes), training)]
    write_json(folder.notes / TRAININGS, trainings)
    shutil.copyfile(place / "log.jsonl", folder.notes / "training.jsonl")
    write_text(folder.notes / "training.yaml", dump_recipe(recipe))
    card = training_card(training, run.again(recipe), source, recipe.output or folder.output)
    write_text(made / "README.md", card)
