"""Prepares a training: first everything that needs no weights, then what is learned.

`TrainingSetup` reads the texts and checks plan, teacher, memory and disk. `TrainingSetup.train`
receives the model, puts masks, adapters or pruning on it, makes the loss, and runs the loop.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from secateur.engine.plan import fitting, memory_budget
from secateur.engine.prune.tasks import refuse_idle_globs
from secateur.errors import RecipeError
from secateur.machine import fast_dtype
from secateur.models import architecture, skeleton, tokenizer
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import trusted_folder
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.targets import CheckpointTarget
from secateur.progress import Progress
from secateur.recipes.train import IterativeOptions, TrainRecipe
from secateur.runs.folder import NOTES
from secateur.runs.records import Manifest, StepEntry, read_list, read_record
from secateur.training import gradual, lora, masks, objectives
from secateur.training.batches import Batches, read_training_text
from secateur.training.loop import Loop, Outcome, TrainingTask
from secateur.training.masks import Masks
from secateur.training.memory import plan_needs
from secateur.training.process_group import ProcessGroup, load
from secateur.training.saved import Hook
from secateur.training.training_plan import NEED_ALL, TrainingPlan, shared_batch


class TrainingSetup:
    """A training of which everything is known that needs no weights.

    Args:
        recipe: the recipe.
        source: the checkpoint of the model.
        processes: the processes.
        progress: receives the reading of the text.
        on_host: whether what learns is on the host; None takes what fits.

    Attributes:
        processes: the processes, with what learns in its place.
        target: the model, with its layers on the meta device.
        batches: training windows.
        validation: validation windows; None without any.
        text: the source of both, for the records.
        plan: length, learning rate and optimizer.
        teacher: the checkpoint of the teacher; None without one.
        needs: memory, and what it writes at most.

    Raises:
        RecipeError: options contradict each other, or the teacher means other words.
        MemoryBudgetError: the training would not fit.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        source: LocalCheckpoint,
        processes: ProcessGroup,
        progress: Progress,
        on_host: bool | None = None,
    ) -> None:
        batch = shared_batch(recipe.batch, processes.count)
        recipe = recipe.model_copy(update={"batch": batch})
        self.recipe, self.source = recipe, source
        alone = [x for x in ("gradual", "iterative", "lora") if getattr(recipe, x) is not None]
        alone += {recipe.optimizer.lower()} & NEED_ALL
        if alone and processes.count > 1:
            raise RecipeError(
                f"{alone[0]} needs a single process",
                remedy="start the command without torchrun or accelerate launch",
            )
        reader = CheckpointReader(source.folder)
        self.target = CheckpointTarget(reader, None, processes.device)
        progress.start("reading training text", 1)
        config = self.target.model.config
        self.batches, self.validation, self.text = read_training_text(
            recipe, source.folder, config, batch
        )
        progress.finish()
        self.plan = _plan_of(recipe, self.target.model, self.batches)
        self.teacher = None
        if recipe.teacher is not None:
            self.teacher = resolve(recipe.teacher, trust_remote_code=recipe.trust_remote_code)
            tokenizer.refuse_other_words(source.folder, self.teacher.folder)
        ways = {processes.holding(bool(on_host)): "{}"}
        if on_host is None and processes.device.type == "cuda" and not alone:
            ways[processes.holding(True)] = "or {}, with weights and optimizer on the host"
        known = recipe, self.target, self.teacher, self.batches, self.plan
        planned = partial(plan_needs, *known, validates=self.validation is not None)
        budget = memory_budget(recipe.memory.max_bytes, processes.device, processes.here)
        self.needs, self.processes = fitting(planned, ways, budget, "training needs ")

    @property
    def memory(self) -> dict[str, Any]:
        """The figures of the plan, and whether what learns is on the host."""
        return {**self.needs.to_json(), "on_host": self.processes.on_host}

    def train(self, model: Any, work: Path, progress: Progress) -> tuple[Outcome, Masks]:
        """Train a model in place. A call after a kill resumes.

        Args:
            model: the model with its initial weights; it may be sharded.
            work: folder of what a resumed training needs.
            progress: receives every step.

        Returns:
            The outcome, and the zeros of the result.

        Raises:
            RecipeError: the masks do not fit, or adapters or gradual pruning cannot run.
            SourceError: the file of masks holds none.
            NumericalError: the training diverged.
        """
        recipe = self.recipe
        zeros, hooks = self._masks_of(model), list[Hook]()
        held, rounds_of = zeros, None
        if recipe.lora is not None:
            zeros = zeros.held_in(model)
            zeros.apply(model)
            # peft's adapters hold the zeros in their products, so the loop holds none
            model = lora.attach(model, recipe.lora, recipe.seed).get_base_model()
            held = Masks({})
        elif how := recipe.gradual or recipe.iterative:
            zeros.held_in(model).apply(model)
            opened = masks.open_masks(model)
            # Zeros elsewhere (experts that are stored in one tensor) stay unchanged. The pruning
            # changes the tensors of `opened` in place, and the loop holds the same tensors.
            held = zeros = Masks({**Masks.of(model).kept, **opened})
            windows = self.batches.windows
            pruning = opened, *gradual.pruning_of(how, Masks(opened).sparsity, windows)
            if isinstance(how, IterativeOptions):
                rounds_of = partial(gradual.Rounds, *pruning, how, work / "rounds")
            else:
                hooks.append(gradual.GradualPruning(*pruning, how))
        objective = self.objective(model, work, progress)
        task = TrainingTask(model, self.batches, objective, held, self.validation, hooks)
        make_loop = partial(Loop, progress=progress, processes=self.processes)
        if rounds_of is None:
            return make_loop(task, self.plan, saved=work).run(), zeros
        return rounds_of(task).train(make_loop, self.plan), zeros

    def _masks_of(self, model: Any) -> Masks:
        """Return the masks of the recipe for a model, or those of its own zeros."""
        recipe = self.recipe
        if recipe.mask is None:
            return Masks.of(model)
        return masks.masks_in(
            trusted_folder(recipe.mask, recipe.trust_remote_code),
            model,
            regrows=bool(recipe.gradual or recipe.iterative),  # pruning keeps the zeros itself
            sums=self.processes.sums,
        )

    def objective(self, model: Any, work: Path, progress: Progress) -> objectives.Objective:
        """Return the loss. With a teacher this loads the teacher, or the file of its predictions.

        Args:
            model: the student.
            work: folder for the file of the teacher's predictions.
            progress: receives every window of that file.

        Raises:
            RecipeError: the teacher has another vocabulary.
        """
        recipe, processes, windows = self.recipe, self.processes, self.batches.windows
        if self.teacher is None:
            return objectives.next_token(model)
        file, depth = work / "teacher.safetensors", 0
        if not (recipe.top_k and file.exists()):
            dtype = fast_dtype(processes.device)
            loaded = load(self.teacher.folder, processes, dtype=dtype, learns=False)
            teacher: objectives.Teacher = objectives.ModelTeacher(loaded)
            depth = len(architecture.describe(loaded).layers(loaded))
        if recipe.top_k and not file.exists():
            progress.start("teacher", len(windows))
            with skeleton.quiet_transformers():
                objectives.write_teacher(
                    teacher,
                    windows,
                    file,
                    k=recipe.top_k,
                    device=processes.device,
                    temperature=recipe.temperature,
                    on_window=progress.step,
                    writes=processes.first,
                )
            progress.finish()
            processes.wait()
        if recipe.top_k:  # the model that wrote the file is freed here, before the student trains
            teacher = objectives.WrittenTeacher(file)
        return objectives.Distil.between(
            model,
            teacher,
            teacher_depth=depth,
            teacher_layers=self._teacher_layers(self.teacher.record.name),
            hidden=recipe.hidden_weight,
            kind=recipe.kind,
            temperature=recipe.temperature,
            next_token=recipe.next_token,
        )

    def _teacher_layers(self, teacher: str) -> tuple[int, ...] | None:
        """Return the teacher's layers that the student has, from the notes of its cut.

        None if they are unknown, or if the teacher is not the model that was cut.
        """
        steps, manifest = (
            self.source.folder / NOTES / name for name in ("steps.json", "manifest.json")
        )
        if not self.recipe.hidden_weight or not steps.is_file() or not manifest.is_file():
            return None
        if teacher != read_record(Manifest, manifest).source.name:
            return None
        # a model may be cut several times; the first cut counts in the layers of the named source
        depth = [x.cut for x in read_list(StepEntry, steps) if x.step == "depth" and x.cut]
        return tuple(depth[0]["layers"]) if depth else None


def _plan_of(recipe: TrainRecipe, model: Any, batches: Batches) -> TrainingPlan:
    """Return length, learning rate and optimizer of a training.

    Raises:
        RecipeError: a glob matches no parameter, or there are rates beside adapters.
    """
    refuse_idle_globs(recipe.rates, [name for name, _ in model.named_parameters()], "parameter")
    if recipe.lora is not None and recipe.rates:
        raise RecipeError(
            "with adapters nothing else is trained, so --rates changes nothing",
            remedy="leave it out; --lora-targets and --lora-exclude choose the linear layers",
        )
    steps = recipe.steps or 0
    if not recipe.steps and not recipe.minutes:
        steps = max(1, round(recipe.epochs * len(batches.windows) / batches.size))
    same = TrainingPlan.model_fields.keys() & TrainRecipe.model_fields.keys()
    options = {name: getattr(recipe, name) for name in same} | {
        "rates": recipe.rates if recipe.lora is None else lora.ADAPTERS_ALONE,
        "steps": steps,
        "minutes": recipe.minutes or 0.0,
        "micro_batch": recipe.micro_batch_windows,
    }
    return TrainingPlan(**options)
