"""`compress --values auto --max-loss-increase`: the values of each matrix within a bound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import load_windows
from secateur.errors import RecipeError
from secateur.evaluation.perplexity import LossComparison, LossIncrease
from secateur.reporting.models import CompressResult
from secateur.runtime.packed import PackedCheckpoint
from secateur.runtime.storage_plan import ChosenValues
from secateur.steps.compress import MOST_CHOICES, MixedChoice
from trained import save_trained, source_text

LARGE = 32.0

OPTIONS = {"windows": 36, "sequence_length": 64, "group_size": 128, "values": "auto"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model without a tenth of its weights, with one large column in every matrix that
    a norm feeds, so that rounding shows in the loss.
    """
    place = tmp_path_factory.mktemp("mixed")
    save_trained(place / "dense", steps=80)
    weights = load_file(place / "dense" / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[0] /= LARGE
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                            "up_proj.weight")):  # fmt: skip
            weight[:, 0] *= LARGE
    save_file(weights, place / "dense" / "model.safetensors", {"format": "pt"})
    secateur.prune(place / "dense", output=place / "pruned", method="magnitude", sparsity=0.1)
    (place / "text.txt").write_text(source_text(held_out=True)[:20_000])
    return place


Judged = list[tuple[str, torch.Tensor, LossIncrease]]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Every judgement of a packed folder: its windows' name, the windows, and the result."""
    found: Judged = []
    original = LossComparison.increase

    def noted(judge: LossComparison, folder: Path) -> LossIncrease:
        rise = original(judge, folder)
        found.append((judge.file.stem, judge.windows, rise))
        return rise

    monkeypatch.setattr(LossComparison, "increase", noted)
    return found


def test_the_loss_of_the_result_stays_within_the_bound(
    pruned: Path, tmp_path: Path, judged: Judged
) -> None:
    source, text = pruned / "pruned", pruned / "text.txt"
    loose = secateur.compress(
        source, output=tmp_path / "a", calibration=text, max_loss_increase=5.0, embeddings="int4",
        **OPTIONS,
    )  # fmt: skip
    assert loose.rounding["head"] == "calibrated"
    assert loose.embedding_values == "int4 g128"
    everything = loose.rounding["chosen"]
    assert everything["matrices"] == {"int4": 14}
    worst, best = (everything["uniform_loss_increase"][v] for v in ("int4", "int8"))
    assert worst > best
    bound = best + 0.4 * (worst - best)
    found = secateur.compress(
        source, output=tmp_path / "b", calibration=text, max_loss_increase=bound, **OPTIONS
    )
    chosen = found.rounding["chosen"]
    assert {"int8", "unchanged"} & set(chosen["matrices"])
    kinds = [name for name, _, _ in judged]
    assert kinds == ["chosen", "judged", *["chosen"] * (len(kinds) - 3), "judged"]
    tries = len(kinds) - 3
    assert judged[-2][2].cautious <= bound or tries == MOST_CHOICES
    assert (found.broken == []) is (chosen["loss_increase"] <= bound)
    stored = Counter(x.values for x in PackedCheckpoint(tmp_path / "b").layouts.values())
    for values in ("int8", "int4"):
        assert stored[values] == chosen["matrices"].get(values, 0)
    assert loose.file_bytes < found.file_bytes
    assert "change of the loss" in str(found)


def test_the_promised_loss_is_what_evaluate_says_of_the_folder(
    pruned: Path, tmp_path: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On windows that neither rounded nor chose, with activations rounded as the kernels do."""
    parts: dict[str, Any] = {}
    save_parts = WindowReader.save_parts

    def noted(reader: Any, text: str, options: Any, files: list[Path], *args: Any) -> None:
        save_parts(reader, text, options, files, *args)
        parts.update({file.stem: load_windows(file) for file in files})

    monkeypatch.setattr(WindowReader, "save_parts", noted)
    options = {**OPTIONS, "calibration": pruned / "text.txt", "max_loss_increase": 5.0}
    found = secateur.compress(pruned / "pruned", output=tmp_path / "out", **options)
    assert [name for name, _, _ in judged] == ["chosen", "judged"]
    _, windows, _ = judged[-1]
    assert windows.shape == (6, 64)
    seen = {tuple(w) for w in [*parts["fitted"].tolist(), *parts["chosen"].tolist()]}
    assert not seen & {tuple(w) for w in windows.tolist()}
    monkeypatch.setattr(
        "secateur.evaluation.perplexity.evaluation_windows", lambda *_, **__: windows
    )
    evaluation = secateur.evaluate(
        tmp_path / "out", dense=pruned / "pruned", text=pruned / "text.txt", sequence_length=64
    )
    chosen, (moved,) = found.rounding["chosen"], evaluation.divergence
    assert evaluation.protocol["activations"] == "int8 g64"
    assert chosen["loss_increase"] == pytest.approx(moved.loss_change, abs=1e-4)
    error = chosen["loss_increase_standard_error"]
    assert error == pytest.approx(moved.loss_change_standard_error, rel=0.02)
    assert chosen["judged_tokens"] == 6 * 63
    assert f"± {error:.4f} nats per token on 378 tokens that did not choose" in str(found)
    # the search rounds activations too, so it is near on the windows that it saw
    assert chosen["searched_loss_increase"] == pytest.approx(judged[0][2].mean, abs=0.02)


def test_a_packed_model_that_loses_too_much_is_chosen_again(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search said 0.05 and the packed model has 0.07: the next search aims at 0.03."""
    rises = iter([LossIncrease(0.06, 0.01, 9), LossIncrease(0.03, 0.01, 9)])
    last = LossIncrease(0.051, 0.004, 9)
    aims = []
    original = MixedChoice.within

    def within(choice: MixedChoice, bound: float) -> ChosenValues:
        aims.append(bound)
        return original(choice, bound)

    monkeypatch.setattr(MixedChoice, "within", within)
    monkeypatch.setattr(
        LossComparison,
        "increase",
        lambda judge, _: last if judge.file.stem == "judged" else next(rises),
    )
    options = {**OPTIONS, "calibration": pruned / "text.txt", "max_loss_increase": 0.05}
    found = secateur.compress(pruned / "pruned", output=tmp_path / "out", **options)
    assert aims == pytest.approx([0.05, 0.03])
    assert found.rounding["chosen"]["loss_increase"] == 0.051
    assert "--max-loss-increase is broken: 0.0510 was measured" in found.broken[0]
    assert "--max-loss-increase is broken" in str(found)
    assert CompressResult.model_validate(found.to_json()).broken == found.broken


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": "int4", "calibration": "t.txt"}, "chooses the values"),
        ({}, "needs text"),
        ({"max_loss_increase": 0.0, "calibration": "t.txt"}, "more than 0"),
    ],
)
def test_a_bound_that_cannot_work_is_refused(options, said, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        secateur.compress("x", output=tmp_path / "o", **{"max_loss_increase": 0.1, **options})
