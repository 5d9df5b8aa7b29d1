"""A model in, a draft out: what it says it brings is what an oracle finds of the same folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import runner
from fixed_times import PARENT, drawing_time, use_fixed_times
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from with_kernels import needs_kernels
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import load_windows, save_windows
from secateur.errors import ArchitectureError
from secateur.evaluation.acceptance import acceptance
from secateur.reporting.fit import DraftResult
from secateur.runtime.decode import SlotDecoder, Token
from secateur.runtime.speculative import FREQUENT
from secateur.steps import draft as drafts
from secateur.steps.fitting.bench import FitBench

pytestmark = needs_kernels

TOKENS = 24
"""What the model mostly writes."""

OPTIONS: dict[str, Any] = {"effort": "fast", "heal_tokens": 160}


def parent(folder: Path) -> Path:
    """A model that prefers the first tokens."""
    save_tiny(folder, num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensor.mul_(4.0)
        if name == "model.embed_tokens.weight":
            tensor[:TOKENS] *= 6.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def text(file: Path) -> Path:
    """Twelve windows, and ten more that heal."""
    save_windows(tiny_windows(22, 40) % TOKENS, file, extra=10)
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, windows, and a draft of the model."""
    place = tmp_path_factory.mktemp("draft")
    with pytest.MonkeyPatch.context() as patch:
        use_fixed_times(replace=patch.setattr)
        patch.setattr(drafts, "HEADS", (48, TOKENS))
        secateur.draft(
            parent(place / "dense"), output=place / "made",
            calibration=text(place / "text.safetensors"), **OPTIONS,
        )  # fmt: skip
    return place


@pytest.fixture
def result(place: Path) -> DraftResult:
    """What the draft in `place` says."""
    record = json.loads((place / "made" / "secateur" / "draft.json").read_text())
    return DraftResult.model_validate(record)


def test_the_head_has_the_frequent_tokens(place: Path, result: DraftResult) -> None:
    tensors = load_file(place / "made" / "secateur" / FREQUENT)
    assert [*tensors] == ["ids"]
    ids = tensors["ids"].tolist()
    assert tensors["ids"].dtype == torch.int64
    assert ids == sorted(set(ids))
    assert len(ids) == result.head_tokens in (TOKENS, 48)
    assert {0, 1, 2, 3} <= set(ids)  # <pad>, <bos>, <eos> and <unk>
    assert max(ids) < result.vocabulary == 96
    made = secateur.load(place / "made")
    assert made.get_input_embeddings().num_embeddings == 96


def test_what_is_said_is_what_the_folder_does(place: Path, result: DraftResult) -> None:
    ids = load_file(place / "made" / "secateur" / FREQUENT)["ids"]
    judged = load_windows(place / "text.safetensors")[10:12]
    models = secateur.load(place / "made"), secateur.load(place / "dense")
    [got] = acceptance(*models, judged, heads=[ids])
    assert result.acceptance.mean == pytest.approx(got.mean, abs=1e-5)
    assert result.acceptance.agreement == got.agreement
    assert result.acceptance.runs == pytest.approx(got.runs, abs=1e-5)
    assert 0.3 < got.mean < 1.0


def test_the_speed_up_is_that_of_the_formula(result: DraftResult) -> None:
    assert result.parent_seconds == PARENT
    for found, runs, temperature in (
        (result.sampled, result.acceptance.runs, 1.0),
        (result.greedy, result.acceptance.greedy_runs, 0.0),
    ):
        drawing, by_k = drawing_time(temperature, 96, result.head_tokens), dict[int, float]()
        for k in range(1, 8):
            tokens = 1 + sum(runs[:k])
            seconds = k * (result.draft_seconds + drawing.proposed) + PARENT[k]
            alone = PARENT[0] + drawing.judged
            by_k[k] = tokens * alone / (seconds + tokens * drawing.judged)
        assert found.speedup == pytest.approx(max(by_k.values()))
        assert by_k[found.k] == found.speedup
        assert found.accepted == pytest.approx(sum(runs[: found.k]))


def test_a_head_takes_the_time_of_its_rows(result: DraftResult) -> None:
    whole, *some = result.heads
    assert [one.tokens for one in result.heads] == [96, 48, TOKENS]
    assert whole.seconds == 0.3
    for one in some:
        rows = 96 - one.tokens
        bits = {"int8": 8, "int4": 4, "int3": 4}[result.embeddings]
        assert whole.seconds - one.seconds == pytest.approx(1e-6 * rows * 64 * bits / 8)
        assert one.acceptance.mean <= whole.acceptance.mean + 1e-6
    best = max(result.heads, key=lambda one: one.gain)
    assert (result.head_tokens, result.draft_seconds) == (best.tokens, best.seconds)


def test_the_best_draft_that_was_made_is_the_result(result: DraftResult) -> None:
    made = [one for one in result.candidates if not one.healed]
    assert 1 <= len(made) <= 3
    assert len({one.divergence for one in made}) == len(made)
    assert result.frontier
    assert result.kind_of.keys() == {
        f"model.layers.{layer}.{linear}"
        for layer in range(2)
        for linear in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    }  # fmt: skip
    assert not result.broken


def test_the_card_says_whose_draft_it_is(place: Path, result: DraftResult) -> None:
    card = (place / "made" / "README.md").read_text(encoding="utf-8")
    assert f"a draft of {place / 'dense'}".replace(str(place) + "/", "") in card
    assert f"{result.acceptance.mean:.0%}" in card
    for notes in (place / "made" / "secateur").glob("*.json"):
        assert ".partial" not in notes.read_text(encoding="utf-8"), notes.name


def test_a_healed_draft_is_made_again_by_its_recipe(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fixed_times(replace=monkeypatch.setattr)
    real = FitBench.divergence

    def divergence(self: FitBench, folder: Path) -> float:
        return real(self, folder) + (0.0 if folder.name == "healed" else 1.0)

    monkeypatch.setattr(FitBench, "divergence", divergence)
    measured = drafts.DraftBench.acceptances

    def acceptances(self: drafts.DraftBench, folder: Path, *rest: Any) -> Any:
        found = measured(self, folder, *rest)
        better = 1.0 if folder.name == "healed" else 0.5
        return [x.model_copy(update={"runs": tuple(better * r for r in x.runs)}) for x in found]

    monkeypatch.setattr(drafts.DraftBench, "acceptances", acceptances)
    found = secateur.draft(
        place / "dense", output=tmp_path / "made", calibration=place / "text.safetensors", **OPTIONS
    )
    assert [one.healed for one in found.candidates].count(True) == 1
    assert found.unhealed is not None
    assert found.unhealed.runs[0] < found.acceptance.runs[0]
    assert found.packed.rounding["distillation"]["tokens"] >= 160
    options = yaml.safe_load((tmp_path / "made" / "secateur" / "recipe.yaml").read_text())
    secateur.chain(options.pop("model"), **{**options, "output": tmp_path / "again"})
    files = [*(tmp_path / "made").glob("*.safetensors")]
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_finished_draft_is_shown_again(place: Path, result: DraftResult) -> None:
    again = secateur.draft(
        place / "dense", output=place / "made", calibration=place / "text.safetensors", resume=True,
        **OPTIONS,
    )  # fmt: skip
    assert again == result
    assert "temperature 1" in str(again)


def test_where_nothing_pays_the_exit_code_is_3_and_the_miss_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_fixed_times(1.1, monkeypatch.setattr)
    words = ("--calibration", place / "text.safetensors", "--effort", "fast")
    run = runner(monkeypatch, capsys)
    done = run("draft", place / "dense", *words, "--output", tmp_path / "made", "--json")
    assert done.code == 3
    found = json.loads(done.out)
    assert found["sampled"]["k"] == 1
    assert found["sampled"]["speedup"] < 1.05
    assert (tmp_path / "made" / "config.json").exists()
    done = run(
        "draft", place / "dense", *words, "--output", tmp_path / "made", "--resume",
    )  # fmt: skip
    assert done.code == 3
    assert "110%" in done.out


def test_a_parent_that_runs_packed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fixed_times(replace=monkeypatch.setattr)
    secateur.compress(place / "dense", output=tmp_path / "int4", values="int4", embeddings="int4")
    found = secateur.draft(
        place / "dense", runs_as=tmp_path / "int4", output=tmp_path / "made", effort="fast",
        calibration=place / "text.safetensors",
    )  # fmt: skip
    assert found.parent == str(tmp_path / "int4")
    judged = load_windows(place / "text.safetensors")[10:12]
    made = secateur.load(tmp_path / "made")
    [packed], [dense] = (
        acceptance(made, secateur.load(folder), judged)
        for folder in (tmp_path / "int4", place / "dense")
    )
    assert found.acceptance.mean == pytest.approx(packed.mean, abs=1e-5)
    assert found.acceptance.mean != pytest.approx(dense.mean, abs=1e-5)


def test_a_parent_that_our_loop_does_not_decode(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "gpt2")
    with pytest.raises(ArchitectureError, match="gpt2"):
        secateur.draft(tmp_path / "dense", output=tmp_path / "made")
    assert not list(tmp_path.glob("made*"))


def test_real_times(place: Path) -> None:
    prompt = tiny_windows(1, 20)[0]
    models = secateur.load(place / "dense"), secateur.load(place / "made")
    parents, own = drafts.time_calls(*models, prompt)
    assert len(parents) == SlotDecoder.together == 8
    assert all(seconds > 0 for seconds in (*parents, own))
    decoder = SlotDecoder(models[1], 24)
    decoder.read(0, prompt)
    assert decoder.step([Token(0, 20, 5)]).shape == (1, 96)


def test_frequent_tokens_by_counting() -> None:
    windows = tiny_windows(9, 11)
    counts = dict.fromkeys(range(96), 0)
    for window in windows.tolist():
        for token in window:
            counts[token] += 1
    for count in (5, 40, 96):
        always = {0, 2, 95}
        others = sorted(set(counts) - always, key=lambda t: (-counts[t], t))
        expected = sorted([*always, *others[: count - 3]])
        assert drafts.frequent_tokens(windows, always, 96, count).tolist() == expected
