"""Whole models against the dense one, compared with a direct computation in transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Silent
from secateur.workflows.fit.yardstick import Yardstick
from tiny import save_tiny
from zoo import tiny_windows


@torch.no_grad()
def logits_of(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(windows).logits.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [{}, {"num_hidden_layers": 1}, {"intermediate_size": 24}])
def test_a_model_of_any_shape_is_compared_with_the_dense_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, int]
) -> None:
    monkeypatch.setattr("secateur.precision._fast_bfloat16", lambda device: False)
    save_tiny(tmp_path / "dense", num_hidden_layers=2)
    save_tiny(tmp_path / "work" / "other", **{"num_hidden_layers": 2, **shape})
    windows, reader = tiny_windows(4, 16), CheckpointReader(tmp_path / "dense")
    device = torch.device("cpu")
    ground = SimpleNamespace(
        target=CheckpointTarget(reader, None, device), reader=reader, work=tmp_path / "work",
        recipe=SimpleNamespace(trust_remote_code=False), progress=Silent(),
    )  # fmt: skip
    dense, other = (logits_of(tmp_path / x, windows) for x in ("dense", "work/other"))
    divergence = kl_div(
        other.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    following = windows[:, 1:].flatten()
    losses = [cross_entropy(x[:, :-1].flatten(0, 1), following) for x in (other, dense)]
    for _ in range(2):  # the second one reads its file
        measure = Yardstick(ground, windows, "some")  # type: ignore[arg-type]
        found = measure.divergence(tmp_path / "work" / "other")
        assert found == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-6)
        rise = measure.rise(tmp_path / "work" / "other")
        assert rise == pytest.approx(float(losses[0] - losses[1]), abs=1e-5)
        monkeypatch.setattr(
            "secateur.engine.choose.tournament.Lockstep.fitness", lambda *_: pytest.fail("again")
        )
