"""What is decided, and when nothing can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from secateur.advisor.advice import Advice, AdviceQuestion, Requirements, advise_on, nearest
from secateur.advisor.capacity import Capacity, Load, ServingDevice, weight_bytes
from secateur.advisor.facts import Estimate, read_facts
from secateur.advisor.options import CompressionWay
from secateur.errors import RecipeError
from secateur.models.shape import ModelShape


class ByBytes:
    """Every step takes as long as the weights have gigabytes."""

    def step(self, model: ModelShape, option: CompressionWay, batch: int, context: int) -> Estimate:
        return Estimate.exact(weight_bytes(model, option) / 1e9)

    def prompt(self, model: ModelShape, option: CompressionWay, tokens: int) -> Estimate:
        return Estimate.exact(0.0)


@dataclass(frozen=True)
class ByBytesQuestion(AdviceQuestion):
    """A question about one device with these times."""

    batch: int = 512

    @property
    def device(self) -> ServingDevice:
        times = ByBytes()
        return ServingDevice(
            "cuda", self.memory_bytes, lambda n: times, most=1, most_batch=self.batch
        )


def decided(
    requests: float, quality_loss: float | None, hours: float | None = None, batch: int = 1
) -> Advice:
    facts = read_facts()
    model = facts.shapes["llama-2-7b"].shape("llama-2-7b")
    need = Requirements(Load(requests, 100, 100), quality_loss, hours)
    h100 = facts.hardware["h100-80gb"]
    return advise_on(ByBytesQuestion(model, h100, 80 * 2**30, facts, need, batch=batch))


def test_one_device_is_enough_so_the_model_stays_as_it_is() -> None:
    found = decided(requests=1, quality_loss=0.5)
    assert found.chosen is not None
    assert found.chosen.option.name == "as it is"
    assert found.verdict.endswith(
        "leave the model as it is: no cheaper option is certain to meet your limits."
    )


def test_a_load_that_does_not_fill_a_device_is_sent_elsewhere_first() -> None:
    """A thousand requests of 500 tokens a day on an H100: no row of the tables contradicts it."""
    facts = read_facts()
    model = facts.shapes["llama-3.1-8b"].shape("llama-3.1-8b")
    device = facts.hardware["h100-80gb"]
    room, need = round(79.1 * 2**30), Requirements(Load(1000, 250, 250), 0.01)
    question = AdviceQuestion(model, device, room, facts, need)
    found = question.answer()
    assert found.verdict == (
        "This load does not fill a device: it needs under 1% of one NVIDIA H100 80 GB SXM. Use a "
        "hosted model (gpt-4o-mini: 6 USD a month) or smaller hardware (NVIDIA GeForce RTX 4090: "
        "248 USD a month, 21 ms/token). On this device, leave the model as it is: no cheaper "
        "option is certain to meet your limits."
    )
    assert found.chosen is not None
    capacity = found.chosen.capacity
    assert isinstance(capacity, Capacity)
    # by hand: 1000 · 2 / 86400 requests a second at the peak, each of 250 steps at batch 512
    assert found.filled == pytest.approx(2000 / 86400 * capacity.least_busy.typical / 0.7)
    # memory and time of the one sequence that is there, not of the 512 that would fit
    assert capacity.batch == 1
    assert capacity.memory.cache == 500 * 2 * 32 * 8 * 128 * 2
    assert capacity.memory.total < 17 * 2**30
    assert capacity.step.typical == pytest.approx(
        ((model.linears + model.head) * 2 + capacity.memory.cache) / (3350e9 * 0.7) + 32 * 4e-6
    )
    # what it names is true: the other device serves the same load within the same bounds
    assert found.elsewhere is not None
    smaller = question.on(facts.hardware["rtx-4090"]).answer()
    assert smaller.chosen is not None
    assert smaller.chosen.cost is not None
    assert smaller.chosen.cost.month.typical == found.elsewhere.month
    assert found.hosted is not None
    assert found.hosted.month == min(api.month for api in found.apis)


def test_a_load_that_fills_its_device_is_not_sent_away() -> None:
    facts = read_facts()
    model = facts.shapes["llama-3.1-8b"].shape("llama-3.1-8b")
    need = Requirements(Load(1e6, 250, 250), 0.03)
    device = facts.hardware["h100-80gb"]
    found = AdviceQuestion(model, device, round(79.1 * 2**30), facts, need).answer()
    assert found.filled >= 0.5
    assert found.elsewhere is None
    assert "fill" not in found.verdict


def test_quantizing_wins_where_it_keeps_the_bound() -> None:
    found = decided(requests=10_000, quality_loss=0.01)
    assert found.chosen is not None
    assert found.chosen.option.name == "fp8"
    assert found.verdict.startswith("Only quantize: fp8.")
    # what may keep it is named, and costs less
    assert found.cheaper
    assert found.chosen.cost is not None
    for row in found.cheaper:
        assert row.cost is not None
        assert row.cost.month.typical < found.chosen.cost.month.typical
        assert row.kept[0] < 0.99 <= row.kept[1]


def test_a_looser_bound_lets_cuts_win_and_hours_rule_them_out() -> None:
    loose = decided(requests=10_000, quality_loss=0.1)
    assert loose.chosen is not None
    assert "width-50%-distilled" in loose.chosen.option.name
    assert loose.verdict.startswith("Distill")
    short = decided(requests=10_000, quality_loss=0.1, hours=50)
    assert short.chosen is not None
    assert short.chosen.making.gpu_hours.typical <= 50
    assert "distilled" not in short.chosen.option.name
    out = {row.option.name: row.refused for row in short.considered}
    assert "GPU hours to make, 50 allowed" in out["width-50%-distilled"]


def test_a_training_is_advised_only_where_three_years_of_service_pay_for_it() -> None:
    """On a board of 125 USD, distillation for thousands of USD saves a few USD a month."""
    facts = read_facts()
    model = facts.shapes["llama-2-7b"].shape("llama-2-7b")
    board = facts.hardware["raspberry-pi-5"]
    need = Requirements(Load(1000, 250, 250), 0.1)
    question = AdviceQuestion(model, board, round(6.5 * 2**30), facts, need)
    found = question.answer()
    assert found.chosen is not None
    assert found.chosen.option.name == "int4"
    rows = {row.option.name: row for row in found.considered if row.possible}
    distilled = rows["width-50%-distilled + int4"]
    assert distilled.safe
    assert distilled.month < found.chosen.month
    assert distilled.making.usd.typical > 36 * (found.chosen.month - distilled.month)
    assert distilled.total == 36 * distilled.month + distilled.making.usd.typical
    # a large service pays for it within a month
    large = decided(requests=10_000, quality_loss=0.1)
    assert large.paid_back_months is not None
    assert large.paid_back_months < 1
    # where nothing else serves, the verdict says what the training costs
    larger = replace(question, model=facts.shapes["llama-2-13b"].shape("llama-2-13b"))
    only = larger.answer()
    assert only.chosen is not None
    price = f"{only.chosen.making.usd.typical:,.0f}"
    assert only.verdict.startswith(f"Distill and quantize for {price} USD once: width-50%-")


def test_nothing_serves_a_load_whose_latency_is_impossible() -> None:
    facts = read_facts()
    model = facts.shapes["llama-2-7b"].shape("x")
    need = Requirements(Load(1000, 100, 100, token_ms=0.001), 0.01)
    h100 = facts.hardware["h100-80gb"]
    found = advise_on(ByBytesQuestion(model, h100, 80 * 2**30, facts, need))
    assert found.chosen is None
    assert found.verdict.startswith("No option is certain to serve this load within your limits.")
    assert all(row.refused for row in found.considered)


@pytest.mark.parametrize(
    ("bounds", "flag", "field"),
    [
        ({"token_ms": 0.5}, "--latency-p99-ms ", "token_ms"),
        ({"first_token_ms": 1.0}, "--first-token-ms ", "first_token_ms"),
        ({"new_tokens": 4096, "quality_loss": 0.001}, "--quality-loss ", "quality_loss"),
    ],
)
def test_the_nearest_bound_that_is_named_can_be_kept(
    bounds: dict[str, float], flag: str, field: str
) -> None:
    facts = read_facts()
    model = facts.shapes["llama-3.1-8b"].shape("llama-3.1-8b")
    room = 12 * 2**30  # bfloat16 does not fit
    need = Requirements(Load(1000, 100, 100), 0.03)
    device = facts.hardware["laptop-cpu"]
    question = AdviceQuestion(model, device, room, facts, need).with_need(**bounds)
    found = question.answer()
    assert found.chosen is None
    line = next(one for one in nearest(found.considered, question.need) if flag in one)
    value = float(line.split(flag)[1])
    again = question.with_need(**{field: value}).answer()
    assert again.chosen is not None
    assert line.startswith(again.chosen.option.name)


def test_hours_and_memory_are_named_too() -> None:
    facts = read_facts()
    model = facts.shapes["llama-3.1-70b"].shape("llama-3.1-70b")
    load = Load(1000, 100, 100)
    small = AdviceQuestion(
        model, facts.hardware["laptop-cpu"], 2**30, facts, Requirements(load, 0.03)
    )
    (line,) = nearest(small.answer().considered, small.need)
    assert line == "int4 needs the least memory: 37.1 GiB"
    short = AdviceQuestion(
        model, facts.hardware["laptop-cpu"], 40 * 2**30, facts, Requirements(load, None, 1.0)
    )
    lines = [*nearest(short.answer().considered, short.need)]
    assert "int4 takes --gpu-hours 9" in lines


def test_a_users_facts_replace_single_entries(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("hardware:\n  h100-80gb: {usd_per_hour: [9, 9, 9]}\napis: {}\n")
    facts = read_facts(own)
    assert facts.hardware["h100-80gb"].usd_per_hour == (9, 9, 9)
    assert facts.hardware["h100-80gb"].bandwidth_gb_s == 3350
    assert facts.apis.keys() == read_facts().apis.keys()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hardware: {h100-80gb: {usd_per_hour: [3, 2, 1]}}", "usd_per_hour is"),
        (
            "hardware: {mine: {name: x, kind: cuda, usd_per_hour: [1, 1, 1]}}",
            "^mine needs memory_gib",
        ),
        ("hardware: {mine: {name: x, kind: cpu, usd_per_hour: [1, 1, 1]}}", "mine needs memory"),
        ("hardware: {h200: {memory_gib: -3}}", "larger than 0"),
        ("efficiency: {cuda: {compute: [0.9, 0.5, 2]}}", "compute is"),
        (
            "hardware: {mine: {name: x, kind: tpu, usd_per_hour: [1, 1, 1]}}",
            "kind is one of: cuda, llama.cpp, cpu",
        ),
        ("speed: 3", "speed: Extra inputs"),
        ("- 1", "no table of names"),
        ("{", "cannot be read"),
    ],
)
def test_wrong_facts_are_named(tmp_path: Path, text: str, said: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_facts(own)


def test_unknown_hardware_names_a_near_one() -> None:
    with pytest.raises(RecipeError, match="no hardware is called 'h100'") as caught:
        read_facts().device("h100")
    assert "h100-80gb" in str(caught.value)
