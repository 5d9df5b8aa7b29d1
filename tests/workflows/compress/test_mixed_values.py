"""`compress --values auto --max-loss-increase`: the values of each matrix within a bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import secateur
from secateur.calibration.windows import load_windows
from secateur.errors import RecipeError
from secateur.runtime.packed import PackedCheckpoint
from trained import save_trained, source_text

OPTIONS = {"windows": 16, "sequence_length": 64, "group_size": 128, "values": "auto"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model without a tenth of its weights, so that rounding shows in the loss."""
    place = tmp_path_factory.mktemp("mixed")
    save_trained(place / "dense", steps=80)
    secateur.prune(place / "dense", output=place / "pruned", method="magnitude", sparsity=0.1)
    (place / "text.txt").write_text(source_text(held_out=True)[:20_000])
    return place


@torch.no_grad()
def loss_of(folder: Path, windows: torch.Tensor) -> float:
    logits = secateur.load(folder, dtype=torch.float32)(input_ids=windows).logits.float()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def test_the_loss_of_the_result_stays_within_the_bound(pruned: Path, tmp_path: Path) -> None:
    source, text = pruned / "pruned", pruned / "text.txt"
    loose = secateur.compress(
        source, output=tmp_path / "a", calibration=text, max_loss_increase=5.0, **OPTIONS
    )
    everything = loose.rounding["chosen"]
    assert everything["matrices"] == {"int4": 14}
    worst, best = (everything["uniform_loss_increase"][v] for v in ("int4", "int8"))
    assert worst > best
    bound = best + 0.4 * (worst - best)
    found = secateur.compress(
        source, output=tmp_path / "b", calibration=text, max_loss_increase=bound, **OPTIONS
    )
    chosen = found.rounding["chosen"]
    assert set(chosen["matrices"]) == {"int8", "int4"}
    assert chosen["loss_increase"] <= bound
    layouts = PackedCheckpoint(tmp_path / "b").layouts.values()
    assert sorted(x.values for x in layouts) == sorted(
        values for values, count in chosen["matrices"].items() for _ in range(count)
    )
    assert loose.file_bytes < found.file_bytes
    assert "change of the loss" in str(found)


def test_the_measured_loss_is_that_of_the_packed_model(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On windows that are not among those of the rounding."""
    monkeypatch.setattr("secateur.precision._fast_bfloat16", lambda device: False)
    judged = []

    def noted(path: Path) -> torch.Tensor:
        judged.append(load_windows(path))
        fitted = {tuple(w) for w in load_windows(path.with_name("fitted.safetensors")).tolist()}
        assert not fitted & {tuple(w) for w in judged[-1].tolist()}
        return judged[-1]

    monkeypatch.setattr("secateur.workflows.compress.mixed_values.load_windows", noted)
    options = {**OPTIONS, "calibration": pruned / "text.txt", "max_loss_increase": 5.0}
    found = secateur.compress(pruned / "pruned", output=tmp_path / "out", **options)
    assert judged[0].shape == (4, 64)
    rise = loss_of(tmp_path / "out", judged[0]) - loss_of(pruned / "pruned", judged[0])
    assert rise == pytest.approx(found.rounding["chosen"]["loss_increase"], abs=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": "int4", "calibration": "t.txt"}, "chooses the values, but they are 'int4'"),
        ({}, "needs text"),
        ({"max_loss_increase": 0.0, "calibration": "t.txt"}, "greater than 0"),
    ],
)
def test_a_bound_that_cannot_work_is_refused(options, said, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        secateur.compress("x", output=tmp_path / "o", **{"max_loss_increase": 0.1, **options})
