"""The choice of values for each matrix, against plain forwards of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from secateur.engine.search.stored_levels import ChosenLevels, Level, choose_levels
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import describe, linears_of
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Silent
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import dequantize_rows, quantize_rows
from trained import save_trained, source_ids

pytestmark = pytest.mark.usefixtures("exact_matmuls")


def windows() -> torch.Tensor:
    return source_ids(held_out=True)[: 8 * 64].view(8, 64)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return dequantize_rows(*quantize_rows(weight))
    grid = GroupGrid(bits, 128)
    return grid.dequantize(*grid.quantize(weight))


def linear_names(model) -> list[str]:
    architecture = describe(model)
    layers = enumerate(architecture.layers(model))
    return [x.name for i, y in layers for x in linears_of(y, architecture.layer_name(i)).values()]


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> list[Level]:
    """The trained model, and the same rounded to 8 and to 2 bits."""
    place = tmp_path_factory.mktemp("levels")
    source = save_trained(place / "source", steps=35)
    made = []
    for bits in (16, 8, 2):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        names = linear_names(model)
        errors = {}
        for number, name in enumerate(names):
            weight = model.get_submodule(name).weight.data
            if bits < 16:
                weight.copy_(rounded(weight, bits))
                errors[name] = 0.01 + number / 100
        model.save_pretrained(place / str(bits))
        sizes = {n: model.get_submodule(n).weight.numel() * bits // 8 for n in names}
        made.append(Level(str(bits), CheckpointReader(place / str(bits)), sizes, errors))
    return made


def chosen(levels: list[Level], bound: float, file: Path | None = None) -> ChosenLevels:
    target = CheckpointTarget(levels[0].reader, None, torch.device("cpu"))
    return choose_levels(target, levels, windows(), bound, file, Silent())


@torch.no_grad()
def loss_of(levels: list[Level], level_of: dict[str, int]) -> float:
    """The loss by one forward of a model put together by hand."""
    model = AutoModelForCausalLM.from_pretrained(levels[0].reader.folder, dtype=torch.float32)
    for name, level in level_of.items():
        model.get_submodule(name).weight.copy_(levels[level].reader.read(f"{name}.weight"))
    ids = windows()
    logits = model(input_ids=ids).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def size_of(levels: list[Level], level_of: dict[str, int]) -> int:
    return sum(levels[level].bytes_of[name] for name, level in level_of.items())


def test_the_loss_is_that_of_the_model_put_together_and_within_the_bound(levels) -> None:
    source = loss_of(levels, dict.fromkeys(levels[0].bytes_of, 0))
    worst = loss_of(levels, dict.fromkeys(levels[0].bytes_of, 2))
    sizes = []
    for share in (0.1, 0.4, 0.8):
        bound = share * (worst - source)
        found = chosen(levels, bound)
        assert found.source_loss == pytest.approx(source, abs=1e-5)
        assert found.uniform_loss[2] == pytest.approx(worst, abs=1e-5)
        assert found.loss == pytest.approx(loss_of(levels, found.level_of), abs=1e-5)
        assert found.loss <= source + bound
        assert set(found.level_of.values()) == {1, 2}
        sizes.append(size_of(levels, found.level_of))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_a_wide_bound_takes_the_smallest_level_and_none_leaves_the_model(levels) -> None:
    assert set(chosen(levels, 10.0).level_of.values()) == {2}
    assert set(chosen(levels, -1.0).level_of.values()) == {0}


def test_a_stopped_choice_repeats_nothing(levels, tmp_path, monkeypatch) -> None:
    source, worst = chosen(levels, 0.0).uniform_loss[0::2]
    bound = 0.3 * (worst - source)
    first = chosen(levels, bound, tmp_path / "values.jsonl")
    monkeypatch.setattr(
        "secateur.engine.search.candidate_evaluator.CandidateEvaluator.fitness",
        lambda *_: pytest.fail("measured again"),
    )
    assert chosen(levels, bound, tmp_path / "values.jsonl") == first
