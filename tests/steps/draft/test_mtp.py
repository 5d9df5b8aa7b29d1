"""`secateur draft --mtp`: what a model's own MTP layers bring, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from at_rest import text_file
from commands import Outcome
from fixed_times import PARENT, drawing_time
from further import save_foreseen, save_further
from safetensors.torch import load_file
from tiny import tiny_llama

import secateur
from secateur.calibration.windows import load_windows, save_windows
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.mtp import read_mtp
from secateur.models.opening import load_whole, open_weights
from secateur.reporting.fit import MTPResult
from secateur.steps import draft as drafts

WINDOWS = {"windows": 6, "sequence_length": 24}


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole head takes 0.3 c(1), one of 24 tokens a tenth of that."""

    def turns(
        verify: Callable[[int], float], heads: Sequence[Callable[[], float]]
    ) -> tuple[tuple[float, ...], list[float]]:
        assert all(0 < call() < 1 for call in (lambda: verify(3), *heads))
        return PARENT, [0.3, 0.2, 0.03][: len(heads)]

    monkeypatch.setattr(drafts, "time_turns", turns)
    monkeypatch.setattr(drafts, "time_drawing", drawing_time)
    monkeypatch.setattr(drafts, "HEADS", (48, 24))


def test_a_layer_that_knows_the_text(tmp_path: Path) -> None:
    """All is taken at every place, so seven proposed tokens bring 8 / (7 · 0.3 + c(8))."""
    model = save_foreseen(tmp_path / "m", "qwen3_5_moe fused")
    made: MTPResult = secateur.draft(
        model, output=tmp_path / "o", mtp=True, calibration=text_file(tmp_path), **WINDOWS
    )
    assert made.acceptance.greedy_runs == (1.0,) * 7
    assert made.acceptance.runs == pytest.approx((1.0,) * 7, abs=0.01)
    assert made.greedy.k == made.chain == 7
    assert made.greedy.speedup == pytest.approx(8 / (7 * 0.3 + PARENT[7]))
    assert made.head_tokens == made.vocabulary == 96
    assert [one.tokens for one in made.heads] == [96, 48, 24]
    assert [place[0] for place in made.places] == [*range(1, 8)]
    assert made.exit_code == 0
    assert load_file(tmp_path / "o/model.safetensors") == {}
    assert '"num_speculative_tokens": 7' in made.engines["vLLM"]
    given = {"prompt": "some words", "max_new_tokens": 30}
    alone = secateur.generate(model, **given)
    with_layer = secateur.generate(model, draft=tmp_path / "o", **given)
    assert with_layer.text == alone.text
    assert with_layer.loop.startswith("transformers with MTP")


def test_the_list_with_the_largest_gain_is_written(tmp_path: Path) -> None:
    """The text has few tokens, so a head over 24 of them takes as much in a tenth of the time."""
    model = save_foreseen(tmp_path / "m", "glm4_moe")
    torch.manual_seed(0)
    weights = load_whole(model, torch.device("cpu"), dtype=torch.float32)
    tokens = torch.arange(24)
    with torch.inference_mode():  # the text that it writes itself stays among few tokens
        text = [tokens]
        for _ in range(23):
            text.append(weights(text[-1][:, None]).logits[:, -1].argmax(-1))
    windows = torch.stack(text, 1)
    few = windows[:, -6:].unique()
    assert len(few) < 24
    save_windows(windows[:, -6:].repeat(1, 4), tmp_path / "w.safetensors")
    made = secateur.draft(
        model, output=tmp_path / "o", mtp=True, calibration=tmp_path / "w.safetensors"
    )
    assert made.head_tokens == 24
    written = load_file(tmp_path / "o/model.safetensors")
    assert {*few.tolist()} <= {*written["ids"].tolist()}
    head = read_mtp(weights, open_weights(model)).head
    assert torch.equal(written["lm_head.weight"], head.weight[written["ids"]])
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["draft_vocab_size"] == 24
    assert config["num_speculative_tokens"] == made.chain
    given = {"prompt": "some words", "max_new_tokens": 30}
    alone, drafted = (secateur.generate(model, draft=x, **given) for x in (None, tmp_path / "o"))
    assert drafted.text == alone.text


def test_the_places_are_those_of_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula, from logits of the whole model and of the layer."""
    monkeypatch.setattr(drafts, "HEADS", ())
    model = save_further(tmp_path / "m", "glm4_moe")
    windows = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(0))
    save_windows(windows, tmp_path / "w.safetensors")
    made = secateur.draft(
        model, output=tmp_path / "o", mtp=True, calibration=tmp_path / "w.safetensors"
    )
    judged = load_windows(tmp_path / "w.safetensors")[-1:]
    parent = load_whole(model, torch.device("cpu"), dtype=torch.float32)
    mtp = read_mtp(parent, open_weights(model), torch.float32)
    with torch.inference_mode():
        states = parent.model(judged).last_hidden_state
        p = parent(judged).logits.softmax(-1)
        chain = [x.softmax(-1) for x in mtp(states[:, :13], mtp.embed(judged[:, 1:]), 7)]
    product = torch.ones(1, 13)
    for place, q in enumerate(chain, start=1):
        product = product * torch.minimum(p[:, place : place + 13], q).sum(-1)
        assert made.acceptance.runs[place - 1] == pytest.approx(product.mean().item(), abs=1e-5)


def test_the_command(
    tmp_path: Path, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that takes twice as long as its parent never pays."""
    monkeypatch.setattr(drafts, "time_turns", lambda verify, heads: (PARENT, [2.0] * 3))
    model, text = save_further(tmp_path / "m", "glm4_moe"), text_file(tmp_path)
    words = ["draft", model, "--mtp", "--calibration", text, "--windows", 6]
    words += ["--sequence-length", 24, "--output", tmp_path / "o", "--json"]
    planned = run(*words, "--dry-run")
    assert json.loads(planned.out) == {"layers": 1, "heads": [96, 48, 24]}
    made = run(*words)
    assert made.code == 3
    assert json.loads(made.out)["layers"] == 1


def test_what_is_refused(tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path / "p")
    given = {"output": tmp_path / "o", "mtp": True, "calibration": text_file(tmp_path), **WINDOWS}
    with pytest.raises(ArchitectureError, match="MTP"):
        secateur.draft(plain, **given)
    with pytest.raises(RecipeError, match="no model is made"):
        secateur.draft(plain, minutes=1.0, **given)
    model = save_further(tmp_path / "m", "glm4_moe")
    with pytest.raises(RecipeError, match="no room for a chain"):
        secateur.draft(model, **given | {"sequence_length": 2, "windows": 6})
