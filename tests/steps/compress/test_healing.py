"""A compressed model learns from its parent before it is packed: zeros, grids, losses, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny, tiny_tokenizer
from trained import LENGTH, held_out_loss, save_trained, source_ids
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError, SecateurError
from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.install import open_checkpoint
from secateur.runtime.packed import PackedCheckpoint

OWN = {"*.down_proj": "int8", "*.layers.1.*": "int3", "*.o_proj": "bfloat16"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model, the same with zeros, and windows of its text."""
    place = tmp_path_factory.mktemp("healing")
    save_trained(place / "parent", steps=80)
    ids = source_ids()[: 48 * LENGTH].view(48, LENGTH)
    save_windows(ids, place / "windows.safetensors", extra=24)
    secateur.prune(
        place / "parent", output=place / "pruned", method="magnitude", sparsity=0.8,
        overrides={"*.0.mlp.*": 0.25, "*.v_proj": 0.0},
    )  # fmt: skip
    return place


def compressed(place: Path, output: Path, **options: Any) -> Any:
    usual = {
        "values": "int4", "overrides": OWN, "group_size": 32,
        "calibration": place / "windows.safetensors",
    }  # fmt: skip
    return secateur.compress(place / "pruned", output=output, **usual | options)


def loss(folder: Path) -> float:
    return held_out_loss(secateur.load(folder), source_ids(held_out=True))


HEALED = {"distill_epochs": 4, "embeddings": "int4", "distill_learning_rate": 2e-3}


def test_it_loses_less_and_keeps_its_zeros_and_values(place: Path, tmp_path: Path) -> None:
    plain = compressed(place, tmp_path / "plain", embeddings="int4")
    healed = compressed(place, tmp_path / "healed", distill_teacher=place / "parent", **HEALED)
    dense, before, after = (
        loss(x) for x in (place / "parent", tmp_path / "plain", tmp_path / "healed")
    )
    assert after - dense < 0.6 * (before - dense)
    assert healed.file_bytes <= plain.file_bytes + 200
    learned = healed.rounding["distillation"]
    assert learned["loss_after"] < learned["loss_before"]
    assert learned["teacher"] == str(place / "parent")
    assert learned["tokens"] == 4 * 48 * LENGTH
    assert "distillation" not in plain.rounding
    said = f"12,288 tokens from parent; distillation loss {learned['loss_before']:.4f} "
    assert said in (tmp_path / "healed" / "README.md").read_text()
    layouts = [PackedCheckpoint(tmp_path / x).layouts for x in ("plain", "healed")]
    assert layouts[0] == layouts[1]
    source, packed = CheckpointReader(place / "pruned"), open_checkpoint(tmp_path / "healed")
    for name in source.entries:
        if name.endswith("_proj.weight"):
            old, new = source.read(name), packed.read(name)
            assert not new[old == 0].any(), name
            assert not torch.equal(old, new.to(old.dtype)), name


def test_rounded_weights_are_on_their_grids_before_they_are_packed(
    place: Path, tmp_path: Path
) -> None:
    found = compressed(place, tmp_path / "healed", overrides={"*.down_proj": "int8"}, **HEALED)
    assert found.value_error < 1e-6


def test_dense_linears_that_are_not_rounded_learn_too(place: Path, tmp_path: Path) -> None:
    secateur.compress(
        place / "pruned", output=tmp_path / "floats", values="bfloat16", distill_epochs=2,
        distill_learning_rate=2e-3, calibration=place / "windows.safetensors",
        distill_teacher=place / "parent",
    )  # fmt: skip
    source, packed = CheckpointReader(place / "pruned"), open_checkpoint(tmp_path / "floats")
    for name in source.entries:
        if name.endswith("_proj.weight"):
            old, new = source.read(name), packed.read(name)
            assert not new[old == 0].any(), name
            assert not torch.equal(old.bfloat16(), new.bfloat16()), name
    dense, before, after = (
        loss(x) for x in (place / "parent", place / "pruned", tmp_path / "floats")
    )
    assert after - dense < 0.6 * (before - dense)


TRIED = {**HEALED, "distill_epochs": 2, "distill_learning_rate": None}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pruned model, few windows, and the model that heals without a stop."""
    place = tmp_path_factory.mktemp("stopped")
    save_tiny(place / "parent", num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    save_windows(tiny_windows(16, 32), place / "windows.safetensors", extra=8)
    secateur.prune(place / "parent", output=place / "pruned", method="magnitude", sparsity=0.6)
    compressed(place, place / "whole", **TRIED)
    return place


@pytest.mark.parametrize(
    ("stage", "steps"),
    [("distilling", 14), ("choosing the learning rate", 6), ("packing", 3)],
)
def test_a_stopped_one_continues_with_the_same_bytes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, steps: int
) -> None:
    monkeypatch.setattr("secateur.training.distillation.SAVE_MINUTES", 0.0)
    with pytest.raises(StoppedError):
        compressed(small, tmp_path / "out", progress=StopAt(stage, steps), **TRIED)
    compressed(small, tmp_path / "out", resume=True, **TRIED)
    for file in (small / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("verb", ["prune", "compress"])
def test_the_teacher_may_have_other_layers_but_no_other_words(
    place: Path, tmp_path: Path, verb: str
) -> None:
    own = {"values": "int4"} if verb == "compress" else {"sparsity": 0.5, "method": "wanda"}
    other = save_tiny(tmp_path / "other", tokenizer=False, num_hidden_layers=1, hidden_size=32)
    tiny_tokenizer(["other"]).save_pretrained(other)
    options = {
        **own, "output": tmp_path / "out", "calibration": place / "windows.safetensors",
        "distill_epochs": 1, "distill_learning_rate": 1e-3,
    }  # fmt: skip
    run = getattr(secateur, verb)
    with pytest.raises(RecipeError, match="different vocabularies"):
        run(place / "pruned", distill_teacher=other, **options)
    with pytest.raises(SecateurError, match="nowhere"):
        run(place / "pruned", distill_teacher=tmp_path / "nowhere", **options)
    tiny_tokenizer(model_max_length=256).save_pretrained(other)
    with pytest.raises(RecipeError, match="64 and 32 channels"):
        run(place / "pruned", distill_teacher=other, distill_hidden=1.0, **options)
    run(place / "pruned", distill_teacher=other, **options)
