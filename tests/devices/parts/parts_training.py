"""A model learns on cuda: masks, adapters, gradual pruning, gates, distillation, rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pretended import OnCuda
from tiny import save_tiny
from trained import source_text
from zoo import tiny_model, tiny_windows

import secateur
from contracts.pattern_examples import EXAMPLES
from secateur.errors import MemoryBudgetError
from secateur.recipes.train import GradualOptions, IterativeOptions, LoraOptions
from secateur.sparsity.patterns import parse_pattern, patterns
from secateur.sparsity.schedules import schedules
from secateur.sparsity.scores import scores
from secateur.training.batches import Batches
from secateur.training.divergences import KINDS
from secateur.training.gradual import Criterion, GradualPruning, Rounds
from secateur.training.loop import Loop, Outcome, TrainingTask
from secateur.training.lora import ADAPTERS_ALONE, attach, merge
from secateur.training.masks import Masks, as_part, local, open_masks, stored_masks
from secateur.training.objectives import (
    Distil,
    ModelTeacher,
    WrittenTeacher,
    next_token,
    write_teacher,
)
from secateur.training.process_group import ProcessGroup, load
from secateur.training.saved import Saved, write_whole
from secateur.training.training_plan import TrainingPlan

WINDOWS = tiny_windows(samples=8, length=12)
STEPS: dict[str, Any] = {"steps": 3, "learning_rate": 1e-3, "micro_batch": 2, "validations": 1}


def pruned(family: str = "llama") -> Any:
    """A model on cuda; half of each matrix is zero."""
    model = tiny_model(family)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in open_masks(model):
            weight = model.get_parameter(name)
            weight[torch.rand(weight.shape, generator=random) < 0.5] = 0.0
    return model.to("cuda")


def learn(
    model: Any, objective: Any, masks: Masks | None, folder: Path, hooks: Any = (), **plan: Any
) -> None:
    read, watched = Batches(WINDOWS, 4, seed=0), Batches(WINDOWS[:3], 3)
    task = TrainingTask(model, read, objective, masks or Masks({}), watched, hooks)
    Loop(task, TrainingPlan(**STEPS, **plan), saved=folder).run()
    assert all(isinstance(p, OnCuda) for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_masks_from_a_file(name: str, tmp_path: Path) -> None:
    model = pruned()
    Masks.of(model).save(tmp_path / "masks.safetensors")
    masks = Masks(dict(stored_masks(tmp_path / "masks.safetensors")))
    (tmp_path / "work").mkdir()
    learn(model, next_token(model), masks, tmp_path / "work", optimizer=name)
    masks.check(model)
    masks.check(model.cpu())


@pytest.mark.parametrize(
    "plan",
    [{"fast_matmuls": True}, {"fast_matmuls": False, "gradient_checkpointing": True}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_ways_to_train(family: str, plan: dict[str, Any], tmp_path: Path) -> None:
    model = pruned(family)
    learn(model, next_token(model), Masks.of(model), tmp_path, **plan)


def test_adapters(tmp_path: Path) -> None:
    adapted = attach(pruned(), LoraOptions(rank=2))
    base = adapted.get_base_model()
    learn(base, next_token(base), None, tmp_path, rates=ADAPTERS_ALONE)
    merge(adapted)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((n, "unstructured") for n in schedules), *(("cubic", kind) for kind in patterns)],
)
def test_gradual(name: str, kind: str, tmp_path: Path) -> None:
    text, scope = next(x for x in EXAMPLES[kind] if "32" not in x[0])
    pattern = parse_pattern(text, scope)
    model = tiny_model("llama").to("cuda")
    masks = Masks(open_masks(model))
    schedule, criterion = schedules[name](pattern.sparsity or 0.5), Criterion(pattern=pattern)
    hook = GradualPruning(masks.kept, schedule, criterion, GradualOptions(every=1))
    learn(model, next_token(model), masks, tmp_path, hooks=(hook,))


@pytest.mark.parametrize("name", [n for n in scores if n != "kept"])
def test_criterion(name: str) -> None:
    model, windows = tiny_model("llama", num_hidden_layers=1).to("cuda"), WINDOWS[:2]
    score = scores[name]
    pattern = parse_pattern("*x1" if score.whole_units else "unstructured")
    criterion = Criterion(score(), pattern, windows)
    kept = open_masks(model)
    for mask in criterion.masks(model, kept, 0.3).values():
        assert isinstance(mask, OnCuda)
    criterion.masks(model, kept, 0.3, exchanged=0.1)
    if score.whole_units:
        return  # its scores may be negative, so they have no global order
    globally = Criterion(score(), parse_pattern("unstructured", "global"), windows)
    globally.masks(model, kept, 0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"next_token": 0.5, "hidden": 1.0, "teacher_depth": 3}], ids=str
)
def test_distillation(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    student, teacher = pruned(), ModelTeacher(tiny_model("llama", seed=1).to("cuda"))
    objective = Distil.between(student, teacher, kind=kind, temperature=2.0, **options)
    learn(student, objective, Masks.of(student), tmp_path)


@pytest.mark.parametrize("k", [4, 64])
def test_distillation_from_a_file(k: int, tmp_path: Path) -> None:
    student, teacher = pruned(), tiny_model("llama", seed=1).to("cuda")
    file, device = tmp_path / "teacher.safetensors", torch.device("cuda")
    write_teacher(ModelTeacher(teacher), WINDOWS, file, k=k, device=device, temperature=2.0)
    written = WrittenTeacher(file)
    objective = Distil.between(student, written, temperature=2.0)
    learn(student, objective, Masks.of(student), tmp_path)


@pytest.mark.parametrize("rewind", ["rate", "weights", "none"])
def test_rounds(rewind: str, tmp_path: Path) -> None:
    model = tiny_model("llama").to("cuda")
    kept = open_masks(model)

    class Loops:
        """They save what is there."""

        def __call__(self, task: Any, plan: Any, saved: Any = None, label: str = "") -> Any:
            self.saved = saved
            return self

        def validation_loss(self) -> None: ...

        def run(self) -> Outcome:
            write_whole(self.saved / "final.safetensors", dict(model.named_parameters()))
            return Outcome(step=2)

    how = IterativeOptions(rounds=2, rewind=rewind)
    task = TrainingTask(model, Batches(WINDOWS, 2), None)
    rounds = Rounds(kept, schedules["geometric"](0.8), Criterion(), how, tmp_path, task)
    rounds.train(Loops(), TrainingPlan(steps=2))
    assert all(isinstance(p, OnCuda) for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_what_learns_on_the_host_stays_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step without its forward: FSDP2 gathers into memory that only a real device has."""
    folder = save_tiny(tmp_path / "model")
    begin = dist.init_process_group
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: begin("gloo", **how))
    # it would move buffers by `.data =`
    move = "torch.distributed.fsdp._fully_shard._fsdp_init._move_states_to_device"
    monkeypatch.setattr(move, lambda *states: None)
    group = ProcessGroup(torch.device("cuda", 0)).holding(on_host=True)
    with group.connected():
        model = load(folder, group, dtype=torch.float32, gathered=torch.bfloat16)
        parameters: dict[str, Any] = dict(model.named_parameters())
        with torch.no_grad():
            for parameter in parameters.values():
                local(parameter)[::2] = 0.0
        masks = Masks.of(model)
        optimizer = TrainingPlan(steps=1, optimizer=name).make_optimizer(parameters.items())
        for parameter in parameters.values():
            parameter.grad = as_part(torch.ones(parameter.shape), parameter)
        masks.hold_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        assert 0 < float(norm.full_tensor()) < 1e4
        optimizer.param_groups[0]["lr"] = 1e-2
        before = {n: local(p).clone() for n, p in parameters.items()}
        optimizer.step()
        masks.check(model, optimizer)
        saved = Saved(tmp_path / "saved", group)
        saved.save_state(parameters, optimizer, (), {"step": 1})
        after = {n: local(p).detach().clone() for n, p in parameters.items()}
        optimizer.zero_grad()
        assert saved.load_state(parameters, optimizer, ()) is not None
        for n, parameter in parameters.items():
            held = [parameter, *masks.kept.values(), *optimizer.state[parameter].values()]
            assert not any(
                isinstance(local(x), OnCuda) for x in held if isinstance(x, torch.Tensor)
            )
            assert torch.equal(local(parameter), after[n])
        assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
        optimizer.step()


def test_what_does_not_fit_on_the_gpu_goes_to_the_host_unless_it_must_stay_whole(
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=8)
    (tmp_path / "text.txt").write_text(source_text()[:20_000])
    options: dict[str, Any] = {
        "text": str(tmp_path / "text.txt"), "device": "cuda", "dry_run": True, "windows": 16,
        "sequence_length": 16, "gradient_checkpointing": True,
    }  # fmt: skip
    roomy = secateur.train(folder, **options)
    assert not roomy.memory["on_host"]
    less = roomy.memory["peak"] - 1
    tight = secateur.train(folder, max_memory=less, **options)
    assert tight.memory["on_host"]
    assert tight.memory["peak"] <= less
    assert any("on the host" in str(row) for table in tight.tables() for row in table.rows)
    for more in ({"gradual": 0.5}, {"optimizer": "Adafactor"}):
        peak = secateur.train(folder, **options, **more).memory["peak"]
        with pytest.raises(MemoryBudgetError):
            secateur.train(folder, max_memory=peak - 1, **options, **more)
