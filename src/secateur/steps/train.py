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
from pathlib import Path
from typing import Any

import torch

from secateur.diagnostics.audit import audit_checkpoint
from secateur.machine import fast_dtype
from secateur.models.configuration import read_configuration
from secateur.models.opening import load_whole, refuse_quantized
from secateur.parallel.launched import Launched
from secateur.parallel.ranks import Ranks, refuse_another_disk
from secateur.progress import Progress, Silent
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.train import IterativeOptions, TrainRecipe
from secateur.reporting.cards import training_card
from secateur.reporting.models import TrainResult
from secateur.reporting.plan import TrainPlanResult
from secateur.runs.environment import Meter, choose_device, environment
from secateur.runs.folder import NOTES, check_output
from secateur.runs.output import write_json, write_text
from secateur.runs.records import Cost, Training, read_list
from secateur.sparsity.patterns import parse_pattern
from secateur.steps.runner import RunContext, Step, identity_of, source_of
from secateur.training import gradual, lora, saved
from secateur.training.loop import Outcome
from secateur.training.masks import Masks
from secateur.training.process_group import ProcessGroup, load
from secateur.training.setup import TrainingSetup
from secateur.training.training_plan import TrainingPlan, optimizers, shared_batch

NO_PART = {"output", "device", "save_minutes", "learning_rate", "memory"}
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
    setup = TrainingSetup(recipe, source, processes, progress)
    places = () if setup.teacher is None else (setup.teacher.folder,)
    read = recipe.model, source.folder, recipe.mask, recipe.validation_text, *recipe.text, *places
    check_output(recipe.output, "train", setup.needs.disk_bytes, read, call)
    record, plan = setup.text, setup.plan
    return TrainPlanResult(
        objective=_objective_text(recipe),
        text=record["source"],
        windows=record["windows"],
        sequence_length=record["sequence_length"],
        validation_windows=record["validation_windows"],
        steps=plan.steps or None,
        minutes=plan.minutes or None,
        tokens=plan.steps * setup.batches.size * record["sequence_length"] or None,
        memory=setup.memory,
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
        _read_trainings(run.source.folder / NOTES)  # damage is found before the work
        group = ProcessGroup.of(run.ranks, choose_device(recipe.device))
        self.setup = TrainingSetup(recipe, run.source, group, run.progress)
        work = run.folder.work
        # best weights alone are nothing to resume from: the moments are in the saved state
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
        shared_batch(recipe.batch, Launched.read(os.environ).count)
        how = recipe.gradual or recipe.iterative
        if how is not None:
            gradual.check_parts(how)

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
        setup = self.setup
        return {
            **identity_of(setup.recipe, NO_PART, setup.target.reader.files, self.run.progress),
            "tokens": setup.text["sha256"],
            "answer_tokens": setup.text.get("answer_tokens"),
        }

    def settled(self) -> dict[str, Any]:
        """The learning rate, which a stopped training may lower."""
        return {"learning_rate": self.recipe.learning_rate}

    def work(self) -> TrainResult:
        """Train, write the model, and read its zeros again."""
        setup, folder, ranks = self.setup, self.run.folder, self.setup.processes
        if setup.teacher is not None:
            folder.keep_apart(setup.teacher.folder)
        # the others build the same setup from the recipe
        places = {"work": str(folder.work), "model": str(folder.model)}
        ranks.once(lambda: {**places, "on_host": ranks.on_host})
        with ranks.connected():
            outcome, masks = _train(setup, folder.work, self.run.progress)
            _write(self.run, setup, masks, outcome)
            last = _checked_together(setup, folder.model, masks)
        return TrainResult(output=self.run.place, manifest=last)

    @classmethod
    def share(cls, recipe: TrainRecipe, ranks: Ranks) -> TrainResult | None:
        """Train with the first process, which alone writes. All return the result."""
        source = source_of(recipe, Silent(), ranks)
        job = ranks.once(lambda: None)
        output = Path(os.path.abspath(recipe.output or ""))
        if job is None:  # an earlier run has finished everything
            return cls.result(output)
        work, model, silent = Path(job["work"]), Path(job["model"]), Silent()
        if not work.is_dir():
            refuse_another_disk(ranks.rank, work)
        group = ProcessGroup.of(ranks, choose_device(recipe.device))
        setup = TrainingSetup(recipe, source, group, silent, on_host=job["on_host"])
        with setup.processes.connected():
            _, masks = _train(setup, work, silent)
            last = _checked_together(setup, model, masks)
        return TrainResult(output=output, manifest=last)

    @classmethod
    def result(cls, output: Path) -> TrainResult:
        """Read the result of a finished training from its notes."""
        return TrainResult(output=output, manifest=_read_trainings(output / NOTES)[-1])


def _train(setup: TrainingSetup, work: Path, progress: Progress) -> tuple[Outcome, Masks]:
    """Train with all processes; see `TrainingSetup.train`. Only the first one writes."""
    recipe, ranks = setup.recipe, setup.processes
    # Weights are not rounded between the rounds of iterative pruning. Several processes divide
    # the model while they load it, so it is in float32 from the beginning.
    dtype = torch.float32 if ranks.divides or recipe.iterative is not None else None
    model = load(
        setup.source.folder,
        ranks,
        dtype=dtype,
        gathered=fast_dtype(ranks.device) if recipe.fast_matmuls else None,
    )
    return setup.train(model, work, progress)


def _checked_together(setup: TrainingSetup, model: Path, masks: Masks) -> Training:
    """Check the written zeros, and read the record. Every process has a part of the masks."""
    setup.processes.wait()  # the first one may still write
    saved.check_written(model, masks)
    last = _read_trainings(model / NOTES)[-1]
    setup.processes.wait()  # before the first one gives the folder another name
    return last


def _read_trainings(notes: Path) -> list[Training]:
    """The records of all trainings of a model; none if it was never trained.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = notes / TRAININGS
    return read_list(Training, file) if file.is_file() else []


def _record(setup: TrainingSetup, outcome: Outcome, meter: Meter) -> Training:
    """The record of a finished training."""
    recipe = setup.recipe
    validations = [[step, math.exp(loss)] for step, loss in outcome.validations]
    facts, apart = outcome.facts(), ("validations", "best_kept", "learning_rate")
    return Training(
        source=setup.source.record,
        objective=_objective_text(recipe),
        text=setup.text,
        learning_rate=outcome.learning_rate,
        optimizer=optimizers()[recipe.optimizer.lower()].__name__,
        processes=setup.processes.count,
        recipe=recipe.model_dump(mode="json"),
        environment=environment(setup.processes.device),
        planned=setup.memory,
        cost=Cost.model_validate({**meter.read(), "training_seconds": outcome.seconds}),
        result={
            **{name: value for name, value in facts.items() if name not in apart},
            "perplexities": validations,
            "perplexity_before": validations[0][1] if validations else None,
            "perplexity_after": math.exp(outcome.best_loss) if validations else None,
            "rounds": outcome.rounds,
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


def _write(run: RunContext, setup: TrainingSetup, masks: Masks, outcome: Outcome) -> None:
    """Write the model and its notes."""
    recipe, source, folder, place = setup.recipe, setup.source.folder, run.folder, outcome.folder
    assert place is not None
    training = _record(setup, outcome, run.meter)
    made = folder.fresh_model()
    with saved.open_tensors(place / "final.safetensors") as values:
        if recipe.lora is not None:  # the whole model is in memory, as in the training
            model = load_whole(source, torch.device("cpu"))
            masks.apply(model)  # an adapter takes the zeros of the weight as its mask
            adapted = lora.attach(model, recipe.lora)
            for name, value in values.items():
                adapted.get_base_model().get_parameter(name).data.copy_(value)
            values = dict(lora.merge(adapted).named_parameters())
        saved.write_trained(source, values, made, run.progress)
    run.carry_over(read_configuration(source), same_weights=False)
    audit = audit_checkpoint(made, progress=run.progress)
    result = {**training.result, "decoder_sparsity": audit.sparsity}
    training = training.model_copy(update={"result": result})
    # `carry_over` has copied the notes of the source, so earlier trainings are in the list
    trainings = [x.to_json() for x in (*_read_trainings(folder.notes), training)]
    write_json(folder.notes / TRAININGS, trainings)
    shutil.copyfile(place / "log.jsonl", folder.notes / "training.jsonl")
    write_text(folder.notes / "training.yaml", dump_recipe(recipe))
    card = training_card(training, run.again(recipe), source, recipe.output or folder.output)
    write_text(made / "README.md", card)
