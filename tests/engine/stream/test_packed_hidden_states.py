"""Models that carry more than hidden states: embeddings of layers, AltUp, shared keys."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import slow_but
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from zoo import matrices, tiny_model, tiny_windows, weight_of

import secateur
from secateur.engine.prune import layer as pruning
from secateur.engine.search.depth import influences
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.calls import PackedHiddenStates, call_layer
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.errors import ArchitectureError
from secateur.models.skeleton import quiet_transformers
from secateur.models.targets import ModelTarget, walk_layers
from secateur.progress import Silent

NAMES = ("gemma4_text small", "gemma4_text shared", "gemma3n_text", "gemma3n_text shared")
WINDOWS = tiny_windows(3, 12)


def logits_of(model: nn.Module, folder: Path | None) -> Tensor:
    """The logits of all windows, layer by layer, two windows at a time."""
    calibration = CalibrationStream(ModelTarget(model), WINDOWS, 24, folder is None, folder).open()
    for number, layer in calibration.walk():
        for batch in calibration.batches():
            out = call_layer(layer, calibration.read(batch), calibration.stream.call(number, batch))
            calibration.write(batch, out)
    calibration.advance(len(calibration.stream.target.layers))
    rows = range(len(WINDOWS))
    return torch.stack(
        [calibration.stream.outer.head(r, calibration.read(slice(r, r + 1))) for r in rows]
    )


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_layer_by_layer_is_the_model(name: str, place: str, tmp_path: Path) -> None:
    model: Any = tiny_model(name)
    found = logits_of(model, tmp_path if place == "disk" else None)
    expected = model(input_ids=WINDOWS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # Values of a token are those of one layer only.
    values = [x for x in tmp_path.rglob("*") if x.is_file() and "token-values" in str(x)]
    assert [x.stat().st_size for x in values] == [WINDOWS.numel() * 8 * 4] * (place == "disk")


def test_what_is_carried_is_packed_without_loss() -> None:
    carried = PackedHiddenStates(6, 3, {"full": ((2, 4), (2, 5)), "sliding": ((1, 4),)})
    hidden = torch.randn(3, 2, 7, 6)
    full = torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 5)
    packed = carried.pack(hidden, {"full": full})
    assert packed.shape == (2, 7, 3 * 6 + 2 * 4 + 2 * 5 + 4)
    found, shared = carried.unpack(packed)
    assert torch.equal(found, hidden)
    assert all(torch.equal(a, b) for a, b in zip(shared["full"], full, strict=True))
    assert shared["sliding"][0].shape == (2, 1, 7, 4)
    assert not shared["sliding"][0].any()


@pytest.mark.parametrize("name", slow_but(["gemma3n_text shared"], NAMES))
def test_gradients_equal_autograd(name: str) -> None:
    """The loss also depends on a layer through the keys and values that later layers read."""
    ours, plain = tiny_model(name), tiny_model(name)
    secateur.prune(ours, method="taylor", sparsity=0.4, calibration=WINDOWS)
    total = torch.zeros(())
    for ids in WINDOWS:
        logits: Tensor = plain(input_ids=ids[None], use_cache=False).logits
        total = total + cross_entropy(logits[0, :-1].float(), ids[1:])
    (total / len(WINDOWS)).backward()
    pruned = matrices(ours)
    within = {n: m for n, m in matrices(plain).items() if ".layers." in n and "altup" not in n}
    for matrix, module in within.items():
        score = (weight_of(module) * module.weight.grad).abs()
        zeros = weight_of(pruned[matrix]) == 0
        assert int(zeros.sum()) == round(0.4 * score.numel()), matrix
        least = score.flatten().sort().values[: zeros.sum()].sum()
        assert torch.allclose(score[zeros].sum(), least, rtol=1e-3), matrix


@pytest.mark.parametrize("name", slow_but(["gemma3n_text shared"], NAMES))
def test_runs_on_disk_with_the_dense_model_beside_are_those_in_memory(
    name: str, tmp_path: Path
) -> None:
    model, options = saved_in(tmp_path, name), {
        "method": "sparsegpt", "pattern": "2:4", "asymmetric": True, "tune_passes": 1,
        "micro_batch_tokens": 24,
    }  # fmt: skip
    reports = [
        secateur.prune(model, calibration=WINDOWS, **options),
        prune_on_disk(tmp_path, **options),
    ]
    for layer in [layer for report in reports for layer in report.layers]:
        record = layer.reconstruction
        assert record["error_after"] < record["error_before"]
    assert_is_the_model(tmp_path, model)


def saved_in(place: Path, name: str) -> Any:
    """A model, which is also written to `dense` with its windows beside it."""
    model = tiny_model(name)
    with quiet_transformers():
        model.save_pretrained(place / "dense")
    save_file({"input_ids": WINDOWS}, place / "windows.safetensors")
    return model


def prune_on_disk(place: Path, **options: Any) -> Any:
    """Prune `dense` to `out` with hidden states on disk."""
    windows = str(place / "windows.safetensors")
    return secateur.prune(
        place / "dense", output=place / "out", calibration=windows, activations="disk", **options
    )


def assert_is_the_model(place: Path, model: nn.Module) -> None:
    """The tensors of `out` are those of a model, bit for bit."""
    made, expected = load_file(place / "out" / "model.safetensors"), model.state_dict()
    assert len(made) > 50
    assert all(torch.equal(value, expected[name]) for name, value in made.items())


def test_a_stopped_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers share is on disk with the hidden states; the rest is computed anew."""
    model = saved_in(tmp_path, "gemma3n_text shared")
    options = {"method": "wanda", "sparsity": 0.5}
    whole = secateur.prune(model, calibration=WINDOWS, **options)
    solved = pruning.OpenLayer.solved

    def stops(opened: pruning.OpenLayer, *group: Any) -> Any:
        if opened.index == 3:
            raise KeyboardInterrupt
        return solved(opened, *group)

    monkeypatch.setattr(pruning.OpenLayer, "solved", stops)
    with pytest.raises(KeyboardInterrupt):
        prune_on_disk(tmp_path, **options)
    monkeypatch.undo()
    again = prune_on_disk(tmp_path, resume=True, **options)
    assert again.manifest.cost.resumed
    assert again.sparsity == whole.sparsity
    assert_is_the_model(tmp_path, model)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches multiply in bfloat16 where that is fast; here they do not."""
    monkeypatch.setattr(
        "secateur.engine.stream.hidden_states.fast_matmuls", lambda device: nullcontext()
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_search_passes_windows_one_by_one(name: str) -> None:
    """It does not say which window it passes, so what depends on the tokens travels along."""
    model: Any = tiny_model(name)
    outer = EmbeddingAndHead(ModelTarget(model), WINDOWS)
    rows = [2, 1]
    states = outer.embedded(rows)
    for number, layer in walk_layers(outer.target):
        states = [outer.run(number, layer, x) for x in states]
    found = torch.stack([outer.head(row, x) for row, x in zip(rows, states, strict=True)])
    expected = model(input_ids=WINDOWS[rows], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert outer.states(states[0]).shape[-1] == (128 if "gemma3n" in name else 32)


@pytest.mark.usefixtures("exact")
def test_influences_are_of_hidden_states_alone() -> None:
    """Keys and values that travel with them do not count."""
    model: Any = tiny_model("gemma4_text shared")
    outer = EmbeddingAndHead(ModelTarget(model), WINDOWS)
    found = influences(outer, Silent())
    with torch.no_grad():
        out = model.model(input_ids=WINDOWS, use_cache=False, output_hidden_states=True)
    states = out.hidden_states[:5]  # the last one is normed
    expected = [1 - cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]
    assert found[:4] == pytest.approx([float(x) for x in expected], abs=1e-4)


def test_values_that_are_not_one_for_each_token_are_refused() -> None:
    model: Any = tiny_model("gemma4_text small")

    class Odd(type(model.model)):  # type: ignore[misc]
        def project_per_layer_inputs(self, *args: Any) -> Tensor:
            return super().project_per_layer_inputs(*args).sum(1, keepdim=True)

    model.model.__class__ = Odd
    with pytest.raises(ArchitectureError, match="decoder layer 0"):
        secateur.prune(model, method="wanda", sparsity=0.5, calibration=WINDOWS)
