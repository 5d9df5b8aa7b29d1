"""Losses against their definitions, with their gradients; teachers in memory and on disk."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from zoo import CONFIGS

from oracles.divergences import divergence, lumped_divergence, next_token_loss
from secateur.errors import RecipeError
from secateur.models.architecture import head_alone
from secateur.training import divergences, objectives
from secateur.training.batches import Batch, Batches
from secateur.training.divergences import KINDS, hidden_loss, layer_pairs
from secateur.training.objectives import (
    Distil,
    ModelTeacher,
    WrittenTeacher,
    next_token,
    write_teacher,
)

CPU = torch.device("cpu")
IDS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = Batch(IDS, (0, 1))


def model_of(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A tiny model with logits that are not all alike."""
    config = CONFIGS[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


def logits_of(model: Any) -> torch.Tensor:
    """All logits."""
    return model(input_ids=IDS, use_cache=False).logits


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    """Of all parameters that have one."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, named.values(), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, model: Any, tolerance: float) -> None:
    """Loss and gradients of one and the other."""
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=1e-7)
    own, other = gradients(ours, model), gradients(theirs, model)
    assert own.keys() == other.keys()
    for name, gradient in other.items():
        scale = float(gradient.abs().max())
        assert float((own[name] - gradient).abs().max()) <= tolerance * scale + 1e-7, name


@pytest.fixture(params=["whole", "in small pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens at a time, so that several blocks of several chunks are made."""
    if request.param != "whole":
        monkeypatch.setattr(divergences, "logits_block", lambda device: 96 * 4 * 7)
        monkeypatch.setattr(divergences, "CHUNKS", 3)  # of two tokens
        monkeypatch.setattr(objectives, "logits_block", lambda device: 96 * 4 * 5)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_next_token_loss_is_that_of_the_whole_logits(family: str) -> None:
    model = model_of(family)
    assert (head_alone(model) is None) == (family == "gemma2")
    assert_same(
        next_token(model)(model, BATCH), next_token_loss(logits_of(model), IDS), model, 1e-4
    )


@pytest.mark.usefixtures("pieces")
def test_a_bias_of_the_head_learns_too() -> None:
    model = model_of()
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features))
    expected = next_token_loss(logits_of(model), IDS)
    assert_same(next_token(model)(model, BATCH), expected, model, 1e-4)  # of the bias too
    assert head.bias in set(model.parameters())


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_and_their_gradients(kind: str, temperature: float) -> None:
    student, dense = model_of(), model_of(seed=1)
    objective = Distil.between(student, ModelTeacher(dense), kind=kind, temperature=temperature)
    wanted = logits_of(dense).detach().flatten(0, 1)
    with torch.autocast("cpu", enabled=False):
        expected = divergence(logits_of(student).flatten(0, 1), wanted, kind, temperature)
        # the teacher may be in bfloat16; here it is as exact as the student
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                objectives, "fast_matmuls", lambda _: torch.autocast("cpu", enabled=False)
            )
            assert_same(objective(student, BATCH), expected, student, 2e-4)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("kind", "temperature"),
    [("forward", 1.0), ("forward", 2.0), ("reverse", 1.0), ("total_variation", 1.0)],
)
def test_a_share_of_the_plain_loss(kind: str, temperature: float) -> None:
    """The forward divergence at temperature 1 has both in one pass."""
    student, teacher = model_of(), ModelTeacher(model_of(seed=1))
    how = {"kind": kind, "temperature": temperature}
    alone = Distil.between(student, teacher, **how)(student, BATCH)
    plain = next_token(student)(student, BATCH)
    both = Distil.between(student, teacher, next_token=0.25, **how)(student, BATCH)
    assert_same(both, (0.75 * alone + 0.25 * plain).double(), student, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [5, 95])
def test_a_written_teacher_is_the_divergence_with_the_rest_as_one_outcome(
    kind: str, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "fast_matmuls", lambda _: torch.autocast("cpu", enabled=False))
    student, dense = model_of(), model_of(seed=1)
    write_teacher(
        ModelTeacher(dense), IDS, tmp_path / "t.safetensors", k=k, device=CPU, temperature=2.0
    )
    written = WrittenTeacher(tmp_path / "t.safetensors")
    objective = Distil.between(student, written, kind=kind, temperature=2.0)
    wanted = logits_of(dense).detach().flatten(0, 1)
    expected = lumped_divergence(logits_of(student).flatten(0, 1), wanted, k, kind, 2.0)
    with torch.autocast("cpu", torch.bfloat16):  # what is stored in float16 must pass here too
        written(BATCH, 2.0, ())
    if kind == "total_variation":  # its gradient jumps where p = q, and log p is in float16
        torch.testing.assert_close(
            objective(student, BATCH).double(), expected, rtol=5e-3, atol=1e-7
        )
    else:
        assert_same(objective(student, BATCH), expected, student, 5e-3)


def test_hidden_states_are_compared_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "fast_matmuls", lambda _: torch.autocast("cpu", enabled=False))
    dense = model_of(num_hidden_layers=4)
    student = model_of(num_hidden_layers=2, seed=1)
    options = {"teacher_depth": 4, "teacher_layers": [0, 2]}
    teacher = ModelTeacher(dense)
    both = Distil.between(student, teacher, hidden=0.5, **options)
    assert both.pairs == ((0, 1), (1, 3))
    plain = Distil.between(student, teacher)(student, BATCH)
    own: list[torch.Tensor] = []
    other: list[torch.Tensor] = []
    for layers, kept in ((student.model.layers, own), (dense.model.layers, other)):
        for layer in layers:
            layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
    logits_of(student), logits_of(dense)
    expected = torch.stack(
        [(own[i] - other[j]).square().sum() / other[j].square().sum() for i, j in both.pairs]
    ).mean()
    assert_same(both(student, BATCH), (plain + 0.5 * expected).double(), student, 1e-4)


def test_which_layer_learns_from_which() -> None:
    assert layer_pairs(4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert layer_pairs(2, 6) == ((0, 2), (1, 5))
    assert layer_pairs(3, 6, [0, 3, 5]) == ((0, 2), (1, 4), (2, 5))
    with pytest.raises(RecipeError, match="2"):
        layer_pairs(3, 2)


def test_hidden_states_of_other_widths_are_refused() -> None:
    with pytest.raises(RecipeError, match="width 3"):
        hidden_loss({0: torch.ones(1, 2, 3)}, {0: torch.ones(1, 2, 4)}, ((0, 0),))


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    student, dense = model_of(), model_of(vocab_size=128)
    with pytest.raises(RecipeError, match=r"96 .* 128"):
        Distil.between(student, ModelTeacher(dense))
    with pytest.raises(RecipeError, match="96 most likely"):
        write_teacher(ModelTeacher(student), IDS, tmp_path / "t.safetensors", k=96, device=CPU)


def test_each_epoch_reads_everything_once() -> None:
    batches = Batches(torch.arange(7)[:, None].expand(7, 3), 2, seed=3)
    read = [n for step in range(7) for n in batches.numbers(step)]
    assert sorted(read[:7]) == sorted(read[7:]) == list(range(7))
    assert read[:7] != read[7:]
    halves = [batches.parts(batches.numbers(3), 1, CPU, rank, 2) for rank in (0, 1)]
    assert tuple(p.numbers[0] for half in halves for p in half) == batches.numbers(3)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_only_answers_count(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses are means over the tokens before an answer's; parts of a step add up."""
    monkeypatch.setattr(objectives, "fast_matmuls", lambda _: torch.autocast("cpu", enabled=False))
    model, teacher = model_of(family), model_of(family, seed=1)
    answers = torch.zeros_like(IDS, dtype=torch.bool)
    answers[0, 3:6] = answers[1, 0] = answers[1, 8:] = True
    before = answers[:, 1:]
    step = Batches(IDS, 2, answers=answers)
    for name, size in itertools.product(("next", *KINDS), (1, 2)):
        logits = logits_of(model)[:, :-1][before]
        if name == "next":
            objective: Any = next_token(model)
            log_q = logits.double().log_softmax(-1)
            expected = -log_q.gather(1, IDS[:, 1:][before][:, None]).mean()
        else:
            objective = Distil.between(model, ModelTeacher(teacher), kind=name)
            wanted = logits_of(teacher)[:, :-1][before].detach()
            expected = divergence(logits, wanted, name, 1.0)
        parts = step.parts(range(2), size, CPU)
        ours = sum(objective(model, part) * len(part.ids) / 2 for part in parts)
        assert_same(ours, expected, model, 2e-4)
    micro = step.parts(step.numbers(0), 1, CPU)
    assert sorted(part.numbers for part in micro) == [(0,), (1,)]
    assert {part.count for part in micro} == {3.5}
