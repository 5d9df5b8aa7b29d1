"""The pruned model learns in overlapping blocks: the same as a slow loop, in bounded memory."""

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
from safetensors.torch import load_file
from test_distilling import StopAt, StoppedError
from torch import Tensor

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.models.skeleton import quiet_transformers
from secateur.training.masks import Masks
from secateur.workflows.prune import block_distillation
from slow import slow, slow_but
from tiny import save_tiny
from zoo import tiny_model, tiny_windows

RATE = 2e-3
OPTIONS: dict[str, Any] = {
    "method": "wanda", "sparsity": 0.5, "distill_epochs": 2, "distill_learning_rate": RATE,
}  # fmt: skip


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 on every machine, and a teacher that stores nearly all tokens."""
    monkeypatch.setattr("secateur.precision._fast_bfloat16", lambda device: False)
    monkeypatch.setattr(block_distillation, "TOP_K", 95)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "windows.safetensors"
    save_windows(tiny_windows(6, 24), file)
    return file


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def load(folder: Path) -> Any:
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def order_of(windows: int, epochs: int) -> Iterator[int]:
    for epoch in range(epochs):
        yield from torch.randperm(windows, generator=torch.Generator().manual_seed(epoch)).tolist()


def slow_block(student: Any, dense: Any, layers: range, windows: Tensor, share: float) -> None:
    """Train some layers of a whole model of transformers, by the plainest loop there is."""
    prefix = tuple(f"model.layers.{i}." for i in layers)
    learning = {n: p for n, p in student.named_parameters() if n.startswith(prefix)}
    masks = {n: (p != 0).float() for n, p in learning.items() if n.endswith("proj.weight")}
    student.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learning.values(), lr=0.0, betas=(0.9, 0.95))
    steps = list(order_of(len(windows), 2))
    last = layers.stop == len(student.model.layers)
    for step, number in enumerate(steps):
        ids = windows[number : number + 1]
        with torch.no_grad():
            wanted = dense(ids, output_hidden_states=True)
        found = student(ids, output_hidden_states=True)
        if last:
            log_p, log_q = wanted.logits[0].log_softmax(-1), found.logits[0].log_softmax(-1)
            apart = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            after = log_q[:-1].gather(1, ids[0, 1:, None]).mean()
            loss = (1 - share) * apart - share * after
        else:
            y, x = wanted.hidden_states[layers.stop], found.hidden_states[layers.stop]
            loss = ((x - y).square().sum(-1) / y.square().sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            learning[name].grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
        warm = min(1.0, (step + 1) / len(steps) * 16)
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        optimizer.param_groups[0]["lr"] = RATE * warm * cosine
        optimizer.step()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("share", [slow(0.0), 0.5])
def test_blocks_learn_as_a_slow_loop_does(tmp_path: Path, file: Path, share: float) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=5)
    options = {**OPTIONS, "calibration": str(file), "distill_next_token": share}
    secateur.prune(folder, output=tmp_path / "plain", **{**options, "distill_epochs": 0})
    report = secateur.prune(folder, output=tmp_path / "out", **options, distill_block_layers=3)
    dense, student = load(folder), load(tmp_path / "plain")
    for start in (0, 2):
        slow_block(student, dense, range(start, start + 3), tiny_windows(6, 24), share)
    expected, before = dict(student.named_parameters()), weights_of(tmp_path / "plain")
    after = weights_of(tmp_path / "out")
    apart, moved = 0.0, 0.0
    for name, value in before.items():
        own = float((expected[name].detach() - value).square().sum())
        moved += own
        apart += float((after[name] - expected[name].detach()).square().sum())
        assert (own > 0) == (".layers." in name), name
        if name.endswith("proj.weight"):
            assert torch.equal(after[name] == 0, value == 0), name
    assert apart <= 0.05**2 * moved  # the teacher's log p is stored in float16
    told = report.manifest["distillation"]
    assert (told["blocks"], told["block_layers"]) == (2, 3)
    assert told["hidden_after"] < told["hidden_before"]
    assert told["loss_after"] < told["loss_before"]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "family", slow_but(["llama"], ["llama", "gpt2", "gemma3", "mixtral", "opt"])
)
def test_one_block_with_all_layers_is_the_whole_model(
    tmp_path: Path, file: Path, family: str
) -> None:
    folder = save_tiny(tmp_path / "model", family)
    options = {**OPTIONS, "calibration": str(file)}
    told, found = [], []
    for layers in (0, 9):
        out = tmp_path / f"out-{layers}"
        report = secateur.prune(folder, output=out, **options, distill_block_layers=layers)
        told.append(report.manifest["distillation"])
        found.append(weights_of(out))
    whole, block = told
    for key in ("loss_before", "loss_after"):  # the teacher's log p is stored in float16
        assert block[key] == pytest.approx(whole[key], rel=0.1, abs=1e-5), key
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
    options = {**OPTIONS, "calibration": str(file)}
    report = secateur.prune(folder, output=tmp_path / "out", **options, distill_block_layers=2)
    told = report.manifest["distillation"]
    assert told["hidden_after"] < told["hidden_before"]
    assert told["loss_after"] < told["loss_before"]
    assert not list((tmp_path / "out").rglob("*values*"))


def test_a_layer_that_stays_dense_is_not_trained(tmp_path: Path, file: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=6)
    secateur.prune(
        folder, output=tmp_path / "out", **OPTIONS, calibration=str(file),
        distill_block_layers=2, include=("model.layers.2.*", "model.layers.5.*"),
    )  # fmt: skip
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    changed = {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"2", "5"}


@pytest.mark.parametrize(
    ("stage", "steps"),
    [
        slow(("dense hidden states", 14)),
        slow(("dense predictions", 3)),
        slow(("distilling layers 0 to 1", 5)),
        ("distilling layers 1 to 2", 1),
        slow(("distilling layers 2 to 3", 7)),
    ],
)
def test_stopped_in_a_block_and_gone_on_with_gives_the_same(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, stage: str, steps: int
) -> None:
    monkeypatch.setattr("secateur.workflows.prune.learning.SAVE_MINUTES", 0.0)
    folder = save_tiny(tmp_path / "model", num_hidden_layers=4)
    options = {**OPTIONS, "calibration": str(file), "distill_block_layers": 2}
    whole = secateur.prune(folder, output=tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        secateur.prune(folder, output=tmp_path / "again", progress=StopAt(stage, steps), **options)
    again = secateur.prune(folder, output=tmp_path / "again", resume=True, **options)
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.manifest["distillation"] == again.manifest["distillation"]


WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 10,
        "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip


def peaks_of(folder: Path, calibration: Path, layers: int) -> secateur.PlanResult:
    return secateur.plan(
        folder, **OPTIONS, calibration=str(calibration), distill_block_layers=layers
    )


def test_blocks_take_over_where_the_whole_does_not_fit(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "model", **WIDE)
    options = {**OPTIONS, "distill_epochs": 1, "calibration": str(file)}
    needs = {n: peaks_of(folder, file, n).plan.distilling_bytes for n in (0, 4)}
    room = (needs[0] + needs[4]) / 2 - needs[4]
    plans = [peaks_of(folder, file, 4).peak_bytes]
    budget = (plans[0] + room) / 2**30
    with caplog.at_level(logging.WARNING):
        stop = StopAt("distilling layers 0 to 3", 2)
        with pytest.raises(StoppedError):
            secateur.prune(
                folder, output=tmp_path / "out", progress=stop, memory_budget_gib=budget, **options
            )
    assert "distilling in blocks of 4 decoder layers" in caplog.text
    assert f"the budget {budget:.2f} GiB" in caplog.text
    # the way of a stopped run stays, also where the whole would fit now
    report = secateur.prune(folder, output=tmp_path / "out", resume=True, **options)
    assert report.manifest["distillation"]["block_layers"] == 4
    assert report.manifest["plan"]["block_layers"] == 4
    assert not list((tmp_path / "out").rglob("*predictions*"))
    with pytest.raises(MemoryBudgetError, match="--distill-epochs 0"):
        secateur.prune(
            folder, output=tmp_path / "no", memory_budget_gib=budget, **options,
            distill_block_layers=0,
        )  # fmt: skip


def live_bytes() -> int:
    """The bytes of the storages of all floating tensors and masks that there are."""
    kinds = (torch.float32, torch.bool)
    storages = {}
    for found in gc.get_objects():
        tensor = type(found) in (Tensor, torch.nn.Parameter)
        if tensor and not found.is_meta and found.dtype in kinds:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("layers", [2, 0])
def test_a_block_needs_the_memory_of_its_layers_and_the_head(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """With gradients, moments and masks, when the backward of a step is done."""
    folder = save_tiny(tmp_path / "model", **WIDE)
    most, begun = [0], live_bytes()
    hold = Masks.hold_gradients

    def counting(masks: Masks, model: Any) -> None:
        hold(masks, model)
        most[0] = max(most[0], live_bytes() - begun)

    monkeypatch.setattr(Masks, "hold_gradients", counting)
    stop = StopAt("distilling layers 2 to 3" if layers else "distilling", 3)
    with pytest.raises(StoppedError):
        secateur.prune(
            folder, output=tmp_path / "out", **OPTIONS, calibration=str(file), progress=stop,
            distill_block_layers=layers,
        )  # fmt: skip
    sizes = weights_of(folder)
    of_layer = sum(x.numel() for n, x in sizes.items() if ".layers.0." in n)
    outside = sum(x.numel() for n, x in sizes.items() if ".layers." not in n)
    bound = (2 + 2) * 16 * of_layer + 4 * outside
    assert (most[0] <= bound) == bool(layers)
    assert most[0] > 2 * 16 * of_layer


def test_a_loaded_model_is_not_distilled_in_blocks() -> None:
    with pytest.raises(RecipeError, match="in memory as a whole"):
        secateur.prune(
            tiny_model("llama"), **OPTIONS, calibration=tiny_windows(2), distill_block_layers=2
        )


def test_rounded_weights_learn_on_their_grid_in_blocks(tmp_path: Path, file: Path) -> None:
    from secateur.quantization.groups import GroupGrid

    folder = save_tiny(tmp_path / "model")
    options = {**OPTIONS, "calibration": str(file), "method": "sparsegpt",
               "method_parameters": {"bits": 4, "group": 32}}  # fmt: skip
    secateur.prune(folder, output=tmp_path / "plain", **{**options, "distill_epochs": 0})
    secateur.prune(folder, output=tmp_path / "out", **options, distill_block_layers=2)
    grid, moved = GroupGrid(4, 32), 0
    before, after = weights_of(tmp_path / "plain"), weights_of(tmp_path / "out")
    for name in before:
        if name.endswith("proj.weight"):
            codes, scales = grid.quantize(before[name])
            again = grid.codes(after[name], scales)
            assert torch.equal(grid.dequantize(again, scales), after[name]), name
            moved += int((again != codes).sum())
    assert moved > 0
    told = json.loads((tmp_path / "out" / "secateur" / "manifest.json").read_text())
    assert told["distillation"]["blocks"] == 2
