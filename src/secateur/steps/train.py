"""Trains a checkpoint on text or with a teacher, keeps its zeros, and writes a run folder.

The result is a copy of the source, into which the float32 weights are written one tensor at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from secateur.diagnostics.audit import audit_checkpoint
from secateur.engine.plan import Plan
from secateur.errors import RecipeError
from secateur.models.configuration import read_configuration
from secateur.models.opening import load_whole, refuse_quantized
from secateur.progress import Progress
from secateur.recipes.reading import dump_recipe
from secateur.recipes.train import TrainRecipe
from secateur.reporting.cards import training_card
from secateur.reporting.models import TrainResult
from secateur.reporting.plan import TrainPlanResult
from secateur.runs.environment import Meter, choose_device, environment
from secateur.runs.folder import NOTES, check_output
from secateur.runs.output import write_json, write_text
from secateur.runs.records import Cost, Training, read_list
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import schedules
from secateur.sparsity.scores import scores
from secateur.steps.checkpoint_files import carry_over
from secateur.steps.runner import RunContext, Step, identity_of, source_of
from secateur.training.batches import Batches
from secateur.training.loop import Loop
from secateur.training.masks import Masks
from secateur.training.process_group import ProcessGroup, load
from secateur.training.saved import check_written, open_tensors, write_trained
from secateur.training.session import Trained, train_in_rounds, train_once
from secateur.training.setup import (
    Adapted,
    PlannedTraining,
    TrainingInputs,
    adapt,
    merged,
    plan_of,
)
from secateur.training.training_plan import TrainingPlan, optimizers

NO_PART = {
    "output",
    "device",
    "save_minutes",
    "learning_rate",
    "teacher_file",
    "tensorboard",
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
    inputs = TrainingInputs.read(recipe, source, processes, progress)
    found = plan_of(inputs, None)
    places = () if found.teacher is None else (found.teacher.folder,)
    read = recipe.model, source.folder, recipe.mask, recipe.validation_text, *recipe.text, *places
    check_output(recipe.output, "train", found.needs.disk_bytes, read, call)
    record, plan = inputs.text.record, found.plan
    return TrainPlanResult(
        objective=_objective_text(recipe),
        text=record["source"],
        windows=record["windows"],
        sequence_length=record["sequence_length"],
        validation_windows=record["validation_windows"],
        steps=plan.steps or None,
        minutes=plan.minutes or None,
        tokens=plan.steps * recipe.batch * record["sequence_length"] or None,
        memory=found.needs.to_json(),
        disk_bytes=found.needs.disk_bytes,
    )


class Train(Step[TrainRecipe, TrainResult]):
    """Train a checkpoint into a new folder, with its zeros held at every step.

    It learns from text; with a `teacher` it learns that model's predictions for the text. With
    several processes, only the first one writes, and all return the result.
    """

    verb = "train"
    everywhere = True

    def __init__(self, recipe: TrainRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        refuse_quantized(run.source.folder)
        assert isinstance(run.ranks, ProcessGroup)
        self.ranks, work = run.ranks, run.folder.work
        self.inputs = TrainingInputs.read(recipe, run.source, self.ranks, run.progress)
        run.folder.worth_resuming = lambda: any(
            file.name != "best.safetensors" for file in work.rglob("*.safetensors")
        )

    @classmethod
    def processes(cls, recipe: TrainRecipe) -> ProcessGroup:
        """Those that divide the model."""
        return ProcessGroup.launched(choose_device(recipe.device))

    @classmethod
    def check(cls, recipe: TrainRecipe) -> None:
        """Check the optimizer, the device, and the parts of gradual pruning."""
        plan = TrainingPlan(
            steps=1, optimizer=recipe.optimizer, optimizer_options=recipe.optimizer_options
        )
        plan.make_optimizer([("weight", torch.nn.Parameter(torch.ones(2, 2)))])
        choose_device(recipe.device)
        if recipe.tensorboard and Path(recipe.tensorboard).is_file():
            raise RecipeError(
                f"{recipe.tensorboard} is a file, and curves are written into a folder",
                where="--tensorboard",
                remedy="name a folder, which may be new",
            )
        if recipe.gradual is not None:
            scores[recipe.gradual.score]
            schedules[recipe.gradual.schedule]
            parse_pattern(recipe.gradual.pattern, recipe.gradual.scope)

    @classmethod
    def reads(cls, recipe: TrainRecipe) -> tuple[str | None, ...]:
        """The mask and the texts."""
        return recipe.mask, recipe.validation_text, *recipe.text

    @cached_property
    def planned(self) -> PlannedTraining:
        """The length of the training, its teacher, and what it needs."""
        return plan_of(self.inputs, self.run.folder.work)

    @property
    def disk_bytes(self) -> int:
        """The weights and moments that are saved, and the result."""
        return self.planned.needs.disk_bytes

    def identity(self) -> dict[str, Any]:
        """Everything that affects the trained weights."""
        return {
            **identity_of(self.recipe, NO_PART, self.inputs.target.reader.files, self.run.progress),
            "tokens": self.inputs.text.record["sha256"],
            "answer_tokens": self.inputs.text.record.get("answer_tokens"),
        }

    def settled(self) -> dict[str, Any]:
        """The learning rate, which a stopped training may lower."""
        return {"learning_rate": self.recipe.learning_rate}

    def work(self) -> TrainResult:
        """Train, write the model, and read its zeros again."""
        recipe, inputs, ranks = self.recipe, self.inputs, self.ranks
        folder, progress, source = self.run.folder, self.run.progress, self.run.source
        trust, work, text = recipe.trust_remote_code, folder.work, inputs.text
        found = self.planned
        if found.teacher is not None:
            folder.keep_apart(found.teacher.folder)
        # Weights are not rounded between the rounds of iterative pruning.
        dtype = torch.float32 if ranks.count > 1 or recipe.iterative is not None else None
        model = load(source.folder, ranks, dtype=dtype, trust_remote_code=trust)
        masks = inputs.masks(model)
        objective = inputs.objective(found.teacher, model, work, progress)
        adapted = adapt(recipe, model, masks, text.windows)
        make_loop = partial(
            Loop,
            adapted.model,
            Batches(text.windows, recipe.batch, recipe.seed, answers=text.answers),
            objective,
            adapted.held,
            hooks=adapted.hooks,
            validation=text.validation,
            validation_answers=text.validation_answers,
            progress=progress,
            processes=ranks,
        )
        board = Path(recipe.tensorboard) if recipe.tensorboard else None
        rounds, plan = adapted.rounds, found.plan
        if rounds is None:
            trained = train_once(make_loop(plan, saved=work, board=board), work)
        else:
            trained = train_in_rounds(make_loop, adapted, rounds, plan, work, board)
        if ranks.first:
            training = _record(inputs, adapted, trained, self.run.meter, found.needs)
            _write(self.run, recipe, adapted.masks, training, trained)
        ranks.wait()
        check_written(folder.model, adapted.masks, trust_remote_code=trust)
        ranks.wait()
        return TrainResult(self.run.place, read_list(Training, folder.notes / TRAININGS)[-1])

    @classmethod
    def result(cls, output: Path) -> TrainResult:
        """Read the result of a finished training from its notes."""
        return TrainResult(output, read_list(Training, output / NOTES / TRAININGS)[-1])


# -- results -------------------------------------------------------------------------------------


def _record(
    inputs: TrainingInputs,
    adapted: Adapted,
    trained: Trained,
    meter: Meter,
    needs: Plan,
) -> Training:
    """The record of a finished training."""
    outcome, recipe = trained.outcome, inputs.recipe
    validations = [[step, math.exp(loss)] for step, loss in outcome.validations]
    return Training(
        source=inputs.source.record,
        objective=_objective_text(recipe, adapted),
        text=inputs.text.record,
        learning_rate=trained.learning_rate,
        optimizer=optimizers()[recipe.optimizer.lower()].__name__,
        processes=inputs.processes.count,
        recipe=recipe.model_dump(mode="json"),
        environment=environment(inputs.processes.device),
        planned=needs.to_json(),
        cost=Cost.model_validate({**meter.read(), "training_seconds": outcome.seconds}),
        result={
            **{k: v for k, v in outcome.facts().items() if k not in ("validations", "best_kept")},
            "perplexities": validations,
            "perplexity_before": validations[0][1] if validations else None,
            "perplexity_after": math.exp(outcome.best_loss) if validations else None,
            "rounds": trained.rounds,
        },
    )


def _objective_text(recipe: TrainRecipe, adapted: Adapted | None = None) -> str:
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
    if adapted is None:
        return text
    pruned = Masks(adapted.opened).sparsity
    if recipe.gradual is not None:
        text += f", pruned gradually to {pruned:.0%}"
    if adapted.rounds is not None:
        rounds = adapted.rounds
        text += f", pruned to {pruned:.0%} in {rounds.rounds} rounds, rewinding {rounds.rewind}"
    return text


def _write(
    run: RunContext, recipe: TrainRecipe, masks: Masks, training: Training, trained: Trained
) -> None:
    """Write the model and its notes."""
    folder, source, progress = run.folder, run.source, run.progress
    made, trust = folder.fresh_model(), recipe.trust_remote_code
    with open_tensors(trained.final) as values:
        if recipe.lora is not None:  # the whole model is in memory, as in the training
            model = load_whole(source.folder, torch.device("cpu"), trust_remote_code=trust)
            values = dict(merged(recipe, model, masks, values).named_parameters())
        write_trained(source.folder, values, made, progress, trust_remote_code=trust)
    carry_over(source.folder, made, read_configuration(source.folder), same_weights=False)
    audit = audit_checkpoint(made, trust_remote_code=recipe.trust_remote_code, progress=progress)
    result = {**training.result, "decoder_sparsity": audit.sparsity}
    training = training.model_copy(update={"result": result})
    trainings = folder.notes / TRAININGS
    before = json.loads(trainings.read_text(encoding="utf-8")) if trainings.is_file() else []
    write_json(trainings, [*before, training.to_json()])
    shutil.copyfile(trained.log, folder.notes / "training.jsonl")
    write_text(folder.notes / "training.yaml", dump_recipe(recipe))
    place = recipe.output or folder.output
    card = training_card(training, run.again(recipe), source.folder, place)
    write_text(made / "README.md", card)
