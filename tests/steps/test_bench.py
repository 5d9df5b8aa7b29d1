"""Timing a model with a draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_tiny

import secateur
from reporting.examples import write_draft
from secateur.errors import CheckpointError, RecipeError
from secateur.evaluation.generation import KINDS
from secateur.reporting.evaluate import GAIN


def test_a_draft_is_timed_beside_the_model_alone(tmp_path: Path) -> None:
    sizes = {"head_dim": 16, "max_position_embeddings": 512}
    model = save_tiny(tmp_path / "m", "llama", **sizes)
    secateur.compress(model, values="int4", group_size=32, output=tmp_path / "draft")
    notes = tmp_path / "draft" / "secateur" / "draft.json"
    notes.write_text('{"greedy": {"speedup": 1.5}}')
    with pytest.raises(CheckpointError, match="Field required"):
        secateur.bench(str(model), draft=str(tmp_path / "draft"), new_tokens=2)
    known = json.loads((write_draft(tmp_path / "other") / "secateur" / "draft.json").read_text())
    known["greedy"]["speedup"], known["sampled"]["speedup"], known["parent"] = 1.5, 1.27, str(model)
    notes.write_text(json.dumps(known))
    found = secateur.bench(str(model), draft=str(tmp_path / "draft"), new_tokens=20)
    assert found.expected == (1.5, 1.27)
    assert str(found).count("1.27") >= 4
    assert [(x.kind, x.temperature) for x in found.speeds] == [
        (kind, temperature) for temperature in (0.0, 1.0) for kind in KINDS
    ]
    for speed in found.speeds:
        assert speed.equal is (None if speed.temperature else True)
        assert speed.tokens == 4 * 19 == speed.calls + speed.accepted
        assert speed.accepted <= speed.proposed
        assert min(speed.alone_seconds, speed.drafted_seconds) > 0
    said = found.to_json()
    assert said["speeds"][0]["speedup"] == found.speeds[0].speedup
    assert ("no gain" in said["verdict"]) == (max(map(found.speedup, (0.0, 1.0))) < GAIN)
    with pytest.raises(RecipeError, match="rounds with draft"):
        secateur.bench(str(model), draft="any", rounds=3)
