"""Makes from the recipe of a training its plan, masks, loss, teacher, and trained parameters.

weights     all weights learn, the masks stay                       the default
lora        adapters learn, with the masks in their products; they are merged at the end
gradual     the masks lose weights every few steps
iterative   the masks lose weights in rounds, with a training after each

Training windows and validation windows must differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.continuation import SEQUENCE, shared_share
from secateur.calibration.documents import read_text
from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import WindowPlan, begins_with, without_start
from secateur.engine.prune.tasks import refuse_idle_globs
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import RecipeError, SourceError
from secateur.evaluation.perplexity import evaluation_windows
from secateur.models.architecture import describe, positions_of
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import quiet_transformers
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import load_tokenizer, start_tokens_of
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.train import GradualOptions, IterativeOptions, OptimizerOptions, TrainRecipe
from secateur.runs.folder import NOTES
from secateur.runs.records import Manifest, StepEntry, read_list, read_record
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import Schedule, schedules
from secateur.sparsity.scores import scores
from secateur.training.gradual import Criterion, Gradual, GradualPruning, open_masks
from secateur.training.lora import ADAPTERS_ALONE, attach, merge
from secateur.training.masks import Masks, masks_in
from secateur.training.objectives import (
    TOP_K,
    Distil,
    ModelTeacher,
    NextToken,
    Objective,
    WrittenTeacher,
    windows_digest,
    write_teacher,
)
from secateur.training.process_group import ProcessGroup, load
from secateur.training.rounds import PruningRounds
from secateur.training.saved import Hook
from secateur.training.training_plan import TrainingPlan
from secateur.types import Windows

log = logging.getLogger(__name__)

LENGTH = 512
HELD_OUT_AT_MOST = 8
"""At most one window in this many is held out if the recipe has no validation text."""
REFUSED = 0.01


@dataclass(frozen=True)
class TrainingText:
    """The windows of a training.

    Attributes:
        windows: token ids [samples, sequence_length].
        validation: validation windows, likewise; None for none.
        record: the source of both, as JSON values.
    """

    windows: Windows
    validation: Windows | None
    record: dict[str, Any]


def read_training_text(recipe: TrainRecipe, folder: Path, config: Any) -> TrainingText:
    """Return the windows of a recipe.

    Args:
        recipe: names the texts.
        folder: folder of the model, for its tokenizer.
        config: configuration of the model, for its context and vocabulary.

    Raises:
        SourceError: a text is not available, or is too short for one step.
        RecipeError: the training text contains the validation text, or the windows are longer
            than the model's context.
    """
    length = recipe.sequence_length or min(LENGTH, positions_of(config) or LENGTH)
    start = start_tokens_of(folder, trust_remote_code=recipe.trust_remote_code)
    windows = _windows_of(recipe, folder, length, config)
    validation, watched = None, "none"
    if recipe.validation_windows and recipe.validation_text is not None:
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
        text = read_text(recipe.validation_text)
        validation = evaluation_windows(
            text.text, tokenizer, windows.shape[1], max_windows=recipe.validation_windows
        )
        watched = text.dataset
    elif recipe.validation_windows:
        held = min(recipe.validation_windows, len(windows) // HELD_OUT_AT_MOST)
        validation = windows[:held] if held else None
        windows, watched = windows[held:], f"{held} windows held out of the text"
    if len(windows) < recipe.batch:
        raise SourceError(
            f"the text gives {len(windows)} windows of {length} tokens, one step needs "
            f"{recipe.batch}",
            where=", ".join(recipe.text),
            remedy="name a longer text, or ask for a shorter sequence length or a smaller batch",
        )
    shared = None
    if validation is not None:
        shared = shared_share(without_start(windows, start), without_start(validation, start))
    if shared and recipe.validation_text is not None:
        _refuse_overlap(shared, watched)
    return TrainingText(
        windows,
        validation,
        {
            "source": ", ".join(recipe.text),
            "windows": len(windows),
            "sequence_length": windows.shape[1],
            **({"start_tokens": list(start)} if start and begins_with(windows, start) else {}),
            "tokens": windows.numel(),
            "sha256": windows_digest(windows),
            "validation": watched,
            "validation_windows": 0 if validation is None else len(validation),
            "validation_shared": shared,
        },
    )


def _windows_of(recipe: TrainRecipe, folder: Path, length: int, config: Any) -> Windows:
    """Return the windows of all texts, up to the number in the recipe.

    Several texts contribute equally: each gives as many windows as the shortest, in turns.
    """
    reader = WindowReader.of_folder(folder, config, trust_remote_code=recipe.trust_remote_code)
    plan = WindowPlan(-(-recipe.windows // len(recipe.text)), length, recipe.seed)
    found = [reader.read_up_to(text, plan, recipe.field) for text in recipe.text]
    if len({windows.shape[1] for windows in found}) > 1:
        lengths = [f"{text}: {w.shape[1]}" for text, w in zip(recipe.text, found, strict=True)]
        raise SourceError(
            f"the texts have windows of different lengths ({', '.join(lengths)})",
            remedy="make the windows of one length, or give the texts themselves",
        )
    each = min(map(len, found))
    return torch.stack([windows[:each] for windows in found], 1).flatten(0, 1)


def _refuse_overlap(shared: float, watched: str) -> None:
    """Refuse training text that contains validation text; warn if it shares only a few phrases."""
    if shared > REFUSED:
        raise RecipeError(
            f"{shared:.1%} of the sequences of {SEQUENCE} tokens in the validation text are in "
            "the training text too, so its perplexity would say nothing",
            where=watched,
            remedy="watch another text, or leave that one out of the training",
        )
    log.warning("%.2g %% of the text %s is in the training text too", 100 * shared, watched)


def check_together(recipe: TrainRecipe, processes: ProcessGroup) -> None:
    """Refuse kinds of training that exclude each other.

    Raises:
        RecipeError: the recipe has two of adapters, gradual and iterative pruning, or one of them
            with several processes.
    """
    given = [name for name in ("gradual", "iterative", "lora") if getattr(recipe, name) is not None]
    if given and processes.count > 1:
        raise RecipeError(
            f"{given[0]} needs a single process",
            remedy="start the command without torchrun or accelerate launch",
        )


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
        options = {name: getattr(recipe, name) for name in OptimizerOptions.model_fields}
        options["rates"] = self._rates()
        return TrainingPlan(
            **options,
            steps=steps,
            minutes=recipe.minutes or 0.0,
            micro_batch=recipe.micro_batch_windows,
            gradient_checkpointing=recipe.gradient_checkpointing,
            fast_matmuls=recipe.fast_matmuls,
            validations=recipe.validations,
            patience=recipe.patience,
            save_minutes=recipe.save_minutes,
        )

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
                remedy="leave them out; lora.include and lora.exclude choose the linears",
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
        own, other = (
            load_tokenizer(x.folder, trust_remote_code=trust).get_vocab()
            for x in (self.source, teacher)
        )
        if own != other:
            differing = sum(own.get(token) != number for token, number in other.items())
            raise RecipeError(
                f"student and teacher have different vocabularies: {len(own)} and {len(other)} "
                f"tokens, {differing} of the teacher's have another number or none",
                where=teacher.name,
                remedy="a teacher needs the tokenizer of the student: name the model that it was "
                "made from",
            )
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
    if recipe.iterative is not None:
        how = recipe.iterative
        schedule, criterion = _pruning(how, sparsity, windows, "iterative")
        rounds = PruningRounds(schedule, how.rounds, criterion, how.rewind, how.rewind_step)
        return Adapted(model, held, held, (), rounds, opened)
    assert recipe.gradual is not None
    hook = GradualPruning(
        opened, Gradual(*_pruning(recipe.gradual, sparsity, windows, "gradual"), recipe.gradual)
    )
    return Adapted(model, held, held, (hook,), None, opened)


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
