"""Fitting the dense model: the target of solvers, and the tuning of pruned layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zoo import tiny_model, tiny_windows, zeros_of

import secateur
from secateur.calibration.statistics.gram import Gram
from secateur.calibration.windows import save_windows
from secateur.engine.prune import reconstruction
from secateur.engine.prune.reconstruction import output_error
from secateur.engine.stream.calls import call_layer, first_inputs, layer_calls
from secateur.errors import RecipeError
from secateur.models.architecture import describe, linears_of
from secateur.quantization.groups import GroupGrid
from secateur.sparsity.column_sweep import kept_weights
from secateur.sparsity.methods import compose

FAMILIES = ["llama", "gpt2", "phi3", "gemma2", "opt"]


@torch.no_grad()
def hidden_states(model, windows):
    """The hidden states after every decoder layer, plainly."""
    layers = describe(model).layers(model)
    call = layer_calls(model, layers, [windows])
    states = [first_inputs(model, layers, windows)]
    for layer, how in zip(layers, call, strict=True):
        states.append(call_layer(layer, states[-1], how))
    return states


@pytest.fixture
def tuning_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the learning rate of tuning."""

    def at(rate: float) -> None:
        monkeypatch.setattr(reconstruction, "LEARNING_RATE", rate)

    return at


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_lowers_the_error_and_keeps_every_zero(
    family: str, tuning_at: Callable[[float], None]
) -> None:
    tuning_at(3e-3)
    windows = tiny_windows(6)
    dense = hidden_states(tiny_model(family), windows)[-1]
    plain, tuned = tiny_model(family), tiny_model(family)
    options = {"method": "wanda", "sparsity": 0.5, "calibration": windows}
    secateur.prune(plain, **options)
    report = secateur.prune(tuned, **options, tune_passes=8)
    before = float(output_error(hidden_states(plain, windows)[-1], dense))
    after = float(output_error(hidden_states(tuned, windows)[-1], dense))
    assert after < 0.7 * before
    for layer in report.layers:
        record = layer.reconstruction
        assert record["error_after"] < record["error_before"]
    assert after == pytest.approx(report.layers[-1].reconstruction["error_after"], rel=1e-4)
    for name, zeros in zeros_of(tuned).items():
        assert int(zeros.sum()) == round(0.5 * zeros.shape[1]) * zeros.shape[0], name
    assert all(p.requires_grad and p.grad is None for p in tuned.parameters())


@pytest.mark.parametrize(("family", "rate"), [("llama", 3e-3), ("gpt2", 1e-3)])
def test_rounded_layers_are_tuned_on_their_grid(
    family: str, rate: float, tuning_at: Callable[[float], None]
) -> None:
    tuning_at(rate)
    windows, grid = tiny_windows(6), GroupGrid(4, 32)
    plain, tuned = tiny_model(family), tiny_model(family)
    options = {"method": "sparsegpt", "sparsity": 0.5, "calibration": windows,
               "method_parameters": {"bits": 4, "group": 32}}  # fmt: skip
    secateur.prune(plain, **options)
    report = secateur.prune(tuned, **options, tune_passes=16)
    for layer in report.layers:
        record = layer.reconstruction
        assert record["error_after"] < 0.95 * record["error_before"]
    first = describe(plain).layers(plain)[0], describe(tuned).layers(tuned)[0]
    before, after = (linears_of(layer, "0") for layer in first)
    moved, back = 0, 0
    for name, linear in before.items():
        codes, scales = grid.quantize(linear.weight)
        again = grid.codes(after[name].weight, scales)
        assert torch.equal(grid.dequantize(again, scales), after[name].weight)
        moved += int((again != codes).sum())
        kept = kept_weights(linear.weight)
        assert torch.equal(kept_weights(after[name].weight), kept)
        back += int(after[name].weight[kept & (linear.weight == 0)].count_nonzero())
    assert moved > back > 0
    for linear in zeros_of(tuned).values():
        assert int(linear.sum()) >= linear.numel() // 2


PATTERNED = [
    {"method": "wanda", "sparsity": 0.5},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "magnitude", "pattern": "4x2", "sparsity": 0.5},
]


@pytest.mark.parametrize(
    ("family", "options"), [*(("llama", one) for one in PATTERNED), ("gpt2", PATTERNED[2])]
)
def test_masks_may_change_but_not_their_pattern(
    family: str, options: dict, tuning_at: Callable[[float], None]
) -> None:
    tuning_at(1e-2)
    windows = tiny_windows(6)
    masks = []
    for passes in (0, 6):
        model = tiny_model(family)
        secateur.prune(model, calibration=windows, **options, tune_passes=passes)
        masks.append(zeros_of(model))
    plain, changed = masks
    pattern = compose(options["method"], options.get("pattern", "unstructured")).pattern
    differ = 0
    for name, zeros in plain.items():
        differ += int((changed[name] != zeros).sum())
        assert int(changed[name].sum()) == int(zeros.sum())
        # with the mask as score, the pattern gives the mask back: so it is one it allows
        again = pattern.mask((~changed[name]).float(), options.get("sparsity", 0.5))
        assert torch.equal(again, ~changed[name])
    assert differ > 20


def test_bfloat16_is_tuned_in_float32_and_stays_bfloat16() -> None:
    windows = tiny_windows(6)
    model = tiny_model("llama").to(torch.bfloat16)
    report = secateur.prune(
        model, method="magnitude", pattern="2:4", calibration=windows, tune_passes=4
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.sparsity == 0.5
    assert all(
        x.reconstruction["error_after"] < x.reconstruction["error_before"] for x in report.layers
    )


def test_layers_left_dense_are_not_tuned() -> None:
    windows, model, untouched = tiny_windows(4), tiny_model("llama"), tiny_model("llama")
    layers = describe(model).layers_path
    report = secateur.prune(
        model, method="wanda", sparsity=0.5, calibration=windows, tune_passes=2,
        include=(f"{layers}.1.*",),
    )  # fmt: skip
    for before, after in zip(
        describe(untouched).layers(untouched)[0].parameters(),
        describe(model).layers(model)[0].parameters(),
        strict=True,
    ):
        assert torch.equal(before, after)
    assert [bool(layer.reconstruction) for layer in report.layers][:2] == [False, True]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "olmo2", "glm4"])
@torch.no_grad()
def test_asymmetric_fitting_prunes_the_weight_of_the_slow_formula(family: str) -> None:
    """Layer 1 sees inputs of a pruned layer 0; its linears are compared with least squares.

    Wanted of a linear that writes to the residual stream are the dense outputs and what is missing
    there by then; the others stay, or where no writers are known, are to give the dense outputs.
    Where a norm follows a writer, its root mean square and its gain are those of the dense model.
    """
    windows = tiny_windows(6)
    model, dense = tiny_model(family), tiny_model(family)
    secateur.prune(
        model, score="wanda", solver="zero", sparsity=0.5, calibration=windows, asymmetric=True,
        asymmetric_damping=0.1, micro_batch_tokens=2 * windows.shape[1],
    )  # fmt: skip
    architecture = describe(model)
    norms = dict(architecture.normed_writers)
    writers = architecture.writers or tuple(norms)
    names = [architecture.groups[group][0] for group in (0, 1, 3)]
    (pruned, weights), (before, wanted_weights) = (
        second_layer(one, windows, {*names, *writers, *norms.values()}) for one in (model, dense)
    )
    for name in names:
        weight, wanted_weight = weights[name], wanted_weights[name]
        wanted = before[name] @ wanted_weight.t()
        if writers and name not in writers:
            assert torch.equal(weight[weight != 0], wanted_weight[weight != 0])
            continue
        inputs, missing = pruned[name], torch.zeros_like(wanted)
        if writers:
            missing += (before["stream"] - pruned["stream"]).flatten(0, 1).double()
            for earlier in writers[: writers.index(name)]:
                last = norms.get(earlier, earlier)
                missing += before[f"{last}/out"] - pruned[f"{last}/out"]
        if name in norms:
            root = (wanted.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            gain = before[f"{norms[name]}/out"][0] / (wanted[0] / root[0])
            inputs, wanted, missing = inputs / root, wanted / root, missing / gain
        wanted += missing
        # with rows for the damping: [X̂; √λ I] W*ᵀ = [T; √λ Wᵀ]
        damping = 0.1 * inputs.square().sum(0).mean()
        eye = damping.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)
        left = torch.cat([inputs, eye])
        right = torch.cat([wanted, eye @ wanted_weight.t()])
        target = torch.linalg.lstsq(left, right).solution.t()
        kept = weight != 0
        assert 0 < int((~kept).sum()) < kept.numel()
        assert torch.allclose(weight[kept], target[kept], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(weight[kept], wanted_weight[kept], rtol=1e-3, atol=1e-4)


def second_layer(model, windows, names):
    """What passes through linears of layer 1 in a plain forward, and their weights, in float64."""
    architecture = describe(model)
    layers = architecture.layers(model)
    calls = layer_calls(model, layers, [windows])
    linears, modules = linears_of(layers[1], ""), dict(layers[1].named_modules())
    found: dict[str, torch.Tensor] = {}

    def keep(part, module, args, out):
        found[part] = args[0].reshape(-1, args[0].shape[-1]).double()
        found[f"{part}/out"] = out.reshape(-1, out.shape[-1]).double()

    handles = [modules[name].register_forward_hook(functools.partial(keep, name)) for name in names]
    found["stream"] = call_layer(layers[0], first_inputs(model, layers, windows), calls[0])
    call_layer(layers[1], found["stream"], calls[1])
    for handle in handles:
        handle.remove()
    return found, {name: x.weight.double() for name, x in linears.items() if name in names}


@pytest.mark.parametrize(("family", "sequential"), [("llama", "group"), ("gpt2", "layer")])
def test_fast_matmuls_touch_the_forwards_and_not_the_statistics(
    family: str, sequential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 outputs, float32 sums; wherever the test runs, as if it were the faster."""
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: True)
    inside: list[bool] = []

    def update(self: Gram, x: torch.Tensor) -> None:
        inside.append(torch.is_autocast_enabled("cpu"))
        update_really(self, x)

    update_really = Gram.update
    monkeypatch.setattr(Gram, "update", update)
    windows = tiny_windows(6)
    exact, fast = tiny_model(family), tiny_model(family)
    options = {"method": "sparsegpt", "sparsity": 0.5, "calibration": windows,
               "sequential": sequential}  # fmt: skip
    secateur.prune(exact, **options)
    secateur.prune(fast, **options, fast_matmuls=True)
    assert inside
    assert not any(inside)
    assert not torch.is_autocast_enabled("cpu")
    differ = 0.0
    for one, two in zip(exact.parameters(), fast.parameters(), strict=True):
        differ = max(differ, float((one - two).detach().abs().max()))
        assert (one == 0).sum() == (two == 0).sum()
    assert differ > 0  # else nothing was fast
    states = [hidden_states(m, windows)[-1] for m in (exact, fast, tiny_model(family))]
    assert output_error(states[1], states[0]) < 0.1 * output_error(states[1], states[2])


def test_parking_on_disk_changes_nothing(tmp_path: Path) -> None:
    source, windows = tmp_path / "source", tiny_windows(6)
    tiny_model("llama").save_pretrained(source)
    file = tmp_path / "w.safetensors"
    save_windows(windows, file)
    found = []
    for place in ("memory", "disk"):
        out = tmp_path / place
        secateur.prune(
            source, output=out, effort="best", sparsity=0.5, calibration=file, tune_passes=2,
            generated_windows=3, activations=place, micro_batch_tokens=40,
        )  # fmt: skip
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="asymmetric"):
        secateur.prune(
            tiny_model("llama"), method="wanda", sparsity=0.5, calibration=tiny_windows(2),
            asymmetric=True, sequential="layer",
        )  # fmt: skip
