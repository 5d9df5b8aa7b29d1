"""The pruned model learns in sweeps: the same as a slow loop, with one layer in memory."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from slow import slow
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny, tensors_of
from torch import Tensor, nn
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.machine import fast_dtype
from secateur.models.skeleton import quiet_transformers
from secateur.reporting.plan import PlanResult
from secateur.sparsity.column_sweep import kept_weights
from secateur.training import distilled_checkpoint
from secateur.training.distilled_checkpoint import LayerwiseTrainer
from secateur.training.masks import Masks

RATE = 2e-3
OPTIONS: dict[str, Any] = {
    "method": "wanda", "sparsity": 0.5, "distill_epochs": 2, "distill_learning_rate": RATE,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_sweeps() -> Iterator[None]:
    """So few steps would have sweeps over one window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilled_checkpoint, "FEWEST_SWEEPS", 1)
        yield


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 on every machine, and a teacher that stores nearly all tokens."""
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: False)
    monkeypatch.setattr("secateur.training.objectives.TOP_K", 95)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "windows.safetensors"
    save_windows(tiny_windows(6, 24), file)
    return file


def load(folder: Path) -> Any:
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def order_of(windows: int, epochs: int) -> Iterator[int]:
    for epoch in range(epochs):
        yield from torch.randperm(windows, generator=torch.Generator().manual_seed(epoch)).tolist()


class SlowLayer:
    """A layer of a whole model of transformers, with an optimizer and masks of its own."""

    def __init__(self, layer: nn.Module, layers: int) -> None:
        self.layer, self.most = layer, 1 / math.sqrt(layers)
        self.masks = {p: (p != 0).float() for p in layer.parameters() if p.ndim == 2}
        self.optimizer = torch.optim.Adam(layer.parameters(), lr=0.0, betas=(0.9, 0.95))
        layer.register_forward_pre_hook(self.seen, with_kwargs=True)

    def seen(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = (args[0].detach(), kwargs)

    def down(self, gradient: Tensor, call: tuple[Tensor, dict[str, Any]], rate: float) -> Tensor:
        """A step along the gradient of one window. Return the gradient of the inputs."""
        inputs, others = call[0].clone().requires_grad_(), call[1]
        self.optimizer.zero_grad()
        self.layer(inputs, **others).backward(gradient)
        for parameter, mask in self.masks.items():
            parameter.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(self.layer.parameters(), self.most)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        assert inputs.grad is not None
        return inputs.grad


def last_output_of(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a window, and what the last layer returns."""
    last: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda layer, args, out: last.append(out))
    logits = model(ids, use_cache=False).logits[0]
    hook.remove()
    return logits, last[0]


def slow_sweeps(
    student: Any, dense: Any, windows: Tensor, share: float, size: int, hidden: float
) -> list[float]:
    """Train a whole model of transformers in sweeps. Return the losses."""
    layers = [SlowLayer(layer, len(student.model.layers)) for layer in student.model.layers]
    steps, losses = list(order_of(len(windows), 2)), []
    for start in range(0, len(steps), size):
        sweep, gradients, calls = steps[start : start + size], [], []
        for number in sweep:
            ids = windows[number : number + 1]
            found, last = last_output_of(student, ids)
            wanted, target = (x.detach() for x in last_output_of(dense, ids))
            log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
            apart = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            after = log_q[:-1].gather(1, ids[0, 1:, None]).mean()
            loss = (1 - share) * apart - share * after
            loss = loss + hidden * (last - target).square().sum() / target.square().sum()
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, last)[0])
            calls.append([layer.call for layer in layers])
        for place in reversed(range(len(layers))):
            for window, call in enumerate(calls):
                step = start + window
                warm = min(1.0, (step + 1) / len(steps) * 16)
                rate = RATE * warm * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
                gradients[window] = layers[place].down(gradients[window], call[place], rate)
    return losses


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("share", "size", "hidden"),
    [slow((1.0, 1, 0.0)), slow((0.5, 4, 0.0)), (0.5, 4, 2.0), slow((0.5, 9, 0.0))],
)
def test_sweeps_learn_as_a_slow_loop_does(
    tmp_path: Path, file: Path, share: float, size: int, hidden: float
) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=3)
    options = {**OPTIONS, "calibration": str(file), "distill_next_token": share}
    options |= {"distill_hidden": hidden}
    secateur.prune(folder, output=tmp_path / "plain", **{**options, "distill_epochs": 0})
    report = secateur.prune(folder, output=tmp_path / "out", **options, distill_sweep_windows=size)
    dense, student = load(folder), load(tmp_path / "plain")
    losses = slow_sweeps(student, dense, tiny_windows(6, 24), share, size, hidden)
    expected, before = dict(student.named_parameters()), tensors_of(tmp_path / "plain")
    after = tensors_of(tmp_path / "out")
    apart, moved = 0.0, 0.0
    for name, value in before.items():
        own = float((expected[name].detach() - value).square().sum())
        moved += own
        apart += float((after[name] - expected[name].detach()).square().sum())
        assert (own > 0) == (".layers." in name), name
        if name.endswith("proj.weight"):
            assert torch.equal(after[name] == 0, value == 0), name
    assert apart <= 0.002**2 * moved  # the teacher's log p is stored in float16
    record = report.manifest.distillation
    assert record["sweep_windows"] == size
    assert record["loss_before"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-3)
    assert record["loss_after"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-2)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "hidden"),
    [
        ("llama", 5.0),
        *(slow((name, 0.0)) for name in ("llama", "gpt2", "gemma3", "mixtral", "opt")),
        *(slow((name, 5.0)) for name in ("mixtral", "gemma3n_text")),
    ],
)
def test_sweeps_over_one_window_are_the_usual_steps(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, family: str, hidden: float
) -> None:
    """Where no gradient is clipped."""
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, most: Tensor([0.0]))
    folder = save_tiny(tmp_path / "model", family)
    options = {**OPTIONS, "calibration": str(file), "distill_hidden": hidden}
    records, found = [], []
    for size in (0, 1):
        out = tmp_path / f"out-{size}"
        report = secateur.prune(folder, output=out, **options, distill_sweep_windows=size)
        records.append(report.manifest.distillation)
        found.append(tensors_of(out))
    whole, swept = records
    for key in ("loss_before", "loss_after"):  # the teacher's log p is stored in float16
        assert swept[key] == pytest.approx(whole[key], rel=0.1, abs=1e-5), key
    apart, size = 0.0, 0.0
    for name, value in found[0].items():
        assert torch.equal(found[1][name] == 0, value == 0), name
        apart += float((found[1][name] - value).square().sum())
        size += float(value.square().sum())
    assert apart <= 0.1**2 * size


@pytest.mark.parametrize("family", [slow("gemma3n_text"), slow("gemma4_text small")])
def test_layers_with_values_of_each_token_learn_too(
    tmp_path: Path, file: Path, family: str
) -> None:
    folder = save_tiny(tmp_path / "model", family)
    options = {**OPTIONS, "calibration": str(file), "distill_next_token": 1.0}
    report = secateur.prune(folder, output=tmp_path / "out", **options, distill_sweep_windows=4)
    record = report.manifest.distillation
    assert record["loss_after"] < record["loss_before"]
    assert not list((tmp_path / "out").rglob("*values*"))


def test_a_training_has_eight_sweeps_or_more(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.training.distilled_checkpoint.FEWEST_SWEEPS", 8)
    folder = save_tiny(tmp_path / "model")
    options = {**OPTIONS, "distill_epochs": 3, "calibration": str(file)}  # 18 steps
    report = secateur.prune(folder, output=tmp_path / "out", **options, distill_sweep_windows=16)
    assert report.manifest.distillation["sweep_windows"] == 2


def test_a_layer_that_stays_dense_is_not_trained(tmp_path: Path, file: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=6)
    secateur.prune(
        folder, output=tmp_path / "out", **OPTIONS, calibration=str(file),
        distill_sweep_windows=4, include=("model.layers.2.*", "model.layers.5.*"),
    )  # fmt: skip
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    changed = {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"2", "5"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a model, windows and what a run makes that nobody stopped; its result."""
    place = tmp_path_factory.mktemp("straight")
    save_windows(tiny_windows(6, 24), place / "w.safetensors")
    result = secateur.prune(
        save_tiny(place / "model", num_hidden_layers=4), output=place / "whole", **OPTIONS,
        calibration=place / "w.safetensors", distill_sweep_windows=4, distill_hidden=0.5,
    )  # fmt: skip
    return place, result


@pytest.mark.parametrize(
    ("stage", "steps"),
    [
        slow(("dense hidden states", 14)),
        slow(("dense predictions", 3)),
        slow(("distilling", 2)),
        ("distilling", 15),
        slow(("distilling", 24)),
    ],
)
def test_stopped_in_a_sweep_and_gone_on_with_gives_the_same(
    straight: tuple[Path, Any], tmp_path: Path, stage: str, steps: int
) -> None:
    place, whole = straight
    options = {**OPTIONS, "calibration": place / "w.safetensors", "distill_sweep_windows": 4}
    options |= {"output": tmp_path / "again", "distill_hidden": 0.5}
    with pytest.raises(StoppedError):
        secateur.prune(place / "model", progress=StopAt(stage, steps), **options)
    again = secateur.prune(place / "model", resume=True, **options)
    one, two = tensors_of(place / "whole"), tensors_of(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.manifest.distillation == again.manifest.distillation


@pytest.mark.parametrize("steps", [3, slow(9)])
def test_a_rate_is_chosen_by_trials_that_go_on_after_a_stop(tmp_path: Path, steps: int) -> None:
    file = tmp_path / "windows.safetensors"
    save_windows(tiny_windows(12, 24), file)
    folder = save_tiny(tmp_path / "model")
    options = {**OPTIONS, "distill_learning_rate": None, "distill_next_token": 1.0}
    options |= {"calibration": str(file), "distill_sweep_windows": 2}
    whole = secateur.prune(folder, output=tmp_path / "whole", **options)
    stop = StopAt("choosing the learning rate", steps)
    with pytest.raises(StoppedError):
        secateur.prune(folder, output=tmp_path / "again", progress=stop, **options)
    again = secateur.prune(folder, output=tmp_path / "again", resume=True, **options)
    record = whole.manifest.distillation
    highest = 0.25 / load(folder).config.hidden_size * (24 / 2048) ** 0.5
    choices = [pytest.approx(highest / 4**n, rel=1e-12) for n in range(4)]
    assert record["learning_rate"] in choices
    assert record == again.manifest.distillation
    one, two = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_trials_of_a_rate_have_sweeps_as_large_as_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilled_checkpoint, "FEWEST_SWEEPS", 8)
    sizes: dict[str, set[int]] = {}
    train = LayerwiseTrainer._train_batch

    def noted(self: LayerwiseTrainer, done: int, size: int, folder: Path) -> list[float]:
        sizes.setdefault(self.label, set()).add(size)
        return train(self, done, size, folder)

    monkeypatch.setattr(LayerwiseTrainer, "_train_batch", noted)
    file = tmp_path / "windows.safetensors"
    save_windows(tiny_windows(16, 24), file)
    secateur.prune(
        save_tiny(tmp_path / "model"), output=tmp_path / "out", calibration=str(file),
        distill_sweep_windows=16, **{**OPTIONS, "distill_learning_rate": None},
    )  # fmt: skip
    assert sizes == {"choosing the learning rate": {2}, "distilling": {2}}  # 32 steps, trials of 4


WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 10,
        "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip


def peaks_of(folder: Path, calibration: Path, size: int) -> PlanResult:
    return secateur.prune(
        folder, dry_run=True, **OPTIONS, calibration=str(calibration), distill_sweep_windows=size
    )


def test_the_plan_counts_the_logits_of_both_models(tmp_path: Path) -> None:
    """A row more of embedding and head: two copies of both, two logits of a token, one gradient;
    and where products are in bfloat16, the head in it.
    """
    tokens, hidden, rows = 20, 32, 1000
    file = tmp_path / "windows.safetensors"
    save_windows(tiny_windows(4, tokens), file)
    small, large = (
        peaks_of(
            save_tiny(
                tmp_path / str(size), tokenizer=False, vocab_size=size, hidden_size=hidden,
                tie_word_embeddings=False,
            ),
            file,
            0,
        ).plan.sizes["distilling"]
        for size in (rows, 2 * rows)
    )  # fmt: skip
    head = 2 * hidden if fast_dtype(torch.device("cpu")) else 0
    assert large - small == rows * (2 * hidden * (4 + 4) + head + 3 * 4 * tokens)


def test_sweeps_take_over_where_the_whole_does_not_fit(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "model", **WIDE)
    options = {**OPTIONS, "distill_epochs": 1, "calibration": str(file)}
    needs = {n: peaks_of(folder, file, n).plan.sizes["distilling"] for n in (0, 16)}
    room = (needs[0] + needs[16]) / 2 - needs[16]
    budget = int(peaks_of(folder, file, 16).peak_bytes + room)
    with caplog.at_level(logging.WARNING):
        stop = StopAt("distilling", 2)
        with pytest.raises(StoppedError):
            secateur.prune(
                folder, output=tmp_path / "out", progress=stop, max_memory=budget, **options
            )
    assert "sweeps of 16" in caplog.text
    assert f"the budget {budget / 2**30:.2f} GiB" in caplog.text
    # the way of a stopped run stays, also where the whole would fit now
    report = secateur.prune(folder, output=tmp_path / "out", resume=True, **options)
    assert report.manifest.distillation["sweep_windows"] == 6
    assert report.manifest.plan["sweep_windows"] == 16
    assert not list((tmp_path / "out").rglob("*predictions*"))
    with pytest.raises(MemoryBudgetError, match="distill_epochs=0"):
        secateur.prune(
            folder, output=tmp_path / "no", max_memory=budget, **options,
            distill_sweep_windows=0,
        )  # fmt: skip


@pytest.fixture
def frozen() -> Iterator[None]:
    """`gc.get_objects` leaves out what there was before; else it takes most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """The bytes of the storages of all floating tensors and masks made since `frozen`."""
    kinds = (torch.float32, torch.bool)
    storages = {}
    for found in gc.get_objects():
        tensor = type(found) in (Tensor, torch.nn.Parameter)
        if tensor and not found.is_meta and found.dtype in kinds:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("size", [4, 0])
def test_a_sweep_needs_the_memory_of_a_layer_or_the_head(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """With gradients, moments and masks, when the backward of a step is done."""
    folder = save_tiny(tmp_path / "model", **WIDE)
    most, hold = [0], Masks.hold_gradients

    def counting(masks: Masks, model: Any) -> None:
        hold(masks, model)
        most[0] = max(most[0], live_bytes())

    monkeypatch.setattr(Masks, "hold_gradients", counting)
    with pytest.raises(StoppedError):
        secateur.prune(
            folder, output=tmp_path / "out", **OPTIONS, calibration=str(file),
            progress=StopAt("distilling", 25 if size else 3), distill_sweep_windows=size,
        )  # fmt: skip
    of_layer = sum(x.numel() for n, x in tensors_of(folder).items() if ".layers.0." in n)
    assert (most[0] <= 1.5 * 17 * of_layer) == bool(size)
    assert most[0] > 16 * of_layer


def test_a_loaded_model_is_not_distilled_in_sweeps() -> None:
    with pytest.raises(RecipeError, match="distill_sweep_windows"):
        secateur.prune(
            tiny_model("llama"), **OPTIONS, calibration=tiny_windows(2), distill_sweep_windows=4
        )


def test_rounded_weights_learn_on_their_grid_in_sweeps(tmp_path: Path, file: Path) -> None:
    from secateur.quantization.groups import GroupGrid

    folder = save_tiny(tmp_path / "model")
    options = {**OPTIONS, "calibration": str(file), "method": "sparsegpt",
               "method_parameters": {"bits": 4, "group": 32}}  # fmt: skip
    secateur.prune(folder, output=tmp_path / "plain", **{**options, "distill_epochs": 0})
    secateur.prune(folder, output=tmp_path / "out", **options, distill_sweep_windows=4)
    grid, moved, back = GroupGrid(4, 32), 0, 0
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    for name in before:
        if name.endswith("proj.weight"):
            codes, scales = grid.quantize(before[name])
            again = grid.codes(after[name], scales)
            assert torch.equal(grid.dequantize(again, scales), after[name]), name
            moved += int((again != codes).sum())
            kept = kept_weights(before[name])
            assert int(kept.sum()) == kept.numel() // 2
            assert not after[name][~kept].any()
            back += int(after[name][kept & (before[name] == 0)].count_nonzero())
    assert moved > back > 0
    manifest = json.loads((tmp_path / "out" / "secateur" / "manifest.json").read_text())
    assert manifest["distillation"]["sweep_windows"] == 4
