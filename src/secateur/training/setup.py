"""Makes from the recipe of a training its plan, memory, masks, loss, teacher and parameters.

weights     all weights learn, the masks stay                       the default
lora        adapters learn, with the masks in their products; they are merged at the end
gradual     the masks lose weights every few steps
iterative   the masks lose weights in rounds, with a training after each

A training that would not fit is refused. Its memory:

    all weights in float32
    + for trained parameters: gradients, and the state of the optimizer
    + the products of adapters
    + activations of one micro-batch's forward for its backward, rehearsed on the meta device
    + a block of logits; the teacher; the masks

Several processes share weights, gradients, optimizer state, masks, and the teacher's layers.
Gathered parts count separately. The student needs two decoder layers, because the next one is
fetched while one runs, and the gradients of one; or its embeddings or head with their gradients, if
these are larger. The teacher needs one layer, its embeddings and its head.

The disk holds at the same time: the state for a resumed run, the best weights, a new version of one
of these or the final weights, and the result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocator import LOGITS_BYTES
from secateur.engine.plan import (
    Need,
    Phase,
    Plan,
    calls_of,
    memory_budget,
    rehearse_training,
    weights_of,
)
from secateur.engine.prune.tasks import refuse_idle_globs
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import RecipeError
from secateur.models.architecture import describe, hidden_size
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton, parameters_of, quiet_transformers
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import refuse_other_words
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.train import GradualOptions, IterativeOptions, TrainRecipe
from secateur.runs.environment import resident_bytes
from secateur.runs.folder import NOTES
from secateur.runs.records import Manifest, StepEntry, read_list, read_record
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import Schedule, schedules
from secateur.sparsity.scores import scores
from secateur.training.batches import TrainingText, read_training_text, windows_digest
from secateur.training.lora import ADAPTERS_ALONE, attach, chosen_linears, merge
from secateur.training.masks import Masks, masks_in, matrices, moments
from secateur.training.objectives import (
    TOP_K,
    Distil,
    ModelTeacher,
    NextToken,
    Objective,
    WrittenTeacher,
    write_teacher,
)
from secateur.training.process_group import ProcessGroup, load
from secateur.training.pruning import (
    Criterion,
    Gradual,
    GradualPruning,
    PruningRounds,
    open_masks,
    prunable,
)
from secateur.training.saved import Hook
from secateur.training.training_plan import TrainingPlan
from secateur.types import Windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingInputs:
    """The recipe of a training with its model and its texts. No weights are read.

    Attributes:
        recipe: the recipe.
        source: the checkpoint of the model.
        target: the model, with its layers on the meta device.
        text: training windows and validation windows.
        processes: the processes.
    """

    recipe: TrainRecipe
    source: LocalCheckpoint
    target: CheckpointTarget
    text: TrainingText
    processes: ProcessGroup

    @classmethod
    def read(
        cls,
        recipe: TrainRecipe,
        source: LocalCheckpoint,
        processes: ProcessGroup,
        progress: Progress,
    ) -> TrainingInputs:
        """Open the model, and read the texts."""
        target = CheckpointTarget(
            CheckpointReader(source.folder),
            None,
            processes.device,
            trust_remote_code=recipe.trust_remote_code,
        )
        progress.start("reading training text", 1)
        text = read_training_text(recipe, source.folder, target.model.config)
        progress.finish()
        return cls(recipe, source, target, text, processes)

    def plan(self) -> TrainingPlan:
        """Return length, learning rate and optimizer of a training.

        Raises:
            RecipeError: the recipe has both steps and minutes, or a number is out of range.
        """
        recipe = self.recipe
        steps = recipe.steps or 0
        if not recipe.steps and not recipe.minutes:
            steps = max(1, round(recipe.epochs * len(self.text.windows) / recipe.batch))
        same = TrainingPlan.model_fields.keys() & TrainRecipe.model_fields.keys()
        options = {name: getattr(recipe, name) for name in same} | {
            "rates": self._rates(),
            "steps": steps,
            "minutes": recipe.minutes or 0.0,
            "micro_batch": recipe.micro_batch_windows,
        }
        return TrainingPlan(**options)

    def _rates(self) -> Mapping[str, float]:
        """Return factors of the learning rate by globs of parameters. The last match counts."""
        recipe, model = self.recipe, self.target.model
        names = [name for name, _ in model.named_parameters()]
        refuse_idle_globs(recipe.rates, names, "parameter")
        if recipe.lora is None:
            return {**_layer_rates(model, recipe.layer_decay), **recipe.rates}
        if recipe.rates or recipe.layer_decay != 1:
            raise RecipeError(
                "with adapters nothing else is trained, so --rates and --layer-decay change "
                "nothing",
                remedy="leave them out; --lora-targets and --lora-exclude choose the linear layers",
            )
        return ADAPTERS_ALONE

    def masks(self, model: Any) -> Masks:
        """Return the masks of the recipe; without them, the zeros of the model.

        Args:
            model: the model with its initial weights; it may be sharded.

        Raises:
            RecipeError: the masks belong to another model, hold no zeros, or would free weights
                that are zero in the model.
            SourceError: the file holds no masks.
        """
        recipe = self.recipe
        if recipe.mask is None:
            return Masks.of(model)
        prunes = recipe.gradual is not None or recipe.iterative is not None
        return masks_in(
            Path(recipe.mask),
            model,
            trust_remote_code=recipe.trust_remote_code,
            regrows=recipe.regrow or prunes,  # pruning keeps the zeros itself
            sums=self.processes.sums,
        )

    def teacher(self, work: Path | None) -> LocalCheckpoint | None:
        """Return the checkpoint of the teacher; None without a teacher, or if its file exists.

        Args:
            work: folder of a run, which may have that file; None if there is no run.

        Raises:
            RecipeError: the teacher is unknown, or its token ids mean other words.
        """
        recipe = self.recipe
        if recipe.teacher is None:
            return None
        stored = recipe.teacher_file or (work is not None and recipe.top_k)
        if stored and self._teacher_file(work or Path()).exists():
            return None
        trust = recipe.trust_remote_code
        teacher = resolve(recipe.teacher, trust_remote_code=trust)
        refuse_other_words(self.source.folder, teacher.folder, trust_remote_code=trust)
        return teacher

    def objective(
        self, checkpoint: LocalCheckpoint | None, model: Any, work: Path, progress: Progress
    ) -> Objective:
        """Return the loss. With a teacher this loads the teacher, or the file of its predictions.

        Args:
            checkpoint: the teacher's; None without a teacher, or if a file has its predictions.
            model: the student.
            work: folder for the file of the teacher's predictions.
            progress: receives every window of that file.

        Raises:
            RecipeError: the teacher has another vocabulary, or its file belongs to another text.
        """
        recipe, text, processes = self.recipe, self.text, self.processes
        if recipe.teacher is None:
            return NextToken.of(model)
        options: dict[str, Any] = {
            "kind": recipe.kind,
            "temperature": recipe.temperature,
            "next_token": recipe.next_token,
        }
        file = self._teacher_file(work)
        if checkpoint is None:
            return Distil.between(model, self._stored_teacher(file), **options)
        teacher = load(
            checkpoint.folder,
            processes,
            dtype=fast_dtype(processes.device),
            apart=False,  # the loss applies its head after its forward
            trust_remote_code=recipe.trust_remote_code,
        )
        objective = Distil.between(
            model,
            ModelTeacher(teacher),
            teacher_depth=len(describe(teacher).layers(teacher)),
            teacher_layers=self._teacher_layers(checkpoint.name),
            hidden=recipe.hidden_weight,
            **options,
        )
        if not recipe.top_k and not recipe.teacher_file:
            return objective
        progress.start("teacher", len(text.windows))
        with quiet_transformers():
            write_teacher(
                ModelTeacher(teacher),
                text.windows,
                file,
                k=recipe.top_k or TOP_K,
                device=processes.device,
                temperature=recipe.temperature,
                name=checkpoint.name,
                on_window=progress.step,
                writes=processes.first,
            )
        progress.finish()
        processes.wait()
        return Distil.between(
            model, self._stored_teacher(file), hidden=recipe.hidden_weight, **options
        )

    def _teacher_file(self, work: Path) -> Path:
        """The file of a teacher's predictions."""
        file = self.recipe.teacher_file
        return Path(file) if file else work / "teacher.safetensors"

    def _stored_teacher(self, file: Path) -> WrittenTeacher:
        """Return the teacher's stored predictions for this text."""
        teacher = WrittenTeacher(file)
        if teacher.record["windows"] != windows_digest(self.text.windows):
            raise RecipeError(
                "the teacher was written down for other windows",
                where=str(file),
                remedy="take the same text, windows, sequence length and seed, or another file",
            )
        return teacher

    def _teacher_layers(self, teacher: str) -> tuple[int, ...] | None:
        """Return the teacher's layers that the student has: from the recipe, or notes of its cut.

        None if they are unknown, or if the teacher is not the model that was cut.
        """
        recipe = self.recipe
        steps, manifest = (
            self.source.folder / NOTES / name for name in ("steps.json", "manifest.json")
        )
        if recipe.teacher_layers is not None or not recipe.hidden_weight or not steps.is_file():
            return recipe.teacher_layers
        if not manifest.is_file() or teacher != read_record(Manifest, manifest).source.name:
            return None
        depth = [x.cut for x in read_list(StepEntry, steps) if x.step == "depth" and x.cut]
        return tuple(depth[0]["layers"]) if depth else None


@dataclass(frozen=True)
class Adapted:
    """A model that is ready for the loop.

    Attributes:
        model: what the loop trains.
        held: the masks that it holds; None if adapters hold them.
        masks: the zeros of the result.
        hooks: work after every step.
        rounds: rounds of iterative pruning; None for one training.
        opened: the masks that gradual or iterative pruning changes, by parameter.
    """

    model: Any
    held: Masks | None
    masks: Masks
    hooks: tuple[Hook, ...] = ()
    rounds: PruningRounds | None = None
    opened: Mapping[str, Tensor] = field(default_factory=dict)


def adapt(recipe: TrainRecipe, model: Any, masks: Masks, windows: Windows) -> Adapted:
    """Prepare a model for the training of a recipe, in place.

    Args:
        recipe: recipe of a training.
        model: the model with its initial weights.
        masks: the current zeros.
        windows: training windows, for scores that need text.

    Raises:
        RecipeError: adapters or gradual pruning cannot run.
    """
    if recipe.lora is None and recipe.gradual is None and recipe.iterative is None:
        return Adapted(model, masks, masks)
    masks = masks.held_in(model)
    masks.apply(model)
    if recipe.lora is not None:
        return Adapted(attach(model, recipe.lora, recipe.seed).get_base_model(), None, masks)
    opened = open_masks(model)
    # Zeros elsewhere (experts that are stored in one tensor) stay unchanged.
    held = Masks({**Masks.of(model).kept, **opened})
    sparsity = Masks(opened).sparsity
    hooks: tuple[Hook, ...] = ()
    rounds = None
    if recipe.gradual is not None:
        gradual = _pruning(recipe.gradual, sparsity, windows, "gradual")
        hooks = (GradualPruning(opened, Gradual(*gradual, recipe.gradual)),)
    if recipe.iterative is not None:
        how = recipe.iterative
        schedule, criterion = _pruning(how, sparsity, windows, "iterative")
        rounds = PruningRounds(schedule, how.rounds, criterion, how.rewind, how.rewind_step)
    return Adapted(model, held, held, hooks, rounds, opened)


def _layer_rates(model: Any, decay: float) -> dict[str, float]:
    """Layer-wise learning rates.

        layer i of L        decay^(L − 1 − i)
        input embeddings    decay^L, also where the output head is tied to them
        all else            1

    Paper: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
    arXiv:1801.06146, which divides by 2.6 from layer to layer (decay 0.38).
    """
    if decay == 1:
        return {}
    architecture = describe(model)
    layers = len(architecture.layers(model))
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    rates = {n: decay**layers for n, p in model.named_parameters() if id(p) in embeddings}
    for index in range(layers):
        rates[f"{architecture.layer_name(index)}.*"] = decay ** (layers - 1 - index)
    return rates


def _pruning(
    how: GradualOptions | IterativeOptions, sparsity: float, windows: Windows, kind: str
) -> tuple[Schedule, Criterion]:
    """Return the schedule of the sparsity, and the rule that chooses weights."""
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
    schedule: Any = schedules[how.schedule]
    return schedule(last, sparsity), Criterion(scores[how.score](), pattern, windows[: how.windows])


def merged(recipe: TrainRecipe, model: Any, masks: Masks, trained: Mapping[str, Tensor]) -> Any:
    """Return the final model, made from the initial model and the trained parameters.

    Args:
        recipe: recipe of the training.
        model: the model with its initial weights; it is changed in place.
        masks: the zeros of the result.
        trained: trained parameters by name; the adapters' parameters if there are adapters.
    """
    adapted = None
    if recipe.lora is not None:
        masks.apply(model)
        adapted = attach(model, recipe.lora)
        model = adapted.get_base_model()
    for name, value in trained.items():
        model.get_parameter(name).data.copy_(value)
    return model if adapted is None else merge(adapted)


LESS_FORWARD = (
    "use --gradient-checkpointing, --micro-batch-windows 1 or a shorter --sequence-length"
)
LESS_TEACHER = "use --top-k 64 (the teacher is written down first)"
TRAINING = Phase("training")
READING = Phase("reading the weights", on_host=True)
READING_TEACHER = Phase("reading the teacher", on_host=True)
HOST = READING, READING_TEACHER


@dataclass(frozen=True)
class PlannedTraining:
    """What is known of a training before the weights are read.

    Attributes:
        plan: its length, learning rate and optimizer.
        teacher: the checkpoint of the teacher; None without one, or if a file has its predictions.
        needs: memory, and what it writes at most.
    """

    plan: TrainingPlan
    teacher: LocalCheckpoint | None
    needs: Plan


def plan_of(inputs: TrainingInputs, work: Path | None) -> PlannedTraining:
    """Check everything of a training that needs no weights."""
    recipe, target, text = inputs.recipe, inputs.target, inputs.text
    given = [name for name in ("gradual", "iterative", "lora") if getattr(recipe, name) is not None]
    if given and inputs.processes.count > 1:
        raise RecipeError(
            f"{given[0]} needs a single process",
            remedy="start the command without torchrun or accelerate launch",
        )
    plan, teacher = inputs.plan(), inputs.teacher(work)
    needs = training_memory(recipe, target, teacher, text, plan, inputs.processes)
    check_memory(needs, recipe.memory.max_bytes, inputs.processes.device)
    needs = replace(needs, disk_bytes=_disk_bytes(recipe, target, text, plan))
    return PlannedTraining(plan, teacher, needs)


def training_memory(
    recipe: TrainRecipe,
    target: CheckpointTarget,
    teacher: LocalCheckpoint | None,
    text: TrainingText,
    plan: TrainingPlan,
    processes: ProcessGroup,
) -> Plan:
    """Plan the memory of a training in one process.

    Args:
        recipe: recipe of the training.
        target: the student, with its layers on the meta device.
        teacher: checkpoint of a teacher that is loaded; None for none.
        text: the training text.
        plan: length and optimizer.
        processes: the processes.
    """
    model, trust = target.model, recipe.trust_remote_code
    weights, trained = _counted(recipe, target, plan)
    adapted = () if recipe.lora is None else chosen_linears(model, recipe.lora)
    ranks = processes.count
    together = min(plan.at_once(text.windows.shape[1]), recipe.batch // ranks or 1)
    micro = text.windows[:together]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = max(weights_of(module) for module in ends if module is not None)
    sizes = {
        "process": resident_bytes(),
        "weights": 4 * (weights + trained * (recipe.lora is not None)) // ranks,
        "gathered": 4 * max(3 * max(map(weights_of, target.layers)), 2 * outside) * (ranks > 1),
        "optimizer": 4 * trained * (1 + _moments_of(plan)) // ranks,
        "adapters": sum(4 * math.prod(linear.shape) for linear in adapted),
        "forward": _forward_bytes(target, micro, plan, processes.device),
        "logits": (1 + (teacher is not None))
        * (LOGITS_BYTES + 4 * micro.numel() * hidden_size(model)),
        "teacher": 0 if teacher is None else _teacher_bytes(teacher, processes, trust),
        "masks": sum(math.prod(p.shape) for p in matrices(model).values()) // ranks,
    }
    on_gpu = processes.device.type == "cuda"
    return Plan(training_needs(sizes, on_gpu), on_gpu)


def training_needs(sizes: Mapping[str, int], on_gpu: bool) -> tuple[Need, ...]:
    """The needs of a training: what each size is for, and when it is there.

    Args:
        sizes: bytes by the name of the need.
        on_gpu: whether a GPU computes.
    """
    here = (TRAINING,)
    table: Mapping[str, tuple[tuple[Phase, ...], str, str]] = {
        "process": (HOST if on_gpu else here, "the program itself, with text", ""),
        "weights": ((*here, READING), "weights", ""),
        "gathered": (here, "gathered weights", ""),
        "optimizer": (here, "optimizer", "use --lora 16 or --optimizer SGD"),
        "adapters": (here, "products of adapters", ""),
        "forward": (here, "forward", LESS_FORWARD),
        "logits": (here, "logits", ""),
        "teacher": ((*here, READING_TEACHER), "teacher", LESS_TEACHER),
        "masks": (here, "masks", ""),
    }
    return tuple(Need(name, sizes[name], *row) for name, row in table.items())


def _counted(recipe: TrainRecipe, target: CheckpointTarget, plan: TrainingPlan) -> tuple[int, int]:
    """The weights of the student, tied ones once, and those that are trained."""
    named = {name: p.numel() for name, p in parameters_of(target.model).items()}
    trained = sum(count for name, count in named.items() if plan.factor(name))
    if recipe.lora is not None:
        chosen = chosen_linears(target.model, recipe.lora)
        trained = sum(recipe.lora.rank * sum(linear.shape) for linear in chosen)
    return sum(named.values()), trained


def _forward_bytes(
    target: CheckpointTarget, windows: Tensor, plan: TrainingPlan, device: torch.device
) -> int:
    """The activations that the decoder layers keep for one micro-batch until their backward.

    With checkpointing, each layer keeps its input, and one layer at a time keeps everything inside.
    """
    hidden, calls = calls_of(target, windows)
    layers = len(target.layers)
    written_out = plan.writes_out(device, windows.shape[1])
    one = rehearse_training(target.layers[0], hidden, calls[0], written_out=written_out)
    return one + layers * 4 * hidden.numel() if plan.gradient_checkpointing else layers * one


def _moments_of(plan: TrainingPlan) -> int:
    """The number of weight-sized tensors in the optimizer's state, measured with one weight."""
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = plan.make_optimizer([("weight", weight)])
    optimizer.step()
    return len(list(moments(optimizer, weight)))


def _teacher_bytes(teacher: LocalCheckpoint, processes: ProcessGroup, trust: bool) -> int:
    """The size of a teacher's weights in one process.

    Each of several processes has a part of the decoder layers, one whole layer, and everything
    outside the layers.
    """
    model = build_skeleton(teacher.folder, trust_remote_code=trust)
    dtype, stored = fast_dtype(processes.device) or model.dtype, CheckpointReader(teacher.folder)
    weights = sum(math.prod(entry.shape) for entry in stored.entries.values())
    if processes.count > 1:
        layers = describe(model).layers(model)
        within = weights_of(layers)
        weights += 2 * max(map(weights_of, layers)) - (within - within // processes.count)
    return dtype.itemsize * weights


def _disk_bytes(
    recipe: TrainRecipe, target: CheckpointTarget, text: TrainingText, plan: TrainingPlan
) -> int:
    """The maximum disk use of a training. Each new file is written next to the old one."""
    weights, trained = _counted(recipe, target, plan)
    final = 4 * trained
    state = final * (1 + _moments_of(plan))
    masks = sum(x.weight.numel() for x in prunable(target.model))
    if recipe.gradual is not None:
        state += masks
    rounds = 0
    if recipe.iterative is not None:
        # The float32 weights and the masks of the last round and of this one. Rewinding weights
        # adds the early weights and the weights of the first training.
        copies = 4 if recipe.iterative.rewind == "weights" else 2
        rounds = 4 * weights * copies + 2 * masks
    best = final * (text.validation is not None)
    predictions = 0
    if recipe.teacher is not None and (recipe.top_k or recipe.teacher_file):
        predictions = text.windows.numel() * (6 * (recipe.top_k or TOP_K) + 4)
    result = target.reader.total_bytes
    return state + best + predictions + rounds + max(state, best, final + result)


def check_memory(needed: Plan, max_memory: int | None, device: torch.device) -> None:
    """Refuse a training that would not fit.

    Args:
        needed: the plan of the training.
        max_memory: bytes; see `memory_budget`.
        device: the computing device.

    Raises:
        MemoryBudgetError: the training needs more than there is; the message gives both numbers and
            remedies.
    """
    budget = memory_budget(max_memory, device)
    shortage = budget.shortage(needed)
    if shortage is not None:
        raise budget.refusal(needed, f"training needs {shortage}")
