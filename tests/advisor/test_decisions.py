"""What is decided, and when nothing can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.advisor.advice import AdviceQuestion, AdviseResult, Measured, weight_bytes
from secateur.advisor.facts import Estimate, read_facts
from secateur.advisor.options import CompressionWay
from secateur.errors import RecipeError
from secateur.models.shape import ModelShape


class ByBytes(Measured):
    """Every step takes as long as the weights have gigabytes."""

    def step(self, model: ModelShape, way: CompressionWay, batch: int, context: int) -> Estimate:
        return Estimate(*[weight_bytes(model, way) / 1e9] * 3)

    def prompt(self, model: ModelShape, way: CompressionWay, tokens: int) -> Estimate:
        return Estimate(0.0, 0.0, 0.0)


def decided(
    quality_loss: float, *, shape: str = "llama-2-7b", room: int = 80 * 2**30, **bounds: float
) -> AdviseResult:
    facts = read_facts()
    model, h100 = facts.shapes[shape].shape(shape), facts.hardware["h100-80gb"]
    question = AdviceQuestion(
        model, h100, room, facts, ByBytes(model, {}), 100, 100, quality_loss=quality_loss,
        **bounds,  # type: ignore[arg-type]
    )  # fmt: skip
    return AdviseResult.of(question, shape, "h100-80gb", "")


@pytest.mark.parametrize(
    ("quality_loss", "bounds", "chosen", "verdict"),
    [
        (0.0, {}, "as it is", "Leave the model"),
        (0.01, {}, "fp8", "Only quantize: fp8."),
        (0.03, {}, "int4", "Only quantize: int4."),
        (0.1, {"gpu_hours": 1e5}, "width-50%-distilled + int4", "Distill and quantize: width"),
        (0.3, {}, "layers-25% + int4", "Prune and quantize: layers"),
    ],
)
def test_the_least_bytes_win_that_surely_keep_the_bounds(
    quality_loss: float, bounds: dict[str, float], chosen: str, verdict: str
) -> None:
    found = decided(quality_loss, **bounds)
    assert found.chosen is not None
    assert found.chosen.option.name == chosen
    assert found.verdict.startswith(verdict)
    assert found.chosen.kept[0] >= 1 - quality_loss
    seconds = [row.seconds for row in found.considered if not row.refused]
    assert seconds == sorted(seconds)


def test_what_may_keep_the_bound_is_named_and_takes_less_time() -> None:
    found = decided(0.01)
    assert found.chosen is not None
    assert found.cheaper
    for row in found.cheaper:
        assert row.seconds < found.chosen.seconds
        assert row.kept[0] < 0.99 <= row.kept[1]
    assert found.cheaper[0].option.name in found.verdict


def test_hours_and_accuracy_rule_ways_out_with_numbers() -> None:
    found = decided(0.1, gpu_hours=50)
    out = {row.option.name: row.refused for row in found.considered}
    assert "50 allowed" in out["width-50%-distilled"]
    assert [word for word in out["2:4 zeros"].split() if "%" in word] == ["52.0%", "82.0%", "90.0%"]
    assert all(row.gpu_hours.typical <= 50 for row in found.considered if not row.refused)


@pytest.mark.parametrize("bounds", [{"token_ms": 0.001}, {"room": 2**28}])
def test_nothing_keeps_an_impossible_bound(bounds: dict[str, float]) -> None:
    found = decided(0.01, **bounds)  # type: ignore[arg-type]
    assert found.chosen is None
    assert all(row.refused for row in found.considered)


def test_the_largest_model_fits_in_four_bits() -> None:
    found = decided(0.03, shape="llama-3.1-70b")
    assert found.chosen is not None
    assert found.chosen.option.name == "int4"
    assert next(x for x in found.considered if not x.option.changes).served is None


def test_a_users_facts_replace_single_entries(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("hardware:\n  h100-80gb: {usd_per_hour: [9, 9, 9]}\nshapes: {}\n")
    facts = read_facts(own)
    assert facts.hardware["h100-80gb"].usd_per_hour == (9, 9, 9)
    assert facts.hardware["h100-80gb"].bandwidth_gb_s == 3350
    assert facts.shapes.keys() == read_facts().shapes.keys()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hardware: {h100-80gb: {usd_per_hour: [3, 2, 1]}}", "hardware.h100-80gb.usd_per_hour"),
        ("hardware: {mine: {name: x, kind: cuda}}", "mine needs memory_gib"),
        ("hardware: {h200: {memory_gib: -3}}", "hardware.h200.memory_gib"),
        ("efficiency: {cuda: {compute: [0.9, 0.5, 2]}}", "efficiency.cuda.compute"),
        ("hardware: {mine: {name: x, kind: tpu}}", "hardware.mine.kind"),
        ("hardware: [8]", "hardware"),
        ("speed: 3", "speed"),
        ("- 1", "own.yaml"),
        ("{", "own.yaml"),
    ],
)
def test_wrong_facts_are_named(tmp_path: Path, text: str, place: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_facts(own)
    assert place in str(caught.value)
