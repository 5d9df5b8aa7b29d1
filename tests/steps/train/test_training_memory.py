"""What a training will need: refused before it begins, and near what it then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from slow import slow
from tiny import save_tiny
from trained import source_text

import secateur
from secateur.errors import MemoryBudgetError

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are more than the program, and a text."""
    place = tmp_path_factory.mktemp("memory")
    save_tiny(place / "wide", **WIDE)
    (place / "text.txt").write_text(source_text()[:60_000])
    return place


def options(places: Path, **more: Any) -> dict[str, Any]:
    return {"text": str(places / "text.txt"), "steps": 2, "windows": 24, "validation_windows": 0,
            **more}  # fmt: skip


MEASURE = """
import json, sys, secateur
model, output, options = *sys.argv[1:3], json.loads(sys.argv[3])
report = secateur.train(model, output=output, **options)
print(json.dumps(report.manifest.to_json()))
"""


@pytest.mark.parametrize(
    ("teacher", "more"),
    [
        slow((None, {})),
        slow((None, {"optimizer": "SGD", "optimizer_options": {"momentum": 0.0}})),
        slow((None, {"lora": 4})),
        slow(("wide", {"gradient_checkpointing": True})),
    ],
)
def test_the_peak_is_near_what_was_predicted(
    teacher: str | None, more: dict[str, Any], places: Path, tmp_path: Path
) -> None:
    chosen = options(places, **more)
    if teacher is not None:
        chosen["teacher"] = str(places / teacher)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, places / "wide", tmp_path / "out", json.dumps(chosen)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    manifest = json.loads(out.splitlines()[-1])
    planned, peak = manifest["planned"], manifest["cost"]["peak_resident_bytes"]
    tensors = load_file(places / "wide" / "model.safetensors")
    weights = sum(t.numel() for t in tensors.values())
    adapters = sum(4 * sum(t.shape) for n, t in tensors.items() if n.endswith("proj.weight"))
    copies = 1 if "optimizer" in more else 3  # gradients; with Adam two moments
    trained = adapters if "lora" in more else weights
    assert planned["weights"] == 4 * (weights + adapters * ("lora" in more))
    assert planned["optimizer"] == 4 * copies * trained
    assert planned["peak"] == pytest.approx(peak, rel=0.25)


@pytest.mark.parametrize(
    ("more", "named", "remedy"),
    [
        ({"max_memory": "600MiB"}, "optimizer", "lora=16"),
        (
            {
                "lora": 2,
                "sequence_length": 64,
                "batch": 8,
                "micro_batch_windows": 8,
                "max_memory": "100MiB",
            },
            "weights",
            "budget",
        ),
        (
            {
                "sequence_length": 64,
                "batch": 64,
                "micro_batch_windows": 64,
                "max_memory": "700MiB",
            },
            "forward",
            "micro_batch_windows=1",
        ),
    ],
)
def test_what_would_not_fit_is_refused(
    more: dict[str, Any],
    named: str,
    remedy: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the process that runs the tests may have grown beyond any need of this training
    monkeypatch.setattr("secateur.training.setup.resident_bytes", lambda: 2**28)
    chosen = {**options(places, **more), "windows": 200}
    with pytest.raises(MemoryBudgetError) as error:
        secateur.train(places / "wide", output=tmp_path / "out", **chosen)
    assert named in str(error.value)
    assert remedy in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_may_go_on_with_more(places: Path, tmp_path: Path) -> None:
    chosen = options(places)
    with pytest.raises(MemoryBudgetError):
        secateur.train(places / "wide", output=tmp_path / "out", **chosen, max_memory="100MiB")
    done = secateur.train(places / "wide", output=tmp_path / "out", restart=True, **chosen)
    assert done.steps == 2
