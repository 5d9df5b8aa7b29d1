"""Prepares a training: first everything that needs no weights, then what is learned.

`TrainingSetup` reads the texts and checks plan, teacher, memory and disk. `TrainingSetup.train`
receives the model, puts masks, adapters or pruning on it, makes the loss, and runs the loop.

A training that would not fit in memory or on the disk is refused (`plan_needs`):

    all weights in float32
    + for trained parameters: gradients, and the state of the optimizer
    + the matrices in the dtype of their products, or the products of adapters
    + activations of one micro-batch's forward for its backward, rehearsed on the meta device
    + a block of logits, and the head in the dtype of its products; the teacher; the masks

Several processes share weights, gradients, optimizer state, masks, and the teacher's layers.
Gathered parts count separately. The student needs two decoder layers, because the next one is
fetched while one runs, the gradients of one, and those of another in float32, which are being
summed; or its embeddings or head with their gradients, if these are larger. The teacher needs one
layer, its embeddings and its head.

If that is too much for a GPU, its weights, gradients, optimizer state and masks go to the host
(`TrainingSetup`). torch rounds the sizes of pinned memory there up to powers of two.

The disk holds at the same time: the state for a resumed run, the best weights, a new version of one
of these or the final weights, and the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine import plan as memory_plan
from secateur.engine.plan import Need, Phase, Plan, fitting, memory_budget, weights_of
from secateur.engine.prune.tasks import refuse_idle_globs
from secateur.engine.stream.calls import calls_of
from secateur.errors import RecipeError
from secateur.machine import fast_dtype, logits_block
from secateur.models import architecture, skeleton, tokenizer
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import trusted_folder
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.targets import CheckpointTarget
from secateur.progress import Progress
from secateur.recipes.train import IterativeOptions, TrainRecipe
from secateur.runs.environment import resident_bytes
from secateur.runs.folder import NOTES
from secateur.runs.records import Manifest, StepEntry, read_list, read_record
from secateur.training import gradual, lora, masks, objectives
from secateur.training.batches import Batches, read_training_text
from secateur.training.loop import Loop, Outcome, TrainingTask
from secateur.training.masks import Masks
from secateur.training.process_group import ProcessGroup, load, not_rounded
from secateur.training.saved import Hook
from secateur.training.training_plan import NEED_ALL, TrainingPlan, shared_batch

LESS_FORWARD = (
    "use --gradient-checkpointing, --micro-batch-windows 1 or a shorter --sequence-length"
)
TRAINING = Phase("training")
HOLDING = Phase("training, on the host", on_host=True)
READING = Phase("reading the weights", on_host=True)
READING_TEACHER = Phase("reading the teacher", on_host=True)


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


def plan_needs(
    recipe: TrainRecipe,
    target: CheckpointTarget,
    teacher: LocalCheckpoint | None,
    batches: Batches,
    plan: TrainingPlan,
    processes: ProcessGroup,
    *,
    validates: bool = False,
) -> Plan:
    """Plan the memory of a training in one process, and the disk.

    Args:
        recipe: recipe of the training.
        target: the student, with its layers on the meta device.
        teacher: checkpoint of a teacher that is loaded; None for none.
        batches: the training windows, and how many are in a step.
        plan: length and optimizer.
        processes: the processes.
        validates: whether there are validation windows, so that the best weights are kept.
    """
    model, ranks, device = target.model, processes.count, processes.device
    adapted = () if recipe.lora is None else lora.chosen_linears(model, recipe.lora)
    named = {name: p.numel() for name, p in skeleton.parameters_of(model).items()}  # tied ones once
    learned = [count for name, count in named.items() if plan.factor(name)]
    if recipe.lora is not None:
        learned = [recipe.lora.rank * sum(linear.shape) for linear in adapted]
    trained, own = sum(learned), [*named.values(), *(learned if adapted else ())]
    windows = batches.windows
    micro = windows[: min(plan.at_once(windows.shape[1]), batches.size // ranks or 1)]
    rounded = fast_dtype(device) if plan.fast_matmuls else None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = max(weights_of(module) for module in ends if module is not None)
    matrices = sum(math.prod(p.shape) for p in masks.matrices(model).values())
    logits = logits_block(device) + 4 * micro.numel() * architecture.hidden_size(model)
    head = 2 * rounded.itemsize * outside if rounded else 0  # and a product of that size
    taught = 0 if teacher is None else _teacher_bytes(teacher, processes)
    products = sum(4 * math.prod(linear.shape) for linear in adapted)
    # where parameters are divided, autocast has little left to round
    left = sum(map(_plain_weights, target.layers)) if processes.divides else matrices
    copies = rounded.itemsize * left if rounded else 0
    moments = _moments_of(plan)
    on_gpu, here = device.type == "cuda", (TRAINING,)
    on_host = on_gpu and processes.on_host
    there = (HOLDING,) if on_host else here
    state = _float32_bytes(learned, ranks, on_host) + 4 * trained * moments // ranks
    host = (READING, READING_TEACHER, HOLDING) if on_gpu else here
    less_teacher = "use --top-k 64 (the teacher is written down first)"
    less_state = "use --lora 16 or --optimizer SGD"
    needs = (
        Need("process", resident_bytes(), host, "the program itself, with text"),
        Need("weights", _float32_bytes(own, ranks, on_host), (*there, READING), "weights"),
        Need("gathered", _gathered_bytes(target, processes, outside, rounded), here, "gathered"),
        Need("optimizer", state, there, "gradients and optimizer", less_state),
        Need("rounded", copies, here, "rounded weights"),
        Need("adapters", products, here, "products of adapters"),
        Need("forward", _forward_bytes(target, micro, plan, device), here, "forward", LESS_FORWARD),
        Need("logits", (1 + (teacher is not None)) * logits + head, here, "logits"),
        Need("teacher", taught, (*here, READING_TEACHER), "teacher", less_teacher),
        Need("masks", matrices // ranks, there, "masks"),  # bool
    )
    saved = 4 * trained * (1 + moments)  # weights and moments
    return Plan(
        needs,
        on_gpu,
        disk_bytes=_disk_bytes(recipe, target, windows.numel(), trained, saved, validates),
    )


def _float32_bytes(counts: Iterable[int], ranks: int, pinned: bool) -> int:
    """The size of one process's parts of float32 tensors with so many numbers."""
    sizes = (4 * -(-count // ranks) for count in counts)
    return sum(1 << (size - 1).bit_length() if pinned else size for size in sizes)


def _gathered_bytes(
    target: CheckpointTarget, processes: ProcessGroup, outside: int, rounded: torch.dtype | None
) -> int:
    """The most that FSDP2 holds of whole units: weights, and gradients on their way."""
    if not processes.divides:
        return 0
    size, layer = rounded.itemsize if rounded else 4, max(map(weights_of, target.layers))
    plain = max(map(_plain_weights, target.layers))
    # two layers, the gradients of one, and those of another in float32; or one end and its gradient
    units = max(3 * (size * (layer - plain) + 4 * plain) + 4 * layer, 8 * outside)
    # a process's part comes from the host in float32, and its gradient goes there
    return units + processes.on_host * 8 * max(layer, outside) // processes.count


def _plain_weights(layer: nn.Module) -> int:
    """The number of weights in a layer that are gathered in float32 in any case."""
    return min(weights_of(layer), sum(map(weights_of, not_rounded(layer))))


def _forward_bytes(
    target: CheckpointTarget, windows: Tensor, plan: TrainingPlan, device: torch.device
) -> int:
    """The activations that the decoder layers keep for one micro-batch until their backward.

    With checkpointing, each layer keeps its input, and one layer at a time keeps everything inside.
    """
    hidden, calls = calls_of(target, windows)
    layers = len(target.layers)
    written_out = plan.writes_out(device, windows.shape[1])
    # layers are alike enough: one is rehearsed on meta, where a forward costs no memory
    first = target.layers[0]
    one = memory_plan.rehearse_training(first, hidden, calls[0], written_out=written_out)
    return one + layers * 4 * hidden.numel() if plan.gradient_checkpointing else layers * one


def _moments_of(plan: TrainingPlan) -> int:
    """The number of weight-sized tensors in the optimizer's state, measured with one weight."""
    # a matrix, because Adafactor keeps moments of the size of a weight for vectors only
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = plan.make_optimizer([("weight", weight)])
    optimizer.step()
    return len(list(masks.moments(optimizer, weight)))


def _teacher_bytes(teacher: LocalCheckpoint, processes: ProcessGroup) -> int:
    """The size of a teacher's weights in one process.

    Each of several processes has a part of the decoder layers, one whole layer, and everything
    outside the layers.
    """
    model = skeleton.build_skeleton(teacher.folder)
    dtype, stored = fast_dtype(processes.device) or model.dtype, CheckpointReader(teacher.folder)
    weights = sum(math.prod(entry.shape) for entry in stored.entries.values())
    if processes.count > 1:
        layers = architecture.describe(model).layers(model)
        within = weights_of(layers)
        # a layer that runs and the next one, gathered; of the others only this process's part
        weights += 2 * max(map(weights_of, layers)) - (within - within // processes.count)
    return dtype.itemsize * weights


def _disk_bytes(
    recipe: TrainRecipe,
    target: CheckpointTarget,
    tokens: int,
    trained: int,
    state: int,
    validates: bool,
) -> int:
    """The maximum disk use of a training. Each new file is written next to the old one."""
    final = 4 * trained
    masked = sum(x.weight.numel() for x in masks.prunable(target.model))
    best = final * validates
    rounds = predictions = 0
    if recipe.gradual is not None:
        state += masked
    if recipe.iterative is not None:
        # The final weights of the last round, and the masks of both; the early weights.
        rounds = final * (2 if recipe.iterative.rewind == "weights" else 1) + 2 * masked
    if recipe.top_k:
        # float16 and int32 for each of the k tokens, float32 for the rest
        predictions = tokens * (6 * recipe.top_k + 4)
    written = max(state, best, final + target.reader.total_bytes)
    return state + best + predictions + rounds + written
