"""The pruned model learns from the dense one at the end of a run: zeros, stopping, going on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from slow import few_families, slow
from tiny import save_tiny
from zoo import tiny_model, tiny_windows, zeros_of

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine import plan
from secateur.errors import MemoryBudgetError, NumericalError
from secateur.models.architecture import Linear, describe, linears_of
from secateur.progress import Silent
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.recipes.shared import Distill
from secateur.sparsity.column_sweep import kept_weights
from secateur.training.distillation import DistillationData, Student, distill

FAMILIES = ["llama", "gpt2", "phi3", "gemma2", "opt"]


def mean_divergence(model, dense, windows) -> float:
    with torch.no_grad():
        log_p, log_q = (m(windows).logits.double().log_softmax(-1) for m in (dense, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("family", few_families(FAMILIES))
def test_the_divergence_falls_and_every_zero_stays(family: str) -> None:
    windows, dense = tiny_windows(8), tiny_model(family)
    plain, taught = tiny_model(family), tiny_model(family)
    options = {"method": "wanda", "sparsity": 0.5, "calibration": windows}
    secateur.prune(plain, **options)
    secateur.prune(taught, **options, distill_epochs=10, distill_learning_rate=3e-3)
    before, after = (mean_divergence(m, dense, windows) for m in (plain, taught))
    assert after < 0.7 * before
    masks = zeros_of(plain)
    for name, zeros in zeros_of(taught).items():
        assert torch.equal(zeros, masks[name]), name
    assert all(p.requires_grad and p.grad is None for p in taught.parameters())


@pytest.mark.parametrize("family", ["llama", slow("gpt2")])
@pytest.mark.parametrize("method", ["sparsegpt", slow("alps")])
def test_a_rounded_model_learns_on_its_grid(family: str, method: str) -> None:
    windows, dense, grid = tiny_windows(8), tiny_model(family), GroupGrid(3, 32)
    plain, taught = tiny_model(family), tiny_model(family)
    options = {"method": method, "sparsity": 0.5, "calibration": windows,
               "method_parameters": {"bits": 3, "group": 32}}  # fmt: skip
    secateur.prune(plain, **options)
    secateur.prune(taught, **options, distill_epochs=10, distill_learning_rate=3e-3)
    before, after = (mean_divergence(m, dense, windows) for m in (plain, taught))
    assert after < 0.7 * before
    moved, back = 0, 0
    for one, two in zip(linears_in(plain), linears_in(taught), strict=True):
        kept = kept_weights(one.weight)
        assert int(kept.sum()) == kept.numel() // 2
        assert not two.weight[~kept].any()
        back += int(two.weight[kept & (one.weight == 0)].count_nonzero())
        codes, scales = grid.quantize(one.weight)
        again = grid.codes(two.weight, scales)
        assert torch.equal(grid.dequantize(again, scales), two.weight)
        moved += int((again != codes).sum())
    assert moved > back > 0


def test_int8_weights_learn_on_the_grids_of_their_rows() -> None:
    windows, dense = tiny_windows(8), tiny_model("llama")
    plain, taught = tiny_model("llama"), tiny_model("llama")
    options = {"method": "sparsegpt", "sparsity": 0.5, "calibration": windows,
               "method_parameters": {"bits": 8}}  # fmt: skip
    secateur.prune(plain, **options)
    secateur.prune(taught, **options, distill_epochs=10, distill_learning_rate=3e-3)
    before, after = (mean_divergence(m, dense, windows) for m in (plain, taught))
    assert after < 0.7 * before
    for one, two in zip(linears_in(plain), linears_in(taught), strict=True):
        assert not two.weight[one.weight == 0].any()
        again = dequantize_rows(*quantize_rows(two.weight))
        torch.testing.assert_close(again, two.weight.float(), rtol=1e-6, atol=0)
        assert not torch.equal(one.weight, two.weight)


def linears_in(model) -> list[Linear]:
    """The matrices of the decoder layers."""
    layers = describe(model).layers(model)
    return [x for i, layer in enumerate(layers) for x in linears_of(layer, f"{i}").values()]


def test_bfloat16_stays_bfloat16_and_layers_left_dense_stay_as_they_are() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    untouched = copy.deepcopy(model)
    layers = describe(model).layers_path
    secateur.prune(
        model, method="magnitude", pattern="2:4", calibration=tiny_windows(4), distill_epochs=3,
        include=(f"{layers}.1.*",),
    )  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for (name, before), after in zip(untouched.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after) == (not name.startswith(f"{layers}.1.")), name


@pytest.mark.slow
def test_a_share_of_the_next_token_makes_the_text_likelier() -> None:
    windows = tiny_windows(8)
    losses = []
    for share in (0.0, 0.5):
        model = tiny_model("llama")
        secateur.prune(
            model, method="wanda", sparsity=0.5, calibration=windows, distill_epochs=20,
            distill_learning_rate=3e-3, distill_next_token=share,
        )  # fmt: skip
        with torch.no_grad():
            losses.append(float(model(windows, labels=windows).loss))
    assert losses[1] < losses[0] - 0.1


def test_the_outputs_of_the_last_layer_are_learned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: False)
    student, teacher, windows = tiny_model("llama"), tiny_model("llama"), tiny_windows(1)
    with torch.no_grad():
        next(describe(teacher).layers(teacher)[0].parameters()).mul_(1.5)
    states: list[torch.Tensor] = []
    for model in (student, teacher):
        last = describe(model).layers(model)[-1]
        hook = last.register_forward_hook(lambda layer, args, out: states.append(out.detach()))
        model(windows)
        hook.remove()
    apart = float((states[0] - states[1]).square().sum() / states[1].square().sum())
    expected = mean_divergence(student, teacher, windows) + 30 * apart
    data = DistillationData(windows, Distill(epochs=1, hidden=30.0), seed=0)
    names = frozenset(name for name, _ in student.named_parameters() if ".layers." in name)
    learner = Student(student, names, student.config.hidden_size)
    record = distill(teacher, learner, data, Silent())
    assert 30 * apart > 0.1 * expected
    assert record["loss_before"] == pytest.approx(expected, rel=1e-3)


def test_only_what_is_named_learns_and_a_divergence_that_is_no_number_is_reported() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        next(describe(teacher).layers(teacher)[0].parameters()).mul_(1.5)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    names = [name for name in before if "layers.1" in name]

    def learnt() -> dict[str, float]:
        data = DistillationData(tiny_windows(8), Distill(epochs=3), seed=0)
        learner = Student(student, frozenset(names), student.config.hidden_size)
        return distill(teacher, learner, data, Silent())

    record = learnt()
    assert record["loss_after"] < record["loss_before"]
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(names)
    with torch.no_grad():
        next(teacher.parameters()).fill_(torch.nan)
    with pytest.raises(NumericalError, match="nan"):
        learnt()


def test_a_model_that_loses_nothing_stays_as_it_is() -> None:
    model, untouched = tiny_model("llama"), tiny_model("llama")
    secateur.prune(
        model, method="wanda", sparsity=0.0, calibration=tiny_windows(2), distill_epochs=1
    )
    for before, after in zip(untouched.parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [({"distill_epochs": 1}, "distill_epochs=0"), ({}, "micro_batch_tokens")],
)
def test_a_budget_too_small_is_reported_with_what_would_help(
    tmp_path: Path, asked: dict, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = save_tiny(tmp_path / "model"), tmp_path / "windows.safetensors"
    save_windows(tiny_windows(2, 24), file)
    said = []
    for program in (10 * 2**20 - 2**16, 11 * 2**20):  # the second leaves nothing for the run
        monkeypatch.setattr(plan, "resident_bytes", lambda program=program: program)
        with pytest.raises(MemoryBudgetError) as error:
            secateur.prune(
                folder, output=tmp_path / "out", method="wanda", sparsity=0.5,
                calibration=str(file), max_memory="10MiB", **asked,
            )  # fmt: skip
        said.append(str(error.value))
        assert not list(tmp_path.glob("out*"))
    assert [remedy in text for text in said] == [True, False]


GRID = {
    "method": "sparsegpt",
    "method_parameters": {"bits": 4},
    "distill_learning_rate": 1e-3,
}
